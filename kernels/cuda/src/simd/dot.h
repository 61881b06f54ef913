// The operations in which decoders of quant types (kernels/cpu/native/level/quants/) are written, for one thread. A
// register of a CPU has a line of a tile, with sixteen rows; a thread has one of these rows, so `Bytes` are four
// columns. This file replaces kernels/cpu/native/simd/dot.h, which describes the operations.
#pragma once

#include "base.cuh"

#define LLAMACLUST_LEVEL cuda
#define DECODE __device__ __forceinline__
#define TABLE __device__ constexpr
#define GRID_MEMORY __device__
#ifdef LLAMACLUST_SHIM
#define UNROLL
#define NO_UNROLL
#else
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#endif

namespace llamaclust::cuda {
namespace {

using Bytes = uint32_t;
using Scale = int32_t;

// Lines, which are the same for all threads, and the row of this thread.
struct Lines {
  const uint8_t* at;
  int row;
  DECODE Lines operator+(int bytes) const { return {at + bytes, row}; }
  DECODE Lines operator-(int bytes) const { return {at - bytes, row}; }
};
DECODE Lines halves(Lines p) { return p; }

// Plain loads: decoders load a line once for each of its k-groups. Compilers merge such loads, but not calls of __ldg.
DECODE Bytes load_bytes(Lines p) { return reinterpret_cast<const uint32_t*>(p.at)[p.row]; }
DECODE uint16_t load_half(Lines p) { return reinterpret_cast<const uint16_t*>(p.at)[p.row]; }

DECODE constexpr uint32_t four_times(int byte) { return (static_cast<uint32_t>(byte) & 255) * 0x01010101u; }
template <int shift, int mask>
DECODE Bytes field(Bytes b) {
  return (shift >= 0 ? b >> (shift & 7) : b << (-shift & 7)) & four_times(mask);
}

// On a CPU, the k-group is known at compile time. Here it differs between threads but is constant in each, so shift and
// mask are found once, and two instructions remain.
struct Places {
  int8_t shift[8];
  uint8_t mask[8];
};
template <class T>
__host__ __device__ constexpr uint64_t packed(const T (&bytes)[8], int mask) {
  uint64_t all = 0;
  for (int i = 0; i < 8; i++) all |= static_cast<uint64_t>(bytes[i] & mask) << 8 * i;
  return all;
}
template <Places places>
DECODE Bytes field_of(Bytes line, int g) {
  constexpr uint64_t shifts = packed(places.shift, 31), masks = packed(places.mask, 255);
  const uint32_t mask = static_cast<uint32_t>(masks >> 8 * g) & 255;
  return __funnelshift_r(line, line, static_cast<uint32_t>(shifts >> 8 * g)) & mask * 0x01010101u;
}

DECODE Bytes merge(Bytes a, Bytes b) { return a | b; }
DECODE Bytes both(Bytes a, Bytes b) { return a & b; }
DECODE Bytes add_bytes(Bytes a, Bytes b) {
  return ((a & 0x7f7f7f7fu) + (b & 0x7f7f7f7fu)) ^ ((a ^ b) & 0x80808080u);
}
// The table is in four registers. A selector of `__byte_perm` reaches eight bytes, so both halves are looked up, and
// the fourth bit of each index selects one.
DECODE Bytes lookup(const uint8_t (&table)[16], Bytes b) {
  uint32_t words[4];
  UNROLL for (int i = 0; i < 4; i++) {
    const uint8_t* four = table + 4 * i;
    words[i] = four[0] | four[1] << 8 | four[2] << 16 | static_cast<uint32_t>(four[3]) << 24;
  }
  const uint32_t index = b & 0x0f0f0f0fu;
  const uint32_t selectors = __byte_perm(index | index >> 4, 0, 0x4420);
  const uint32_t low = __byte_perm(words[0], words[1], selectors & 0x7777);
  if ((words[2] | words[3]) == 0) return low;  // Known at compile time: such a table has no upper half.
  const uint32_t high = __byte_perm(words[2], words[3], selectors & 0x7777);
  return __byte_perm(low, high, 0x3210 | (selectors & 0x8888) >> 1);
}

template <int n>
DECODE I32x16 column(Bytes b) {
  return static_cast<int32_t>(b >> 8 * n & 255);
}
template <int n>
DECODE I32x16 signed_column(Bytes b) {
  return static_cast<int8_t>(b >> 8 * n);
}
DECODE Scale make_scale(I32x16 scale) { return scale; }

DECODE I32x16 as_lanes(Bytes b) { return static_cast<int32_t>(b); }
DECODE Bytes as_bytes(I32x16 a) { return static_cast<uint32_t>(a); }

DECODE F32x16 from_f16(Lines p) { return half_to_float(load_half(p)); }
DECODE F32x16 from_bf16(Lines p) { return __uint_as_float(static_cast<uint32_t>(load_half(p)) << 16); }
DECODE F32x16 from_halved_e8m0(Lines p) {
  const uint32_t e = p.at[p.row];
  return __uint_as_float(e < 2 ? 0x200000u << e : (e - 1) << 23);
}

// A thread needs one of two points, which is looked up once it is known which.
struct Points {
  const uint16_t* table;
  uint32_t index;
};
template <int n>
DECODE Points lookup_points(const uint16_t* table, I32x16 index) {
  return {table, static_cast<uint32_t>(index)};
}
template <int bits>
DECODE Bytes spread(Points points, int half) {
  const uint32_t point = points.table[half == 0 ? points.index & 0xffff : points.index >> 16];
  return point | point >> bits << 16;
}
// Either no byte is 0, so none carries; or no byte exceeds twice a small offset, so none borrows.
template <int offset>
DECODE Bytes with_signs(Bytes b, Lines bits) {
  const uint32_t four = bits.at[bits.row / 2] >> bits.row % 2 * 4 & 15;
  const uint32_t negative = (four * 0x00204081u & 0x01010101u) * 255;
  if constexpr (offset < 128) return ((four_times(2 * offset) - b) & negative) | (b & ~negative);
  return (b ^ negative) + (four_times(2 * offset + 1) & negative);
}

}  // namespace
}  // namespace llamaclust::cuda
