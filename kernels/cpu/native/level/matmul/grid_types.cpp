// Matrix operations of IQ types whose weights are points of a grid.
#include "level/matmul/type_ops.h"
#include "level/quants/grid.h"

namespace llamaclust::LLAMACLUST_LEVEL {

TYPE_OPS_TABLE(grid_types, LLAMACLUST_GRID_TYPES(TYPE_OPS))

}  // namespace llamaclust::LLAMACLUST_LEVEL
