// Matrix operations of float types, and of types with blocks of 32 columns.
#include "level/matmul/type_ops.h"
#include "level/quants/simple.h"

namespace llamaclust::LLAMACLUST_LEVEL {

TYPE_OPS_TABLE(simple_types, LLAMACLUST_FLOAT_TYPES(TYPE_OPS) LLAMACLUST_SIMPLE_TYPES(TYPE_OPS))

}  // namespace llamaclust::LLAMACLUST_LEVEL
