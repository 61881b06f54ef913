// Which way of fetching weights ahead reads them faster: that is the processor's (docs/kernels.md), so it is found by
// trial. Results do not depend on it.
#pragma once

#include <span>

#include "level/matmul_ops.h"

namespace llamaclust {

// What this process has found; Far before it has.
WeightFetch weight_fetch();

// Finds it, once in a process: products of one token with these weights, both ways in turns, in some tens of milliseconds.
// Weights that a cache holds tell nothing, and are not tried.
void find_weight_fetch(const MatmulOps& ops, std::span<const Matrix> weights, int threads);

}  // namespace llamaclust
