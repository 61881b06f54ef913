// Spans of a row that were computed apart, put together in ascending order by the block that has computed the last of them,
// and where quantized results go.
#pragma once

#include "elementwise/quantize.cuh"
#include "span.cuh"

namespace llamaclust::cuda {

// Rows in one of the formats; both null: nowhere.
struct QuantizedOut {
  uint8_t *by_32, *by_256;

  DEVICE bool is_wanted() const { return by_32 != nullptr || by_256 != nullptr; }
  // 256 channels in shared memory, by a warp.
  DEVICE void store(const float* from, int row, int piece, int cols) const {
    Eight eight;
    load_fours(from + 8 * (threadIdx.x % kWarp), eight);
    if (by_32 != nullptr) quantize(eight, row, piece, cols, reinterpret_cast<Activations32*>(by_32));
    if (by_256 != nullptr) quantize(eight, row, piece, cols, reinterpret_cast<Activations256*>(by_256));
  }
};

// The spans of a row, for up to kMostHeads heads, by a block. Factors of some spans come first, a thread for each of a head;
// then threads take channels. `room` is for kRoom floats, `merged` for all channels.
struct SpanMerger {
  static constexpr int kMostHeads = 16, kRoom = 4 * kThreads + 3 * kMostHeads;

  const Partials& from;
  int spans, first, stride;  // as the plan has them
  int head, heads;
  const float* sinks;
  float *room, *merged;

  // Spans at a time, as many as there are threads for.
  DEVICE int shift() const { return __clz(heads - 1) - 24; }
  DEVICE int together() const { return 1 << shift(); }
  DEVICE float* maxima() const { return room; }
  DEVICE float* sums() const { return room + kThreads; }
  DEVICE float* keep() const { return room + 2 * kThreads; }
  DEVICE float* gain() const { return room + 3 * kThreads; }
  DEVICE float* of_heads() const { return room + 4 * kThreads; }  // sums of weights; factors of sinks
  DEVICE int channels() const { return heads * from.head_dim; }

  DEVICE void load_sums(int begin, int count, int query, int i) const {
    if (query >= heads || i >= count) return;
    const int index = from.index(first + (begin + i) * stride, head + query);
    maxima()[threadIdx.x] = load_from_all(from.maxima + index);
    sums()[threadIdx.x] = load_from_all(from.sums + index);
  }

  // Returns the maximum with these spans; `before` is that of the spans before them.
  DEVICE float find_factors(int begin, int count, int query, int i, float before) const {
    const float* own = maxima() + (query << shift());
    float top = begin == 0 ? own[0] : before, until = top;
    for (int j = 0; j < count; j++) {
      if (j == i) before = top;
      top = greater(top, own[j]);
      if (j == i) until = top;
    }
    if (query < heads && i < count) {
      keep()[threadIdx.x] = exp(sub(before, until));
      gain()[threadIdx.x] = exp(sub(maxima()[threadIdx.x], until));
    }
    return top;
  }

  DEVICE void add_channels(int begin, int count) const {
#pragma unroll 1
    for (int c = threadIdx.x; c < channels(); c += kThreads) {
      const int query = c / from.head_dim, factors = query << shift();
      const float* x = from.channels(first + begin * stride, head + query) + c % from.head_dim;
      const size_t step = static_cast<size_t>(stride) * from.heads * from.head_dim;
      float total = begin == 0 ? 0.0f : merged[c];
#pragma unroll 8
      for (int j = 0; j < count; j++) {
        const float value = load_from_all(x + j * step);
        total = begin + j == 0 ? value : fma(value, gain()[factors + j], mul(total, keep()[factors + j]));
      }
      merged[c] = total;
    }
  }

  // All threads together.
  DEVICE void run() const {
    const int query = threadIdx.x >> shift(), i = threadIdx.x & (together() - 1), own = query << shift();
    float top = 0, sum = 0;
#pragma unroll 1
    for (int begin = 0; begin < spans; begin += together()) {
      const int count = spans - begin < together() ? spans - begin : together();
      __syncthreads();
      load_sums(begin, count, query, i);
      __syncthreads();
      top = find_factors(begin, count, query, i, top);
      __syncthreads();
      for (int j = own; i == 0 && j < own + count; j++)
        sum = begin == 0 && j == own ? sums()[j] : fma(sums()[j], gain()[j], mul(sum, keep()[j]));
      add_channels(begin, count);
    }
    if (i == 0) keep_sum(query, top, sum);
    __syncthreads();
#pragma unroll 1
    for (int c = threadIdx.x; c < channels(); c += kThreads) {
      const float* own = of_heads() + c / from.head_dim;
      const float value = sinks == nullptr ? merged[c] : SinkFactors::value(merged[c], own[kMostHeads], own[2 * kMostHeads]);
      merged[c] = div(value, own[0]);
    }
  }

  DEVICE void keep_sum(int query, float top, float sum) const {
    float* own = of_heads() + query;
    own[0] = sum;
    if (sinks == nullptr || query >= heads) return;
    const SinkFactors sink(top, sinks[head + query]);
    own[0] = sink.sum(sum);
    own[kMostHeads] = sink.keep;
    own[2 * kMostHeads] = sink.gain;
  }
};

// What a block of few queries does behind its items: the last one that is done with `together` neighbouring KV heads of a
// row merges their spans. Heads that are quantized have whole pieces of 256 channels together.
struct Ending {
  int together;  // 0: spans are merged elsewhere, if there are any
  QuantizedOut quantized;

  // All threads together, when the block's sums are stored.
  DEVICE bool is_last(int32_t& done, int blocks) const {
    SHARED(int32_t, last, [1]);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      last[0] = atomicAdd(&done, 1) == blocks - 1 ? 1 : 0;
      if (last[0] != 0) done = 0;
    }
    __syncthreads();
    if (last[0] == 0) return false;
    __threadfence();
    return true;
  }

  DEVICE void finish(const Step& step, const Work& work, const Item& item, int kv_head, int slices, float* room,
                     float* merged) const {
    if (together == 0) return;
    const int row = item.row, spans = item.spans, first = kv_head / together * together;
    if (!is_last(work.done(row * step.kv_heads + first), (spans > 0 ? spans : 1) * slices * together)) return;
    if (spans == 0 && !quantized.is_wanted()) return;
    const int group = step.heads / step.kv_heads, head = first * group, heads = group * together;
    const int cols = step.heads * step.value_dim, own = heads * step.value_dim;
    float* out = step.out + static_cast<size_t>(row) * cols + head * step.value_dim;
    if (spans > 0) {
      const Partials from(step.partials, step.slots, step.heads, step.value_dim);
      SpanMerger{from, spans, work.slot(row), work.stride(row), head, heads, step.sinks, room, merged}.run();
    }
    if (!quantized.is_wanted()) {
      for (int c = threadIdx.x; c < own; c += kThreads) out[c] = merged[c];  // its own ones
      return;
    }
    if (spans == 0)
      for (int c = threadIdx.x; c < own; c += kThreads) merged[c] = load_from_all(out + c);
    __syncthreads();
    for (int piece = threadIdx.x / kWarp; piece < own / 256; piece += kWarps)
      quantized.store(merged + 256 * piece, row, head * step.value_dim / 256 + piece, cols);
  }
};

}  // namespace llamaclust::cuda
