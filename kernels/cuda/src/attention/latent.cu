// Latent attention: all heads share one key per position, and its first channels are the value.
#include "few.cuh"
#include "tile.cuh"

namespace llamaclust::cuda {
namespace {

// Weighted values of a span. Sixteen lanes compute some channels of some queries. Each lane has one position of each
// block and adds them in order; then the lanes are added in a tree.
template <class Kv, int TQ>
struct LatentValues {
  static constexpr int kChannels = Kv::kChannels;  // In sixteen bytes of a key.
  static constexpr int kQueries = 32 / kChannels;  // Queries that are computed together.
  static constexpr bool kScaled = Kv::kChannelBytes == 1;

  struct Sums {
    float x[kQueries][kChannels];
  };

  const Span<Kv, TQ>& span;
  const int lane;

  DEVICE void load(int at, int chunk, float (&x)[kChannels]) const {
    const int head_dim = span.step.head_dim;
    const uint8_t* piece = span.piece(at);
    const uint4 key = load_chunk<Kv>(piece, lane, chunk, head_dim);
    float scale = 1.0f;
    if constexpr (kScaled)
      scale = half_to_float(
          *reinterpret_cast<const uint16_t*>(piece + Kv::key_scale(lane, chunk * kChannels / kGroupChannels, head_dim)));
#pragma unroll
    for (int c = 0; c < kChannels; c++)
      x[c] = kScaled ? mul(element_of(Kv{}, key, c), scale) : element_of(Kv{}, key, c);
  }

  // Positions to which a query does not attend count as 0, because they may hold NaN.
  DEVICE Sums sums_of(int chunk, int first_query) const {
    Sums sums = {};
    int ends[kQueries], end = 0;
#pragma unroll
    for (int q = 0; q < kQueries; q++) {
      ends[q] = first_query + q < span.count() ? span.queries.ends[first_query + q] : 0;
      end = ends[q] > end ? ends[q] : end;
    }
#pragma unroll 1
    for (int begin = 0; begin < end; begin += kBlockTokens) {
      const int at = begin + lane;
      float x[kChannels] = {};
      if (at < end) load(at, chunk, x);
#pragma unroll
      for (int q = 0; q < kQueries; q++) {
        if (begin >= ends[q]) continue;
        const bool seen = at < ends[q];
        const float weight = seen ? span.scores[(first_query + q) * kScoreStride + at] : 0.0f;
#pragma unroll
        for (int c = 0; c < kChannels; c++) sums.x[q][c] = fma(weight, seen ? x[c] : 0.0f, sums.x[q][c]);
      }
    }
    return sums;
  }

  DEVICE void keep(const Sums& sums, int chunk, int first_query, bool works) const {
#pragma unroll
    for (int q = 0; q < kQueries; q++)
#pragma unroll
      for (int c = 0; c < kChannels; c++) {
        const float sum = reduce<16>(sums.x[q][c], [](float a, float b) { return add(a, b); });
        const int query = first_query + q, channel = chunk * kChannels + c;
        const bool is_there = works && lane == c && query < span.count() && channel < span.step.value_dim;
        if (is_there && span.sees(query)) span.keep_value(query, channel, sum);
      }
  }
};

// Computes all channels, or those of the block's slice. Called by all threads together, after the weights. Half a warp
// computes one item.
template <class Kv, int TQ>
DEVICE void add_latent_values(const Span<Kv, TQ>& span) {
  using Values = LatentValues<Kv, TQ>;
  const Values values{span, static_cast<int>(threadIdx.x) % 16};
  const int all = (span.step.value_dim + Values::kChannels - 1) / Values::kChannels;
  const int each = (all + span.slices - 1) / span.slices, first = span.slice * each;
  const int chunks = all - first < each ? all - first : each;
  const int items = chunks * ((span.count() + Values::kQueries - 1) / Values::kQueries);
  const int half = threadIdx.x / 16;
  for (int begin = half / 2 * 2; begin < items; begin += kThreads / 16) {
    const int item = begin + half % 2;
    const bool works = item < items;
    const int chunk = works ? first + item % chunks : 0, first_query = works ? item / chunks * Values::kQueries : 0;
    values.keep(works ? values.sums_of(chunk, first_query) : typename Values::Sums{}, chunk, first_query, works);
  }
}

}  // namespace

// Kernels like attention.tile, without a window.
#define LATENT(kv_name, TQ, Kv, Scores)                                                                               \
  ATTENTION_KERNEL(latent_##kv_name##_##TQ, TQ, Kv, Scores, Work::kMany, scores_floats<TQ>(Scores<TQ>{}, head_dim),   \
                   add_latent_values)
LATENT(f16, 16, F16Kv, F16Tile)
LATENT(f16, 32, F16Kv, F16Tile)
LATENT(q8_0, 16, Q8Kv, Q8Tile)
LATENT(int8, 16, Int8Kv, Int8Tile)

// Kernels like attention.few, with one row per tile. Few heads form a part, so that there are more blocks with fewer
// sequential sums.
#define FEW(kv_name, TQ, Kv, Scores)                                                                                  \
  ATTENTION_KERNEL(few_##kv_name##_##TQ, TQ, Kv, Scores, Work::kFew, 0, add_latent_values)
FEW(f16, 4, F16Kv, F16Scores)
FEW(f16, 8, F16Kv, F16Scores)
FEW(q8_0, 4, Q8Kv, Q8Scores)
FEW(q8_0, 8, Q8Kv, Q8Scores)
FEW(int8, 4, Int8Kv, Int8Scores)
FEW(int8, 8, Int8Kv, Int8Scores)

}  // namespace llamaclust::cuda
