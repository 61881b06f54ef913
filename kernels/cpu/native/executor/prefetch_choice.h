// Which way of prefetching weights reads them faster: that is the processor's (internals/kernels.md), so it is measured.
// Results do not depend on it.
#pragma once

#include <optional>
#include <span>

#include "level/matmul_ops.h"

namespace llamaclust {

// The way of this process; Far before it is known.
Prefetch prefetch_of_process();

// The same, if it is known.
std::optional<Prefetch> known_prefetch();
// Nothing: the next large stage finds it.
void set_known_prefetch(std::optional<Prefetch> way);

// Finds it, unless it is known: products of one token with these weights, both ways in turns, in some tens of milliseconds.
// Weights that a cache holds tell nothing, and are not measured.
void choose_prefetch(const MatmulOps& ops, std::span<const Matrix> weights, int threads);

// Near if it is clearly faster: in the median of pairs that follow each other.
Prefetch faster_prefetch(std::span<const int64_t> far_ns, std::span<const int64_t> near_ns);

}  // namespace llamaclust
