// The product that expands latents to keys and values, on the register tiles of rows.h: out^T = W c^T takes W's rows as
// they lie in the checkpoint as the broadcast operand (the A tile of AMX) and packs only the latents, 64 tokens a panel;
// a block of out^T is turned when it is rounded and stored. No copy of W.
// Bound: arithmetic from about 16 tokens on; W (33 MB for 128 heads) is read once, a panel of c (64 KiB at d_c = 512)
// comes from L2 for every block of W's rows.
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/mla_expand.cpu_simd.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include <algorithm>

#include "hwy/highway.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/rows.h"
#include "kernels/attention/rows_pack-inl.h"
#include "kernels/core/buffer.h"
#include "kernels/core/team.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

constexpr int64_t kOutputs = 96;  // rows of W at a time: 96 KiB at d_c = 512, and 24 KiB of out^T

// c [n][width], of which `lanes` lanes count -> out[lane][0, n).
template <class T>
void store_turned(const float* c, int64_t n, int64_t width, int64_t lanes, T* out, int64_t ld) {
  for (int64_t l = 0; l < lanes; ++l)
    for (int64_t i = 0; i < n; ++i) {
      if constexpr (sizeof(T) == 4)
        out[l * ld + i] = c[i * width + l];
      else
        out[l * ld + i] = spec::to_bf16(c[i * width + l]).bits;
    }
}

template <bool kBf16>
void expand(const MlaExpandArgs& a, const RowsKernels& kn) {
  constexpr int64_t per = kBf16 ? 2 : 1, e = kBf16 ? 2 : 4;
  const int64_t K = (a.d_c / per + (a.d_c % per != 0) + kn.unit - 1) / kn.unit * kn.unit;
  const bool in_place = a.d_c == per * K;  // W's rows are whole units
  RowsTask latents;                        // as queries: one head, M rows
  latents.R = a.tokens, latents.d_qk = a.d_c, latents.q = a.c, latents.q_outer = a.d_c;
  static thread_local Buffer<uint32_t> packed;
  packed.reserve_discard((a.tokens + kPanel) * K);
  uint32_t* const x = packed.data();
  const int64_t panels = (a.tokens + kPanel - 1) / kPanel,
                blocks = (a.outputs + kOutputs - 1) / kOutputs;
  const double m = static_cast<double>(a.tokens), n = static_cast<double>(a.outputs),
               k = static_cast<double>(a.d_c);
  const int threads = team_for(static_cast<double>(e) * (m * k + n * k + m * n), 2 * m * n * k);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < panels; ++p) {
      RowsTask part = latents;
      part.R = std::min(kPanel, a.tokens - p * kPanel);
      part.q = static_cast<const uint8_t*>(a.c) + e * p * kPanel * a.d_c;
      pack_queries<kBf16>(part, K, kn, x + p * kPanel * K);
    }
    static thread_local Buffer<float> sums;
    static thread_local Buffer<uint8_t> rows;
    sums.reserve_discard(kOutputs * kPanel);
    if (!in_place) rows.reserve_discard(kOutputs * 4 * K);
    if (kn.begin) kn.begin();
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t n0 = b * kOutputs, outputs = std::min(kOutputs, a.outputs - n0);
      const uint8_t* w = static_cast<const uint8_t*>(a.w) + e * n0 * a.d_c;
      const int64_t next = std::min(kOutputs, a.outputs - n0 - outputs) * a.d_c * e / panels;
      int64_t stride = e * a.d_c;
      const uint8_t* ahead = w + outputs * stride;
      if (!in_place) {
        KeySource s;
        s.k1 = w, s.k1_stride = stride, s.d1 = a.d_c;
        stride = 4 * K;
        fetch_keys<kBf16>(s, 0, outputs, rows.data(), stride, nullptr);
        w = rows.data();
      }
      for (int64_t p = 0; p < panels; ++p) {
        const int64_t tokens = std::min(kPanel, a.tokens - p * kPanel),
                      nv = panel_vectors(a.tokens, p * kPanel), width = nv * kLanes;
        kn.tile(outputs, w, stride, 4, x + p * kPanel * K, nv, K, sums.data(), width, nullptr,
                {ahead + p * next, next});
        const int64_t at = p * kPanel * a.outputs + n0;
        if (kBf16 && kn.store_turned)
          kn.store_turned(sums.data(), outputs, width, tokens, static_cast<uint16_t*>(a.out) + at,
                          a.outputs);
        else if (kBf16)
          store_turned(sums.data(), outputs, width, tokens, static_cast<uint16_t*>(a.out) + at,
                       a.outputs);
        else
          store_turned(sums.data(), outputs, width, tokens, static_cast<float*>(a.out) + at,
                       a.outputs);
      }
    }
    if (kn.end) kn.end();
  }
}

void run(const MlaExpandArgs& a, const RowsKernels* native) {
  RowsKernels generic{};
  if (a.dtype == spec::DType::bf16) {
    generic.tile = tile_any<true>;
    expand<true>(a, native && kLanes == 16 ? *native : generic);
  } else {
    generic.tile = tile_any<false>;
    expand<false>(a, generic);
  }
}

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(run);
void mla_expand_cpu_simd(const MlaExpandArgs& a) noexcept {
  RowsKernels native{};
  const bool any = rows_native(native);
  HWY_DYNAMIC_DISPATCH(run)(a, any ? &native : nullptr);
}
}  // namespace v3b::kern
#endif
