// rows.h in Highway: blocked flash attention of a few rows against a range of keys.
#define HWY_DISABLED_TARGETS HWY_SSE4  // the build needs AVX2 anyway: less to compile
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/attention/rows.cpu_simd.cpp"
// clang-format off
#include "hwy/foreach_target.h"  // IWYU pragma: keep
// clang-format on
#include "kernels/attention/rows.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "hwy/highway.h"
#include "kernels/attention/rows_pack-inl.h"
#include "kernels/attention/rows_small-inl.h"
#include "kernels/attention/rows_tile-inl.h"
#include "kernels/core/amx.h"
#include "kernels/core/buffer.h"
#include "kernels/core/cpu.h"

HWY_BEFORE_NAMESPACE();
namespace v3b::kern::HWY_NAMESPACE {
namespace {

// Scores S [n keys][width rows] of one panel -> P in place of S (f32) or as bf16 pairs in `pairs`;
// updates the running max m and sum l of the rows and gives the factor alpha for what was
// accumulated before. visible[r] = how many of these keys row r sees. Everything in the log2
// domain: t = S * scale_log2.
template <bool kBf16>
void softmax_panel(int64_t n, int64_t width, float scale_log2, const int32_t* visible, float* S,
                   uint32_t* pairs, float* m, float* l, float* alpha) {
  const DF df;
  const DI di;
  const DU du;
  const VF c = hn::Set(df, scale_log2),
           minus_inf = hn::Set(df, -std::numeric_limits<float>::infinity());
  for (int64_t v = 0; v < width; v += kLanes) {
    float* s = S + v;
    if (visible != nullptr) {
      const auto vis = hn::LoadU(di, visible + v);
      for (int64_t j = 0; j < n; ++j) {
        const auto seen = hn::RebindMask(df, hn::Lt(hn::Set(di, static_cast<int32_t>(j)), vis));
        hn::StoreU(hn::IfThenElse(seen, hn::LoadU(df, s + j * width), minus_inf), df,
                   s + j * width);
      }
    }
    // Max may lose a NaN; the sum below keeps it.
    VF top = minus_inf;
    for (int64_t j = 0; j < n; ++j) top = hn::Max(top, hn::LoadU(df, s + j * width));
    const VF old = hn::LoadU(df, m + v), now = hn::Max(old, hn::Mul(top, c));
    const VF base =
        hn::IfThenZeroElse(hn::Eq(now, minus_inf), now);  // nothing visible yet: any finite base
    const VF a = exp2_neg(hn::Sub(old, base));
    VF sum = hn::Zero(df);
    if constexpr (kBf16) {
      const VU half = hn::Set(du, 0x7fff), one = hn::Set(du, 1), high = hn::Set(du, 0xffff0000u);
      const auto rounded = [&](VF p) HWY_ATTR {
        const VU u = hn::BitCast(du, p);
        return hn::Add(u, hn::Add(half, hn::And(hn::ShiftRight<16>(u), one)));
      };
      for (int64_t j = 0; j < n; j += 2) {
        const VF p0 = exp2_neg(hn::MulSub(hn::LoadU(df, s + j * width), c, base));
        const VF p1 = j + 1 < n ? exp2_neg(hn::MulSub(hn::LoadU(df, s + (j + 1) * width), c, base))
                                : hn::Zero(df);
        sum = hn::Add(sum, hn::Add(p0, p1));
        hn::StoreU(hn::Or(hn::ShiftRight<16>(rounded(p0)), hn::And(rounded(p1), high)), du,
                   pairs + (j / 2) * width + v);
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        const VF p = exp2_neg(hn::MulSub(hn::LoadU(df, s + j * width), c, base));
        sum = hn::Add(sum, p);
        hn::StoreU(p, df, s + j * width);
      }
    }
    hn::StoreU(now, df, m + v);
    hn::StoreU(hn::MulAdd(hn::LoadU(df, l + v), a, sum), df, l + v);
    hn::StoreU(a, df, alpha + v);
  }
}

void write_row(const float* o, float factor, int64_t d, spec::DType dtype, void* out, int64_t at) {
  const DF df;
  const DU du;
  const hn::Rebind<uint16_t, DU> d16;
  const VF f = hn::Set(df, factor);
  int64_t c = 0;
  if (dtype == spec::DType::f32) {
    float* dst = static_cast<float*>(out) + at;
    for (; c + kLanes <= d; c += kLanes) hn::StoreU(hn::Mul(f, hn::LoadU(df, o + c)), df, dst + c);
    for (; c < d; ++c) dst[c] = factor * o[c];
  } else {
    uint16_t* dst = static_cast<uint16_t*>(out) + at;
    for (; c + kLanes <= d; c += kLanes) {
      const VF x = round_bf16(hn::Mul(f, hn::LoadU(df, o + c)));
      hn::StoreU(hn::DemoteTo(d16, hn::BitCast(DI(), hn::ShiftRight<16>(hn::BitCast(du, x)))), d16,
                 dst + c);
    }
    for (; c < d; ++c) dst[c] = spec::to_bf16(factor * o[c]).bits;
  }
}

// o (un-normalised, ld floats between rows), m, l -> where the task wants them.
void finish_row(const RowsTask& t, int64_t r, const float* o, float m, float l) {
  if (t.part_o) {
    std::copy_n(o, t.d_v, t.part_o + r * t.d_v);
    t.part_m[r] = m;
    t.part_l[r] = l;
    return;
  }
  const int64_t i = r / t.inner, g = r % t.inner;
  const bool empty = l == 0.0f;  // NaN is not empty
  write_row(o, empty ? 0.0f : 1.0f / l, t.d_v, t.dtype, t.o, i * t.o_outer + g * t.o_inner);
  if (!t.lse) return;
  const float inf = std::numeric_limits<float>::infinity();
  const double natural =
      0.69314718055994530942 * (static_cast<double>(m) + std::log2(static_cast<double>(l)));
  t.lse[i * t.lse_outer + g * t.lse_inner] =
      empty ? (t.empty_lse == spec::EmptyLse::pos_inf ? inf : -inf) : static_cast<float>(natural);
}

struct Scratch {
  Buffer<float> o, s, m, l, alpha, ones;
  Buffer<uint32_t> q, pairs, v;
  Buffer<uint8_t> k;
  Buffer<int32_t> visible;
};

// A stretch of a block's keys whose rows lie one after another.
struct Run {
  int64_t at, n;  // first key within the block, keys
  const uint8_t* k;
  int64_t stride;
};
constexpr int64_t kDirectRows = 32;  // of a task
constexpr int64_t kShortest = 16;    // keys of a page from which it is read where it lies
constexpr int64_t kMostRuns = kMostKeys / kShortest + 1;

// Stretches of keys [j, j + n) in their memory; at most kMostRuns for pages of kShortest keys and more.
int64_t runs_of(const KeySource& s, int64_t j, int64_t n, Run* runs) {
  int64_t count = 0;
  for (int64_t i = 0; i < n && count < kMostRuns; ++count) {
    const int64_t left = s.table ? s.page - (j + i) % s.page : n - i, len = std::min(left, n - i);
    runs[count] = {i, len, s.k1 + key_row(s, j + i) * s.k1_stride, s.k1_stride};
    i += len;
  }
  return count;
}

// The rows of the next block in portions for the products' prefetches.
class NextRows {
 public:
  // Nothing where a row is a small part of its stride: most bytes would be others'.
  NextRows(const RowsTask& t, int64_t j, int64_t n, int64_t key_bytes) {
    if (n > 0 && t.keys.k1_stride <= 2 * key_bytes) count_ = runs_of(t.keys, j, n, runs_);
    if (n > 0 && t.keys.v && !t.keys.table && t.keys.v_stride <= 4 * t.d_v)
      runs_[count_++] = {0, n, t.keys.v + j * t.keys.v_stride, t.keys.v_stride};
    for (int64_t i = 0; i < count_; ++i) left_ += runs_[i].n * runs_[i].stride;
    flop_ = t.R * n * (t.d_qk + t.d_v);
  }
  // For a product of `flop` of the block's flop(): as large a share of the bytes, as far as it lies in one piece.
  Ahead take(int64_t flop) {
    const int64_t total = left_;
    if (total <= 0 || at_ >= count_) return {};
    const Run& r = runs_[at_];
    const int64_t rest = r.n * r.stride - done_;
    const int64_t bytes = std::min(rest, total * flop / std::max(flop, flop_) + 64);
    const Ahead a{r.k + done_, bytes};
    flop_ -= flop;
    left_ -= bytes;
    done_ += bytes;
    if (bytes == rest) ++at_, done_ = 0;
    return a;
  }

 private:
  Run runs_[kMostRuns + 1];
  int64_t count_ = 0, at_ = 0, done_ = 0, left_ = 0, flop_ = 0;
};

template <bool kBf16>
void run_rows(const RowsTask& t, const RowsKernels& kn, Scratch& w) {
  constexpr int64_t per = kBf16 ? 2 : 1;  // elements of a 32-bit unit
  const auto padded = [&](int64_t units) { return (units + kn.unit - 1) / kn.unit * kn.unit; };
  const int64_t kq = padded((t.d_qk + per - 1) / per), key_bytes = 4 * kq;
  const int64_t rows = (t.R + kLanes - 1) / kLanes * kLanes,
                dv = (t.d_v + kLanes - 1) / kLanes * kLanes;
  w.o.reserve_discard(rows * dv);
  const int64_t key_block = kn.key_block;
  w.s.reserve_discard(key_block * kPanel);
  w.pairs.reserve_discard(kPairRow * kPanel);
  w.q.reserve_discard(rows * kq);
  w.k.reserve_discard(key_block * key_bytes);
  w.v.reserve_discard(padded(key_block / per) * dv);
  for (auto* b : {&w.m, &w.l, &w.alpha}) b->reserve_discard(kMaxRows + kPanel);
  w.visible.reserve_discard(kMaxRows + kPanel);
  w.ones.reserve_discard(kPanel);
  std::fill_n(w.ones.data(), kPanel, 1.0f);
  float* o = w.o.data();
  std::fill_n(o, t.R * dv, 0.0f);
  std::fill_n(w.m.data(), rows, -std::numeric_limits<float>::infinity());
  std::fill_n(w.l.data(), rows, 0.0f);
  pack_queries<kBf16>(t, kq, kn, w.q.data());
  const float scale_log2 =
      static_cast<float>(static_cast<double>(t.scale) * 1.44269504088896340736);
  const int64_t most = t.lim0 + (t.R - 1) / t.inner,
                end = std::min(t.j1, most);  // keys that any row sees
  // Keys whose bytes are the product's operand are read where they lie, others put together first.
  const bool in_place = kBf16 && !t.keys.record && t.keys.d2 == 0 && t.d_qk == 2 * kq &&
                        t.j0 % 2 == 0 &&
                        (!t.keys.table || (t.keys.page >= kShortest && t.keys.page % 2 == 0));

  // Few rows multiply with V's rows where they lie.
  const bool direct = kn.direct && t.R <= kDirectRows && t.d_v % kPanel == 0;
  if (kn.begin) kn.begin();
  for (int64_t j = t.j0; j < end; j += key_block) {
    const int64_t n = std::min(key_block, end - j), n_next = std::min(key_block, end - j - n);
    Run runs[kMostRuns];
    int64_t count = 1;
    if (in_place) {
      count = runs_of(t.keys, j, n, runs);
    } else {
      fetch_keys<kBf16>(t.keys, j, n, w.k.data(), key_bytes, kn.read_record);
      runs[0] = {0, n, w.k.data(), key_bytes};
    }
    // The next block's rows come while this one's products run, each with its share.
    NextRows next(t, j + n, n_next, key_bytes);

    const int64_t kv = padded((n + per - 1) / per);  // panels of V are this long
    if (direct) {
    } else if (kn.pack_values) {
      const auto pack = [&](const uint8_t* v, int64_t stride, int64_t at, int64_t len) {
        kn.pack_values(len, t.d_v, v, stride, at / 2, kv, w.v.data());
      };
      if (!t.keys.v)
        for (int64_t i = 0; i < count; ++i) pack(runs[i].k, runs[i].stride, runs[i].at, runs[i].n);
      else if (!t.keys.table)
        pack(t.keys.v + j * t.keys.v_stride, t.keys.v_stride, 0, n);
      for (int64_t p = 0; p < dv && kv > (n + 1) / 2; p += kPanel) {
        const int64_t width = panel_vectors(t.d_v, p) * kLanes, used = (n + 1) / 2;
        std::fill_n(w.v.data() + p * kv + used * width, (kv - used) * width, 0u);
      }
    } else {
      const uint8_t* keys = w.k.data();
      if (t.keys.v)
        pack_values<kBf16>(
            n, t.d_v,
            [&](int64_t i) { return t.keys.v + key_row(t.keys, j + i) * t.keys.v_stride; },
            w.v.data());
      else if (in_place)
        pack_values<kBf16>(
            n, t.d_v,
            [&](int64_t i) { return t.keys.k1 + key_row(t.keys, j + i) * t.keys.k1_stride; },
            w.v.data());
      else
        pack_values<kBf16>(
            n, t.d_v, [&](int64_t i) { return keys + i * key_bytes; }, w.v.data());
    }
    const bool masked = t.lim0 < j + n;
    for (int64_t r = 0; masked && r < rows; ++r)
      w.visible[r] = static_cast<int32_t>(std::clamp<int64_t>(t.lim0 + r / t.inner - j, 0, n));

    for (int64_t p = 0; p < t.R; p += kPanel) {
      const int64_t nv = panel_vectors(t.R, p), width = nv * kLanes,
                    here = std::min(t.R - p, width);
      const int64_t np =
          std::min(n, t.lim0 + (p + here - 1) / t.inner - j);  // seen by some row of the panel
      if (np <= 0) continue;
      for (int64_t i = 0; i < count && runs[i].at < np; ++i) {
        const int64_t keys = std::min(runs[i].n, np - runs[i].at);
        kn.tile(keys, runs[i].k, runs[i].stride, 4, w.q.data() + p * kq, nv, kq,
                w.s.data() + runs[i].at * width, width, nullptr, next.take(here * keys * t.d_qk));
      }
      kn.softmax(np, width, scale_log2, masked ? w.visible.data() + p : nullptr, w.s.data(),
                 w.pairs.data(), w.m.data() + p, w.l.data() + p, w.alpha.data() + p);
      const void* P = kBf16 ? static_cast<const void*>(w.pairs.data()) : w.s.data();
      const int64_t a_m = kn.p_rows ? 4 * kPairRow : 4, a_k = kn.p_rows ? 4 : 4 * width;
      for (int64_t i = 0; direct && i < count && runs[i].at < np; ++i) {
        const int64_t keys = std::min(runs[i].n, np - runs[i].at);
        const uint8_t* v = runs[i].k;
        int64_t stride = runs[i].stride;
        if (t.keys.v) stride = t.keys.v_stride, v = t.keys.v + (j + runs[i].at) * stride;
        for (int64_t c = 0; c < dv; c += kPanel)
          kn.direct(here, w.pairs.data() + runs[i].at / 2 * width, a_m, a_k, v + 2 * c, stride, kNr,
                    keys, o + p * dv + c, dv, i == 0 ? w.alpha.data() + p : w.ones.data(),
                    next.take(here * keys * kPanel));
      }
      for (int64_t c = 0; !direct && c < dv; c += kPanel)
        kn.tile(here, P, a_m, a_k, w.v.data() + c * kv, panel_vectors(t.d_v, c),
                padded((np + per - 1) / per), o + p * dv + c, dv, w.alpha.data() + p,
                next.take(here * np * std::min(kPanel, t.d_v - c)));
    }
  }
  if (kn.end) kn.end();
  for (int64_t r = 0; r < t.R; ++r) finish_row(t, r, o + r * dv, w.m[r], w.l[r]);
}

template <bool kBf16>
RowsKernels generic() {
  RowsKernels k{};
  k.tile = tile_any<kBf16>;
  k.softmax = softmax_panel<kBf16>;
  return k;
}

// `native`: kernels for 16 lanes of bf16 pairs, or null.
void run(const RowsTask& t, const RowsKernels* native) {
  static thread_local Scratch w;
  const bool bf16 = t.dtype == spec::DType::bf16;
  if (bf16 && native && t.R <= kFewRows && t.d_qk <= kFewDims && t.keys.v && !t.keys.table &&
      t.keys.d2 == 0) {
    const int64_t ldo = (t.d_v + 31) / 32 * 32;
    w.o.reserve_discard(kFewRows * ldo);
    float m[kFewRows], l[kFewRows];
    rows_few_avx512bf16(t, w.o.data(), ldo, m, l);
    for (int64_t r = 0; r < t.R; ++r) finish_row(t, r, w.o.data() + r * ldo, m[r], l[r]);
  } else if (t.R <= kSmallRows) {
    static thread_local SmallScratch small;
    run_small(t, small,
              [&](int64_t r, const float* o, float m, float l) { finish_row(t, r, o, m, l); });
  } else if (bf16) {
    run_rows<true>(t, native && kLanes == 16 ? *native : generic<true>(), w);
  } else {
    run_rows<false>(t, generic<false>(), w);
  }
}

void merge(const RowsTask& t, int64_t parts, int64_t r0, int64_t r1) {
  const DF df;
  static thread_local Buffer<float> sum_buffer;
  sum_buffer.reserve_discard(t.d_v + kLanes);
  float* sum = sum_buffer.data();
  RowsTask whole = t;
  whole.part_o = nullptr;
  for (int64_t r = r0; r < r1; ++r) {
    float m = -std::numeric_limits<float>::infinity(), l = 0;
    for (int64_t p = 0; p < parts; ++p) m = std::max(m, t.part_m[p * t.R + r]);
    std::fill_n(sum, t.d_v, 0.0f);
    for (int64_t p = 0; p < parts; ++p) {
      const float mp = t.part_m[p * t.R + r], lp = t.part_l[p * t.R + r];
      if (lp == 0.0f) continue;
      const float f = std::exp2(mp - m);
      l += f * lp;
      const float* o = t.part_o + (p * t.R + r) * t.d_v;
      int64_t c = 0;
      for (; c + kLanes <= t.d_v; c += kLanes)
        hn::StoreU(hn::MulAdd(hn::Set(df, f), hn::LoadU(df, o + c), hn::LoadU(df, sum + c)), df,
                   sum + c);
      for (; c < t.d_v; ++c) sum[c] += f * o[c];
    }
    finish_row(whole, r, sum, m, l);
  }
}

void fetch(const KeySource& s, int64_t j, int64_t n, spec::DType dtype, uint8_t* dst,
           int64_t row_bytes) {
  if (dtype == spec::DType::bf16)
    fetch_keys<true>(s, j, n, dst, row_bytes, nullptr);
  else
    fetch_keys<false>(s, j, n, dst, row_bytes, nullptr);
}

const char* target() { return hwy::TargetName(HWY_TARGET); }

}  // namespace
}  // namespace v3b::kern::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace v3b::kern {
HWY_EXPORT(run);
HWY_EXPORT(merge);
HWY_EXPORT(fetch);
HWY_EXPORT(target);

bool rows_native(RowsKernels& kernels) noexcept {
  const CpuFeatures& f = cpu_features();
  if (f.avx512_bf16)
    kernels = f.amx_bf16 ? V3B_AMX_CALL(rows_kernels_amx)() : rows_kernels_avx512bf16();
  return f.avx512_bf16;
}
void rows_run(const RowsTask& t) noexcept {
  RowsKernels native{};
  const bool any = rows_native(native);
  HWY_DYNAMIC_DISPATCH(run)(t, any ? &native : nullptr);
}
void rows_fetch(const KeySource& s, int64_t j, int64_t n, spec::DType dtype, void* dst,
                int64_t row_bytes) noexcept {
  HWY_DYNAMIC_DISPATCH(fetch)(s, j, n, dtype, static_cast<uint8_t*>(dst), row_bytes);
}
void rows_merge(const RowsTask& t, int64_t parts, int64_t r0, int64_t r1) noexcept {
  HWY_DYNAMIC_DISPATCH(merge)(t, parts, r0, r1);
}
const char* rows_isa(bool bf16) noexcept {
  const CpuFeatures& f = cpu_features();
  if (!bf16 || !f.avx512_bf16) return HWY_DYNAMIC_DISPATCH(target)();
  return f.amx_emulated ? "amx_bf16 (emulated)" : f.amx_bf16 ? "amx_bf16" : "avx512_bf16";
}
}  // namespace v3b::kern
#endif
