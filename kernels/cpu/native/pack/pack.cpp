#include "pack/pack.h"

#include <algorithm>

#include "pack/blocks.h"

namespace llamaclust {
namespace {

constexpr uint8_t kZeroBlock[256] = {};

// A segment of sixteen rows.
using Packer = void (*)(const uint8_t* const (&blocks)[kTileRows], uint8_t* body, uint8_t* tail);

template <auto pack>
void pack_rows(const uint8_t* const (&blocks)[kTileRows], uint8_t* body, uint8_t* tail) {
  for (int row = 0; row < kTileRows; row++) pack(blocks[row], row, body, tail);
}

Packer packer_of(QuantType type) {
  switch (type) {
#define PACKER(name, number, cols, file, tail, extra, packer) \
  case QuantType::name: return pack_rows<pack_##packer>;
    LLAMACLUST_QUANT_TYPES(PACKER)
#undef PACKER
  }
  return nullptr;
}

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of a tile's segments.
size_t used_bytes(const TileLayout& layout, int cols) {
  return static_cast<size_t>(cols / layout.segment_cols) * (layout.body_bytes + layout.tail_bytes);
}

}  // namespace

void pack_32_bits(const uint8_t* block, int row, uint8_t* body, uint8_t*) { put_word(word_at(block), row, body); }
void pack_16_bits(const uint8_t* block, int row, uint8_t* body, uint8_t*) { put_half(block, row, body); }

bool is_supported(QuantType type) { return tile_layout(type).segment_cols > 0; }

size_t file_row_bytes(QuantType type, int cols) {
  const TileLayout layout = tile_layout(type);
  return static_cast<size_t>(cols / layout.segment_cols) * layout.file_bytes;
}

size_t tile_bytes(QuantType type, int cols) { return whole_lines(used_bytes(tile_layout(type), cols)); }

int segment_cols(ActivationFormat format) {
  return format == ActivationFormat::Q8_256 ? 256 : format == ActivationFormat::Q8_32 ? 32 : 1;
}

size_t activation_bytes(ActivationFormat format, int cols) {
  constexpr size_t kSegmentBytes[] = {sizeof(float), sizeof(Q8_32), sizeof(Q8_256)};
  return whole_lines(static_cast<size_t>(cols / segment_cols(format)) * kSegmentBytes[static_cast<int>(format)]);
}

size_t matmul_scratch_bytes(int cols) {
  return whole_lines(static_cast<size_t>(cols) * kPanelColumnBytes * kPanelTiles);
}

void pack_tile(QuantType type, const uint8_t* file_rows, int rows, int cols, uint8_t* tile) {
  const Packer pack = packer_of(type);
  const TileLayout layout = tile_layout(type);
  const size_t row_bytes = file_row_bytes(type, cols);
  const int segments = cols / layout.segment_cols, group = layout.group_segments();
  for (int first = 0; first < segments; first += group) {
    const int count = std::min(group, segments - first);
    uint8_t* bodies = tile + static_cast<size_t>(first) * (layout.body_bytes + layout.tail_bytes);
    for (int i = 0; i < count; i++) {
      const uint8_t* blocks[kTileRows];
      const size_t offset = static_cast<size_t>(first + i) * layout.file_bytes;
      for (int r = 0; r < kTileRows; r++) blocks[r] = r < rows ? file_rows + r * row_bytes + offset : kZeroBlock;
      uint8_t* body = bodies + i * layout.body_bytes;
      memset(body, 0, layout.body_bytes);
      pack(blocks, body, bodies + count * layout.body_bytes + i * layout.tail_bytes);
    }
  }
  const size_t used = used_bytes(layout, cols);
  memset(tile + used, 0, tile_bytes(type, cols) - used);
}

}  // namespace llamaclust
