#include "pack/pack.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pack/blocks.h"

namespace llamaclust {
namespace {

constexpr uint8_t kZeroBlock[256] = {};

// Packs a segment of sixteen rows.
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

// Returns the packer of blocks of one type into tiles of the same or another type, or null if there is none. Tiles of
// another type hold the same weights; they have more bytes, but take less time to decode.
Packer packer_of(QuantType file, QuantType tile) {
  if (file == tile) return packer_of(tile);
  if (tile == QuantType::IQ2_S && file == QuantType::IQ2_XXS) return pack_rows<pack_iq2_xxs_as_iq2_s>;
  if (tile == QuantType::IQ2_S && file == QuantType::IQ2_XS) return pack_rows<pack_iq2_xs_as_iq2_s>;
  if (tile == QuantType::TQ2_0 && file == QuantType::TQ1_0) return pack_rows<pack_tq1_0_as_tq2_0>;
  return nullptr;
}

Packer checked_packer(QuantType file, QuantType tile) {
  const Packer pack = packer_of(file, tile);
  if (pack == nullptr)
    throw std::invalid_argument("quant type " + std::to_string(static_cast<int>(file)) +
                                " is not packed into tiles of type " + std::to_string(static_cast<int>(tile)));
  return pack;
}

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of all segments of a tile.
size_t used_bytes(const TileLayout& layout, int cols) {
  return static_cast<size_t>(cols / layout.segment_cols) * (layout.body_bytes + layout.tail_bytes);
}

// Bytes of a tile of 16 rows, a multiple of 64.
size_t tile_bytes(QuantType type, int cols) { return whole_lines(used_bytes(tile_layout(type), cols)); }

// Packs `rows` (1 to 16) consecutive rows in blocks of `file_type`. The other rows of the tile become zero.
void pack_tile(Packer pack, QuantType file_type, QuantType type, const uint8_t* file_rows, int rows, int cols,
               uint8_t* tile) {
  const TileLayout layout = tile_layout(type);
  const size_t row_bytes = file_row_bytes(file_type, cols), block_bytes = tile_layout(file_type).file_bytes;
  const int segments = cols / layout.segment_cols, group = layout.group_segments();
  for (int first = 0; first < segments; first += group) {
    const int count = std::min(group, segments - first);
    uint8_t* bodies = tile + static_cast<size_t>(first) * (layout.body_bytes + layout.tail_bytes);
    for (int i = 0; i < count; i++) {
      const uint8_t* blocks[kTileRows];
      const size_t offset = static_cast<size_t>(first + i) * block_bytes;
      for (int r = 0; r < kTileRows; r++) blocks[r] = r < rows ? file_rows + r * row_bytes + offset : kZeroBlock;
      uint8_t* body = bodies + i * layout.body_bytes;
      memset(body, 0, layout.body_bytes);
      pack(blocks, body, bodies + count * layout.body_bytes + i * layout.tail_bytes);
    }
  }
  const size_t used = used_bytes(layout, cols);
  memset(tile + used, 0, tile_bytes(type, cols) - used);
}

QuantType checked(int type, int rows, int cols) {
  const auto quant_type = static_cast<QuantType>(type);
  if (!is_supported(quant_type))
    throw std::invalid_argument("no matrix products with quant type " + std::to_string(type));
  const int segment = tile_layout(quant_type).segment_cols;
  if (rows < 1 || cols < 1 || cols % segment != 0)
    throw std::invalid_argument("[" + std::to_string(rows) + ", " + std::to_string(cols) +
                                "] is not a number of rows and a multiple of " + std::to_string(segment));
  return quant_type;
}

}  // namespace

void pack_32_bits(const uint8_t* block, int row, uint8_t* body, uint8_t*) { put_word(word_at(block), row, body); }
void pack_16_bits(const uint8_t* block, int row, uint8_t* body, uint8_t*) { put_half(block, row, body); }

bool is_supported(QuantType type) { return tile_layout(type).segment_cols > 0; }

size_t file_row_bytes(QuantType type, int cols) {
  const TileLayout layout = tile_layout(type);
  return static_cast<size_t>(cols / layout.segment_cols) * layout.file_bytes;
}

int segment_cols(ActivationFormat format) {
  return format == ActivationFormat::Q8_256 ? 256 : format == ActivationFormat::Q8_32 ? 32 : 1;
}

size_t activation_bytes(ActivationFormat format, int cols) {
  constexpr size_t kSegmentBytes[] = {sizeof(float), sizeof(Q8_32), sizeof(Q8_256)};
  return whole_lines(static_cast<size_t>(cols / segment_cols(format)) * kSegmentBytes[static_cast<int>(format)]);
}

int packed_floats(ActivationFormat format, int cols) {
  return format == ActivationFormat::F32 ? cols : cols / 4 + cols / segment_cols(format);
}

PackedMatrix::PackedMatrix(int type, int rows, int cols) : PackedMatrix(shape_only(type, rows, cols)) {
  auto memory = std::make_shared<Memory>(bytes());
  matrix_.tiles = tiles_ = memory->data();
  memory_ = std::move(memory);
}

PackedMatrix::PackedMatrix(int type, int rows, int cols, std::shared_ptr<const Memory> memory, size_t offset)
    : PackedMatrix(shape_only(type, rows, cols)) {
  if (offset % 64 != 0 || offset > memory->bytes() || bytes() > memory->bytes() - offset)
    throw std::invalid_argument(std::to_string(bytes()) + " bytes at " + std::to_string(offset) + " of " +
                                std::to_string(memory->bytes()));
  matrix_.tiles = memory->data() + offset;
  if (memory->is_writable()) tiles_ = memory->data() + offset;
  memory_ = std::move(memory);
}

PackedMatrix PackedMatrix::shape_only(int type, int rows, int cols) {
  const QuantType quant_type = checked(type, rows, cols);
  return PackedMatrix({quant_type, rows, cols, tile_bytes(quant_type, cols), nullptr});
}

void PackedMatrix::pack_rows(int first_row, std::span<const uint8_t> data, QuantType file_type) {
  const Packer pack = checked_packer(file_type, matrix_.type);
  if (tiles_ == nullptr) throw std::invalid_argument("a matrix of shape_only, or of a mapped file, takes no rows");
  const size_t row_bytes = file_row_bytes(file_type, matrix_.cols), rows = data.size() / row_bytes;
  if (data.size() % row_bytes != 0)
    throw std::invalid_argument("not whole rows of " + std::to_string(row_bytes) + " bytes");
  if (first_row < 0 || first_row % kTileRows != 0) throw std::invalid_argument("the first row does not begin a tile");
  if (first_row > matrix_.rows || rows > static_cast<size_t>(matrix_.rows - first_row))
    throw std::invalid_argument("more rows than the matrix has");
  uint8_t* tile = tiles_ + static_cast<size_t>(first_row / kTileRows) * matrix_.tile_bytes;
  for (size_t row = 0; row < rows; row += kTileRows, tile += matrix_.tile_bytes)
    pack_tile(pack, file_type, matrix_.type, data.data() + row * row_bytes,
              static_cast<int>(std::min<size_t>(kTileRows, rows - row)), matrix_.cols, tile);
}

uint64_t packing_fingerprint(int file_type, int type) {
  // Neither a multiple of 4 nor of 2, so that the last group of segments is incomplete.
  constexpr int kSegments = 11;
  const int cols = kSegments * tile_layout(checked(type, 1, 256)).segment_cols;
  const auto from = static_cast<QuantType>(file_type), to = static_cast<QuantType>(type);
  const Packer pack = checked_packer(from, to);
  std::vector<uint8_t> rows(kTileRows * file_row_bytes(from, cols)), tile(tile_bytes(to, cols));
  uint64_t state = 1;
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>((state = state * 6364136223846793005 + 1) >> 56);
  pack_tile(pack, from, to, rows.data(), kTileRows, cols, tile.data());
  return checksum(tile.data(), tile.size());
}

}  // namespace llamaclust
