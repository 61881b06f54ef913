// Weighted sums of values in integers. The weights of 64 positions, multiplied by the scales of their values, are
// rounded to bytes with one scale. Sums of bytes times int8 are exact; float sums add groups of 64 positions in
// ascending order.
#pragma once

#include "level/attention/int8_kv.h"
#include "level/attention/seen.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kWeightTokens = 64, kWeightBlocks = kWeightTokens / kKvBlockTokens;
constexpr float kMostWeight = 254.0f;   // Its two halves have seven bits each.
constexpr float kLeastTop = 0x1p-100f;  // If the maximum of 64 weights is below it, all of them count as 0.

// Weights of R queries for one group of channels. They are 0 at positions to which a query does not attend.
template <int R>
struct ByteWeights {
  alignas(64) uint8_t bytes[R][kSpanTokens];
  float scales[R][kSpanTokens / kWeightTokens];
};

// The blocks of 16 positions to which any of R queries attends, and the groups of 64 positions that contain these
// blocks.
template <int R>
struct SeenBlocks {
  SeenBlocks(const SpanTask& task, int query)
      : begin(task.firsts[query] / kKvBlockTokens),
        end((task.ends[query + R - 1] + kKvBlockTokens - 1) / kKvBlockTokens) {}
  INLINE int first_group() const { return begin / kWeightBlocks; }
  INLINE int last_group() const { return (end - 1) / kWeightBlocks; }
  INLINE bool there(int block) const { return block >= begin && block < end; }
  const int begin, end;
};

// Rounds the weights of the 64 positions of `group` for R queries, multiplied by the scales of the values. `whole` says
// that all queries attend to all of these positions.
template <bool whole, int R>
INLINE void round_weights(const SpanTask& task, int query, int group, const F32x16 (&scales)[kWeightBlocks],
                          ByteWeights<R>& out) {
  const auto scaled = [&](int r, int b) INLINE_LAMBDA {
    const int i = group * kWeightTokens + b * kKvBlockTokens;
    const F32x16 weight = mul(load(task.scores + r * kSpanTokens + i), scales[b]);
    return whole ? weight : seen(weight, i, task.firsts[query + r], task.ends[query + r], zero());
  };
  I32x16 tops[R];
  UNROLL for (int r = 0; r < R; r++) {
    tops[r] = float_to_bits(scaled(r, 0));
    UNROLL for (int b = 1; b < kWeightBlocks; b++) tops[r] = max(tops[r], float_to_bits(scaled(r, b)));
  }
  alignas(64) int32_t greatest[16] = {};
  alignas(64) float values[16], inverses[16], units[16];
  greatest_lanes(tops, greatest);
  memcpy(values, greatest, sizeof values);
  const F32x16 top = load(values), least = broadcast(kLeastTop);
  store(inverses, select_less(top, least, zero(), div(broadcast(kMostWeight), top)));
  store(units, select_less(top, least, zero(), div(top, broadcast(kMostWeight))));
  UNROLL for (int r = 0; r < R; r++) {
    const F32x16 inverse = broadcast(inverses[r]);
    I32x16 bytes[kWeightBlocks];
    UNROLL for (int b = 0; b < kWeightBlocks; b++) bytes[b] = to_int(mul(scaled(r, b), inverse));
    store_low_bytes(out.bytes[r] + group * kWeightTokens, bytes);
    out.scales[r][group] = units[r];
  }
}

template <int R>
void round_all_weights(const SpanTask& task, int query, int channel_group, ByteWeights<R>& out) {
  const SeenBlocks<R> blocks(task, query);
  const int width = padded_head(task.head_dim), all_first = task.firsts[query + R - 1], all_end = task.ends[query];
  for (int group = blocks.first_group(); group <= blocks.last_group(); group++) {
    F32x16 scales[kWeightBlocks];
    UNROLL for (int b = 0; b < kWeightBlocks; b++) {
      const int block = group * kWeightBlocks + b;
      if (blocks.there(block))
        scales[b] = from_f16(Int8Kv::value_scales(values_at<Int8Kv>(task, block), width) + channel_group * kKvBlockTokens);
      else
        scales[b] = zero();
    }
    if (all_first <= group * kWeightTokens && all_end >= (group + 1) * kWeightTokens)
      round_weights<true>(task, query, group, scales, out);
    else
      round_weights<false>(task, query, group, scales, out);
  }
}

// Computes values[query][channel] of R queries and C * 16 channels of one group. If that is few sums, each is divided
// into several chains, to hide latency.
template <int R, int C, bool fetches>
void byte_value_tile(const SpanTask& task, const ByteWeights<R>& weights, int channel, const SeenBlocks<R>& blocks,
                     const KeyValuePrefetch<Int8Kv>& units, float* values) {
  constexpr int kChains = R * C >= 8 ? 1 : R * C >= 4 ? 2 : 4;
  const int width = padded_head(task.head_dim);
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int c = 0; c < C; c++) store(values + r * width + channel + c * 16, zero());
  for (int group = blocks.first_group(); group <= blocks.last_group(); group++) {
    I32x16 sums[kChains][R][C];
    UNROLL for (int n = 0; n < kChains; n++)
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int c = 0; c < C; c++) sums[n][r][c] = broadcast(0);
    for (int block = group * kWeightBlocks; block < (group + 1) * kWeightBlocks; block++) {
      if (!blocks.there(block)) continue;
      const uint8_t* v = values_at<Int8Kv>(task, block);
      if constexpr (fetches) {
        const uint8_t* next = units.at(units.blocks + block - units.begin + kMostAhead, v);
        for (int line = 0; line < kKvBlockTokens * width + 32 * kv_groups(width); line += 64) fetch_line(next, line);
      }
      UNROLL for (int quad = 0; quad < kKvBlockTokens / 4; quad++) {
        Quads x[C];
        UNROLL for (int c = 0; c < C; c++) x[c] = load_quads(v + (quad * width + channel + c * 16) * 4);
        UNROLL for (int r = 0; r < R; r++) {
          int32_t four;
          memcpy(&four, weights.bytes[r] + block * kKvBlockTokens + quad * 4, sizeof four);
          UNROLL for (int c = 0; c < C; c++)
            sums[quad % kChains][r][c] = add_weighted(sums[quad % kChains][r][c], x[c], four);
        }
      }
    }
    UNROLL for (int r = 0; r < R; r++)
      UNROLL for (int c = 0; c < C; c++) {
        UNROLL for (int n = 1; n < kChains; n++) sums[0][r][c] = add(sums[0][r][c], sums[n][r][c]);
        float* at = values + r * width + channel + c * 16;
        store(at, fma(broadcast(weights.scales[r][group]), to_float(sums[0][r][c]), load(at)));
      }
  }
}

template <int R>
void byte_value_queries(const SpanTask& task, int query, float* values, const KeyValuePrefetch<Int8Kv>& units) {
  const int width = padded_head(task.head_dim);
  const SeenBlocks<R> blocks(task, query);
  float* out = values + query * width;
  ByteWeights<R> weights;
  for (int channel = 0; channel < width; channel += kKvGroup) {
    round_all_weights(task, query, channel / kKvGroup, weights);
    if (channel + kKvGroup > width)
      channel == 0 ? byte_value_tile<R, 1, true>(task, weights, channel, blocks, units, out)
                   : byte_value_tile<R, 1, false>(task, weights, channel, blocks, units, out);
    else
      channel == 0 ? byte_value_tile<R, 2, true>(task, weights, channel, blocks, units, out)
                   : byte_value_tile<R, 2, false>(task, weights, channel, blocks, units, out);
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
