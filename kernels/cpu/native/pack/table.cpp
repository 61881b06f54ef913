#include "pack/blocks.h"

namespace llamaclust {
namespace {

// File: d, the upper two bits of eight scales, their lower four bits, then nibbles, 32 columns in 16 bytes. The scales
// are 32 too big.
int iq4_xs_scale(const uint8_t* block, int j) {
  const int low = block[4 + j / 2] >> (j % 2 * 4) & 15, high = block[2 + j / 4] >> (j % 4 * 2) & 3;
  return (low | high << 4) - 32;
}

}  // namespace

void pack_iq4_xs(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int i = 0; i < 32; i++) put_group(blocks, 8 + 4 * i, body + 64 * i);
  uint8_t* scales = body + 2048;
  for (int r = 0; r < kTileRows; r++)
    for (int j = 0; j < 8; j++)
      scales[64 * (j / 4) + 4 * r + j % 4] = static_cast<uint8_t>(iq4_xs_scale(blocks.row[r], j));
  put_half(blocks, 0, tail);
}

// File: an exponent byte, then nibbles.
void pack_mxfp4(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 1 + 4 * g, body + 64 * g);
  for (int r = 0; r < kTileRows; r++) tail[r] = blocks.row[r][0];
}

}  // namespace llamaclust
