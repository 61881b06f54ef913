#include <cstring>

#include "fibres.h"

namespace shim {

namespace {

constexpr int kRows = 16, kColumns = 8, kBytes = 32;

int16_t byte_of(int32_t word, int n, bool is_unsigned) {
  const uint8_t byte = static_cast<uint8_t>(static_cast<uint32_t>(word) >> 8 * n);
  return is_unsigned ? byte : static_cast<int8_t>(byte);
}

}  // namespace

void multiply_fragments(const Lanes& lanes, int rows, int k, bool a_unsigned) {
  if (lanes.mask != 0xffffffff) fail("a matrix product of a part of a warp");
  Fragments all[32];
  for (int i = 0; i < 32; i++) memcpy(&all[i], lanes.first[i].operands, sizeof all[i]);
  int16_t a[kRows][kBytes]{}, b[kColumns][kBytes]{};
  for (int i = 0; i < k; i++) {
    for (int row = 0; row < rows; row++)
      a[row][i] = byte_of(all[row % 8 * 4 + i % 16 / 4].a[rows / 8 * (i / 16) + row / 8], i % 4, a_unsigned);
    for (int column = 0; column < kColumns; column++)
      b[column][i] = byte_of(all[column * 4 + i % 16 / 4].b[i / 16], i % 4, false);
  }
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < kColumns; column++) {
      int32_t sum = 0;
      for (int i = 0; i < kBytes; i++) sum += a[row][i] * b[column][i];
      all[row % 8 * 4 + column / 2].d[row / 8 * 2 + column % 2] += sum;
    }
  for (int i = 0; i < 32; i++) memcpy(lanes.first[i].result, all[i].d, sizeof all[i].d);
}

}  // namespace shim
