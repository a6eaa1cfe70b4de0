#include "kernels/moe/packed_experts.h"

#include <cstring>

#include "kernels/core/team.h"

namespace v3b::kern {
namespace {
using spec::DType;
int64_t blocks_of(int64_t n) { return (n + 127) / 128; }
}  // namespace

PackedExperts::PackedExperts(const Shape& s) : s_(s) {
  const bool fp8 = s.type == DType::f8e4m3;
  const int64_t count = s.E + (s.shared_m > 0 ? 1 : 0);
  ffn_.resize(static_cast<size_t>(s.E + 1));
  int64_t bytes = 0, scales = 0;
  // Twice: sizes, then addresses.
  for (int pass = 0; pass < 2; ++pass) {
    int64_t at = 0, scale_at = 0;
    for (int64_t e = 0; e < count; ++e) {
      const int64_t m = e < s.E ? s.m : s.shared_m;
      const auto place = [&](int64_t n, int64_t k) {
        PackedWeight w{.type = s.type, .n = n, .k = k};
        if (pass == 1) {
          w.data = data_.data() + at;
          if (fp8) w.scale = scale_.data() + scale_at;
        }
        at += (packed_weight_bytes(s.type, n, k) + 63) / 64 * 64;
        if (fp8) scale_at += blocks_of(n) * blocks_of(k);
        return w;
      };
      auto& f = ffn_[static_cast<size_t>(e)];
      f.gate = place(m, s.d);
      f.up = place(m, s.d);
      f.down = place(s.d, m);
    }
    if (pass == 1) break;
    bytes = at, scales = scale_at;
    data_ = Buffer<std::byte>(bytes, false);
    scale_ = Buffer<float>(scales, false);
  }
}

PackedExperts::PackedExperts(const Shape& s, const spec::FfnPointers* experts,
                             const spec::FfnPointers& shared)
    : PackedExperts(s) {
  for (int64_t e = 0; e < s.E; ++e) pack(e, experts[e]);
  if (s.shared_m > 0) pack(s.E, shared);
}

void PackedExperts::pack(int64_t e, const spec::FfnPointers& f) {
  const Ffn& to = expert(e);
  const PackedWeight* w[3] = {&to.gate, &to.up, &to.down};
  const void* from[3] = {f.gate, f.up, f.down};
  const float* scale[3] = {f.gate_scale, f.up_scale, f.down_scale};
  const double bytes =
      6.0 * static_cast<double>(to.gate.n * to.gate.k * spec::dtype_bytes(s_.type));
  const int threads = team_for(bytes, 0);
#pragma omp parallel num_threads(threads)
  for (int i = 0; i < 3; ++i) {
    const PackSource src{.type = s_.type, .w = from[i], .ld = w[i]->k, .n = w[i]->n, .k = w[i]->k};
    // This object's own memory, seen through the views that readers get.
    auto* out = const_cast<void*>(w[i]->data);
    const int64_t groups = packed_groups(w[i]->n);
#pragma omp for schedule(static) nowait
    for (int64_t g = 0; g < groups; ++g) pack_weight(src, out, g, g + 1);
  }
  for (int i = 0; i < 3 && s_.type == DType::f8e4m3; ++i)
    std::memcpy(const_cast<float*>(w[i]->scale), scale[i],
                static_cast<size_t>(blocks_of(w[i]->n) * blocks_of(w[i]->k)) * sizeof(float));
}

bool PackedExperts::supports(DType x, DType w) {
  return x == DType::bf16 ? w == DType::bf16 || w == DType::f8e4m3 || w == DType::f32
                          : x == DType::f32 && w == DType::f32;
}

}  // namespace v3b::kern
