// Acceptance without forming distributions: an accepted draft needs p(d) and q(d) alone; the
// residual of a rejected one is summed once and walked once. The walk is a serial sum in double (it
// must stop at the same index as the reference), the argmax of greedy decoding is Highway. Bound by
// reading the rejected rows.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/mtp/mtp_accept.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <omp.h>

#include <algorithm>
#include <limits>

#include "hwy/highway.h"
#include "kernels/mtp/mtp_accept.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;

// Index of the first largest value: maximum in vectors, then the first place that holds it.
int32_t argmax_row(const float* x, int64_t n) {
  const hn::ScalableTag<float> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  auto m0 = hn::Set(df, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) m0 = hn::Max(m0, hn::LoadU(df, x + i));
  float mx = hn::GetLane(hn::MaxOfLanes(df, m0));
  for (; i < n; ++i) mx = std::max(mx, x[i]);
  const auto want = hn::Set(df, mx);
  for (i = 0; i + lanes <= n; i += lanes)
    if (!hn::AllFalse(df, hn::Eq(hn::LoadU(df, x + i), want))) break;
  for (; i < n; ++i)
    if (x[i] == mx) return static_cast<int32_t>(i);
  return 0;
}
const char* accept_target() { return hwy::TargetName(HWY_TARGET); }
}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(argmax_row);
HWY_EXPORT(accept_target);

// Walks weight(i) until the cumulative sum passes u * sum; weights <= 0 are skipped.
template <class W>
int32_t walk(int64_t n, double u, const W& weight) {
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += weight(i);
  const double mark = u * total;
  double sum = 0;
  int32_t last = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double w = weight(i);
    if (!(w > 0)) continue;
    sum += w;
    last = static_cast<int32_t>(i);
    if (sum > mark) return last;
  }
  return last;
}

// (p - q)+ normalised as the reference normalises it; p itself where nothing is left.
int32_t sample_residual(int64_t n, double u, const float* p, const float* q, int32_t one_hot) {
  const auto diff = [&](int64_t i) {
    const double qi = q != nullptr ? double(q[i]) : i == one_hot ? 1.0 : 0.0;
    return std::max(0.0, double(p[i]) - qi);
  };
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += diff(i);
  if (!(total > 0)) return walk(n, u, [&](int64_t i) { return double(p[i]); });
  return walk(n, u, [&](int64_t i) { return diff(i) / total; });
}

void accept_one(const spec::MtpAcceptArgs& a, int64_t b) {
  const int64_t rows = a.gamma + 1;
  const float* p = a.p + b * rows * a.V;
  const int32_t* draft = a.draft + b * a.gamma;
  int64_t k = 0;
  int32_t next = -1;
  if (a.greedy) {
    for (;; ++k) {
      next = HWY_DYNAMIC_DISPATCH(argmax_row)(p + k * a.V, a.V);
      if (k == a.gamma || draft[k] != next) break;
    }
  } else {
    const double* u = a.uniform + b * rows;
    for (; k < a.gamma; ++k) {
      const float* q = a.q != nullptr ? a.q + (b * a.gamma + k) * a.V : nullptr;
      const double qx = q != nullptr ? double(q[draft[k]]) : 1.0;
      if (u[k] * qx < double(p[k * a.V + draft[k]]) && qx > 0) continue;
      next = sample_residual(a.V, u[a.gamma], p + k * a.V, q, draft[k]);
      break;
    }
    if (k == a.gamma)
      next = walk(a.V, u[a.gamma], [&](int64_t i) { return double(p[a.gamma * a.V + i]); });
  }
  a.accepted[b] = static_cast<int32_t>(k);
  for (int64_t j = 0; j < rows; ++j) a.tokens[b * rows + j] = j < k ? draft[j] : j == k ? next : -1;
}
}  // namespace

void mtp_accept_cpu_simd(const spec::MtpAcceptArgs& a) noexcept {
#pragma omp parallel for schedule(dynamic) if (a.B > 1 && a.B * a.V > (1 << 14) && \
                                               omp_in_parallel() == 0)
  for (int64_t b = 0; b < a.B; ++b) accept_one(a, b);
}
const char* mtp_accept_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(accept_target)(); }
}  // namespace v3b::kern
#endif
