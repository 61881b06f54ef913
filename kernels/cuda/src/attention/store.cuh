// Stores a key and a value in KV memory, rounded to its type.
#pragma once

#include "kv.cuh"
#include "rounding.cuh"

namespace llamaclust::cuda {

// A key and a value of one KV head of a row, and their place.
struct Stored {
  // The key is in shared memory. The value is null if it is a part of the key.
  const float *key, *value;
  uint8_t* piece;
  int slot;
};

// Returns `count` of the eight channels from x on as float16; the others are 0.
DEVICE uint4 eight_halves(const float* x, int count) {
  uint4 halves = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (i < count) word_of(halves, i / 2) |= static_cast<uint32_t>(float_to_half(x[i])) << 16 * (i % 2);
  return halves;
}

// Called by all `threads` threads of a block.
template <int threads>
DEVICE void store(F16Kv, const Stored& stored, int head_dim) {
  const int chunks = key_chunks<F16Kv>(head_dim);
  for (int i = threadIdx.x; i < (stored.value == nullptr ? 1 : 2) * chunks; i += threads) {
    const int chunk = i % chunks, channel = chunk * 8, count = head_dim - channel;
    if (i >= chunks) {
      uint8_t* value = stored.piece + F16Kv::key_bytes(head_dim) + 2 * (stored.slot * padded_head(head_dim) + channel);
      *reinterpret_cast<uint4*>(value) = eight_halves(stored.value + channel, count);
      continue;
    }
    uint8_t* key = stored.piece + chunk_offset<F16Kv>(stored.slot, chunk, head_dim);
    const uint4 halves = eight_halves(stored.key + channel, count);
    if (count >= 8)
      *reinterpret_cast<uint4*>(key) = halves;
    else
      for (int j = 0; j < count; j++)
        reinterpret_cast<uint16_t*>(key)[j] = static_cast<uint16_t>(word_of(halves, j / 2) >> 16 * (j % 2));
  }
}

struct Rounded {
  int32_t q;
  uint16_t scale;
};

// Rounds a group of 32 channels, one per lane. The scale is m / 127 rounded to float16; q = x * (1 / scale) to nearest.
DEVICE Rounded round_group(float x) {
  const int32_t greatest = greatest_of(magnitude(x));
  if (greatest >= kNotFinite) return {0, 0x7e00};  // NaN
  const uint16_t half = float_to_half(div(__int_as_float(greatest), 127.0f));
  const float scale = half_to_float(half), inverse = scale > 0.0f ? div(1.0f, scale) : 0.0f;
  const float q = mul(x, inverse), low = q > -127.0f ? q : -127.0f;
  return {nearest(low < 127.0f ? low : 127.0f), half};
}

// The variant for bytes, in which a warp rounds 32 channels.
template <int threads, int together, int most>
DEVICE void store(ByteKv<together, most>, const Stored& stored, int head_dim) {
  using Kv = ByteKv<together, most>;
  const int groups = groups_of(head_dim), lane = threadIdx.x % kWarp, slot = stored.slot;
  for (int i = threadIdx.x / kWarp; i < (stored.value == nullptr ? 1 : 2) * groups; i += threads / kWarp) {
    const bool is_value = i >= groups;
    const int group = i % groups, channel = group * kGroupChannels + lane;
    const bool there = channel < head_dim;
    const Rounded rounded = round_group(there ? (is_value ? stored.value : stored.key)[channel] : 0.0f);
    uint8_t* values = stored.piece + Kv::key_bytes(head_dim);
    uint8_t* to = is_value ? values + slot * padded_head(head_dim) + channel
                           : stored.piece + chunk_offset<Kv>(slot, channel / 16, head_dim) + channel % 16;
    uint8_t* scale =
        is_value ? values + Kv::value_scale(slot, group, head_dim) : stored.piece + Kv::key_scale(slot, group, head_dim);
    if (there) *to = static_cast<uint8_t>(rounded.q);
    if (lane == 0) *reinterpret_cast<uint16_t*>(scale) = rounded.scale;
  }
}

}  // namespace llamaclust::cuda
