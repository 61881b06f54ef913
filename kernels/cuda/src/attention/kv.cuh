// Layout of KV memory. A block has 16 positions, and a piece for every KV head: keys, then values. Sixteen adjacent
// bytes of a key are channels of one position, and those of the next position follow, so threads with a position each
// read whole lines. The channels of a value are adjacent. A piece has the same size as on the CPU.
//   f16   keys [head_dim / 8][16 positions][8 channels], then [16][rest]; values [16 positions][padded]
//   q8_0  keys [head_dim / 16][16 positions][16 channels], then [16][rest, even], scales [groups][16 positions];
//         values [16 positions][padded], scales [groups][16 positions]
//   int8  like q8_0, but a rest is a multiple of 4
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

inline constexpr int kBlockTokens = 16, kSpanTokens = 512, kSpanBlocks = kSpanTokens / kBlockTokens;
inline constexpr int kGroupChannels = 32;  // Channels of a key or value that share a scale.
// Value channels of a slice, if several blocks divide the channels.
inline constexpr int kSliceChannels = 32;

DEVICE int groups_of(int head_dim) { return (head_dim + kGroupChannels - 1) / kGroupChannels; }
// Number of channels of a stored value. Those from head_dim on may hold anything.
DEVICE int padded_head(int head_dim) { return (head_dim + 15) / 16 * 16; }

struct F16Kv {
  static constexpr int kChannels = 8, kChannelBytes = 2;  // Channels in 16 bytes; bytes of a channel.

  static DEVICE int key_channels(int head_dim) { return head_dim; }
  static DEVICE int key_bytes(int head_dim) { return 2 * kBlockTokens * head_dim; }
};

// Keys have a multiple of `together` channels. Queries are rounded to integers up to `most`.
template <int together, int most>
struct ByteKv {
  static constexpr int kChannels = 16, kChannelBytes = 1;
  static constexpr float kMostQuery = most;

  static DEVICE int key_channels(int head_dim) { return (head_dim + together - 1) / together * together; }
  static DEVICE int key_bytes(int head_dim) {
    return kBlockTokens * (key_channels(head_dim) + 2 * groups_of(head_dim));
  }
  // Offset of the scale of a group of channels, from the start of a piece, or of its values.
  static DEVICE int key_scale(int slot, int group, int head_dim) {
    return kBlockTokens * key_channels(head_dim) + 2 * (group * kBlockTokens + slot);
  }
  static DEVICE int value_scale(int slot, int group, int head_dim) {
    return kBlockTokens * padded_head(head_dim) + 2 * (group * kBlockTokens + slot);
  }
};
using Q8Kv = ByteKv<2, 32767>;
using Int8Kv = ByteKv<4, 127>;

// Offset of the piece of a KV head in a block.
DEVICE size_t piece_offset(int block, int kv_head, int kv_heads, int piece_bytes) {
  return (static_cast<size_t>(block) * kv_heads + kv_head) * piece_bytes;
}

// Number of chunks of 16 bytes in a key, rounded up.
template <class Kv>
DEVICE int key_chunks(int head_dim) {
  return (head_dim + Kv::kChannels - 1) / Kv::kChannels;
}
// Number of bytes in a chunk: 16, or an even number in the last one.
template <class Kv>
DEVICE int chunk_bytes(int chunk, int head_dim) {
  const int bytes = (Kv::key_channels(head_dim) - chunk * Kv::kChannels) * Kv::kChannelBytes;
  return bytes < 16 ? bytes : 16;
}
// Offset of a chunk from the start of the head's piece.
template <class Kv>
DEVICE int chunk_offset(int slot, int chunk, int head_dim) {
  return chunk * 16 * kBlockTokens + slot * chunk_bytes<Kv>(chunk, head_dim);
}

DEVICE uint32_t& word_of(uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
DEVICE uint32_t word_of(const uint4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
DEVICE uint4 load_16_bytes(const void* p) { return *static_cast<const uint4*>(p); }

// Loads a chunk of a key, with zeros after its end.
template <class Kv>
DEVICE uint4 load_chunk(const uint8_t* piece, int slot, int chunk, int head_dim) {
  const uint8_t* p = piece + chunk_offset<Kv>(slot, chunk, head_dim);
  const int bytes = chunk_bytes<Kv>(chunk, head_dim);
  if (bytes == 16) return load_16_bytes(p);
  uint4 x = make_uint4(0, 0, 0, 0);
#pragma unroll
  for (int i = 0; i < 8; i++)
    if (2 * i < bytes) {
      const uint32_t pair = reinterpret_cast<const uint16_t*>(p)[i];
      word_of(x, i / 2) |= pair << 16 * (i % 2);
    }
  return x;
}

// Returns element i of sixteen bytes as a float.
DEVICE float element_of(F16Kv, const uint4& x, int i) {
  return half_to_float(static_cast<uint16_t>(word_of(x, i / 2) >> 16 * (i % 2)));
}
// Uses the bits of 2^23 + a byte, which is cheaper than a conversion and equally exact.
template <int together, int most>
DEVICE float element_of(ByteKv<together, most>, const uint4& x, int i) {
  const uint32_t shifted = word_of(x, i / 4) ^ 0x80808080;
  return sub(__uint_as_float(__byte_perm(shifted, 0x4b000000, 0x7440 | (i % 4))), 8388608.0f + 128.0f);
}

}  // namespace llamaclust::cuda
