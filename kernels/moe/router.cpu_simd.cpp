// Router selection on the CPU. A token at E=256, 8 groups, K=8 (kernels/notes/moe.md has the count): 16 (AVX-512) or 32
// (AVX2) vector sigmoids of ~20 instructions; the two best of all groups at once by halving the
// lanes; the groups' worst second best bounds the K-th best candidate from below, so that one pass
// leaves about 13 of 128, whose ranks are counted directly. Nothing is bound by memory (1 KiB of
// logits a token): the lanes are the roof. Rows are independent and go to threads. NaN, infinite
// scores and unusual shapes take the plain passes below.
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
constexpr int64_t kPad = 16;           // the widest vector: rows are padded to whole ones
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Candidates that reach a bound, in order of their positions.
struct Survivors {
  static constexpr int64_t kMost = 48;
  alignas(64) float value[kMost + 2 * kPad];
  alignas(64) int32_t at[kMost + 2 * kPad];
  int64_t n = 0;
};
struct FastRow {
  alignas(64) float s[kMaxExperts], b[kMaxExperts];
  Survivors o;
  int32_t kept[8];
  float bound;
};
struct Row {
  FastRow fast;
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

// 1 / (1 + 2^(n + f)), n + f = -z log2(e): n goes into the exponent's bits, 2^f is a polynomial of
// degree 5 (relative error 1.0e-7), the reciprocal one Newton step on the machine's estimate. z is
// clamped, so a very negative z gives a tiny score and no infinity. The product -z log2(e) is
// rounded once and the constant's own error moves f by |z| 2e-8. NaN does not stay NaN.
HWY_INLINE VF sigmoid_of(DF df, VF z) {
  const hn::RebindToUnsigned<DF> du;
  const VF bias = hn::Set(df, 12583039.0F);  // 1.5 * 2^23 + 127: the sum's low bits are n + 127
  const VF log2e = hn::Set(df, -1.44269504F);
  z = hn::Min(hn::Max(z, hn::Set(df, -87.0F)), hn::Set(df, 87.0F));
  const VF rounded = hn::MulAdd(z, log2e, bias);
  const VF f = hn::MulSub(z, log2e, hn::Sub(rounded, bias));
  const VF power = hn::BitCast(df, hn::ShiftLeft<23>(hn::BitCast(du, rounded)));
  VF p = hn::MulAdd(hn::Set(df, 0x1.5f0890p-10F), f, hn::Set(df, 0x1.3d1070p-7F));
  p = hn::MulAdd(p, f, hn::Set(df, 0x1.c6af6cp-5F));
  p = hn::MulAdd(p, f, hn::Set(df, 0x1.ebf906p-3F));
  p = hn::MulAdd(p, f, hn::Set(df, 0x1.62e430p-1F));
  p = hn::MulAdd(p, f, hn::Set(df, 0x1.000002p+0F));
  const VF x = hn::MulAdd(p, power, hn::Set(df, 1.0F));
  const VF r = hn::ApproximateReciprocal(x);
  return hn::MulAdd(r, hn::NegMulAdd(x, r, hn::Set(df, 1.0F)), r);
}

void scores_of_row(const spec::RouterConfig& c, const float* z, float* s, int64_t padded) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const bool sigmoid = c.scoring == spec::Scoring::sigmoid;
  std::memcpy(s, z, static_cast<size_t>(c.E) * 4);
  for (int64_t e = c.E; e < padded; ++e) s[e] = kNegInf;
  if (sigmoid) {
    for (int64_t e = 0; e < c.E; e += n) {
      const VF v = hn::Load(df, s + e);
      hn::Store(hn::IfThenElse(hn::IsNaN(v), v, sigmoid_of(df, v)), df, s + e);
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

#if HWY_TARGET != HWY_SCALAR
// Scores and biased scores of a row of whole vectors. False: some biased score is not finite.
bool scores_fast(const spec::RouterConfig& c, const float* z, const float* bias, float* s,
                 float* b) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  VF odd = hn::Zero(df);  // 0 * finite = 0, else NaN
  for (int64_t e = 0; e < c.E; e += n) {
    const VF v = hn::LoadU(df, z + e);
    const VF x = sigmoid_of(df, v);
    const VF y = bias != nullptr ? hn::Add(x, hn::LoadU(df, bias + e)) : x;
    hn::StoreU(x, df, s + e);
    hn::Store(y, df, b + e);
    // Of z as well: the sigmoid's clamp hides its NaN.
    odd = hn::MulAdd(hn::Add(v, y), hn::Zero(df), odd);
  }
  return hn::AllTrue(df, hn::Eq(odd, odd));
}

// first[g], second[g]: the two best of every group of b. size is a multiple of the lanes.
template <int G>
HWY_INLINE void best_two(const float* b, int64_t size, float* first, float* second) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  VF f[G], s[G];
  for (int g = 0; g < G; ++g) {
    const float* v = b + g * size;
    f[g] = hn::Load(df, v);
    s[g] = hn::Set(df, kNegInf);
    for (int64_t i = n; i < size; i += n) {
      const VF x = hn::Load(df, v + i);
      s[g] = hn::Max(s[g], hn::Min(f[g], x));
      f[g] = hn::Max(f[g], x);
    }
  }
  // Two vectors become one of half as many lanes a group, in the groups' order; the last steps join
  // a vector with itself.
  const auto join = [df](VF fa, VF sa, VF fb, VF sb, VF& fo, VF& so) {
    const VF f0 = hn::ConcatEven(df, fb, fa), f1 = hn::ConcatOdd(df, fb, fa);
    const VF s0 = hn::ConcatEven(df, sb, sa), s1 = hn::ConcatOdd(df, sb, sa);
    fo = hn::Max(f0, f1);
    so = hn::Max(hn::Min(f0, f1), hn::Max(s0, s1));
  };
  int64_t left = n;
  for (int count = G; count > 1; count /= 2, left /= 2)
    for (int i = 0; i < count / 2; ++i)
      join(f[2 * i], s[2 * i], f[2 * i + 1], s[2 * i + 1], f[i], s[i]);
  for (; left > 1; left /= 2) join(f[0], s[0], f[0], s[0], f[0], s[0]);
  hn::StoreU(f[0], df, first);
  hn::StoreU(s[0], df, second);
}

// The M best groups, ascending, into r.kept (finite scores; ties go to the lower group), and a lower
// bound of the 2M-th best candidate: the least second best of the kept groups.
template <int G>
HWY_INLINE void choose_fast(const spec::RouterConfig& c, int64_t size, FastRow& r) {
  const hn::CappedTag<float, 8> d8;
  const hn::RebindToSigned<decltype(d8)> di8;
  static_assert(G <= 8);
  float first[kPad] = {}, second[kPad] = {};
  best_two<G>(r.b, size, first, second);
  const bool two = c.group_rule == spec::GroupRule::top2_sum;
  const auto iota = hn::Iota(di8, 0);
  for (int g = G; g < 8; ++g) first[g] = kNegInf, second[g] = 0;
  auto score = hn::LoadU(d8, first);
  if (two) score = hn::Add(score, hn::LoadU(d8, second));
  float each[8] = {};
  hn::StoreU(score, d8, each);
  float bound = -kNegInf;
  int64_t at = 0;
  for (int g = 0; g < G; ++g) {
    const auto mine = hn::Set(d8, each[g]);
    const auto ahead =
        hn::Or(hn::Gt(score, mine),
               hn::And(hn::Eq(score, mine), hn::RebindMask(d8, hn::Lt(iota, hn::Set(di8, g)))));
    const bool keep = static_cast<int64_t>(hn::CountTrue(d8, ahead)) < c.M;
    r.kept[at] = g;
    at += keep;
    const float s = keep ? second[g] : -kNegInf;
    bound = s < bound ? s : bound;
  }
  r.bound = bound;
}

#endif

// Lower bound of the K-th best of v[0..padded), K <= 16: the K-th best of 16 columns' maxima.
float bound_of(const float* v, int64_t padded, int64_t K) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  HWY_ALIGN float best[kPad];
  for (int64_t j = 0; j < kPad; j += n) {
    VF m = hn::Set(df, kNegInf);
    for (int64_t i = j; i < padded; i += kPad) m = hn::Max(m, hn::Load(df, v + i));
    hn::Store(m, df, best + j);
  }
  float bound = -kNegInf;
  for (int64_t j = 0; j < kPad; ++j) {
    const VF mine = hn::Set(df, best[j]);
    size_t more = 0;
    for (int64_t i = 0; i < kPad; i += n)
      more += hn::CountTrue(df, hn::Gt(hn::Load(df, best + i), mine));
    if (static_cast<int64_t>(more) < K && best[j] < bound) bound = best[j];
  }
  return bound;
}

// False: too many. Bits, not compressed vectors: stores of 64 bytes at any offset cost more.
HWY_INLINE bool add_survivors(const float* v, int64_t size, int64_t first, float bound,
                              Survivors& o) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const VF least = hn::Set(df, bound);
  int64_t count = o.n;
  for (int64_t i = 0; i < size; i += 64) {
    uint64_t in = 0;
    for (int64_t j = i; j < size && j < i + 64; j += n) {
      uint8_t bytes[8] = {};
      hn::StoreMaskBits(df, hn::Ge(hn::Load(df, v + j), least), bytes);
      uint32_t bits;
      std::memcpy(&bits, bytes, 4);
      in |= static_cast<uint64_t>(bits) << (j - i);
    }
    if (count + hwy::PopCount(in) > Survivors::kMost) return false;
    for (; in != 0; in &= in - 1) {
      const int64_t at = i + static_cast<int64_t>(hwy::Num0BitsBelowLS1Bit_Nonzero64(in));
      o.value[count] = v[at];
      o.at[count++] = static_cast<int32_t>(first + at);
    }
  }
  o.n = count;
  return true;
}

// idx[0..K) from the survivors, best first, lower position on ties; there are at least K.
HWY_INLINE void rank_survivors(Survivors& o, int64_t K, int32_t* idx) {
  const DF df;
  const int64_t n = static_cast<int64_t>(hn::Lanes(df));
  const hn::RebindToSigned<DF> di;
  const auto iota = hn::Iota(di, 0);
  const int64_t count = o.n;
  for (int64_t i = count; i < count + kPad; i += n)
    hn::StoreU(hn::Set(df, kNegInf), df, o.value + i);
  for (int64_t j = 0; j < count; ++j) {
    const VF mine = hn::Set(df, o.value[j]);
    int64_t rank = 0;
    for (int64_t i = 0; i < count; i += n) {
      const VF x = hn::Load(df, o.value + i);
      const auto before =
          hn::RebindMask(df, hn::Lt(iota, hn::Set(di, static_cast<int32_t>(j - i))));
      rank += static_cast<int64_t>(
          hn::CountTrue(df, hn::Or(hn::Gt(x, mine), hn::And(hn::Eq(x, mine), before))));
    }
    if (rank < K) idx[rank] = o.at[j];
  }
}

void gates(const spec::RouterConfig& c, const float* s, const int32_t* idx, float* weight) {
  float sum = c.gate_eps == spec::GateEps::eps_1e20 ? 1e-20F : 0.0F;
  for (int64_t k = 0; k < c.K; ++k) sum += weight[k] = s[idx[k]];
  const bool normalise = c.norm_topk_prob && c.K > 1;
  const float scale = c.scale_only_if_unnormalised && normalise ? 1.0F : static_cast<float>(c.c_r);
  for (int64_t k = 0; k < c.K; ++k) weight[k] = (normalise ? weight[k] / sum : weight[k]) * scale;
}

#if HWY_TARGET == HWY_SCALAR
bool takes_fast(const spec::RouterConfig&) { return false; }
bool route_row_fast(const spec::RouterSelectArgs&, int64_t, FastRow&) { return false; }
#else
// V3's rule: sigmoid, 8 groups of whole vectors, groups that are not kept are out, at most two
// choices a kept group.
bool takes_fast(const spec::RouterConfig& c) {
  const int64_t n = static_cast<int64_t>(hn::Lanes(DF()));
  return c.scoring == spec::Scoring::sigmoid && c.group_rule != spec::GroupRule::none && c.G == 8 &&
         n >= 8 && c.E % (8 * n) == 0 && c.E >= 16 * n &&
         c.router_mask == spec::RouterMask::neg_inf && c.K <= 2 * c.M;
}
// False: this row needs route_row (its scores may be written already).
bool route_row_fast(const spec::RouterSelectArgs& a, int64_t t, FastRow& r) {
  const spec::RouterConfig& c = a.config;
  const int64_t size = c.E / 8;
  float* scores = a.scores != nullptr ? a.scores + t * c.E : r.s;
  if (!scores_fast(c, a.logits + t * c.E, a.bias, scores, r.b)) return false;
  choose_fast<8>(c, size, r);
  r.o.n = 0;
  for (int64_t j = 0; j < c.M; ++j) {
    const int64_t first = r.kept[j] * size;
    if (!add_survivors(r.b + first, size, first, r.bound, r.o)) return false;
  }
  rank_survivors(r.o, c.K, a.idx + t * c.K);
  gates(c, scores, a.idx + t * c.K, a.weight + t * c.K);
  return true;
}
#endif

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

  const float bound = c.K <= kPad ? bound_of(r.cand, padded, c.K) : kNegInf;
  Survivors o;
  // NaN is in no survivor's way, but where it is, numbers may run out.
  if (bound > kNegInf && bound < -kNegInf && add_survivors(r.cand, padded, 0, bound, o) &&
      o.n >= c.K) {
    rank_survivors(o, c.K, idx);
    for (int64_t k = 0; k < c.K && compact; ++k)
      idx[k] = static_cast<int32_t>(r.kept[idx[k] / size] * size + idx[k] % size);
    return gates(c, r.s, idx, weight);
  }
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
    idx[k] = static_cast<int32_t>(compact ? r.kept[at / size] * size + at % size : at);
    r.cand[at] = kNegInf;
  }
  gates(c, r.s, idx, weight);
}

void select(const spec::RouterSelectArgs& a) {
  const spec::RouterConfig& c = a.config;
  const bool fast = takes_fast(c);
  const auto row = [&](int64_t t, Row& r) {
    if (fast && route_row_fast(a, t, r.fast)) return;
    route_row(c, a.logits + t * c.E, a.bias, a.idx + t * c.K, a.weight + t * c.K,
              a.scores != nullptr ? a.scores + t * c.E : nullptr, r);
  };
  // A sigmoid, group sums and K scans a score: 32 bytes' worth each; 16 on the fast path.
  const int threads =
      team_for((fast ? 16.0 : 32.0) * static_cast<double>(a.T) * static_cast<double>(c.E), 0);
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
