// Matrix operations of types with blocks of 256 columns whose sub-blocks have integer scales, and of ternary types.
#include "level/matmul/type_ops.h"
#include "level/quants/k.h"

namespace llamaclust::LLAMACLUST_LEVEL {

TYPE_OPS_TABLE(k_types, LLAMACLUST_K_TYPES(TYPE_OPS) LLAMACLUST_TERNARY_TYPES(TYPE_OPS))

}  // namespace llamaclust::LLAMACLUST_LEVEL
