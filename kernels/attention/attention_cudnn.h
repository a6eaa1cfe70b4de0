// cuDNN's scaled dot product attention, the library to compare with. Opened at run time (libcudnn.so.9): the program
// starts without it, and a build without its headers says so.
#pragma once
#include <cstdint>
#include <string>

#include "kernels/core/cuda.h"
#include "reference/spec/attention.h"

namespace v3b::kern {

// One product: q [B, T_q, n_h, d_qk], k [B, T_k, n_kv, d_qk], v [B, T_k, n_kv, d_v], o [B, T_q, n_h, d_v], bf16; strides in
// elements, the innermost is 1. causal: the last query sees all keys (query i sees T_k - T_q + i + 1 of them).
struct SdpaShape {
  struct Strides {
    int64_t batch, token, head;
  };
  int64_t B, T_q, T_k, n_h, n_kv, d_qk, d_v;
  Strides q, k, v, o;
  double scale;
  bool causal;
  bool lse;  // natural log, [B, n_h, T_q] f32
};
struct SdpaPointers {
  const void *q, *k, *v;
  void* o;
  float* lse;
};

// A plan is for one shape; its making needs the device and some milliseconds. scratch is the library's own.
struct CudnnSdpa;
std::string cudnn_missing();  // "" where the library can be called, else why not
std::string cudnn_refuses(
    const SdpaShape& s);                    // "" where cudnn_plan(s) would succeed, else why not
CudnnSdpa* cudnn_plan(const SdpaShape& s);  // throws v3b::Error
void cudnn_free(CudnnSdpa* plan);
int64_t cudnn_scratch_bytes(const CudnnSdpa& plan);
void cudnn_sdpa(const CudnnSdpa& plan, const SdpaPointers& p, void* scratch, CudaStream stream);

// The ops' shapes. Prefill: s0 >= 0; the library's lse [n_h, T] goes to [T, n_h] by a kernel of ours, part of the call.
SdpaShape sdpa_of(const spec::AttentionArgs& a);
int64_t attention_prefill_cudnn_scratch_bytes(const spec::AttentionArgs& a, const CudnnSdpa& plan);
void attention_prefill_cuda_cudnn(const spec::AttentionArgs& a, const CudnnSdpa& plan,
                                  void* scratch, CudaStream stream);
// The library takes keys, not their parts: they are built in the scratch by a kernel of ours, part of the call.
SdpaShape sdpa_of(const spec::MlaPrefillArgs& a);
int64_t mla_prefill_cudnn_scratch_bytes(const spec::MlaPrefillArgs& a, const CudnnSdpa& plan);
void mla_prefill_cuda_cudnn(const spec::MlaPrefillArgs& a, const CudnnSdpa& plan, void* scratch,
                            CudaStream stream);
// All sequences at length s: what lies past a length may be NaN, and a masked NaN is the library's own matter.
SdpaShape sdpa_of(const spec::AttentionDecodeArgs& a, int64_t s);
void attention_decode_cuda_cudnn(const spec::AttentionDecodeArgs& a, const CudnnSdpa& plan,
                                 void* scratch, CudaStream stream);

// ---- kernels of ours (library_glue.cuda_simt.cu) ----
// y[t, h] = x[h, t], f32.
void transpose_lse_cuda_simt(int64_t T, int64_t n_h, const float* x, float* y, CudaStream stream);
// keys [s, n_h, d_n + d_r] = [kv's first d_n of the head ; k_pe], 2-byte elements. Bound by 2 s n_h d_qk bytes written.
void build_keys_cuda_simt(const spec::MlaPrefillArgs& a, void* keys, CudaStream stream);

}  // namespace v3b::kern
