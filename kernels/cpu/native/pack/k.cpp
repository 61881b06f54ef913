// Packers of weights in blocks of 256 columns whose tiles hold the quants themselves.
#include "pack/blocks.h"

namespace llamaclust {
namespace {

// Returns the bit pairs of the four k-groups of sub-block j (16 columns). The file has 32 bytes for each 128 columns,
// with the first 32 columns in the lowest pairs.
void bit_pairs(const uint8_t* quants, int j, uint32_t (&groups)[4]) {
  const uint8_t* source = quants + j / 8 * 32 + j % 2 * 16;
  for (int g = 0; g < 4; g++) groups[g] = word_at(source + 4 * g) >> (j % 8 / 2 * 2) & kLowPairs;
}

// Sixteen six-bit scales. File: eight bytes with the low four bits of scales 0-7 and 8-15; then four bytes, whose bit
// pairs, from the lowest to the highest, are the upper bits of scales 0-3, 4-7, 8-11 and 12-15.
void pack_q3_k_scales(const uint8_t* packed, int row, uint8_t* out) {
  const uint32_t first = word_at(packed), second = word_at(packed + 4), high = word_at(packed + 8);
  const uint32_t low[4] = {first & kLowHalves, second & kLowHalves, first >> 4 & kLowHalves, second >> 4 & kLowHalves};
  const uint32_t last = low[3] | (high >> 6 & kLowPairs) << 4;
  for (int i = 0; i < 3; i++) {
    const uint32_t scales = low[i] | (high >> (2 * i) & kLowPairs) << 4;
    put_word(scales | (last >> (2 * i) & kLowPairs) << 6, row, out + 64 * i);
  }
}

// Eight scales and eight mins of six bits: twelve bytes in the file, three lines in the tile.
void pack_six_bit_scales(const uint8_t* packed, int row, uint8_t* out) {
  uint8_t* lines = out + 4 * row;
  for (int j = 0; j < 4; j++) {
    const int scale = packed[j] & 63, min = packed[j + 4] & 63;
    const int late_scale = (packed[j + 8] & 15) | packed[j] >> 6 << 4;
    const int late_min = packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4;
    lines[j] = static_cast<uint8_t>(scale | (late_min & 3) << 6);
    lines[64 + j] = static_cast<uint8_t>(late_scale | (late_min >> 2 & 3) << 6);
    lines[128 + j] = static_cast<uint8_t>(min | late_min >> 4 << 6);
  }
}

// Returns the quants of columns 4 * group to 4 * group + 3. File block: for each 128 columns 64 bytes of low nibbles;
// for each 128 columns 32 bytes of high bit pairs; 16 signed scales; d.
uint32_t q6_k_group(const uint8_t* block, int group) {
  const int half = group / 32, quarter = group % 32 / 8, i = group % 8 * 4;
  const uint32_t low = word_at(block + 64 * half + 32 * (quarter % 2) + i) >> (quarter / 2 * 4);
  const uint32_t high = word_at(block + 128 + 32 * half + i) >> (2 * quarter);
  return (low & kLowHalves) | (high & kLowPairs) << 4;
}

// Returns word i (0 to 15) of 256 two-bit quants. Its lowest bit pairs are four columns, the first of which is 128 * (i
// / 8) + 4 * (i % 8); the higher pairs are those 32, 64 and 96 columns further on.
uint32_t four_pairs(const uint8_t (&quants)[256], int i) {
  uint32_t word = 0;
  for (int k = 0; k < 4; k++) word |= word_at(quants + i / 8 * 128 + 32 * k + i % 8 * 4) << (2 * k);
  return word;
}

// Writes the base-3 digits of `count` bytes, the highest digit of all bytes first. A byte is a fraction of 256. Returns
// the end of the output.
uint8_t* put_digits(const uint8_t* bytes, int count, int digits, uint8_t* out) {
  for (int power = 1; digits > 0; digits--, power *= 3)
    for (int i = 0; i < count; i++) *out++ = static_cast<uint8_t>((bytes[i] * power & 255) * 3 >> 8);
  return out;
}

// Returns the 16 words (four_pairs) of a block of base-3 digits: 160 columns in 32 bytes, 80 in 16, and 16 in 4.
std::array<uint32_t, 16> pairs_of_digits(const uint8_t* block) {
  uint8_t quants[256];
  uint8_t* next = put_digits(block, 32, 5, quants);
  next = put_digits(block + 32, 16, 5, next);
  put_digits(block + 48, 4, 4, next);
  std::array<uint32_t, 16> pairs;
  for (int i = 0; i < 16; i++) pairs[static_cast<size_t>(i)] = four_pairs(quants, i);
  return pairs;
}

}  // namespace

void put_three_bits(const uint32_t (&groups)[8], int row, uint8_t* lines) {
  const auto& q = groups;
  put_word(q[0] | q[1] << 3 | (q[6] & kLowPairs) << 6, row, lines);
  put_word(q[2] | q[3] << 3 | (q[7] & kLowPairs) << 6, row, lines + 64);
  put_word(q[4] | q[5] << 3 | (q[6] >> 2 & kLowBits) << 6 | (q[7] >> 2 & kLowBits) << 7, row, lines + 128);
}

// File block: 16 bytes with a scale in the low and a min in the high four bits; bit pairs; d; dmin.
void pack_q2_k(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  uint32_t lines[16] = {};
  for (int j = 0; j < 16; j++) {
    uint32_t q[4];
    bit_pairs(block + 16, j, q);
    for (int g = 0; g < 4; g++) lines[j / 4 * 4 + g] |= q[g] << (j % 4 * 2);
  }
  for (int i = 0; i < 16; i++) put_word(lines[i], row, body + 64 * i);
  put_groups(block, 4, row, body + 1024);
  put_half(block + 80, row, tail);
  put_half(block + 82, row, tail + 32);
}

// File block: 32 bytes of third bits, with bit i for columns 32i to 32i + 31; bit pairs; scales; d.
void pack_q3_k(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int pair = 0; pair < 8; pair++) {
    uint32_t q[8];
    for (int j = 0; j < 2; j++) {
      uint32_t low[4];
      bit_pairs(block + 32, 2 * pair + j, low);
      for (int g = 0; g < 4; g++)
        q[4 * j + g] = low[g] | (word_at(block + 16 * j + 4 * g) >> pair & kLowBits) << 2;
    }
    put_three_bits(q, row, body + 192 * pair);
  }
  pack_q3_k_scales(block + 96, row, body + 1536);
  put_half(block + 108, row, tail);
}

// File block: d; dmin; scales and mins; 32 bytes for each 64 columns, with the first 32 columns in the low nibbles.
void pack_q4_k(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int j = 0; j < 8; j++)
    for (int g = 0; g < 4; g++) {
      const uint8_t* source = block + 16 + j / 2 * 32 + 4 * g;
      const uint32_t first = word_at(source) >> (j % 2 * 4), second = word_at(source + 16) >> (j % 2 * 4);
      put_word((first & kLowHalves) | (second & kLowHalves) << 4, row, body + 256 * j + 64 * g);
    }
  pack_six_bit_scales(block + 4, row, body + 2048);
  put_half(block, row, tail);
  put_half(block + 2, row, tail + 32);
}

// File block: that of Q4_K, with 32 bytes of fifth bits before the nibbles. Bit j belongs to sub-block j.
void pack_q5_k(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const uint8_t *high = block + 16, *low = block + 48;
  for (int j = 0; j < 8; j++) {
    uint32_t groups[8];
    for (int g = 0; g < 8; g++)
      groups[g] = (word_at(low + j / 2 * 32 + 4 * g) >> (j % 2 * 4) & kLowHalves) |
                  (word_at(high + 4 * g) >> j & kLowBits) << 4;
    put_five_bits(groups, row, body + 320 * j);
  }
  pack_six_bit_scales(block + 4, row, body + 2560);
  put_half(block, row, tail);
  put_half(block + 2, row, tail + 32);
}

// Tile: for each sub-block of 16 columns two lines of nibbles (k-groups 0 and 2, 1 and 3) and one of bit pairs
// (k-groups 0 to 3); then the scales, those of sub-blocks 4i to 4i + 3 as k-group i.
void pack_q6_k(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int j = 0; j < 16; j++) {
    uint32_t low[4], high[4];
    for (int g = 0; g < 4; g++) {
      const uint32_t group = q6_k_group(block, 4 * j + g);
      low[g] = group & kLowHalves;
      high[g] = group >> 4 & kLowPairs;
    }
    uint8_t* out = body + 192 * j;
    put_word(low[0] | low[2] << 4, row, out);
    put_word(low[1] | low[3] << 4, row, out + 64);
    put_word(high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6, row, out + 128);
  }
  put_groups(block + 192, 4, row, body + 3072);
  put_half(block + 208, row, tail);
}

// File block: d; the upper two bits of eight scales; their lower four bits; nibbles, 16 bytes for each 32 columns.
// Scales have an offset of 32.
void pack_iq4_xs(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  put_groups(block + 8, 32, row, body);
  for (int j = 0; j < 8; j++) {
    const int low = block[4 + j / 2] >> (j % 2 * 4) & 15, high = block[2 + j / 4] >> (j % 4 * 2) & 3;
    body[2048 + 64 * (j / 4) + 4 * row + j % 4] = static_cast<uint8_t>((low | high << 4) - 32);
  }
  put_half(block, row, tail);
}

// File block: 32 bytes for each 128 columns, with the first 32 columns in the lowest bit pairs; d.
void pack_tq2_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  uint8_t quants[256];
  for (int i = 0; i < 256; i++) quants[i] = block[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2) & 3;
  for (int i = 0; i < 16; i++) put_word(four_pairs(quants, i), row, body + 64 * i);
  put_half(block + 64, row, tail);
}

// File block: base-3 digits of 160 columns in 32 bytes, of 80 in 16 and of 16 in 4; d.
void pack_tq1_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  put_thirds(pairs_of_digits(block), row, body);
  put_half(block + 52, row, tail);
}

void pack_tq1_0_as_tq2_0(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const std::array<uint32_t, 16> pairs = pairs_of_digits(block);
  for (int i = 0; i < 16; i++) put_word(pairs[static_cast<size_t>(i)], row, body + 64 * i);
  put_half(block + 52, row, tail);
}

}  // namespace llamaclust
