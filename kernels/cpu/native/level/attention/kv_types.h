// The types of keys and values; and what they share: the location of a span's keys and values, and the order of
// prefetching.
#pragma once

#include "level/attention_ops.h"
#include "simd/int8.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Number of units by which prefetches are ahead of the computation: enough to cover the latency of memory. The softmax,
// which reads no units, prefetches up to kMostAhead.
constexpr int kUnitsAhead = 8, kMostAhead = 16;

INLINE const uint8_t* keys_at(const SpanTask& task, int block) {
  return task.head + static_cast<size_t>(task.blocks[block]) * task.block_stride;
}
template <typename Kv>
INLINE const uint8_t* values_at(const SpanTask& task, int block) {
  return keys_at(task, block) + kv_key_bytes(Kv::kType, task.head_dim);
}

// The variant of a type for latent attention, where values are the first channels of keys.
template <typename Base>
struct Latent : Base {
  static constexpr bool kLatent = true;
};

// The order in which queries read units of a span, for prefetching. A unit is the keys or the values of one block.
// First come the keys, then the values (unless these are a part of the keys), then the keys of the next span.
template <typename Kv>
struct KeyValuePrefetch {
  KeyValuePrefetch(const SpanTask& task, int query, int count)
      : task(task),
        begin(task.firsts[query] / kKvBlockTokens),
        blocks((task.ends[query + count - 1] + kKvBlockTokens - 1) / kKvBlockTokens - begin),
        last(query > 0 ? 0 : (Kv::kLatent ? 1 : 2) * blocks + task.blocks_after) {}

  // Returns `other`, which is in the cache, if there is no such unit to prefetch.
  INLINE const uint8_t* at(int unit, const uint8_t* other) const {
    if (unit >= last) return other;
    const int block = begin + unit;
    if constexpr (Kv::kLatent) return keys_at(task, block);
    return unit < blocks || unit >= 2 * blocks ? keys_at(task, unit < blocks ? block : block - blocks)
                                               : values_at<Kv>(task, block - blocks);
  }

  const SpanTask& task;
  const int begin, blocks, last;  // Blocks of the span to which queries [query, query + count) attend.
};

INLINE void fetch_line(const uint8_t* unit, int offset) { __builtin_prefetch(unit + offset, 0, 2); }

// Float16 keys and values.
struct F16Kv {
  static constexpr KvType kType = KvType::F16;
  static constexpr bool kLatent = false;

  INLINE static const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

  static void prepare(float*, int) {}

  // Computes out[query][position] of R queries and P blocks of 16 positions, and meanwhile prefetches the units `next`.
  template <int R, int P>
  INLINE static void score(const SpanTask& task, const float* queries, const uint8_t* const* keys,
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

  // The weights of one block's positions, for R queries and C groups of 16 channels that start at `channel`.
  template <int R, int C>
  struct Weights {
    Weights(const float* weights, const uint8_t*, int, int) : weights(weights) {}
    INLINE F32x16 at(int r, int, int position) const { return broadcast(weights[r * kSpanTokens + position]); }
    const float* weights;
  };

  INLINE static F32x16 channels(const uint8_t* values, int width, int position, int channel) {
    return from_f16(halves(values) + position * width + channel);
  }

  // out[c] = channel `channel` + c of a block's keys, with one lane per position.
  template <int C>
  INLINE static void key_channels(const uint8_t* keys, int, int channel, F32x16 (&out)[C]) {
    UNROLL for (int c = 0; c < C; c++) out[c] = from_f16(halves(keys) + (channel + c) * kKvBlockTokens);
  }

  // Prefetches the cache lines of C groups of 16 channels.
  template <int C>
  INLINE static void fetch_channels(const uint8_t* values, int width, int position, int channel) {
    for (int c = 0; c < C; c += 2) fetch_line(values, 2 * (position * width + channel + c * 16));
  }

  INLINE static void fetch_value_scales(const uint8_t*, int) {}

  static void store_row(const float* key, const float* value, int head_dim, int slot, uint8_t* piece) {
    alignas(64) uint16_t half[16];
    uint16_t* keys = reinterpret_cast<uint16_t*>(piece);
    uint16_t* values = keys + head_dim * kKvBlockTokens + slot * padded_head(head_dim);
    for (int c = 0; c < head_dim; c += 16) {
      const int n = head_dim - c < 16 ? head_dim - c : 16;
      to_f16(half, load_first(n, key + c));
      for (int i = 0; i < n; i++) keys[(c + i) * kKvBlockTokens + slot] = half[i];
      if (value != nullptr) to_f16(values + c, load_first(n, value + c));
    }
  }
};

constexpr int32_t kLeastQuery = 0x0d800000;  // 2^-100: a query's group with a smaller maximum magnitude counts as 0.

// Int8 keys and values with a float16 scale for each group of 32 channels. Queries are rounded to int16 with a float
// scale for each group, so that the score of a group is an exact integer. Values are multiplied as floats; their scales
// are multiplied into the weights.
struct Q8Kv {
  static constexpr KvType kType = KvType::Q8_0;
  static constexpr bool kLatent = false;

  INLINE static const int8_t* bytes(const uint8_t* p) { return reinterpret_cast<const int8_t*>(p); }
  INLINE static int pairs_of(int head_dim) { return (head_dim + 1) / 2; }

  // Rewrites a query as int16s (an even number of them), followed by a float scale for each group: q = x * (32767 / m)
  // to nearest, scale = m / 32767, with m the group's maximum magnitude.
  static void prepare(float* query, int head_dim) {
    float scales[kMaxHeadChannels / kKvGroup];
    int16_t* q = reinterpret_cast<int16_t*>(query);
    for (int g = 0; g < kv_groups(head_dim); g++) {
      const int begin = g * kKvGroup, n = head_dim - begin < kKvGroup ? head_dim - begin : kKvGroup;
      float x[kKvGroup];
      memcpy(x, query + begin, static_cast<size_t>(n) * sizeof(float));
      scales[g] = narrow(x, n, q + begin);
    }
    if (head_dim % 2 != 0) q[head_dim] = 0;
    memcpy(query + pairs_of(head_dim), scales, static_cast<size_t>(kv_groups(head_dim)) * sizeof(float));
  }
  INLINE static float narrow(const float* __restrict x, int n, int16_t* __restrict out) {
    const int32_t greatest = greatest_magnitude(x, n);
    const float maximum = __builtin_bit_cast(float, greatest);
    const bool counts = greatest >= kLeastQuery && greatest < kNotFinite;
    const float inverse = counts ? 32767.0f / maximum : 0.0f;
    AS_VECTORS for (int i = 0; i < n; i++) out[i] = counts ? static_cast<int16_t>(nearest_int(x[i] * inverse)) : int16_t{0};
    return greatest >= kNotFinite ? __builtin_nanf("") : counts ? maximum / 32767.0f : 0.0f;
  }
  INLINE static int32_t pair_of(const float* query, int index) {
    int32_t two;
    memcpy(&two, query + index, sizeof two);
    return two;
  }

  template <int R, int P>
  INLINE static void add_pair(I32x16 (&sums)[R][P], const uint8_t* const* keys, const float* queries, int stride,
                              int pair) {
    Pairs k[P];
    UNROLL for (int p = 0; p < P; p++) k[p] = load_pairs(bytes(keys[p]) + pair * 32);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++)
        sums[r][p] = dot_pairs(sums[r][p], k[p], pair_of(queries + r * stride, pair));
  }

  template <int R, int P>
  INLINE static void score(const SpanTask& task, const float* queries, const uint8_t* const* keys,
                           const uint8_t* const* next, float* out) {
    constexpr int kPairs = kKvGroup / 2;
    const int pairs = pairs_of(task.head_dim), groups = kv_groups(task.head_dim), stride = padded_head(task.head_dim);
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int p = 0; p < P; p++) store(out + r * kSpanTokens + p * kKvBlockTokens, zero());
    for (int g = 0; g < groups; g++) {
      I32x16 sums[R][P];
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) sums[r][p] = broadcast(0);
      const int end = (g + 1) * kPairs < pairs ? (g + 1) * kPairs : pairs;
      int pair = g * kPairs;
      for (; pair + 2 <= end; pair += 2) {
        UNROLL for (int p = 0; p < P; p++) fetch_line(next[p], pair * 32);
        add_pair<R, P>(sums, keys, queries, stride, pair);
        add_pair<R, P>(sums, keys, queries, stride, pair + 1);
      }
      if (pair < end) add_pair<R, P>(sums, keys, queries, stride, pair);
      UNROLL for (int p = 0; p < P; p++) fetch_line(next[p], pairs * 32 + g * 32);
      // Prevents the compiler from keeping the totals of all tiles in registers, which the sums need.
      asm volatile("" ::: "memory");
      const F32x16 last = broadcast(g + 1 == groups ? task.scale : 1.0f);
      UNROLL for (int p = 0; p < P; p++) {
        const F32x16 scale = from_f16(reinterpret_cast<const uint16_t*>(keys[p] + pairs * 32) + g * kKvBlockTokens);
        UNROLL for (int r = 0; r < R; r++) {
          float* at = out + r * kSpanTokens + p * kKvBlockTokens;
          const F32x16 scales = mul(scale, broadcast(queries[r * stride + pairs + g]));
          const F32x16 total = fma(scales, to_float(sums[r][p]), load(at));
          store(at, mul(total, last));
        }
      }
    }
  }

  // weight * scale of one block's positions, rounded once, for each group of 32 channels that the tile overlaps.
  template <int R, int C>
  struct Weights {
    static constexpr int kGroups = (C + 1) / 2;
    Weights(const float* weights, const uint8_t* values, int width, int channel) {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(values + kKvBlockTokens * width);
      UNROLL for (int g = 0; g < kGroups; g++) {
        const F32x16 scale = from_f16(scales + (channel / kKvGroup + g) * kKvBlockTokens);
        UNROLL for (int r = 0; r < R; r++) store(scaled[g][r], mul(load(weights + r * kSpanTokens), scale));
      }
    }
    INLINE F32x16 at(int r, int c, int position) const { return broadcast(scaled[c / 2][r][position]); }
    alignas(64) float scaled[kGroups][R][16];
  };

  INLINE static F32x16 channels(const uint8_t* values, int width, int position, int channel) {
    return from_i8(bytes(values) + position * width + channel);
  }

  // Computes exact products of int8 keys and their scale. The first channel is even; all channels belong to one group.
  template <int C>
  INLINE static void key_channels(const uint8_t* keys, int head_dim, int channel, F32x16 (&out)[C]) {
    const uint16_t* scales = reinterpret_cast<const uint16_t*>(keys + pairs_of(head_dim) * 32);
    const F32x16 scale = from_f16(scales + channel / kKvGroup * kKvBlockTokens);
    UNROLL for (int c = 0; c < C; c += 2) {
      const Pairs two = load_pairs(bytes(keys) + (channel + c) / 2 * 32);
      out[c] = mul(to_float(dot_pairs(broadcast(0), two, 1)), scale);
      out[c + 1] = mul(to_float(dot_pairs(broadcast(0), two, 1 << 16)), scale);
    }
  }

  // Prefetches the cache lines of C groups of 16 channels.
  template <int C>
  INLINE static void fetch_channels(const uint8_t* values, int width, int position, int channel) {
    for (int c = 0; c < C; c += 4) fetch_line(values, position * width + channel + c * 16);
  }

  INLINE static void fetch_value_scales(const uint8_t* values, int width) {
    for (int byte = 0; byte < width; byte += 64) fetch_line(values, kKvBlockTokens * width + byte);
  }

  // Rounds a group to int8 and returns its scale: m / 127 rounded to float16; q = x * (1 / scale) to nearest, limited
  // to [-127, 127].
  INLINE static uint16_t round_group(const float* __restrict x, int n, int8_t* __restrict out) {
    const int32_t greatest = greatest_magnitude(x, n);
    if (greatest >= kNotFinite) {
      for (int i = 0; i < n; i++) out[i] = 0;
      return 0x7e00;  // NaN
    }
    const uint16_t half = half_bits(__builtin_bit_cast(float, greatest) / 127.0f);
    const float scale = half_value(half), inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    AS_VECTORS for (int i = 0; i < n; i++) {
      const float q = x[i] * inverse, low = q > -127.0f ? q : -127.0f;
      out[i] = static_cast<int8_t>(nearest_int(low < 127.0f ? low : 127.0f));
    }
    return half;
  }

  static void store_row(const float* key, const float* value, int head_dim, int slot, uint8_t* piece) {
    const int pairs = pairs_of(head_dim), width = padded_head(head_dim);
    uint8_t* values = piece + kv_key_bytes(kType, head_dim);
    uint16_t* key_scales = reinterpret_cast<uint16_t*>(piece + pairs * 32);
    uint16_t* value_scales = reinterpret_cast<uint16_t*>(values + kKvBlockTokens * width);
    for (int g = 0; g < kv_groups(head_dim); g++) {
      int8_t q[kKvGroup];
      const int begin = g * kKvGroup, n = head_dim - begin < kKvGroup ? head_dim - begin : kKvGroup;
      key_scales[g * kKvBlockTokens + slot] = round_group(key + begin, n, q);
      for (int i = 0; i < n; i++)
        piece[(begin + i) / 2 * 32 + 2 * slot + (begin + i) % 2] = static_cast<uint8_t>(q[i]);
      if (value == nullptr) continue;
      value_scales[g * kKvBlockTokens + slot] = round_group(value + begin, n, q);
      memcpy(values + slot * width + begin, q, static_cast<size_t>(n));
    }
  }
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
