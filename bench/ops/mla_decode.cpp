// Absorbed MLA decode on the paged latent cache: everything the suite knows about this op.
#include "reference/spec/mla_decode.h"

#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/attention_common.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cuda.h"
#include "reference/kv_cache.h"
#include "reference/mla.h"

namespace v3b::bench {
namespace {

struct MlaDecode {
  static constexpr const char* name = "mla_decode";
  using Shape = spec::MlaDecodeShape;

  // Blocks lie in a random order, a few belong to nobody. Rows past a length and spare blocks are
  // NaN (0xFF bytes in records: NaN codes, NaN scales), unused entries of the block table are
  // absurd.
  struct Data {
    Shape shape;
    HostTensor q, cache, block_table, seqlens, out, lse;
    std::vector<HostTensor*> tensors() { return {&q, &cache, &block_table, &seqlens, &out, &lse}; }
    int64_t max_blocks() const { return block_table.shape()[1]; }
    bool record() const { return shape.kv_format != spec::KvFormat::bf16; }
    spec::MlaDecodeArgs args() {
      const Shape& s = shape;
      return {s.B,
              s.s_q,
              s.n_h,
              s.d_c,
              s.d_r,
              s.page,
              max_blocks(),
              scale(s),
              s.dtype,
              s.kv_format,
              s.empty_lse,
              q.data(),
              cache.data(),
              block_table.as<int32_t>(),
              seqlens.as<int32_t>(),
              out.data(),
              lse.as<float>()};
    }
  };
  // Of the head before absorption: d_n is 128 for every published model with d_c = 512 (SPEC 0.2).
  static double scale(const Shape& s) {
    return attention_scale(s.d_c >= 512 ? 128 + s.d_r : s.d_c / 4 + s.d_r);
  }

  static void validate(const Shape& s) {
    constexpr int64_t kMostQueries = 4096;  // a decode step
    validate_lengths(s.B, s.s, s.min_s, "--case of mla_decode");
    if (s.s_q > kMostQueries)
      throw Error(ExitCode::usage, "'s_q' is too large", "--case of mla_decode",
                  "at most " + std::to_string(kMostQueries), std::to_string(s.s_q));
  }

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    const auto lengths = attention_lengths(s.B, s.s, s.min_s);
    const int64_t max_blocks = (s.s + s.page - 1) / s.page + 1, dim = s.d_c + s.d_r;
    int64_t blocks = 3;
    for (const int32_t n : lengths) blocks += (n + s.page - 1) / s.page;
    std::vector<int32_t> ids(static_cast<size_t>(blocks));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int32_t>(i);
    std::mt19937_64 rng(seed);
    for (size_t i = ids.size(); i > 1; --i) std::swap(ids[i - 1], ids[rng() % i]);

    d->q = HostTensor("q", Role::input, s.dtype, {s.B, s.s_q, s.n_h, dim});
    d->q.fill_real(seed, 0.5, false);
    d->block_table = HostTensor("block_table", Role::input, spec::DType::i32, {s.B, max_blocks});
    d->seqlens = HostTensor("seqlens", Role::input, spec::DType::i32, {s.B});
    d->out = HostTensor("out", Role::output, s.dtype, {s.B, s.s_q, s.n_h, s.d_c});
    d->lse = HostTensor("lse", Role::output, spec::DType::f32, {s.B, s.n_h, s.s_q});

    std::vector<uint8_t> used(static_cast<size_t>(blocks * s.page), 0);
    size_t next = 0;
    for (int64_t b = 0; b < s.B; ++b) {
      d->seqlens.set(b, lengths[size_t(b)]);
      for (int64_t i = 0; i < max_blocks; ++i) {
        const bool real = i * s.page < lengths[size_t(b)];
        const int32_t id =
            real ? ids[next++] : (i % 2 ? std::numeric_limits<int32_t>::min() : 0x7ffffff0);
        d->block_table.as<int32_t>()[b * max_blocks + i] = id;
        for (int64_t j = 0; real && j < s.page; ++j)
          used[size_t(id * s.page + j)] = i * s.page + j < lengths[size_t(b)];
      }
    }
    const int64_t rows = blocks * s.page,
                  row_bytes = spec::mla_cache_row_bytes(s.kv_format, s.dtype, s.d_c, s.d_r);
    if (!d->record()) {
      d->cache = HostTensor("cache", Role::input, s.dtype, {rows, dim});
      d->cache.fill_real(seed + 1);
      for (int64_t r = 0; r < rows; ++r)
        if (!used[size_t(r)]) d->cache.fill_nan_rows(r, 1);
      return d;
    }
    d->cache = HostTensor("cache", Role::input, spec::DType::u8, {rows, row_bytes});
    std::fill_n(d->cache.as<uint8_t>(), d->cache.bytes(), uint8_t{0xFF});
    HostTensor values("cache", Role::input, spec::DType::f32, {rows, dim});
    values.fill_real(seed + 1);
    for (int64_t r = 0; r < rows; ++r) {
      const float* v = values.as<float>() + r * dim;
      if (used[size_t(r)])
        ref::kv_record_write(s.d_c, s.d_r, s.kv_format, v, v + s.d_c,
                             d->cache.as<uint8_t>() + r * row_bytes);
    }
    return d;
  }

  // The cache as [rows, d_c + d_r] of S, records dequantised.
  template <class S>
  static std::vector<S> cache_values(const Data& d) {
    const Shape& s = d.shape;
    const int64_t rows = d.cache.shape()[0], dim = s.d_c + s.d_r;
    std::vector<S> v(static_cast<size_t>(rows * dim));
    for (int64_t r = 0; r < rows; ++r)
      ref::mla_cache_read(r, s.d_c, s.d_r, s.kv_format, s.dtype, d.cache.data(),
                          v.data() + r * dim);
    return v;
  }
  static ref::MlaPagedShape paged(const Data& d) {
    const Shape& s = d.shape;
    return {.B = s.B,
            .s_q = s.s_q,
            .n_h = s.n_h,
            .d_c = s.d_c,
            .d_r = s.d_r,
            .page = s.page,
            .max_blocks = d.max_blocks(),
            .scale = scale(s),
            .empty_lse = s.empty_lse};
  }

  static Expected reference(const Data& d) {
    const auto q = d.q.to_doubles(), cache = cache_values<double>(d);
    std::vector<double> out(size_t(d.out.numel())), lse(size_t(d.lse.numel()));
    ref::mla_decode_paged(paged(d), q.data(), cache.data(), d.block_table.as<int32_t>(),
                          d.seqlens.as<int32_t>(), out.data(), lse.data());
    Expected e;
    e.tensors.push_back({.name = "out", .values = std::move(out)});
    e.tensors.push_back({.name = "lse", .values = std::move(lse)});
    return e;
  }

  static Cost cost(const Shape& s) {
    double keys = 0, pairs = 0;
    for (const int32_t n : attention_lengths(s.B, s.s, s.min_s)) {
      keys += n;
      for (int64_t i = 0; i < s.s_q; ++i) pairs += double(std::max<int64_t>(0, n - s.s_q + i + 1));
    }
    const double e = double(spec::dtype_bytes(s.dtype)), rows = double(s.B * s.s_q * s.n_h);
    return {2.0 * double(s.n_h) * double(2 * s.d_c + s.d_r) * pairs,
            keys * double(spec::mla_cache_row_bytes(s.kv_format, s.dtype, s.d_c, s.d_r)) +
                rows * (e * double(2 * s.d_c + s.d_r) + 4),
            s.dtype == spec::DType::bf16 ? "bf16" : "f32", rows * (e * double(s.d_c) + 4)};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    return attention_tolerance(s.dtype, output);
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    using spec::KvFormat;
    std::vector<Case<Shape>> c;
    const auto pow2 = KvFormat::fp8_656_pow2, free = KvFormat::fp8_656_free;
    c.push_back({{.s = 4096, .n_h = 128}, Size::quick});
    c.push_back({{.s = 4096, .n_h = 16}, Size::quick});
    c.push_back({{.s = 4096, .n_h = 128, .kv_format = pow2}, Size::quick});
    c.push_back({{.B = 8, .s = 2048, .min_s = 256, .s_q = 2, .n_h = 16}, Size::quick});
    for (const int64_t h : {16, 128}) {
      for (const int64_t s : {1024, 2048, 8192, 16384, 32768})
        c.push_back(
            {{.s = s, .n_h = h},
             s == 1024 || s == 16384 || (s == 32768 && h == 16) ? Size::standard : Size::full});
      c.push_back({{.s = 4096, .s_q = 2, .n_h = h}, Size::standard});
      c.push_back({{.B = 8, .s = 4096, .min_s = 512, .n_h = h}, Size::standard});
      c.push_back({{.B = 8, .s = 4096, .min_s = 512, .s_q = 2, .n_h = h}, Size::full});
      c.push_back({{.s = 16384, .n_h = h, .kv_format = pow2}, Size::standard});
      c.push_back({{.s = 32768, .n_h = h, .kv_format = pow2}, Size::full});
      c.push_back({{.s = 4096, .n_h = h, .kv_format = free}, Size::full});
      c.push_back({{.s = 4096, .n_h = h, .dtype = f32}, Size::full});
    }
    c.push_back({{.s = 4096, .n_h = 16, .kv_format = pow2}, Size::standard});
    c.push_back({{.s = 4096, .n_h = 16, .page = 1}, Size::full});
    for (const auto dtype : {f32, bf16}) {
      c.push_back({{.B = 3,
                    .s = 131,
                    .min_s = 0,
                    .s_q = 1,
                    .n_h = 5,
                    .d_c = 48,
                    .d_r = 6,
                    .page = 16,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 4,
                    .s = 67,
                    .min_s = 1,
                    .s_q = 2,
                    .n_h = 3,
                    .d_c = 33,
                    .d_r = 8,
                    .page = 1,
                    .empty_lse = spec::EmptyLse::neg_inf,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 5,
                    .s = 300,
                    .min_s = 0,
                    .s_q = 2,
                    .n_h = 17,
                    .d_c = 160,
                    .d_r = 10,
                    .page = 64,
                    .kv_format = pow2,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 2,
                    .s = 129,
                    .min_s = 64,
                    .s_q = 1,
                    .n_h = 2,
                    .d_c = 40,
                    .d_r = 4,
                    .page = 64,
                    .kv_format = free,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 2,
                    .s = 333,
                    .min_s = 200,
                    .s_q = 2,
                    .n_h = 11,
                    .d_c = 64,
                    .d_r = 32,
                    .page = 32,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 2,
                    .s = 301,
                    .min_s = 77,
                    .n_h = 9,
                    .d_c = 128,
                    .d_r = 16,
                    .page = 64,
                    .kv_format = free,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 1,
                    .s = 700,
                    .s_q = 3,
                    .n_h = 130,
                    .d_c = 64,
                    .d_r = 16,
                    .page = 16,
                    .dtype = dtype},
                   Size::quick,
                   true});
    }
    return c;
  }

  static Support supported(const Shape& s) {
    return attention_support(s.dtype, {s.B, s.s, s.s_q, s.n_h, s.d_c, s.d_r, s.page});
  }
  static Support mma_supported(const Shape& s) {
    if (s.dtype != spec::DType::bf16) return {Support::State::unsupported, "bf16 only"};
    if (!kern::mla_decode_cuda_mma_takes(s.d_c, s.d_r))
      return {Support::State::unsupported, "d_c at most 512 and d_r at most 64"};
    return cuda_work(cost(s).flop, supported(s));
  }
  static Support simt_supported(const Shape& s) {
    if (s.d_c > 1024) return {Support::State::unsupported, "d_c at most 1024"};
    return cuda_work(8 * cost(s).flop, supported(s));
  }
  using Launch = void (*)(const spec::MlaDecodeArgs&, void*, kern::CudaStream);
  using Scratch = int64_t (*)(const spec::MlaDecodeArgs&);
  static CudaPrepare<MlaDecode> on_device(Launch launch, Scratch scratch_bytes) {
    return [=](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.q, a.cache, a.block_table, a.cache_seqlens, a.out, a.lse);
      void* scratch = m.scratch(scratch_bytes(a));
      return [=](kern::CudaStream s) { launch(a, scratch, s); };
    };
  }
  static std::vector<Impl<MlaDecode>> impls() {
    std::vector<Impl<MlaDecode>> v;
    v.push_back({"cpu_simd", supported,
                 [](Data& d) {
                   return Runner{.run = [&d] { kern::mla_decode_cpu_simd(d.args()); },
                                 .resolved_isa = kern::attention_cpu_simd_isa(d.shape.dtype)};
                 },
                 false, kAttentionLevels});
    v.push_back(cuda_impl<MlaDecode>(
        "cuda_mma", mma_supported,
        on_device([](const spec::MlaDecodeArgs& a, void* scratch,
                     kern::CudaStream stream) { kern::mla_decode_cuda_mma(a, scratch, stream); },
                  [](const spec::MlaDecodeArgs& a) {
                    return kern::mla_decode_cuda_mma_scratch_bytes(a);
                  })));
    v.push_back(cuda_impl<MlaDecode>(
        "cuda_simt", simt_supported,
        on_device(kern::mla_decode_cuda_simt, kern::mla_decode_cuda_simt_scratch_bytes)));
    v.push_back({"cpu_onednn", supported,
                 [](Data& d) {
                   return Runner{.run = [&d] { kern::mla_decode_cpu_onednn(d.args()); },
                                 .resolved_isa = "oneDNN"};
                 },
                 true});
    v.push_back({"cpu_eigen", supported,
                 [](Data& d) {
                   struct Floats {
                     std::vector<float> q, cache, out;
                   };
                   auto f =
                       std::make_shared<Floats>(Floats{floats_of(d.q), cache_values<float>(d),
                                                       std::vector<float>(size_t(d.out.numel()))});
                   return Runner{.run =
                                     [&d, f] {
                                       ref::mla_decode_paged(paged(d), f->q.data(), f->cache.data(),
                                                             d.block_table.as<int32_t>(),
                                                             d.seqlens.as<int32_t>(), f->out.data(),
                                                             d.lse.as<float>());
                                       store_floats(f->out, d.out);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mla_decode_op() { return make_op<MlaDecode>(); }

}  // namespace v3b::bench
