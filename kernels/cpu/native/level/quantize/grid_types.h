// Types whose weights are points of a grid, as files hold them.
#pragma once

#include "level/quantize/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#define THIRDS {1, 3.125f, 5.375f}
#define EIGHTHS {1, 3, 5, 7, 9, 11, 13, 15}
constexpr GridType kIQ2_XXS = {8, 3, THIRDS, 32, 15, Signs::Even, 0, 1, 3.6f, 0.4f, 12};
constexpr GridType kIQ2_XS = {8, 3, THIRDS, 16, 15, Signs::Even, 0, 1, 3.2f, 0.4f, 12};
constexpr GridType kIQ2_S = {8, 3, THIRDS, 16, 15, Signs::Any, 0, 1, 3.2f, 0.4f, 12};
constexpr GridType kIQ3_XXS = {4, 8, {1, 3, 5, 7, 9, 11, 13, 15.5f}, 32, 15, Signs::Even, 0, 1, 11, 0.7f, 14};
constexpr GridType kIQ3_S = {4, 8, EIGHTHS, 32, 15, Signs::Any, 0, 1, 11, 0.7f, 14};
constexpr GridType kIQ1_S = {8, 3, {-1, 0, 1}, 32, 7, Signs::None, 0.125f, 4, 1.1f, 0.3f, 7};
constexpr GridType kIQ1_M = {8, 3, {-1, 0, 1}, 16, 7, Signs::None, 0.125f, 1, 1.0f, 0.3f, 6};
#undef THIRDS
#undef EIGHTHS

template <const GridType& type, typename Put>
void each_grid_block(const Source& from, Put put) {
  const GridSearch<type> search{*from.near};
  for (int64_t first = 0; first < from.count; first += 256) {
    GridBlock block;
    search.block(from.x + first, from.w + first, &block);
    put(block);
  }
}

[[maybe_unused]] int scale_of(const GridBlock& block, int j) { return (static_cast<int>(block.multiple[j]) - 1) / 2; }

[[maybe_unused]] void put_scale_nibbles(const GridBlock& block, int count, uint8_t* out) {
  for (int j = 0; j < count; j += 2)
    out[j / 2] = static_cast<uint8_t>(scale_of(block, j) | scale_of(block, j + 1) << 4);
}

// Four times seven signs, and a scale above them.
[[maybe_unused]] void put_signs_and_scale(const GridBlock& block, int j, uint8_t* out) {
  uint32_t word = static_cast<uint32_t>(scale_of(block, j)) << 28;
  for (int i = 0; i < 4; i++) word |= (block.signs[4 * j + i] & 127u) << (7 * i);
  memcpy(out, &word, 4);
}

[[maybe_unused]] void quantize_iq2_xxs(const Source& from, uint8_t* out) {
  each_grid_block<kIQ2_XXS>(from, [&](GridBlock& block) {
    memcpy(out, &block.d, 2);
    for (int j = 0; j < 8; j++) {
      for (int i = 0; i < 4; i++) out[2 + 8 * j + i] = static_cast<uint8_t>(block.index[4 * j + i]);
      put_signs_and_scale(block, j, out + 6 + 8 * j);
    }
    out += 66;
  });
}

[[maybe_unused]] void quantize_iq2_xs(const Source& from, uint8_t* out) {
  each_grid_block<kIQ2_XS>(from, [&](GridBlock& block) {
    memcpy(out, &block.d, 2);
    for (int i = 0; i < 32; i++) {
      const uint16_t code = static_cast<uint16_t>(block.index[i] | (block.signs[i] & 127) << 9);
      memcpy(out + 2 + 2 * i, &code, 2);
    }
    put_scale_nibbles(block, 16, out + 66);
    out += 74;
  });
}

[[maybe_unused]] void quantize_iq2_s(const Source& from, uint8_t* out) {
  each_grid_block<kIQ2_S>(from, [&](GridBlock& block) {
    memset(out, 0, 82);
    memcpy(out, &block.d, 2);
    for (int i = 0; i < 32; i++) {
      out[2 + i] = static_cast<uint8_t>(block.index[i]);
      out[34 + i] = block.signs[i];
      out[66 + i / 4] |= static_cast<uint8_t>(block.index[i] >> 8 << (i % 4 * 2));
    }
    put_scale_nibbles(block, 16, out + 74);
    out += 82;
  });
}

[[maybe_unused]] void quantize_iq3_xxs(const Source& from, uint8_t* out) {
  each_grid_block<kIQ3_XXS>(from, [&](GridBlock& block) {
    memcpy(out, &block.d, 2);
    for (int i = 0; i < 64; i++) out[2 + i] = static_cast<uint8_t>(block.index[i]);
    for (int j = 0; j < 8; j++) put_signs_and_scale(block, j, out + 66 + 4 * j);
    out += 98;
  });
}

[[maybe_unused]] void quantize_iq3_s(const Source& from, uint8_t* out) {
  each_grid_block<kIQ3_S>(from, [&](GridBlock& block) {
    memset(out, 0, 110);
    memcpy(out, &block.d, 2);
    for (int i = 0; i < 64; i++) {
      out[2 + i] = static_cast<uint8_t>(block.index[i]);
      out[66 + i / 8] |= static_cast<uint8_t>(block.index[i] >> 8 << (i % 8));
    }
    memcpy(out + 74, block.signs, 32);
    put_scale_nibbles(block, 8, out + 106);
    out += 110;
  });
}

[[maybe_unused]] void quantize_iq1_s(const Source& from, uint8_t* out) {
  each_grid_block<kIQ1_S>(from, [&](GridBlock& block) {
    memcpy(out, &block.d, 2);
    for (int j = 0; j < 8; j++) {
      int code = scale_of(block, j) << 12 | block.lowered[4 * j] << 15;
      for (int i = 0; i < 4; i++) {
        out[2 + 4 * j + i] = static_cast<uint8_t>(block.index[4 * j + i]);
        code |= block.index[4 * j + i] >> 8 << (3 * i);
      }
      const uint16_t bits = static_cast<uint16_t>(code);
      memcpy(out + 34 + 2 * j, &bits, 2);
    }
    out += 50;
  });
}

[[maybe_unused]] void quantize_iq1_m(const Source& from, uint8_t* out) {
  each_grid_block<kIQ1_M>(from, [&](GridBlock& block) {
    memset(out, 0, 56);
    for (int i = 0; i < 32; i++) {
      out[i] = static_cast<uint8_t>(block.index[i]);
      out[32 + i / 2] |= static_cast<uint8_t>((block.index[i] >> 8 | block.lowered[i] << 3) << (i % 2 * 4));
    }
    for (int k = 0; k < 4; k++) {
      int code = (block.d >> (4 * k) & 15) << 12;
      for (int j = 0; j < 4; j++) code |= scale_of(block, 4 * k + j) << (3 * j);
      const uint16_t bits = static_cast<uint16_t>(code);
      memcpy(out + 48 + 2 * k, &bits, 2);
    }
    out += 56;
  });
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
