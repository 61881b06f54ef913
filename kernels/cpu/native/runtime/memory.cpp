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

// Maps what begins on a huge page if it is as large as one: otherwise the system could use none at its ends.
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
// The step of xxHash64. Its factors are odd, so that it can be undone: two states, or two words, never become one. A
// word is multiplied before it comes in: few bits of one and few of the next must not cancel out.
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
  madvise(data_, bytes, MADV_HUGEPAGE);  // weights stream some 6 % faster; a system without huge pages refuses, no matter
}

Memory Memory::mapped(int descriptor, size_t bytes) {
  Memory memory;
  memory.is_writable_ = false;
  if (bytes == 0) return memory;
  // A file that cannot be mapped is refused here. Refused over reserved room, it could leave a hole there, which the map
  // of another thread may take before the room is given back.
  munmap(map(1, PROT_READ, MAP_SHARED, descriptor), 1);
  memory.data_ = map_aligned(bytes, PROT_READ, MAP_SHARED, descriptor);
  memory.bytes_ = bytes;
  madvise(memory.data_, bytes, MADV_HUGEPAGE);  // pages that are not in the page cache yet are read into huge pages
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
  constexpr int MADV_COLLAPSE = 25;  // of headers older than the kernel
#endif
  madvise(data_, bytes_ / kHugePage * kHugePage, MADV_COLLAPSE);  // older systems refuse, no matter
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
