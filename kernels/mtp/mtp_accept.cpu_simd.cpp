// Acceptance without forming distributions: an accepted draft needs p(d) and q(d) alone; the residual of a rejected one
// is summed once and walked once. It must stop at the same index as the reference, which adds in double in order: 4
// cycles of latency an element, 18 times what memory takes. So the sums are made of vectors, by blocks, and only the
// block that holds the mark is walked; where the mark lies within the rounding errors of both orders of summation of an
// element's end, the serial walk decides. Argmax of greedy decoding: Highway. Bound by reading the rows.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/mtp/mtp_accept.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <omp.h>

#include <algorithm>
#include <limits>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/mtp/mtp_accept.h"

#ifndef V3B_MTP_ACCEPT_ONCE
#define V3B_MTP_ACCEPT_ONCE
namespace v3b::kern::mtp {
namespace {
// What is left of n weights: p, or (p - q)+ with q an array.
struct Blocks {
  static constexpr int64_t kMost = 512, kLeastLength = 256;
  int64_t length = 0, count = 0;
  double total = 0, sum[kMost];
  bool plain = false;  // no weight is negative or NaN, the sum finite
};

}  // namespace
}  // namespace v3b::kern::mtp
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using mtp::Blocks;

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
// Sums of blocks, each in double on lanes.
template <bool kResidual>
void block_sums(const float* p, const float* q, int64_t n, Blocks& out) {
  const hn::ScalableTag<double> dd;
  const hn::Rebind<float, decltype(dd)> df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(dd));
  const int64_t least = (n + Blocks::kMost - 1) / Blocks::kMost;
  out.length = std::max(Blocks::kLeastLength, (least + 63) / 64 * 64);
  out.count = 0, out.total = 0;
  auto lowest = hn::Zero(dd);
  const auto zero = hn::Zero(dd);
  const auto weight = [&](int64_t i) HWY_ATTR {
    const auto v = hn::PromoteTo(dd, hn::LoadU(df, p + i));
    if constexpr (!kResidual) return v;
    const auto d = hn::Sub(v, hn::PromoteTo(dd, hn::LoadU(df, q + i)));
    return hn::IfThenElseZero(hn::Gt(d, zero), d);
  };
  for (int64_t lo = 0; lo < n; lo += out.length) {
    const int64_t hi = std::min(n, lo + out.length);
    auto s0 = zero, s1 = zero, s2 = zero, s3 = zero;
    int64_t i = lo;
    for (; i + 4 * lanes <= hi; i += 4 * lanes) {
      hwy::Prefetch(p + i + 512);
      if constexpr (kResidual) hwy::Prefetch(q + i + 512);
      const auto a = weight(i), b = weight(i + lanes), c = weight(i + 2 * lanes),
                 d = weight(i + 3 * lanes);
      s0 = hn::Add(s0, a), s1 = hn::Add(s1, b), s2 = hn::Add(s2, c), s3 = hn::Add(s3, d);
      if constexpr (!kResidual) lowest = hn::Min(lowest, hn::Min(hn::Min(a, b), hn::Min(c, d)));
    }
    double s = hn::GetLane(hn::SumOfLanes(dd, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
    for (; i < hi; ++i) {
      double w = static_cast<double>(p[i]);
      if constexpr (kResidual) w = std::max(0.0, w - static_cast<double>(q[i]));
      if (!(w >= 0)) lowest = hn::Set(dd, -1.0);
      s += w;
    }
    out.total += out.sum[out.count++] = s;
  }
  // A NaN among the weights is in the sum; one that Min dropped as well.
  out.plain =
      hn::AllTrue(dd, hn::Eq(lowest, zero)) && out.total < std::numeric_limits<double>::infinity();
}
void sums_of_p(const float* p, int64_t n, Blocks& out) { block_sums<false>(p, nullptr, n, out); }
void sums_of_residual(const float* p, const float* q, int64_t n, Blocks& out) {
  block_sums<true>(p, q, n, out);
}
const char* accept_target() { return hwy::TargetName(HWY_TARGET); }
}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(argmax_row);
HWY_EXPORT(sums_of_p);
HWY_EXPORT(sums_of_residual);
using mtp::Blocks;
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

// Where the walk with these sums stops, or -1 where the order of summation could matter: each sum of n weights >= 0 in
// double is within (n + 1) 2^-53 of the total, and four of them meet in a comparison (the mark and the cumulative sum, of
// both orders; divisions by the total add two roundings).
template <class W>
int32_t quick_walk(const Blocks& s, int64_t n, double u, const W& weight) {
  if (!s.plain || !(s.total > 0)) return -1;
  const double mark = u * s.total, margin = 8.0 * static_cast<double>(n + 4) * 0x1p-53 * s.total;
  double before = 0;
  int64_t b = 0;
  while (b < s.count && before + s.sum[b] <= mark) before += s.sum[b++];
  if (b == s.count) return -1;
  const int64_t end = std::min(n, (b + 1) * s.length);
  for (int64_t i = b * s.length; i < end; ++i) {
    const double after = before + weight(i);
    if (after > mark)
      return mark - before > margin && after - mark > margin ? static_cast<int32_t>(i) : -1;
    before = after;
  }
  return -1;
}

// p as it stands.
int32_t sample_row(int64_t n, double u, const float* p) {
  const auto weight = [&](int64_t i) { return double(p[i]); };
  Blocks sums;
  HWY_DYNAMIC_DISPATCH(sums_of_p)(p, n, sums);
  const int32_t quick = quick_walk(sums, n, u, weight);
  return quick >= 0 ? quick : walk(n, u, weight);
}

// (p - q)+ normalised as the reference normalises it; p itself where nothing is left.
int32_t sample_residual(int64_t n, double u, const float* p, const float* q, int32_t one_hot) {
  const auto diff = [&](int64_t i) {
    const double qi = q != nullptr ? double(q[i]) : i == one_hot ? 1.0 : 0.0;
    return std::max(0.0, double(p[i]) - qi);
  };
  if (q != nullptr) {
    Blocks sums;
    HWY_DYNAMIC_DISPATCH(sums_of_residual)(p, q, n, sums);
    const int32_t quick = quick_walk(sums, n, u, diff);
    if (quick >= 0) return quick;
  }
  double total = 0;
  for (int64_t i = 0; i < n; ++i) total += diff(i);
  if (!(total > 0)) return sample_row(n, u, p);
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
    if (k == a.gamma) next = sample_row(a.V, u[a.gamma], p + a.gamma * a.V);
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
