// See lm_head_ce.h. Units are ranges of the vocabulary; each has states of its own, merged in order at
// the end, so that results do not depend on the number of threads.
//
// Few rows: dot products on the weights as they lie (gemv.h), read bandwidth is the roof: 2*V*d bytes
// bf16. More rows: strips of 96 weight rows against the packed rows (strip.h); the logits come with
// rows in the lanes, so maximum, argmax and sum need no step across lanes: about 18 instructions for
// 16 logits beside d/2 products of the same width.
#include "kernels/gemm/lm_head_ce.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"
#include "kernels/core/team.h"
#include "kernels/gemm/gemm.h"
#include "kernels/gemm/gemv.h"
#include "kernels/gemm/lse_state.h"
#include "kernels/gemm/strip.h"

namespace v3b::kern {
namespace {

using spec::DType;

constexpr int64_t kStrip = 96, kLaneGroups = 16;  // logits of 96 x 256 at a time: 96 KiB of L2
constexpr int64_t kMaxStrips = 16;                // a unit
constexpr int64_t kPackGroups = 4;
constexpr int64_t kDotRows = 12, kWideRows = 4;    // few, measured: gemv_takes() agrees
constexpr int64_t kFewUnit = 512, kFewUnits = 64;  // vocabulary a unit of few rows; units wanted

const std::byte* row_of(const void* p, int64_t row, int64_t d, DType t) {
  return static_cast<const std::byte*>(p) + row * d * spec::dtype_bytes(t);
}

struct Head {
  const spec::LmHeadCeArgs& a;
  int64_t unit, units, padded;  // vocabulary a unit; rows rounded up to 16
  Buffer<float>& max;           // [units, padded]
  Buffer<float>& sum;           // [units, padded]
  Buffer<float>& label;         // [units, padded], 0 where the label is elsewhere
  Buffer<int32_t>& argmax;      // [units, padded]

  void start(int64_t u) const {
    const int64_t at = u * padded;
    std::fill_n(max.data() + at, padded, -std::numeric_limits<float>::infinity());
    std::fill_n(sum.data() + at, padded, 0.0F);
    std::fill_n(label.data() + at, padded, 0.0F);
    std::fill_n(argmax.data() + at, padded, 0);
  }
  void few(int64_t u, float* logits) const {
    const int64_t v0 = u * unit, n = std::min(unit, a.V - v0);
    GemmArgs g;
    g.M = a.T, g.N = n, g.K = a.d;
    g.a = a.h, g.lda = a.d;
    g.b = row_of(a.w, v0, a.d, a.dtype), g.ldb = a.d;
    g.c = logits, g.ldc = n;
    g.ab_type = a.dtype;
    gemm(g);
    for (int64_t t = 0; t < a.T; ++t) {
      LseState s;
      lse_fold(logits + t * n, n, v0, lse_label(a.labels, t), s);
      const int64_t at = u * padded + t;
      max[at] = s.max, sum[at] = s.sum, label[at] = s.label_logit, argmax[at] = s.argmax;
    }
  }
  void many(int64_t u, const StripX& x, float* logits) const {
    const int64_t end = std::min(a.V, (u + 1) * unit), groups = padded / 16;
    StripW w;
    w.type = a.dtype, w.w = a.w, w.ld = a.d;
    for (int64_t v = u * unit; v < end; v += kStrip) {
      const int64_t n = std::min(kStrip, end - v);
      for (int64_t g = 0; g < groups; g += kLaneGroups) {
        const int64_t g1 = std::min(groups, g + kLaneGroups), ld = (g1 - g) * 16,
                      at = u * padded + g * 16;
        strip_lanes(x, g, g1, w, v, v + n, logits, ld, false);
        const int64_t rest = a.T - g * 16;  // lanes without a row hold whatever was there
        for (int64_t r = 0; r < n && rest < ld; ++r)
          std::memset(logits + r * ld + rest, 0, static_cast<size_t>(ld - rest) * 4);
        lse_fold_lanes(logits, ld, n, v, ld, max.data() + at, sum.data() + at, argmax.data() + at);
        for (int64_t i = 0; i < std::min(rest, ld) && a.labels != nullptr; ++i) {
          const int64_t y = a.labels[g * 16 + i] - v;
          if (y >= 0 && y < n) label[at + i] = logits[y * ld + i];
        }
      }
    }
  }
  void finish(int64_t t) const {
    LseState s;
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = u * padded + t;
      lse_merge({max[at], sum[at], label[at], argmax[at]}, s);
    }
    s.finish(t, a.labels, a.nll, a.lse, a.argmax);
  }
};

int64_t few_rows(DType t) {
  return t == DType::bf16 && cpu_features().avx512_bf16 ? kDotRows : kWideRows;
}

}  // namespace

std::string lm_head_ce_cpu_simd_isa(DType t) {
  return tile_form(t, t) == TileForm::pairs ? isa_name(best_isa()) : lse_isa();
}

void lm_head_ce_cpu_simd(const spec::LmHeadCeArgs& a) noexcept {
  thread_local Buffer<float> max, sum, label;
  thread_local Buffer<int32_t> argmax;
  thread_local Buffer<uint32_t> packed;
  if (a.T == 0) return;
  const bool few = a.T <= few_rows(a.dtype);
  const int64_t padded = (a.T + 15) / 16 * 16, groups = padded / 16;
  const int64_t unit = few ? std::clamp<int64_t>(a.V / kFewUnits / 8 * 8, kFewUnit, 4 * kFewUnit)
                           : kStrip * std::clamp<int64_t>(a.V / kStrip / kFewUnits, 1, kMaxStrips);
  const Head h{a, unit, (a.V + unit - 1) / unit, padded, max, sum, label, argmax};
  max.reserve_discard(h.units * padded);
  sum.reserve_discard(h.units * padded);
  label.reserve_discard(h.units * padded);
  argmax.reserve_discard(h.units * padded);
  const TileForm form = tile_form(a.dtype, a.dtype);
  StripX x;
  if (!few) {
    packed.reserve_discard(strip_x_dwords(form, a.T, a.d));
    x = strip_x(form, a.T, a.d, packed.data());
  }
  const int64_t logits = few ? a.T * unit : kStrip * kLaneGroups * 16;
  const double v = static_cast<double>(a.V), d = static_cast<double>(a.d),
               t = static_cast<double>(a.T);
  const int threads = team_for(v * d * static_cast<double>(spec::dtype_bytes(a.dtype)),
                               2 * v * d * t + 100 * v * t);
  uint32_t* out = packed.data();  // of the calling thread: the name is another buffer in the team
  const int64_t packs = few ? 0 : (groups + kPackGroups - 1) / kPackGroups;
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffer<float> mine;
    mine.reserve_discard(logits);
    if (packs > 0) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < packs; ++i) {
        PackArgs p;
        p.src = a.h, p.type = a.dtype, p.ld = a.d, p.count = a.T, p.k = a.d, p.out = out;
        strip_pack_x(form, p, i * kPackGroups, std::min(groups, (i + 1) * kPackGroups));
      }
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t u = 0; u < h.units; ++u) {
      h.start(u);
      if (few)
        h.few(u, mine.data());
      else
        h.many(u, x, mine.data());
    }
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < a.T; ++i) h.finish(i);
  }
}

}  // namespace v3b::kern
