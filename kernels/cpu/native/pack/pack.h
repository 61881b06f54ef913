// Packs rows of a model file into tiles, and computes the sizes of both.
#pragma once

#include <memory>
#include <span>

#include "level/matmul_ops.h"
#include "runtime/memory.h"

namespace llamaclust {

// Returns whether the type is in the table of level/quant_types.h. The functions below require that.
bool is_supported(QuantType type);

// Bytes of a row in a model file. `cols` is a multiple of the type's segment_cols.
size_t file_row_bytes(QuantType type, int cols);
// Number of columns that an activation format quantizes together.
int segment_cols(ActivationFormat format);

// A weight matrix in tiles, in memory of its own or in a part of shared memory.
class PackedMatrix {
 public:
  // Creates zeroed tiles. Throws std::invalid_argument for a type without products, or if `cols` is not a number of
  // whole segments.
  PackedMatrix(int type, int rows, int cols);

  // Uses tiles at `offset` of `memory`, which may be filled later. Throws as above, and if the tiles do not fit there.
  PackedMatrix(int type, int rows, int cols, std::shared_ptr<const Memory> memory, size_t offset);

  // Creates a type and a shape for planning, without memory; the weights must not be read. Throws as above.
  static PackedMatrix shape_only(int type, int rows, int cols);

  // Packs rows as a model file has them, in blocks of `file_type`. `first_row` is a multiple of 16; so is the number of
  // rows, except at the end of the matrix. Throws std::invalid_argument for a type that cannot be packed into tiles of
  // this one.
  void pack_rows(int first_row, std::span<const uint8_t> data, QuantType file_type);
  void pack_rows(int first_row, std::span<const uint8_t> data) { pack_rows(first_row, data, matrix_.type); }

  const Matrix& matrix() const { return matrix_; }
  size_t bytes() const { return static_cast<size_t>(matrix_.tile_count()) * matrix_.tile_bytes; }

 private:
  explicit PackedMatrix(const Matrix& matrix) : matrix_(matrix) {}

  std::shared_ptr<const Memory> memory_;
  Matrix matrix_;
  uint8_t* tiles_ = nullptr;  // Null if the tiles must not be written.
};

// Returns a number that changes if packing blocks of `file_type` into tiles of `type` gives different bytes. Throws
// std::invalid_argument as above.
uint64_t packing_fingerprint(int file_type, int type);

}  // namespace llamaclust
