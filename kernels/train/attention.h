// Causal expanded-MLA attention core, forward and backward (SPEC 1.7, 3.3). Each (sequence, head)
// is one task; its scores are formed kQueryBlock rows at a time, so that scores, probabilities and
// their gradients stay in the L2 cache; the backward recomputes the probabilities from the saved
// log-sum-exp. Rows are padded to 16 with zeros so that few GEMM shapes occur. Internal to
// kernels/train.
#pragma once
#include <omp.h>

#include "kernels/train/ops.h"

namespace v3b::kern::train {

inline constexpr int64_t kQueryBlock = 64;
inline constexpr int64_t kRowPad = 16;
inline int64_t pad_rows(int64_t s) { return (s + kRowPad - 1) / kRowPad * kRowPad; }

struct AttnDims {
  int64_t B, S, nh, dn, dr, dv;
  double scale;
  int64_t dqk() const { return dn + dr; }
  int64_t sp() const { return pad_rows(S); }
};

template <class R, class X>
struct AttnActs {     // saved for the backward, per layer
  Buffer<X> q, k, v;  // [B, nh, sp, dqk | dqk | dv], RoPE applied, pad rows zero
  Buffer<R> lse;      // [B, nh, sp]
  Buffer<X> o;        // [B*S, nh*dv]
};

template <class R, class X>
struct AttnScratch {  // one thread's
  Buffer<R> s, dp, o, dq, dk, dv, delta;
  Buffer<X> p, ds, dop;
  void reserve(const AttnDims& a) {
    const int64_t sp = a.sp();
    s.reserve_discard(kQueryBlock * sp), dp.reserve_discard(kQueryBlock * sp);
    p.reserve_discard(kQueryBlock * sp), ds.reserve_discard(kQueryBlock * sp);
    o.reserve_discard(kQueryBlock * a.dv), dq.reserve_discard(sp * a.dqk());
    dk.reserve_discard(sp * a.dqk()), dv.reserve_discard(sp * a.dv);
    dop.reserve_discard(sp * a.dv), delta.reserve_discard(sp);
  }
};

// attention_small.h: the same on AVX512_BF16, for the types that have it.
inline bool small_attention_fits(const AttnDims& a);
inline void small_attention_fwd(const AttnDims& a, const bf16* Q, const bf16* K, const bf16* V,
                                float* lse, bf16* o, int64_t ldo, AttnScratch<float, bf16>& t);
inline void small_attention_bwd(const AttnDims& a, const bf16* Q, const bf16* K, const bf16* V,
                                const float* lse, AttnScratch<float, bf16>& t);

// q_raw [B*S, nh*dqk], kv_raw [B*S, nh*(dn+dv)], kpe [B*S, dr] already rotated; cos, sin [S, dr/2].
template <class R, class X>
void attention_fwd(const AttnDims& a, const R* q_raw, const R* kv_raw, const R* kpe, const R* cos,
                   const R* sin, AttnActs<R, X>& acts, std::vector<AttnScratch<R, X>>& scratch) {
  const int64_t sp = a.sp(), dqk = a.dqk(), half = a.dr / 2, kvw = a.dn + a.dv;
  [[maybe_unused]] const bool small = std::is_same_v<X, bf16> && small_attention_fits(a);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t bh = 0; bh < a.B * a.nh; ++bh) {
    const int64_t b = bh / a.nh, h = bh % a.nh;
    AttnScratch<R, X>& t = scratch[static_cast<size_t>(omp_get_thread_num())];
    t.reserve(a);
    X* Q = acts.q.data() + bh * sp * dqk;
    X* Kk = acts.k.data() + bh * sp * dqk;
    X* V = acts.v.data() + bh * sp * a.dv;
    R tmp[512];
    for (int64_t s = 0; s < a.S; ++s) {
      const int64_t row = b * a.S + s;
      const R* qr = q_raw + row * a.nh * dqk + h * dqk;
      const R* kr = kv_raw + row * a.nh * kvw + h * kvw;
      for (int64_t j = 0; j < a.dn; ++j) Q[s * dqk + j] = st<X>(qr[j]);
      for (int64_t j = 0; j < a.dr; ++j) tmp[j] = qr[a.dn + j];
      rope_row(tmp, cos + s * half, sin + s * half, half, R(1));
      for (int64_t j = 0; j < a.dr; ++j) Q[s * dqk + a.dn + j] = st<X>(tmp[j]);
      for (int64_t j = 0; j < a.dn; ++j) Kk[s * dqk + j] = st<X>(kr[j]);
      for (int64_t j = 0; j < a.dr; ++j) Kk[s * dqk + a.dn + j] = st<X>(kpe[row * a.dr + j]);
      for (int64_t j = 0; j < a.dv; ++j) V[s * a.dv + j] = st<X>(kr[a.dn + j]);
    }
    std::fill(Q + a.S * dqk, Q + sp * dqk, X{});
    std::fill(Kk + a.S * dqk, Kk + sp * dqk, X{});
    std::fill(V + a.S * a.dv, V + sp * a.dv, X{});
    if constexpr (std::is_same_v<X, bf16>) {
      if (small) {
        small_attention_fwd(a, Q, Kk, V, acts.lse.data() + bh * sp,
                            acts.o.data() + b * a.S * a.nh * a.dv + h * a.dv, a.nh * a.dv, t);
        continue;
      }
    }
    const R scale = R(a.scale);
    for (int64_t i0 = 0; i0 < sp; i0 += kQueryBlock) {
      const int64_t nq = std::min(kQueryBlock, sp - i0), nk = i0 + nq;
      mm(nq, nk, dqk, Q + i0 * dqk, dqk, false, Kk, dqk, true, t.s.data(), nk, false);
      for (int64_t i = 0; i < nq; ++i) {
        R* sr = t.s.data() + i * nk;
        X* pr = t.p.data() + i * nk;
        const int64_t visible = i0 + i + 1;
        R mx = sr[0];
#pragma omp simd reduction(max : mx)
        for (int64_t j = 0; j < visible; ++j) mx = std::max(mx, sr[j]);
        R sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < visible; ++j) {
          const R e = exp_of((sr[j] - mx) * scale);
          pr[j] = st<X>(e);
          sum += e;
        }
        for (int64_t j = visible; j < nk; ++j) pr[j] = X{};
        acts.lse[bh * sp + i0 + i] = mx * scale + std::log(sum);
        sr[0] = sum;  // kept for the division below
      }
      mm(nq, a.dv, nk, t.p.data(), nk, false, V, a.dv, false, t.o.data(), a.dv, false);
      for (int64_t i = 0; i < nq && i0 + i < a.S; ++i) {
        const R inv = R(1) / t.s[i * nk];
        X* out = acts.o.data() + (b * a.S + i0 + i) * a.nh * a.dv + h * a.dv;
        for (int64_t j = 0; j < a.dv; ++j) out[j] = st<X>(t.o[i * a.dv + j] * inv);
      }
    }
  }
}

// Fills t.dq, t.dk, t.dv of one head from t.dop (gradient of its output) and t.delta.
template <class R, class X>
void attention_head_bwd(const AttnDims& a, const X* Q, const X* Kk, const X* V, const R* lse_rows,
                        AttnScratch<R, X>& t) {
  const int64_t sp = a.sp(), dqk = a.dqk();
  const R scale = R(a.scale);
  for (int64_t i0 = 0; i0 < sp; i0 += kQueryBlock) {
    const int64_t nq = std::min(kQueryBlock, sp - i0), nk = i0 + nq;
    const X* Qb = Q + i0 * dqk;
    const X* dOb = t.dop.data() + i0 * a.dv;
    mm(nq, nk, dqk, Qb, dqk, false, Kk, dqk, true, t.s.data(), nk, false);
    mm(nq, nk, a.dv, dOb, a.dv, false, V, a.dv, true, t.dp.data(), nk, false);
    for (int64_t i = 0; i < nq; ++i) {
      const R* sr = t.s.data() + i * nk;
      const R* dr = t.dp.data() + i * nk;
      X* pr = t.p.data() + i * nk;
      X* dsr = t.ds.data() + i * nk;
      const R lse = lse_rows[i0 + i], dl = t.delta[i0 + i];
      const int64_t visible = i0 + i + 1;
#pragma omp simd
      for (int64_t j = 0; j < visible; ++j) {
        const R p = exp_of(sr[j] * scale - lse);
        pr[j] = st<X>(p);
        dsr[j] = st<X>(p * (dr[j] - dl) * scale);
      }
      for (int64_t j = visible; j < nk; ++j) pr[j] = X{}, dsr[j] = X{};
    }
    mm(nk, a.dv, nq, t.p.data(), nk, true, dOb, a.dv, false, t.dv.data(), a.dv, true);
    mm(nk, dqk, nq, t.ds.data(), nk, true, Qb, dqk, false, t.dk.data(), dqk, true);
    mm(nq, dqk, nk, t.ds.data(), nk, false, Kk, dqk, false, t.dq.data() + i0 * dqk, dqk, false);
  }
}

// d_o [B*S, nh*dv] in; d_q [B*S, nh*dqk] and d_kv [B*S, nh*(dn+dv)] out (GEMM operands, before the
// rotation), d_kpe [B*S, dr] out. kpe_heads: scratch [B, nh, S, dr].
template <class R, class X>
void attention_bwd(const AttnDims& a, const AttnActs<R, X>& acts, const R* d_o, const R* cos,
                   const R* sin, X* d_q, X* d_kv, R* d_kpe, R* kpe_heads,
                   std::vector<AttnScratch<R, X>>& scratch) {
  const int64_t sp = a.sp(), dqk = a.dqk(), half = a.dr / 2, kvw = a.dn + a.dv;
  [[maybe_unused]] const bool small = std::is_same_v<X, bf16> && small_attention_fits(a);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t bh = 0; bh < a.B * a.nh; ++bh) {
    const int64_t b = bh / a.nh, h = bh % a.nh;
    AttnScratch<R, X>& t = scratch[static_cast<size_t>(omp_get_thread_num())];
    t.reserve(a);
    const X* Q = acts.q.data() + bh * sp * dqk;
    const X* Kk = acts.k.data() + bh * sp * dqk;
    const X* V = acts.v.data() + bh * sp * a.dv;
    for (int64_t s = 0; s < a.S; ++s) {
      const int64_t at = (b * a.S + s) * a.nh * a.dv + h * a.dv;
      R sum = 0;
      for (int64_t j = 0; j < a.dv; ++j) {
        t.dop[s * a.dv + j] = st<X>(d_o[at + j]);
        sum += d_o[at + j] * ld(acts.o[at + j]);
      }
      t.delta[s] = sum;
    }
    for (int64_t s = a.S; s < sp; ++s) t.delta[s] = 0;
    std::fill(t.dop.data() + a.S * a.dv, t.dop.data() + sp * a.dv, X{});
    std::fill(t.dk.data(), t.dk.data() + sp * dqk, R(0));
    std::fill(t.dv.data(), t.dv.data() + sp * a.dv, R(0));
    if (small) {
      if constexpr (std::is_same_v<X, bf16>) {
        small_attention_bwd(a, Q, Kk, V, acts.lse.data() + bh * sp, t);
      }
    } else {
      attention_head_bwd(a, Q, Kk, V, acts.lse.data() + bh * sp, t);
    }
    for (int64_t s = 0; s < a.S; ++s) {
      const int64_t row = b * a.S + s;
      R* gq = t.dq.data() + s * dqk;
      R* gk = t.dk.data() + s * dqk;
      rope_row(gq + a.dn, cos + s * half, sin + s * half, half, R(-1));
      X* oq = d_q + row * a.nh * dqk + h * dqk;
      X* okv = d_kv + row * a.nh * kvw + h * kvw;
      for (int64_t j = 0; j < dqk; ++j) oq[j] = st<X>(gq[j]);
      for (int64_t j = 0; j < a.dn; ++j) okv[j] = st<X>(gk[j]);
      for (int64_t j = 0; j < a.dv; ++j) okv[a.dn + j] = st<X>(t.dv[s * a.dv + j]);
      for (int64_t j = 0; j < a.dr; ++j) kpe_heads[(bh * a.S + s) * a.dr + j] = gk[a.dn + j];
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.B * a.S; ++row) {
    const int64_t b = row / a.S, s = row % a.S;
    R* out = d_kpe + row * a.dr;
    std::fill(out, out + a.dr, R(0));
    for (int64_t h = 0; h < a.nh; ++h) {
      const R* in = kpe_heads + ((b * a.nh + h) * a.S + s) * a.dr;
      for (int64_t j = 0; j < a.dr; ++j) out[j] += in[j];
    }
    rope_row(out, cos + s * half, sin + s * half, half, R(-1));
  }
}

}  // namespace v3b::kern::train
