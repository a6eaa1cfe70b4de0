// Feed-forward layers of the training step: SwiGLU MLP (dense and shared experts), the V3 router
// and the routed experts, forward and backward (SPEC 1.12-1.17, 3.4-3.7). Routed rows are sorted by
// expert and padded with zero rows to a multiple of kExpertPad; an expert's rows are worked through
// in tiles of kExpertTile, one thread a tile (forward) or an expert (backward), so that the GEMMs
// find their rows in the L2 cache and few shapes occur. The routing weight multiplies the hidden
// row, not the output (equal in exact arithmetic): the output of an expert needs no keeping.
// Internal to kernels/train.
#pragma once
#include <omp.h>

#include "kernels/train/ops.h"
#include "kernels/train/params.h"

namespace v3b::kern::train {

template <class R, class X>
struct MlpActs {
  Buffer<R> gu;  // [N, 2*width]
  Buffer<X> h;   // [N, width]
};

// out += mlp(x)
template <class R, class X>
void mlp_fwd(int64_t N, int64_t d, int64_t width, const X* x, const X* w_gu, const X* w_down,
             MlpActs<R, X>& acts, R* out) {
  acts.gu.reserve_discard(N * 2 * width), acts.h.reserve_discard(N * width);
  mm_fwd(N, 2 * width, d, x, w_gu, acts.gu.data());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    const R* g = acts.gu.data() + i * 2 * width;
    swiglu_row(g, g + width, width, R(1), acts.h.data() + i * width);
  }
  mm_fwd(N, d, width, acts.h.data(), w_down, out, true);
}
// dy [N,d]; dx (+)= ; dgu and dh: scratch [N, 2*width] and [N, width].
template <class R, class X>
void mlp_bwd(int64_t N, int64_t d, int64_t width, const X* x, const X* dy, const X* w_gu,
             const X* w_down, const MlpActs<R, X>& acts, Buffer<X>& dgu, Buffer<R>& dh, R* dx,
             bool acc, R* dw_gu, R* dw_down) {
  dgu.reserve_discard(N * 2 * width), dh.reserve_discard(N * width);
  mm_dw(N, d, width, dy, acts.h.data(), dw_down);
  mm_dx(N, d, width, dy, w_down, dh.data());
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < N; ++i) {
    const R* g = acts.gu.data() + i * 2 * width;
    swiglu_row_bwd(g, g + width, dh.data() + i * width, width, R(1), dgu.data() + i * 2 * width);
  }
  mm_dx(N, 2 * width, d, dgu.data(), w_gu, dx, acc);
  mm_dw(N, 2 * width, d, dgu.data(), x, dw_gu);
}

struct RouterDims {
  int64_t E, K, G, M;
  double c_r;
  bool norm;
};

// Indices of the K largest of v among allowed entries: larger first, then lower index.
template <class R>
inline void top_k(const R* v, const bool* allowed, int64_t n, int64_t K, int32_t* idx) {
  bool taken[1024] = {};
  for (int64_t k = 0; k < K; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; ++i) {
      if (taken[i] || (allowed != nullptr && !allowed[i])) continue;
      if (best < 0 || v[i] > v[best]) best = i;
    }
    if (best < 0) best = 0;  // only with NaN everywhere; the loss is NaN then and the run stops
    taken[best] = true;
    idx[k] = static_cast<int32_t>(best);
  }
}

// One token's routing, SPEC 1.12 steps 3-9. s: scores [E]; bias [E].
template <class R>
inline void route_token(const RouterDims& r, const R* s, const float* bias, int32_t* idx, R* w) {
  R sel[1024];
  bool allowed[1024];
  for (int64_t e = 0; e < r.E; ++e) sel[e] = s[e] + R(bias[e]);
  if (r.G > 1) {
    const int64_t n = r.E / r.G;
    R group[1024];
    int32_t keep[1024];
    for (int64_t g = 0; g < r.G; ++g) {
      R a = sel[g * n], b = R(-INFINITY);
      for (int64_t i = 1; i < n; ++i) {
        const R v = sel[g * n + i];
        if (v > a) {
          b = a;
          a = v;
        } else if (v > b) {
          b = v;
        }
      }
      group[g] = a + b;
    }
    top_k(group, nullptr, r.G, r.M, keep);
    std::fill(allowed, allowed + r.E, false);
    for (int64_t g = 0; g < r.M; ++g) {
      std::fill(allowed + keep[g] * n, allowed + (keep[g] + 1) * n, true);
    }
    top_k(sel, allowed, r.E, r.K, idx);
  } else {
    top_k(sel, nullptr, r.E, r.K, idx);
  }
  R sum = 0;
  for (int64_t k = 0; k < r.K; ++k) sum += s[idx[k]];
  const R scale = r.norm && r.K > 1 ? R(r.c_r) / (sum + R(1e-20)) : R(r.c_r);
  for (int64_t k = 0; k < r.K; ++k) w[k] = s[idx[k]] * scale;
}

// w_bar [K] -> s_bar added into z_bar's slots as s_bar (SPEC 3.6); the caller multiplies s(1-s).
template <class R>
inline void route_token_bwd(const RouterDims& r, const R* s, const int32_t* idx, const R* w,
                            const R* w_bar, R* s_bar) {
  if (!(r.norm && r.K > 1)) {
    for (int64_t k = 0; k < r.K; ++k) s_bar[idx[k]] += R(r.c_r) * w_bar[k];
    return;
  }
  R tau = R(1e-20), dot = 0;
  for (int64_t k = 0; k < r.K; ++k) tau += s[idx[k]], dot += w_bar[k] * w[k];
  for (int64_t k = 0; k < r.K; ++k) {
    s_bar[idx[k]] += R(r.c_r) / tau * (w_bar[k] - dot / R(r.c_r));
  }
}

inline constexpr int64_t kExpertPad = 16, kExpertTile = 256;

struct ExpertTile {
  int32_t expert;
  int64_t begin, rows;
};
template <class R, class X>
struct MoeActs {
  Buffer<R> s, w;                      // [N,E], [N,K]
  Buffer<int32_t> idx;                 // [N,K]
  std::vector<int64_t> counts, begin;  // [E] assignments, [E+1] padded starts
  std::vector<int32_t> row_slot;       // [P]: t*K+k, or -1 for a pad row
  std::vector<int32_t> slot_row;       // [N*K]: row
  std::vector<ExpertTile> tiles;
  Buffer<X> xg, hw;  // [P,d], [P,m]
  Buffer<R> gu;      // [P,2m]
  MlpActs<R, X> shared;
  int64_t rows() const { return begin.empty() ? 0 : begin.back(); }
};

// Stable placement in (expert, t*K+k) order from acts.idx.
template <class R, class X>
void dispatch(int64_t N, const RouterDims& r, MoeActs<R, X>& a) {
  a.counts.assign(static_cast<size_t>(r.E), 0);
  for (int64_t i = 0; i < N * r.K; ++i) ++a.counts[static_cast<size_t>(a.idx[i])];
  a.begin.assign(static_cast<size_t>(r.E) + 1, 0);
  a.tiles.clear();
  for (int64_t e = 0; e < r.E; ++e) {
    const auto se = static_cast<size_t>(e);
    const int64_t rows = (a.counts[se] + kExpertPad - 1) / kExpertPad * kExpertPad;
    a.begin[se + 1] = a.begin[se] + rows;
    for (int64_t t = 0; t < rows; t += kExpertTile) {
      a.tiles.push_back(
          {static_cast<int32_t>(e), a.begin[se] + t, std::min(kExpertTile, rows - t)});
    }
  }
  a.row_slot.assign(static_cast<size_t>(a.rows()), -1);
  a.slot_row.resize(static_cast<size_t>(N * r.K));
  std::vector<int64_t> next(a.begin.begin(), a.begin.end() - 1);
  for (int64_t i = 0; i < N * r.K; ++i) {
    const int64_t row = next[static_cast<size_t>(a.idx[i])]++;
    a.row_slot[static_cast<size_t>(row)] = static_cast<int32_t>(i);
    a.slot_row[static_cast<size_t>(i)] = static_cast<int32_t>(row);
  }
}

template <class R>
struct ExpertScratch {  // one thread's
  Buffer<R> hhat;
};

// out[t] += sum over k of the routed experts of x[t]. y: scratch [P,d].
template <class R, class X>
void experts_fwd(int64_t N, int64_t d, int64_t m, const RouterDims& r, const X* x, const X* experts,
                 int64_t stride, int64_t down_at, MoeActs<R, X>& a, Buffer<R>& y, R* out) {
  const int64_t P = a.rows();
  a.xg.reserve_discard(P * d), a.hw.reserve_discard(P * m), a.gu.reserve_discard(P * 2 * m);
  y.reserve_discard(P * d);
#pragma omp parallel for schedule(dynamic, 1)
  for (size_t i = 0; i < a.tiles.size(); ++i) {
    const ExpertTile& t = a.tiles[i];
    const X* w = experts + t.expert * stride;
    X* xg = a.xg.data() + t.begin * d;
    for (int64_t j = 0; j < t.rows; ++j) {
      const int32_t slot = a.row_slot[static_cast<size_t>(t.begin + j)];
      if (slot < 0) {
        std::fill(xg + j * d, xg + (j + 1) * d, X{});
      } else {
        std::copy_n(x + slot / r.K * d, d, xg + j * d);
      }
    }
    R* gu = a.gu.data() + t.begin * 2 * m;
    X* hw = a.hw.data() + t.begin * m;
    mm_fwd(t.rows, 2 * m, d, xg, w, gu);
    for (int64_t j = 0; j < t.rows; ++j) {
      const int32_t slot = a.row_slot[static_cast<size_t>(t.begin + j)];
      const R scale = slot < 0 ? R(0) : a.w[slot];
      swiglu_row(gu + j * 2 * m, gu + j * 2 * m + m, m, scale, hw + j * m);
    }
    mm_fwd(t.rows, d, m, hw, w + down_at, y.data() + t.begin * d);
  }
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < N; ++t) {
    R* o = out + t * d;
    for (int64_t k = 0; k < r.K; ++k) {
      const R* yr = y.data() + a.slot_row[static_cast<size_t>(t * r.K + k)] * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) o[j] += yr[j];
    }
  }
}

// dy [N,d] in; dx [N,d] += ; w_bar [N,K] out; expert gradients +=. dxg, dyg, dgu: scratch [P, ...].
template <class R, class X>
void experts_bwd(int64_t N, int64_t d, int64_t m, const RouterDims& r, const X* dy,
                 const X* experts, int64_t stride, int64_t down_at, const MoeActs<R, X>& a,
                 Buffer<R>& dxg, std::vector<Buffer<X>>& dyg_t, std::vector<Buffer<X>>& dgu_t,
                 std::vector<ExpertScratch<R>>& scratch, R* dx, R* w_bar, R* d_experts) {
  const int64_t P = a.rows();
  dxg.reserve_discard(P * d);
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t e = 0; e < r.E; ++e) {
    const auto th = static_cast<size_t>(omp_get_thread_num());
    Buffer<X>&dyg = dyg_t[th], &dgu = dgu_t[th];
    dyg.reserve_discard(kExpertTile * d), dgu.reserve_discard(kExpertTile * 2 * m);
    scratch[th].hhat.reserve_discard(kExpertTile * m);
    R* hhat = scratch[th].hhat.data();
    const X* w = experts + e * stride;
    R* dw = d_experts + e * stride;
    for (const ExpertTile& t : a.tiles) {
      if (t.expert != e) continue;
      for (int64_t j = 0; j < t.rows; ++j) {
        const int32_t slot = a.row_slot[static_cast<size_t>(t.begin + j)];
        if (slot < 0) {
          std::fill(dyg.data() + j * d, dyg.data() + (j + 1) * d, X{});
        } else {
          std::copy_n(dy + slot / r.K * d, d, dyg.data() + j * d);
        }
      }
      const R* gu = a.gu.data() + t.begin * 2 * m;
      mm_dx(t.rows, d, m, dyg.data(), w + down_at, hhat);
      mm_dw(t.rows, d, m, dyg.data(), a.hw.data() + t.begin * m, dw + down_at);
      for (int64_t j = 0; j < t.rows; ++j) {
        const int32_t slot = a.row_slot[static_cast<size_t>(t.begin + j)];
        const R scale = slot < 0 ? R(0) : a.w[slot];
        const R wb = swiglu_row_bwd(gu + j * 2 * m, gu + j * 2 * m + m, hhat + j * m, m, scale,
                                    dgu.data() + j * 2 * m);
        if (slot >= 0) w_bar[slot] = wb;
      }
      mm_dx(t.rows, 2 * m, d, dgu.data(), w, dxg.data() + t.begin * d);
      mm_dw(t.rows, 2 * m, d, dgu.data(), a.xg.data() + t.begin * d, dw);
    }
  }
#pragma omp parallel for schedule(static)
  for (int64_t t = 0; t < N; ++t) {
    R* o = dx + t * d;
    for (int64_t k = 0; k < r.K; ++k) {
      const R* g = dxg.data() + a.slot_row[static_cast<size_t>(t * r.K + k)] * d;
#pragma omp simd
      for (int64_t j = 0; j < d; ++j) o[j] += g[j];
    }
  }
}

}  // namespace v3b::kern::train
