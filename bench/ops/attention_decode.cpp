// Decode with MHA, GQA, MQA on a contiguous cache: everything the suite knows about this op.
#include "reference/spec/attention_decode.h"

#include <memory>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/attention_common.h"
#include "bench/ops/registry.h"
#include "kernels/attention/attention.h"
#include "kernels/attention/attention_cuda.h"
#include "kernels/attention/attention_cudnn.h"
#include "reference/attention.h"

namespace v3b::bench {
namespace {

struct AttentionDecode {
  static constexpr const char* name = "attention_decode";
  using Shape = spec::AttentionDecodeShape;

  // Caches hold kSpare rows more than the longest sequence; rows at and past a length are NaN.
  static constexpr int64_t kSpare = 3;
  struct Data {
    Shape shape;
    HostTensor q, k, v, seqlens, o, lse;
    std::vector<HostTensor*> tensors() { return {&q, &k, &v, &seqlens, &o, &lse}; }
    int64_t rows() const { return shape.s + kSpare; }
    spec::AttentionDecodeArgs args() {
      const Shape& s = shape;
      spec::AttentionDecodeArgs a{};
      a.B = s.B, a.n_h = s.n_h, a.n_kv = s.n_kv, a.d_qk = s.d_qk, a.d_v = s.d_v;
      a.scale = attention_scale(s.d_qk);
      a.dtype = s.dtype;
      a.q = q.data(), a.k = k.data(), a.v = v.data();
      a.k_row = s.d_qk, a.k_head = rows() * s.d_qk, a.k_batch = s.n_kv * a.k_head;
      a.v_row = s.d_v, a.v_head = rows() * s.d_v, a.v_batch = s.n_kv * a.v_head;
      a.cache_seqlens = seqlens.as<int32_t>();
      a.o = o.data(), a.lse = lse.as<float>();
      return a;
    }
  };

  static void validate(const Shape& s) {
    validate_lengths(s.B, s.s, s.min_s, "--case of attention_decode");
    if (s.n_h % s.n_kv != 0)
      throw Error(ExitCode::usage, "heads do not share keys evenly", "--case of attention_decode",
                  "n_h a multiple of n_kv",
                  std::to_string(s.n_h) + " and " + std::to_string(s.n_kv));
  }

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->q = HostTensor("q", Role::input, s.dtype, {s.B, s.n_h, s.d_qk});
    d->k = HostTensor("k", Role::input, s.dtype, {s.B * s.n_kv * d->rows(), s.d_qk});
    d->v = HostTensor("v", Role::input, s.dtype, {s.B * s.n_kv * d->rows(), s.d_v});
    d->seqlens = HostTensor("seqlens", Role::input, spec::DType::i32, {s.B});
    d->o = HostTensor("o", Role::output, s.dtype, {s.B, s.n_h, s.d_v});
    d->lse = HostTensor("lse", Role::output, spec::DType::f32, {s.B, s.n_h});
    d->q.fill_real(seed, 1.0, false);
    d->k.fill_real(seed + 1);
    d->v.fill_real(seed + 2);
    const auto lengths = attention_lengths(s.B, s.s, s.min_s);
    for (int64_t b = 0; b < s.B; ++b) {
      d->seqlens.set(b, lengths[size_t(b)]);
      for (int64_t g = 0; g < s.n_kv; ++g) {
        const int64_t first = (b * s.n_kv + g) * d->rows() + lengths[size_t(b)];
        d->k.fill_nan_rows(first, d->rows() - lengths[size_t(b)]);
        d->v.fill_nan_rows(first, d->rows() - lengths[size_t(b)]);
      }
    }
    return d;
  }

  // One sequence and key/value head at a time; that is MQA with the group's heads.
  template <class S>
  static void run_reference(const Shape& s, int64_t rows, const S* q, const S* k, const S* v, S* o,
                            S* lse) {
    const auto lengths = attention_lengths(s.B, s.s, s.min_s);
    const int64_t group = s.n_h / s.n_kv;
    for (int64_t b = 0; b < s.B; ++b)
      for (int64_t g = 0; g < s.n_kv; ++g) {
        const int64_t h = b * s.n_h + g * group, row = (b * s.n_kv + g) * rows;
        const ref::AttentionShape a{.T = 1,
                                    .s0 = lengths[size_t(b)] - 1,
                                    .n_h = group,
                                    .n_kv = 1,
                                    .d_qk = s.d_qk,
                                    .d_v = s.d_v,
                                    .scale = attention_scale(s.d_qk)};
        ref::attention_core(a, q + h * s.d_qk, k + row * s.d_qk, v + row * s.d_v, o + h * s.d_v,
                            lse + h);
      }
  }
  static Expected reference(const Data& d) {
    const std::vector<double> q = d.q.to_doubles(), k = d.k.to_doubles(), v = d.v.to_doubles();
    std::vector<double> o(size_t(d.o.numel())), lse(size_t(d.lse.numel()));
    run_reference(d.shape, d.rows(), q.data(), k.data(), v.data(), o.data(), lse.data());
    Expected e;
    e.tensors.push_back({.name = "o", .values = std::move(o)});
    e.tensors.push_back({.name = "lse", .values = std::move(lse)});
    return e;
  }

  static Cost cost(const Shape& s) {
    double keys = 0;
    for (const int32_t n : attention_lengths(s.B, s.s, s.min_s)) keys += n;
    const double e = double(spec::dtype_bytes(s.dtype)), d = double(s.d_qk + s.d_v);
    return {2.0 * double(s.n_h) * d * keys, e * d * (double(s.n_kv) * keys + double(s.B * s.n_h)),
            s.dtype == spec::DType::bf16 ? "bf16" : "f32",
            e * double(s.B) * double(s.n_h) * double(s.d_v)};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    return attention_tolerance(s.dtype, output);
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.s = 4096, .n_h = 16, .n_kv = 16}, Size::quick});
    c.push_back({{.s = 4096, .n_h = 32, .n_kv = 8}, Size::quick});
    c.push_back({{.s = 4096, .n_h = 32, .n_kv = 1}, Size::standard});
    c.push_back({{.s = 4096, .n_h = 16, .n_kv = 16, .d_qk = 192, .d_v = 128}, Size::standard});
    c.push_back({{.s = 4096, .n_h = 128, .n_kv = 128}, Size::standard});
    c.push_back({{.s = 4096, .n_h = 128, .n_kv = 8}, Size::standard});
    c.push_back({{.B = 8, .s = 4096, .min_s = 512, .n_h = 32, .n_kv = 8}, Size::standard});
    for (const int64_t s : {1024, 16384}) {
      c.push_back({{.s = s, .n_h = 16, .n_kv = 16}, Size::standard});
      c.push_back({{.s = s, .n_h = 32, .n_kv = 8}, Size::standard});
    }
    c.push_back({{.s = 32768, .n_h = 16, .n_kv = 16}, Size::full});
    c.push_back({{.s = 32768, .n_h = 32, .n_kv = 8}, Size::full});
    c.push_back({{.s = 32768, .n_h = 128, .n_kv = 1}, Size::full});
    c.push_back({{.s = 4096, .n_h = 32, .n_kv = 8, .dtype = f32}, Size::full});
    for (const auto dtype : {f32, bf16}) {
      c.push_back({{.B = 3,
                    .s = 131,
                    .min_s = 0,
                    .n_h = 6,
                    .n_kv = 2,
                    .d_qk = 23,
                    .d_v = 17,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 2,
                    .s = 65,
                    .min_s = 1,
                    .n_h = 3,
                    .n_kv = 3,
                    .d_qk = 33,
                    .d_v = 130,
                    .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.B = 2,
                    .s = 700,
                    .min_s = 640,
                    .n_h = 5,
                    .n_kv = 1,
                    .d_qk = 48,
                    .d_v = 32,
                    .dtype = dtype},
                   Size::quick,
                   true});
    }
    return c;
  }

  static Support supported(const Shape& s) {
    return attention_support(s.dtype, {s.B, s.s, s.d_qk, s.d_v}, s.n_h, s.n_kv);
  }

  static Support mma_supported(const Shape& s) {
    if (s.dtype != spec::DType::bf16) return {Support::State::unsupported, "bf16 only"};
    if (!kern::attention_decode_cuda_mma_takes(s.d_qk, s.d_v))
      return {Support::State::unsupported, "d_qk and d_v at most 256"};
    return cuda_work(cost(s).flop, supported(s));
  }
  static Support simt_supported(const Shape& s) {
    if (s.d_v > 1024) return {Support::State::unsupported, "d_v at most 1024"};
    return cuda_work(8 * cost(s).flop, supported(s));
  }
  using Launch = void (*)(const spec::AttentionDecodeArgs&, void*, kern::CudaStream);
  using Scratch = int64_t (*)(const spec::AttentionDecodeArgs&);
  static CudaPrepare<AttentionDecode> on_device(Launch launch, Scratch scratch_bytes) {
    return [=](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.q, a.k, a.v, a.cache_seqlens, a.o, a.lse);
      void* scratch = m.scratch(scratch_bytes(a));
      return [=](kern::CudaStream s) { launch(a, scratch, s); };
    };
  }
  static Support cudnn_supported(const Shape& s) {
    if (s.dtype != spec::DType::bf16 || s.s < 1 || (s.min_s >= 0 && s.min_s != s.s))
      return {Support::State::unsupported, "bf16 with sequences of one length only"};
    Data d;
    d.shape = s;
    kern::SdpaShape x = kern::sdpa_of(d.args(), s.s);
    x.lse = true;
    return cudnn_support(kern::cudnn_refuses(x));
  }
  static std::function<void(kern::CudaStream)> cudnn(Data& d, CudaMirror& m) {
    auto a = d.args();
    m.map(a.q, a.k, a.v, a.cache_seqlens, a.o, a.lse);
    const std::shared_ptr<kern::CudnnSdpa> plan(kern::cudnn_plan(kern::sdpa_of(a, d.shape.s)),
                                                kern::cudnn_free);
    void* scratch = m.scratch(kern::cudnn_scratch_bytes(*plan));
    return [=](kern::CudaStream s) { kern::attention_decode_cuda_cudnn(a, *plan, scratch, s); };
  }
  static std::vector<Impl<AttentionDecode>> impls() {
    std::vector<Impl<AttentionDecode>> v;
    v.push_back({"cpu_simd", supported,
                 [](Data& d) {
                   return Runner{.run = [&d] { kern::attention_decode_cpu_simd(d.args()); },
                                 .resolved_isa = kern::attention_cpu_simd_isa(d.shape.dtype)};
                 },
                 false, kAttentionLevels});
    v.push_back(cuda_impl<AttentionDecode>(
        "cuda_mma", mma_supported,
        on_device(kern::attention_decode_cuda_mma, kern::attention_decode_cuda_mma_scratch_bytes)));
    v.push_back(
        cuda_impl<AttentionDecode>("cuda_simt", simt_supported,
                                   on_device(kern::attention_decode_cuda_simt,
                                             kern::attention_decode_cuda_simt_scratch_bytes)));
    v.push_back(cuda_impl<AttentionDecode>("cuda_cudnn", cudnn_supported, cudnn, true, 80, true));
    v.push_back({"cpu_eigen", supported,
                 [](Data& d) {
                   struct Floats {
                     std::vector<float> q, k, v, o;
                   };
                   auto f = std::make_shared<Floats>(
                       Floats{floats_of(d.q), floats_of(d.k), floats_of(d.v),
                              std::vector<float>(size_t(d.o.numel()))});
                   return Runner{.run =
                                     [&d, f] {
                                       run_reference(d.shape, d.rows(), f->q.data(), f->k.data(),
                                                     f->v.data(), f->o.data(), d.lse.as<float>());
                                       store_floats(f->o, d.o);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_attention_decode_op() { return make_op<AttentionDecode>(); }

}  // namespace v3b::bench
