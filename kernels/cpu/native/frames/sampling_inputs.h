// Sampling inputs (proto/sampling.proto) as tasks of the sampler.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "frames/microbatch_frame.h"
#include "sampler/sampler.h"

namespace llamaclust {

using Range = std::pair<double, double>;  // both ends belong to it

// What any last stage takes: anything beyond it is a ProtocolViolation.
struct InputsBounds {
  uint32_t max_rows, max_context, max_vocabulary, max_top_logprobs, max_released, max_breakers, max_breaker_tokens;
  uint64_t max_tokens;  // that all rows look at
  size_t max_bytes;
  double max_bias, max_mu;
  std::array<Range, 7> params;  // numbers of SamplingParams, in the order of its fields
  std::array<Range, 13> chain;  // and of SamplerChain
};

// A task whose history goes on with the newest tokens of its row's chunk, up to the row's own.
struct GrowingHistory {
  size_t row;       // among the tasks
  uint32_t tokens;  // of the chunk
  uint32_t window;  // newest tokens that count; 0: all
};

// A task of an answer that has a matcher.
struct MatcherRow {
  uint64_t row;  // among the tasks
  uint64_t key;  // of the answer
  uint64_t position;
  int32_t drafted = -1;  // its chunk's token, where the row before it in the chunk is sampled, too
};

struct SamplingTasks {
  uint64_t epoch = 0, number = 0;
  std::vector<RowTask> rows;
  std::vector<GrowingHistory> histories;
  std::vector<MatcherRow> matcher_rows;
  std::vector<uint64_t> released;  // answers whose matchers are forgotten before
  std::string starts;              // a message MatcherStarts; empty: none

  // Adds what the tokens of the frame's chunks say: to histories, and of drafted rows.
  void complete(const MicrobatchFrame& frame);
  // The same tasks of some rows, with another draw among the tokens that each may choose.
  SamplingTasks second_draws(const std::vector<size_t>& places, std::vector<std::vector<uint32_t>> allowed) const;
  // The draws of these rows so many tokens later, without what depends on the tokens so far.
  SamplingTasks drafts(const std::vector<size_t>& places, uint32_t later) const;
};

SamplingTasks read_inputs(Bytes data, const InputsBounds& bounds);

}  // namespace llamaclust
