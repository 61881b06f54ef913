// A GPU's threads as fibres of one thread of the CPU: blocks run one after the other, the threads of a block take turns
// wherever they wait for each other; in one launch from the first to the last, in the next one the other way round. A
// deadlock is an error of the launch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace shim {

struct Dimensions {
  unsigned x, y, z;
};

// The place in a kernel's source where a thread waits.
struct Site {
  const char* file;
  int line;
};

// The largest operands and results of a lane in a collective operation of a warp.
inline constexpr int kOperandBytes = 64, kResultBytes = 16;

// Bytes that a kernel has asked for and may not read before it has waited.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

// Sums of products of four warps, which are in their registers when the last of these groups was waited for.
struct Products {
  int32_t* registers;
  std::vector<int32_t> sums;
  int group;
};

struct Fibre {
  enum class State { Runnable, AtBlock, AtBarrier, AtWarp, AtArrival, Ended };
  Dimensions thread;
  int index, lane;
  State state;
  Site site;
  int barrier;          // a named one
  const void* arrival;  // of bulk copies
  uint32_t mask;
  const void* operation;
  alignas(16) uint8_t operands[kOperandBytes];
  alignas(16) uint8_t result[kResultBytes];
  std::vector<Copy> pending;
  std::vector<std::vector<Copy>> committed;
  std::vector<Products> products;
  int groups;  // of products, committed
};

// The lanes of a warp in a collective operation: those in `mask`.
struct Lanes {
  Fibre* first;
  uint32_t mask;
};
using Compute = void (*)(const Lanes& lanes);

struct Grid {
  Dimensions blocks, threads;
};

extern Fibre* current;        // who runs
extern Dimensions block;      // of the block that runs
extern Grid grid;             // of the launch
extern uint64_t block_number; // one higher for each block that ever ran

void wait_for_block(Site site);
// A named barrier opens when so many threads have arrived, waiting or not.
void arrive(int barrier, int threads, bool waits, Site site);
// Waits until every lane in `mask` is here; the last one computes the results of all.
void collective(uint32_t mask, Compute compute, Site site);
// Operands of a lane in a product of bytes by PTX's layout (mma.cuh).
struct Fragments {
  int32_t d[4], a[4], b[2];
};
// d[rows][8] += a[rows][k] b[k][8], bytes of a unsigned or signed, of all lanes of a warp.
void multiply_fragments(const Lanes& lanes, int rows, int k, bool a_unsigned);
// Arrivals of bulk copies, by their place in shared memory: one announcement of bytes in each phase, and so many `others`,
// who arrive with the copies that they requested one by one.
void init_arrival(const void* arrival, int others);
void arrive_with_copies(const void* arrival);
void announce(const void* arrival, size_t bytes);
void request_bulk(const void* arrival, Copy copy);
// Waits for an announcement and makes its copies, if the phase of this parity is not over.
void wait_for_arrival(const void* arrival, int parity, Site site);
// Ends the launch.
[[noreturn]] void fail(const std::string& what);

using Invoke = void (*)(const void* kernel, void** args);
// Runs a whole grid. The error, or nothing.
std::string run_grid(Grid grid, size_t dynamic_shared_bytes, Invoke invoke, const void* kernel, void** args);

// Memory of the block that runs, filled with bytes of ones: NaN, -1.
uint8_t* static_shared(size_t bytes);
uint8_t* dynamic_shared();
size_t dynamic_bytes();

}  // namespace shim
