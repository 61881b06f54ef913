// Attention of few queries, as in decoding. Reading keys and values limits its speed.
#include "few.cuh"
#include "byte_values.cuh"
#include "heads.cuh"
#include "merge.cuh"
#include "store.cuh"
#include "values.cuh"

namespace llamaclust::cuda {
namespace {

// Number of blocks whose values are loaded together: as many as fit into 48 KiB beside the scores.
template <int TQ>
inline constexpr int kValueBlocks = TQ < 16 ? 2 : 1;

// Floats for scores, or for merging spans.
template <int TQ>
inline constexpr int kScoreFloats = TQ * kScoreStride > SpanMerger::kRoom ? TQ * kScoreStride : SpanMerger::kRoom;

// Computes values of a slice, in floats or in integers.
template <class Kv, int TQ, int BLOCKS>
struct SliceOf {
  using Type = Values<Kv, TQ, BLOCKS, kSliceChannels>;
};
template <int TQ, int BLOCKS>
struct SliceOf<Int8Kv, TQ, BLOCKS> {
  using Type = ByteValues<TQ, kSliceChannels>;
};
template <class Kv, int TQ, int BLOCKS>
using SliceValues = typename SliceOf<Kv, TQ, BLOCKS>::Type;

// Computes the values of all channels; or those of the block's slice, for four times as many positions at a time.
template <int BLOCKS, class Kv, int TQ>
DEVICE void add_slice(const Span<Kv, TQ>& span) {
  if (span.slices == 1) return add_values<BLOCKS>(span);
  SliceValues<Kv, TQ, 4 * BLOCKS>{span, span.slice * kSliceChannels}.run();
}

// Inputs of rows that are alone in their sequences, if k is not null: queries that are not transformed yet, and a key
// and a value that are not stored yet.
struct Fresh {
  static constexpr int kLineBytes = 128;
  const float *k, *v;
  uint8_t* kv;
  HeadTransform transform;

  // Prefetches weights, and keys and values of earlier positions, which no kernel of this step writes. Each slice
  // prefetches a part of the pieces.
  template <class Kv, int TQ>
  DEVICE void bring_near(const Span<Kv, TQ>& span) const {
    const int lines = (span.step.piece_bytes + kLineBytes - 1) / kLineBytes, earlier = span.end() - (span.ends(0) ? 1 : 0);
    const int first = span.first() / kBlockTokens, count = (earlier + kBlockTokens - 1) / kBlockTokens - first;
    for (int i = threadIdx.x * span.slices + span.slice; i < count * lines; i += kThreads * span.slices)
      prefetch(span.piece((first + i / lines) * kBlockTokens) + i % lines * kLineBytes);
    for (const float* weight : {transform.of_queries.weight, transform.of_key.weight})
      if (weight != nullptr && threadIdx.x * (kLineBytes / 4) < span.step.head_dim)
        prefetch(weight + threadIdx.x * (kLineBytes / 4));
  }

  // Transforms the span's queries in its stage. A block whose span includes the row's own position stores the row's key
  // and value; with slices, several blocks store the same bytes. The stage has queries, the key, the value, and the
  // angles.
  template <class Kv, int TQ>
  DEVICE void bring(const Span<Kv, TQ>& span, bool is_first) const {
    const Step& step = span.step;
    const int head_dim = step.head_dim, count = span.heads * head_dim, row = span.item.row;
    const size_t own = (static_cast<size_t>(row) * step.kv_heads + span.kv_head) * head_dim;
    float *queries = span.stage, *key = queries + count, *value = key + head_dim, *angles = value + head_dim;
    const int turned = 2 * transform.rotation.pairs;
    for (int i = threadIdx.x; i < turned; i += kThreads) angles[i] = transform.rotation.angles[turned * row + i];
    if (is_first) bring_near(span);
    wait_for_earlier_kernels();
    const float* from = step.q + (static_cast<size_t>(row) * step.heads + span.head) * head_dim;
    for (int i = threadIdx.x; i < count + 2 * head_dim; i += kThreads)
      queries[i] = i < count ? from[i] : i < count + head_dim ? k[own + i - count] : v[own + i - count - head_dim];
    __syncthreads();
    HeadTransform staged = transform;
    if (turned > 0) staged.rotation.angles = angles;
    transform_heads<kThreads>(staged, 0, queries, span.heads, key, head_dim);
    if (!span.ends(0)) return;
    const int at = span.from - span.start();
    const int block = span.queries.blocks[at / kBlockTokens];
    uint8_t* piece = kv + piece_offset(block, span.kv_head, step.kv_heads, step.piece_bytes);
    store<kThreads>(Kv{}, {key, value, piece, at % kBlockTokens}, head_dim);
    __syncthreads();
  }
};

}  // namespace

// Grid: (KV heads times parts of TQ query heads that share one, any number of blocks), blocks of 256 threads. Blocks
// with items come first. The others end at once, except for one that waits, so that later kernels are ordered after
// earlier ones. The product of a tile's rows and the heads of a part is at most the number in the kernel's name
// (attention_rows.plan's few_rows). With `k`, each row belongs to another sequence, and brings what `Fresh` describes.
// This also works if spans of `together` KV heads are merged here, whose query heads form one part.
#define FEW(kv_name, TQ, Kv, Scores)                                                                                  \
  KERNEL_IN_BLOCKS(256, 2, few_##kv_name##_##TQ, ATTENTION_ARGUMENTS, const float* k, const float* v,                 \
                   HEAD_ARGUMENTS, int32_t together, uint8_t* by_32, uint8_t* by_256) {                               \
    float* scores = reinterpret_cast<float*>(DYNAMIC_SHARED);                                                         \
    float* stage = scores + kScoreFloats<TQ>;                                                                         \
    SHARED(Queries<TQ>, queries, );                                                                                   \
    let_next_kernel_begin();                                                                                          \
    const Step step ATTENTION_STEP;                                                                                   \
    const Fresh fresh{k, v, kv, HEAD_TRANSFORM};                                                                      \
    bool is_first = true;                                                                                             \
    const auto prepare = [&](const Span<Kv, TQ>& span) {                                                              \
      if (k != nullptr)                                                                                               \
        fresh.bring(span, is_first);                                                                                  \
      else                                                                                                            \
        wait_for_earlier_kernels();                                                                                   \
      is_first = false;                                                                                               \
    };                                                                                                                \
    const auto values = [](const Span<Kv, TQ>& span) { add_slice<kValueBlocks<TQ>>(span); };                          \
    const Work work(plan, max_rows, slots);                                                                           \
    const Ending ending{together, {by_32, by_256}};                                                                   \
    const auto finish = [&](const Item& item, int kv_head, int slices) {                                              \
      ending.finish(step, work, item, kv_head, slices, scores, stage);                                                \
    };                                                                                                                \
    const Share share{static_cast<int>(blockIdx.x), static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};       \
    attend<Kv, TQ, Scores<TQ>>(step, work, Work::kFew, share, queries, scores, stage, k == nullptr ? nullptr : stage, \
                               prepare, values, finish);                                                              \
    if (blockIdx.x + blockIdx.y == 0) wait_for_earlier_kernels();                                                     \
  }
FEW(f16, 1, F16Kv, F16Scores)
FEW(f16, 2, F16Kv, F16Scores)
FEW(f16, 4, F16Kv, F16Scores)
FEW(f16, 8, F16Kv, F16Scores)
FEW(f16, 16, F16Kv, F16Scores)
FEW(q8_0, 1, Q8Kv, Q8Scores)
FEW(q8_0, 2, Q8Kv, Q8Scores)
FEW(q8_0, 4, Q8Kv, Q8Scores)
FEW(q8_0, 8, Q8Kv, Q8Scores)
FEW(q8_0, 16, Q8Kv, Q8Scores)
FEW(int8, 1, Int8Kv, Int8Scores)
FEW(int8, 2, Int8Kv, Int8Scores)
FEW(int8, 4, Int8Kv, Int8Scores)
FEW(int8, 8, Int8Kv, Int8Scores)
FEW(int8, 16, Int8Kv, Int8Scores)

}  // namespace llamaclust::cuda
