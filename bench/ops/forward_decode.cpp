// Whole forward pass, decode: everything the suite knows about this op beside forward_common.h.
#include "bench/ops/forward_common.h"
#include "bench/ops/registry.h"

namespace v3b::bench {
namespace {

struct ForwardDecode {
  static constexpr const char* name = "forward_decode";
  static constexpr ForwardWhat what = ForwardWhat::decode;
  static std::vector<Case<spec::ForwardShape>> cases() {
    using enum spec::DType;
    constexpr auto fp8 = spec::KvFormat::fp8_656_pow2;
    std::vector<Case<spec::ForwardShape>> c;
    c.push_back({{.s0 = 128}, Size::quick});
    c.push_back({{.s0 = 512}, Size::standard});
    c.push_back({{.B = 8, .s0 = 256}, Size::standard});
    c.push_back({{.B = 1, .T = 2, .s0 = 512}, Size::standard});
    c.push_back({{.s0 = 512, .dtype = f32}, Size::full});
    c.push_back({{.s0 = 512, .kv_format = fp8}, Size::full});
    c.push_back({{.B = 32, .s0 = 128}, Size::full});
    c.push_back({{.B = 4,
                  .s0 = 64,
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
    // A decode loop leaves the shipped model's 15 MB in the caches; the others are read from memory anyway.
    const auto add = [&](spec::ForwardShape s, int64_t B, int64_t s0, Size size, CacheState cache) {
      s.B = B, s.s0 = s0;
      c.push_back({s, size, false, cache});
    };
    for (const int64_t B : {1, 8, 32})
      for (const int64_t s0 : {1024, 4096, 16384})
        add(tiny_v3_shape(), B, s0, s0 == 1024 || B == 1 ? Size::standard : Size::full,
            CacheState::hot);
    for (const int64_t B : {1, 8, 32}) add(v2_lite_shape(), B, 1024, Size::full, CacheState::cold);
    for (const int64_t s0 : {4096, 16384})
      add(v2_lite_shape(), 1, s0, Size::full, CacheState::cold);
    for (const auto w : {bf16, f8e4m3}) {
      for (const int64_t B : {1, 8, 32})
        add(v3_layer_shape(w), B, 1024, Size::full, CacheState::cold);
      add(v3_layer_shape(w), 1, 16384, Size::full, CacheState::cold);
      auto prompt = v3_layer_shape(w);  // for backends that take no cache rows (CUDA)
      prompt.context = spec::ForwardContext::tokens;
      add(prompt, 1, 64, Size::full, CacheState::cold);
    }
    c.push_back({{.B = 3, .s0 = 65, .dtype = f32}, Size::quick, true});
    c.push_back({{.B = 2, .s0 = 70, .context = spec::ForwardContext::rows, .w_dtype = f8e4m3},
                 Size::quick,
                 true});
    c.push_back({{.B = 2, .T = 3, .s0 = 5, .d_q = 0}, Size::quick, true});
    return c;
  }
};

}  // namespace

std::unique_ptr<OpBase> make_forward_decode_op() { return make_op<ForwardOp<ForwardDecode>>(); }

}  // namespace v3b::bench
