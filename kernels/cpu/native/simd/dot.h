// Integer dot products on every instruction set: sixteen rows a step, four columns each.
//
// A `Bytes` is a k-group: 64 unsigned bytes, byte 4 * row + column. `step` adds one k-group times four activation bytes
// (each in [-127, 127], packed in an int32) to `Sums`, which hold kGroupsPerSum<kBits> such steps if no byte has more
// than kBits bits; then they go to int32 lanes, plain or times a scale per row. All of it is exact.
//
// field<shift, mask>: each byte shifted right (left where negative), then masked; no bit that crosses into another byte
// may be in the mask. lookup: each byte becomes an entry of a table, by its low four bits; the highest is clear.
// column<n>, signed_column<n>: column n of a k-group as lanes.
//
// kCentred<kBits>: `step` takes bytes of eight bits as signed, less 128, so that the caller need not subtract it.
// kAnyByte: bytes of eight bits are multiplied as they are, and sums of them have room (tiles take signed bytes).
// kUnrollsSegments: a segment's loop for one token is unrolled; registers hold what its sub-blocks share, and loads may be
// left to the hardware prefetcher (kFollowed).
// kSumsFrom: sums may begin with any int32 (sums_from), with what an offset subtracts.
// kPanelRows, kPanelTokens, kFloatRows, kFloatTokens: tiles times tokens whose sums fit in the registers, for quantized
// and for float weights. kDirectTokens<kBits>: up to how many tokens decoding a tile again for every kDirectWidth costs
// less than a panel.
#pragma once

#include "simd/lanes.h"

// Loops over rows, tokens and k-groups whose counts are constants: unrolled, so that arrays of registers are registers.
#if defined(__AVX2__) || defined(LLAMACLUST_NEON)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || (defined(LLAMACLUST_NEON) && defined(__ARM_FEATURE_DOTPROD))

// An instruction adds four products of bytes to an int32 lane: sums are lanes.
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
// total + scale * (sums - offset); offset is even.
INLINE I32x16 add_scaled(I32x16 total, Sums sums, int32_t offset, Scale scale) {
  return add_scaled(total, sub(sums, broadcast(offset)), scale);
}

#elif !defined(LLAMACLUST_NEON)

// Sums are pairs of columns in 16 bits, below 32768: 2 columns * 127 * the greatest byte (128 for eight bits) * groups.
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

// What decoders read: lines of a tile, and 16 bits a row. (Where a lane is a thread, that also says which row it has.)
using Lines = const uint8_t*;
INLINE const uint16_t* halves(Lines p) { return reinterpret_cast<const uint16_t*>(p); }

// For each of up to eight k-groups, how its bits come out of a line: shifted, as `field` does it, and masked.
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

// Two points of a grid a lane, each of 16 bits. lookup_points<n>: both halves of a lane, below n, become entries of a
// table that is aligned to 64. spread<bits>: one half of each lane in both, shifted right by `bits` in the upper.
// with_signs<offset>: bytes offset + x become offset - x where their bit is set, bit i for byte i. AVX2 has four_of_eight,
// four_of_four and nine_bits in place of the first two.
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
