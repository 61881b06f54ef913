// What one CPU feature level provides. The sources in level/ are compiled once per level, each into its own namespace
// (LLAMACLUST_LEVEL), and every level exports one table of functions; the rest of the program calls through the table.
// Level code defines nothing with external linkage but its op tables: a shared inline function compiled for AVX-512
// would be an illegal instruction on an older node (cmake/check_isa.cmake fails the build on weak symbols).
#pragma once

#include "level/attention_ops.h"
#include "level/matmul_ops.h"
#include "level/quantize_ops.h"
#include "level/sampler_ops.h"
#include "level/vector_ops.h"

namespace llamaclust {

struct Level {
  const char* name;  // generic | avx2 | avxvnni | avx512 | avx512vnni | neon | neon_dotprod
  MatmulOps matmul;
  VectorOps vector;
  AttentionOps attention;
  SamplerOps sampler;
  QuantizeOps quantize;
};

}  // namespace llamaclust
