// States of sequences in the threads: each takes whole sequences in some of their channels, and rows in their order.
#include <algorithm>
#include <cstring>

#include "executor/state_blocks.h"

namespace llamaclust {

namespace {

constexpr int kPartChannels = 128;  // of a convolution, in one thread at once

}  // namespace

void Worker::execute(const ConvolveStep& step) {
  const int width = buffer(step.x).width, kept = step.taps - 1;
  const int64_t parts = (width + kPartChannels - 1) / kPartChannels;
  share(batch().sequences() * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      lookahead_.fetch();
      const StateBlocks blocks(*this, step.layer, static_cast<int>(i / parts));
      const int start = static_cast<int>(i % parts) * kPartChannels, n = std::min(kPartChannels, width - start);
      float history[kMaxTaps - 1][kPartChannels];  // a copy, since the state is written where it was read
      const float* before = blocks.before();
      for (int j = 0; j < kept; j++)
        if (before == nullptr)
          std::fill_n(history[j], n, 0.0f);
        else
          memcpy(history[j], before + j * width + start, static_cast<size_t>(n) * sizeof(float));
      const auto row_of_x = [&](int row) -> const float* {
        return row < blocks.begin ? history[row - blocks.begin + kept] : line(step.x, row) + start;
      };
      for (int row = blocks.begin; row < blocks.end; row++) {
        const float* x[kMaxTaps];
        for (int t = 0; t < step.taps; t++) x[t] = row_of_x(row - kept + t);
        stage_.level.state.convolve(x, step.weight.data() + start, width,
                                    step.bias.empty() ? nullptr : step.bias.data() + start, step.taps, n,
                                    line(step.out, row) + start);
      }
      blocks.each_end([&](int row, float* state) {
        for (int j = 0; j < kept; j++)
          memcpy(state + j * width + start, row_of_x(row - kept + 1 + j), static_cast<size_t>(n) * sizeof(float));
      });
    }
  });
}

}  // namespace llamaclust
