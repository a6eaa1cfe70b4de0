// Whole forward pass, prefill: everything the suite knows about this op beside forward_common.h.
#include "bench/ops/forward_common.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

struct ForwardPrefill {
  static constexpr const char* name = "forward_prefill";
  static constexpr ForwardWhat what = ForwardWhat::prefill;
  static std::vector<Case<spec::ForwardShape>> cases() {
    using enum spec::DType;
    constexpr auto fp8 = spec::KvFormat::fp8_656_pow2;
    std::vector<Case<spec::ForwardShape>> c;
    c.push_back({{.T = 128}, Size::quick});
    c.push_back({{.T = 512}, Size::standard});
    c.push_back({{.T = 512, .dtype = f32}, Size::full});
    c.push_back({{.B = 8, .T = 128}, Size::full});
    c.push_back({{.T = 64,
                  .L = 2,
                  .L_d = 1,
                  .d = 2048,
                  .n_h = 16,
                  .d_n = 128,
                  .d_r = 64,
                  .d_v = 128,
                  .d_q = 512,
                  .d_c = 512,
                  .f = 2816,
                  .m = 352,
                  .E = 16,
                  .N_s = 2,
                  .K = 4},
                 Size::full});
    // A prompt from its start, or a chunk of 512 at the end of a long one.
    const auto add = [&](spec::ForwardShape s, int64_t T, int64_t s0, Size size, CacheState cache) {
      s.T = T, s.s0 = s0;
      if (s0 == 0) s.context = spec::ForwardContext::tokens;
      c.push_back({s, size, false, cache});
    };
    add(tiny_v3_shape(), 1024, 0, Size::standard, CacheState::hot);
    add(tiny_v3_shape(), 4096, 0, Size::full, CacheState::hot);
    add(tiny_v3_shape(), 512, 15872, Size::full, CacheState::hot);
    add(v2_lite_shape(), 512, 0, Size::full, CacheState::cold);
    add(v2_lite_shape(), 512, 3584, Size::full, CacheState::cold);
    for (const auto w : {bf16, f8e4m3})
      add(v3_layer_shape(w), 512, 0, Size::full, CacheState::cold);
    c.push_back({{.T = 7, .dtype = f32}, Size::quick, true});
    c.push_back({{.B = 3, .T = 9, .s0 = 70}, Size::quick, true});
    c.push_back({{.T = 80, .s0 = 20, .kv_format = fp8}, Size::quick, true});
    return c;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_forward_prefill_op() { return make_op<ForwardOp<ForwardPrefill>>(); }

}  // namespace v3b::bench
