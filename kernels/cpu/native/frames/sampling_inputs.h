// Converts sampling inputs (proto/sampling.proto) to tasks of the sampler.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "frames/microbatch_frame.h"
#include "sampler/sampler.h"

namespace llamaclust {

using Range = std::pair<double, double>;  // An inclusive range.

// Limits of any last stage. Anything beyond them throws a ProtocolViolation.
struct InputsBounds {
  uint32_t max_rows, max_context, max_vocabulary, max_top_logprobs, max_released, max_breakers, max_breaker_tokens;
  uint64_t max_tokens;  // Limit of the tokens in all rows together.
  size_t max_bytes;
  double max_bias, max_mu;
  std::array<Range, 7> params;  // Ranges of the fields of SamplingParams, in their order.
  std::array<Range, 13> chain;  // Ranges of the fields of SamplerChain, in their order.
};

// A task whose history is continued by the newest tokens of its row's chunk, including the row's own token.
struct GrowingHistory {
  size_t row;       // Index of the task.
  uint32_t tokens;  // Number of tokens of the chunk.
  uint32_t window;  // Number of newest tokens that count; 0 for all.
};

// A task of an answer that has a grammar matcher.
struct MatcherRow {
  uint64_t row;  // Index of the task.
  uint64_t key;  // Identifies the answer.
  uint64_t position;
  // The token of the row, if the previous row of its chunk is sampled as well; -1 otherwise.
  int32_t drafted = -1;
};

struct SamplingTasks {
  uint64_t epoch = 0, number = 0;
  std::vector<RowTask> rows;
  std::vector<GrowingHistory> histories;
  std::vector<MatcherRow> matcher_rows;
  std::vector<uint64_t> released;  // Answers whose matchers are released before the tasks run.
  std::string starts;              // A message MatcherStarts; empty if there is none.

  // Adds tokens of the frame's chunks to the histories, and sets `drafted` of matcher rows.
  void complete(const MicrobatchFrame& frame);
  // Returns the tasks at `places` with other random draws, each among its `allowed` tokens.
  SamplingTasks second_draws(const std::vector<size_t>& places, std::vector<std::vector<uint32_t>> allowed) const;
  // Returns the tasks at `places` for the token `later` positions further on, without all that depends on the tokens so
  // far.
  SamplingTasks drafts(const std::vector<size_t>& places, uint32_t later) const;
};

SamplingTasks read_inputs(Bytes data, const InputsBounds& bounds);

}  // namespace llamaclust
