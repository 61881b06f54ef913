// The sequence of each row of a microbatch, and the places of sequences' states.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

// Returns the sequence s with starts[s] <= row < starts[s + 1].
DEVICE int sequence_of(int row, const int32_t* starts, int sequences) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Places of states, the same for all layers. The first row of sequence s reads the state in block before[s], or zeros
// if that is negative. For i in [starts[s], starts[s + 1]), the state after row rows[i] is written to blocks[i].
struct StatePlaces {
  const int32_t *before, *starts, *rows, *blocks;
};

#define STATE_PARAMETERS                                                                                              \
  const int32_t *header, const int32_t *sequence_starts, const int32_t *before, const int32_t *state_starts,          \
      const int32_t *state_rows, const int32_t *state_blocks, float *states
#define STATE_PLACES {before, state_starts, state_rows, state_blocks}

}  // namespace llamaclust::cuda
