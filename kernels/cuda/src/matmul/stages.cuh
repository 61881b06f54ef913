// Activations and weights of 256 columns, copied in bulk for a block of products of many rows (compute capability 9.0).
// The block's dynamic shared memory has two or three stages. The last warp to finish a stage requests the next columns
// for it, so a warp waits only for copies, never for other warps.
#pragma once

#include "many_rows.cuh"

namespace llamaclust::cuda {
namespace {

constexpr int kMostStages = 3;
template <class Type>
constexpr int kWeightBytes = kStageSegments<Type> * (Type::kLayout.body_bytes + Type::kLayout.tail_bytes);

// A block's state in static shared memory, to save registers.
template <int most>
struct BlockState {
  uint64_t arrivals[kMostStages];
  uint32_t readers[kMostStages];  // Warps that have finished a stage.
  int32_t of_row[kGroupRows * most];
  Share share;
  int which, block;

  DEVICE Product product(const Products& all) const { return {all, which, block}; }
};

// Blocks of 128 rows have eight warps, others 4 to 16. `scratch` bytes per warp follow the stages.
template <class Type, int most, int scratch>
class Stages {
 public:
  using State = BlockState<most>;

  // Called by all threads of the block together, once the rest of the state is set.
  DEVICE Stages(const Products& all, State& state) : all_(all), state_(state) {
    if (threadIdx.x < kMostStages) {
      arrival_init(arrival(threadIdx.x), all.items == nullptr ? 0 : kWarp);
      state.readers[threadIdx.x] = 0;
      publish_shared();
    }
    __syncthreads();
    const int warp = threadIdx.x / kWarp;
    if (warp < count()) request(warp * kStageSegments<Type>, warp);
  }

  DEVICE static int warps() { return most == 16 ? 8 : blockDim.x / kWarp; }
  DEVICE static uint8_t* scratch_memory() {
    return DYNAMIC_SHARED + (count() * bytes() + threadIdx.x / kWarp * scratch);
  }

  // Waits for the next stage, which stays in place until `release`.
  DEVICE void take() const {
    arrival_wait(arrival(at_), parity_);
    if (all_.items != nullptr) publish_shared();  // Experts' lines arrive by copies that must be published.
  }
  DEVICE Stage<Type, most>& activations() const { return activations(at_); }
  DEVICE const uint8_t* weights() const { return DYNAMIC_SHARED + (at_ * bytes() + weights_at(threadIdx.x / kWarp)); }

  // `first` is the first segment of the stage.
  DEVICE void release(int first) {
    __syncwarp();  // All lanes have read it.
    bool last = threadIdx.x % kWarp == 0 && is_last(shared_address(&state_.readers[at_]), warps());
    if (__shfl_sync(kAllLanes, last ? 1 : 0, 0) != 0) request(first + count() * kStageSegments<Type>, at_);
    if (++at_ < count()) return;
    at_ = 0;
    parity_ ^= 1;
  }

 private:
  DEVICE static int bytes() { return weights_at(warps()); }
  DEVICE static int count() { return dynamic_shared_bytes() >= 3 * bytes() + warps() * scratch ? 3 : 2; }
  DEVICE static int weights_at(int warp) {
    return static_cast<int>(sizeof(Stage<Type, most>)) + warp * kWeightBytes<Type>;
  }
  DEVICE SharedAddress arrival(int stage) const { return shared_address(&state_.arrivals[stage]); }
  DEVICE static Stage<Type, most>& activations(int stage) {
    return *reinterpret_cast<Stage<Type, most>*>(DYNAMIC_SHARED + stage * bytes());
  }

  // Requests a stage, by a warp. A lane copies a group of rows, and the weights of a warp.
  DEVICE void request(int first, int stage) const {
    const int segments = all_.cols / Type::kLayout.segment_cols, lane = threadIdx.x % kWarp;
    if (first >= segments) return;
    const Product p = state_.product(all_);
    constexpr int at_once = kStageSegments<Type>, each = sizeof(Activations<Type>);
    constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
    const Share share = state_.share;
    const int count = segments - first < at_once ? segments - first : at_once, groups = groups_of(share);
    const SharedAddress to = shared_address(DYNAMIC_SHARED + stage * bytes());
    if (lane < warps()) {
      // A tile beyond the last one repeats it, and its results are discarded.
      const int tile = p.block * warps() + lane, last_tile = p.matrix().tile_count() - 1;
      const uint8_t* weights = tile_of(p, share, tile < last_tile ? tile : last_tile);
      const SharedAddress place = to + weights_at(lane);
      if constexpr (kWide<Type>) {
        const Segment segment = segment_of<Type>(weights, first, segments);
        copy_bulk(place, segment.body, body_bytes, arrival(stage));
        copy_bulk(place + body_bytes, segment.tail, tail_bytes, arrival(stage));
      } else {
        copy_bulk(place, weights + static_cast<size_t>(first) * (body_bytes + tail_bytes), count * (body_bytes + tail_bytes),
                  arrival(stage));
      }
    }
    int bytes = warps() * count * (body_bytes + tail_bytes);
    if (p.items == nullptr) {
      bytes += groups * count * each;
      if (lane < groups)
        copy_bulk(to + lane * at_once * each,
                  p.activations + (static_cast<size_t>(share.first / kGroupRows + lane) * segments + first) * each,
                  count * each, arrival(stage));
    } else {
      copy_lines<Type, most>(p, state_.of_row, groups, first, count, activations(stage), lane, kWarp);
      copy_async_arrive(arrival(stage));
    }
    __syncwarp();
    if (lane == 0) arrival_announce(arrival(stage), bytes);
  }

  const Products& all_;
  State& state_;
  int at_ = 0, parity_ = 0;  // The stage that take() returns next, and its parity.
};

template <bool first, class A, class B>
struct ChoiceOf {
  using Type = A;
};
template <class A, class B>
struct ChoiceOf<false, A, B> {
  using Type = B;
};
template <bool first, class A, class B>
using Choice = typename ChoiceOf<first, A, B>::Type;

// Two groups of four warps multiply alternately, so that one adds floats while the other multiplies. Both have the same
// number of turns.
class Alternation {
 public:
  DEVICE explicit Alternation(int group) : mine_(1 + group) {
    if (group == 1) barrier_arrive_at(1, 256);
  }
  DEVICE void begin() const { barrier_wait_at(mine_, 256); }
  DEVICE void end() const { barrier_arrive_at(3 - mine_, 256); }
  // Called after all turns.
  DEVICE void finish() const {
    if (mine_ == 1) barrier_wait_at(1, 256);
  }

 private:
  int mine_;  // Number of a named barrier.
};
struct NoAlternation {
  DEVICE explicit NoAlternation(int) {}
  DEVICE void begin() const {}
  DEVICE void end() const {}
  DEVICE void finish() const {}
};

}  // namespace
}  // namespace llamaclust::cuda
