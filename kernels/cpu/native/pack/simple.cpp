#include "pack/blocks.h"

namespace llamaclust {
namespace {

// Moves four bits, the first of which is the lowest, to the lowest bits of the four bytes of a word.
uint32_t spread(uint32_t bits) { return (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21; }

// File: a word with the fifth bits of 32 columns; then 16 bytes of nibbles as in Q4_0.
void pack_five_bits(const uint8_t* packed, int row, uint8_t* body) {
  const uint32_t high = word_at(packed);
  uint32_t groups[8];
  for (int g = 0; g < 8; g++) {
    const uint32_t low = word_at(packed + 4 + 4 * (g % 4)) >> (g / 4 * 4) & kLowHalves;
    groups[g] = low | spread(high >> (4 * g)) << 4;
  }
  put_five_bits(groups, row, body);
}

}  // namespace

void put_five_bits(const uint32_t (&groups)[8], int row, uint8_t* lines) {
  for (int i = 0; i < 3; i++) put_word(groups[i] | (groups[5 + i] & kLowTriples) << 5, row, lines + 64 * i);
  const uint32_t of_five = groups[5] >> 3 & kLowPairs, of_six = groups[6] >> 3 & kLowPairs;
  put_word(groups[3] | of_five << 5 | (groups[7] >> 3 & kLowBits) << 7, row, lines + 192);
  put_word(groups[4] | of_six << 5 | (groups[7] >> 4 & kLowBits) << 7, row, lines + 256);
}

void pack_q4_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  put_groups(block + 2, 4, row, body);
  put_half(block, row, tail);
}

void pack_q4_1(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  put_groups(block + 4, 4, row, body);
  put_half(block, row, tail);
  put_half(block + 2, row, tail + 32);
}

void pack_q5_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  pack_five_bits(block + 2, row, body);
  put_half(block, row, tail);
}

void pack_q5_1(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  pack_five_bits(block + 4, row, body);
  put_half(block, row, tail);
  put_half(block + 2, row, tail + 32);
}

// Quants are stored with an offset of 128.
void pack_q8_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 8; g++) put_word(word_at(block + 2 + 4 * g) ^ 0x80808080, row, body + 64 * g);
  put_half(block, row, tail);
}

// File block: an exponent byte; nibbles.
void pack_mxfp4(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  put_groups(block + 1, 4, row, body);
  tail[row] = block[0];
}

}  // namespace llamaclust
