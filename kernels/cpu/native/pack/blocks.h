// Shared code of the packers of the quant types. A packer writes one row's part of a segment of a tile: the body, which
// is zero before, and the tail (level/quant_types.h). Its input is the row's segment as a model file has it.
// level/quants/ defines the bit layouts of tiles.
#pragma once

#include <array>
#include <cstring>

#include "level/quant_types.h"

namespace llamaclust {

// Read four quants of a row as a word, and write a word to the row's place in a k-group.
inline uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
inline void put_word(uint32_t word, int row, uint8_t* out) { memcpy(out + 4 * row, &word, 4); }

// Writes `count` k-groups of a row, each to a line of its own.
inline void put_groups(const uint8_t* from, int count, int row, uint8_t* lines) {
  for (int g = 0; g < count; g++) put_word(word_at(from + 4 * g), row, lines + 64 * g);
}

inline void put_half(const uint8_t* from, int row, uint8_t* out) { memcpy(out + 2 * row, from, 2); }

constexpr uint32_t kLowHalves = 0x0f0f0f0f, kLowTriples = 0x07070707, kLowPairs = 0x03030303, kLowBits = 0x01010101;

// Writes the three-bit quants of eight k-groups of a row to three lines (three_bit_group in level/quants/decoder.h).
void put_three_bits(const uint32_t (&groups)[8], int row, uint8_t* lines);

// Writes levels (0, 1 or 2) of a row, given as bit pairs: a word has four columns of four k-groups
// (level/quants/thirds.h).
void put_thirds(const std::array<uint32_t, 16>& pairs, int row, uint8_t* lines);

// Writes the five-bit quants of eight k-groups of a row to five lines (five_bit_group in level/quants/decoder.h).
void put_five_bits(const uint32_t (&groups)[8], int row, uint8_t* lines);

// One packer for each packer name in the table. They are in simple.cpp, k.cpp and grid.cpp; those of float types in
// pack.cpp.
#define DECLARE(name, number, cols, file_bytes, tail_bytes, extra, packer) \
  void pack_##packer(const uint8_t* block, int row, uint8_t* body, uint8_t* tail);
LLAMACLUST_QUANT_TYPES(DECLARE)
#undef DECLARE

// Packers into tiles of another type.
void pack_iq2_xxs_as_iq2_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail);
void pack_iq2_xs_as_iq2_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail);
void pack_tq1_0_as_tq2_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail);

}  // namespace llamaclust
