// Router selection on the CPU. Cost a token at E=256: 16 (AVX-512) or 32 (AVX2) vector exponentials
// of ~25 instructions, two best of every group by max/min networks, then K passes over the M*E/G
// candidates that keep the best value and position of every lane. Nothing is bound by memory (1 KiB
// of logits a token): the lanes are the roof. Rows are independent and go to threads.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/moe/router.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//

#include <cmath>
#include <cstring>
#include <limits>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "kernels/core/team.h"
#include "kernels/moe/moe.h"
#include "kernels/norm_rope/hwy_io-inl.h"

#ifndef V3B_ROUTER_ONCE
#define V3B_ROUTER_ONCE
namespace v3b::kern {
namespace {
constexpr int64_t kMaxExperts = 1024;  // stack rows; config validation refuses larger ones
constexpr int64_t kPad = 16;           // the widest vector: rows are padded to whole vectors
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

struct Row {
  alignas(64) float s[kMaxExperts + kPad];     // scores
  alignas(64) float b[kMaxExperts + kPad];     // with the selection bias
  alignas(64) float cand[kMaxExperts + kPad];  // what may be chosen
  float group[kMaxExperts];
  int32_t kept[kMaxExperts];  // groups that stay, ascending
};
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// exp(-z) is capped: a very negative z gives a tiny score and no division by infinity.
void scores_of_row(const spec::RouterConfig& c, const float* z, float* s, int64_t padded) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF one = hn::Set(df, 1.0F);
  const bool sigmoid = c.scoring == spec::Scoring::sigmoid;
  std::memcpy(s, z, static_cast<size_t>(c.E) * 4);
  for (int64_t e = c.E; e < padded; ++e) s[e] = kNegInf;
  if (sigmoid) {
    for (int64_t e = 0; e < c.E; e += n) {
      const VF v = hn::Load(df, s + e);
      const VF x = hn::Exp(df, hn::Min(hn::Neg(v), hn::Set(df, 88.0F)));
      // Highway's Exp saturates on NaN: keep it.
      hn::Store(hn::IfThenElse(hn::IsNaN(v), v, hn::Div(one, hn::Add(one, x))), df, s + e);
    }
    return;
  }
  VF vm = hn::Load(df, s);
  for (int64_t e = n; e < c.E; e += n) vm = hn::Max(vm, hn::Load(df, s + e));
  vm = hn::MaxOfLanes(df, vm);
  VF total = hn::Zero(df);
  for (int64_t e = 0; e < c.E; e += n) {
    const VF v = hn::Sub(hn::Load(df, s + e), vm);
    const VF x = hn::IfThenElse(hn::IsNaN(v), v, hn::Exp(df, v));
    total = hn::Add(total, x);
    hn::Store(x, df, s + e);
  }
  total = hn::SumOfLanes(df, total);
  for (int64_t e = 0; e < c.E; e += n) hn::Store(hn::Div(hn::Load(df, s + e), total), df, s + e);
}

// Sum of the two best, or the best, of v[0..size).
float group_score(const float* v, int64_t size, bool two) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  float first = kNegInf, second = kNegInf;
  const auto take = [&](float x) {
    if (x > first) {
      second = first;
      first = x;
    } else if (x > second) {
      second = x;
    }
  };
  int64_t i = 0;
  if (size >= n) {
    VF f = hn::LoadU(df, v), s = hn::Set(df, kNegInf);
    for (i = n; i + n <= size; i += n) {
      const VF x = hn::LoadU(df, v + i);
      s = hn::Max(s, hn::Min(f, x));
      f = hn::Max(f, x);
    }
    // The best of all lanes; without its lane the second is among the other lanes' best and its own
    // second.
    const VF top = hn::MaxOfLanes(df, f);
    first = hn::GetLane(top);
    const intptr_t lane = hn::FindFirstTrue(df, hn::Eq(f, top));
    if (lane < 0) return hn::GetLane(top);  // NaN
    const auto at = hn::Eq(hn::Iota(df, 0.0F), hn::Set(df, static_cast<float>(lane)));
    second = hn::GetLane(hn::MaxOfLanes(df, hn::IfThenElse(at, s, f)));
  }
  for (; i < size; ++i) take(v[i]);
  return two ? first + second : first;
}

// Groups that stay, ascending, into r.kept. Ties go to the lower group; NaN never beats a number.
void choose_groups(const spec::RouterConfig& c, Row& r) {
  bool kept[kMaxExperts] = {};
  for (int64_t j = 0; j < c.M; ++j) {
    int64_t best = -1;
    for (int64_t g = 0; g < c.G; ++g) {
      if (kept[g]) continue;
      if (best < 0 || r.group[g] > r.group[best] ||
          (std::isnan(r.group[best]) && !std::isnan(r.group[g])))
        best = g;
    }
    kept[best] = true;
  }
  for (int64_t g = 0, at = 0; g < c.G; ++g)
    if (kept[g]) r.kept[at++] = static_cast<int32_t>(g);
}

// Position of the largest of v[0..padded), the lower one on ties; -1 when nothing exceeds -inf.
int64_t argmax(const float* v, int64_t padded) {
  const DF df;
  const hn::RebindToSigned<DF> di;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  VF best = hn::Set(df, kNegInf);
  auto at = hn::Set(di, std::numeric_limits<int32_t>::max()), here = hn::Iota(di, 0);
  const auto step = hn::Set(di, static_cast<int32_t>(n));
  for (int64_t i = 0; i < padded; i += n) {
    const VF x = hn::Load(df, v + i);
    const auto more = hn::Gt(x, best);
    best = hn::IfThenElse(more, x, best);
    at = hn::IfThenElse(hn::RebindMask(di, more), here, at);
    here = hn::Add(here, step);
  }
  const VF top = hn::MaxOfLanes(df, best);
  const auto mine = hn::IfThenElse(hn::RebindMask(di, hn::Eq(best, top)), at,
                                   hn::Set(di, std::numeric_limits<int32_t>::max()));
  const int32_t found = hn::GetLane(hn::MinOfLanes(di, mine));
  return found == std::numeric_limits<int32_t>::max() ? -1 : found;
}

void route_row(const spec::RouterConfig& c, const float* z, const float* bias, int32_t* idx,
               float* weight, float* scores_out, Row& r) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const auto pad = [&](int64_t x) { return (x + n - 1) / n * n; };
  scores_of_row(c, z, r.s, pad(c.E));
  if (scores_out != nullptr) std::memcpy(scores_out, r.s, static_cast<size_t>(c.E) * 4);
  for (int64_t e = 0; e < c.E; ++e) r.b[e] = bias != nullptr ? r.s[e] + bias[e] : r.s[e];

  int64_t candidates = c.E, size = c.E;
  bool compact = false;
  if (c.group_rule != spec::GroupRule::none && c.G > 1) {
    size = c.E / c.G;
    for (int64_t g = 0; g < c.G; ++g)
      r.group[g] = group_score(r.b + g * size, size, c.group_rule == spec::GroupRule::top2_sum);
    choose_groups(c, r);
    compact = c.router_mask == spec::RouterMask::neg_inf;
    if (compact) candidates = c.M * size;
    if (!compact) std::memset(r.cand, 0, static_cast<size_t>(c.E) * 4);
    for (int64_t j = 0; j < c.M; ++j)
      std::memcpy(r.cand + (compact ? j : r.kept[j]) * size, r.b + r.kept[j] * size,
                  static_cast<size_t>(size) * 4);
  } else {
    std::memcpy(r.cand, r.b, static_cast<size_t>(c.E) * 4);
  }
  const int64_t padded = pad(candidates);
  for (int64_t i = candidates; i < padded; ++i) r.cand[i] = kNegInf;

  float sum = c.gate_eps == spec::GateEps::eps_1e20 ? 1e-20F : 0.0F;
  bool taken[kMaxExperts];  // by position; needed only when numbers run out
  bool track = false;
  for (int64_t k = 0; k < c.K; ++k) {
    int64_t at = argmax(r.cand, padded);
    if (at < 0) {  // only NaN and -inf left: the first ones that nobody took
      if (!track) {
        std::memset(taken, 0, sizeof taken);
        for (int64_t j = 0; j < k; ++j)
          for (int64_t i = 0; i < candidates; ++i)
            if ((compact ? r.kept[i / size] * size + i % size : i) == idx[j]) taken[i] = true;
        track = true;
      }
      for (at = 0; at + 1 < candidates && taken[at];) ++at;
    }
    if (track) taken[at] = true;
    const int64_t e = compact ? r.kept[at / size] * size + at % size : at;
    idx[k] = static_cast<int32_t>(e);
    weight[k] = r.s[e];
    sum += r.s[e];
    r.cand[at] = kNegInf;
  }
  const bool normalise = c.norm_topk_prob && c.K > 1;
  const float scale = c.scale_only_if_unnormalised && normalise ? 1.0F : static_cast<float>(c.c_r);
  for (int64_t k = 0; k < c.K; ++k) weight[k] = (normalise ? weight[k] / sum : weight[k]) * scale;
}

void select(const spec::RouterSelectArgs& a) {
  const spec::RouterConfig& c = a.config;
  const auto row = [&](int64_t t, Row& r) {
    route_row(c, a.logits + t * c.E, a.bias, a.idx + t * c.K, a.weight + t * c.K,
              a.scores != nullptr ? a.scores + t * c.E : nullptr, r);
  };
  // A sigmoid, group sums and K scans a score: 32 bytes' worth each.
  const int threads = team_for(32.0 * static_cast<double>(a.T) * static_cast<double>(c.E), 0);
  if (threads == 1) {
    Row r;
    for (int64_t t = 0; t < a.T; ++t) row(t, r);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Row r;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < a.T; ++t) row(t, r);
  }
}
const char* router_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(select);
HWY_EXPORT(router_target);
}  // namespace
void router_select_cpu_simd(const spec::RouterSelectArgs& a) noexcept {
  HWY_DYNAMIC_DISPATCH(select)(a);
}
const char* router_select_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(router_target)(); }
}  // namespace v3b::kern
#endif
