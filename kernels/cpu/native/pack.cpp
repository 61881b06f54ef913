#include "pack.h"

#include <algorithm>
#include <cstring>

namespace llamaclust {
namespace {

// The same segment of sixteen rows, as in a model file.
struct Blocks {
  const uint8_t* row[kTileRows];
};

constexpr uint8_t kZeroBlock[256] = {};

// Four bytes of every row, from `offset` on, become a k-group.
void put_group(const Blocks& blocks, int offset, uint8_t* out) {
  for (int r = 0; r < kTileRows; r++) memcpy(out + 4 * r, blocks.row[r] + offset, 4);
}

void put_half(const Blocks& blocks, int offset, uint8_t* out) {
  for (int r = 0; r < kTileRows; r++) memcpy(out + 2 * r, blocks.row[r] + offset, 2);
}

void pack_q4_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
}

void pack_q4_1(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 4 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
  put_half(blocks, 2, tail + 32);
}

// Quants are stored plus 128.
void pack_q8_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 8; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  for (int i = 0; i < 512; i++) body[i] ^= 0x80;
  put_half(blocks, 0, tail);
}

// Four quants of a row as one word, and back.
uint32_t word_at(const uint8_t* p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
void put_word(uint32_t word, uint8_t* out) { memcpy(out, &word, 4); }

constexpr uint32_t kLowHalves = 0x0f0f0f0f, kLowPairs = 0x03030303;

// File: d, dmin, 8 scales and 8 mins of 6 bits in 12 bytes, then per 64 columns 32 bytes: low halves the first 32
// columns, high halves the others.
void pack_q4_k_row(const uint8_t* block, int row, uint8_t* body) {
  const uint8_t *packed = block + 4, *quants = block + 16;
  for (int j = 0; j < 8; j++)
    for (int g = 0; g < 4; g++) {
      const uint8_t* source = quants + j / 2 * 32 + 4 * g;
      const uint32_t first = word_at(source) >> (j % 2 * 4), second = word_at(source + 16) >> (j % 2 * 4);
      put_word((first & kLowHalves) | (second & kLowHalves) << 4, body + 256 * j + 64 * g + 4 * row);
    }
  uint8_t* lines = body + 2048 + 4 * row;
  for (int j = 0; j < 4; j++) {
    const int scale = packed[j] & 63, min = packed[j + 4] & 63;
    const int late_scale = (packed[j + 8] & 15) | packed[j] >> 6 << 4;
    const int late_min = packed[j + 8] >> 4 | packed[j + 4] >> 6 << 4;
    lines[j] = static_cast<uint8_t>(scale | (late_min & 3) << 6);
    lines[64 + j] = static_cast<uint8_t>(late_scale | (late_min >> 2 & 3) << 6);
    lines[128 + j] = static_cast<uint8_t>(min | late_min >> 4 << 6);
  }
}

void pack_q4_k(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int r = 0; r < kTileRows; r++) pack_q4_k_row(blocks.row[r], r, body);
  put_half(blocks, 0, tail);
  put_half(blocks, 2, tail + 32);
}

// The quants of columns 4 * group to 4 * group + 3.
// File: per 128 columns 64 bytes of low nibbles and 32 bytes of high bit pairs; 16 signed scales; d.
uint32_t q6_k_group(const uint8_t* block, int group) {
  const int half = group / 32, quarter = group % 32 / 8, i = group % 8 * 4;
  const uint32_t low = word_at(block + 64 * half + 32 * (quarter % 2) + i) >> (quarter / 2 * 4);
  const uint32_t high = word_at(block + 128 + 32 * half + i) >> (2 * quarter);
  return (low & kLowHalves) | (high & kLowPairs) << 4;
}

// Tile: per sub-block of 16 two lines of nibbles (k-groups 0 and 2, 1 and 3) and one of bit pairs (k-groups 0 to 3);
// then the scales of sub-blocks 4 i to 4 i + 3 as k-group i.
void pack_q6_k_row(const uint8_t* block, int row, uint8_t* body) {
  for (int j = 0; j < 16; j++) {
    uint32_t low[4], high[4];
    for (int g = 0; g < 4; g++) {
      const uint32_t group = q6_k_group(block, 4 * j + g);
      low[g] = group & kLowHalves;
      high[g] = group >> 4 & kLowPairs;
    }
    uint8_t* out = body + 192 * j + 4 * row;
    put_word(low[0] | low[2] << 4, out);
    put_word(low[1] | low[3] << 4, out + 64);
    put_word(high[0] | high[1] << 2 | high[2] << 4 | high[3] << 6, out + 128);
  }
  for (int i = 0; i < 4; i++) memcpy(body + 3072 + 64 * i + 4 * row, block + 192 + 4 * i, 4);
}

void pack_q6_k(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int r = 0; r < kTileRows; r++) pack_q6_k_row(blocks.row[r], r, body);
  put_half(blocks, 208, tail);
}

void pack_32_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_group(blocks, 0, body); }
void pack_16_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_half(blocks, 0, body); }

struct Packer {
  QuantType type;
  TileLayout layout;
  void (*pack)(const Blocks& blocks, uint8_t* body, uint8_t* tail);
};

constexpr Packer kPackers[] = {
    {QuantType::F32, kF32Layout, pack_32_bits},   {QuantType::F16, kF16Layout, pack_16_bits},
    {QuantType::BF16, kF16Layout, pack_16_bits},  {QuantType::Q8_0, kQ8_0Layout, pack_q8_0},
    {QuantType::Q4_0, kQ4_0Layout, pack_q4_0},    {QuantType::Q4_1, kQ4_1Layout, pack_q4_1},
    {QuantType::Q4_K, kQ4_KLayout, pack_q4_k},    {QuantType::Q6_K, kQ6_KLayout, pack_q6_k},
};

const Packer* find_packer(QuantType type) {
  for (const Packer& packer : kPackers)
    if (packer.type == type) return &packer;
  return nullptr;
}

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

bool is_supported(QuantType type) { return find_packer(type) != nullptr; }

const TileLayout& tile_layout(QuantType type) { return find_packer(type)->layout; }

size_t file_row_bytes(QuantType type, int cols) {
  const TileLayout& layout = tile_layout(type);
  return static_cast<size_t>(cols / layout.segment_cols) * layout.file_bytes;
}

size_t tile_bytes(QuantType type, int cols) { return whole_lines(kTileRows * file_row_bytes(type, cols)); }

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
  const size_t used = kTileRows * row_bytes;
  memset(tile + used, 0, tile_bytes(type, cols) - used);
}

}  // namespace llamaclust
