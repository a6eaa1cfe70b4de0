// Portable form of gemv (Highway: AVX2, AVX-512): float32 weights, or bf16 widened as they are
// loaded. Two weight rows against up to four activation rows.
#include "kernels/gemm/gemv.h"

#include <omp.h>

#include <algorithm>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/gemm/gemv.cpu_simd.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace v3b::kern {
namespace HWY_NAMESPACE {
namespace {
namespace hn = hwy::HWY_NAMESPACE;
using Df = hn::ScalableTag<float>;

HWY_INLINE hn::Vec<Df> load_wide(Df d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE hn::Vec<Df> load_wide(Df d, const spec::bf16* p) {
  const hn::Rebind<hwy::bfloat16_t, Df> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::bfloat16_t*>(p)));
}
HWY_INLINE float widen1(float x) { return x; }
HWY_INLINE float widen1(spec::bf16 x) { return spec::to_float(x); }

template <int MB, int NB, class T>
void tile(const GemmArgs& g, int64_t m0, int64_t n0) {
  const Df d;
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(d));
  const T* a = static_cast<const T*>(g.a) + m0 * g.lda;
  const T* b = static_cast<const T*>(g.b) + n0 * g.ldb;
  hn::Vec<Df> acc[MB][NB];
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < NB; ++j) acc[i][j] = hn::Zero(d);
  }
  int64_t k = 0;
  for (; k + lanes <= g.K; k += lanes) {
    hn::Vec<Df> vb[NB];
    for (int j = 0; j < NB; ++j) vb[j] = load_wide(d, b + j * g.ldb + k);
    for (int i = 0; i < MB; ++i) {
      const auto va = load_wide(d, a + i * g.lda + k);
      for (int j = 0; j < NB; ++j) acc[i][j] = hn::MulAdd(va, vb[j], acc[i][j]);
    }
  }
  for (int i = 0; i < MB; ++i) {
    for (int j = 0; j < NB; ++j) {
      float v = hn::GetLane(hn::SumOfLanes(d, acc[i][j]));
      for (int64_t t = k; t < g.K; ++t) v += widen1(a[i * g.lda + t]) * widen1(b[j * g.ldb + t]);
      const int64_t at = (m0 + i) * g.ldc + n0 + j;
      if (g.c_type == spec::DType::bf16) {
        static_cast<spec::bf16*>(g.c)[at] = spec::to_bf16(v);
      } else {
        float* c = static_cast<float*>(g.c) + at;
        *c = g.accumulate ? *c + v : v;
      }
    }
  }
}

template <int NB, class T>
void column(const GemmArgs& g, int64_t n0) {
  int64_t m = 0;
  for (; m + 4 <= g.M; m += 4) tile<4, NB, T>(g, m, n0);
  for (; m < g.M; ++m) tile<1, NB, T>(g, m, n0);
}

void rows(const GemmArgs& g, int64_t n0, int64_t n1) {
  int64_t n = n0;
  if (g.ab_type == spec::DType::bf16) {
    for (; n + 2 <= n1; n += 2) column<2, spec::bf16>(g, n);
    for (; n < n1; ++n) column<1, spec::bf16>(g, n);
  } else {
    for (; n + 2 <= n1; n += 2) column<2, float>(g, n);
    for (; n < n1; ++n) column<1, float>(g, n);
  }
}

const char* isa() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace v3b::kern
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(rows);
HWY_EXPORT(isa);

namespace {
constexpr int64_t kStreamFromBytes = 2 << 20;
}  // namespace

std::string gemv_isa(spec::DType ab_type) {
  if (ab_type == spec::DType::bf16 && cpu_features().avx512_bf16) return "avx512_bf16";
  return HWY_DYNAMIC_DISPATCH(isa)();
}

bool gemv_takes(const GemmArgs& g) noexcept {
  if (g.trans_a || !g.trans_b || g.M < 1 || g.K < 1) return false;
  const bool dot = g.ab_type == spec::DType::bf16 && cpu_features().avx512_bf16;
  // Measured against the tiles (one group of lanes is bound by its broadcasts): weights from memory 16 rows, weights in
  // the caches 12; without VDPBF16PS 4; with AMX the tiles take over where the products start to bind.
  if (!dot) return g.M <= 4;
  if (cpu_features().amx_bf16) return g.M <= 4;
  return g.M <= (g.N * g.K * 2 >= kStreamFromBytes ? 16 : 12);
}

void gemv(const GemmArgs& g) noexcept {
  const bool dot = g.ab_type == spec::DType::bf16 && cpu_features().avx512_bf16;
  const spec::bf16* packed = nullptr;
  if (dot) {
    thread_local Buffer<spec::bf16> a;
    a.reserve_discard((g.K + 31) / 32 * 32 * g.M);
    gemv_pack_avx512bf16(g, a.data());
    packed = a.data();
  }
  const auto work = [&](int64_t n0, int64_t n1) {
    if (packed != nullptr) {
      gemv_packed_avx512bf16(g, packed, n0, n1);
    } else {
      HWY_DYNAMIC_DISPATCH(rows)(g, n0, n1);
    }
  };
  const double weights = static_cast<double>(g.N) * static_cast<double>(g.K);
  const int threads = team_for(weights * static_cast<double>(spec::dtype_bytes(g.ab_type)),
                               2 * weights * static_cast<double>(g.M));
  if (threads == 1) return work(0, g.N);
  // About 512 KiB of weights a unit, eight units a thread where there are as many: a disturbed core costs little.
  const int64_t row = std::max<int64_t>(1, g.K * spec::dtype_bytes(g.ab_type));
  const int64_t unit =
      std::clamp((512 << 10) / row, int64_t{24}, std::max<int64_t>(24, g.N / (8 * threads))) / 24 *
      24;
  const int64_t units = (g.N + unit - 1) / unit;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < units; ++i) work(i * unit, std::min(g.N, (i + 1) * unit));
}
}  // namespace v3b::kern
#endif  // HWY_ONCE
