#include "reference/kv_cache.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "reference/spec/attention.h"

namespace v3b::ref {
namespace {
template <class T>
T load(const void* p, int64_t i) {
  T v;
  std::memcpy(&v, static_cast<const char*>(p) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return v;
}
template <class T>
void store(void* p, int64_t i, T v) {
  std::memcpy(static_cast<char*>(p) + i * static_cast<int64_t>(sizeof(T)), &v, sizeof(T));
}
}  // namespace

float kv_tile_scale(float max_abs, spec::KvFormat format) {
  const float a = std::max(max_abs / 448.0f, 1e-4f);
  return format == spec::KvFormat::fp8_656_pow2 ? spec::ceil_pow2(a) : a;
}

template <class S>
void kv_record_write(int64_t d_c, int64_t d_r, spec::KvFormat format, const S* c, const S* k_pe,
                     uint8_t* record) {
  const int64_t tiles = (d_c + kKvTile - 1) / kKvTile;
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t first = t * kKvTile, last = std::min(d_c, first + kKvTile);
    float max_abs = 0;
    for (int64_t i = first; i < last; ++i)
      max_abs = std::max(max_abs, std::abs(static_cast<float>(c[i])));
    const float scale = kv_tile_scale(max_abs, format);
    for (int64_t i = first; i < last; ++i)
      record[i] = spec::to_f8e4m3(static_cast<float>(c[i]) / scale).bits;
    store(record + d_c, t, scale);
  }
  uint8_t* rope = record + d_c + 4 * tiles;
  for (int64_t i = 0; i < d_r; ++i) store(rope, i, spec::to_bf16(static_cast<float>(k_pe[i])).bits);
}

template <class S>
void kv_record_read(int64_t d_c, int64_t d_r, const uint8_t* record, S* row) {
  const int64_t tiles = (d_c + kKvTile - 1) / kKvTile;
  for (int64_t i = 0; i < d_c; ++i) {
    const float c =
        spec::to_float(spec::f8e4m3{record[i]}) * load<float>(record + d_c, i / kKvTile);
    row[i] = static_cast<S>(spec::to_float(spec::to_bf16(c)));
  }
  const uint8_t* rope = record + d_c + 4 * tiles;
  for (int64_t i = 0; i < d_r; ++i)
    row[d_c + i] = static_cast<S>(spec::to_float(spec::bf16{load<uint16_t>(rope, i)}));
}

template <class S>
void mla_cache_write(int64_t T, int64_t d_c, int64_t d_r, spec::KvFormat format, spec::DType dtype,
                     const S* c, const S* k_pe, const int32_t* slots, void* cache) {
  const int64_t row_bytes = spec::mla_cache_row_bytes(format, dtype, d_c, d_r);
  for (int64_t t = 0; t < T; ++t) {
    if (slots[t] < 0) continue;
    uint8_t* row = static_cast<uint8_t*>(cache) + slots[t] * row_bytes;
    if (format != spec::KvFormat::bf16) {
      kv_record_write(d_c, d_r, format, c + t * d_c, k_pe + t * d_r, row);
      continue;
    }
    for (int64_t i = 0; i < d_c + d_r; ++i) {
      const S v = i < d_c ? c[t * d_c + i] : k_pe[t * d_r + i - d_c];
      if (dtype == spec::DType::bf16)
        store(row, i, spec::to_bf16(static_cast<float>(v)).bits);
      else if (dtype == spec::DType::f32)
        store(row, i, static_cast<float>(v));
      else
        store(row, i, static_cast<double>(v));
    }
  }
}

template <class S>
void mla_cache_read(int64_t slot, int64_t d_c, int64_t d_r, spec::KvFormat format,
                    spec::DType dtype, const void* cache, S* row) {
  const uint8_t* p = static_cast<const uint8_t*>(cache) +
                     slot * spec::mla_cache_row_bytes(format, dtype, d_c, d_r);
  if (format != spec::KvFormat::bf16) return kv_record_read(d_c, d_r, p, row);
  for (int64_t i = 0; i < d_c + d_r; ++i) {
    if (dtype == spec::DType::bf16)
      row[i] = static_cast<S>(spec::to_float(spec::bf16{load<uint16_t>(p, i)}));
    else if (dtype == spec::DType::f32)
      row[i] = static_cast<S>(load<float>(p, i));
    else
      row[i] = static_cast<S>(load<double>(p, i));
  }
}

#define V3B_INSTANTIATE(S)                                                                 \
  template void kv_record_write<S>(int64_t, int64_t, spec::KvFormat, const S*, const S*,   \
                                   uint8_t*);                                              \
  template void kv_record_read<S>(int64_t, int64_t, const uint8_t*, S*);                   \
  template void mla_cache_write<S>(int64_t, int64_t, int64_t, spec::KvFormat, spec::DType, \
                                   const S*, const S*, const int32_t*, void*);             \
  template void mla_cache_read<S>(int64_t, int64_t, int64_t, spec::KvFormat, spec::DType,  \
                                  const void*, S*);
V3B_INSTANTIATE(float)
V3B_INSTANTIATE(double)

}  // namespace v3b::ref
