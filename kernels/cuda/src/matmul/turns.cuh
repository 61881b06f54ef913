// Turns that pass from warp to warp of a block.
#pragma once

#include "pieces.cuh"

namespace llamaclust::cuda {
namespace {

#if LLAMACLUST_ARCH >= 900
// Each warp waits for an arrival of its own, to which the previous warp announces 0 bytes.
class Turns {
 public:
  DEVICE Turns(int warp, int lane, uint64_t (&arrivals)[kGemvWarps])
      : mine_(shared_address(&arrivals[warp])), next_(shared_address(&arrivals[(warp + 1) % kGemvWarps])), gives_(lane == 0) {}

  // Called once per block, by one thread. The block must be synchronized afterwards.
  DEVICE void init() const { arrival_init(mine_); }
  DEVICE void wait() {
    arrival_wait(mine_, parity_);
    parity_ ^= 1;
  }
  DEVICE void give() const {
    __syncwarp();  // All lanes have written what they pass on.
    if (gives_) arrival_announce(next_, 0);
  }

 private:
  SharedAddress mine_, next_;
  bool gives_;  // Whether this lane announces.
  int parity_ = 0;
};
#else
// Each warp waits at a named barrier of its own, at which the previous warp arrives.
class Turns {
 public:
  DEVICE Turns(int warp) : warp_(warp) {}

  DEVICE void wait() {
    switch (warp_) {
      case 0: return barrier_wait<0, kThreads>();
      case 1: return barrier_wait<1, kThreads>();
      case 2: return barrier_wait<2, kThreads>();
      default: return barrier_wait<3, kThreads>();
    }
  }
  DEVICE void give() {
    switch (warp_) {
      case 0: return barrier_arrive<1, kThreads>();
      case 1: return barrier_arrive<2, kThreads>();
      case 2: return barrier_arrive<3, kThreads>();
      default: return barrier_arrive<0, kThreads>();
    }
  }

 private:
  static constexpr int kThreads = 2 * kWarp;
  static_assert(kGemvWarps == 4);
  int warp_;
};
#endif

}  // namespace
}  // namespace llamaclust::cuda
