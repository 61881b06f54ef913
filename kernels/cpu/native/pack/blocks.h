// What the packers of single quant types share: each takes the same segment of sixteen rows as it is in a model file and
// writes body and tail of the tile's segment (matrix.h). The bit layouts of tiles are told in level/quants/.
#pragma once

#include <cstring>

#include "level/matrix.h"

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

// The five-bit quants of eight k-groups of one row, in five lines (level/quants/fields.h says how).
void put_five_bits(const uint32_t (&groups)[8], uint8_t* lines);

// Types of one or two scales a segment, in simple.cpp.
void pack_32_bits(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_16_bits(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q4_0(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q4_1(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q5_0(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q5_1(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q8_0(const Blocks& blocks, uint8_t* body, uint8_t* tail);

// Types with scales of sub-blocks, in k.cpp.
void pack_q2_k(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q3_k(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q4_k(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q5_k(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_q6_k(const Blocks& blocks, uint8_t* body, uint8_t* tail);

// Types whose nibbles are places in a table, in table.cpp.
void pack_iq4_xs(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_mxfp4(const Blocks& blocks, uint8_t* body, uint8_t* tail);

// Types of three values, in ternary.cpp.
void pack_tq2_0(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_tq1_0(const Blocks& blocks, uint8_t* body, uint8_t* tail);

// Types whose weights are points of a grid, in grid.cpp.
void pack_iq2_xxs(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq2_xs(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq2_s(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq3_xxs(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq3_s(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq1_s(const Blocks& blocks, uint8_t* body, uint8_t* tail);
void pack_iq1_m(const Blocks& blocks, uint8_t* body, uint8_t* tail);

}  // namespace llamaclust
