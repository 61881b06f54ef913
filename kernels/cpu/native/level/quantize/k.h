// The K types' blocks as files hold them.
#pragma once

#include "level/quantize/k_blocks.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Two bits of each of 256 levels, from bit `shift` on: byte l of 32 holds those of l, l + 32, l + 64 and l + 96.
[[maybe_unused]] void put_pairs_of_bits(const uint8_t* levels, int shift, uint8_t* out) {
  for (int half = 0; half < 2; half++)
    for (int l = 0; l < 32; l++) {
      const uint8_t* at = levels + 128 * half + l;
      const auto pair = [&](int i) { return (at[32 * i] >> shift & 3) << (2 * i); };
      out[32 * half + l] = static_cast<uint8_t>(pair(0) | pair(1) | pair(2) | pair(3));
    }
}

// One bit of each of 256 levels: bit i of byte l is that of 32 i + l.
[[maybe_unused]] void put_bits(const uint8_t* levels, int shift, uint8_t* out) {
  for (int l = 0; l < 32; l++) {
    int byte = 0;
    for (int i = 0; i < 8; i++) byte |= (levels[32 * i + l] >> shift & 1) << i;
    out[l] = static_cast<uint8_t>(byte);
  }
}

// Four bits of each level, those of the first `run` of 2 `run` levels below those of the rest.
[[maybe_unused]] void put_low_bits(const uint8_t* levels, int run, uint8_t* out) {
  for (int first = 0; first < 256; first += 2 * run, out += run)
    for (int l = 0; l < run; l++)
      out[l] = static_cast<uint8_t>((levels[first + l] & 15) | (levels[first + run + l] & 15) << 4);
}

// Scales and offsets of six bits: the first four of each whole, the upper two bits of the others above them.
[[maybe_unused]] void put_six_bit_pairs(const float* a, const float* b, uint8_t* out) {
  for (int j = 0; j < 4; j++) {
    const int a0 = static_cast<int>(a[j]), b0 = static_cast<int>(b[j]);
    const int a1 = static_cast<int>(a[j + 4]), b1 = static_cast<int>(b[j + 4]);
    out[j] = static_cast<uint8_t>(a0 | a1 >> 4 << 6);
    out[j + 4] = static_cast<uint8_t>(b0 | b1 >> 4 << 6);
    out[j + 8] = static_cast<uint8_t>((a1 & 15) | (b1 & 15) << 4);
  }
}

[[maybe_unused]] void quantize_q2_k(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const AffineBlocks<16> block(batch, 3, 15, 17, -0.32f, 0.08f);  // as in kKeepsLargest
    for (int j = 0; j < 16; j++)
      out[j] = static_cast<uint8_t>(static_cast<int>(block.a[j]) | static_cast<int>(block.b[j]) << 4);
    put_pairs_of_bits(block.levels, 0, out + 16);
    memcpy(out + 80, block.d, 2);
    memcpy(out + 82, block.m, 2);
    out += 84;
  });
}

[[maybe_unused]] void quantize_q3_k(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const SymmetricBlock block(batch, 4, 32);
    put_bits(block.levels, 2, out);
    put_pairs_of_bits(block.levels, 0, out + 32);
    memset(out + 96, 0, 12);
    for (int j = 0; j < 16; j++) {
      const int scale = static_cast<int>(block.a[j]) + 32;
      out[96 + j % 8] |= static_cast<uint8_t>((scale & 15) << (j / 8 * 4));
      out[104 + j % 4] |= static_cast<uint8_t>(scale >> 4 << (j / 4 * 2));
    }
    memcpy(out + 108, &block.d, 2);
    out += 110;
  });
}

template <bool five_bits>
void quantize_q45_k(const Source& from, uint8_t* out) {
  each_batch<32>(from, [&](const Batch<32>& batch, int64_t, int subs) {
    const AffineBlocks<32> blocks(batch, five_bits ? 31 : 15, 63, 17, -0.8f, 0.1f);
    for (int k = 0; k < subs / 8; k++) {
      memcpy(out, blocks.d + k, 2);
      memcpy(out + 2, blocks.m + k, 2);
      put_six_bit_pairs(blocks.a + 8 * k, blocks.b + 8 * k, out + 4);
      const uint8_t* levels = blocks.levels + 256 * k;
      if (five_bits) put_bits(levels, 4, out + 16);
      put_low_bits(levels, 32, out + (five_bits ? 48 : 16));
      out += five_bits ? 176 : 144;
    }
  });
}

[[maybe_unused]] void quantize_q6_k(const Source& from, uint8_t* out) {
  each_batch<16>(from, [&](const Batch<16>& batch, int64_t, int) {
    const SymmetricBlock block(batch, 32, 128);
    put_low_bits(block.levels, 64, out);
    put_pairs_of_bits(block.levels, 4, out + 128);
    for (int j = 0; j < 16; j++) out[192 + j] = static_cast<uint8_t>(static_cast<int>(block.a[j]));
    memcpy(out + 208, &block.d, 2);
    out += 210;
  });
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
