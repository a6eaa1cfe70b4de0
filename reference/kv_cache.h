// The MLA cache row and its 8-bit record (SPEC 1.9): d_c E4M3 codes, one fp32 scale per 128 of them
// (the last tile may be ragged), d_r bf16 values; 656 bytes at 512 + 64. float and double.
#pragma once
#include <cstdint>

#include "reference/spec/dtype.h"
#include "reference/spec/flags.h"

namespace v3b::ref {

constexpr int64_t kKvTile = 128;

// Scale of a tile: a = max(max|c| / 448, 1e-4), in fp32; pow2: the power of two at or above it.
float kv_tile_scale(float max_abs, spec::KvFormat format);

// c [d_c], k_pe [d_r] -> record. format must be one of the fp8 ones.
template <class S>
void kv_record_write(int64_t d_c, int64_t d_r, spec::KvFormat format, const S* c, const S* k_pe,
                     uint8_t* record);
// record -> row [d_c + d_r]: code times scale, rounded to bf16 (as the attention uses it), then
// k_pe.
template <class S>
void kv_record_read(int64_t d_c, int64_t d_r, const uint8_t* record, S* row);

// Rows of a paged cache of any format. c [T, d_c] (after the norm), k_pe [T, d_r] (after RoPE); row
// t goes to slot slots[t] = block * page + offset, slots[t] < 0 is skipped. Values are rounded to
// the storage dtype.
template <class S>
void mla_cache_write(int64_t T, int64_t d_c, int64_t d_r, spec::KvFormat format, spec::DType dtype,
                     const S* c, const S* k_pe, const int32_t* slots, void* cache);
// One cache row of any format as S [d_c + d_r].
template <class S>
void mla_cache_read(int64_t slot, int64_t d_c, int64_t d_r, spec::KvFormat format,
                    spec::DType dtype, const void* cache, S* row);

}  // namespace v3b::ref
