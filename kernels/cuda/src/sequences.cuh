// Rows of a microbatch by sequence, and where states of these are.
#pragma once

#include "base.cuh"

namespace llamaclust::cuda {

// Sequence s with starts[s] <= row < starts[s + 1].
DEVICE int sequence_of(int row, const int32_t* starts, int sequences) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (starts[middle] <= row ? low : high) = middle;
  }
  return low;
}

// Places of states, the same for all layers. The first row of sequence s reads the state in block before[s], or zeros if it
// is negative. Entries starts[s] to starts[s + 1] are written: the state behind rows[i] to blocks[i].
struct StatePlaces {
  const int32_t *before, *starts, *rows, *blocks;
};

#define STATE_PARAMETERS                                                                                              \
  const int32_t *header, const int32_t *sequence_starts, const int32_t *before, const int32_t *state_starts,          \
      const int32_t *state_rows, const int32_t *state_blocks, float *states
#define STATE_PLACES {before, state_starts, state_rows, state_blocks}

}  // namespace llamaclust::cuda
