// Messages of the hot path from standard input, read and answered under the compiler's search for bad accesses to
// memory. A record: kind u8, size u32, bytes. Prints how many were read and how many refused.
#include <cstdio>
#include <cstring>
#include <iterator>
#include <string>

#include "frames/microbatch_frame.h"
#include "frames/result.h"
#include "frames/sampling_inputs.h"

using namespace llamaclust;

namespace {

enum Kind : uint8_t { kFrame, kHiddenFrame, kStatefulFrame, kInputs, kTokens };

// The limits of tests/support/wire/frame_reader.py.
FrameLimits limits_of(uint8_t kind) {
  const bool is_stateful = kind == kStatefulFrame;
  const size_t width = kind == kHiddenFrame ? 3 : 0;
  const int32_t window = is_stateful ? 16 : 0, states = is_stateful ? 30 : 0;
  return {"ab12", 12, 5, 4, 96, 40, 300, window, 9, states, 3, width, 2, 3, 255, 65536, 1 << 24, 32, 1e4f, 1 << 23, 1 << 14};
}

const InputsBounds& bounds() {
  static const InputsBounds found = [] {
    InputsBounds made{8192, 1 << 20, 1 << 20, 20, 1024, 64, 64, 1 << 20, 1 << 27, 1e3, 1e9, {}, {}};
    made.params.fill({-1e3, 1e3});
    made.chain.fill({-1e3, 1e3});
    return made;
  }();
  return found;
}

// Handles a frame as a stage does. The bytes that it sends on fill their memory exactly.
void answer(Bytes data, MicrobatchFrame& frame) {
  for (const Dependency& dependency : std::vector<Dependency>(frame.dependencies))
    fill_tokens(frame, dependency.number, {7, 8, 9}, 300);
  const std::string hidden(frame.positions.size() * 12, '\1');
  const Bytes body(reinterpret_cast<const uint8_t*>(hidden.data()), hidden.size());
  const FollowingFrame next{data, frame, Timing{1, 2, 3, frame.positions.size()}, body};
  std::vector<uint8_t> out(next.bytes());
  next.write(out.data());
  const std::vector<RowAnswer> rows(frame.output_rows.size());
  const std::string failure;
  StageResult{frame, Timing{1, 2, 3, 4}, rows, failure, body, 5}.bytes();
}

void draw(SamplingTasks& tasks, const MicrobatchFrame& frame) {
  std::vector<size_t> places;
  for (size_t row = 0; row < tasks.rows.size(); row++)
    if (!tasks.rows[row].scored) places.push_back(row);
  tasks.drafts(places, 3);
  tasks.second_draws(places, std::vector<std::vector<uint32_t>>(places.size(), {1u}));
  tasks.complete(frame);
}

}  // namespace

int main() {
  MicrobatchFrame last;
  size_t read = 0, refused = 0;
  uint8_t kind;
  uint32_t size;
  while (std::fread(&kind, 1, 1, stdin) == 1 && std::fread(&size, sizeof size, 1, stdin) == 1) {
    const std::vector<uint8_t> bytes = [&] {
      std::vector<uint8_t> exact(size);
      if (size > 0 && std::fread(exact.data(), size, 1, stdin) != 1) exact.clear();
      return exact;
    }();
    try {
      if (kind == kInputs) {
        SamplingTasks tasks = read_inputs(bytes, bounds());
        read++;
        draw(tasks, last);
      } else if (kind == kTokens) {
        read_sampled_tokens(bytes, 8192, 1 << 20);
        read++;
      } else {
        last = read_frame(bytes, limits_of(kind));
        read++;
        answer(bytes, last);
      }
    } catch (const ProtocolViolation&) {
      refused++;
    }
  }
  std::printf("%zu %zu\n", read, refused);
}
