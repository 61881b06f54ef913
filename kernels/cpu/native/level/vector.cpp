#include "vector_ops.h"
namespace llamaclust::LLAMACLUST_LEVEL { extern const VectorOps vector_ops; const VectorOps vector_ops = {}; }
