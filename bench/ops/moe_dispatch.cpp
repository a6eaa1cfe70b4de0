// Rows to expert order: everything the suite knows about this op.
#include "reference/spec/moe_dispatch.h"

#include <cstring>
#include <vector>

#include "bench/harness/cuda_mirror.h"
#include "bench/harness/op.h"
#include "bench/ops/registry.h"
#include "kernels/moe/moe.h"
#include "kernels/moe/moe_cuda.h"
#include "reference/moe.h"
#include "reference/synthetic_routes.h"

namespace v3b::bench {
namespace {

struct MoeDispatch {
  static constexpr const char* name = "moe_dispatch";
  using Shape = spec::MoeDispatchShape;
  struct Data {
    Shape shape;
    HostTensor x, idx, offsets, row, rows;
    std::vector<HostTensor*> tensors() { return {&x, &idx, &offsets, &row, &rows}; }
    spec::MoeDispatchArgs args() {
      const Shape& s = shape;
      return {s.T,
              s.d,
              s.E,
              s.K,
              s.dtype,
              x.data(),
              idx.as<int32_t>(),
              offsets.as<int64_t>(),
              row.as<int64_t>(),
              rows.data()};
    }
  };
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    if (s.T < 1 || s.d < 1 || s.K < 1 || s.K > s.E)
      throw Error(ExitCode::usage, "size out of range", "--case of moe_dispatch",
                  "T, d >= 1, 1 <= K <= E", "");
    if (s.dtype != spec::DType::f32 && s.dtype != spec::DType::bf16)
      throw Error(ExitCode::usage, "rows have no such dtype", "--case of moe_dispatch",
                  "f32 or bf16", spec::dtype_name(s.dtype));
    auto d = std::make_unique<Data>();
    d->shape = s;
    using enum spec::DType;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.d});
    d->idx = HostTensor("idx", Role::input, i32, {s.T, s.K});
    d->offsets = HostTensor("offsets", Role::output, i64, {s.E + 1});
    d->row = HostTensor("row", Role::output, i64, {s.T, s.K});
    d->rows = HostTensor("rows", Role::output, s.dtype, {s.T * s.K, s.d});
    d->x.fill_real(seed);
    const auto routes = ref::synthetic_routes(s.T, s.E, s.K, {}, seed);
    std::copy(routes.begin(), routes.end(), d->idx.as<int32_t>());
    return d;
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const auto p = ref::dispatch(s.T, s.K, s.E, d.idx.as<int32_t>());
    std::vector<double> rows(size_t(d.rows.numel()));
    ref::dispatch_rows<double>(p, s.K, s.d, d.x.to_doubles().data(), rows.data());
    Expected e;
    e.tensors.push_back({.name = "offsets", .values = {p.offsets.begin(), p.offsets.end()}});
    e.tensors.push_back({.name = "row", .values = {p.row.begin(), p.row.end()}});
    e.tensors.push_back({.name = "rows", .values = std::move(rows)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double row = double(s.d) * double(spec::dtype_bytes(s.dtype)),
                 slots = double(s.T) * double(s.K);
    return {0, double(s.T) * row + slots * row + 12 * slots + 8 * double(s.E), "f32"};
  }
  static Tolerance tolerance(const Shape&, Fill, const std::string&) {
    return {};
  }  // moves: bitwise
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    std::vector<Case<Shape>> c;
    c.push_back({{.T = 512}, Size::quick});
    c.push_back({{.T = 8}, Size::standard});
    c.push_back({{.T = 512, .d = 256, .E = 16, .K = 4},
                 Size::standard,
                 false,
                 CacheState::hot});  // tiny-v3
    c.push_back({{.T = 512, .d = 2048, .E = 64, .K = 6}, Size::full});
    c.push_back({{.T = 512, .dtype = f32}, Size::full});
    c.push_back({{.T = 13, .d = 37, .E = 5, .K = 3, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 5, .d = 130, .E = 4, .K = 4}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<MoeDispatch>> impls() {
    std::vector<Impl<MoeDispatch>> v;
    v.push_back({"cpu_simd", nullptr, [](Data& d) {
                   return Runner{.run = [a = d.args()] { kern::moe_dispatch_cpu_simd(a); },
                                 .resolved_isa = kern::moe_dispatch_cpu_simd_isa()};
                 }});
    v.push_back(cuda_impl<MoeDispatch>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.x, a.idx, a.offsets, a.row, a.rows);
      void* scratch = m.scratch(kern::moe_dispatch_cuda_scratch_bytes(a));
      return [=](kern::CudaStream stream) { kern::moe_dispatch_cuda_simt(a, scratch, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{
                       .run =
                           [&d] {
                             const Shape& s = d.shape;
                             const auto p = ref::dispatch(s.T, s.K, s.E, d.idx.as<int32_t>());
                             std::copy(p.offsets.begin(), p.offsets.end(), d.offsets.as<int64_t>());
                             std::copy(p.row.begin(), p.row.end(), d.row.as<int64_t>());
                             if (s.dtype == spec::DType::f32)
                               ref::dispatch_rows<float>(p, s.K, s.d, d.x.as<float>(),
                                                         d.rows.as<float>());
                             else  // the rows are only moved: their bits
                               ref::dispatch_rows<uint16_t>(p, s.K, s.d, d.x.as<uint16_t>(),
                                                            d.rows.as<uint16_t>());
                           },
                       .resolved_isa = "baseline"};
                 },
                 true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_moe_dispatch_op() { return make_op<MoeDispatch>(); }

}  // namespace v3b::bench
