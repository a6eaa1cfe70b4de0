#include "reference/layer_backward.h"

#include "model/rope_table.h"
#include "model/router_config.h"
#include "reference/attention.h"
#include "reference/balance.h"
#include "reference/mla.h"
#include "reference/moe.h"
#include "reference/rmsnorm.h"
#include "reference/rope.h"
#include "reference/softmax.h"

namespace v3b::ref {
namespace {

constexpr double kLatentNormEps = 1e-6;  // SPEC 1.2

struct Attn {
  MlaShape m;
  AttentionShape core;
  spec::RopeForm form;
};
Attn attention_of(const model::ModelConfig& c, const spec::Flags& f, int64_t T, double scale) {
  Attn a;
  a.m = {c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
         c.kv_lora_rank};
  a.core.T = T;
  a.core.n_h = a.core.n_kv = a.m.n_h;
  a.core.d_qk = a.m.d_qk();
  a.core.d_v = a.m.d_v;
  a.core.scale = scale;
  a.form = spec::rope_form(f.rope_layout, c.rope_interleave);
  return a;
}

// Rotates (or rotates back) the rope part of every head, B sequences of T rows.
template <class S>
void rotate_q(const Attn& a, int64_t B, int64_t T, const std::vector<S>& cos,
              const std::vector<S>& sin, bool inverse, RowMatrix<S>& q) {
  RowMatrix<S> pe(T, a.m.n_h * a.m.d_r);
  for (int64_t b = 0; b < B; ++b) {
    auto rows = q.middleRows(b * T, T);
    for (int64_t h = 0; h < a.m.n_h; ++h)
      pe.middleCols(h * a.m.d_r, a.m.d_r) = rows.middleCols(h * a.m.d_qk() + a.m.d_n, a.m.d_r);
    rope<S>(T, a.m.n_h, a.m.d_r, a.form, inverse, pe.data(), cos.data(), sin.data(), pe.data());
    for (int64_t h = 0; h < a.m.n_h; ++h)
      rows.middleCols(h * a.m.d_qk() + a.m.d_n, a.m.d_r) = pe.middleCols(h * a.m.d_r, a.m.d_r);
  }
}

template <class S>
std::vector<Ffn<S>> expert_views(const LayerParams<S>& p) {
  std::vector<Ffn<S>> v;
  for (const auto& e : p.experts) v.push_back({e.gate.data(), e.up.data(), e.down.data()});
  return v;
}
template <class S>
Ffn<S> view(const FfnParams<S>& f) {
  if (f.gate.empty()) return {};
  return {f.gate.data(), f.up.data(), f.down.data()};
}
template <class S>
FfnGrad<S> grad_view(FfnParams<S>& f) {
  return {f.gate.data(), f.up.data(), f.down.data()};
}

// Value of the balance loss of one layer; d_scores (sequence) or d_z (switch) are added to if not
// null.
template <class S>
double balance(const model::ModelConfig& c, int64_t B, int64_t T, const LossOptions& o,
               const Routes<S>& r, const RowMatrix<S>& z, S* d_scores, S* d_z) {
  const int64_t E = c.n_routed_experts, K = c.num_experts_per_tok;
  if (o.balance == BalanceLoss::sequence) {
    double sum = 0;  // mean over sequences: alpha / B each
    for (int64_t b = 0; b < B; ++b)
      sum += double(sequence_loss<S>(T, E, K, r.scores.data() + b * T * E, r.idx.data() + b * T * K,
                                     o.flags.balance_f, S(o.alpha / double(B)),
                                     d_scores == nullptr ? nullptr : d_scores + b * T * E));
    return sum;
  }
  if (o.balance == BalanceLoss::switch_loss) {
    RowMatrix<S> p(B * T, E), dp = RowMatrix<S>::Zero(B * T, E), dz(B * T, E);
    softmax<S>(B * T, E, S(1), z.data(), p.data());
    const double loss =
        double(switch_loss<S>(B * T, E, K, p.data(), r.idx.data(), S(o.alpha), dp.data()));
    if (d_z != nullptr) {
      softmax_backward<S>(B * T, E, S(1), p.data(), dp.data(), dz.data());
      Eigen::Map<RowMatrix<S>>(d_z, B * T, E) += dz;
    }
    return loss;
  }
  return 0;
}

}  // namespace

template <class S>
RowMatrix<S> norm_forward(const RowMatrix<S>& x, const std::vector<S>& w, double eps) {
  RowMatrix<S> y(x.rows(), x.cols());
  rmsnorm<S>(x.rows(), x.cols(), S(eps), x.data(), w.data(), y.data());
  return y;
}
template <class S>
RowMatrix<S> norm_backward(const RowMatrix<S>& x, const std::vector<S>& w, double eps,
                           const RowMatrix<S>& dy, std::vector<S>& dw) {
  RowMatrix<S> dx(x.rows(), x.cols());
  rmsnorm_backward<S>(x.rows(), x.cols(), S(eps), x.data(), w.data(), dy.data(), dx.data(),
                      dw.data());
  return dx;
}

template <class S>
RowMatrix<S> layer_forward(const model::ModelConfig& c, const LayerParams<S>& p, int64_t B,
                           int64_t T, const LossOptions& o, const RowMatrix<S>& h,
                           LayerActs<S>& a) {
  const model::RopeFreqs freqs = model::rope_freqs(c, o.flags, T);
  const Attn at = attention_of(c, o.flags, T, freqs.softmax_scale);
  const MlaShape& m = at.m;
  std::vector<S> cos(size_t(T * m.d_r / 2)), sin(cos.size());
  rope_table<S>(freqs, 0, T, cos.data(), sin.data());
  a.h_in = h;
  a.x = norm_forward<S>(h, p.input_norm, c.rms_norm_eps);
  if (c.q_lora_rank > 0) {
    a.q_a = linear_forward<S>(a.x, p.q_a, c.q_lora_rank);
    a.c_q = norm_forward<S>(a.q_a, p.q_a_norm, kLatentNormEps);
    a.q = linear_forward<S>(a.c_q, p.q_b, m.n_h * m.d_qk());
  } else {
    a.q = linear_forward<S>(a.x, p.q_proj, m.n_h * m.d_qk());
  }
  rotate_q<S>(at, B, T, cos, sin, false, a.q);
  a.kv = linear_forward<S>(a.x, p.kv_a, m.d_c + m.d_r);
  a.c = norm_forward<S>(RowMatrix<S>(a.kv.leftCols(m.d_c)), p.kv_a_norm, kLatentNormEps);
  a.k_pe = a.kv.rightCols(m.d_r);
  a.o.resize(B * T, m.n_h * m.d_v);
  RowMatrix<S> k(T, m.n_h * m.d_qk()), v(T, m.n_h * m.d_v);
  for (int64_t b = 0; b < B; ++b) {
    S* pe = a.k_pe.data() + b * T * m.d_r;
    rope<S>(T, 1, m.d_r, at.form, false, pe, cos.data(), sin.data(), pe);
    mla_expand<S>(m, T, a.c.data() + b * T * m.d_c, pe, p.kv_b.data(), k.data(), v.data());
    attention_core<S>(at.core, a.q.data() + b * T * a.q.cols(), k.data(), v.data(),
                      a.o.data() + b * T * a.o.cols());
  }
  a.h_mid = h + linear_forward<S>(a.o, p.o, c.hidden_size);
  a.u = norm_forward<S>(a.h_mid, p.post_norm, c.rms_norm_eps);
  RowMatrix<S> y(B * T, c.hidden_size);
  if (!p.is_moe) {
    ffn<S>(B * T, c.hidden_size, c.intermediate_size, a.u.data(), view(p.mlp), y.data());
    return a.h_mid + y;
  }
  const int64_t E = c.n_routed_experts;
  a.z = linear_forward<S>(a.u, p.router, E);
  const bool biased = model::router_uses_bias(c, o.flags) && !p.bias.empty();
  a.routes = route<S>(model::router_config(c, o.flags), B * T, a.z.data(),
                      biased ? p.bias.data() : nullptr);
  moe<S>(B * T, c.hidden_size, c.moe_intermediate_size, E, c.num_experts_per_tok, a.u.data(),
         a.routes.idx.data(), a.routes.weight.data(), expert_views(p), view(p.shared),
         c.n_shared_experts * c.moe_intermediate_size, y.data());
  a.load.assign(size_t(E), 0);
  for (int32_t e : a.routes.idx) ++a.load[size_t(e)];
  a.aux = balance<S>(c, B, T, o, a.routes, a.z, nullptr, nullptr);
  return a.h_mid + y;
}

template <class S>
RowMatrix<S> layer_backward(const model::ModelConfig& c, const LayerParams<S>& p, int64_t B,
                            int64_t T, const LossOptions& o, const LayerActs<S>& a,
                            const RowMatrix<S>& dh, LayerParams<S>& g) {
  const int64_t N = B * T, d = c.hidden_size;
  RowMatrix<S> du = RowMatrix<S>::Zero(N, d);
  if (!p.is_moe) {
    ffn_backward<S>(N, d, c.intermediate_size, a.u.data(), view(p.mlp), dh.data(), du.data(),
                    grad_view(g.mlp));
  } else {
    const int64_t E = c.n_routed_experts, K = c.num_experts_per_tok;
    std::vector<FfnGrad<S>> eg;
    for (auto& e : g.experts) eg.push_back(grad_view(e));
    RowMatrix<S> d_weight(N, K), d_scores = RowMatrix<S>::Zero(N, E), dz(N, E),
                                 dz_aux = RowMatrix<S>::Zero(N, E);
    moe_backward<S>(N, d, c.moe_intermediate_size, E, K, a.u.data(), a.routes.idx.data(),
                    a.routes.weight.data(), expert_views(p), view(p.shared),
                    c.n_shared_experts * c.moe_intermediate_size, dh.data(), du.data(),
                    d_weight.data(), eg, grad_view(g.shared));
    (void)balance<S>(c, B, T, o, a.routes, a.z, d_scores.data(), dz_aux.data());
    route_backward<S>(model::router_config(c, o.flags), a.routes, d_weight.data(), d_scores.data(),
                      dz.data());
    dz += dz_aux;
    du += linear_backward<S>(a.u, p.router, dz, g.router);
  }
  const RowMatrix<S> d_mid =
      dh + norm_backward<S>(a.h_mid, p.post_norm, c.rms_norm_eps, du, g.post_norm);

  const model::RopeFreqs freqs = model::rope_freqs(c, o.flags, T);
  const Attn at = attention_of(c, o.flags, T, freqs.softmax_scale);
  const MlaShape& m = at.m;
  std::vector<S> cos(size_t(T * m.d_r / 2)), sin(cos.size());
  rope_table<S>(freqs, 0, T, cos.data(), sin.data());
  const RowMatrix<S> d_o = linear_backward<S>(a.o, p.o, d_mid, g.o);
  RowMatrix<S> dq(N, m.n_h * m.d_qk()), dc(N, m.d_c), dk_pe(N, m.d_r);
  RowMatrix<S> k(T, m.n_h * m.d_qk()), v(T, m.n_h * m.d_v), dk(k.rows(), k.cols()),
      dv(v.rows(), v.cols());
  for (int64_t b = 0; b < B; ++b) {
    const S* cb = a.c.data() + b * T * m.d_c;
    S* pe = dk_pe.data() + b * T * m.d_r;
    mla_expand<S>(m, T, cb, a.k_pe.data() + b * T * m.d_r, p.kv_b.data(), k.data(), v.data());
    attention_core_backward<S>(at.core, a.q.data() + b * T * a.q.cols(), k.data(), v.data(),
                               d_o.data() + b * T * d_o.cols(), dq.data() + b * T * dq.cols(),
                               dk.data(), dv.data());
    mla_expand_backward<S>(m, T, cb, p.kv_b.data(), dk.data(), dv.data(), dc.data() + b * T * m.d_c,
                           pe, g.kv_b.data());
    rope<S>(T, 1, m.d_r, at.form, true, pe, cos.data(), sin.data(), pe);
  }
  rotate_q<S>(at, B, T, cos, sin, true, dq);
  RowMatrix<S> dkv(N, m.d_c + m.d_r);
  dkv.leftCols(m.d_c) = norm_backward<S>(RowMatrix<S>(a.kv.leftCols(m.d_c)), p.kv_a_norm,
                                         kLatentNormEps, dc, g.kv_a_norm);
  dkv.rightCols(m.d_r) = dk_pe;
  RowMatrix<S> dx = linear_backward<S>(a.x, p.kv_a, dkv, g.kv_a);
  if (c.q_lora_rank > 0) {
    const RowMatrix<S> dc_q = linear_backward<S>(a.c_q, p.q_b, dq, g.q_b);
    dx += linear_backward<S>(
        a.x, p.q_a, norm_backward<S>(a.q_a, p.q_a_norm, kLatentNormEps, dc_q, g.q_a_norm), g.q_a);
  } else {
    dx += linear_backward<S>(a.x, p.q_proj, dq, g.q_proj);
  }
  return d_mid + norm_backward<S>(a.h_in, p.input_norm, c.rms_norm_eps, dx, g.input_norm);
}

#define V3B_INSTANTIATE(S)                                                                    \
  template RowMatrix<S> norm_forward<S>(const RowMatrix<S>&, const std::vector<S>&, double);  \
  template RowMatrix<S> norm_backward<S>(const RowMatrix<S>&, const std::vector<S>&, double,  \
                                         const RowMatrix<S>&, std::vector<S>&);               \
  template RowMatrix<S> layer_forward<S>(const model::ModelConfig&, const LayerParams<S>&,    \
                                         int64_t, int64_t, const LossOptions&,                \
                                         const RowMatrix<S>&, LayerActs<S>&);                 \
  template RowMatrix<S> layer_backward<S>(                                                    \
      const model::ModelConfig&, const LayerParams<S>&, int64_t, int64_t, const LossOptions&, \
      const LayerActs<S>&, const RowMatrix<S>&, LayerParams<S>&);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
