// Rows to expert order: everything the suite knows about this op.
#include "reference/spec/moe_dispatch.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
    HostTensor x, idx, weight, offsets, row, rows;
    std::vector<HostTensor*> tensors() { return {&x, &idx, &weight, &offsets, &row, &rows}; }
    int64_t capacity() const {
      const Shape& s = shape;
      return s.capacity > 0 ? ref::expert_capacity(s.capacity, s.K, s.T, s.E) : 0;
    }
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
              rows.data(),
              capacity(),
              weight.as<float>(),
              s.drop_policy};
    }
  };
  static void validate(const Shape& s) {
    if (s.T < 1 || s.d < 1 || s.K < 1 || s.K > s.E)
      throw Error(ExitCode::usage, "size out of range", "--case of moe_dispatch",
                  "T, d >= 1, 1 <= K <= E", "");
    if (s.dtype != spec::DType::f32 && s.dtype != spec::DType::bf16)
      throw Error(ExitCode::usage, "rows have no such dtype", "--case of moe_dispatch",
                  "f32 or bf16", spec::dtype_name(s.dtype));
    if (!(s.capacity >= 0 && std::isfinite(s.capacity)))
      throw Error(ExitCode::usage, "bad capacity factor", "--case of moe_dispatch",
                  "capacity more than 0, or 0 for no dropping", "");
    // The routes are made before anything is measured.
    if (s.T * s.K > int64_t{1} << 27)
      throw Error(ExitCode::usage, "too many routes", "--case of moe_dispatch", "T*K <= 2^27",
                  std::to_string(s.T * s.K));
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    auto d = std::make_unique<Data>();
    d->shape = s;
    using enum spec::DType;
    d->x = HostTensor("x", Role::input, s.dtype, {s.T, s.d});
    d->idx = HostTensor("idx", Role::input, i32, {s.T, s.K});
    d->weight = HostTensor("weight", Role::input, f32, {s.T, s.K});
    d->offsets = HostTensor("offsets", Role::output, i64, {s.E + 1});
    d->row = HostTensor("row", Role::output, i64, {s.T, s.K});
    d->rows = HostTensor("rows", Role::output, s.dtype, {s.T * s.K, s.d});
    d->x.fill_real(seed);
    const auto routes = ref::synthetic_routes(s.T, s.E, s.K, {}, seed);
    std::copy(routes.begin(), routes.end(), d->idx.as<int32_t>());
    d->weight.fill_real(seed + 1, 0.3, false);
    for (int64_t i = 0; i < s.T * s.K; ++i)  // gates; in steps of 1/64, so that some are equal
      d->weight.set(i, std::ceil(32 * std::exp(d->weight.get(i))) / 64);
    return d;
  }
  // Routes of the slots that are served; the others are unused (SPEC 1.15).
  static ref::Dispatch plan(const Data& d) {
    const Shape& s = d.shape;
    std::vector<int32_t> idx(d.idx.as<int32_t>(), d.idx.as<int32_t>() + s.T * s.K);
    if (s.capacity > 0) {
      const auto keep = ref::apply_capacity(s.T, s.K, s.E, idx.data(), d.weight.to_doubles().data(),
                                            d.capacity(), s.drop_policy);
      for (size_t i = 0; i < idx.size(); ++i)
        if (!keep[i]) idx[i] = -1;
    }
    return ref::dispatch(s.T, s.K, s.E, idx.data());
  }
  static Expected reference(const Data& d) {
    const Shape& s = d.shape;
    const auto p = plan(d);
    std::vector<double> rows(size_t(d.rows.numel()), std::numeric_limits<double>::quiet_NaN());
    // Rows past the served slots are nobody's and not judged.
    std::vector<uint8_t> skip(rows.size(), 0);
    std::fill(skip.begin() + p.offsets.back() * s.d, skip.end(), uint8_t{1});
    ref::dispatch_rows<double>(p, s.K, s.d, d.x.to_doubles().data(), rows.data());
    Expected e;
    e.tensors.push_back({.name = "offsets", .values = {p.offsets.begin(), p.offsets.end()}});
    e.tensors.push_back({.name = "row", .values = {p.row.begin(), p.row.end()}});
    e.tensors.push_back({.name = "rows", .values = std::move(rows), .skip = std::move(skip)});
    return e;
  }
  static Cost cost(const Shape& s) {
    const double row = double(s.d) * double(spec::dtype_bytes(s.dtype)),
                 slots = double(s.T) * double(s.K);
    // What is dropped depends on the routes; with a capacity the least is what all experts serve.
    const double served =
        s.capacity > 0
            ? std::min(slots, double(ref::expert_capacity(s.capacity, s.K, s.T, s.E)) * double(s.E))
            : slots;
    const double written = served * row + 8 * slots + 8 * double(s.E);
    return {0, double(s.T) * row + 4 * slots + written, "f32", written};
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
    c.push_back({{.T = 512, .capacity = 1}, Size::standard});
    c.push_back({{.T = 512, .capacity = 1, .drop_policy = spec::DropPolicy::prob}, Size::full});
    for (const auto policy :
         {spec::DropPolicy::slot, spec::DropPolicy::token, spec::DropPolicy::prob}) {
      c.push_back({{.T = 61, .d = 21, .E = 7, .K = 3, .capacity = 1, .drop_policy = policy},
                   Size::quick,
                   true});
      c.push_back(
          {{.T = 40, .d = 16, .E = 4, .K = 2, .capacity = 0.6, .drop_policy = policy, .dtype = f32},
           Size::standard,
           true});
    }
    c.push_back({{.T = 13, .d = 37, .E = 5, .K = 3, .dtype = f32}, Size::quick, true});
    c.push_back({{.T = 5, .d = 130, .E = 4, .K = 4}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<MoeDispatch>> impls() {
    std::vector<Impl<MoeDispatch>> v;
    v.push_back({.how = "cpu_simd",
                 .prepare =
                     [](Data& d) {
                       return Runner{.run = [a = d.args()] { kern::moe_dispatch_cpu_simd(a); },
                                     .resolved_isa = kern::moe_dispatch_cpu_simd_isa()};
                     },
                 .levels = {kern::Isa::avx2, kern::Isa::avx512}});
    v.push_back(cuda_impl<MoeDispatch>("cuda_simt", nullptr, [](Data& d, CudaMirror& m) {
      auto a = d.args();
      m.map(a.x, a.idx, a.weight, a.offsets, a.row, a.rows);
      void* scratch = m.scratch(kern::moe_dispatch_cuda_scratch_bytes(a));
      return [=](kern::CudaStream stream) { kern::moe_dispatch_cuda_simt(a, scratch, stream); };
    }));
    v.push_back({"cpu_eigen", nullptr,
                 [](Data& d) {
                   return Runner{
                       .run =
                           [&d] {
                             const Shape& s = d.shape;
                             const auto p = plan(d);
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
