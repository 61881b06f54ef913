// Checks a batch against the plan before it runs, so that a run accesses no memory beyond its own.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "executor/executor.h"

namespace llamaclust {
namespace {

[[noreturn]] void refuse(const char* what, int64_t value, int64_t limit) {
  throw std::invalid_argument("batch: " + std::string(what) + " " + std::to_string(value) + " against " +
                              std::to_string(limit));
}

void check_range(const char* what, int64_t value, int64_t begin, int64_t end) {
  if (value < begin || value >= end) refuse(what, value, end);
}

// Throws unless starts[0] = 0, each step is at least `least`, and the last one is `end`.
void check_starts(const char* what, std::span<const int32_t> starts, size_t end, int least) {
  if (starts.empty() || starts.front() != 0) refuse(what, starts.empty() ? -1 : starts.front(), 0);
  for (size_t i = 1; i < starts.size(); i++)
    if (starts[i] - static_cast<int64_t>(starts[i - 1]) < least) refuse(what, starts[i], starts[i - 1]);
  if (static_cast<size_t>(starts.back()) != end) refuse(what, starts.back(), static_cast<int64_t>(end));
}

void check_sequence(const Batch& batch, int sequence, const Limits& limits) {
  const size_t s = static_cast<size_t>(sequence);
  const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
  const int32_t first = batch.positions[begin];
  check_range("position", first, 0, static_cast<int64_t>(limits.max_context_tokens) - (end - begin) + 1);
  for (int row = begin; row < end; row++)
    if (batch.positions[row] != first + (row - begin)) refuse("position", batch.positions[row], first + (row - begin));
  const int64_t room = (static_cast<int64_t>(batch.table_starts[s + 1]) - batch.table_starts[s]) * kKvBlockTokens;
  if (first + (end - begin) > room) refuse("positions of a block table", first + (end - begin), room);
}

// Only the blocks that rows of a windowed layer read or write must exist.
void check_window(const Batch& batch, int sequence, const Plan& plan) {
  const size_t s = static_cast<size_t>(sequence);
  const int32_t first = batch.positions[batch.sequence_starts[s]];
  const int32_t last = batch.positions[batch.sequence_starts[s + 1] - 1];
  const int begin = std::max(first - plan.window + 1, 0) / kKvBlockTokens, end = last / kKvBlockTokens + 1;
  for (int block = begin; block < end; block++)
    check_range("window block", batch.window_tables[batch.table_starts[s] + block], 0, plan.limits.window_blocks);
}

// The last row of each sequence writes its state; earlier rows may.
void check_states(const Batch& batch, const Plan& plan) {
  const StateTables& states = batch.states;
  const int blocks = plan.limits.state_blocks;
  if (states.before.size() + 1 != batch.sequence_starts.size())
    refuse("states before sequences", static_cast<int64_t>(states.before.size()), batch.sequences());
  if (states.starts.size() != batch.sequence_starts.size() || states.rows.size() != states.blocks.size())
    refuse("states", static_cast<int64_t>(states.starts.size()), batch.sequences() + 1);
  check_starts("states of sequences", states.starts, states.blocks.size(), 1);
  for (size_t s = 0; s < states.before.size(); s++) {
    const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    if (batch.positions[begin] > 0) check_range("state block", states.before[s], 0, blocks);
    int least = begin;
    for (int32_t i = states.starts[s]; i < states.starts[s + 1]; i++) {
      check_range("row of a state", states.rows[i], least, end);
      check_range("state block", states.blocks[i], 0, blocks);
      least = states.rows[i] + 1;
    }
    if (least != end) refuse("last state behind row", least - 1, end - 1);
  }
}

// The rows of a group must be adjacent, in one sequence, and complete.
void check_groups(const Batch& batch) {
  if (batch.groups.size() != 2 * batch.positions.size())
    refuse("groups", static_cast<int64_t>(batch.groups.size()), 2 * int64_t{batch.rows()});
  for (int sequence = 0; sequence < batch.sequences(); sequence++) {
    const int end = batch.sequence_starts[sequence + 1];
    int32_t group_start = 0, group_end = batch.positions[batch.sequence_starts[sequence]];
    for (int row = batch.sequence_starts[sequence]; row < end; row++) {
      if (batch.positions[row] == group_end) group_start = group_end, group_end = batch.groups[2 * row + 1];
      if (batch.groups[2 * row] != group_start) refuse("start of a group", batch.groups[2 * row], group_start);
      if (batch.groups[2 * row + 1] != group_end || group_end <= batch.positions[row])
        refuse("end of a group", batch.groups[2 * row + 1], group_end);
    }
    if (group_end != batch.positions[end - 1] + 1) refuse("end of a group", group_end, batch.positions[end - 1] + 1);
  }
}

void check_rope_positions(const Batch& batch, const Plan& plan) {
  const size_t rows = batch.positions.size(), size = batch.rope_positions.size();
  if (size % rows != 0 || size / rows < static_cast<size_t>(plan.sections))
    refuse("rope positions", static_cast<int64_t>(size), static_cast<int64_t>(rows) * plan.sections);
  for (const int32_t position : batch.rope_positions)
    check_range("rope position", position, 0, plan.limits.max_context_tokens);
}

void check_given(const Batch& batch, const Plan& plan) {
  const GivenTable& given = batch.given;
  if (given.width % plan.given_width != 0 || given.width / plan.given_width < plan.given_levels)
    refuse("width of given rows", given.width, int64_t{plan.given_width} * plan.given_levels);
  int64_t least = 0;
  for (const int32_t row : given.rows) {
    check_range("given row", row, least, batch.rows());
    least = row + 1;
  }
}

}  // namespace

void check_batch(const Batch& batch, const Plan& plan) {
  const Limits& limits = plan.limits;
  const int64_t rows = static_cast<int64_t>(batch.positions.size());
  check_range("rows", rows, 1, static_cast<int64_t>(limits.max_tokens) + 1);
  check_starts("sequence_starts", batch.sequence_starts, batch.positions.size(), 1);
  check_range("sequences", batch.sequences(), 1, static_cast<int64_t>(limits.max_sequences) + 1);
  if (batch.table_starts.size() != batch.sequence_starts.size())
    refuse("table_starts", static_cast<int64_t>(batch.table_starts.size()), batch.sequences() + 1);
  check_starts("table_starts", batch.table_starts, batch.block_tables.size(), 0);
  for (const int32_t block : batch.block_tables) check_range("KV block", block, 0, limits.kv_blocks);
  for (int sequence = 0; sequence < batch.sequences(); sequence++) check_sequence(batch, sequence, limits);
  if (plan.window > 0 && batch.window_tables.size() != batch.block_tables.size())
    refuse("window_tables", static_cast<int64_t>(batch.window_tables.size()),
           static_cast<int64_t>(batch.block_tables.size()));
  for (int sequence = 0; plan.window > 0 && sequence < batch.sequences(); sequence++)
    check_window(batch, sequence, plan);
  if (plan.has_states && limits.state_blocks > 0) check_states(batch, plan);
  if (plan.vocabulary > 0 && static_cast<int64_t>(batch.tokens.size()) != rows)
    refuse("tokens", static_cast<int64_t>(batch.tokens.size()), rows);
  if (plan.vocabulary > 0)
    for (const int32_t token : batch.tokens) check_range("token", token, 0, plan.vocabulary);
  if (plan.hidden_width > 0 && batch.hidden == nullptr) refuse("hidden states", 0, rows);
  if (!batch.groups.empty()) check_groups(batch);
  if (plan.sections > 0 && !batch.rope_positions.empty()) check_rope_positions(batch, plan);
  if (plan.given_width > 0 && !batch.given.rows.empty()) check_given(batch, plan);
  for (const int32_t start : batch.sequence_starts)
    if (start % plan.merged != 0) refuse("rows of sequences before merging", start, plan.merged);
  if (!plan.selects) return;
  check_range("outputs", static_cast<int64_t>(batch.output_rows.size()), 0,
              static_cast<int64_t>(limits.max_outputs) + 1);
  int64_t least = 0;
  for (const int32_t row : batch.output_rows) {
    check_range("output row", row, least, rows);
    least = row + 1;
  }
}

}  // namespace llamaclust
