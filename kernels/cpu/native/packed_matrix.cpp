#include "packed_matrix.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "pack.h"

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

PackedMatrix::PackedMatrix(int type, int rows, int cols) : matrix_{checked(type, rows, cols), rows, cols, 0, nullptr} {
  matrix_.tile_bytes = tile_bytes(matrix_.type, cols);
  memory_ = Memory(static_cast<size_t>(matrix_.tile_count()) * matrix_.tile_bytes);
  matrix_.tiles = memory_.data();
}

PackedMatrix PackedMatrix::shape_only(int type, int rows, int cols) {
  const QuantType quant_type = checked(type, rows, cols);
  return PackedMatrix({quant_type, rows, cols, tile_bytes(quant_type, cols), nullptr}, Memory());
}

void PackedMatrix::pack_rows(int first_row, std::span<const uint8_t> data) {
  if (matrix_.tiles == nullptr) throw std::invalid_argument("a mere shape has no room for rows");
  const size_t row_bytes = file_row_bytes(matrix_.type, matrix_.cols), rows = data.size() / row_bytes;
  if (data.size() % row_bytes != 0)
    throw std::invalid_argument("not whole rows of " + std::to_string(row_bytes) + " bytes");
  if (first_row < 0 || first_row % kTileRows != 0) throw std::invalid_argument("the first row does not begin a tile");
  if (first_row > matrix_.rows || rows > static_cast<size_t>(matrix_.rows - first_row))
    throw std::invalid_argument("more rows than the matrix has");
  uint8_t* tile = memory_.data() + static_cast<size_t>(first_row / kTileRows) * matrix_.tile_bytes;
  for (size_t row = 0; row < rows; row += kTileRows, tile += matrix_.tile_bytes)
    pack_tile(matrix_.type, data.data() + row * row_bytes, static_cast<int>(std::min<size_t>(kTileRows, rows - row)),
              matrix_.cols, tile);
}

}  // namespace llamaclust
