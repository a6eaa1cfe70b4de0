// What the MTP module has of its own in the CUDA backend: what enters its layer (SPEC 1.25).
#include "kernels/forward/cuda_model.h"
#include "kernels/forward/forward_glue_cuda.h"

namespace v3b::kern {
void CudaModel::mtp_input(int64_t rows, const int32_t* next_ids, const float* hidden,
                          bool zero_first) {
  const DeviceMtp& m = weights.mtp[0];
  const int64_t d = cfg.hidden_size, e = spec::dtype_bytes(dtype);
  float* embedded = static_cast<float*>(mtp_embed_.reserve(rows * d * 4));
  auto* both = static_cast<uint8_t*>(mtp_in_.reserve(rows * 2 * d * e));
  embed(m.own_embed.out > 0 ? m.own_embed : weights.embed, rows, next_ids, embedded);
  if (zero_first) cuda_fill(embedded, 0, d * 4, stream);
  const bool e_first = options.flags.mtp_concat == spec::MtpConcat::emb_h;
  const auto norm = [&](const float* x, const float* w, void* y) {
    rmsnorm_mixed_cuda_simt({rows, d, cfg.rms_norm_eps, options.flags.norm_rounding,
                             spec::DType::f32, spec::DType::f32, dtype, x, d, w, y, 2 * d},
                            stream);
  };
  norm(embedded, m.enorm, both + (e_first ? 0 : d * e));
  norm(hidden, m.hnorm, both + (e_first ? d * e : 0));
  ws.h.reserve(rows * d * 4);
  linear_cuda(dtype, m.eh_proj, rows, both, 2 * d, ws.h.data(), d, spec::DType::f32, stream);
}

}  // namespace v3b::kern
