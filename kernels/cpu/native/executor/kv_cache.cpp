#include "executor/kv_cache.h"

namespace llamaclust {

size_t kv_block_bytes(const KvShape& shape) {
  return static_cast<size_t>(shape.kv_heads) * kv_piece_bytes(shape.type, shape.head_dim);
}

KvCache::KvCache(const std::vector<KvShape>& layers, int blocks, int window_blocks) {
  Layout layout;
  for (const KvShape& shape : layers)
    offsets_.push_back(layout.add(kv_block_bytes(shape) * static_cast<size_t>(shape.windowed ? window_blocks : blocks)));
  memory_ = Memory(layout.bytes());
}

uint8_t* KvCache::layer(int index) const { return memory_.data() + offsets_[static_cast<size_t>(index)]; }

}  // namespace llamaclust
