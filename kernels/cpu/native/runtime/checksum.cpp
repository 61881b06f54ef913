#include "runtime/checksum.h"

#include <bit>
#include <cstring>

namespace llamaclust {
namespace {

constexpr int kLanes = 8;
// The step of xxHash64. Its factors are odd, so that it can be undone: two states, or two words, never become one. A
// word is multiplied before it comes in: few bits of one and few of the next must not cancel out.
constexpr uint64_t kFirst = 0x9e3779b185ebca87, kSecond = 0xc2b2ae3d27d4eb4f;

uint64_t mixed(uint64_t state, uint64_t word) { return std::rotl(state + word * kSecond, 31) * kFirst; }

struct Lanes {
  uint64_t state[kLanes];

  void add(const uint8_t* line) {
    uint64_t words[kLanes];
    memcpy(words, line, sizeof words);
    for (int i = 0; i < kLanes; i++) state[i] = mixed(state[i], words[i]);
  }
};

}  // namespace

uint64_t checksum(const uint8_t* data, size_t bytes) {
  constexpr size_t kLine = sizeof(Lanes::state);
  Lanes lanes;
  for (int i = 0; i < kLanes; i++) lanes.state[i] = mixed(bytes, static_cast<uint64_t>(i));
  size_t at = 0;
  for (; at + kLine <= bytes; at += kLine) lanes.add(data + at);
  if (at < bytes) {
    uint8_t rest[kLine] = {};
    memcpy(rest, data + at, bytes - at);
    lanes.add(rest);
  }
  uint64_t sum = 0;
  for (uint64_t state : lanes.state) sum = mixed(sum, state);
  sum = (sum ^ sum >> 32) * kFirst;
  return sum ^ sum >> 29;
}

}  // namespace llamaclust
