// One decoder layer of the training step, forward and backward (SPEC 1.32, 3.11), and what it keeps
// in between. Internal to kernels/train.
#pragma once
#include <chrono>
#include <map>
#include <string>

#include "kernels/train/attention_small.h"
#include "kernels/train/balance.h"
#include "kernels/train/ffn.h"
#include "kernels/train/step.h"

namespace v3b::kern::train {

class PhaseTimer {
 public:
  void start() { last_ = std::chrono::steady_clock::now(); }
  void lap(const char* phase) {
    const auto now = std::chrono::steady_clock::now();
    seconds[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }
  std::map<std::string, double> seconds;

 private:
  std::chrono::steady_clock::time_point last_;
};

template <class R, class X>
struct LayerActs {
  Buffer<R> h2;      // [N,d] after attention
  Buffer<X> x1, x2;  // [N,d] normalised inputs of attention and FFN
  Buffer<R> rstd1, rstd2, rstd_q, rstd_kv;
  Buffer<R> a;      // [N, a_width] before the latent norms
  Buffer<X> cq, c;  // [N,d_q], [N,d_c]
  AttnActs<R, X> attn;
  MlpActs<R, X> mlp;  // dense or shared
  Buffer<R> x2r, z;   // MoE: [N,d] router input, [N,E] logits
  MoeActs<R, X> moe;
};

template <class R, class X>
struct Scratch {
  Buffer<R> q, kv, kpe, y, d1, d2, dc, dkpe, kpe_heads, dh, dxg, w_bar, z_bar, s_bar;
  Buffer<X> x, dq, dkv, da, dgu;
  std::vector<Buffer<X>> dyg_t, dgu_t;
  std::vector<ExpertScratch<R>> expert;
  std::vector<AttnScratch<R, X>> attn;
  std::vector<R> partial;
  void threads(int n) {
    const auto s = static_cast<size_t>(n);
    if (attn.size() < s) attn.resize(s), expert.resize(s), dyg_t.resize(s), dgu_t.resize(s);
  }
};

template <class R, class X>
struct Net {  // what all layers share
  const model::ModelConfig* c;
  const R* w;          // masters
  const X* wx;         // GEMM operands, same offsets
  R* g;                // gradients
  const R *cos, *sin;  // [S, d_r/2]
  double scale;
  RouterDims router;
  LossOptions loss;
  Scratch<R, X>* t;
  PhaseTimer* timer;
};

// h [N,d] is the layer's input, out [N,d] its output (not the same). Adds the aux loss to *aux.
template <class R, class X>
void layer_fwd(const Net<R, X>& n, const LayerRef& L, int64_t B, int64_t S, const R* h,
               const float* bias, LayerActs<R, X>& A, R* out, double* aux) {
  const model::ModelConfig& c = *n.c;
  const int64_t N = B * S, d = c.hidden_size, nh = c.num_attention_heads, dqk = c.qk_head_dim();
  const int64_t dq = c.q_lora_rank, dc = c.kv_lora_rank, dr = c.qk_rope_head_dim;
  const int64_t qw = dq > 0 ? dq : nh * dqk, aw = qw + dc + dr;
  const int64_t kvw = nh * (c.qk_nope_head_dim + c.v_head_dim), ow = nh * c.v_head_dim;
  const AttnDims ad{B, S, nh, c.qk_nope_head_dim, dr, c.v_head_dim, n.scale};
  Scratch<R, X>& t = *n.t;
  A.x1.reserve_discard(N * d), A.x2.reserve_discard(N * d), A.h2.reserve_discard(N * d);
  A.rstd1.reserve_discard(N), A.rstd2.reserve_discard(N), A.a.reserve_discard(N * aw);
  A.rstd_q.reserve_discard(N), A.rstd_kv.reserve_discard(N);
  A.c.reserve_discard(N * dc), A.cq.reserve_discard(N * dq);
  A.attn.q.reserve_discard(B * nh * ad.sp() * dqk),
      A.attn.k.reserve_discard(B * nh * ad.sp() * dqk);
  A.attn.v.reserve_discard(B * nh * ad.sp() * ad.dv), A.attn.lse.reserve_discard(B * nh * ad.sp());
  A.attn.o.reserve_discard(N * ow);
  t.q.reserve_discard(N * nh * dqk), t.kv.reserve_discard(N * kvw), t.kpe.reserve_discard(N * dr);

  rmsnorm_fwd(N, d, h, d, n.w + L.in_norm, c.rms_norm_eps, A.x1.data(), d, A.rstd1.data());
  n.timer->lap("norm");
  mm_fwd(N, aw, d, A.x1.data(), n.wx + L.a_proj, A.a.data());
  n.timer->lap("gemm_attn");
  rmsnorm_fwd(N, dc, A.a.data() + qw, aw, n.w + L.kv_norm, 1e-6, A.c.data(), dc, A.rstd_kv.data());
  const R* q_raw = A.a.data();
  if (dq > 0) {
    rmsnorm_fwd(N, dq, A.a.data(), aw, n.w + L.q_norm, 1e-6, A.cq.data(), dq, A.rstd_q.data());
    n.timer->lap("norm");
    mm_fwd(N, nh * dqk, dq, A.cq.data(), n.wx + L.q_b, t.q.data());
    q_raw = t.q.data();
  } else {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      std::copy_n(A.a.data() + i * aw, qw, t.q.data() + i * qw);
    }
    q_raw = t.q.data();
  }
  mm_fwd(N, kvw, dc, A.c.data(), n.wx + L.kv_b, t.kv.data());
  n.timer->lap("gemm_attn");
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    std::copy_n(A.a.data() + i * aw + qw + dc, dr, t.kpe.data() + i * dr);
    rope_row(t.kpe.data() + i * dr, n.cos + i % S * (dr / 2), n.sin + i % S * (dr / 2), dr / 2,
             R(1));
  }
  attention_fwd(ad, q_raw, t.kv.data(), t.kpe.data(), n.cos, n.sin, A.attn, t.attn);
  n.timer->lap("attention");
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) std::copy_n(h + i * d, d, A.h2.data() + i * d);
  mm_fwd(N, d, ow, A.attn.o.data(), n.wx + L.o, A.h2.data(), true);
  n.timer->lap("gemm_attn");

  R* x2r = nullptr;
  if (L.moe) {
    A.x2r.reserve_discard(N * d);
    x2r = A.x2r.data();
  }
  rmsnorm_fwd(N, d, A.h2.data(), d, n.w + L.post_norm, c.rms_norm_eps, A.x2.data(), d,
              A.rstd2.data(), x2r);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) std::copy_n(A.h2.data() + i * d, d, out + i * d);
  n.timer->lap("norm");
  if (L.ffn.width > 0) {
    mlp_fwd(N, d, L.ffn.width, A.x2.data(), n.wx + L.ffn.gate_up, n.wx + L.ffn.down, A.mlp, out);
  }
  n.timer->lap("mlp");
  if (!L.moe) return;
  const RouterDims& r = n.router;
  MoeActs<R, X>& M = A.moe;
  A.z.reserve_discard(N * r.E), M.s.reserve_discard(N * r.E), M.w.reserve_discard(N * r.K);
  M.idx.reserve_discard(N * r.K);
  mm_fwd(N, r.E, d, static_cast<const R*>(A.x2r.data()), n.w + L.router, A.z.data());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    R* s = M.s.data() + i * r.E;
    for (int64_t e = 0; e < r.E; ++e) s[e] = sigmoid_of(A.z[i * r.E + e]);
    route_token(r, s, bias, M.idx.data() + i * r.K, M.w.data() + i * r.K);
  }
  dispatch(N, r, M);
  n.timer->lap("router");
  experts_fwd(N, d, c.moe_intermediate_size, r, A.x2.data(), n.wx + L.experts, L.expert_stride,
              2 * c.moe_intermediate_size * d, M, t.y, out);
  n.timer->lap("experts");
  if (n.loss.aux == AuxLoss::sequence) {
    *aux += sequence_balance<R>(B, S, r, n.loss.aux_alpha, n.loss.aux_f_from_routing, M.s.data(),
                                M.idx.data(), nullptr);
  } else if (n.loss.aux == AuxLoss::switch_loss) {
    *aux += switch_balance<R>(N, r, n.loss.aux_alpha, A.z.data(), M.counts, nullptr);
  }
  n.timer->lap("router");
}

// dh [N,d]: gradient of the output in, of the input out. h: the layer's input.
template <class R, class X>
void layer_bwd(const Net<R, X>& n, const LayerRef& L, int64_t B, int64_t S, const R* h,
               LayerActs<R, X>& A, R* dh) {
  const model::ModelConfig& c = *n.c;
  const int64_t N = B * S, d = c.hidden_size, nh = c.num_attention_heads, dqk = c.qk_head_dim();
  const int64_t dq = c.q_lora_rank, dc = c.kv_lora_rank, dr = c.qk_rope_head_dim;
  const int64_t qw = dq > 0 ? dq : nh * dqk, aw = qw + dc + dr;
  const int64_t kvw = nh * (c.qk_nope_head_dim + c.v_head_dim), ow = nh * c.v_head_dim;
  const AttnDims ad{B, S, nh, c.qk_nope_head_dim, dr, c.v_head_dim, n.scale};
  const RouterDims& r = n.router;
  Scratch<R, X>& t = *n.t;
  t.x.reserve_discard(N * d), t.d1.reserve_discard(N * std::max(d, ow));
  R* dx = t.d1.data();
  convert_rows(dh, t.x.data(), N * d);
  n.timer->lap("norm");
  bool acc = false;
  if (L.ffn.width > 0) {
    mlp_bwd(N, d, L.ffn.width, A.x2.data(), t.x.data(), n.wx + L.ffn.gate_up, n.wx + L.ffn.down,
            A.mlp, t.dgu, t.dh, dx, false, n.g + L.ffn.gate_up, n.g + L.ffn.down);
    acc = true;
  }
  n.timer->lap("mlp");
  if (L.moe) {
    MoeActs<R, X>& M = A.moe;
    t.w_bar.reserve_discard(N * r.K), t.z_bar.reserve_discard(N * r.E);
    if (!acc) std::fill(dx, dx + N * d, R(0));
    experts_bwd(N, d, c.moe_intermediate_size, r, t.x.data(), n.wx + L.experts, L.expert_stride,
                2 * c.moe_intermediate_size * d, M, t.dxg, t.dyg_t, t.dgu_t, t.expert, dx,
                t.w_bar.data(), n.g + L.experts);
    n.timer->lap("experts");
    R* zb = t.z_bar.data();
    std::fill(zb, zb + N * r.E, R(0));
    if (n.loss.aux == AuxLoss::sequence) {
      sequence_balance<R>(B, S, r, n.loss.aux_alpha, n.loss.aux_f_from_routing, M.s.data(),
                          M.idx.data(), zb);
    }
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < N; ++i) {
      R* g = zb + i * r.E;
      const R* s = M.s.data() + i * r.E;
      route_token_bwd(r, s, M.idx.data() + i * r.K, M.w.data() + i * r.K, t.w_bar.data() + i * r.K,
                      g);
      for (int64_t e = 0; e < r.E; ++e) g[e] *= s[e] * (R(1) - s[e]);
    }
    if (n.loss.aux == AuxLoss::switch_loss) {
      switch_balance<R>(N, r, n.loss.aux_alpha, A.z.data(), M.counts, zb);
    }
    mm_dx(N, r.E, d, static_cast<const R*>(zb), n.w + L.router, dx, true);
    mm_dw(N, r.E, d, static_cast<const R*>(zb), static_cast<const R*>(A.x2r.data()),
          n.g + L.router);
    n.timer->lap("router");
  }
  rmsnorm_bwd(N, d, dx, d, A.h2.data(), d, n.w + L.post_norm, A.rstd2.data(),
              static_cast<const R*>(dh), dh, d, n.g + L.post_norm, t.partial);
  convert_rows(dh, t.x.data(), N * d);
  n.timer->lap("norm");

  mm_dw(N, d, ow, t.x.data(), A.attn.o.data(), n.g + L.o);
  mm_dx(N, d, ow, t.x.data(), n.wx + L.o, t.d1.data());
  n.timer->lap("gemm_attn");
  t.dq.reserve_discard(N * nh * dqk), t.dkv.reserve_discard(N * kvw);
  t.dkpe.reserve_discard(N * dr), t.kpe_heads.reserve_discard(N * nh * dr);
  t.da.reserve_discard(N * aw), t.dc.reserve_discard(N * std::max(dc, dq)),
      t.d2.reserve_discard(N * d);
  attention_bwd(ad, A.attn, t.d1.data(), n.cos, n.sin, t.dq.data(), t.dkv.data(), t.dkpe.data(),
                t.kpe_heads.data(), t.attn);
  n.timer->lap("attention");
  const R* none = nullptr;
  mm_dw(N, kvw, dc, t.dkv.data(), A.c.data(), n.g + L.kv_b);
  mm_dx(N, kvw, dc, t.dkv.data(), n.wx + L.kv_b, t.dc.data());
  n.timer->lap("gemm_attn");
  rmsnorm_bwd(N, dc, t.dc.data(), dc, A.a.data() + qw, aw, n.w + L.kv_norm, A.rstd_kv.data(), none,
              t.da.data() + qw, aw, n.g + L.kv_norm, t.partial);
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    X* o = t.da.data() + i * aw + qw + dc;
    for (int64_t j = 0; j < dr; ++j) o[j] = st<X>(t.dkpe[i * dr + j]);
    if (dq == 0) std::copy_n(t.dq.data() + i * qw, qw, t.da.data() + i * aw);
  }
  n.timer->lap("norm");
  if (dq > 0) {
    mm_dw(N, nh * dqk, dq, t.dq.data(), A.cq.data(), n.g + L.q_b);
    mm_dx(N, nh * dqk, dq, t.dq.data(), n.wx + L.q_b, t.dc.data());
    n.timer->lap("gemm_attn");
    rmsnorm_bwd(N, dq, t.dc.data(), dq, A.a.data(), aw, n.w + L.q_norm, A.rstd_q.data(), none,
                t.da.data(), aw, n.g + L.q_norm, t.partial);
    n.timer->lap("norm");
  }
  mm_dw(N, aw, d, t.da.data(), A.x1.data(), n.g + L.a_proj);
  mm_dx(N, aw, d, t.da.data(), n.wx + L.a_proj, t.d2.data());
  n.timer->lap("gemm_attn");
  rmsnorm_bwd(N, d, t.d2.data(), d, h, d, n.w + L.in_norm, A.rstd1.data(),
              static_cast<const R*>(dh), dh, d, n.g + L.in_norm, t.partial);
  n.timer->lap("norm");
}

}  // namespace v3b::kern::train
