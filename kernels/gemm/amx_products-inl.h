// What the AMX files of this folder share: sums in tiles 0 to 3, activations or weights in the others. Everything in an
// anonymous namespace on purpose (kernels/core/amx.h).
#pragma once
#include <cstdint>

#include "kernels/core/amx.h"

#if defined(V3B_AMX_EMULATE) || defined(__AMX_TILE__)
namespace v3b::kern {
namespace {

struct Sums {
  alignas(64) float tile[4][16 * 16];
};

inline void zero_sums() noexcept {
  amx::zero<0>();
  amx::zero<1>();
  amx::zero<2>();
  amx::zero<3>();
}
inline void store_sums(Sums& s) noexcept {
  amx::store<0>(s.tile[0], 64);
  amx::store<1>(s.tile[1], 64);
  amx::store<2>(s.tile[2], 64);
  amx::store<3>(s.tile[3], 64);
}

// One of the two row tiles (4 and 5): its first 16 steps, and how many dwords further each next 16 lie.
struct RowTile {
  const uint32_t* at;
  int64_t next;
};
// s.tile[2p + q] = row tile p times lanes q over `steps`. Rows lie `stride` bytes apart, steps of lanes (tiles 6 and 7) one
// behind the other.
inline void product_2x2(RowTile p0, RowTile p1, int64_t stride, const uint32_t* q0,
                        const uint32_t* q1, int64_t steps, Sums& s) noexcept {
  zero_sums();
  for (int64_t k = 0; k < steps; k += 16) {
    amx::load<6>(q0 + k * 16, 64);
    amx::load<4>(p0.at, stride);
    amx::dpbf16<0, 4, 6>();
    amx::load<7>(q1 + k * 16, 64);
    amx::dpbf16<1, 4, 7>();
    amx::load<5>(p1.at, stride);
    amx::dpbf16<2, 5, 6>();
    amx::dpbf16<3, 5, 7>();
    p0.at += p0.next, p1.at += p1.next;
  }
  store_sums(s);
}

}  // namespace
}  // namespace v3b::kern
#endif
