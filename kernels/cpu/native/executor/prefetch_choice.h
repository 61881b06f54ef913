// Measures which kind of prefetching reads weights faster, because that depends on the processor
// (docs/internals/kernels.md). Results of products do not depend on it.
#pragma once

#include <optional>
#include <span>

#include "level/matmul_ops.h"

namespace llamaclust {

// The prefetching of this process; Far before it is known.
Prefetch prefetch_of_process();

// The prefetching of this process, if it is known.
std::optional<Prefetch> known_prefetch();
// std::nullopt lets the next large stage measure again.
void set_known_prefetch(std::optional<Prefetch> way);

// Measures the prefetching unless it is known. Multiplies one token with these weights alternately both ways, for some
// tens of milliseconds. Weights that fit into a cache are not measured, because they show no difference.
void choose_prefetch(const MatmulOps& ops, std::span<const Matrix> weights, int threads);

// Returns Near if it is clearly faster in the median of consecutive pairs.
Prefetch faster_prefetch(std::span<const int64_t> far_ns, std::span<const int64_t> near_ns);

}  // namespace llamaclust
