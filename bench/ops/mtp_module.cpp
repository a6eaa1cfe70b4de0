// MTP module rows: everything the suite knows about this op beside forward_common.h.
#include "bench/ops/forward_common.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

struct MtpModule {
  static constexpr const char* name = "mtp_module";
  static constexpr ForwardWhat what = ForwardWhat::mtp;
  static std::vector<Case<spec::ForwardShape>> cases() {
    using enum spec::DType;
    std::vector<Case<spec::ForwardShape>> c;
    c.push_back({{.s0 = 128}, Size::quick});
    c.push_back({{.T = 128}, Size::standard});
    c.push_back({{.s0 = 512}, Size::standard});
    c.push_back({{.T = 2, .s0 = 511}, Size::full});
    c.push_back({{.T = 5, .s0 = 3, .dtype = f32}, Size::quick, true});
    return c;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_mtp_module_op() { return make_op<ForwardOp<MtpModule>>(); }

}  // namespace v3b::bench
