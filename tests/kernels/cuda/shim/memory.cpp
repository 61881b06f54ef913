// Memory of the device: a buffer ends where its pages end, with a wide gap before and after them. What is between the
// buffer and the begin of its pages, and what makes its bytes a multiple of 16, is checked.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>

namespace {

constexpr uint8_t kGuard = 0xa5;
constexpr size_t kGapBytes = 1 << 20;

struct Allocation {
  uint8_t* pages;
  size_t before, bytes, whole;  // of the pages between the gaps: guard, data, all
};

std::map<uint8_t*, Allocation>& allocations() {
  static std::map<uint8_t*, Allocation> all;
  return all;
}

size_t page_bytes() {
  static const size_t bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

bool is_guard(const uint8_t* p, size_t bytes) {
  return bytes == 0 || (p[0] == kGuard && memcmp(p, p + 1, bytes - 1) == 0);
}

}  // namespace

extern "C" {

uint8_t* shim_allocate(size_t bytes) {
  const size_t page = page_bytes(), data = (bytes + 15) / 16 * 16, whole = (data + page - 1) / page * page;
  void* mapped = mmap(nullptr, whole + 2 * kGapBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  uint8_t *pages = static_cast<uint8_t*>(mapped) + kGapBytes, *begin = pages + whole - data;
  if (whole > 0) mprotect(pages, whole, PROT_READ | PROT_WRITE);
  memset(pages, kGuard, whole);
  memset(begin, 0xff, bytes);
  allocations()[begin] = {pages, whole - data, bytes, whole};
  return begin;
}

void shim_free(uint8_t* begin) {
  const Allocation one = allocations().at(begin);
  munmap(one.pages - kGapBytes, one.whole + 2 * kGapBytes);
  allocations().erase(begin);
}

// Returns true if bytes beside a buffer were written.
bool shim_damaged() {
  for (const auto& [begin, one] : allocations())
    if (!is_guard(one.pages, one.before) || !is_guard(begin + one.bytes, one.whole - one.before - one.bytes)) return true;
  return false;
}
}
