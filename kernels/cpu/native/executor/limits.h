// The limits of a stage, and the shape of its KV memory.
#pragma once

#include <cstddef>

#include "level/attention_ops.h"

namespace llamaclust {

// The sizes for which a stage is planned. Runs that exceed them are rejected.
struct Limits {
  int max_tokens;
  int max_outputs;
  int max_sequences;
  int max_context_tokens;
  int kv_blocks;
  int window_blocks = 0;  // Number of KV blocks of windowed layers; 0 if there are none.
  int state_blocks = 0;   // Number of state blocks; 0 if states are in KV blocks.
};

// Throws std::invalid_argument with `what` unless the condition holds.
void require(bool holds, const char* what);

// Contents of a KV block in one layer: keys and values of its positions, or a state if `state_floats` is not 0. A state
// in a KV block is that after the last computed position of the block.
struct KvShape {
  int kv_heads;
  int head_dim;
  KvType type;
  bool windowed = false;  // The blocks of this layer are released outside its window.
  bool latent = false;    // Latent attention: values are the first channels of keys.
  int state_floats = 0;
  size_t piece_bytes() const { return kv_piece_bytes(type, head_dim, latent); }
};

// Number of blocks of a layer with this shape.
inline int block_count(const KvShape& shape, const Limits& limits) {
  if (shape.state_floats > 0 && limits.state_blocks > 0) return limits.state_blocks;
  return shape.windowed ? limits.window_blocks : limits.kv_blocks;
}

// Bytes of one block in a layer with this shape.
inline size_t kv_block_bytes(const KvShape& shape) {
  if (shape.state_floats > 0) return static_cast<size_t>(shape.state_floats) * sizeof(float);
  return static_cast<size_t>(shape.kv_heads) * shape.piece_bytes();
}

}  // namespace llamaclust
