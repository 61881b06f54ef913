#include "pack/blocks.h"

namespace llamaclust {
namespace {

// Quants of 256 columns of one row, below four, in sixteen lines (level/quants/ternary.h).
void put_pairs(const uint8_t (&quants)[256], uint8_t* lines) {
  for (int j = 0; j < 8; j++)
    for (int i = 0; i < 2; i++) {
      uint32_t word = 0;
      for (int k = 0; k < 4; k++) word |= word_at(quants + 32 * j + 8 * k + 4 * i) << (2 * k);
      put_word(word, lines + 128 * j + 64 * i);
    }
}

// File: 128 columns in 32 bytes, the first 32 in the lowest two bits; d.
void pack_tq2_0_row(const uint8_t* block, uint8_t* lines) {
  uint8_t quants[256];
  for (int i = 0; i < 256; i++) quants[i] = block[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
  put_pairs(quants, lines);
}

// Digits to base three of `count` bytes, the highest of each first: a byte is a fraction of 256.
uint8_t* put_digits(const uint8_t* bytes, int count, int digits, uint8_t* out) {
  for (int power = 1; digits > 0; digits--, power *= 3)
    for (int i = 0; i < count; i++) *out++ = static_cast<uint8_t>((bytes[i] * power & 255) * 3 >> 8);
  return out;
}

// File: 160 columns in 32 bytes, 80 in 16, 16 in 4; d.
void pack_tq1_0_row(const uint8_t* block, uint8_t* lines) {
  uint8_t quants[256];
  uint8_t* next = put_digits(block, 32, 5, quants);
  next = put_digits(block + 32, 16, 5, next);
  put_digits(block + 48, 4, 4, next);
  put_pairs(quants, lines);
}

}  // namespace

void pack_tq2_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int r = 0; r < kTileRows; r++) pack_tq2_0_row(blocks.row[r], body + 4 * r);
  put_half(blocks, 64, tail);
}

void pack_tq1_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int r = 0; r < kTileRows; r++) pack_tq1_0_row(blocks.row[r], body + 4 * r);
  put_half(blocks, 52, tail);
}

}  // namespace llamaclust
