// AMX tiles for the files whose names contain "amx" (hermetic: include this, intrinsics, and plain structs only).
// Each such file is compiled twice: for AMX, and with V3B_AMX_EMULATE on arrays, so that its arithmetic is checked on
// machines without AMX (V3BENCH_AMX=emulate, `check` and tests only; it needs AVX512_BF16). Entry points are named
// V3B_AMX_ENTRY(name): `name` in the first, `name_emulated` in the second; callers pick with V3B_AMX_CALL(name).
// Tile t: rows[t] rows of bytes[t] bytes. dpbf16<C, A, B>: C[m][n] (f32) += A[m][2k] B[k][2n] + A[m][2k+1] B[k][2n+1],
// A and B bf16 (Intel SDM, TDPBF16PS); a tile not loaded since configure() is zero.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef V3B_AMX_EMULATE
#define V3B_AMX_ENTRY(name) name##_emulated
#else
#include <immintrin.h>
#define V3B_AMX_ENTRY(name) name
#endif
#define V3B_AMX_CALL(name) (::v3b::kern::cpu_features().amx_emulated ? name##_emulated : name)

#if defined(V3B_AMX_EMULATE) || defined(__AMX_TILE__)
namespace v3b::kern {
namespace {
namespace amx {

// The 64 bytes of LDTILECFG.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
  void tile(int t, int row_count, int row_bytes) {
    rows[t] = static_cast<uint8_t>(row_count);
    bytes[t] = static_cast<uint16_t>(row_bytes);
  }
};
static_assert(sizeof(Config) == 64);

#ifdef V3B_AMX_EMULATE
struct State {
  Config config;
  bool configured = false;
  alignas(64) uint8_t tile[8][16 * 64];
};
thread_local State state;

inline void configure(const Config& c) {
  state.config = c;
  state.configured = true;
  std::memset(state.tile, 0, sizeof state.tile);
}
inline void release() { state.configured = false; }
template <int T>
void zero() {
  std::memset(state.tile[T], state.configured ? 0 : 0xff,
              16 * 64);  // not configured: a fault on hardware, NaN here
}
template <int T>
void load(const void* p, int64_t stride) {
  zero<T>();
  for (int r = 0; r < state.config.rows[T]; ++r)
    std::memcpy(state.tile[T] + 64 * r, static_cast<const uint8_t*>(p) + r * stride,
                state.config.bytes[T]);
}
template <int T>
void load_stream(const void* p, int64_t stride) {
  load<T>(p, stride);
}
template <int T>
void store(void* p, int64_t stride) {
  for (int r = 0; r < state.config.rows[T]; ++r)
    std::memcpy(static_cast<uint8_t*>(p) + r * stride, state.tile[T] + 64 * r,
                state.config.bytes[T]);
}
template <int C, int A, int B>
void dpbf16() {
  const Config& c = state.config;
  const int pairs = c.bytes[A] / 4;
  if (c.rows[B] != pairs || c.rows[C] != c.rows[A] || c.bytes[C] != c.bytes[B] ||
      !state.configured) {
    std::memset(state.tile[C], 0xff, 16 * 64);  // a fault on hardware, NaN here
    return;
  }
  const auto value = [](const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, 2);
    const uint32_t w = static_cast<uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &w, 4);
    return f;
  };
  for (int m = 0; m < c.rows[C]; ++m)
    for (int k = 0; k < pairs; ++k) {
      const float a0 = value(state.tile[A] + 64 * m + 4 * k),
                  a1 = value(state.tile[A] + 64 * m + 4 * k + 2);
      for (int n = 0; n < c.bytes[C] / 4; ++n) {
        float sum;
        uint8_t* to = state.tile[C] + 64 * m + 4 * n;
        std::memcpy(&sum, to, 4);
        sum += a0 * value(state.tile[B] + 64 * k + 4 * n);
        sum += a1 * value(state.tile[B] + 64 * k + 4 * n + 2);
        std::memcpy(to, &sum, 4);
      }
    }
}
#else
// The operand is the whole struct: GCC 12's _tile_loadconfig declares only 8 of the 64 bytes as read, and the
// optimiser drops the stores that fill it.
inline void configure(const Config& c) { __asm__ volatile("ldtilecfg %0" ::"m"(c)); }
// The register's number is an immediate operand: GCC 12's intrinsics paste the text of their argument into the
// instruction, which a template parameter is not, and do not say that they read and write memory.
inline void release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
inline void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
inline void load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void load_stream(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
inline void store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
inline void dpbf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
#endif

}  // namespace amx
}  // namespace
}  // namespace v3b::kern
#endif
