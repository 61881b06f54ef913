// Memory from the operating system: anonymous, or a mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace llamaclust {

class Memory {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;  // Huge pages of x86-64 and of most ARM systems.

  Memory() = default;
  // Allocates zeroed memory, aligned to pages, or to huge pages if it is at least as large as one. The system provides
  // pages when they are first touched. Throws std::bad_alloc if the system refuses.
  explicit Memory(size_t bytes);
  // Maps the first bytes of a file with the same alignment, read-only and shared with every process that maps the file.
  // Reading past the end of a truncated file crashes the process, so map only files that are never truncated. Throws
  // std::bad_alloc if memory is short, std::system_error if the file cannot be mapped (some file systems do not support
  // it).
  static Memory mapped(int descriptor, size_t bytes);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  // Writes 0 to every page of bytes [begin, end), so that the system provides the pages before their first use.
  // Providing a page takes longer than writing it. Call it only while the memory still holds zeros.
  void touch(size_t begin, size_t end) const;

  // Moves small pages into huge ones, if the system has free huge pages and supports the call (Linux 6.1). Without it,
  // a page that was touched while no huge page was free stays small.
  void collapse();

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool is_writable() const { return is_writable_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool is_writable_ = true;
};

// Assigns offsets to consecutive objects, each of which starts on a cache line of its own (64 bytes).
class Layout {
 public:
  // Throws std::bad_alloc for more than 2^60 bytes, before a sum of sizes could overflow.
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

// A fast checksum against damage, not against forgery. It always differs between two memory areas of one size that
// differ in a single 64-bit word, and almost always between others.
uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace llamaclust
