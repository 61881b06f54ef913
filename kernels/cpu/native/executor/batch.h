// One microbatch as run() is given it.
#pragma once

#include <cstdint>
#include <span>

#include "executor/plan.h"

namespace llamaclust {

// Rows sequence_starts[s] .. sequence_starts[s + 1] belong to sequence s, at consecutive positions; position p lives in
// KV block block_tables[table_starts[s] + p / 16], and in windowed layers in window_tables[the same], which is -1 where
// no row sees the block any more, or none is yet to be stored.
struct Batch {
  std::span<const int32_t> tokens;  // empty where the stage embeds nothing
  std::span<const int32_t> positions;
  std::span<const int32_t> sequence_starts;
  std::span<const int32_t> table_starts;
  std::span<const int32_t> block_tables;
  std::span<const int32_t> window_tables;  // empty where no layer is windowed
  std::span<const int32_t> output_rows;
  const float* hidden;  // [rows][hidden width]; null where the stage reads none

  int rows() const { return static_cast<int>(positions.size()); }
  int sequences() const { return static_cast<int>(sequence_starts.size()) - 1; }
};

// std::invalid_argument where anything lies outside the plan's limits or contradicts itself.
void check_batch(const Batch& batch, const Plan& plan);

}  // namespace llamaclust
