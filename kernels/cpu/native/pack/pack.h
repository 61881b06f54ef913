// From rows as they lie in a model file to tiles, and the sizes of what kernels read.
#pragma once

#include <memory>
#include <span>

#include "level/matmul_ops.h"
#include "runtime/memory.h"

namespace llamaclust {

// Whether the type is in the table of level/quant_types.h; the functions below take no other.
bool is_supported(QuantType type);

// Bytes of a row in a model file; cols is a multiple of the type's segment_cols.
size_t file_row_bytes(QuantType type, int cols);
// Columns that an activation format quantizes together.
int segment_cols(ActivationFormat format);

// A weight matrix in tiles, in memory of its own or in a part of what several share.
class PackedMatrix {
 public:
  // All zero at first. std::invalid_argument for a type without products or a width that is not whole segments.
  PackedMatrix(int type, int rows, int cols);

  // Tiles that are, or are to be, at an offset of `memory`. Throws as above, and where they do not fit there.
  PackedMatrix(int type, int rows, int cols, std::shared_ptr<const Memory> memory, size_t offset);

  // Only the type and the shape, for planning: it has no memory and must not be read. Throws as above.
  static PackedMatrix shape_only(int type, int rows, int cols);

  // Packs rows as a model file holds them, in blocks of `file_type`; first_row is a multiple of 16, as is their number but
  // at the matrix's end. std::invalid_argument for a type that is not packed into tiles of this one.
  void pack_rows(int first_row, std::span<const uint8_t> data, QuantType file_type);
  void pack_rows(int first_row, std::span<const uint8_t> data) { pack_rows(first_row, data, matrix_.type); }

  const Matrix& matrix() const { return matrix_; }
  size_t bytes() const { return static_cast<size_t>(matrix_.tile_count()) * matrix_.tile_bytes; }

 private:
  explicit PackedMatrix(const Matrix& matrix) : matrix_(matrix) {}

  std::shared_ptr<const Memory> memory_;
  Matrix matrix_;
  uint8_t* tiles_ = nullptr;  // null where they must not be written
};

// A number that changes with what packing into tiles of `type` makes of blocks of `file_type`. std::invalid_argument as
// above.
uint64_t packing_fingerprint(int file_type, int type);

}  // namespace llamaclust
