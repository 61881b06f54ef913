#include <array>
#include <bit>

#include "pack/blocks.h"
#include "pack/grid_points.h"

namespace llamaclust {
namespace {

uint16_t half_at(const uint8_t* p) {
  uint16_t half;
  memcpy(&half, p, 2);
  return half;
}

uint8_t nibble_at(const uint8_t* p, int i) { return p[i / 2] >> (i % 2 * 4) & 15; }

// Adds an eighth bit to seven sign bits, so that the number of set bits is even.
uint8_t with_parity(uint32_t seven) { return static_cast<uint8_t>(seven | (std::popcount(seven) & 1) << 7); }

// Returns the signs of eight weights: field i of four seven-bit fields in a word, whose upper bits hold a scale.
uint8_t signs_in(uint32_t word, int i) { return with_parity(word >> (7 * i) & 127); }

// The functions below write one row's part of the lines of a body, which are zero before.

// Writes the signs of columns 8i to 8i + 7 as two k-groups. A k-group has eight bytes, with four bits for each row.
void put_signs(uint8_t signs, int i, int row, uint8_t* lines) {
  for (int h = 0; h < 2; h++)
    lines[16 * i + 8 * h + row / 2] |= static_cast<uint8_t>((signs >> (4 * h) & 15) << (row % 2 * 4));
}

// Writes the same signs to a line of 32 columns. Each byte has one bit for each k-group (iq2_group in
// level/quants/grid.h).
void put_sign_bits(uint8_t signs, int i, int row, uint8_t* lines) {
  for (int c = 0; c < 8; c++) {
    const int g = i % 4 * 2 + c / 4, bit = 4 * (g % 2) + 2 * (1 - g / 2 % 2) + g / 4;
    lines[i / 4 * 64 + 4 * row + c % 4] |= static_cast<uint8_t>((signs >> c & 1) << bit);
  }
}

// Writes point index i. A line has four indices of each row.
void put_index(uint16_t index, int i, int row, uint8_t* lines) {
  lines[i / 4 * 64 + 4 * row + kIndexPlace[i % 4]] = static_cast<uint8_t>(index);
}

// Writes the four-bit scale i. A line has eight scales of each row.
void put_scale(int scale, int i, int row, uint8_t* lines) {
  lines[i / 8 * 64 + 4 * row + i % 4] |= static_cast<uint8_t>(scale << (i % 8 / 4 * 4));
}

// Returns the levels of a point's eight columns, one per byte, in the two lowest bits.
uint64_t levels_of(uint16_t point) {
  uint64_t levels = 0;
  for (int c = 0; c < 8; c++) levels |= static_cast<uint64_t>(level_of(point, 8, c)) << (8 * c);
  return levels;
}

// Returns words of 16 columns: bit pairs of k-groups 0, 2, 1 and 3, starting with the lowest pair of each byte.
// point(i) is the row's i-th point.
template <class PointOf>
std::array<uint32_t, 16> pairs_of_16(PointOf point) {
  std::array<uint32_t, 16> pairs;
  for (int j = 0; j < 16; j++) {
    const uint64_t first = levels_of(point(2 * j)), second = levels_of(point(2 * j + 1));
    const uint64_t both = first | second << 2;
    pairs[j] = static_cast<uint32_t>(both) | static_cast<uint32_t>(both >> 32) << 4;
  }
  return pairs;
}

// Returns words with bit pairs of one k-group in each of four sub-blocks of 32 columns, the first sub-block lowest.
template <class PointOf>
std::array<uint32_t, 16> pairs_of_128(PointOf point) {
  std::array<uint32_t, 16> pairs{};
  for (int i = 0; i < 32; i++) {
    const uint64_t levels = levels_of(point(i)) << (i % 16 / 4 * 2);
    uint32_t* two = &pairs[static_cast<size_t>(i / 16 * 8 + i % 4 * 2)];
    two[0] |= static_cast<uint32_t>(levels);
    two[1] |= static_cast<uint32_t>(levels >> 32);
  }
  return pairs;
}

// Writes a row into a tile of IQ2_S. The type of the file has the same three levels, and four-bit scales of 16 columns.
template <class PointOf, class SignsOf, class ScaleOf>
void put_iq2_s(PointOf point, SignsOf signs, ScaleOf scale, int row, uint8_t* body) {
  put_thirds(pairs_of_16(point), row, body);
  for (int j = 0; j < 16; j++) put_scale(scale(j), j, row, body + 1408);
  for (int i = 0; i < 32; i++) put_sign_bits(signs(i), i, row, body + 896);
}

}  // namespace

// File block: d; for each 32 columns four indices and a word with four times seven sign bits and a four-bit scale.
void pack_iq2_xxs(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int j = 0; j < 8; j++) {
    const uint8_t* part = block + 2 + 8 * j;
    const uint32_t word = word_at(part + 4);
    for (int i = 0; i < 4; i++) {
      put_index(part[i], 4 * j + i, row, body);
      put_sign_bits(signs_in(word, i), 4 * j + i, row, body + 512);
    }
    put_scale(word >> 28, j, row, body + 1024);
  }
  put_half(block, row, tail);
}

// File block: d; 32 words with nine bits of index and seven sign bits; 16 four-bit scales.
void pack_iq2_xs(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int i = 0; i < 32; i++) {
    const uint16_t code = half_at(block + 2 + 2 * i);
    put_index(code, i, row, body);
    body[512 + 4 * row + kIndexPlace[i % 4]] |= static_cast<uint8_t>((code >> 8 & 1) << i / 4);
    put_sign_bits(with_parity(code >> 9), i, row, body + 576);
  }
  for (int j = 0; j < 16; j++) put_scale(nibble_at(block + 66, j), j, row, body + 1088);
  put_half(block, row, tail);
}

// File block: d; 32 low bytes of indices; 32 bytes of signs; the two high bits of 32 indices; 16 four-bit scales.
void pack_iq2_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const auto high = [&](int i) { return block[66 + i / 4] >> (i % 4 * 2) & 3; };
  const auto point = [&](int i) { return kIQ2_SGrid.point[block[2 + i] | high(i) << 8]; };
  put_iq2_s(point, [&](int i) { return block[34 + i]; }, [&](int j) { return nibble_at(block + 74, j); }, row, body);
  put_half(block, row, tail);
}

void pack_iq2_xxs_as_iq2_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const auto part = [&](int i) { return block + 2 + i / 4 * 8; };
  const auto word = [&](int i) { return word_at(part(i) + 4); };
  put_iq2_s([&](int i) { return kIQ2_XXSGrid.point[part(i)[i % 4]]; },
            [&](int i) { return signs_in(word(i), i % 4); }, [&](int j) { return word(2 * j) >> 28; }, row, body);
  put_half(block, row, tail);
}

void pack_iq2_xs_as_iq2_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const auto code = [&](int i) { return half_at(block + 2 + 2 * i); };
  put_iq2_s([&](int i) { return kIQ2_XSGrid.point[code(i) & 511]; },
            [&](int i) { return with_parity(code(i) >> 9); }, [&](int j) { return nibble_at(block + 66, j); }, row, body);
  put_half(block, row, tail);
}

// File block: d; 64 indices; for each 32 columns a word with four times seven sign bits and a four-bit scale.
void pack_iq3_xxs(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int i = 0; i < 64; i++) put_index(block[2 + i], i, row, body);
  for (int i = 0; i < 32; i++) put_signs(signs_in(word_at(block + 66 + i / 4 * 4), i % 4), i, row, body + 1024);
  for (int j = 0; j < 8; j++) put_scale(block[66 + 4 * j + 3] >> 4, j, row, body + 1536);
  put_half(block, row, tail);
}

// File block: d; 64 low bytes of indices; their ninth bits; 32 bytes of signs; 8 four-bit scales.
void pack_iq3_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  for (int i = 0; i < 64; i++) {
    const uint16_t point = kIQ3_SGrid.point[block[2 + i] | (block[66 + i / 8] >> (i % 8) & 1) << 8];
    const int signs = nibble_at(block + 74, i), g = i % 8;
    uint8_t* line = body + i / 8 * 256 + g % 4 * 64 + 4 * row;
    for (int c = 0; c < 4; c++) {
      const int level = level_of(point, 4, c);
      line[c] |= static_cast<uint8_t>((signs >> c & 1 ? 7 - level : 8 + level) << (g / 4 * 4));
    }
  }
  for (int j = 0; j < 8; j++) put_scale(nibble_at(block + 106, j), j, row, body + 2048);
  put_half(block, row, tail);
}

// File block: d; 32 low bytes of indices; for each 32 columns a 16-bit word with the three high bits of four indices, a
// three-bit scale, and a bit that is set if the shift of the weights is -1 instead of +1.
void pack_iq1_s(const uint8_t* block, int row, uint8_t* body, uint8_t* tail) {
  const auto half = [&](int j) { return half_at(block + 34 + 2 * j); };
  const auto point = [&](int i) { return kIQ1Grid.point[block[2 + i] | (half(i / 4) >> (i % 4 * 3) & 7) << 8]; };
  put_thirds(pairs_of_128(point), row, body);
  for (int j = 0; j < 8; j++) put_scale(half(j) >> 12 ^ 8, j, row, body + 896);
  put_half(block, row, tail);
}

// File block: 32 low bytes of indices; 32 nibbles with the three high bits of an index and a bit that is set if the
// shift is -1; four 16-bit words, each with four three-bit scales and four bits of d.
void pack_iq1_m(const uint8_t* block, int row, uint8_t* body, uint8_t*) {
  const auto high = [&](int i) { return nibble_at(block + 32, i); };
  const auto point = [&](int i) { return kIQ1Grid.point[block[i] | (high(i) & 7) << 8]; };
  int second_up = 0, d = 0;
  put_thirds(pairs_of_16(point), row, body);
  for (int j = 0; j < 16; j++) {
    const int scale = half_at(block + 48 + j / 4 * 2) >> (j % 4 * 3) & 7;
    put_scale(scale | (~high(2 * j) & 8), j, row, body + 896);
    second_up |= (~high(2 * j + 1) >> 3 & 1) << j;
  }
  for (int i = 0; i < 4; i++) d |= half_at(block + 48 + 2 * i) >> 12 << (4 * i);
  const uint16_t halves[2] = {static_cast<uint16_t>(second_up), static_cast<uint16_t>(d)};
  memcpy(body + 1024 + 2 * row, halves, 2);
  memcpy(body + 1056 + 2 * row, halves + 1, 2);
}

}  // namespace llamaclust
