// Decoded segments, the elements of a panel.
#pragma once

#include "level/matmul/segment.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <class Type, bool has = Type::kHasMin>
struct SegmentMin {};
template <class Type>
struct SegmentMin<Type, true> {
  F32x16 value;
};

// Returns k-group g of sub-block j as signed bytes. The offset is subtracted, unless the mins subtract it.
template <class Type>
DECODE Bytes signed_group(const TileSegment<Type>& w, int j, int g) {
  constexpr int offset = kOffsetInMins<Type> ? 0 : Type::kOffset;
  static_assert((1 << Type::kBits) - 1 - offset <= 127 && !kScaledUp<Type>);
  const Bytes group = w.group(j, g);
  if constexpr (offset == 0) return group;
  return add_bytes(group, as_bytes(broadcast(static_cast<int32_t>(0x01010101u * (256 - offset)))));
}

// A decoded segment. Form describes what the panel's loop takes: whether bytes are signed (kSigned), and the layout of
// a sub-block's k-groups (arrange) and scales (Scales<Type>).
template <class Type, class Form>
struct DecodedSegment {
  static constexpr bool kSigned = Form::kSigned;
  Bytes groups[Type::kSubBlocks * kGroups<Type>];
  F32x16 scale_;
  [[no_unique_address]] SegmentMin<Type> min_;
  [[no_unique_address]] typename Form::template Scales<Type> sub_scales;
  [[no_unique_address]] SubMins<Type> sub_mins;

  DECODE explicit DecodedSegment(const TileSegment<Type>& w) : sub_scales(w.sub_scales), sub_mins(w.sub_mins) {
#pragma GCC unroll 1
    for (int first = 0; first < Type::kSubBlocks; first += kTogether<Type>)
      UNROLL for (int j = first; j < first + kTogether<Type>; j++) {
        w.prefetch(j);
        UNROLL for (int g = 0; g < kGroups<Type>; g++) {
          if constexpr (kSigned)
            groups[j * kGroups<Type> + g] = signed_group(w, j, g);
          else
            groups[j * kGroups<Type> + g] = w.group(j, g);
        }
        Form::template arrange<kGroups<Type>>(groups + j * kGroups<Type>);
      }
    scale_ = w.scale();
    if constexpr (Type::kHasMin) min_.value = w.min();
  }
};

// The view of a decoded segment that products take.
template <class Type, class Form>
struct DecodedView {
  static constexpr bool kDecoded = true;
  static constexpr bool kMayUnroll = true;
  static constexpr bool kSigned = Form::kSigned;
  template <int T>
  static constexpr bool kPrefetches = false;
  const DecodedSegment<Type, Form>* segment;
  DECODE Bytes group(int j, int g) const { return segment->groups[j * kGroups<Type> + g]; }
  DECODE Scale sub_scale(int j) const { return segment->sub_scales.scales[j]; }
  DECODE Bytes mins(int i) const { return segment->sub_mins.mins[i]; }
  DECODE F32x16 scale() const { return segment->scale_; }
  DECODE F32x16 min() const { return segment->min_.value; }
};

// Leaves k-groups as decoders return them.
struct AsDecoded {
  static constexpr bool kSigned = false;
  template <class Type>
  using Scales = SubScales<Type>;
  template <int groups>
  static DECODE void arrange(Bytes*) {}
};

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
