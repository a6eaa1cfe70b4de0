// The small kernels between the large ones of a CUDA forward pass, and the state of the decode loop on the device.
#pragma once
#include "kernels/core/cuda.h"
#include "kernels/norm_rope/rmsnorm.h"

namespace v3b::kern {

// As rmsnorm_mixed (rmsnorm.h), device pointers.
void rmsnorm_mixed_cuda_simt(const RmsNormMixedArgs& a, CudaStream stream);

// h [T, d] f32 = rows ids[t] of table [V, d] (bf16 or f32). Ids outside of 0..V-1 give NaN rows.
void embed_f32_cuda_simt(int64_t T, int64_t d, int64_t V, const int32_t* ids, const void* table,
                         spec::DType dtype, float* h, CudaStream stream);

// y[r, j] = x[r, j] for r < rows, j < n, at strides in elements; f32 or bf16 each, rounded to y's type.
void copy_rows_cuda_simt(int64_t rows, int64_t n, const void* x, spec::DType x_type,
                         int64_t x_stride, void* y, spec::DType y_type, int64_t y_stride,
                         CudaStream stream);

// h[i] += y[i], h f32.
void add_rows_cuda_simt(int64_t n, float* h, const void* y, spec::DType y_type, CudaStream stream);

// ---- greedy decoding of B sequences without the host ----------------------------------------------------------------
// Device arrays; a step appends rows of the main cache (s_q of them) and of the MTP cache.
struct DecodeState {
  int64_t B = 0, s_q = 1, max_blocks = 0, page = 64, max_tokens = 0;
  const int32_t* tables =
      nullptr;  // [B, max_blocks] pages of the main cache, reserved for all of max_tokens
  const int32_t* mtp_tables = nullptr;  // [B, max_blocks]
  int32_t* length = nullptr;            // [B] rows of the main cache before this step
  int32_t* mtp_length = nullptr;        // [B] rows of the MTP cache before this step
  int32_t* ids = nullptr;               // [B, s_q] what this step feeds: last token, then drafts
  int32_t* positions = nullptr;         // [B, s_q]
  int32_t* slots = nullptr;             // [B, s_q]
  int32_t* seqlens = nullptr;           // [B] length + s_q
  int32_t* next_ids = nullptr;          // [B, s_q] MTP input tokens
  int32_t* mtp_positions = nullptr;     // [B, s_q]
  int32_t* mtp_slots = nullptr;         // [B, s_q]
  int32_t* mtp_seqlens = nullptr;       // [B]
  int32_t* accepted = nullptr;    // [B] drafts accepted by this step; -1: the sequence is done
  int32_t* argmax = nullptr;      // [B, s_q] of the main logits
  int32_t* mtp_argmax = nullptr;  // [B, s_q] of the MTP logits
  int32_t* tokens = nullptr;      // [B, max_tokens] emitted
  int32_t* emitted = nullptr;     // [B]
  int32_t* stats = nullptr;       // [3]: steps x B, drafts, accepted
};
// positions, slots and seqlens of the main pass from length.
void decode_begin_cuda_simt(const DecodeState& s, CudaStream stream);
// After the main logits' argmax: counts accepted drafts (ids[b, 1..] against argmax), emits tokens, advances length by
// 1 + accepted, and prepares the MTP pass (s_q = 2): row j feeds next_ids[j] = argmax[j]; rows past `accepted` are
// overwritten by the next step.
// With s_q = 1 the emitted token becomes ids[b].
void decode_accept_cuda_simt(const DecodeState& s, CudaStream stream);
// After the MTP logits' argmax: ids for the next step = {last emitted token, draft of row `accepted`}; advances mtp_length.
void decode_draft_cuda_simt(const DecodeState& s, CudaStream stream);

}  // namespace v3b::kern
