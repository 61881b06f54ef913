// The panel loop of levels with an instruction that multiplies eight columns of two rows with those of two tokens.
// Pairs of k-groups are zipped once, when they are decoded. Sums stay in blocks of two rows and two tokens until the
// end of a segment.
#pragma once

#include "level/matmul/panel_segment.h"
#include "simd/neon/row_pairs.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kBlockTiles = 1, kBlockTokens = 4;

// Sub-block scales, each repeated for both tokens of a block.
template <class Type, bool has = kSubScaled<Type>>
struct PairScales {
  DECODE explicit PairScales(const SubScales<Type>&) {}
};
template <class Type>
struct PairScales<Type, true> {
  BlockSums scales[Type::kSubBlocks];
  DECODE explicit PairScales(const SubScales<Type>& from) {
    UNROLL for (int j = 0; j < Type::kSubBlocks; j++) scales[j] = twice(from.scales[j]);
  }
};

struct PanelForm {
  static constexpr bool kSigned = true;
  template <class Type>
  using Scales = PairScales<Type>;
  template <int groups>
  static DECODE void arrange(Bytes* sub_block) {
    UNROLL for (int g = 0; g < groups; g += 2) zip_columns(sub_block[g], sub_block[g + 1]);
  }
};

template <class Type>
struct PanelScope {};

// Computes the integer sums of a segment.
template <class Type, class View, int T>
DECODE void sum_blocks(const View& w, const Activation<Type>* const (&a)[T], BlockSums (&total)[T / 2]) {
  constexpr int groups = kGroups<Type>;
  UNROLL for (int t = 0; t < T / 2; t++) total[t] = no_block_sums();
#pragma GCC unroll 1
  for (int j = 0; j < Type::kSubBlocks; j++) {
    BlockSums sums[T / 2];
    UNROLL for (int t = 0; t < T / 2; t++) sums[t] = no_block_sums();
    UNROLL for (int g = 0; g < groups; g += 4) {
      TokenPairs tokens[T / 2];
      UNROLL for (int t = 0; t < T / 2; t++) {
        const int column = 4 * (j * groups + g);
        tokens[t] = zip_tokens(a[2 * t]->q + column, a[2 * t + 1]->q + column);
      }
      UNROLL for (int i = 0; i < 2; i++) {
        const Bytes upper = w.group(j, g + 2 * i), lower = w.group(j, g + 2 * i + 1);
        UNROLL for (int t = 0; t < T / 2; t++) sums[t] = step(sums[t], upper, lower, tokens[t].v[i]);
      }
    }
    UNROLL for (int t = 0; t < T / 2; t++) {
      if constexpr (kSubScaled<Type>)
        total[t] = add_scaled(total[t], sums[t], w.segment->sub_scales.scales[j]);
      else
        total[t] = add(total[t], sums[t]);
    }
  }
}

template <class Type, class View, int T>
DECODE void add_segments(int count, View (&w)[1], const Activation<Type>* (&a)[T], F32x16 (&acc)[1][T]) {
  for (int s = 0; s < count; s++) {
    BlockSums blocks[T / 2];
    sum_blocks<Type>(w[0], a, blocks);
    I32x16 total[1][T];
    UNROLL for (int t = 0; t < T; t += 2) unzip_tokens(blocks[t / 2], total[0][t], total[0][t + 1]);
    add_total<Type>(w, a, total, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
    w[0].segment++;
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
