#include "runtime/memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace llamaclust {
namespace {

constexpr size_t kHugePage = Memory::kHugePage;

[[noreturn]] void refuse(int error, int flags) {
  if (error == ENOMEM || (flags & MAP_ANONYMOUS) != 0) throw std::bad_alloc();
  throw std::system_error(error, std::generic_category());
}

void* map(size_t bytes, int protection, int flags, int descriptor) {
  void* data = mmap(nullptr, bytes, protection, flags, descriptor, 0);
  if (data == MAP_FAILED) refuse(errno, flags);
  return data;
}

// Maps memory at an address aligned to huge pages if it is at least as large as one. Otherwise the system could not use
// huge pages at its ends.
uint8_t* map_aligned(size_t bytes, int protection, int flags, int descriptor) {
  if (bytes < kHugePage) return static_cast<uint8_t*>(map(bytes, protection, flags, descriptor));
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), whole = (bytes + page - 1) / page * page;
  auto* room = static_cast<uint8_t*>(map(whole + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1));
  const size_t before = -reinterpret_cast<uintptr_t>(room) % kHugePage;
  if (before != 0) munmap(room, before);
  munmap(room + before + whole, kHugePage - before);
  void* data = mmap(room + before, bytes, protection, flags | MAP_FIXED, descriptor, 0);
  if (data == MAP_FAILED) {
    const int error = errno;
    munmap(room + before, whole);
    refuse(error, flags);
  }
  return static_cast<uint8_t*>(data);
}

constexpr int kLanes = 8;
// The mixing step of xxHash64. Both factors are odd, so the step is invertible: two different states or words never
// give the same result. The word is multiplied before it is added, so that bit differences of successive words do not
// cancel each other.
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

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (bytes == 0) return;
  if (bytes > SIZE_MAX / 2) throw std::bad_alloc();
  data_ = map_aligned(bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  // Weights are read some 6 % faster from huge pages. The call fails harmlessly on systems without them.
  madvise(data_, bytes, MADV_HUGEPAGE);
}

Memory Memory::mapped(int descriptor, size_t bytes) {
  Memory memory;
  memory.is_writable_ = false;
  if (bytes == 0) return memory;
  // Fails here if the file cannot be mapped. A failure of the mapping over reserved address space could leave a hole,
  // which a mapping of another thread may fill before the reserved space is released.
  munmap(map(1, PROT_READ, MAP_SHARED, descriptor), 1);
  memory.data_ = map_aligned(bytes, PROT_READ, MAP_SHARED, descriptor);
  memory.bytes_ = bytes;
  // Pages that are not yet in the page cache are read into huge pages.
  madvise(memory.data_, bytes, MADV_HUGEPAGE);
  return memory;
}

Memory::Memory(Memory&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)),
      is_writable_(other.is_writable_) {}

Memory& Memory::operator=(Memory&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(is_writable_, other.is_writable_);
  return *this;
}

Memory::~Memory() {
  if (data_ != nullptr) munmap(data_, bytes_);
}

void Memory::touch(size_t begin, size_t end) const {
  constexpr size_t kSmallPage = 4096;
  volatile uint8_t* data = data_;
  for (size_t at = begin; at < end; at += kSmallPage) data[at] = 0;
}

void Memory::collapse() {
#ifndef MADV_COLLAPSE
  constexpr int MADV_COLLAPSE = 25;  // The kernel supports it, but older headers lack it.
#endif
  madvise(data_, bytes_ / kHugePage * kHugePage, MADV_COLLAPSE);  // Older systems refuse the call, which is harmless.
}

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
