// Checkpoint tensors as typed views into mapped memory (SPEC 2.1), and writers for tests and training.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/config.h"
#include "reference/spec/dtype.h"

namespace v3b::model {

// A row-major matrix or vector somewhere in memory. Non-owning. dtype f32, bf16, f16, or f8e4m3 with
// scale_inv (dequantised value = code * scale_inv[r/128][c/128], then rounded to bf16 as SPEC 2.1).
struct TensorView {
  std::string name;
  spec::DType dtype = spec::DType::f32;
  std::vector<int64_t> shape;  // [out, in] or [n]
  const void* data = nullptr;  // may be unaligned for its type: read through memcpy or byte loads
  const float* scale_inv = nullptr;  // [ceil(out/128), ceil(in/128)] row-major, FP8 only, else null
  bool present() const { return data != nullptr; }
  int64_t numel() const {
    int64_t n = 1;
    for (auto s : shape) n *= s;
    return n;
  }
  int64_t rows() const { return shape.empty() ? 0 : shape[0]; }
  int64_t cols() const { return shape.size() > 1 ? shape[1] : 1; }
};

struct MlaWeights {                              // shapes: SPEC 1.6
  TensorView q_proj;                             // [n_h*d_qk, d], only if q_lora_rank == 0
  TensorView q_a_proj, q_a_layernorm, q_b_proj;  // [d_q,d] [d_q] [n_h*d_qk,d_q]
  TensorView kv_a_proj_with_mqa, kv_a_layernorm,
      kv_b_proj;      // [d_c+d_r,d] [d_c] [n_h*(d_n+d_v),d_c]
  TensorView o_proj;  // [d, n_h*d_v]
};
struct FfnWeights {
  TensorView gate_proj, up_proj, down_proj;
};  // [m,d] [m,d] [d,m]
struct MoeWeights {
  TensorView gate;                     // [E,d]
  TensorView e_score_correction_bias;  // [E] f32 (absent for softmax routers)
  std::vector<FfnWeights> experts;     // E
  FfnWeights shared;                   // width N_s*m; absent tensors if N_s == 0
};
struct LayerWeights {
  TensorView input_layernorm, post_attention_layernorm;  // [d]
  MlaWeights attn;
  bool is_moe = false;
  FfnWeights mlp;  // if !is_moe
  MoeWeights moe;  // if is_moe
};
struct MtpWeights {                  // model.layers.{L+k}
  TensorView enorm, hnorm, eh_proj;  // [d] [d] [d,2d]
  LayerWeights layer;
  TensorView shared_head_norm;                // [d]
  TensorView embed_tokens, shared_head_head;  // own copies if stored, else views of the main ones
};
struct ModelWeights {
  ModelConfig config;
  TensorView embed_tokens, norm, lm_head;
  std::vector<LayerWeights> layers;
  std::vector<MtpWeights> mtp;  // empty if not stored or not requested
  std::vector<std::string> warnings;
  std::shared_ptr<void> storage;  // keeps the mapping or the buffers alive
  // Every matrix starts at a multiple of 64 bytes in memory of this process (no file mapping): a backend that computes
  // in the stored type may read it where it lies instead of packing a second copy.
  bool in_place = false;
};
using WeightsPtr = std::shared_ptr<const ModelWeights>;

struct LoadOptions {
  bool load_mtp = true;      // require MTP tensors when num_nextn_predict_layers > 0
  bool scan_payload = true;  // reject NaN codes in FP8 and non-finite scales and biases
};
// dir holds config.json and model.safetensors, or model.safetensors.index.json with its shards.
// Throws v3b::Error for every rule of SPEC 2.3 (6 and 7 here) with file and tensor name.
WeightsPtr load_weights(const std::string& dir, const LoadOptions& options = {});

// Random weights N(0, 1/in) (embedding N(0,1), norm weights 1 + 0.1 N, biases 0.05 N), rounded to `dtype`; deterministic in seed
// on every machine and thread count. dtype f8e4m3 quantises the matrices that SPEC 2.1 marks Q.
WeightsPtr random_weights(const ModelConfig& config, uint64_t seed, spec::DType dtype);

// Random weights of the same scales, made as fast as memory takes them: quantiles of N(0,1) at 4096 levels by a counter
// hash, all cores. Models of gigabytes for benches. dtype bf16 or f8e4m3 (the matrices that SPEC 2.1 marks Q; each
// 128 x 128 block has another scale). Deterministic in seed on every machine and thread count. in_place.
WeightsPtr fast_random_weights(const ModelConfig& config, uint64_t seed, spec::DType dtype);

// Dequantised copy, row-major, as float (FP8: code*scale, rounded to bf16).
std::vector<float> to_float_vector(const TensorView& t);

// In-memory tensor for writing.
struct OwnedTensor {
  std::string name;
  spec::DType dtype;
  std::vector<int64_t> shape;
  std::vector<std::byte> bytes;
};
// One safetensors file, written beside its final name and renamed. Throws cannot_write.
void save_safetensors(const std::string& path, const std::vector<OwnedTensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {});
// Any safetensors file as name -> view (goldens, training state). Validates header and offsets.
struct SafetensorsFile {
  std::map<std::string, TensorView> tensors;
  std::map<std::string, std::string> metadata;
  std::shared_ptr<void> storage;
};
SafetensorsFile open_safetensors(const std::string& path);
// Every tensor of the checkpoint by Hugging Face name with its view (for saving and conversion).
std::vector<std::pair<std::string, TensorView>> named_tensors(const ModelWeights& w);
// Builds typed ModelWeights from a name -> view table (used by load_weights, training and tests).
ModelWeights bind_weights(const ModelConfig& config, const std::map<std::string, TensorView>& table,
                          const LoadOptions& options, const std::string& where);

}  // namespace v3b::model
