// Masks positions of a span to which a query does not attend.
#pragma once

#include "level/attention_ops.h"
#include "simd/int8.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#define INLINE_LAMBDA __attribute__((always_inline))

// Returns the sixteen lanes from position `i`. Lanes outside [first_position, end) are those of `other`.
INLINE F32x16 seen(F32x16 x, int i, int first_position, int end, F32x16 other) {
  const int before = first_position - i, until = end - i;
  if (before > 0) x = first(before < 16 ? before : 16, other, x);
  return until < 16 ? first(until > 0 ? until : 0, x, other) : x;
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
