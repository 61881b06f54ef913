#include "pack/pack.h"

#include <algorithm>

#include "pack/blocks.h"

namespace llamaclust {
namespace {

constexpr uint8_t kZeroBlock[256] = {};

struct Packer {
  QuantType type;
  TileLayout layout;
  void (*pack)(const Blocks& blocks, uint8_t* body, uint8_t* tail);
};

constexpr Packer kPackers[] = {
    {QuantType::F32, kF32Layout, pack_32_bits},
    {QuantType::F16, kF16Layout, pack_16_bits},
    {QuantType::BF16, kF16Layout, pack_16_bits},
    {QuantType::Q8_0, kQ8_0Layout, pack_q8_0},
    {QuantType::Q4_0, kQ4_0Layout, pack_q4_0},
    {QuantType::Q4_1, kQ4_1Layout, pack_q4_1},
    {QuantType::Q5_0, kQ5_0Layout, pack_q5_0},
    {QuantType::Q5_1, kQ5_1Layout, pack_q5_1},
    {QuantType::Q2_K, kQ2_KLayout, pack_q2_k},
    {QuantType::Q3_K, kQ3_KLayout, pack_q3_k},
    {QuantType::Q4_K, kQ4_KLayout, pack_q4_k},
    {QuantType::Q5_K, kQ5_KLayout, pack_q5_k},
    {QuantType::Q6_K, kQ6_KLayout, pack_q6_k},
    {QuantType::IQ4_NL, kQ4_0Layout, pack_q4_0},
    {QuantType::IQ4_XS, kIQ4_XSLayout, pack_iq4_xs},
    {QuantType::MXFP4, kMXFP4Layout, pack_mxfp4},
    {QuantType::TQ2_0, kTQ2_0Layout, pack_tq2_0},
    {QuantType::TQ1_0, kTQ1_0Layout, pack_tq1_0},
    {QuantType::IQ2_XXS, kIQ2_XXSLayout, pack_iq2_xxs},
    {QuantType::IQ2_XS, kIQ2_XSLayout, pack_iq2_xs},
    {QuantType::IQ2_S, kIQ2_SLayout, pack_iq2_s},
    {QuantType::IQ3_XXS, kIQ3_XXSLayout, pack_iq3_xxs},
    {QuantType::IQ3_S, kIQ3_SLayout, pack_iq3_s},
    {QuantType::IQ1_S, kIQ1_SLayout, pack_iq1_s},
    {QuantType::IQ1_M, kIQ1_MLayout, pack_iq1_m},
};

const Packer* find_packer(QuantType type) {
  for (const Packer& packer : kPackers)
    if (packer.type == type) return &packer;
  return nullptr;
}

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of a tile's segments.
size_t used_bytes(const TileLayout& layout, int cols) {
  return static_cast<size_t>(cols / layout.segment_cols) * (layout.body_bytes + layout.tail_bytes);
}

}  // namespace

bool is_supported(QuantType type) { return find_packer(type) != nullptr; }

const TileLayout& tile_layout(QuantType type) { return find_packer(type)->layout; }

size_t file_row_bytes(QuantType type, int cols) {
  const TileLayout& layout = tile_layout(type);
  return static_cast<size_t>(cols / layout.segment_cols) * layout.file_bytes;
}

size_t tile_bytes(QuantType type, int cols) { return whole_lines(used_bytes(tile_layout(type), cols)); }

int segment_cols(ActivationFormat format) {
  switch (format) {
    case ActivationFormat::F32: return 1;
    case ActivationFormat::Q8_32: return 32;
    case ActivationFormat::Q8_256: return 256;
  }
  return 0;
}

size_t activation_bytes(ActivationFormat format, int cols) {
  const size_t n = static_cast<size_t>(cols);
  switch (format) {
    case ActivationFormat::F32: return whole_lines(n * sizeof(float));
    case ActivationFormat::Q8_32: return whole_lines(n / 32 * sizeof(Q8_32));
    case ActivationFormat::Q8_256: return n / 256 * sizeof(Q8_256);
  }
  return 0;
}

size_t matmul_scratch_bytes(int cols) {
  return whole_lines(static_cast<size_t>(cols) * kPanelColumnBytes * kPanelTiles);
}

void pack_tile(QuantType type, const uint8_t* file_rows, int rows, int cols, uint8_t* tile) {
  const Packer& packer = *find_packer(type);
  const TileLayout& layout = packer.layout;
  const size_t row_bytes = file_row_bytes(type, cols);
  const int segments = cols / layout.segment_cols, group = layout.group_segments();
  for (int first = 0; first < segments; first += group) {
    const int count = std::min(group, segments - first);
    uint8_t* bodies = tile + static_cast<size_t>(first) * (layout.body_bytes + layout.tail_bytes);
    for (int i = 0; i < count; i++) {
      Blocks blocks;
      for (int r = 0; r < kTileRows; r++)
        blocks.row[r] = r < rows ? file_rows + r * row_bytes + static_cast<size_t>(first + i) * layout.file_bytes
                                 : kZeroBlock;
      packer.pack(blocks, bodies + i * layout.body_bytes, bodies + count * layout.body_bytes + i * layout.tail_bytes);
    }
  }
  const size_t used = used_bytes(layout, cols);
  memset(tile + used, 0, tile_bytes(type, cols) - used);
}

}  // namespace llamaclust
