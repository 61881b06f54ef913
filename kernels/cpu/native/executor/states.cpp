// States of convolutions and scans (Mamba 2), divided among the threads. Each computes some channels or heads of a
// sequence, row after row.
#include <algorithm>
#include <cstring>

#include "executor/state_blocks.h"

namespace llamaclust {
namespace {

constexpr int kRowsAtOnce = 16;
constexpr int kPartChannels = 128;  // Channels of a convolution that a thread computes at a time.

}  // namespace

void Worker::execute(const ConvolveStep& step) {
  const int width = buffer(step.x).width, kept = step.taps - 1;
  const int64_t parts = (width + kPartChannels - 1) / kPartChannels;
  share(batch().sequences() * parts, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      lookahead_.fetch();
      const StateBlocks blocks(*this, step.layer, static_cast<int>(i / parts));
      const int start = static_cast<int>(i % parts) * kPartChannels, n = std::min(kPartChannels, width - start);
      // A copy, because the state may be written where it was read.
      float history[kMaxTaps - 1][kPartChannels];
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

void Worker::execute(const ScanStep& step) {
  const int heads = step.heads();
  share(static_cast<int64_t>(batch().sequences()) * heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      lookahead_.fetch();
      scan_head(step, static_cast<int>(i / heads), static_cast<int>(i % heads));
    }
  });
}

// Updates the head's part of the state in place, continuing from block to block.
void Worker::scan_head(const ScanStep& step, int sequence, int head) {
  const StateBlocks blocks(*this, step.layer, sequence);
  const size_t floats = static_cast<size_t>(buffer(step.out).width / step.heads()) * static_cast<size_t>(step.state_size);
  const size_t place = static_cast<size_t>(head) * floats;
  const float* before = blocks.before();
  int row = blocks.begin;
  blocks.each_end([&](int last, float* state) {
    if (before == nullptr)
      std::fill_n(state + place, floats, 0.0f);
    else if (before != state)
      memcpy(state + place, before + place, floats * sizeof(float));
    for (; row <= last; row += kRowsAtOnce)
      scan_rows(step, head, row, std::min(kRowsAtOnce, last + 1 - row), state + place);
    row = last + 1;
    before = state;
  });
}

void Worker::scan_rows(const ScanStep& step, int head, int row, int rows, float* state) {
  const int width = buffer(step.out).width, heads = step.heads(), head_dim = width / heads;
  const int group = head / (heads / step.groups);
  const size_t at = static_cast<size_t>(head);
  float steps[kRowsAtOnce], decays[kRowsAtOnce];
  for (int i = 0; i < rows; i++) steps[i] = line(step.dt, row + i)[head];
  stage_.level.scan.time_steps(steps, step.bias[at], step.rates[at], rows, decays);
  const float* x = line(step.x, row);
  stage_.level.scan.scan({
      .state = state,
      .x = x + head * head_dim,
      .b = x + width + group * step.state_size,
      .c = x + width + (step.groups + group) * step.state_size,
      .steps = steps,
      .decays = decays,
      .skip = step.skips[at],
      .out = line(step.out, row) + head * head_dim,
      .rows = rows,
      .head_dim = head_dim,
      .state_size = step.state_size,
      .in_stride = buffer(step.x).width,
      .out_stride = width,
  });
}

}  // namespace llamaclust
