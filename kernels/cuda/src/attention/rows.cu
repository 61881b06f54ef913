// The steps around the sums of attention: planning, storing keys and values, and merging spans.
#include "rounding.cuh"
#include "work.cuh"
#include "heads.cuh"
#include "math.cuh"
#include "merge.cuh"
#include "plan.cuh"
#include "store.cuh"

namespace llamaclust::cuda {

PLAN

namespace {

constexpr int kMaxHeadDim = 576;

// Transforms the key, and in place the queries that share its KV head. Called by all threads together.
DEVICE Stored transformed(int row, const int32_t* positions, const Work& work, const int32_t* tables, float* q,
                          const float* k, const float* v, int heads, int kv_heads, int head_dim, int piece_bytes,
                          uint8_t* kv, const HeadTransform& transform) {
  SHARED(float, key, [kMaxHeadDim]);
  const int kv_head = blockIdx.y, position = positions[row], group = heads / kv_heads;
  const size_t from = (static_cast<size_t>(row) * kv_heads + kv_head) * head_dim;
  for (int i = threadIdx.x; i < head_dim; i += 128) key[i] = k[from + i];
  __syncthreads();
  transform_heads<128>(transform, row, q + (static_cast<size_t>(row) * heads + kv_head * group) * head_dim, group, key, head_dim);
  const int block = tables[work.table(row) + position / kBlockTokens];
  const float* value = v == nullptr ? nullptr : v + from;
  return {key, value, kv + piece_offset(block, kv_head, kv_heads, piece_bytes), position % kBlockTokens};
}

}  // namespace

// Stores keys and values of all rows before any is read. Transforms keys first, and queries in place. q is [rows][heads
// * head_dim]; k and v are [rows][kv_heads * head_dim], but v may be null. Grid: (rows, KV heads), blocks of 128
// threads.
#define STORE_ARGUMENTS                                                                                               \
  const int32_t *rows, const int32_t *positions, int32_t *plan, int32_t max_rows, int32_t slots,                      \
      const int32_t *tables, float *q, const float *k, const float *v, int32_t heads, int32_t kv_heads,               \
      int32_t head_dim, int32_t piece_bytes, uint8_t *kv
#define STORE(kv_name, Kv)                                                                                             \
  KERNEL(128, store_##kv_name, STORE_ARGUMENTS, HEAD_ARGUMENTS) {                                                     \
    const int row = blockIdx.x;                                                                                       \
    if (row >= *rows) return;                                                                                         \
    const HeadTransform transform HEAD_TRANSFORM;                                                                     \
    const Stored stored = transformed(row, positions, Work(plan, max_rows, slots), tables, q, k, v, heads, kv_heads,  \
                                      head_dim, piece_bytes, kv, transform);                                          \
    store<128>(Kv{}, stored, head_dim);                                                                               \
  }
STORE(f16, F16Kv)
STORE(q8_0, Q8Kv)
STORE(int8, Int8Kv)

// Merges the spans of rows whose spans were computed separately, in ascending order, and divides by the sum of weights.
// A thread per span computes the factors first, so only one multiplication and one fused multiply-add per span are
// sequential. Other rows are merged already, including the heads' `sinks`, which may be null. Grid: (rows, heads /
// heads of a block), blocks of 128 threads times up to 8 heads. If there is room for quantized rows, all rows go there
// instead of to `out`; the heads of a block then have 256 channels together.
KERNEL(1024, merge, const int32_t* rows, int32_t* plan, int32_t max_rows, int32_t slots, float* partials,
       const float* sinks, int32_t heads, int32_t head_dim, float* out, uint8_t* by_32, uint8_t* by_256) {
  let_next_kernel_begin();
  wait_for_earlier_kernels();
  const int row = blockIdx.x, place = threadIdx.y, head = blockIdx.y * blockDim.y + place;
  if (row >= *rows) return;
  const Work work(plan, max_rows, slots);
  const Partials from(partials, slots, heads, head_dim);
  const int spans = work.spans(row), first = work.slot(row), stride = work.stride(row);
  const QuantizedOut quantized{by_32, by_256};
  if (spans == 0 && !quantized.is_wanted()) return;
  SHARED(float, all_maxima, [8][128]);
  SHARED(float, all_sums, [8][128]);
  SHARED(float, all_keep, [8][128]);
  SHARED(float, all_gain, [8][128]);
  SHARED(float, merged, [256]);
  float *maxima = all_maxima[place], *sums = all_sums[place], *keep = all_keep[place], *gain = all_gain[place];
  float before = 0, sum = 0, total[4];  // Up to 512 channels, four per thread.
  for (int begin = 0; begin < spans; begin += 128) {
    const int count = spans - begin < 128 ? spans - begin : 128, i = threadIdx.x;
    __syncthreads();
    if (i < count) {
      const int index = from.index(first + (begin + i) * stride, head);
      maxima[i] = from.maxima[index];
      sums[i] = from.sums[index];
    }
    __syncthreads();
    float top = begin == 0 ? maxima[0] : before, until = top;
    for (int j = 0; j < count; j++) {
      if (j == i) before = top;
      top = greater(top, maxima[j]);
      if (j == i) until = top;
    }
    if (i < count) {
      keep[i] = exp(sub(before, until));
      gain[i] = exp(sub(maxima[i], until));
    }
    before = top;
    __syncthreads();
    for (int j = 0; j < count; j++) sum = begin + j == 0 ? sums[0] : fma(sums[j], gain[j], mul(sum, keep[j]));
#pragma unroll
    for (int part = 0; part < 4; part++) {
      const int channel = part * 128 + threadIdx.x;
      if (channel >= head_dim) continue;
#pragma unroll 8
      for (int j = 0; j < count; j++) {
        const float x = from.channels(first + (begin + j) * stride, head)[channel];
        total[part] = begin + j == 0 ? x : fma(x, gain[j], mul(total[part], keep[j]));
      }
    }
  }
  if (sinks != nullptr && spans > 0) {
    const SinkFactors sink(before, sinks[head]);
    sum = sink.sum(sum);
    for (int part = 0; part < 4; part++) total[part] = SinkFactors::value(total[part], sink.keep, sink.gain);
  }
#pragma unroll
  for (int part = 0; part < 4; part++) {
    const int channel = part * 128 + threadIdx.x;
    if (channel >= head_dim) continue;
    float& to = out[(row * heads + head) * head_dim + channel];
    const float value = spans == 0 ? to : div(total[part], sum);
    (quantized.is_wanted() ? merged[place * head_dim + channel] : to) = value;
  }
  if (!quantized.is_wanted()) return;
  __syncthreads();
  if (place == 0 && threadIdx.x < kWarp) quantized.store(merged, row, blockIdx.y, heads * head_dim);
}

}  // namespace llamaclust::cuda
