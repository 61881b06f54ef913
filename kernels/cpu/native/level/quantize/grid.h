// The best points of a grid for a block, and scales for them.
#pragma once

#include "level/quantize/scales.h"
#include "pack/near_points.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

enum class Signs { None, Even, Any };  // what a file holds of them: nothing, an even number for eight weights, all

// A type whose weights are d * m * (value of a level + shift), m odd. `value` ends with the levels that there are.
struct GridType {
  int dims, levels;
  float value[8];
  int size;          // weights that have an m in common
  int top;           // m is at most 2 top + 1
  Signs signs;
  float shift;       // 0, or what is added or taken away
  int shared;        // points whose shift has one sign
  float first, step;  // scales that are tried: the largest weight is `first`, first + step ... of them
  int tries;
};

// What a block of 256 becomes.
struct GridBlock {
  uint16_t index[64];
  uint8_t signs[32];   // of eight weights each, set where negative
  uint8_t lowered[64];  // of each point: whether the shift is taken away
  float multiple[16];
  uint16_t d;
};

// Sums over weights with fixed points: of w x v and w v v.
struct GridSums {
  float xv = 0, vv = 0;
  // What the points explain of the squares, at that scale.
  float gain(float scale) const { return scale * (2 * xv - scale * vv); }
};

template <const GridType& type>
struct GridSearch {
  static constexpr int kDims = type.dims, kLevels = type.levels, kPoints = type.size / kDims, kSubs = 256 / type.size;
  static constexpr int kHalf = kDims / 2, kCodes = kDims == 8 ? 144 : 64;

  const NearPoints& near;

  // The loss of each combination of levels of half a point: loss [kHalf][kLevels] by weight -> out by half_code.
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

  // The point for weights y, in units of the scale, whose sum of w (y - v)^2 is least.
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

  // The points of one sub-block at a scale. x are magnitudes where the type has signs.
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
        std::copy_n(chosen, type.shared, index + p);
        std::fill_n(lowered + p, type.shared, static_cast<uint8_t>(way));
      }
      all.xv += best.xv;
      all.vv += best.vv;
    }
    return all;
  }

  // The best scale of one sub-block, and in `curvature` what an error of it costs.
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

  // Magnitudes of eight weights and their signs, of which an even number may be set: else one that matters little is
  // turned over, its magnitude being negative then.
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

  // Another multiple where it is better by itself: the nearest was best only for points that may be others now.
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
    block->d = half_bits(fit_scales(scale, curvature, kSubs, OddMultiples{type.top}, block->multiple, 0.4f));
    settle(x, w, block);
    assign_all(x, w, block, &best_d);
    block->d = half_bits(best_d);
    assign_all(x, w, block, &best_d);
  }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
