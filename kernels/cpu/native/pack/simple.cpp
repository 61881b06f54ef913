#include "pack/blocks.h"

namespace llamaclust {
namespace {

// Four bits, the first of them lowest, to the lowest bits of four bytes.
uint32_t spread(uint32_t bits) { return (bits & 1) | (bits & 2) << 7 | (bits & 4) << 14 | (bits & 8) << 21; }

// File: the fifth bits of 32 columns, a bit each, then 16 bytes of halves as in Q4_0.
void pack_five_bits(const Blocks& blocks, int offset, uint8_t* body) {
  for (int r = 0; r < kTileRows; r++) {
    const uint8_t* packed = blocks.row[r] + offset;
    const uint32_t high = word_at(packed);
    uint32_t groups[8];
    for (int g = 0; g < 8; g++) {
      const uint32_t low = word_at(packed + 4 + 4 * (g % 4)) >> (g / 4 * 4) & kLowHalves;
      groups[g] = low | spread(high >> (4 * g)) << 4;
    }
    put_five_bits(groups, body + 4 * r);
  }
}

}  // namespace

void put_five_bits(const uint32_t (&groups)[8], uint8_t* lines) {
  for (int i = 0; i < 3; i++) put_word(groups[i] | (groups[5 + i] & kLowTriples) << 5, lines + 64 * i);
  const uint32_t of_five = groups[5] >> 3 & kLowPairs, of_six = groups[6] >> 3 & kLowPairs;
  put_word(groups[3] | of_five << 5 | (groups[7] >> 3 & kLowBits) << 7, lines + 192);
  put_word(groups[4] | of_six << 5 | (groups[7] >> 4 & kLowBits) << 7, lines + 256);
}

void pack_32_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_group(blocks, 0, body); }
void pack_16_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_half(blocks, 0, body); }

void pack_q4_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
}

void pack_q4_1(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 4 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
  put_half(blocks, 2, tail + 32);
}

void pack_q5_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  pack_five_bits(blocks, 2, body);
  put_half(blocks, 0, tail);
}

void pack_q5_1(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  pack_five_bits(blocks, 4, body);
  put_half(blocks, 0, tail);
  put_half(blocks, 2, tail + 32);
}

// Quants are stored plus 128.
void pack_q8_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 8; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  for (int i = 0; i < 512; i++) body[i] ^= 0x80;
  put_half(blocks, 0, tail);
}

// File: an exponent byte, then nibbles.
void pack_mxfp4(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 1 + 4 * g, body + 64 * g);
  for (int r = 0; r < kTileRows; r++) tail[r] = blocks.row[r][0];
}

}  // namespace llamaclust
