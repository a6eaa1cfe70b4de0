// Embedding gather: everything the suite knows about this op.
#include "reference/embedding.h"

#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/norm_rope/norm_rope_cuda.h"
#include "kernels/norm_rope/swiglu.h"

namespace v3b::bench {
namespace {

struct Embedding {
  static constexpr const char* name = "embedding";
  using Shape = spec::EmbeddingShape;
  struct Data {
    Shape shape;
    HostTensor ids, table, y;
    std::vector<HostTensor*> tensors() { return {&ids, &table, &y}; }
  };
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    d->ids = HostTensor("ids", Role::input, spec::DType::i32, {s.T});
    d->table = HostTensor("table", Role::input, s.dtype, {s.V, s.d});
    d->y = HostTensor("y", Role::output, s.dtype, {s.T, s.d});
    d->table.fill_real(seed);
    uint64_t h = seed * 0x9e3779b97f4a7c15ull + 1;
    for (int64_t t = 0; t < s.T; ++t) {
      h = (h ^ (h >> 31)) * 0xbf58476d1ce4e5b9ull + uint64_t(t);
      d->ids.set(t, double((h >> 20) % uint64_t(s.V)));
    }
    return d;
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const std::vector<double> table = d.table.to_doubles();
    std::vector<double> y(size_t(s.T * s.d));
    ref::embedding<double>(s.T, s.d, s.V, d.ids.as<int32_t>(), table.data(), y.data());
    Expected e;
    e.tensors.push_back({.name = "y", .values = std::move(y)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double row = double(s.d) * double(spec::dtype_bytes(s.dtype));
    return {0, double(s.T) * (2 * row + 4), "f32", double(s.T) * row};
  }
  static Tolerance tolerance(const Shape&, Fill, const std::string&) { return {}; }  // bitwise
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512, .d = 7168, .V = 8192, .dtype = bf16}, Size::quick});
    c.push_back({{.T = 1, .d = 7168, .V = 8192, .dtype = bf16}, Size::standard});
    c.push_back({{.T = 4096, .d = 2048, .V = 8192, .dtype = bf16}, Size::full});
    c.push_back({{.T = 5, .d = 37, .V = 11, .dtype = f32}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<Embedding>> impls() {
    std::vector<Impl<Embedding>> v;
    v.push_back({"cpu_copy", nullptr, [](Data& d) {
                   const Shape& s = d.shape;
                   const spec::EmbeddingArgs a{
                       s.T, s.d, s.V, s.dtype, d.ids.as<int32_t>(), d.table.data(), d.y.data()};
                   return Runner{.run = [a] { kern::embedding_cpu_copy(a); },
                                 .resolved_isa = "baseline"};
                 }});
    v.push_back(cuda_impl<Embedding>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      const Shape& s = d.shape;
      spec::EmbeddingArgs a{s.T,       s.d, s.V, s.dtype, d.ids.as<int32_t>(), d.table.data(),
                            d.y.data()};
      m.map(a.ids, a.table, a.y);
      return [a](kern::CudaStream stream) { kern::embedding_cuda_simt(a, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{.run =
                                     [&d] {
                                       const Shape& s = d.shape;
                                       if (s.dtype == spec::DType::f32) {
                                         ref::embedding<float>(s.T, s.d, s.V, d.ids.as<int32_t>(),
                                                               d.table.as<float>(),
                                                               d.y.as<float>());
                                         return;
                                       }
                                       for (int64_t t = 0; t < s.T; ++t)
                                         for (int64_t i = 0; i < s.d; ++i)
                                           d.y.set(t * s.d + i,
                                                   d.table.get(d.ids.as<int32_t>()[t] * s.d + i));
                                     },
                                 .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_embedding_op() { return make_op<Embedding>(); }

}  // namespace v3b::bench
