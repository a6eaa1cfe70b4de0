// Rows out to expert order and back. Dispatch: a counting sort over T*K slots (a few ns each), then
// every token's row is read once and written K times; large results go past the caches (streaming
// stores), since reading each line before overwriting it would double the traffic. Combine: K
// streams in, one out, summed in registers, k ascending. Both move T*d*e*(K+1) bytes: copy
// bandwidth is the roof.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/moe/moe_dispatch.cpu_simd.cpp"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
//
#include <omp.h>

#include <cstring>
#include <vector>

#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "kernels/moe/moe.h"
#include "kernels/norm_rope/hwy_io-inl.h"

#ifndef V3B_MOE_DISPATCH_ONCE
#define V3B_MOE_DISPATCH_ONCE
namespace v3b::kern {
namespace {
constexpr int64_t kParallelBytes = 1 << 17;
constexpr int64_t kStreamBytes = 16 << 20;  // beyond what stays in the caches for the reader
}  // namespace
}  // namespace v3b::kern
#endif

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

void stream_copy(const uint8_t* from, uint8_t* to, int64_t bytes) {
  const hn::ScalableTag<uint8_t> d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t i = 0;
  for (; i + lanes <= bytes; i += lanes) hn::Stream(hn::LoadU(d, from + i), d, to + i);
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

void gather(const spec::MoeDispatchArgs& a) {
  const int64_t bytes = a.d * spec::dtype_bytes(a.dtype), total = a.offsets[a.E] * bytes;
  const auto* x = static_cast<const uint8_t*>(a.x);
  auto* rows = static_cast<uint8_t*>(a.rows);
  const bool stream =
      total >= kStreamBytes && bytes % 64 == 0 && reinterpret_cast<uintptr_t>(rows) % 64 == 0;
#pragma omp parallel for schedule(static) if (total >= kParallelBytes && omp_in_parallel() == 0)
  for (int64_t t = 0; t < a.T; ++t) {
    for (int64_t k = 0; k < a.K; ++k) {
      const int64_t row = a.row[t * a.K + k];
      if (row < 0) continue;
      if (stream)
        stream_copy(x + t * bytes, rows + row * bytes, bytes);
      else
        std::memcpy(rows + row * bytes, x + t * bytes, static_cast<size_t>(bytes));
    }
    if (stream) hwy::FlushStream();
  }
}

template <class T>
void combine_rows(const spec::MoeCombineArgs& a) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const T* rows = static_cast<const T*>(a.rows);
#pragma omp parallel for schedule(static) if (a.T * a.K * a.d >= kParallelBytes / 2 && \
                                              omp_in_parallel() == 0)
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t* row = a.row + t * a.K;
    const float* w = a.weight + t * a.K;
    T* y = static_cast<T*>(a.y) + t * a.d;
    int64_t j = 0;
    for (; j + 2 * lanes <= a.d; j += 2 * lanes) {
      VF s0 = hn::Zero(df), s1 = s0;
      for (int64_t k = 0; k < a.K; ++k) {
        if (row[k] < 0) continue;
        const T* from = rows + row[k] * a.d + j;
        const VF vw = hn::Set(df, w[k]);
        s0 = hn::MulAdd(vw, load(df, from), s0);
        s1 = hn::MulAdd(vw, load(df, from + lanes), s1);
      }
      store(df, s0, y + j);
      store(df, s1, y + j + lanes);
    }
    for (; j < a.d; j += lanes) {
      const size_t n = static_cast<size_t>(a.d - j < lanes ? a.d - j : lanes);
      VF s = hn::Zero(df);
      for (int64_t k = 0; k < a.K; ++k)
        if (row[k] >= 0)
          s = hn::MulAdd(hn::Set(df, w[k]), load_tail(df, rows + row[k] * a.d + j, n), s);
      store_tail(df, s, y + j, n);
    }
  }
}
// One element block of a token at a time, its rows in expert order, everything rounded to bf16.
template <class T>
void combine_rows_bf16(const spec::MoeCombineArgs& a) {
  const DF df;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(df));
  const T* rows = static_cast<const T*>(a.rows);
#pragma omp parallel for schedule(static) if (a.T * a.K * a.d >= kParallelBytes / 2 && \
                                              omp_in_parallel() == 0)
  for (int64_t t = 0; t < a.T; ++t) {
    const int64_t* row = a.row + t * a.K;
    const float* w = a.weight + t * a.K;
    T* y = static_cast<T*>(a.y) + t * a.d;
    for (int64_t j = 0; j < a.d; j += lanes) {
      const size_t n = static_cast<size_t>(a.d - j < lanes ? a.d - j : lanes);
      VF s = hn::Zero(df);
      for (int64_t last = -1;;) {  // the next row in expert order; K is small
        int64_t next = -1;
        for (int64_t k = 0; k < a.K; ++k)
          if (row[k] > last && (next < 0 || row[k] < row[next])) next = k;
        if (next < 0) break;
        last = row[next];
        const VF v = round_bf16(df, load_tail(df, rows + last * a.d + j, n));
        s = round_bf16(df, hn::Add(s, round_bf16(df, hn::Mul(hn::Set(df, w[next]), v))));
      }
      store_tail(df, s, y + j, n);
    }
  }
}
void combine(const spec::MoeCombineArgs& a) {
  if (a.moe_accum == spec::MoeAccum::bf16) {
    if (a.dtype == spec::DType::bf16) return combine_rows_bf16<uint16_t>(a);
    return combine_rows_bf16<float>(a);
  }
  if (a.dtype == spec::DType::bf16) return combine_rows<uint16_t>(a);
  combine_rows<float>(a);
}

const char* dispatch_target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
namespace {
HWY_EXPORT(gather);
HWY_EXPORT(combine);
HWY_EXPORT(dispatch_target);
}  // namespace

void moe_dispatch_cpu_simd(const spec::MoeDispatchArgs& a) noexcept {
  const int64_t slots = a.T * a.K;
  std::vector<uint8_t> keep;
  if (a.capacity > 0) {
    keep.resize(static_cast<size_t>(slots));
    moe_capacity_cpu({a.T, a.E, a.K, a.idx, a.weight, a.capacity, a.drop_policy, keep.data()});
  }
  const auto served = [&](int64_t i) {
    return a.idx[i] >= 0 && (keep.empty() || keep[static_cast<size_t>(i)] != 0);
  };
  std::memset(a.offsets, 0, static_cast<size_t>(a.E + 1) * 8);
  for (int64_t i = 0; i < slots; ++i)
    if (served(i)) ++a.offsets[a.idx[i] + 1];
  for (int64_t e = 0; e < a.E; ++e) a.offsets[e + 1] += a.offsets[e];
  // Placing moves every offset to its expert's end; the shift below moves them back.
  for (int64_t i = 0; i < slots; ++i) a.row[i] = served(i) ? a.offsets[a.idx[i]]++ : -1;
  for (int64_t e = a.E; e > 0; --e) a.offsets[e] = a.offsets[e - 1];
  a.offsets[0] = 0;
  HWY_DYNAMIC_DISPATCH(gather)(a);
}
void moe_combine_rows(const spec::MoeCombineArgs& a) noexcept { HWY_DYNAMIC_DISPATCH(combine)(a); }
const char* moe_dispatch_cpu_simd_isa() noexcept { return HWY_DYNAMIC_DISPATCH(dispatch_target)(); }

}  // namespace v3b::kern
#endif
