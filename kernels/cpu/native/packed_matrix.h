// A weight matrix that owns its tiles.
#pragma once

#include <span>
#include <utility>

#include "matmul_ops.h"
#include "memory.h"

namespace llamaclust {

class PackedMatrix {
 public:
  // All zero at first. std::invalid_argument for a type without products or a width that is not whole segments.
  PackedMatrix(int type, int rows, int cols);

  // Only the type and the shape, for planning: it has no memory and must not be read. Throws as above.
  static PackedMatrix shape_only(int type, int rows, int cols);

  // Packs rows as a model file holds them; first_row is a multiple of 16, as is their number but at the matrix's end.
  void pack_rows(int first_row, std::span<const uint8_t> data);

  const Matrix& matrix() const { return matrix_; }
  size_t bytes() const { return memory_.bytes(); }

 private:
  PackedMatrix(const Matrix& matrix, Memory memory) : memory_(std::move(memory)), matrix_(matrix) {}

  Memory memory_;
  Matrix matrix_;
};

}  // namespace llamaclust
