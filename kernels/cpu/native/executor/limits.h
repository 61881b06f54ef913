// The limits of a stage, and the shape of its KV memory.
#pragma once

#include <cstddef>

#include "level/attention_ops.h"

namespace llamaclust {

// What a stage is planned for; a run that exceeds one of them is refused.
struct Limits {
  int max_tokens;
  int max_outputs;
  int max_sequences;
  int max_context_tokens;
  int kv_blocks;
  int window_blocks = 0;  // of windowed layers; 0: there are none
  int state_blocks = 0;   // of states; 0: they are in KV blocks
};

// std::invalid_argument where a program does not hold together.
void require(bool holds, const char* what);

// What a layer keeps in each KV block: keys and values of its positions, or where there are `state_floats`, a state; in
// KV blocks that is the one behind the last of its positions that are computed.
struct KvShape {
  int kv_heads;
  int head_dim;
  KvType type;
  bool windowed = false;  // in the group of layers whose memory is given up behind their windows
  bool latent = false;    // values are the first channels of keys
  int state_floats = 0;
  size_t piece_bytes() const { return kv_piece_bytes(type, head_dim, latent); }
};

// Blocks of a layer of this shape.
inline int block_count(const KvShape& shape, const Limits& limits) {
  if (shape.state_floats > 0 && limits.state_blocks > 0) return limits.state_blocks;
  return shape.windowed ? limits.window_blocks : limits.kv_blocks;
}

// Bytes that one block costs in a layer of this shape.
inline size_t kv_block_bytes(const KvShape& shape) {
  if (shape.state_floats > 0) return static_cast<size_t>(shape.state_floats) * sizeof(float);
  return static_cast<size_t>(shape.kv_heads) * shape.piece_bytes();
}

}  // namespace llamaclust
