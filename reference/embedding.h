// Embedding gather and its backward (SPEC 1.1, 3.9). Instantiated for float and double.
#pragma once
#include <cstdint>

namespace v3b::ref {

// table [V, d], ids [T] -> y [T, d]. Throws v3b::Error(bad_input) naming position and value if an
// id is out of range.
template <class S>
void embedding(int64_t T, int64_t d, int64_t V, const int32_t* ids, const S* table, S* y);
// Vocabulary-parallel form: part [rows, d] holds rows first_row.. of the table of V rows; ids of
// [0, V) outside of the part give rows of +0, ids outside of [0, V) throw. The sum over all parts
// is embedding() bit by bit, but for a table entry of -0, which the sum with +0 makes +0.
template <class S>
void embedding_part(int64_t T, int64_t d, int64_t V, int64_t first_row, int64_t rows,
                    const int32_t* ids, const S* part, S* y);
// Scatter-add: d_table[ids[t]] += dy[t].
template <class S>
void embedding_backward(int64_t T, int64_t d, const int32_t* ids, const S* dy, S* d_table);

}  // namespace v3b::ref
