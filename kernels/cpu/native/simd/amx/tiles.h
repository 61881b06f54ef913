// AMX tile registers of up to 16 rows of 64 bytes, and products of byte tiles (Intel's manual, volume 1, chapter 18).
#pragma once

#include <cstdint>

#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// The memory operand of LDTILECFG.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Configures the tiles of the calling thread during its lifetime: 0 to 3 are 16 x 16 sums, 4 and 5 activations of 16
// tokens, and 6 and 7 `k_groups` k-groups. Afterwards the system has no tiles to save at a task switch.
template <int k_groups>
class TileShapes {
 public:
  INLINE TileShapes() {
    constexpr TileConfig config{
        1, 0, {}, {64, 64, 64, 64, 4 * k_groups, 4 * k_groups, 64, 64}, {16, 16, 16, 16, 16, 16, k_groups, k_groups}};
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
  }
  INLINE ~TileShapes() { __asm__ volatile("tilerelease"); }
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;
};

// Load and store rows that are `stride` bytes apart.
template <int tile>
INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(p), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// Adds to sum [m, n] the products of signed bytes, four for each row k of `b`: bytes 4k to 4k + 3 of row m of `a` times
// bytes 4n to 4n + 3 of row k of `b`.
template <int sums, int a, int b>
INLINE void tile_dot() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(a), "i"(b));
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
