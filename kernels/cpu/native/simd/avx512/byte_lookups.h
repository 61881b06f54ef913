// Byte look-ups with an index of more than four bits (AVX-512 VBMI).
#pragma once

#define LLAMACLUST_BYTE_LOOKUPS

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Looks up the low six bits of each byte.
INLINE Bytes lookup(const uint8_t (&table)[64], Bytes b) {
  return _mm512_permutexvar_epi8(b, _mm512_load_si512(table));
}

// Looks up bytes in a table of 256 entries, or of 512 with bit `bit` of the bytes of a line as the ninth bit of the
// index.
template <int n>
INLINE Bytes lookup_byte(const uint8_t (&table)[n], Bytes index, const uint8_t* line, int bit) {
  const auto half = [&](int begin) __attribute__((always_inline)) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table + begin), index, _mm512_load_si512(table + begin + 64));
  };
  const __mmask64 upper = _mm512_movepi8_mask(index);
  const Bytes low = _mm512_mask_mov_epi8(half(0), upper, half(128));
  if constexpr (n == 256) {
    return low;
  } else {
    const __mmask64 ninth = _mm512_test_epi8_mask(load_bytes(line), _mm512_set1_epi8(static_cast<char>(1 << bit)));
    return _mm512_mask_mov_epi8(low, ninth, _mm512_mask_mov_epi8(half(256), upper, half(384)));
  }
}

// Byte i of each lane becomes the eight bits of the lane that start at bit `bits` * i + `from`.
template <int bits>
INLINE Bytes spread_bits(Bytes b, int from) {
  uint64_t shifts = 0;
  UNROLL for (int i = 0; i < 8; i++) shifts |= static_cast<uint64_t>((i / 4 * 32 + i % 4 * bits + from) & 63) << (8 * i);
  return _mm512_multishift_epi64_epi8(_mm512_set1_epi64(static_cast<int64_t>(shifts)), b);
}

// Returns the bits of a that are set in `mask`, and the other bits of b, in every lane.
template <int32_t mask>
INLINE Bytes choose(Bytes a, Bytes b) {
  return _mm512_ternarylogic_epi32(_mm512_set1_epi32(mask), a, b, 0xca);
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
