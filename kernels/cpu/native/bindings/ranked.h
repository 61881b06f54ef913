// Rows of logits that stay on a GPU, sampled by what it says of them.
#pragma once

#include <vector>

#include "bindings/bindings.h"
#include "sampler/sampler.h"

namespace llamaclust {

using RankedRows = Array<const int64_t, 2>;

// Of records[tasks][ranked_words]; `logits_of` gives the rows of given numbers, [rows][vocabulary], and `totals_of` sums of
// weights by given divisors, [tasks][sums_of_row]; both are called where some are needed.
std::vector<RowOutcome> run_ranked(Sampler& sampler, RankedRows records, const std::vector<RowTask>& tasks,
                                   const nb::callable& logits_of, const nb::callable& totals_of);

}  // namespace llamaclust
