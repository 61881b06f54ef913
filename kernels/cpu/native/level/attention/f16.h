// Keys and values in float16.
#pragma once

#include "level/attention/task.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct F16Kv {
  static constexpr KvType kType = KvType::F16;

  static INLINE const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

  static void prepare(float*, int) {}

  // out[query][position] of R queries and P blocks of 16 positions; `next` are units to fetch meanwhile.
  template <int R, int P>
  static INLINE void score(const SpanTask& task, const float* queries, const uint8_t* const* keys,
                           const uint8_t* const* next, float* out) {
    const int stride = padded_head(task.head_dim);
    F32x16 sums[R][P];
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++) sums[r][p] = zero();
    for (int d = 0; d < task.head_dim; d++) {
      F32x16 k[P];
      UNROLL for (int p = 0; p < P; p++) k[p] = from_f16(halves(keys[p]) + d * kKvBlockTokens);
      if (d % 2 == 0)
        UNROLL for (int p = 0; p < P; p++) fetch_line(next[p], 2 * d * kKvBlockTokens);
      UNROLL for (int r = 0; r < R; r++) {
        const F32x16 x = broadcast(queries[r * stride + d]);
        UNROLL for (int p = 0; p < P; p++) sums[r][p] = fma(x, k[p], sums[r][p]);
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++)
        store(out + r * kSpanTokens + p * kKvBlockTokens, mul(sums[r][p], broadcast(task.scale)));
  }

  // The weights of one block's positions, for R queries and C groups of 16 channels from `channel`.
  template <int R, int C>
  struct Weights {
    Weights(const float* weights, const uint8_t*, int, int) : weights(weights) {}
    INLINE F32x16 at(int r, int, int position) const { return broadcast(weights[r * kSpanTokens + position]); }
    const float* weights;
  };

  static INLINE F32x16 channels(const uint8_t* values, int width, int position, int channel) {
    return from_f16(halves(values) + position * width + channel);
  }

  // The cache lines of C groups of 16 channels.
  template <int C>
  static INLINE void fetch_channels(const uint8_t* values, int width, int position, int channel) {
    for (int c = 0; c < C; c += 2) fetch_line(values, 2 * (position * width + channel + c * 16));
  }

  static INLINE void fetch_value_scales(const uint8_t*, int) {}

  static void store_row(const float* key, const float* value, int head_dim, int slot, uint8_t* piece) {
    alignas(64) uint16_t half[16];
    uint16_t* keys = reinterpret_cast<uint16_t*>(piece);
    uint16_t* values = keys + head_dim * kKvBlockTokens + slot * padded_head(head_dim);
    for (int c = 0; c < head_dim; c += 16) {
      const int n = head_dim - c < 16 ? head_dim - c : 16;
      to_f16(half, load_first(n, key + c));
      for (int i = 0; i < n; i++) keys[(c + i) * kKvBlockTokens + slot] = half[i];
      to_f16(values + c, load_first(n, value + c));
    }
  }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
