// The gated delta rule, divided among the threads. Each computes some value channels of a head of a sequence, row after
// row.
#include <algorithm>
#include <cstring>

#include "executor/state_blocks.h"

namespace llamaclust {
namespace {

// A tile [keys][channels] of a head's state [keys][values], copied from KV memory for the computation.
struct StateTile {
  StateTile(int keys, int values, int channels) : keys(keys), values(values), channels(channels) {}

  const int keys, values, channels;
  alignas(64) float numbers[kMaxKeyChannels * kDeltaChannels];

  // `part` is null at the start of a sequence.
  void load(const float* part) {
    if (part == nullptr) return void(std::fill_n(numbers, keys * channels, 0.0f));
    for (int key = 0; key < keys; key++)
      memcpy(numbers + key * channels, part + static_cast<ptrdiff_t>(key) * values, row_bytes());
  }
  void store(float* part) const {
    for (int key = 0; key < keys; key++)
      memcpy(part + static_cast<ptrdiff_t>(key) * values, numbers + key * channels, row_bytes());
  }

 private:
  size_t row_bytes() const { return static_cast<size_t>(channels) * sizeof(float); }
};

}  // namespace

void Worker::execute(const DeltaRuleStep& step) {
  const int width = buffer(step.q).width, keys = width / step.key_heads, values = buffer(step.v).width / step.heads;
  const bool per_key = buffer(step.decay).width != step.heads;
  const int64_t parts = (values + kDeltaChannels - 1) / kDeltaChannels, tasks = step.heads * parts;
  share(batch().sequences() * tasks, 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) {
      lookahead_.fetch();
      const StateBlocks blocks(*this, step.layer, static_cast<int>(i / tasks));
      const int head = static_cast<int>(i % tasks / parts), start = static_cast<int>(i % parts) * kDeltaChannels;
      const int key_head = step.tiled ? head % step.key_heads : head / (step.heads / step.key_heads);
      const ptrdiff_t place = static_cast<ptrdiff_t>(head) * keys * values + start;
      StateTile tile(keys, values, std::min(kDeltaChannels, values - start));
      const float* before = blocks.before();
      tile.load(before == nullptr ? nullptr : before + place);
      int row = blocks.begin;
      blocks.each_end([&](int last, float* state) {
        const int key = key_head * keys, value = head * values + start;
        stage_.level.state.delta_rule({
            .rows = last + 1 - row,
            .keys = keys,
            .channels = tile.channels,
            .state = tile.numbers,
            .q = line(step.q, row) + key,
            .k = line(step.k, row) + key,
            .v = line(step.v, row) + value,
            .decay = line(step.decay, row) + (per_key ? head * keys : head),
            .beta = line(step.beta, row) + head,
            .out = line(step.out, row) + value,
            .key_width = width,
            .value_width = buffer(step.v).width,
            .decay_width = buffer(step.decay).width,
            .beta_width = step.heads,
            .per_key = per_key,
        });
        tile.store(state + place);
        row = last + 1;
      });
    }
  });
}

}  // namespace llamaclust
