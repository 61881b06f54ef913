// Types whose weights are points of a grid: the best points for a block, their scales, and the blocks in a model file.
#pragma once

#include "level/quantize/fit.h"
#include "pack/near_points.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Signs in the file: none, an even number for every eight weights, or any.
enum class Signs { None, Even, Any };

// A type whose weights are d * m * (value of a level + shift), with an odd m. `value` has `levels` entries.
struct GridType {
  int dims, levels;
  float value[8];
  int size;  // Number of weights that share an m.
  int top;   // m is at most 2 * top + 1.
  Signs signs;
  float shift;  // 0, or the amount that is added or subtracted.
  int shared;   // Number of points that share the sign of the shift.
  // Scales that are tried: with them, the largest weight is first, first + step, ... scales.
  float first, step;
  int tries;
};

// The quantized form of a block of 256 weights.
struct GridBlock {
  uint16_t index[64];
  uint8_t signs[32];    // One byte for eight weights; a bit is set for a negative weight.
  uint8_t lowered[64];  // One for each point: whether the shift is subtracted.
  float multiple[16];
  uint16_t d;
};

// Sums over weights of w x v and w v v, for fixed points.
struct GridSums {
  float xv = 0, vv = 0;
  // Returns how much the points at this scale reduce the weighted sum of squares.
  float gain(float scale) const { return scale * (2 * xv - scale * vv); }
};

template <const GridType& type>
struct GridSearch {
  static constexpr int kDims = type.dims, kLevels = type.levels, kPoints = type.size / kDims, kSubs = 256 / type.size;
  static constexpr int kHalf = kDims / 2, kCodes = kDims == 8 ? 144 : 64;

  const NearPoints& near;

  // Adds up the loss of each combination of levels of half a point: loss [kHalf][kLevels] of each weight -> out,
  // indexed by half_code.
  static void tabulate(const float (*loss)[8], float* out) {
    if constexpr (kDims == 4) {
      for (int b = 0; b < 8; b++)
        for (int a = 0; a < 8; a++) out[8 * b + a] = loss[0][a] + loss[1][b];
    } else {
      float low[16] = {};
      for (int i = 0; i < 9; i++) low[i] = loss[0][i % 3] + loss[1][i / 3];
      for (int i = 0; i < 9; i++) {
        const float high = loss[2][i % 3] + loss[3][i / 3];
        for (int a = 0; a < 16; a++) out[16 * i + a] = low[a] + high;
      }
    }
  }

  // Returns the point with the smallest sum of w (y - v)^2, for weights y in units of the scale.
  uint16_t nearest(const float* y, const float* w, float shift) const {
    uint8_t levels[kDims];
    int number = 0;
    for (int i = kDims - 1; i >= 0; i--) {
      int level = 0;
      for (int k = 1; k < kLevels; k++) level += y[i] - shift > 0.5f * (type.value[k - 1] + type.value[k]);
      levels[i] = static_cast<uint8_t>(level);
      number = number * kLevels + level;
    }
    const NearPoint* points = &near.points[static_cast<size_t>(number) * static_cast<size_t>(near.near)];
    if (points->first == half_code(levels, kDims) && points->second == half_code(levels + kHalf, kDims))
      return points->index;
    float loss[kDims][8], first[kCodes], second[kCodes];
    for (int i = 0; i < kDims; i++)
      for (int k = 0; k < kLevels; k++) {
        const float miss = y[i] - shift - type.value[k];
        loss[i][k] = w[i] * miss * miss;
      }
    tabulate(loss, first);
    tabulate(loss + kHalf, second);
    int best = 0;
    float least = first[points[0].first] + second[points[0].second];
    for (int k = 1; k < near.near; k++) {
      const float total = first[points[k].first] + second[points[k].second];
      if (total < least) {
        least = total;
        best = k;
      }
    }
    return points[best].index;
  }

  GridSums sums(uint16_t index, const float* x, const float* w, float shift) const {
    const uint8_t* levels = &near.levels[static_cast<size_t>(index) * kDims];
    GridSums s;
    for (int i = 0; i < kDims; i++) {
      const float v = type.value[levels[i]] + shift;
      s.xv += w[i] * x[i] * v;
      s.vv += w[i] * v * v;
    }
    return s;
  }

  // Assigns points to one sub-block at a given scale. x are magnitudes if the type has signs.
  GridSums assign(const float* x, const float* w, float scale, uint16_t* index, uint8_t* lowered) const {
    const float inv = scale > 0 ? 1 / scale : 0;
    float y[type.size];
    for (int i = 0; i < type.size; i++) y[i] = x[i] * inv;
    GridSums all;
    for (int p = 0; p < kPoints; p += type.shared) {
      GridSums best;
      for (int way = 0; way < (type.shift != 0 ? 2 : 1); way++) {
        const float shift = way ? -type.shift : type.shift;
        uint16_t chosen[type.shared];
        GridSums total;
        for (int k = 0; k < type.shared; k++) {
          const int at = (p + k) * kDims;
          chosen[k] = nearest(y + at, w + at, shift);
          const GridSums s = sums(chosen[k], x + at, w + at, shift);
          total.xv += s.xv;
          total.vv += s.vv;
        }
        if (way && !(total.gain(scale) > best.gain(scale))) continue;
        best = total;
        memcpy(index + p, chosen, sizeof chosen);
        memset(lowered + p, way, type.shared);
      }
      all.xv += best.xv;
      all.vv += best.vv;
    }
    return all;
  }

  // Returns the best scale of one sub-block, and in `curvature` the curvature of the error around it.
  float fit(const float* x, const float* w, float* curvature) const {
    float extent = 0;
    for (int i = 0; i < type.size; i++) extent = std::max(extent, __builtin_fabsf(x[i]));
    *curvature = 0;
    if (extent == 0) return 0;
    uint16_t index[kPoints];
    uint8_t lowered[kPoints];
    float best = 0, best_gain = 0;
    const auto consider = [&](float scale) {
      const GridSums s = assign(x, w, scale, index, lowered);
      if (!(s.vv > 0 && s.xv > 0 && s.xv * s.xv > best_gain * s.vv)) return false;
      best_gain = s.xv * s.xv / s.vv;
      best = s.xv / s.vv;
      *curvature = s.vv;
      return true;
    };
    for (int k = 0; k < type.tries; k++) consider(extent / (type.first + type.step * static_cast<float>(k)));
    for (int k = 0; k < 3 && best > 0 && consider(best); k++) {
    }
    return best;
  }

  // Splits eight weights into magnitudes and signs. If only an even number of signs may be set, the sign of the least
  // important weight may be flipped; its magnitude is then negative.
  static uint8_t split(const float* x, const float* w, float* magnitude) {
    int signs = 0, count = 0, least = 0;
    for (int i = 0; i < 8; i++) {
      magnitude[i] = __builtin_fabsf(x[i]);
      signs |= (x[i] < 0) << i;
      count += x[i] < 0;
      if (w[i] * magnitude[i] < w[least] * magnitude[least]) least = i;
    }
    if (type.signs == Signs::Even && count % 2) {
      magnitude[least] = -magnitude[least];
      signs ^= 1 << least;
    }
    return static_cast<uint8_t>(signs);
  }

  void assign_all(const float* x, const float* w, GridBlock* block, float* best_d) const {
    const float d = half_value(block->d);
    float xa = 0, aa = 0;
    for (int j = 0; j < kSubs; j++) {
      const float a = block->multiple[j];
      const GridSums s = assign(x + j * type.size, w + j * type.size, d * a, block->index + j * kPoints,
                                block->lowered + j * kPoints);
      xa += a * s.xv;
      aa += a * a * s.vv;
    }
    *best_d = aa > 0 && xa > 0 ? xa / aa : d;
  }

  // Tries neighbouring multiples for each sub-block. The nearest one was best only for the previous points, and the
  // points may have changed.
  void settle(const float* x, const float* w, GridBlock* block) const {
    const float d = half_value(block->d);
    for (int j = 0; j < kSubs; j++) {
      const float was = block->multiple[j];
      float best = -1;
      for (int k = -2; k <= 2; k += 2) {
        const float a = was + static_cast<float>(k);
        if (a < 1 || a > static_cast<float>(2 * type.top + 1)) continue;
        const GridSums s = assign(x + j * type.size, w + j * type.size, d * a, block->index + j * kPoints,
                                  block->lowered + j * kPoints);
        if (s.gain(d * a) > best) {
          best = s.gain(d * a);
          block->multiple[j] = a;
        }
      }
    }
  }

  void block(const float* values, const float* w, GridBlock* block) const {
    float x[256], scale[16], curvature[16], best_d;
    std::copy_n(values, 256, x);
    if (type.signs != Signs::None)
      for (int i = 0; i < 32; i++) block->signs[i] = split(values + 8 * i, w + 8 * i, x + 8 * i);
    for (int j = 0; j < kSubs; j++) scale[j] = fit(x + j * type.size, w + j * type.size, curvature + j);
    constexpr OddMultiples multiples{static_cast<float>(type.top)};
    block->d = half_bits(fit_scales(scale, curvature, kSubs, multiples, block->multiple, 0.4f));
    settle(x, w, block);
    assign_all(x, w, block, &best_d);
    block->d = half_bits(best_d);
    assign_all(x, w, block, &best_d);
  }
};

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

// Calls put(block, bytes of the block in the file). The bytes begin with d; the others are 0.
template <const GridType& type, int block_bytes, typename Put>
void each_grid_block(const Source& from, uint8_t* out, Put put) {
  const GridSearch<type> search{*from.near};
  for (int64_t first = 0; first < from.count; first += 256, out += block_bytes) {
    GridBlock block;
    search.block(from.x + first, from.w + first, &block);
    memset(out, 0, block_bytes);
    memcpy(out, &block.d, 2);
    put(block, out);
  }
}

[[maybe_unused]] int scale_of(const GridBlock& block, int j) { return (static_cast<int>(block.multiple[j]) - 1) / 2; }

[[maybe_unused]] void put_scale_nibbles(const GridBlock& block, int count, uint8_t* out) {
  for (int j = 0; j < count; j += 2)
    out[j / 2] = static_cast<uint8_t>(scale_of(block, j) | scale_of(block, j + 1) << 4);
}

// Writes four times seven signs, and a scale above them.
[[maybe_unused]] void put_signs_and_scale(const GridBlock& block, int j, uint8_t* out) {
  uint32_t word = static_cast<uint32_t>(scale_of(block, j)) << 28;
  for (int i = 0; i < 4; i++) word |= (block.signs[4 * j + i] & 127u) << (7 * i);
  memcpy(out, &word, 4);
}

[[maybe_unused]] void quantize_IQ2_XXS(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ2_XXS, 66>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int j = 0; j < 8; j++) {
      for (int i = 0; i < 4; i++) out[2 + 8 * j + i] = static_cast<uint8_t>(block.index[4 * j + i]);
      put_signs_and_scale(block, j, out + 6 + 8 * j);
    }
  });
}

[[maybe_unused]] void quantize_IQ2_XS(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ2_XS, 74>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int i = 0; i < 32; i++) {
      const uint16_t code = static_cast<uint16_t>(block.index[i] | (block.signs[i] & 127) << 9);
      memcpy(out + 2 + 2 * i, &code, 2);
    }
    put_scale_nibbles(block, 16, out + 66);
  });
}

[[maybe_unused]] void quantize_IQ2_S(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ2_S, 82>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int i = 0; i < 32; i++) {
      out[2 + i] = static_cast<uint8_t>(block.index[i]);
      out[34 + i] = block.signs[i];
      out[66 + i / 4] |= static_cast<uint8_t>(block.index[i] >> 8 << (i % 4 * 2));
    }
    put_scale_nibbles(block, 16, out + 74);
  });
}

[[maybe_unused]] void quantize_IQ3_XXS(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ3_XXS, 98>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int i = 0; i < 64; i++) out[2 + i] = static_cast<uint8_t>(block.index[i]);
    for (int j = 0; j < 8; j++) put_signs_and_scale(block, j, out + 66 + 4 * j);
  });
}

[[maybe_unused]] void quantize_IQ3_S(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ3_S, 110>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int i = 0; i < 64; i++) {
      out[2 + i] = static_cast<uint8_t>(block.index[i]);
      out[66 + i / 8] |= static_cast<uint8_t>(block.index[i] >> 8 << (i % 8));
    }
    memcpy(out + 74, block.signs, 32);
    put_scale_nibbles(block, 8, out + 106);
  });
}

[[maybe_unused]] void quantize_IQ1_S(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ1_S, 50>(from, blocks, [](const GridBlock& block, uint8_t* out) {
    for (int j = 0; j < 8; j++) {
      int code = scale_of(block, j) << 12 | block.lowered[4 * j] << 15;
      for (int i = 0; i < 4; i++) {
        out[2 + 4 * j + i] = static_cast<uint8_t>(block.index[4 * j + i]);
        code |= block.index[4 * j + i] >> 8 << (3 * i);
      }
      const uint16_t bits = static_cast<uint16_t>(code);
      memcpy(out + 34 + 2 * j, &bits, 2);
    }
  });
}

[[maybe_unused]] void quantize_IQ1_M(const Source& from, uint8_t* blocks) {
  each_grid_block<kIQ1_M, 56>(from, blocks, [](const GridBlock& block, uint8_t* out) {
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
  });
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
