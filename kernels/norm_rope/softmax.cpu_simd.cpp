// Softmax of rows (SPEC 1.5), with the logarithm of the sum if asked for. Memory sees x once and y once: exponentials
// relative to the largest value so far are kept in a row of the thread (in L2 for a row of the vocabulary), and go out,
// scaled, while the next row comes in. Bound by the exponentials and by memory about alike
// (kernels/notes/elementwise.md).
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/norm_rope/softmax.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/core/buffer.h"
#include "kernels/core/team.h"
#include "kernels/norm_rope/exp-inl.h"
#include "kernels/norm_rope/hwy_io-inl.h"
#include "kernels/norm_rope/pairs-inl.h"
#include "kernels/norm_rope/stream.h"
#include "kernels/norm_rope/swiglu.h"

#ifndef V3B_SOFTMAX_ONCE
#define V3B_SOFTMAX_ONCE
namespace v3b::kern {
namespace {
constexpr double kExpBytes = 16;  // an exponential costs about as much as moving so many bytes
constexpr int64_t kBlock = 1024;  // elements: in L1, and a multiple of every vector length
constexpr int64_t kSplitRow = 1 << 15;  // a single row from here on is shared by the threads
constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// Sum of exp(scale x - top) over what was read, top = the largest scale x.
struct RowSum {
  float top = kNegInf;
  double sum = 0;

  // Where the exponentials are taken relative to: a prefix of masked values must not make inf - inf.
  float base() const { return top == kNegInf ? 0.0F : top; }
  void raise(float t) {
    if (!(t > top)) return;
    sum *= std::exp(static_cast<double>(top) - static_cast<double>(t));
    top = t;
  }
  void merge(RowSum o) {
    if (o.top > top) std::swap(*this, o);
    sum += o.sum == 0 ? 0 : o.sum * std::exp(static_cast<double>(o.top) - static_cast<double>(top));
  }
  float lse() const { return top + static_cast<float>(std::log(sum)); }
};
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// One thread's exponentials of a row, each block relative to the largest value up to it.
struct Kept {
  float* e;     // [n]
  float* base;  // [blocks]
};

template <bool kStream, bool kNegative>
struct Turns {
  float scale;
  Kept kept;

  HWY_INLINE VF up(VF x) const {  // grows with scale * x
    if constexpr (kNegative) return hn::Neg(x);
    return x;
  }

  // kRead: x [n] -> kept, its sum. kWrite: what was kept before (its sum is `before`) -> y [n]. A NaN of x reaches the
  // sum, so the whole row becomes NaN; -inf gives 0.
  template <bool kRead, bool kKeep, bool kWrite>
  RowSum turn(int64_t n, const float* x, float* y, const RowSum& before) const {
    const DF df;
    const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
    RowSum now;
    float last = 0, factor = 0;
    bool known = false;
    for (int64_t lo = 0; lo < n; lo += kBlock) {
      const int64_t hi = std::min(n, lo + kBlock), body = lo + (hi - lo) / lanes * lanes;
      float& base = kept.base[lo / kBlock];
      if constexpr (kWrite) {
        if (!known || base != last) {
          const double diff = static_cast<double>(base) - static_cast<double>(before.top);
          factor = static_cast<float>(std::exp(diff) / before.sum);
          last = base, known = true;
        }
      }
      if constexpr (kRead) {
        VF m0 = hn::Set(df, kNegInf), m1 = m0;
        int64_t i = lo;
        for (; i + 2 * lanes <= body; i += 2 * lanes) {
          m0 = hn::Max(m0, up(hn::LoadU(df, x + i)));
          m1 = hn::Max(m1, up(hn::LoadU(df, x + i + lanes)));
        }
        if (i < body) m0 = hn::Max(m0, up(hn::LoadU(df, x + i)));
        float top = hn::GetLane(hn::MaxOfLanes(df, hn::Max(m0, m1)));
        for (i = body; i < hi; ++i) top = std::fmax(top, kNegative ? -x[i] : x[i]);
        now.raise(std::fabs(scale) * top);
        if constexpr (kKeep) base = now.base();
      }
      const VF vs = hn::Set(df, scale), vb = hn::Set(df, now.base()), vf = hn::Set(df, factor);
      VF s0 = hn::Zero(df), s1 = s0;
      const auto step = [&](int64_t i, VF& s) HWY_ATTR {
        VF old = vf;
        if constexpr (kWrite) old = hn::Load(df, kept.e + i);
        if constexpr (kRead) {
          ahead(x + i, kBlock * 4 + 512);
          const VF z = hn::MulSub(vs, hn::LoadU(df, x + i), vb);
          const VF e = exp_between(at_least(kExpLeast, z));
          s = hn::Add(s, e);
          if constexpr (kKeep) hn::Store(e, df, kept.e + i);
        }
        if constexpr (kWrite) {
          if constexpr (kStream)
            hn::Stream(hn::Mul(old, vf), df, y + i);
          else
            hn::StoreU(hn::Mul(old, vf), df, y + i);
        }
      };
      int64_t v = lo;
      for (; v + 2 * lanes <= body; v += 2 * lanes) step(v, s0), step(v + lanes, s1);
      if (v < body) step(v, s0);
      double total = sum(
          df,
          hn::Add(
              s0,
              s1));  // f32 within a block, double across: a plain f32 sum of 1e5 terms loses 5e-6
      for (int64_t i = body; i < hi; ++i) {
        if constexpr (kWrite) y[i] = kept.e[i] * factor;
        if constexpr (kRead) {
          const float e = std::exp(scale * x[i] - now.base());
          total += e;
          if constexpr (kKeep) kept.e[i] = e;
        }
      }
      if constexpr (kRead) now.sum += total;
    }
    return now;
  }
};

// Rows [lo, hi): every row's second half beside the next row's first.
template <bool kStream, bool kNegative>
void span(const spec::SoftmaxArgs& a, const Kept& kept, int64_t lo, int64_t hi) {
  const Turns<kStream, kNegative> turns{static_cast<float>(a.scale), kept};
  const auto x = [&](int64_t t) { return a.x + t * a.x_stride; };
  const auto y = [&](int64_t t) { return a.y + t * a.y_stride; };
  const auto tell = [&](int64_t t, const RowSum& s) {
    if (a.lse != nullptr) a.lse[t] = s.lse();
  };
  if (a.y == nullptr) {
    for (int64_t t = lo; t < hi; ++t)
      tell(t, turns.template turn<true, false, false>(a.n, x(t), nullptr, {}));
    return;
  }
  RowSum s = turns.template turn<true, true, false>(a.n, x(lo), nullptr, {});
  tell(lo, s);
  for (int64_t t = lo; t + 1 < hi; ++t) {
    s = turns.template turn<true, true, true>(a.n, x(t + 1), y(t), s);
    tell(t + 1, s);
  }
  turns.template turn<false, false, true>(a.n, nullptr, y(hi - 1), s);
  if (kStream) hwy::FlushStream();
}

// One long row, a share of its blocks to each thread.
template <bool kStream, bool kNegative>
void split_row(const spec::SoftmaxArgs& a, const Kept& kept, int threads) {
  RowSum all;
#pragma omp parallel num_threads(threads)
  {
    const int64_t t = omp_get_num_threads(), i = omp_get_thread_num();
    const int64_t blocks = (a.n + kBlock - 1) / kBlock, b = blocks * i / t, lo = b * kBlock;
    const int64_t n = std::min(a.n, blocks * (i + 1) / t * kBlock) - lo;
    const Turns<kStream, kNegative> turns{static_cast<float>(a.scale),
                                          {kept.e + lo, kept.base + b}};
    const RowSum mine = a.y != nullptr
                            ? turns.template turn<true, true, false>(n, a.x + lo, nullptr, {})
                            : turns.template turn<true, false, false>(n, a.x + lo, nullptr, {});
#pragma omp critical
    all.merge(mine);
#pragma omp barrier
    if (a.y != nullptr) turns.template turn<false, false, true>(n, nullptr, a.y + lo, all);
    if (kStream) hwy::FlushStream();
  }
  if (a.lse != nullptr) a.lse[0] = all.lse();
}

template <bool kStream, bool kNegative>
void softmax_as(const spec::SoftmaxArgs& a) {
  const int threads = team_for(static_cast<double>(a.T) * static_cast<double>(a.n) * kExpBytes, 0);
  const int64_t blocks = (a.n + kBlock - 1) / kBlock;
  const auto with_kept = [&](const auto& use) {
    Buffer<float> e(a.y == nullptr ? 0 : blocks * kBlock, false), base(blocks, false);
    use(Kept{e.data(), base.data()});
  };
  if (a.T == 1 && threads > 1 && a.n >= kSplitRow)
    return with_kept([&](const Kept& k) { split_row<kStream, kNegative>(a, k, threads); });
  for_spans(a.T, threads, [&](int64_t lo, int64_t hi) {
    with_kept([&](const Kept& k) { span<kStream, kNegative>(a, k, lo, hi); });
  });
}

void softmax(const spec::SoftmaxArgs& a) {
  const bool stream =
      a.y != nullptr && stream_output(a.T * a.n * 4) && line_aligned(a.y, a.y_stride * 4);
  if (a.scale < 0) return softmax_as<false, true>(a);
  stream ? softmax_as<true, false>(a) : softmax_as<false, false>(a);
}
const char* softmax_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(softmax);
HWY_EXPORT(softmax_target);
}  // namespace
void softmax_cpu_simd(const spec::SoftmaxArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(softmax)(a); }
const char* softmax_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(softmax_target)(); }
}  // namespace v3b::kern
#endif
