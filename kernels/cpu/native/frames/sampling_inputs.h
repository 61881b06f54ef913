// Sampling inputs (proto/sampling.proto) as tasks of the sampler. Only tasks of the plain samplers, without matchers,
// are read; of all others the codec says what they are.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "frames/microbatch_frame.h"
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

// A task whose history goes on with the newest tokens of its row's chunk, up to the row's own.
struct GrowingHistory {
  size_t row;       // among the tasks
  uint32_t tokens;  // of the chunk
  uint32_t window;  // newest tokens that count; 0: all
};

struct SamplingTasks {
  uint64_t epoch = 0, number = 0;
  std::vector<RowTask> rows;
  std::vector<GrowingHistory> histories;
};

// None where the bytes are no such message, or one that is not read here.
std::optional<SamplingTasks> read_inputs(Bytes data, const InputsBounds& bounds);

// Adds the tokens of the frame's chunks to histories. False, with nothing changed, where they do not fit together.
bool complete_histories(SamplingTasks& tasks, const MicrobatchFrame& frame);

}  // namespace llamaclust
