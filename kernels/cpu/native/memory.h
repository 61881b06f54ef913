// Memory straight from the operating system: zero, aligned to pages, and not there until it is touched.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace llamaclust {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes);  // std::bad_alloc where the system refuses
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// Offsets of things that lie one after another, each on a cache line of its own.
class Layout {
 public:
  // std::bad_alloc before sizes that no machine has could overflow.
  size_t add(size_t bytes) {
    const size_t offset = bytes_;
    if (bytes > kMostBytes || offset > kMostBytes) throw std::bad_alloc();
    bytes_ += (bytes + 63) / 64 * 64;
    return offset;
  }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kMostBytes = size_t{1} << 60;

  size_t bytes_ = 0;
};

}  // namespace llamaclust
