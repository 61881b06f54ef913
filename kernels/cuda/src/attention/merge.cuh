// Merges the spans of a row that were computed separately, in ascending order, in the block that computed the last of
// them; and stores quantized results.
#pragma once

#include "elementwise/quantize.cuh"
#include "span.cuh"

namespace llamaclust::cuda {

// Destination of rows in one of the formats; both pointers are null for none.
struct QuantizedOut {
  uint8_t *by_32, *by_256;

  DEVICE bool is_wanted() const { return by_32 != nullptr || by_256 != nullptr; }
  // Quantizes 256 channels in shared memory, by a warp.
  DEVICE void store(const float* from, int row, int piece, int cols) const {
    Eight eight;
    load_fours(from + 8 * (threadIdx.x % kWarp), eight);
    if (by_32 != nullptr) quantize(eight, row, piece, cols, reinterpret_cast<Activations32*>(by_32));
    if (by_256 != nullptr) quantize(eight, row, piece, cols, reinterpret_cast<Activations256*>(by_256));
  }
};

// Merges the spans of a row, for up to kMostHeads heads, by a block. The factors of some spans are computed first, by
// one thread for each span of a head; then threads have channels. `room` has kRoom floats, `merged` all channels.
struct SpanMerger {
  static constexpr int kMostHeads = 16, kRoom = 4 * kThreads + 3 * kMostHeads;

  const Partials& from;
  int spans, first, stride;  // Values of the plan (Work).
  int head, heads;
  const float* sinks;
  float *room, *merged;

  // Number of spans at a time, for which there are threads.
  DEVICE int shift() const { return __clz(heads - 1) - 24; }
  DEVICE int together() const { return 1 << shift(); }
  DEVICE float* maxima() const { return room; }
  DEVICE float* sums() const { return room + kThreads; }
  DEVICE float* keep() const { return room + 2 * kThreads; }
  DEVICE float* gain() const { return room + 3 * kThreads; }
  DEVICE float* of_heads() const { return room + 4 * kThreads; }  // Sums of weights; later, factors of sinks.
  DEVICE int channels() const { return heads * from.head_dim; }

  DEVICE void load_sums(int begin, int count, int query, int i) const {
    if (query >= heads || i >= count) return;
    const int index = from.index(first + (begin + i) * stride, head + query);
    maxima()[threadIdx.x] = load_from_all(from.maxima + index);
    sums()[threadIdx.x] = load_from_all(from.sums + index);
  }

  // Returns the maximum including these spans. `before` is that of the earlier spans.
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

  // Called by all threads together.
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

// The end of a block of few queries. The block that is last to finish `together` adjacent KV heads of a row merges
// their spans. Heads that are quantized have a multiple of 256 channels together.
struct Ending {
  int together;  // 0 if spans are merged elsewhere, or not at all.
  QuantizedOut quantized;

  // Called by all threads together, once the block's sums are stored.
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
      for (int c = threadIdx.x; c < own; c += kThreads) out[c] = merged[c];  // A thread merged these channels itself.
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
