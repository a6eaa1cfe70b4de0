// The attention core of attention.h on small_gemm's paired operands (bf16, AVX512_BF16): same
// blocks, same saved activations, about three times faster than a library call a block. The
// probabilities and score gradients are written both by rows and as row pairs, so that each of the
// five products of the backward reads them in the order it needs. Internal to kernels/train.
#pragma once
#include <cstring>

#include "kernels/core/cpu.h"
#include "kernels/train/attention.h"
#include "kernels/train/small_gemm.h"

namespace v3b::kern::train {

inline bool small_attention_fits(const AttnDims& a) {
  return cpu_features().avx512_bf16 && a.dqk() % 16 == 0 && a.dv % 16 == 0;
}
inline constexpr int64_t kSmallBlock = 32;  // query rows at a time

struct SmallScratch {  // one thread's; pairs as uint32
  Buffer<uint32_t> kt, vt, qp, kp, vp, dop, p, pp, ds, dsp;
  void reserve(const AttnDims& a) {
    const int64_t sp = a.sp(), half = sp / 2, n = kSmallBlock * half;
    kt.reserve_discard(sp * a.dqk() / 2), vt.reserve_discard(sp * a.dv / 2);
    qp.reserve_discard(half * a.dqk()), kp.reserve_discard(half * a.dqk());
    vp.reserve_discard(half * a.dv), dop.reserve_discard(half * a.dv);
    p.reserve_discard(n), pp.reserve_discard(n), ds.reserve_discard(n), dsp.reserve_discard(n);
  }
};
inline SmallScratch& small_scratch() {
  thread_local SmallScratch s;
  return s;
}

inline const uint32_t* as_pairs(const bf16* p) { return reinterpret_cast<const uint32_t*>(p); }

// [rows, cols] -> rows paired: out[(r/2)*cols + j] = (x[r][j], x[r+1][j])
inline void pair_rows(const bf16* x, int64_t rows, int64_t cols, uint32_t* out) {
  for (int64_t r = 0; r < rows; r += 2) {
    const bf16 *lo = x + r * cols, *hi = lo + cols;
    uint32_t* o = out + r / 2 * cols;
    for (int64_t j = 0; j < cols; ++j) {
      o[j] = static_cast<uint32_t>(lo[j].bits) | static_cast<uint32_t>(hi[j].bits) << 16;
    }
  }
}
// [rows, cols] -> transposed pairs along cols: out[c2*rows + r] = (x[r][2 c2], x[r][2 c2 + 1])
inline void pair_cols_transposed(const bf16* x, int64_t rows, int64_t cols, uint32_t* out) {
  const uint32_t* in = as_pairs(x);
  const int64_t c2 = cols / 2;
  for (int64_t r0 = 0; r0 < rows; r0 += 16) {
    for (int64_t c = 0; c < c2; ++c) {
      for (int64_t r = r0; r < r0 + 16; ++r) out[c * rows + r] = in[r * c2 + c];
    }
  }
}

// Scores to outputs for one head. o: out rows at stride ldo (head's columns).
inline void small_attention_fwd(const AttnDims& a, const bf16* Q, const bf16* K, const bf16* V,
                                float* lse, bf16* o, int64_t ldo, AttnScratch<float, bf16>& t) {
  SmallScratch& u = small_scratch();
  u.reserve(a);
  const int64_t sp = a.sp(), dqk = a.dqk();
  const auto scale = static_cast<float>(a.scale);
  pair_cols_transposed(K, sp, dqk, u.kt.data());
  pair_rows(V, sp, a.dv, u.vp.data());
  float sums[kSmallBlock];
  for (int64_t i0 = 0; i0 < sp; i0 += kSmallBlock) {
    const int64_t nq = std::min(kSmallBlock, sp - i0), nk = i0 + nq;
    small_gemm_cpu_avx512bf16(nq, nk, dqk / 2, as_pairs(Q + i0 * dqk), dqk / 2, 1, u.kt.data(), sp,
                              t.s.data(), nk, false);
    for (int64_t i = 0; i < nq; ++i) {
      const float* sr = t.s.data() + i * nk;
      bf16* pr = reinterpret_cast<bf16*>(u.p.data()) + i * nk;
      const int64_t visible = i0 + i + 1;
      float mx = sr[0], sum = 0;
#pragma omp simd reduction(max : mx)
      for (int64_t j = 0; j < visible; ++j) mx = std::max(mx, sr[j]);
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < visible; ++j) {
        const float e = exp_of((sr[j] - mx) * scale);
        pr[j] = st<bf16>(e);
        sum += e;
      }
      std::memset(static_cast<void*>(pr + visible), 0, static_cast<size_t>(nk - visible) * 2);
      lse[i0 + i] = mx * scale + std::log(sum);
      sums[i] = 1.0F / sum;
    }
    small_gemm_cpu_avx512bf16(nq, a.dv, nk / 2, u.p.data(), nk / 2, 1, u.vp.data(), a.dv,
                              t.o.data(), a.dv, false);
    for (int64_t i = 0; i < nq && i0 + i < a.S; ++i) {
      bf16* out = o + (i0 + i) * ldo;
      for (int64_t j = 0; j < a.dv; ++j) out[j] = st<bf16>(t.o[i * a.dv + j] * sums[i]);
    }
  }
}

// Fills t.dq, t.dk, t.dv from t.dop and t.delta for one head.
inline void small_attention_bwd(const AttnDims& a, const bf16* Q, const bf16* K, const bf16* V,
                                const float* lse, AttnScratch<float, bf16>& t) {
  SmallScratch& u = small_scratch();
  u.reserve(a);
  const int64_t sp = a.sp(), dqk = a.dqk();
  const auto scale = static_cast<float>(a.scale);
  pair_cols_transposed(K, sp, dqk, u.kt.data());
  pair_cols_transposed(V, sp, a.dv, u.vt.data());
  pair_rows(Q, sp, dqk, u.qp.data());
  pair_rows(K, sp, dqk, u.kp.data());
  pair_rows(t.dop.data(), sp, a.dv, u.dop.data());
  for (int64_t i0 = 0; i0 < sp; i0 += kSmallBlock) {
    const int64_t nq = std::min(kSmallBlock, sp - i0), nk = i0 + nq;
    small_gemm_cpu_avx512bf16(nq, nk, dqk / 2, as_pairs(Q + i0 * dqk), dqk / 2, 1, u.kt.data(), sp,
                              t.s.data(), nk, false);
    small_gemm_cpu_avx512bf16(nq, nk, a.dv / 2, as_pairs(t.dop.data() + i0 * a.dv), a.dv / 2, 1,
                              u.vt.data(), sp, t.dp.data(), nk, false);
    for (int64_t i = 0; i < nq; ++i) {
      const float* sr = t.s.data() + i * nk;
      const float* dr = t.dp.data() + i * nk;
      bf16* pr = reinterpret_cast<bf16*>(u.p.data()) + i * nk;
      bf16* dsr = reinterpret_cast<bf16*>(u.ds.data()) + i * nk;
      const float l = lse[i0 + i], dl = t.delta[i0 + i];
      const int64_t visible = i0 + i + 1;
#pragma omp simd
      for (int64_t j = 0; j < visible; ++j) {
        const float p = exp_of(sr[j] * scale - l);
        pr[j] = st<bf16>(p);
        dsr[j] = st<bf16>(p * (dr[j] - dl) * scale);
      }
      std::memset(static_cast<void*>(pr + visible), 0, static_cast<size_t>(nk - visible) * 2);
      std::memset(static_cast<void*>(dsr + visible), 0, static_cast<size_t>(nk - visible) * 2);
    }
    pair_rows(reinterpret_cast<const bf16*>(u.p.data()), nq, nk, u.pp.data());
    pair_rows(reinterpret_cast<const bf16*>(u.ds.data()), nq, nk, u.dsp.data());
    small_gemm_cpu_avx512bf16(nk, a.dv, nq / 2, u.pp.data(), 1, nk, u.dop.data() + i0 / 2 * a.dv,
                              a.dv, t.dv.data(), a.dv, true);
    small_gemm_cpu_avx512bf16(nk, dqk, nq / 2, u.dsp.data(), 1, nk, u.qp.data() + i0 / 2 * dqk, dqk,
                              t.dk.data(), dqk, true);
    small_gemm_cpu_avx512bf16(nq, dqk, nk / 2, u.ds.data(), nk / 2, 1, u.kp.data(), dqk,
                              t.dq.data() + i0 * dqk, dqk, false);
  }
}

}  // namespace v3b::kern::train
