#include "fibres.h"

#include <sys/mman.h>

#include <cstring>
#include <unordered_map>
#include <vector>

#include "faults.h"
#include "runtime/float_mode.h"
#include "switch.h"

namespace shim {

Fibre* current;
Dimensions block;
Grid grid;
uint64_t block_number;

namespace {

constexpr int kMaxThreads = 1024, kWarp = 32, kBarriers = 16;
// Stacks begin at different places of their pages, or all would take turns in a few lines of the cache.
constexpr size_t kStackBytes = 256 << 10, kStackOffsetBytes = 64 * 17, kStackOffsets = 60;
constexpr size_t kStaticSharedBytes = 48 << 10, kMaxSharedBytes = 227 << 10;

Fibre fibres[kMaxThreads];
Context contexts[kMaxThreads], outside;
uint8_t* stacks;
int threads, at_block;
int arrived[kBarriers], expected[kBarriers];
// A barrier of bulk copies: its phase, the bytes announced in this phase, and the copies that were requested.
struct Arrival {
  int others = 0, left = 0;  // of these, in this phase
  int phase = 0;
  bool is_announced = false;
  size_t announced = 0, requested = 0;
  std::vector<Copy> copies;
};
std::unordered_map<const void*, Arrival> arrivals;
bool backwards;  // every other launch of a kernel: who relies on an order gets it wrong
std::unordered_map<const void*, bool> was_backwards;
std::string error;

struct Kernel {
  Invoke invoke;
  const void* function;
  void** args;
} kernel;

// The end of both is the end of a page, and no page follows.
uint8_t *static_memory, *dynamic_end, *dynamic_begin;
size_t static_used, dynamic_used;

std::string at(Site site) {
  const char* name = strrchr(site.file, '/');
  return std::string(name ? name + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) { return a.line == b.line && (a.file == b.file || strcmp(a.file, b.file) == 0); }

uint8_t* pages_before_a_gap(size_t bytes) {
  uint8_t* p = static_cast<uint8_t*>(
      mmap(nullptr, bytes + kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  mprotect(p + bytes, kPageBytes, PROT_NONE);
  return p;
}

void take_memory() {
  if (stacks != nullptr) return;
  stacks = pages_before_a_gap(kMaxThreads * kStackBytes);
  for (int i = 0; i < kMaxThreads; i++) mprotect(stacks + i * kStackBytes, kPageBytes, PROT_NONE);  // the end of a stack
  static_memory = pages_before_a_gap(kStaticSharedBytes);
  dynamic_end = pages_before_a_gap(256 << 10) + (256 << 10);
}

// Describes a deadlock: where threads wait, and how many have ended.
std::string stuck() {
  int ended = 0, waiting = 0, in_warps = 0;
  const Fibre *in_block = nullptr, *in_warp = nullptr, *at_barrier = nullptr, *at_arrival = nullptr;
  for (int i = 0; i < threads; i++) {
    const Fibre& fibre = fibres[i];
    ended += fibre.state == Fibre::State::Ended;
    if (fibre.state == Fibre::State::AtBlock) waiting++, in_block = &fibre;
    if (fibre.state == Fibre::State::AtWarp) in_warps++, in_warp = &fibre;
    if (fibre.state == Fibre::State::AtBarrier) at_barrier = &fibre;
    if (fibre.state == Fibre::State::AtArrival) at_arrival = &fibre;
  }
  std::string what = "threads wait for ever:";
  if (in_block) what += " " + std::to_string(waiting) + " at __syncthreads (" + at(in_block->site) + ")";
  if (in_warp)
    what += std::string(in_block ? "," : "") + " " + std::to_string(in_warps) + " for their warp (thread " +
            std::to_string(in_warp->index) + " at " + at(in_warp->site) + ")";
  if (at_barrier) what += " thread " + std::to_string(at_barrier->index) + " at a barrier (" + at(at_barrier->site) + ")";
  if (at_arrival)
    what += " thread " + std::to_string(at_arrival->index) + " for copies that none requests (" + at(at_arrival->site) + ")";
  return what + "; " + std::to_string(ended) + " of " + std::to_string(threads) + " have ended";
}

// Lets the next one run that can, which may be who calls.
void go_on() {
  Fibre& self = *current;
  for (int step = 1; step <= threads; step++) {
    Fibre& next = fibres[(self.index + (backwards ? threads - step : step)) % threads];
    if (next.state != Fibre::State::Runnable) continue;
    if (&next == &self) return;
    current = &next;
    switch_to(contexts[self.index], contexts[next.index]);
    return;
  }
  for (int i = 0; i < threads; i++)
    if (fibres[i].state != Fibre::State::Ended) fail(stuck());
  for (int i = 0; i < kBarriers; i++)
    if (arrived[i] != 0) fail("no warp waits at named barrier " + std::to_string(i) + ", where others arrived");
  for (const auto& [place, arrival] : arrivals)
    if (!arrival.copies.empty()) fail("a block ends while bulk copies are under way");
  switch_to(contexts[self.index], outside);
}

void run_thread() {
  kernel.invoke(kernel.function, kernel.args);
  current->state = Fibre::State::Ended;
  go_on();
}

void run_block(size_t dynamic_shared_bytes) {
  block_number++;
  static_used = 0;
  dynamic_used = dynamic_shared_bytes;
  arrivals.clear();
  dynamic_begin = dynamic_end - (dynamic_shared_bytes + 15) / 16 * 16;
  memset(dynamic_begin, 0xff, static_cast<size_t>(dynamic_end - dynamic_begin));
  at_block = 0;
  memset(arrived, 0, sizeof arrived);
  for (int i = 0; i < threads; i++) {
    const unsigned n = static_cast<unsigned>(i), x = grid.threads.x, y = grid.threads.y;
    Fibre& fibre = fibres[i];
    fibre.thread = {n % x, n / x % y, n / (x * y)};
    fibre.index = i;
    fibre.lane = i % kWarp;
    fibre.state = Fibre::State::Runnable;
    fibre.pending.clear();
    fibre.committed.clear();
    fibre.products.clear();
    fibre.groups = 0;
    prepare(contexts[i], stacks + i * kStackBytes, kStackBytes - n % kStackOffsets * kStackOffsetBytes, run_thread);
  }
  current = &fibres[backwards ? threads - 1 : 0];
  switch_to(outside, contexts[current->index]);
}

std::string where() {
  const auto text = [](Dimensions d) {
    return std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z);
  };
  return "block " + text(block) + ", thread " + text(current->thread) + ": ";
}

}  // namespace

void fail(const std::string& what) {
  error = where() + what;
  switch_to(contexts[current->index], outside);
  __builtin_unreachable();
}

void wait_for_block(Site site) {
  current->site = site;
  current->state = Fibre::State::AtBlock;
  if (++at_block < threads) return go_on();
  at_block = 0;
  for (int i = 0; i < threads; i++) {
    if (!same(fibres[i].site, site))
      fail("__syncthreads at different places: " + at(fibres[i].site) + " and " + at(site));
    fibres[i].state = Fibre::State::Runnable;
  }
}

void collective(uint32_t mask, Compute compute, Site site) {
  Fibre* first = &fibres[current->index - current->lane];
  const int lanes = threads - first->index < kWarp ? threads - first->index : kWarp;
  if (lanes < kWarp) mask &= (1u << lanes) - 1;
  if ((mask >> current->lane & 1) == 0) fail("not in the mask of its own operation (" + at(site) + ")");
  current->site = site;
  current->mask = mask;
  current->operation = reinterpret_cast<const void*>(compute);
  current->state = Fibre::State::AtWarp;
  for (int i = 0; i < lanes; i++) {
    const Fibre& other = first[i];
    if ((mask >> i & 1) == 0) continue;
    if (other.state != Fibre::State::AtWarp) return go_on();
    if (other.mask != mask || other.operation != current->operation || !same(other.site, site))
      fail("lanes of a warp at different places: " + at(other.site) + " and " + at(site));
  }
  compute({first, mask});
  for (int i = 0; i < lanes; i++)
    if (mask >> i & 1) first[i].state = Fibre::State::Runnable;
}

void arrive(int barrier, int of, bool waits, Site site) {
  collective(0xffffffff, [](const Lanes&) {}, site);  // a whole warp at one place
  if (barrier < 0 || barrier >= kBarriers) fail("no named barrier: " + std::to_string(barrier) + " (" + at(site) + ")");
  if (of % kWarp != 0 || (arrived[barrier] > 0 && expected[barrier] != of))
    fail("a barrier of different numbers of threads, or of no whole warps (" + at(site) + ")");
  expected[barrier] = of;
  current->site = site;
  current->barrier = barrier;
  if (waits) current->state = Fibre::State::AtBarrier;
  if (++arrived[barrier] == of) {
    arrived[barrier] = 0;
    for (int i = 0; i < threads; i++)
      if (fibres[i].state == Fibre::State::AtBarrier && fibres[i].barrier == barrier)
        fibres[i].state = Fibre::State::Runnable;
  }
  if (current->state != Fibre::State::Runnable) go_on();
}

namespace {

Arrival& arrival_at(const void* place) {
  const auto found = arrivals.find(place);
  if (found == arrivals.end()) fail("an arrival that is not initialized");
  return found->second;
}

void wake(const void* place) {
  for (int i = 0; i < threads; i++)
    if (fibres[i].state == Fibre::State::AtArrival && fibres[i].arrival == place) fibres[i].state = Fibre::State::Runnable;
}

}  // namespace

void init_arrival(const void* place, int others) {
  if (reinterpret_cast<uintptr_t>(place) % 8 != 0) fail("an arrival that is not aligned to 8 bytes");
  arrivals[place] = {others, others};
}

void arrive_with_copies(const void* place) {
  Arrival& arrival = arrival_at(place);
  if (arrival.left-- == 0) fail("more threads arrive with copies than were said");
  for (const Copy& copy : current->pending) arrival.copies.push_back(copy);
  current->pending.clear();
  wake(place);
}

void announce(const void* place, size_t bytes) {
  Arrival& arrival = arrival_at(place);
  if (arrival.is_announced) fail("bulk copies are announced again before they were waited for");
  arrival.is_announced = true;
  arrival.announced = bytes;
  wake(place);
}

// Overwrites the target at once, so that a thread that still reads it, or does not wait, gets a wrong result.
void request_bulk(const void* place, Copy copy) {
  Arrival& arrival = arrival_at(place);
  if ((reinterpret_cast<uintptr_t>(copy.to) | reinterpret_cast<uintptr_t>(copy.from) | copy.bytes) % 16 != 0)
    fail("a bulk copy that is not aligned to 16 bytes");
  memset(copy.to, 0xff, copy.bytes);
  arrival.copies.push_back(copy);
  arrival.requested += copy.bytes;
}

void wait_for_arrival(const void* place, int parity, Site site) {
  Arrival& arrival = arrival_at(place);
  while (arrival.phase % 2 == parity && (!arrival.is_announced || arrival.left > 0)) {
    current->site = site;
    current->arrival = place;
    current->state = Fibre::State::AtArrival;
    go_on();
  }
  if (arrival.phase % 2 != parity) return;
  if (arrival.requested != arrival.announced)
    fail("bulk copies of " + std::to_string(arrival.requested) + " bytes, announced as " + std::to_string(arrival.announced));
  for (const Copy& copy : arrival.copies) memcpy(copy.to, copy.from, copy.bytes);
  arrival = {arrival.others, arrival.others, arrival.phase + 1, false, 0, 0, {}};
}

uint8_t* static_shared(size_t bytes) {
  uint8_t* p = static_memory + static_used;
  static_used += (bytes + 15) / 16 * 16;
  if (static_used > kStaticSharedBytes) fail("more than 48 KiB of static shared memory");
  memset(p, 0xff, bytes);
  return p;
}

uint8_t* dynamic_shared() { return dynamic_begin; }
size_t dynamic_bytes() { return dynamic_used; }

std::string run_grid(Grid whole, size_t dynamic_shared_bytes, Invoke invoke, const void* function, void** args) {
  const llamaclust::FloatMode mode;
  take_memory();
  grid = whole;
  threads = static_cast<int>(grid.threads.x * grid.threads.y * grid.threads.z);
  if (threads < 1 || threads > kMaxThreads) return "a block of " + std::to_string(threads) + " threads";
  if (dynamic_shared_bytes > kMaxSharedBytes) return "more shared memory than any card has";
  kernel = {invoke, function, args};
  error.clear();
  bool& before = was_backwards[function];
  backwards = before = !before;
  const Faults faults;
  const uint64_t x = grid.blocks.x, y = grid.blocks.y, blocks = x * y * grid.blocks.z;
  for (uint64_t i = 0; i < blocks && error.empty(); i++) {
    const uint64_t n = backwards ? blocks - 1 - i : i;
    block = {static_cast<unsigned>(n % x), static_cast<unsigned>(n / x % y), static_cast<unsigned>(n / x / y)};
    const char* fault = faults.run([&] { run_block(dynamic_shared_bytes); });
    if (fault != nullptr) error = where() + fault;
  }
  return error;
}

}  // namespace shim
