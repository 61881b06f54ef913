// Encodes the result of a microbatch (proto/sampling.proto).
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "frames/microbatch_frame.h"
#include "sampler/sampler.h"

namespace llamaclust {

// RowResult in core/sampler/results.py.
struct RowAnswer : RowOutcome {
  RowAnswer() = default;
  explicit RowAnswer(RowOutcome outcome) : RowOutcome(std::move(outcome)) {}

  std::vector<int32_t> forced, forced_draft, drafted;
  bool is_deferred = false, is_request_fault = false;
  uint64_t matcher_ns = 0;
};

struct StageResult {
  const MicrobatchFrame& frame;
  std::optional<Timing> timing;  // Timing of this stage; absent if it failed.
  const std::vector<RowAnswer>& rows;
  const std::string& failure;  // Empty if there was no failure.
  Bytes embeddings;
  uint64_t drafting_ns;

  std::string bytes() const;
};

}  // namespace llamaclust
