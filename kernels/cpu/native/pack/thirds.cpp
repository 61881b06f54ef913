#include <array>

#include "pack/blocks.h"
#include "pack/grids.h"

namespace llamaclust {
namespace {

// Maps four levels of two bits each to an index of kThirdsPlace (bits 0 to 3) and an index of kThirdsAround (bits 4 to
// 6).
constexpr std::array<uint8_t, 256> kThirds = [] {
  std::array<uint8_t, 256> codes{};
  for (int place = 0; place < 15; place++)
    for (int around = 0; around < 8; around++)
      codes[(kThirdsPlace[place] + kThirdsAround[around]) % 256] = static_cast<uint8_t>(place | around << 4);
  return codes;
}();

}  // namespace

void put_thirds(const std::array<uint32_t, 16>& pairs, int row, uint8_t* lines) {
  for (int half = 0; half < 2; half++, lines += 448) {
    uint32_t places[8] = {}, around[8] = {};
    for (int i = 0; i < 8; i++)
      for (int c = 0; c < 4; c++) {
        const uint32_t code = kThirds[pairs[static_cast<size_t>(8 * half + i)] >> (8 * c) & 255];
        places[i] |= (code & 15) << (8 * c);
        around[i] |= code >> 4 << (8 * c);
      }
    for (int i = 0; i < 4; i++) put_word(places[2 * i] | places[2 * i + 1] << 4, row, lines + 64 * i);
    put_three_bits(around, row, lines + 256);
  }
}

}  // namespace llamaclust
