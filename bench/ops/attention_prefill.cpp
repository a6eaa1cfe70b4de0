// Causal prefill with MHA, GQA, MQA: everything the suite knows about this op.
#include "reference/spec/attention_prefill.h"

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

struct AttentionPrefill {
  static constexpr const char* name = "attention_prefill";
  using Shape = spec::AttentionPrefillShape;

  struct Data {
    Shape shape;
    HostTensor q, k, v, o, lse;
    std::vector<HostTensor*> tensors() { return {&q, &k, &v, &o, &lse}; }
    spec::AttentionArgs args() {
      const Shape& s = shape;
      spec::AttentionArgs a{};
      a.T = s.T, a.s0 = s.s0, a.n_h = s.n_h, a.n_kv = s.n_kv, a.d_qk = s.d_qk, a.d_v = s.d_v;
      a.scale = attention_scale(s.d_qk);
      a.dtype = s.dtype;
      a.q = q.data(), a.k = k.data(), a.v = v.data(), a.o = o.data(), a.lse = lse.as<float>();
      a.q_stride = s.n_h * s.d_qk, a.k_stride = s.n_kv * s.d_qk, a.v_stride = s.n_kv * s.d_v;
      a.o_stride = s.n_h * s.d_v;
      return a;
    }
  };

  static int64_t keys(const Shape& s) { return std::max<int64_t>(0, s.s0 + s.T); }
  static ref::AttentionShape ref_shape(const Shape& s) {
    return {.T = s.T,
            .s0 = s.s0,
            .n_h = s.n_h,
            .n_kv = s.n_kv,
            .d_qk = s.d_qk,
            .d_v = s.d_v,
            .scale = attention_scale(s.d_qk)};
  }

  static void validate(const Shape& s) {
    if (s.s0 + s.T < 1)  // at s0 < 0 the first queries see nothing, but the last one does
      throw Error(ExitCode::usage, "no key is seen", "--case of attention_prefill", "s0 > -T",
                  std::to_string(s.s0));
    if (s.n_h % s.n_kv != 0)
      throw Error(ExitCode::usage, "heads do not share keys evenly", "--case of attention_prefill",
                  "n_h a multiple of n_kv",
                  std::to_string(s.n_h) + " and " + std::to_string(s.n_kv));
  }

  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->q = HostTensor("q", Role::input, s.dtype, {s.T, s.n_h, s.d_qk});
    d->k = HostTensor("k", Role::input, s.dtype, {keys(s), s.n_kv, s.d_qk});
    d->v = HostTensor("v", Role::input, s.dtype, {keys(s), s.n_kv, s.d_v});
    d->o = HostTensor("o", Role::output, s.dtype, {s.T, s.n_h, s.d_v});
    d->lse = HostTensor("lse", Role::output, spec::DType::f32, {s.T, s.n_h});
    d->q.fill_real(seed, 1.0, false);
    d->k.fill_real(seed + 1);
    d->v.fill_real(seed + 2, 1.0, false);
    return d;
  }

  static Expected reference(const Data& d) {
    const std::vector<double> q = d.q.to_doubles(), k = d.k.to_doubles(), v = d.v.to_doubles();
    std::vector<double> o(size_t(d.o.numel())), lse(size_t(d.lse.numel()));
    ref::attention_core(ref_shape(d.shape), q.data(), k.data(), v.data(), o.data(), lse.data());
    Expected e;
    e.tensors.push_back({.name = "o", .values = std::move(o)});
    e.tensors.push_back({.name = "lse", .values = std::move(lse)});
    return e;
  }

  static Cost cost(const Shape& s) {
    const double e = double(spec::dtype_bytes(s.dtype)), T = double(s.T), s0 = double(s.s0);
    const double pairs = s.s0 < 0 ? (T + s0) * (T + s0 + 1) / 2 : T * s0 + T * (T + 1) / 2;
    return {2.0 * double(s.n_h) * double(s.d_qk + s.d_v) * pairs,
            e * (T * double(s.n_h) + double(keys(s)) * double(s.n_kv)) * double(s.d_qk + s.d_v) +
                4 * T * double(s.n_h),
            s.dtype == spec::DType::bf16 ? "bf16" : "f32",
            (e * double(s.d_v) + 4) * T * double(s.n_h)};
  }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    return prefill_tolerance(s.dtype, output);
  }

  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .n_h = 32, .n_kv = 8}, Size::quick});
    c.push_back(
        {{.T = 1024, .n_h = 8, .n_kv = 8, .d_qk = 48, .d_v = 32, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 512, .n_h = 32, .n_kv = 32}, Size::standard});
    c.push_back({{.T = 512, .n_h = 32, .n_kv = 1}, Size::standard});
    c.push_back({{.T = 256, .s0 = 2048, .n_h = 32, .n_kv = 8}, Size::standard});
    c.push_back({{.T = 2048, .n_h = 32, .n_kv = 8}, Size::standard});
    c.push_back({{.T = 512, .n_h = 32, .n_kv = 8, .dtype = f32}, Size::standard});
    c.push_back(
        {{.T = 4096, .n_h = 8, .n_kv = 8, .d_qk = 48, .d_v = 32, .dtype = f32}, Size::standard});
    c.push_back(
        {{.T = 4096, .n_h = 8, .n_kv = 8, .d_qk = 48, .d_v = 32, .dtype = bf16}, Size::standard});
    c.push_back(
        {{.T = 16384, .n_h = 8, .n_kv = 8, .d_qk = 48, .d_v = 32, .dtype = bf16}, Size::full});
    c.push_back({{.T = 2048, .n_h = 128, .n_kv = 128}, Size::full});
    for (const auto dtype : {f32, bf16}) {
      c.push_back({{.T = 37, .s0 = 5, .n_h = 6, .n_kv = 2, .d_qk = 23, .d_v = 17, .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.T = 1, .s0 = 0, .n_h = 3, .n_kv = 3, .d_qk = 16, .d_v = 8, .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.T = 5, .s0 = -3, .n_h = 2, .n_kv = 1, .d_qk = 9, .d_v = 3, .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.T = 301, .s0 = 0, .n_h = 3, .n_kv = 1, .d_qk = 64, .d_v = 80, .dtype = dtype},
                   Size::quick,
                   true});
      c.push_back({{.T = 3, .s0 = 200, .n_h = 1, .n_kv = 1, .d_qk = 33, .d_v = 130, .dtype = dtype},
                   Size::quick,
                   true});
    }
    return c;
  }

  static Support supported(const Shape& s) {
    return attention_support(s.dtype, {s.T, s.d_qk, s.d_v}, s.n_h, s.n_kv);
  }

  static Support mma_supported(const Shape& s) {
    if (s.dtype != spec::DType::bf16) return {Support::State::unsupported, "bf16 only"};
    if (!kern::attention_prefill_cuda_mma_takes(s.d_qk, s.d_v))
      return {Support::State::unsupported, "d_qk and d_v at most 256"};
    return cuda_work(cost(s).flop, supported(s));
  }
  static Support simt_supported(const Shape& s) {
    if (s.d_v > 1024) return {Support::State::unsupported, "d_v at most 1024"};
    return cuda_work(8 * cost(s).flop, supported(s));
  }
  static CudaPrepare<AttentionPrefill> on_device(void (*launch)(const spec::AttentionArgs&,
                                                                kern::CudaStream)) {
    return [=](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.q, a.k, a.v, a.o, a.lse);
      return [=](kern::CudaStream s) { launch(a, s); };
    };
  }

  static Support cudnn_supported(const Shape& s) {
    if (s.dtype != spec::DType::bf16 || s.s0 < 0)
      return {Support::State::unsupported, "bf16 with a key for every query only"};
    Data d;
    d.shape = s;
    kern::SdpaShape x = kern::sdpa_of(d.args());
    x.lse = true;
    return cudnn_support(kern::cudnn_refuses(x));
  }
  static std::function<void(kern::CudaStream)> cudnn(Data& d, CudaMirror& m) {
    auto a = d.args();
    m.map(a.q, a.k, a.v, a.o, a.lse);
    const std::shared_ptr<kern::CudnnSdpa> plan(kern::cudnn_plan(kern::sdpa_of(a)),
                                                kern::cudnn_free);
    void* scratch = m.scratch(kern::attention_prefill_cudnn_scratch_bytes(a, *plan));
    return [=](kern::CudaStream s) { kern::attention_prefill_cuda_cudnn(a, *plan, scratch, s); };
  }

  static std::vector<Impl<AttentionPrefill>> impls() {
    std::vector<Impl<AttentionPrefill>> v;
    v.push_back({"cpu_simd", supported,
                 [](Data& d) {
                   return Runner{.run = [&d] { kern::attention_prefill_cpu_simd(d.args()); },
                                 .resolved_isa = kern::attention_cpu_simd_isa(d.shape.dtype)};
                 },
                 false, kAttentionLevels});
    v.push_back(cuda_impl<AttentionPrefill>("cuda_mma", mma_supported,
                                            on_device(kern::attention_prefill_cuda_mma)));
    v.push_back(cuda_impl<AttentionPrefill>("cuda_simt", simt_supported,
                                            on_device(kern::attention_prefill_cuda_simt)));
    v.push_back(cuda_impl<AttentionPrefill>("cuda_cudnn", cudnn_supported, cudnn, true, 80, true));
    v.push_back({"cpu_onednn", supported,
                 [](Data& d) {
                   return Runner{.run = [&d] { kern::attention_prefill_cpu_onednn(d.args()); },
                                 .resolved_isa = "oneDNN"};
                 },
                 true});
    v.push_back({"cpu_eigen", supported,
                 [](Data& d) {
                   struct Floats {
                     std::vector<float> q, k, v, o, lse;
                   };
                   auto f = std::make_shared<Floats>(Floats{floats_of(d.q),
                                                            floats_of(d.k),
                                                            floats_of(d.v),
                                                            std::vector<float>(size_t(d.o.numel())),
                                                            {}});
                   return Runner{.run =
                                     [&d, f] {
                                       ref::attention_core(ref_shape(d.shape), f->q.data(),
                                                           f->k.data(), f->v.data(), f->o.data(),
                                                           d.lse.as<float>());
                                       store_floats(f->o, d.o);
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_attention_prefill_op() { return make_op<AttentionPrefill>(); }

}  // namespace v3b::bench
