// Spans of a row that were computed apart, put together in ascending order.
#pragma once

#include "elementwise/quantize.cuh"
#include "work.cuh"

namespace llamaclust::cuda {

inline constexpr int kMergers = 128;  // threads that merge the spans of a head
inline constexpr int kMergedParts = 4;  // of 128 channels

// Of that many spans of a head, in shared memory.
struct SpanFactors {
  float *maxima, *sums, *keep, *gain;

  // Room for `place`, of kFloats each.
  static constexpr int kFloats = 4 * kMergers;
  DEVICE SpanFactors(float* room, int place)
      : maxima(room + place * kFloats), sums(maxima + kMergers), keep(sums + kMergers), gain(keep + kMergers) {}
};

// What a row's spans sum up to for a head: a thread has channels i, i + 128, ...
struct Merged {
  float sum = 0, total[kMergedParts];

  DEVICE float channel(int part) const { return div(total[part], sum); }
};

// The factors of all spans come first, by as many threads: what is left in order is one multiplication and one multiply-add
// a span. All threads of a block together, for heads of one row; `i` of kMergers is the thread among those of its head.
DEVICE Merged merge_spans(const Partials& from, int spans, int first, int stride, int head, int i, const float* sinks,
                          const SpanFactors& at) {
  Merged merged;
  float before = 0;
  for (int begin = 0; begin < spans; begin += kMergers) {
    const int count = spans - begin < kMergers ? spans - begin : kMergers;
    __syncthreads();
    if (i < count) {
      const int index = from.index(first + (begin + i) * stride, head);
      at.maxima[i] = load_shared_by_all(from.maxima + index);
      at.sums[i] = load_shared_by_all(from.sums + index);
    }
    __syncthreads();
    float top = begin == 0 ? at.maxima[0] : before, until = top;
    for (int j = 0; j < count; j++) {
      if (j == i) before = top;
      top = greater(top, at.maxima[j]);
      if (j == i) until = top;
    }
    if (i < count) {
      at.keep[i] = exp(sub(before, until));
      at.gain[i] = exp(sub(at.maxima[i], until));
    }
    before = top;
    __syncthreads();
    for (int j = 0; j < count; j++)
      merged.sum = begin + j == 0 ? at.sums[0] : fma(at.sums[j], at.gain[j], mul(merged.sum, at.keep[j]));
#pragma unroll
    for (int part = 0; part < kMergedParts; part++) {
      const int channel = part * kMergers + i;
      if (channel >= from.head_dim) continue;
#pragma unroll 8
      for (int j = 0; j < count; j++) {
        const float x = load_shared_by_all(from.channels(first + (begin + j) * stride, head) + channel);
        float& total = merged.total[part];
        total = begin + j == 0 ? x : fma(x, at.gain[j], mul(total, at.keep[j]));
      }
    }
  }
  if (sinks != nullptr && spans > 0) {
    const SinkFactors sink(before, sinks[head]);
    merged.sum = sink.sum(merged.sum);
    for (float& total : merged.total) total = SinkFactors::value(total, sink.keep, sink.gain);
  }
  return merged;
}

// Where quantized rows go, in one of the formats; both null: nowhere.
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

}  // namespace llamaclust::cuda
