// Scans of Mamba 2 in the threads: each takes some heads of a sequence, and rows in their order.
#include <algorithm>
#include <cstring>

#include "executor/state_blocks.h"

namespace llamaclust {
namespace {

constexpr int kRowsAtOnce = 16;

}  // namespace

void Worker::execute(const ScanStep& step) {
  const int heads = step.heads();
  share(static_cast<int64_t>(batch().sequences()) * heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      lookahead_.fetch();
      scan_head(step, static_cast<int>(i / heads), static_cast<int>(i % heads));
    }
  });
}

// The head's part of the state is updated where it is stored: its rows go on from block to block.
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
