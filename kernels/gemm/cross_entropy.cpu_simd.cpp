// Logits folded into a running maximum, sum of exponentials and argmax, by rows or by lanes, and the
// gradient (lm_head_ce.h). Highway with its exp (1 ulp).
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/lm_head_ce.h"
#include "kernels/gemm/lse_state.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/cross_entropy.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// after highway.h
#include <hwy/contrib/math/math-inl.h>

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

// Lanes 0..width of z [n, ld] (columns first..first+n of the vocabulary), width whole vectors.
void fold_lanes(const float* HWY_RESTRICT z, int64_t ld, int64_t n, int64_t first, int64_t width,
                float* HWY_RESTRICT max, float* HWY_RESTRICT sum, int32_t* HWY_RESTRICT argmax) {
  const Df d;
  const hn::RebindToSigned<Df> di;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto low = hn::Set(d, -std::numeric_limits<float>::infinity());
  for (int64_t l = 0; l < width; l += lanes) {
    const float* HWY_RESTRICT from = z + l;
    auto best = low, odd = hn::Zero(d);  // odd: NaN once a NaN was seen
    auto at = hn::Zero(di), row = hn::Set(di, static_cast<int32_t>(first));
    for (int64_t r = 0; r < n; ++r) {
      const auto v = hn::LoadU(d, from + r * ld);
      const auto more = hn::Gt(v, best);
      best = hn::IfThenElse(more, v, best);
      at = hn::IfThenElse(hn::RebindMask(di, more), row, at);
      row = hn::Add(row, hn::Set(di, 1));
      odd = hn::IfThenElse(hn::Eq(v, v), odd, v);
    }
    const auto before = hn::LoadU(d, max + l);
    const auto won = hn::Gt(best, before);
    const auto m = hn::IfThenElse(won, best, before);
    hn::StoreU(hn::IfThenElse(hn::RebindMask(di, won), at, hn::LoadU(di, argmax + l)), di,
               argmax + l);
    const auto shift = hn::IfThenElse(hn::Eq(m, low), hn::Zero(d), m);
    auto s0 = hn::Zero(d), s1 = s0;
    int64_t r = 0;
    for (; r + 2 <= n; r += 2) {
      s0 = hn::Add(s0, hn::Exp(d, hn::Sub(hn::LoadU(d, from + r * ld), shift)));
      s1 = hn::Add(s1, hn::Exp(d, hn::Sub(hn::LoadU(d, from + (r + 1) * ld), shift)));
    }
    if (r < n) s0 = hn::Add(s0, hn::Exp(d, hn::Sub(hn::LoadU(d, from + r * ld), shift)));
    const auto old = hn::Mul(hn::LoadU(d, sum + l), hn::Exp(d, hn::Sub(before, shift)));
    hn::StoreU(hn::Add(odd, hn::Add(old, hn::Add(s0, s1))), d, sum + l);
    hn::StoreU(m, d, max + l);
  }
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
HWY_EXPORT(fold_lanes);
HWY_EXPORT(backward_row);
HWY_EXPORT(isa);

namespace {

constexpr int64_t kParallelFrom = 1 << 14;  // logits; below it the team costs more

}  // namespace

void LseState::finish(int64_t t, const int64_t* labels, float* nll, float* lse,
                      int32_t* best) const noexcept {
  lse[t] = max + std::log(sum);
  if (nll != nullptr)
    nll[t] = lse_label(labels, t) == spec::kIgnoreLabel ? 0.0F : lse[t] - label_logit;
  if (best != nullptr) best[t] = argmax;
}
void lse_fold(const float* z, int64_t n, int64_t first, int64_t label, LseState& s) noexcept {
  HWY_DYNAMIC_DISPATCH(fold)(z, n, first, label, s);
}
void lse_fold_lanes(const float* z, int64_t ld, int64_t n, int64_t first, int64_t width, float* max,
                    float* sum, int32_t* argmax) noexcept {
  HWY_DYNAMIC_DISPATCH(fold_lanes)(z, ld, n, first, width, max, sum, argmax);
}
const char* lse_isa() noexcept { return HWY_DYNAMIC_DISPATCH(isa)(); }

void cross_entropy_rows(int64_t T, int64_t V, const float* z, int64_t ldz, const int64_t* labels,
                        float* nll, float* lse, int32_t* argmax) noexcept {
#pragma omp parallel for schedule(static) if (T > 1 && T * V >= kParallelFrom && num_threads() > 1)
  for (int64_t t = 0; t < T; ++t) {
    LseState s;
    HWY_DYNAMIC_DISPATCH(fold)(z + t * ldz, V, 0, lse_label(labels, t), s);
    s.finish(t, labels, nll, lse, argmax);
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

}  // namespace v3b::kern
#endif  // HWY_ONCE
