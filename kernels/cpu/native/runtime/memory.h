// Memory straight from the operating system: its own, or a file's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace llamaclust {

class Memory {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;  // of x86-64, and of most ARM systems

  Memory() = default;
  // Zero, aligned to pages (to huge ones from their size on), and not there until it is touched. std::bad_alloc where
  // the system refuses.
  explicit Memory(size_t bytes);
  // The first bytes of a file, aligned likewise, shared with every process that maps it, and read-only. Reading
  // past the end of a truncated file is a crash: map only files that are never truncated. std::bad_alloc where memory is short, std::system_error
  // where the file cannot be mapped: some file systems cannot.
  static Memory mapped(int descriptor, size_t bytes);
  Memory(Memory&& other) noexcept;
  Memory& operator=(Memory&& other) noexcept;
  ~Memory();

  // Writes zero to every page of bytes [begin, end), so that they are there before they are first used: the system takes
  // longer to give a page than to write it again. Only as long as they are zero.
  void touch(size_t begin, size_t end) const;

  // Moves what is in small pages into huge ones, as far as the system has free ones and can (Linux 6.1): a page that was
  // touched while no huge one was free stays small otherwise.
  void collapse();

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool is_writable() const { return is_writable_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool is_writable_ = true;
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

// A checksum at the speed of memory, against damage and not against forgery: it differs for any two pieces of memory of
// one size that differ in one 64-bit word, and for others all but surely.
uint64_t checksum(const uint8_t* data, size_t bytes);

}  // namespace llamaclust
