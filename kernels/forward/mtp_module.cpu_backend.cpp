// What the MTP module has of its own in the CPU backend (SPEC 1.25): the two norms and eh_proj. Its
// decoder layer and head are those of every pass (cpu_backend.cpp).
#include <algorithm>

#include "kernels/forward/parts.h"
#include "kernels/norm_rope/rmsnorm.h"

namespace v3b::kern {

void mtp_input(const model::ModelConfig& c, const spec::Flags& flags, spec::DType dtype,
               const PackedMtp& m, int64_t T, int64_t s0, float* e, const float* hidden,
               Buffer<uint8_t>& scratch, float* out) {
  const int64_t d = c.hidden_size, bytes = spec::dtype_bytes(dtype);
  scratch.reserve_discard(T * 2 * d * bytes);
  if (flags.mtp_zero_pos0 && s0 == 0) std::fill_n(e, d, 0.0F);
  const auto norm = [&](const float* x, const Buffer<float>& w, int64_t column) {
    rmsnorm_mixed({T, d, c.rms_norm_eps, flags.norm_rounding, spec::DType::f32, spec::DType::f32,
                   dtype, x, d, w.data(), scratch.data() + column * bytes, 2 * d});
  };
  const bool e_first = flags.mtp_concat == spec::MtpConcat::emb_h;
  norm(e, m.enorm, e_first ? 0 : d);
  norm(hidden, m.hnorm, e_first ? d : 0);
  linear(dtype, m.eh_proj, T, scratch.data(), 2 * d, out, d, spec::DType::f32);
}

}  // namespace v3b::kern
