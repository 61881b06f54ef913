// Int8 keys and values for integer scores and integer weighted sums: queries and weights are rounded to eight bits as
// well.
#pragma once

#include "level/attention/kv_types.h"
#include "simd/quads.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Keys and values are rounded as in q8_0. Keys are stored with an offset of 128, four channels of a position together;
// values without an offset, four positions of a channel together.
struct Int8Kv : Q8Kv {
  static constexpr KvType kType = KvType::Int8;

  INLINE static int quads_of(int head_dim) { return (head_dim + 3) / 4; }
  INLINE static const uint16_t* key_scales(const uint8_t* keys, int head_dim) {
    return reinterpret_cast<const uint16_t*>(keys + quads_of(head_dim) * 64);
  }
  INLINE static const uint16_t* value_scales(const uint8_t* values, int width) {
    return reinterpret_cast<const uint16_t*>(values + kKvBlockTokens * width);
  }

  // Rewrites a query as int8s (a whole number of quads), a float scale for each group, and an int32 for each group:
  // minus the sum that the offset of the keys adds. q = x * (127 / m) to nearest and scale = m / 127, with m the
  // group's maximum magnitude.
  static void prepare(float* query, int head_dim) {
    int8_t q[kMaxHeadChannels];
    float scales[kMaxHeadChannels / kKvGroup];
    int32_t offsets[kMaxHeadChannels / kKvGroup];
    const int groups = kv_groups(head_dim), quads = quads_of(head_dim);
    memset(q + quads * 4 - 4, 0, 4);
    for (int g = 0; g < groups; g++) {
      const int begin = g * kKvGroup, n = head_dim - begin < kKvGroup ? head_dim - begin : kKvGroup;
      scales[g] = narrow(query + begin, n, q + begin);
      int32_t sum = 0;
      AS_VECTORS for (int i = 0; i < n; i++) sum += q[begin + i];
      offsets[g] = -kQuadOffset * sum;
    }
    memcpy(query, q, static_cast<size_t>(quads) * 4);
    memcpy(query + quads, scales, static_cast<size_t>(groups) * sizeof(float));
    memcpy(query + quads + groups, offsets, static_cast<size_t>(groups) * sizeof(int32_t));
  }
  INLINE static float narrow(const float* __restrict x, int n, int8_t* __restrict out) {
    const int32_t greatest = greatest_magnitude(x, n);
    const float maximum = __builtin_bit_cast(float, greatest);
    const bool counts = greatest >= kLeastQuery && greatest < kNotFinite;
    const float inverse = counts ? 127.0f / maximum : 0.0f;
    AS_VECTORS for (int i = 0; i < n; i++) out[i] = counts ? static_cast<int8_t>(nearest_int(x[i] * inverse)) : int8_t{0};
    return greatest >= kNotFinite ? __builtin_nanf("") : counts ? maximum / 127.0f : 0.0f;
  }

  template <int R, int P>
  INLINE static void score(const SpanTask& task, const float* queries, const uint8_t* const* keys,
                           const uint8_t* const* next, float* out) {
    constexpr int kQuads = kKvGroup / 4;
    const int quads = quads_of(task.head_dim), groups = kv_groups(task.head_dim), stride = padded_head(task.head_dim);
    for (int g = 0; g < groups; g++) {
      I32x16 sums[R][P];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) sums[r][p] = broadcast(word_of(queries + r * stride, quads + groups + g));
      const int end = (g + 1) * kQuads < quads ? (g + 1) * kQuads : quads;
      for (int quad = g * kQuads; quad < end; quad++) {
        Quads k[P];
        UNROLL for (int p = 0; p < P; p++) k[p] = load_quads(keys[p] + quad * 64);
        UNROLL for (int p = 0; p < P; p++) fetch_line(next[p], quad * 64);
        UNROLL for (int r = 0; r < R; r++)
          UNROLL for (int p = 0; p < P; p++)
            sums[r][p] = add_products(sums[r][p], k[p], word_of(queries + r * stride, quad));
      }
      UNROLL for (int p = 0; p < P; p++) fetch_line(next[p], quads * 64 + g * 32);
      // Prevents the compiler from keeping the totals of all tiles in registers, which the sums need.
      asm volatile("" ::: "memory");
      UNROLL for (int p = 0; p < P; p++) {
        const F32x16 scale = from_f16(key_scales(keys[p], task.head_dim) + g * kKvBlockTokens);
        UNROLL for (int r = 0; r < R; r++) {
          float* at = out + r * kSpanTokens + p * kKvBlockTokens;
          const F32x16 scales = mul(scale, broadcast(queries[r * stride + quads + g]));
          const F32x16 total = fma(scales, to_float(sums[r][p]), g == 0 ? zero() : load(at));
          store(at, g + 1 == groups ? mul(total, broadcast(task.scale)) : total);
        }
      }
    }
  }
  INLINE static int32_t word_of(const float* query, int index) {
    int32_t word;
    memcpy(&word, query + index, sizeof word);
    return word;
  }

  // Computes exact products of int8 keys and their scale. The first channel is even; all channels belong to one group.
  template <int C>
  INLINE static void key_channels(const uint8_t* keys, int head_dim, int channel, F32x16 (&out)[C]) {
    const F32x16 scale = from_f16(key_scales(keys, head_dim) + channel / kKvGroup * kKvBlockTokens);
    UNROLL for (int c = 0; c < C; c++) {
      const Quads four = load_quads(keys + (channel + c) / 4 * 64);
      const I32x16 one = add_products(broadcast(-kQuadOffset), four, 1 << (channel + c) % 4 * 8);
      out[c] = mul(to_float(one), scale);
    }
  }

  static void store_row(const float* key, const float* value, int head_dim, int slot, uint8_t* piece) {
    const int width = padded_head(head_dim);
    uint8_t* values = piece + kv_key_bytes(kType, head_dim);
    uint16_t* to_key_scales = const_cast<uint16_t*>(key_scales(piece, head_dim));
    uint16_t* to_value_scales = const_cast<uint16_t*>(value_scales(values, width));
    for (int g = 0; g < kv_groups(head_dim); g++) {
      int8_t q[kKvGroup];
      const int begin = g * kKvGroup, n = head_dim - begin < kKvGroup ? head_dim - begin : kKvGroup;
      to_key_scales[g * kKvBlockTokens + slot] = round_group(key + begin, n, q);
      for (int i = 0; i < n; i++)
        piece[(begin + i) / 4 * 64 + 4 * slot + (begin + i) % 4] = static_cast<uint8_t>(q[i] + 128);
      if (value == nullptr) continue;
      to_value_scales[g * kKvBlockTokens + slot] = round_group(value + begin, n, q);
      for (int i = 0; i < n; i++)
        values[(slot / 4 * width + begin + i) * 4 + slot % 4] = static_cast<uint8_t>(q[i]);
    }
  }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
