// Integer dot products on every instruction set. A step multiplies four columns of sixteen rows.
//
// `Bytes` is a k-group: 64 unsigned bytes, byte 4 * row + column. `step` adds the products of a k-group with four
// activations (in [-127, 127], packed in an int32) to `Sums`. Sums have room for kGroupsPerSum<kBits> steps if no byte
// has more than kBits bits; then they are added to int32 lanes, optionally times a scale per row. All results are
// exact.
//
// field<shift, mask> shifts each byte right (left if `shift` is negative) and masks it. The mask must exclude bits that
// come from another byte. lookup replaces each byte by an entry of a table, by its low four bits; the highest bit must
// be clear. column<n> and signed_column<n> return column n of a k-group as lanes.
//
// kCentred<kBits>: `step` takes bytes of eight bits as signed, less 128, so the caller need not subtract the offset.
// kAnyByte: eight-bit bytes can be multiplied unsigned, and sums have room for them. (Tile registers take signed
// bytes.)
// kUnrollsSegments: the loop over a segment for one token is unrolled. Then values that sub-blocks share stay in
// registers, and loads may be left to the hardware prefetcher (kFollowed).
// kSumsFrom: sums can start with any int32 (sums_from), for example with a subtracted offset.
// kPanelRows, kPanelTokens, kFloatRows, kFloatTokens: numbers of tiles and tokens whose sums fit into the registers,
// for quantized and for float weights.
// kDirectTokens<kBits>: maximum number of tokens for which decoding a tile again for every kDirectWidth tokens costs
// less than a panel.
#pragma once

#include "simd/lanes.h"

// Unrolls loops with constant counts over rows, tokens and k-groups, so that arrays of vectors stay in registers.
#if defined(__AVX2__) || defined(LLAMACLUST_NEON)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || (defined(LLAMACLUST_NEON) && defined(__ARM_FEATURE_DOTPROD))

// One instruction adds four byte products to an int32 lane, so sums are lanes.
using Sums = I32x16;
using Scale = I32x16;

template <int kBits>
constexpr int kGroupsPerSum = 64;

INLINE Sums no_sums() { return broadcast(0); }
INLINE Sums sums_from(I32x16 x) { return x; }
INLINE I32x16 add_sums(I32x16 total, Sums sums) { return add(total, sums); }
INLINE Scale make_scale(I32x16 scale) { return scale; }
INLINE I32x16 scale_lanes(Scale scale) { return scale; }
INLINE I32x16 add_scaled(I32x16 total, Sums sums, Scale scale) { return add(total, mul(sums, scale)); }
// Returns total + scale * (sums - offset). `offset` is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(sums, broadcast(offset)), scale);
}

#elif !defined(LLAMACLUST_NEON)

// Sums of column pairs in 16 bits. They stay below 32768: 2 columns * 127 * the maximum byte (128 for eight bits) *
// groups.
template <int kBits>
constexpr int kGroupsPerSum = kBits <= 4 ? 8 : kBits == 5 ? 4 : kBits == 6 ? 2 : 1;

template <int kBits>
constexpr bool kCentred = kBits == 8;
constexpr bool kSumsFrom = false;

#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL

#if defined(__AVX512BW__)
#include "simd/avx512/dot.h"
#if defined(__AVX512VBMI__)
#include "simd/avx512/byte_lookups.h"
#endif
#elif defined(__AVX2__)
#include "simd/avx2/dot.h"
#elif defined(LLAMACLUST_NEON)
#include "simd/neon/dot.h"
#else
#include "simd/generic/dot.h"
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#if defined(__AVX512BW__)
constexpr bool kUnrollsSegments = true;
#else
constexpr bool kUnrollsSegments = false;
#endif

#if (defined(__AVX512VNNI__) || defined(__AVXVNNI__)) && !defined(LLAMACLUST_TILES)
constexpr bool kAnyByte = true;
#else
constexpr bool kAnyByte = false;
#endif

// Operands of decoders: lines of a tile, and one 16-bit number per row. (On a GPU, where a lane is a thread, Lines also
// has the row of the thread.)
using Lines = const uint8_t*;
INLINE const uint16_t* halves(Lines p) { return reinterpret_cast<const uint16_t*>(p); }

// For each of up to eight k-groups, the shift (as in `field`) and the mask that extract its bits from a line.
struct Places {
  int8_t shift[8];
  uint8_t mask[8];
};
template <Places places>
INLINE Bytes field_of(Bytes line, int g) {
  switch (g) {
    case 0: return field<places.shift[0], places.mask[0]>(line);
    case 1: return field<places.shift[1], places.mask[1]>(line);
    case 2: return field<places.shift[2], places.mask[2]>(line);
    case 3: return field<places.shift[3], places.mask[3]>(line);
    case 4: return field<places.shift[4], places.mask[4]>(line);
    case 5: return field<places.shift[5], places.mask[5]>(line);
    case 6: return field<places.shift[6], places.mask[6]>(line);
    default: return field<places.shift[7], places.mask[7]>(line);
  }
}

// A lane holds two points of a grid, 16 bits each. lookup_points<n> replaces both halves of each lane (indices below n)
// by entries of a table that is aligned to 64 bytes. spread<bits> copies one half of each lane to both halves, and
// shifts the upper copy right by `bits`. with_signs<offset> turns bytes offset + x into offset - x where their bit is
// set; bit i belongs to byte i. AVX2 has four_of_eight, four_of_four and nine_bits instead of the first two.
#if !defined(__AVX2__)
template <int n>
INLINE I32x16 lookup_points(const uint16_t* table, I32x16 index) {
  alignas(64) uint16_t halves[32];
  store_bytes(reinterpret_cast<uint8_t*>(halves), as_bytes(index));
  for (uint16_t& half : halves) half = table[half];
  return as_lanes(load_bytes(reinterpret_cast<const uint8_t*>(halves)));
}

template <int bits>
INLINE Bytes spread(I32x16 points, int half) {
  const I32x16 lower = half == 0 ? keep(points, 0xffff) : shift_right(points, 16);
  return as_bytes(either(lower, shift_left<16>(shift_right(lower, bits))));
}
#endif

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
