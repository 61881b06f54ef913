// From rows as they lie in a model file to tiles, and the sizes of what kernels read.
#pragma once

#include "level/matmul_ops.h"

namespace llamaclust {

// Whether the type is in the table of level/quant_types.h; the functions below take no other.
bool is_supported(QuantType type);

// Bytes of a row in a model file; cols is a multiple of the type's segment_cols.
size_t file_row_bytes(QuantType type, int cols);
// Bytes of a tile of 16 rows, a multiple of 64.
size_t tile_bytes(QuantType type, int cols);
// Columns that an activation format quantizes together.
int segment_cols(ActivationFormat format);
// Bytes of one token's activations, a multiple of 64.
size_t activation_bytes(ActivationFormat format, int cols);
// Bytes of scratch memory that one thread needs for a product with any matrix of that many columns.
size_t matmul_scratch_bytes(int cols);

// Packs `rows` (1 to 16) rows that lie one after the other in the file's layout; further rows of the tile become zero.
void pack_tile(QuantType type, const uint8_t* file_rows, int rows, int cols, uint8_t* tile);

}  // namespace llamaclust
