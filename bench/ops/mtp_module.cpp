// MTP module rows: everything the suite knows about this op.
#include "bench/ops/forward_common.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

struct MtpModule {
  static constexpr const char* name = "mtp_module";
  using Shape = spec::ForwardShape;
  using Data = ForwardData;
  static void validate(const Shape& s) {
    validate_forward(s, ForwardWhat::mtp, "--case of mtp_module");
  }
  static std::unique_ptr<Data> make(const Shape& s, Fill, uint64_t seed) {
    return make_forward_data(s, ForwardWhat::mtp, seed);
  }
  static Expected reference(const Data& d) { return forward_reference(d); }
  static Cost cost(const Shape& s) { return forward_cost(s, ForwardWhat::mtp); }
  static Tolerance tolerance(const Shape& s, Fill, const std::string& output) {
    return forward_tolerance(s, ForwardWhat::mtp, output);
  }
  static std::vector<Case<Shape>> cases() {
    using enum spec::DType;
    [[maybe_unused]] constexpr auto fp8 = spec::KvFormat::fp8_656_pow2;
    std::vector<Case<Shape>> c;
    c.push_back({{.s0 = 128}, Size::quick});
    c.push_back({{.T = 128}, Size::standard});
    c.push_back({{.s0 = 512}, Size::standard});
    c.push_back({{.T = 2, .s0 = 511}, Size::full});
    c.push_back({{.T = 5, .s0 = 3, .dtype = f32}, Size::quick, true});
    return c;
  }
  static std::vector<Impl<MtpModule>> impls() {
    std::vector<Impl<MtpModule>> v;
    v.push_back({"cpu_backend", [](const Shape& s) { return forward_support(s, "cpu"); },
                 [](Data& d) { return forward_runner(d, "cpu"); }});
    v.push_back({"cpu_eigen", [](const Shape& s) { return forward_support(s, "reference_f32"); },
                 [](Data& d) { return forward_runner(d, "reference_f32"); }, true});
    return v;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mtp_module_op() { return make_op<MtpModule>(); }

}  // namespace v3b::bench
