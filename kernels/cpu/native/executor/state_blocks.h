// Where the states of a batch's sequences are.
#pragma once

#include <algorithm>

#include "executor/worker.h"

namespace llamaclust {

// Where one sequence of a batch has a state: it is read behind the row before its first one, and written at the end of
// each block that its rows reach.
class StateBlocks {
 public:
  StateBlocks(const Worker& worker, int layer, int sequence)
      : begin(worker.batch_.sequence_starts[index(sequence)]),
        end(worker.batch_.sequence_starts[index(sequence) + 1]),
        first_(worker.batch_.positions[index(begin)]),
        floats_(index(worker.stage_.plan.kv_layers[index(layer)].state_floats)),
        memory_(reinterpret_cast<float*>(worker.stage_.kv.layer(layer))) {
    const Batch& batch = worker.batch_;
    const bool windowed = worker.stage_.plan.kv_layers[index(layer)].windowed;
    table_ = (windowed ? batch.window_tables : batch.block_tables).data() + batch.table_starts[index(sequence)];
  }

  // Null at the beginning of a sequence.
  const float* before() const { return first_ == 0 ? nullptr : at((first_ - 1) / kKvBlockTokens); }

  // Calls f(row, state) for the last row in each block.
  template <typename F>
  void each_end(F f) const {
    const int last = first_ + (end - begin) - 1;
    for (int block = first_ / kKvBlockTokens; block <= last / kKvBlockTokens; block++)
      f(begin + std::min(last, block * kKvBlockTokens + kKvBlockTokens - 1) - first_, at(block));
  }

  const int begin, end;  // rows

 private:
  static size_t index(int id) { return static_cast<size_t>(id); }
  float* at(int block) const { return memory_ + index(table_[block]) * floats_; }

  const int first_;  // position
  const size_t floats_;
  float* const memory_;
  const int32_t* table_;
};

}  // namespace llamaclust
