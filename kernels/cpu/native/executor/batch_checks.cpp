// Checks a batch against the plan before it runs, so that a run accesses no memory beyond its own.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "executor/executor.h"

namespace llamaclust {
namespace {

[[noreturn]] void refuse(const std::string& what, int64_t value, const std::string& why) {
  throw std::invalid_argument("batch: " + what + " is " + std::to_string(value) + ", " + why);
}

void check_range(const char* what, int64_t value, int64_t begin, int64_t end) {
  if (value < begin || value >= end)
    refuse(what, value, "outside [" + std::to_string(begin) + ", " + std::to_string(end) + ")");
}

void check_equal(const char* what, int64_t value, int64_t expected) {
  if (value != expected) refuse(what, value, "expected " + std::to_string(expected));
}

// Throws unless starts[0] = 0, each step is at least `least`, and the last one is `end`.
void check_starts(const char* what, std::span<const int32_t> starts, size_t end, int least) {
  check_equal(what, starts.empty() ? -1 : starts.front(), 0);
  for (size_t i = 1; i < starts.size(); i++)
    if (const int64_t next = int64_t{starts[i - 1]} + least; starts[i] < next)
      refuse(what, starts[i], "expected " + std::to_string(next) + " or more");
  check_equal(what, starts.back(), static_cast<int64_t>(end));
}

void check_sequence(const Batch& batch, int sequence, const Limits& limits) {
  const size_t s = static_cast<size_t>(sequence);
  const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
  const int32_t first = batch.positions[begin];
  check_range("position", first, 0, static_cast<int64_t>(limits.max_context_tokens) - (end - begin) + 1);
  for (int row = begin; row < end; row++)
    check_equal("position", batch.positions[row], first + (row - begin));
  const int64_t room = (static_cast<int64_t>(batch.table_starts[s + 1]) - batch.table_starts[s]) * kKvBlockTokens;
  if (first + (end - begin) > room)
    refuse("number of positions", first + (end - begin), "but the block table has room for " + std::to_string(room));
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
  check_equal("number of states before sequences", static_cast<int64_t>(states.before.size()), batch.sequences());
  check_equal("number of starts of states", static_cast<int64_t>(states.starts.size()), batch.sequences() + 1);
  check_equal("number of rows of states", static_cast<int64_t>(states.rows.size()),
              static_cast<int64_t>(states.blocks.size()));
  check_starts("starts of states", states.starts, states.blocks.size(), 1);
  for (size_t s = 0; s < states.before.size(); s++) {
    const int begin = batch.sequence_starts[s], end = batch.sequence_starts[s + 1];
    if (batch.positions[begin] > 0) check_range("state block", states.before[s], 0, blocks);
    int least = begin;
    for (int32_t i = states.starts[s]; i < states.starts[s + 1]; i++) {
      check_range("row of a state", states.rows[i], least, end);
      check_range("state block", states.blocks[i], 0, blocks);
      least = states.rows[i] + 1;
    }
    check_equal("row of a sequence's last state", least - 1, end - 1);
  }
}

// The rows of a group must be adjacent, in one sequence, and complete.
void check_groups(const Batch& batch) {
  check_equal("number of starts and ends of groups", static_cast<int64_t>(batch.groups.size()),
              2 * int64_t{batch.rows()});
  for (int sequence = 0; sequence < batch.sequences(); sequence++) {
    const int end = batch.sequence_starts[sequence + 1];
    int32_t group_start = 0, group_end = batch.positions[batch.sequence_starts[sequence]];
    for (int row = batch.sequence_starts[sequence]; row < end; row++) {
      if (batch.positions[row] == group_end) group_start = group_end, group_end = batch.groups[2 * row + 1];
      check_equal("start of a group", batch.groups[2 * row], group_start);
      check_equal("end of a group", batch.groups[2 * row + 1], group_end);
      if (group_end <= batch.positions[row])
        refuse("end of a group", group_end, "a row has position " + std::to_string(batch.positions[row]));
    }
    check_equal("end of a group", group_end, int64_t{batch.positions[end - 1]} + 1);
  }
}

void check_rope_positions(const Batch& batch, const Plan& plan) {
  const size_t rows = batch.positions.size(), size = batch.rope_positions.size();
  if (size % rows != 0 || size / rows < static_cast<size_t>(plan.sections))
    refuse("number of rope positions", static_cast<int64_t>(size),
           "expected " + std::to_string(plan.sections) + " or more for each of " + std::to_string(rows) + " rows");
  for (const int32_t position : batch.rope_positions)
    check_range("rope position", position, 0, plan.limits.max_context_tokens);
}

void check_given(const Batch& batch, const Plan& plan) {
  const GivenTable& given = batch.given;
  if (given.width % plan.given_width != 0 || given.width / plan.given_width < plan.given_levels)
    refuse("width of given rows", given.width,
           "expected " + std::to_string(plan.given_levels) + " or more times " + std::to_string(plan.given_width));
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
  check_range("number of rows", rows, 1, static_cast<int64_t>(limits.max_tokens) + 1);
  check_starts("sequence_starts", batch.sequence_starts, batch.positions.size(), 1);
  check_range("number of sequences", batch.sequences(), 1, static_cast<int64_t>(limits.max_sequences) + 1);
  check_equal("number of table_starts", static_cast<int64_t>(batch.table_starts.size()), batch.sequences() + 1);
  check_starts("table_starts", batch.table_starts, batch.block_tables.size(), 0);
  for (const int32_t block : batch.block_tables) check_range("KV block", block, 0, limits.kv_blocks);
  for (int sequence = 0; sequence < batch.sequences(); sequence++) check_sequence(batch, sequence, limits);
  if (plan.window > 0)
    check_equal("number of window_tables", static_cast<int64_t>(batch.window_tables.size()),
                static_cast<int64_t>(batch.block_tables.size()));
  for (int sequence = 0; plan.window > 0 && sequence < batch.sequences(); sequence++)
    check_window(batch, sequence, plan);
  if (plan.has_states && limits.state_blocks > 0) check_states(batch, plan);
  if (plan.vocabulary > 0) check_equal("number of tokens", static_cast<int64_t>(batch.tokens.size()), rows);
  if (plan.vocabulary > 0)
    for (const int32_t token : batch.tokens) check_range("token", token, 0, plan.vocabulary);
  if (plan.hidden_width > 0 && batch.hidden == nullptr) check_equal("number of hidden states", 0, rows);
  if (!batch.groups.empty()) check_groups(batch);
  if (plan.sections > 0 && !batch.rope_positions.empty()) check_rope_positions(batch, plan);
  if (plan.given_width > 0 && !batch.given.rows.empty()) check_given(batch, plan);
  for (const int32_t start : batch.sequence_starts)
    if (start % plan.merged != 0)
      refuse("number of rows before a sequence", start, "not a multiple of " + std::to_string(plan.merged));
  if (!plan.selects) return;
  check_range("number of outputs", static_cast<int64_t>(batch.output_rows.size()), 0,
              static_cast<int64_t>(limits.max_outputs) + 1);
  int64_t least = 0;
  for (const int32_t row : batch.output_rows) {
    check_range("output row", row, least, rows);
    least = row + 1;
  }
}

}  // namespace llamaclust
