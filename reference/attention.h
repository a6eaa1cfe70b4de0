// Plain attention core and its backward (SPEC 1.5, 1.7, 3.3): MHA, MQA, GQA and expanded MLA are
// one function. Instantiated for float and double.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"

namespace v3b::ref {

// T new queries after s0 keys that were there before; s = max(0, s0 + T) keys in all. Query i sees
// the keys j <= s0 + i. s0 < 0 is legal: then the first -s0 queries see nothing (their o is 0,
// their lse by flag).
struct AttentionShape {
  int64_t T = 0, s0 = 0, n_h = 1, n_kv = 1, d_qk = 0, d_v = 0;
  double scale = 1;
  int64_t k_stride = 0,
          v_stride = 0;  // elements between tokens; 0: dense (n_kv * d_qk, n_kv * d_v)
  spec::EmptyLse empty_lse = spec::EmptyLse::pos_inf;
  spec::DType p_dtype =
      spec::DType::f64;  // bf16: P is rounded before P V, as the published code does
  int64_t s() const { return s0 + T > 0 ? s0 + T : 0; }
};

// q [T, n_h, d_qk], k [s, n_kv, d_qk], v [s, n_kv, d_v] -> o [T, n_h, d_v], lse [T, n_h] (natural
// log) or null. Query head h uses key/value head floor(h n_kv / n_h).
template <class S>
void attention_core(const AttentionShape& shape, const S* q, const S* k, const S* v, S* o,
                    S* lse = nullptr);

// Given dO [T, n_h, d_v]: dq, dk, dv (dense, shaped as q, k, v) are overwritten. P is recomputed,
// unrounded.
template <class S>
void attention_core_backward(const AttentionShape& shape, const S* q, const S* k, const S* v,
                             const S* d_o, S* dq, S* dk, S* dv);

// Split-KV merge: `parts` partial results over disjoint keys, o_parts [parts, rows, d_v], lse_parts
// [parts, rows] -> o [rows, d_v], lse [rows] or null. A part without keys has an infinite lse of
// either sign.
template <class S>
void attention_merge(int64_t parts, int64_t rows, int64_t d_v, const S* o_parts, const S* lse_parts,
                     S* o, S* lse, spec::EmptyLse empty_lse = spec::EmptyLse::pos_inf);

// What lse is where nothing is visible.
template <class S>
S empty_lse_value(spec::EmptyLse flag);

}  // namespace v3b::ref
