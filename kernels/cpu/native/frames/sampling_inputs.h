// Sampling inputs (proto/sampling.proto) as tasks of the sampler. Only tasks that follow from the message alone, by the
// plain samplers, are read; of all others the codec says what they are.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "frames/fields.h"
#include "sampler/sampler.h"

namespace llamaclust {

using Range = std::pair<double, double>;  // both ends belong to it

// The codec's.
struct InputsBounds {
  uint32_t max_rows, max_context, max_vocabulary, max_top_logprobs, max_top_k;
  uint64_t max_tokens;  // that all rows look at
  size_t max_bytes;
  std::array<Range, 6> reals;  // of SamplingParams, in the order of its fields
};

struct SamplingTasks {
  uint64_t epoch = 0, number = 0;
  std::vector<RowTask> rows;
};

// None where the bytes are no such message, or one that is not read here.
std::optional<SamplingTasks> read_inputs(Bytes data, const InputsBounds& bounds);

}  // namespace llamaclust
