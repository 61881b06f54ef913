// Locates the states of a batch's sequences.
#pragma once

#include <algorithm>

#include "executor/worker.h"

namespace llamaclust {

// Locates one sequence's states in a layer. A state is read before the first row of the sequence in the batch, and
// written after some of its rows, always including the last. For state blocks, the batch names these rows; for KV
// blocks, they are the last row in each block.
class StateBlocks {
 public:
  StateBlocks(const Worker& worker, int layer, int sequence)
      : begin(worker.batch().sequence_starts[index(sequence)]),
        end(worker.batch().sequence_starts[index(sequence) + 1]),
        batch_(worker.batch()),
        sequence_(index(sequence)),
        first_(batch_.positions[index(begin)]),
        floats_(index(worker.stage_.plan.kv_layers[index(layer)].state_floats)),
        memory_(reinterpret_cast<float*>(worker.stage_.kv->layer(layer))),
        has_blocks_(worker.stage_.plan.limits.state_blocks > 0) {}

  // Returns null at the start of a sequence.
  const float* before() const {
    if (first_ == 0) return nullptr;
    return at(has_blocks_ ? batch_.states.before[sequence_] : kv_block((first_ - 1) / kKvBlockTokens));
  }

  // Calls f(row, state) for each row after which the state is written, in ascending order. The last state may be the
  // memory that `before` returned.
  template <typename F>
  void each_end(F f) const {
    if (has_blocks_) {
      const StateTables& states = batch_.states;
      for (int32_t i = states.starts[sequence_]; i < states.starts[sequence_ + 1]; i++)
        f(static_cast<int>(states.rows[index(i)]), at(states.blocks[index(i)]));
      return;
    }
    const int last = first_ + (end - begin) - 1;
    for (int block = first_ / kKvBlockTokens; block <= last / kKvBlockTokens; block++)
      f(begin + std::min(last, block * kKvBlockTokens + kKvBlockTokens - 1) - first_, at(kv_block(block)));
  }

  const int begin, end;  // Rows [begin, end) of the batch.

 private:
  static size_t index(int id) { return static_cast<size_t>(id); }
  float* at(int block) const { return memory_ + index(block) * floats_; }
  int kv_block(int number) const { return batch_.block_tables[index(batch_.table_starts[sequence_] + number)]; }

  const Batch& batch_;
  const size_t sequence_;
  const int first_;  // Position of the first row.
  const size_t floats_;
  float* const memory_;
  const bool has_blocks_;
};

}  // namespace llamaclust
