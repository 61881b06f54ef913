// Queries in shared memory, in the layout for scores: all queries of a channel, or of a pair of channels, are adjacent.
#pragma once

#include "span.cuh"

namespace llamaclust::cuda {
inline namespace SEEN_NAMESPACE {

// Layout: float32 [channels, rounded up to whole chunks of keys][TQ]. Missing queries and channels are 0.
template <int TQ>
DEVICE void load_queries(const Span<F16Kv, TQ>& span, float* to) {
  const int channels = key_chunks<F16Kv>(span.step.head_dim) * F16Kv::kChannels;
  for (int i = threadIdx.x; i < channels * TQ; i += kThreads) {
    const int query = i % TQ, channel = i / TQ;
    to[i] = query < span.count() && channel < span.step.head_dim ? span.query(query)[channel] : 0.0f;
  }
}

// 2^-100: a query's group with a smaller maximum magnitude counts as 0.
inline constexpr int32_t kLeastQuery = 0x0d800000;

struct RoundedQuery {
  int32_t q;
  float scale;
};

// Rounds a group of 32 channels of a query, one per lane, for keys in bytes: q = x * (most / m) to nearest, scale = m /
// most.
DEVICE RoundedQuery round_query(float x, float most) {
  const int32_t greatest = greatest_of(magnitude(x));
  const float maximum = __int_as_float(greatest);
  if (greatest >= kNotFinite) return {0, __int_as_float(0x7fc00000)};
  if (greatest < kLeastQuery) return {0, 0.0f};
  return {nearest(mul(x, div(most, maximum))), div(maximum, most)};
}

// Calls f(query, group, channel of the group, rounded) for every channel of every query. A warp has a group.
template <class Kv, int TQ, class F>
DEVICE void round_queries(const Span<Kv, TQ>& span, F f) {
  const int groups = groups_of(span.step.head_dim), lane = threadIdx.x % kWarp;
  for (int i = threadIdx.x / kWarp; i < groups * TQ; i += kWarps) {
    const int query = i % TQ, group = i / TQ, channel = group * kGroupChannels + lane;
    const bool there = query < span.count() && channel < span.step.head_dim;
    f(query, group, lane, round_query(there ? span.query(query)[channel] : 0.0f, Kv::kMostQuery));
  }
}

// Layout: pairs of int16 [16 for each group of 32 channels][TQ], then scales [groups][TQ].
template <class Kv, int TQ>
DEVICE void load_queries(const Span<Kv, TQ>& span, int32_t* to) {
  const int groups = groups_of(span.step.head_dim);
  round_queries(span, [=](int query, int group, int lane, const RoundedQuery& rounded) {
    const int32_t other = __shfl_down_sync(kAllLanes, rounded.q, 1);
    if (lane % 2 == 0) to[(group * 16 + lane / 2) * TQ + query] = (rounded.q & 0xffff) | other << 16;
    if (lane == 0) to[(groups * 16 + group) * TQ + query] = __float_as_int(rounded.scale);
  });
}

}  // namespace SEEN_NAMESPACE
}  // namespace llamaclust::cuda
