// The panel loop of most levels. A step multiplies a k-group of kPanelRows tiles with four columns of kPanelTokens
// tokens.
#pragma once

#include "level/matmul/panel_segment.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

using PanelForm = AsDecoded;
constexpr int kBlockTiles = kPanelRows, kBlockTokens = kPanelTokens;

// State that the products of a type need; none here.
template <class Type>
struct PanelScope {};

// Adds the products of `count` segments to acc.
template <class Type, class View, int R, int T>
DECODE void add_segments(int count, View (&w)[R], const Activation<Type>* (&a)[T], F32x16 (&acc)[R][T]) {
  for (int s = 0; s < count; s++) {
    add_segment<Type>(w, a, acc);
    UNROLL for (int t = 0; t < T; t++) a[t]++;
    UNROLL for (int r = 0; r < R; r++) w[r].segment++;
  }
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
