// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", 2011). Random bits are a
// pure function of a key and a counter, so a draw does not depend on earlier draws.
#pragma once

#include <array>
#include <cstdint>

namespace llamaclust {

using PhiloxCounter = std::array<uint32_t, 4>;
using PhiloxKey = std::array<uint32_t, 2>;

inline PhiloxCounter philox(PhiloxCounter c, PhiloxKey k) {
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c[0];
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    k = {k[0] + 0x9E3779B9, k[1] + 0xBB67AE85};
  }
  return c;
}

// Returns 64 random bits for the token at `position` of one of the request's choices. `purpose` is 0 for sampling and 1
// for XTC.
inline uint64_t random_bits(uint64_t seed, uint32_t choice, uint32_t position, uint32_t purpose = 0) {
  const PhiloxKey key = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  const PhiloxCounter r = philox({position, choice, purpose, 0}, key);
  return uint64_t{r[1]} << 32 | r[0];
}

// Returns the high 64 bits of the product, which are uniform over [0, bound) if `bits` are uniform.
inline int64_t scaled(uint64_t bits, int64_t bound) {
  return static_cast<int64_t>(static_cast<unsigned __int128>(bits) * static_cast<uint64_t>(bound) >> 64);
}

}  // namespace llamaclust
