// Random values and checksums that are the same on every machine, and the lines that are printed.
#pragma once

#include <array>
#include <cstdint>
#include <cstdio>
#include <span>
#include <vector>

#include "level/level.h"

namespace level_bits {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
    z = (z ^ z >> 27) * 0x94d049bb133111eb;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>((bits() >> 33) % static_cast<uint64_t>(n)); }
  // A value of either sign, with a magnitude in [2^(e-4), 2^(e+1)).
  float value(int e = 0) {
    const uint64_t b = bits();
    const uint32_t exponent = static_cast<uint32_t>(127 + e - static_cast<int>(b >> 32 & 0xff) % 5);
    return __builtin_bit_cast(float, static_cast<uint32_t>(b & 0x807fffff) | exponent << 23);
  }
  std::vector<float> values(size_t n, int e = 0) {
    std::vector<float> r(n);
    for (float& x : r) x = value(e);
    return r;
  }

 private:
  uint64_t state_;
};

class Crc {  // CRC-32, as zlib has it
 public:
  template <typename T>
  void add(std::span<const T> data) {
    const auto* p = reinterpret_cast<const uint8_t*>(data.data());
    for (size_t i = 0; i < data.size_bytes(); i++) crc_ = crc_ >> 8 ^ kTable[(crc_ ^ p[i]) & 255];
  }
  template <typename T>
  void add(const std::vector<T>& data) {
    add(std::span<const T>(data));
  }
  template <typename T>
  void add_value(T value) {
    add(std::span<const T>(&value, 1));
  }
  uint32_t value() const { return ~crc_; }

 private:
  static constexpr std::array<uint32_t, 256> kTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; i++) {
      table[i] = i;
      for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (0xedb88320 & -(table[i] & 1));
    }
    return table;
  }();
  uint32_t crc_ = 0xffffffff;
};

inline void print(const char* level, const char* what, const Crc& crc) {
  std::printf("%s %s %08x\n", level, what, crc.value());
}

void print_products(const llamaclust::Level& level);
void print_quantizers(const llamaclust::Level& level);

}  // namespace level_bits
