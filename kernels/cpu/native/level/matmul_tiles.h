// Where the segments of a tile stand (see matrix.h).
#pragma once

#include "matmul_segment.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type>
DECODE TileSegment<Type> segment_of(const uint8_t* tile, int s, int segments) {
  constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
  constexpr int group = Type::kLayout.group_segments();
  const int first = s / group * group, count = segments - first < group ? segments - first : group;
  const uint8_t* bodies = tile + static_cast<size_t>(first) * (body_bytes + tail_bytes);
  return {bodies + (s - first) * body_bytes, bodies + count * body_bytes + (s - first) * tail_bytes};
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
