// Dispatch, expert SwiGLU, combine, capacity and dropping, with backward
// (SPEC 1.13-1.16, 3.4, 3.5), plain.
#pragma once
#include <cstdint>
#include <vector>

#include "reference/spec/flags.h"

namespace v3b::ref {

// Rows sorted by expert, stable in t*K+k (SPEC 1.14). idx < 0 = unused slot.
struct Dispatch {
  std::vector<int64_t> counts, offsets;  // [E], [E+1] exclusive prefix sum
  std::vector<int64_t> slot;             // [rows] -> t*K+k
  std::vector<int64_t> row;              // [T*K] -> row, or -1 if dropped or unused
};
Dispatch dispatch(int64_t T, int64_t K, int64_t E, const int32_t* idx);

// rows [rows, d] = x in expert order; y [T,d] = sum over k (ascending) of weight * its row. Each
// the other's adjoint (with weights 1). MoeAccum::bf16 sums in expert order instead and rounds every
// row, product and partial sum to bf16 (the products and sums made in float32), whatever S is:
// [HF]'s index_add_ in the activations' dtype (SPEC 1.14).
template <class S>
void dispatch_rows(const Dispatch& p, int64_t K, int64_t d, const S* x, S* rows);
template <class S>
void combine_rows(const Dispatch& p, int64_t T, int64_t K, int64_t d, const S* rows,
                  const S* weight, S* y, spec::MoeAccum accum = spec::MoeAccum::fp32);
// a + b as MoeAccum::bf16 adds: both rounded to bf16, the sum made in float32 and rounded again.
template <class S>
S add_bf16(S a, S b);

// Which assignments keep their place when every expert serves at most `capacity` (SPEC 1.15). gate
// [T,K] is read by DropPolicy::prob only. keep[t*K+k] = 1 or 0.
int64_t expert_capacity(double capacity_factor, int64_t K, int64_t T, int64_t E);
std::vector<char> apply_capacity(int64_t T, int64_t K, int64_t E, const int32_t* idx,
                                 const double* gate, int64_t capacity, spec::DropPolicy policy);

// Grouped-GEMM layouts of SPEC 1.14: rows of one expert padded to a multiple of `align`; m_indices
// = expert or -1.
struct ContiguousLayout {
  std::vector<int32_t> m_indices;   // [M_pad]
  std::vector<int64_t> padded_row;  // [rows] -> row in the padded layout
};
ContiguousLayout contiguous_layout(const std::vector<int64_t>& counts, int64_t align);

template <class S>
struct Ffn {                // row-major [out, in]
  const S* gate = nullptr;  // [m, d]
  const S* up = nullptr;    // [m, d]
  const S* down = nullptr;  // [d, m]
};
template <class S>
struct FfnGrad {
  S* gate;
  S* up;
  S* down;
};  // accumulated

// What happens to the hidden rows between the products: nothing, or rounding to bf16 and quantisation
// 1x128 with fp32 scales (SPEC 1.22), as a pipeline with FP8 activations has it.
enum class Hidden { exact, fp8 };
// y [T,d] = W_down( silu(W_gate x) * (W_up x) )
template <class S>
void ffn(int64_t T, int64_t d, int64_t m, const S* x, const Ffn<S>& w, S* y,
         Hidden hidden = Hidden::exact);
// dx [T,d] accumulated.
template <class S>
void ffn_backward(int64_t T, int64_t d, int64_t m, const S* x, const Ffn<S>& w, const S* dy, S* dx,
                  FfnGrad<S> g);

// y [T,d] = sum_k weight[t,k] * expert_idx[t,k](x_t) (k ascending) + shared(x_t). Overwrites y; no
// residual. shared.gate == null: none. `shared_m` = N_s*m. idx < 0 slots contribute nothing.
// Experts that nobody chose are never read.
template <class S>
void moe(int64_t T, int64_t d, int64_t m, int64_t E, int64_t K, const S* x, const int32_t* idx,
         const S* weight, const std::vector<Ffn<S>>& experts, const Ffn<S>& shared,
         int64_t shared_m, S* y, spec::MoeAccum accum = spec::MoeAccum::fp32,
         Hidden hidden = Hidden::exact);
// dx [T,d] and weight gradients are accumulated, dweight [T,K] overwritten.
template <class S>
void moe_backward(int64_t T, int64_t d, int64_t m, int64_t E, int64_t K, const S* x,
                  const int32_t* idx, const S* weight, const std::vector<Ffn<S>>& experts,
                  const Ffn<S>& shared, int64_t shared_m, const S* dy, S* dx, S* dweight,
                  const std::vector<FfnGrad<S>>& expert_grads, FfnGrad<S> shared_grad);

}  // namespace v3b::ref
