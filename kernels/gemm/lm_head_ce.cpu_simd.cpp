// See lm_head_ce.h. The products go through gemm(); the folding is Highway with its exp (1 ulp).
#include "kernels/gemm/lm_head_ce.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/lm_head_ce.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h
#include <hwy/contrib/math/math-inl.h>

#ifndef V3B_KERNELS_GEMM_LSE_STATE
#define V3B_KERNELS_GEMM_LSE_STATE
namespace v3b::kern {
struct LseState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0;
  float label_logit = 0;
  int32_t argmax = 0;
};
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using Df = hn::ScalableTag<float>;

// Folds z[0..n), columns first..first+n of the row, into the state.
void fold(const float* HWY_RESTRICT z, int64_t n, int64_t first, int64_t label, LseState& s) {
  const Df d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const float before = s.max;
  auto vmax = hn::Set(d, before);
  auto not_nan = hn::Eq(vmax, vmax);  // all true
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, z + i);
    not_nan = hn::And(not_nan, hn::Eq(v, v));
    vmax = hn::Max(vmax, v);
  }
  bool has_nan = !hn::AllTrue(d, not_nan);
  float m = hn::GetLane(hn::MaxOfLanes(d, vmax));
  for (; i < n; ++i) {
    has_nan = has_nan || z[i] != z[i];
    m = std::max(m, z[i]);
  }
  if (label >= first && label < first + n) s.label_logit = z[label - first];
  if (has_nan) {  // Highway's exp would turn a NaN into 0
    s.sum = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  if (m > before) {
    const auto vm = hn::Set(d, m);
    for (i = 0; i + lanes <= n; i += lanes) {
      const intptr_t at = hn::FindFirstTrue(d, hn::Eq(hn::LoadU(d, z + i), vm));
      if (at >= 0) {
        s.argmax = static_cast<int32_t>(first + i + at);
        break;
      }
    }
    if (i + lanes > n) {
      for (; i < n; ++i) {
        if (z[i] == m) {
          s.argmax = static_cast<int32_t>(first + i);
          break;
        }
      }
    }
    s.max = m;
    s.sum *= std::exp(before - m);
  }
  if (m == -std::numeric_limits<float>::infinity()) return;
  const auto vm = hn::Set(d, m);
  auto sum = hn::Zero(d);
  for (i = 0; i + lanes <= n; i += lanes) {
    sum = hn::Add(sum, hn::Exp(d, hn::Sub(hn::LoadU(d, z + i), vm)));
  }
  s.sum += hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) s.sum += std::exp(z[i] - m);
}

void backward_row(const float* z, int64_t n, float lse, float scale, float* dz) {
  const Df d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto vl = hn::Set(d, lse), vs = hn::Set(d, scale);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto v = hn::LoadU(d, z + i);
    // NaN must survive: exp gives 0 for it, so put it back.
    const auto e = hn::IfThenElse(hn::Eq(v, v), hn::Exp(d, hn::Sub(v, vl)), v);
    hn::StoreU(hn::Mul(e, vs), d, dz + i);
  }
  for (; i < n; ++i) dz[i] = std::exp(z[i] - lse) * scale;
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(fold);
HWY_EXPORT(backward_row);
HWY_EXPORT(isa);

namespace {

constexpr int64_t kRows = 256;          // of h at a time
constexpr int64_t kLogits = 512 << 10;  // floats of one block of logits: 2 MiB, near the L2 caches
constexpr int64_t kParallelFrom = 1 << 14;  // logits; below it the team costs more

int64_t label_of(const int64_t* labels, int64_t t) {
  return labels == nullptr ? spec::kIgnoreLabel : labels[t];
}

void finish(const LseState& s, int64_t label, float* nll, float* lse, int32_t* argmax) {
  *lse = s.max + std::log(s.sum);
  if (nll != nullptr) *nll = label == spec::kIgnoreLabel ? 0.0F : *lse - s.label_logit;
  if (argmax != nullptr) *argmax = s.argmax;
}

}  // namespace

std::string lm_head_ce_cpu_simd_isa() { return HWY_DYNAMIC_DISPATCH(isa)(); }

void cross_entropy_rows(int64_t T, int64_t V, const float* z, int64_t ldz, const int64_t* labels,
                        float* nll, float* lse, int32_t* argmax) noexcept {
#pragma omp parallel for schedule(static) if (T > 1 && T * V >= kParallelFrom && num_threads() > 1)
  for (int64_t t = 0; t < T; ++t) {
    LseState s;
    const int64_t label = label_of(labels, t);
    HWY_DYNAMIC_DISPATCH(fold)(z + t * ldz, V, 0, label, s);
    finish(s, label, nll == nullptr ? nullptr : nll + t, lse + t,
           argmax == nullptr ? nullptr : argmax + t);
  }
}

void cross_entropy_backward_rows(int64_t T, int64_t V, const float* z, int64_t ldz,
                                 const int64_t* labels, const float* lse, float scale, float* dz,
                                 int64_t lddz, spec::bf16* dz_bf16) noexcept {
#pragma omp parallel if (T > 1 && T * V >= kParallelFrom && num_threads() > 1)
  {
    thread_local Buffer<float> row;
    if (dz == nullptr) row.reserve_discard(V);
#pragma omp for schedule(static)
    for (int64_t t = 0; t < T; ++t) {
      float* out = dz == nullptr ? row.data() : dz + t * lddz;
      if (labels[t] == spec::kIgnoreLabel) {
        std::fill(out, out + V, 0.0F);
      } else {
        HWY_DYNAMIC_DISPATCH(backward_row)(z + t * ldz, V, lse[t], scale, out);
        out[labels[t]] -= scale;
      }
      if (dz_bf16 != nullptr) convert_f32_to_bf16(out, dz_bf16 + t * V, V);
    }
  }
}

void lm_head_ce_cpu_simd(const spec::LmHeadCeArgs& a) noexcept {
  thread_local Buffer<float> logits;
  LseState states[kRows];
  const int64_t elem = spec::dtype_bytes(a.dtype);
  for (int64_t t0 = 0; t0 < a.T; t0 += kRows) {
    const int64_t rows = std::min(kRows, a.T - t0);
    const int64_t chunk = std::min(a.V, std::max<int64_t>(kLogits / rows / 64 * 64, 64));
    logits.reserve_discard(rows * chunk);
    std::fill(states, states + rows, LseState{});
    for (int64_t v = 0; v < a.V; v += chunk) {
      const int64_t n = std::min(chunk, a.V - v);
      GemmArgs g;
      g.M = rows, g.N = n, g.K = a.d;
      g.a = static_cast<const uint8_t*>(a.h) + t0 * a.d * elem, g.lda = a.d;
      g.b = static_cast<const uint8_t*>(a.w) + v * a.d * elem, g.ldb = a.d;
      g.c = logits.data(), g.ldc = n;
      g.ab_type = a.dtype;
      gemm(g);
      const float* z = logits.data();
#pragma omp parallel for schedule(static) if (rows > 1 && rows * n >= kParallelFrom && \
                                              num_threads() > 1)
      for (int64_t i = 0; i < rows; ++i) {
        HWY_DYNAMIC_DISPATCH(fold)(z + i * n, n, v, label_of(a.labels, t0 + i), states[i]);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t t = t0 + i;
      finish(states[i], label_of(a.labels, t), a.nll == nullptr ? nullptr : a.nll + t, a.lse + t,
             a.argmax == nullptr ? nullptr : a.argmax + t);
    }
  }
}

}  // namespace v3b::kern
#endif  // HWY_ONCE
