// Rows into the paged latent cache, plain or as 8-bit records: everything the suite knows about
// this op.
#include "reference/spec/mla_cache_write.h"

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/attention_common.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "reference/kv_cache.h"
#include "reference/rmsnorm.h"
#include "reference/rope.h"

namespace v3b::bench {
namespace {

struct MlaCacheWrite {
  static constexpr const char* name = "mla_cache_write";
  using Shape = spec::MlaCacheWriteShape;

  // The cache is in and out: it starts with a mark in every element, and what no slot names must
  // keep it.
  struct Data {
    Shape shape;
    HostTensor c, k_pe, slots, cache;
    HostTensor cos, sin, positions;  // rope
    std::vector<HostTensor*> tensors() {
      if (shape.rope) return {&c, &k_pe, &cos, &sin, &positions, &slots, &cache};
      return {&c, &k_pe, &slots, &cache};
    }
    kern::MlaCacheRope rope() {
      return {kForm, cos.as<float>(), sin.as<float>(), positions.as<int32_t>()};
    }
    spec::MlaCacheWriteArgs args() {
      const Shape& s = shape;
      return {s.T,         s.d_c,       s.d_r, s.dtype, s.kv_format,
              c.data(),    k_pe.data(), s.d_c, s.d_r,   slots.as<int32_t>(),
              cache.data()};
    }
    bool record() const { return shape.kv_format != spec::KvFormat::bf16; }
  };
  static constexpr spec::RopeForm kForm = spec::RopeForm::interleaved;
  static constexpr double kMark = 165;  // exact in every dtype

  static int64_t rows(const Shape& s) { return ((s.T + s.page - 1) / s.page + 2) * s.page; }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->c = HostTensor("c", Role::input, s.dtype, {s.T, s.d_c});
    d->k_pe = HostTensor("k_pe", Role::input, s.dtype, {s.T, s.d_r});
    d->slots = HostTensor("slots", Role::input, spec::DType::i32, {s.T});
    const int64_t row_bytes = spec::mla_cache_row_bytes(s.kv_format, s.dtype, s.d_c, s.d_r);
    d->cache = d->record() ? HostTensor("cache", Role::inout, spec::DType::u8, {rows(s), row_bytes})
                           : HostTensor("cache", Role::inout, s.dtype, {rows(s), s.d_c + s.d_r});
    d->c.fill_real(seed);
    d->k_pe.fill_real(seed + 1);
    if (s.rope) fill_rope(*d);
    if (s.T > 1)  // a row of zeros: the scale's lower bound
      for (int64_t i = 0; i < s.d_c; ++i) d->c.set(s.d_c + i, 0.0);
    for (int64_t i = 0; i < d->cache.numel(); ++i) d->cache.set(i, kMark);
    std::vector<int32_t> order(static_cast<size_t>(rows(s)));
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int32_t>(i);
    std::mt19937_64 rng(seed);
    for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng() % i]);
    for (int64_t t = 0; t < s.T; ++t) d->slots.set(t, t % 37 == 36 ? -1 : order[size_t(t)]);
    return d;
  }

  // Tables of 8 bits a value, so that products with bf16 are exact in fp32 and a row has one right form: what is rotated
  // is compared bit by bit as the rest is (f32: as far as fused multiply-adds allow, so it has no such case). Positions
  // run backwards, so that a kernel that ignores them fails.
  static void fill_rope(Data& d) {
    const Shape& s = d.shape;
    const int64_t half = s.d_r / 2;
    d.cos = HostTensor("cos", Role::input, spec::DType::f32, {s.T, half});
    d.sin = HostTensor("sin", Role::input, spec::DType::f32, {s.T, half});
    d.positions = HostTensor("positions", Role::input, spec::DType::i32, {s.T});
    for (int64_t p = 0; p < s.T; ++p) {
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(p + 1) * std::pow(10000.0, -2.0 * double(i) / double(s.d_r));
        d.cos.set(p * half + i, ref::round_to(std::cos(angle), spec::DType::bf16));
        d.sin.set(p * half + i, ref::round_to(std::sin(angle), spec::DType::bf16));
      }
      d.positions.set(p, double(s.T - 1 - p));
    }
  }
  // k_pe as it is to be stored.
  template <class S>
  static void rotate(const Data& d, std::vector<S>& pe) {
    const Shape& s = d.shape;
    if (!s.rope) return;
    const int64_t half = s.d_r / 2;
    std::vector<S> c(size_t(s.T * half)), sn(c.size()), y(pe.size());
    for (int64_t t = 0; t < s.T; ++t)
      for (int64_t i = 0; i < half; ++i) {
        const int64_t at = int64_t(d.positions.get(t)) * half + i;
        c[size_t(t * half + i)] = S(d.cos.get(at));
        sn[size_t(t * half + i)] = S(d.sin.get(at));
      }
    ref::rope<S>(s.T, 1, s.d_r, kForm, false, pe.data(), c.data(), sn.data(), y.data());
    pe = std::move(y);
  }
  template <class S>
  static void run_reference(const Shape& s, const S* c, const S* k_pe, const int32_t* slots,
                            void* cache) {
    ref::mla_cache_write(s.T, s.d_c, s.d_r, s.kv_format, s.dtype, c, k_pe, slots, cache);
  }
  static Expected reference(const Data& d) {
    const auto c = d.c.to_doubles();
    auto pe = d.k_pe.to_doubles();
    rotate(d, pe);
    HostTensor cache("cache", Role::inout, d.cache.dtype(), d.cache.shape());
    for (int64_t i = 0; i < cache.numel(); ++i) cache.set(i, kMark);
    run_reference(d.shape, c.data(), pe.data(), d.slots.as<int32_t>(), cache.data());
    Expected e;
    e.tensors.push_back({.name = "cache", .values = cache.to_doubles()});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double e = double(spec::dtype_bytes(s.dtype)), T = double(s.T);
    const bool record = s.kv_format != spec::KvFormat::bf16;
    const double row = double(spec::mla_cache_row_bytes(s.kv_format, s.dtype, s.d_c, s.d_r));
    const double tables = s.rope ? T * (4.0 * double(s.d_r) + 4) : 0;
    const double flop = (record ? 3 * double(s.d_c) : 0) + (s.rope ? 3 * double(s.d_r) : 0);
    return {T * flop, T * (e * double(s.d_c + s.d_r) + row + 4) + tables, "f32", T * row};
  }
  static Tolerance tolerance(const Shape&, Fill, const std::string&) {
    return {};
  }  // class X: bitwise

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    using spec::KvFormat;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512}, Size::quick});
    c.push_back({{.T = 512, .kv_format = KvFormat::fp8_656_pow2}, Size::quick});
    c.push_back({{.T = 8192, .kv_format = KvFormat::fp8_656_pow2}, Size::standard});
    c.push_back({{.T = 8192}, Size::standard});
    c.push_back({{.T = 512, .kv_format = KvFormat::fp8_656_free}, Size::standard});
    c.push_back({{.T = 512, .kv_format = KvFormat::fp8_656_pow2, .rope = true}, Size::quick});
    c.push_back({{.T = 8192, .rope = true}, Size::standard});
    for (const auto format : {KvFormat::bf16, KvFormat::fp8_656_pow2})
      c.push_back({{.T = 75, .d_c = 160, .d_r = 10, .page = 16, .kv_format = format, .rope = true},
                   Size::quick,
                   true});
    for (const auto dtype : {f32, bf16})
      for (const auto format : {KvFormat::bf16, KvFormat::fp8_656_pow2, KvFormat::fp8_656_free}) {
        c.push_back(
            {{.T = 75, .d_c = 160, .d_r = 10, .page = 16, .kv_format = format, .dtype = dtype},
             Size::quick,
             true});
        c.push_back({{.T = 1, .d_c = 33, .d_r = 6, .page = 1, .kv_format = format, .dtype = dtype},
                     Size::quick,
                     true});
      }
    return c;
  }
  static void validate(const Shape& s) {
    if (s.rope && (s.dtype != spec::DType::bf16 || s.d_r % 2 != 0))
      throw Error(ExitCode::usage, "no such rotation", "--case of mla_cache_write",
                  "dtype=bf16 and an even d_r beside rope=1", "");
  }
  static Support supported(const Shape& s) {
    return attention_support(s.dtype, {s.T, s.d_c, s.d_r, s.page});
  }
  static std::vector<Impl<MlaCacheWrite>> impls() {
    std::vector<Impl<MlaCacheWrite>> v;
    v.push_back({"cpu_simd",
                 supported,
                 [](Data& d) {
                   if (d.shape.rope)
                     return Runner{
                         .run = [&d] { kern::mla_cache_write_rope_cpu_simd(d.args(), d.rope()); },
                         .resolved_isa = kern::mla_cache_write_cpu_simd_isa(d.shape)};
                   return Runner{.run = [&d] { kern::mla_cache_write_cpu_simd(d.args()); },
                                 .resolved_isa = kern::mla_cache_write_cpu_simd_isa(d.shape)};
                 },
                 false,
                 {kern::Isa::avx2, kern::Isa::avx512, kern::Isa::avx512_bf16}});
    v.push_back(cuda_impl<MlaCacheWrite>("cuda_simt", supported, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.c, a.k_pe, a.slots, a.cache);
      if (d.shape.rope) {  // two launches: no fused form there
        auto r = d.rope();
        m.map(r.cos, r.sin, r.positions);
        const spec::RopeArgs turn{a.T,
                                  1,
                                  a.d_r,
                                  r.form,
                                  false,
                                  a.dtype,
                                  a.dtype,
                                  a.k_pe,
                                  a.k_pe_stride,
                                  a.d_r,
                                  m.scratch(a.T * a.d_r * spec::dtype_bytes(a.dtype)),
                                  a.d_r,
                                  a.d_r,
                                  r.cos,
                                  r.sin,
                                  r.positions};
        a.k_pe = turn.y, a.k_pe_stride = a.d_r;
        return std::function<void(kern::CudaStream)>([a, turn](kern::CudaStream s) {
          kern::rope_cuda_simt(turn, s);
          kern::mla_cache_write_cuda_simt(a, s);
        });
      }
      return std::function<void(kern::CudaStream)>(
          [a](kern::CudaStream s) { kern::mla_cache_write_cuda_simt(a, s); });
    }));
    v.push_back({"cpu_eigen", supported,
                 [](Data& d) {
                   auto c = std::make_shared<std::vector<float>>(floats_of(d.c));
                   auto pe = std::make_shared<std::vector<float>>(floats_of(d.k_pe));
                   return Runner{.run =
                                     [&d, c, pe] {
                                       auto turned = *pe;
                                       rotate(d, turned);
                                       run_reference(d.shape, c->data(), turned.data(),
                                                     d.slots.as<int32_t>(), d.cache.data());
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mla_cache_write_op() { return make_op<MlaCacheWrite>(); }

}  // namespace v3b::bench
