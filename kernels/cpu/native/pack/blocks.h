// What the packers of single quant types share: each takes the same segment of sixteen rows as it is in a model file and
// writes tail and body of the tile's segment, whose body is zero before (level/quant_types.h). level/quants/ defines the
// bit layouts of tiles.
#pragma once

#include <cstring>

#include "level/quant_types.h"

namespace llamaclust {

// The same segment of sixteen rows, as in a model file.
struct Blocks {
  const uint8_t* row[kTileRows];
};

// Four bytes of every row, from `offset` on, become a k-group.
inline void put_group(const Blocks& blocks, int offset, uint8_t* out) {
  for (int r = 0; r < kTileRows; r++) memcpy(out + 4 * r, blocks.row[r] + offset, 4);
}

inline void put_half(const Blocks& blocks, int offset, uint8_t* out) {
  for (int r = 0; r < kTileRows; r++) memcpy(out + 2 * r, blocks.row[r] + offset, 2);
}

// Four quants of a row as one word, and back.
inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
inline void put_word(uint32_t word, uint8_t* out) { memcpy(out, &word, 4); }

constexpr uint32_t kLowHalves = 0x0f0f0f0f, kLowTriples = 0x07070707, kLowPairs = 0x03030303, kLowBits = 0x01010101;

// The five-bit quants of eight k-groups of one row, in five lines (five_bit_group of level/quants/decoder.h).
void put_five_bits(const uint32_t (&groups)[8], uint8_t* lines);

// One for each name of a packer in the table: simple.cpp, k.cpp, ternary.cpp, grid.cpp.
#define DECLARE(name, number, cols, file_bytes, tail_bytes, extra, packer) \
  void pack_##packer(const Blocks& blocks, uint8_t* body, uint8_t* tail);
LLAMACLUST_QUANT_TYPES(DECLARE)
#undef DECLARE

}  // namespace llamaclust
