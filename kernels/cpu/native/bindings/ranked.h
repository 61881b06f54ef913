// Sampling of rows whose logits stay on a GPU, from the records that the GPU computes of them.
#pragma once

#include <vector>

#include "bindings/bindings.h"
#include "sampler/sampler.h"

namespace llamaclust {

using RankedRows = Array<const int64_t, 2>;

// `records` is [tasks][ranked_words]. `logits_of(row numbers)` returns logits [rows][vocabulary]; it is called if a
// record does not suffice. `totals_of(divisors)` returns sums of weights [tasks][sums_of_row]; it is called if a
// divisor is not 0.
std::vector<RowOutcome> run_ranked(Sampler& sampler, RankedRows records, const std::vector<RowTask>& tasks,
                                   const nb::callable& logits_of, const nb::callable& totals_of);

}  // namespace llamaclust
