#include "pack/packed_matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "pack/pack.h"

namespace llamaclust {
namespace {

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

void PackedMatrix::pack_rows(int first_row, std::span<const uint8_t> data) {
  if (tiles_ == nullptr) throw std::invalid_argument("a matrix of shape_only, or of a mapped file, takes no rows");
  const size_t row_bytes = file_row_bytes(matrix_.type, matrix_.cols), rows = data.size() / row_bytes;
  if (data.size() % row_bytes != 0)
    throw std::invalid_argument("not whole rows of " + std::to_string(row_bytes) + " bytes");
  if (first_row < 0 || first_row % kTileRows != 0) throw std::invalid_argument("the first row does not begin a tile");
  if (first_row > matrix_.rows || rows > static_cast<size_t>(matrix_.rows - first_row))
    throw std::invalid_argument("more rows than the matrix has");
  uint8_t* tile = tiles_ + static_cast<size_t>(first_row / kTileRows) * matrix_.tile_bytes;
  for (size_t row = 0; row < rows; row += kTileRows, tile += matrix_.tile_bytes)
    pack_tile(matrix_.type, data.data() + row * row_bytes, static_cast<int>(std::min<size_t>(kTileRows, rows - row)),
              matrix_.cols, tile);
}

uint64_t packing_fingerprint(int type) {
  constexpr int kSegments = 11;  // groups of 4, 2 or 1, and a short one
  const int cols = kSegments * tile_layout(checked(type, 1, 256)).segment_cols;
  const auto quant_type = static_cast<QuantType>(type);
  std::vector<uint8_t> rows(kTileRows * file_row_bytes(quant_type, cols)), tile(tile_bytes(quant_type, cols));
  uint64_t state = 1;
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>((state = state * 6364136223846793005 + 1) >> 56);
  pack_tile(quant_type, rows.data(), kTileRows, cols, tile.data());
  return checksum(tile.data(), tile.size());
}

}  // namespace llamaclust
