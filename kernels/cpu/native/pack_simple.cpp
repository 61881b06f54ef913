#include "pack_blocks.h"

namespace llamaclust {

void pack_32_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_group(blocks, 0, body); }
void pack_16_bits(const Blocks& blocks, uint8_t* body, uint8_t*) { put_half(blocks, 0, body); }

void pack_q4_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
}

void pack_q4_1(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 4; g++) put_group(blocks, 4 + 4 * g, body + 64 * g);
  put_half(blocks, 0, tail);
  put_half(blocks, 2, tail + 32);
}

// Quants are stored plus 128.
void pack_q8_0(const Blocks& blocks, uint8_t* body, uint8_t* tail) {
  for (int g = 0; g < 8; g++) put_group(blocks, 2 + 4 * g, body + 64 * g);
  for (int i = 0; i < 512; i++) body[i] ^= 0x80;
  put_half(blocks, 0, tail);
}

}  // namespace llamaclust
