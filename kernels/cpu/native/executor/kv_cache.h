// Paged KV memory of a stage: for each layer, pieces of 16 positions of one KV head (attention_ops.h), by block id of
// the layer's group.
#pragma once

#include <vector>

#include "level/attention_ops.h"
#include "runtime/memory.h"

namespace llamaclust {

struct KvShape {
  int kv_heads;
  int head_dim;
  KvType type;
  bool windowed = false;  // in the group of layers whose memory is given up behind their windows
};

// Bytes that one block costs in a layer of this shape.
inline size_t kv_block_bytes(const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * kv_piece_bytes(shape.type, shape.head_dim);
}

class KvCache {
 public:
  KvCache() = default;
  KvCache(const std::vector<KvShape>& layers, int blocks, int window_blocks) {
    Layout layout;
    for (const KvShape& shape : layers)
      offsets_.push_back(layout.add(kv_block_bytes(shape) * (shape.windowed ? window_blocks : blocks)));
    memory_ = Memory(layout.bytes());
  }

  // The piece of KV head 0 in block 0; heads lie one after another, then comes the next block.
  uint8_t* layer(int index) const { return memory_.data() + offsets_[index]; }
  size_t bytes() const { return memory_.bytes(); }

 private:
  std::vector<size_t> offsets_;
  Memory memory_;
};

}  // namespace llamaclust
