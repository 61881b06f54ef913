// Products of up to eight rows with float weights that are copied in bulk (from compute capability 9.0).
//
// A team is one warp or two of a block, and computes tile after tile. Stages of a tile's columns, and of the next
// tile's, are copied to a ring in shared memory; the first copies start before earlier kernels have finished. A lane
// has one row of weights, and one or two of its warp's rows of activations. Limited by memory; or, if every tile has a
// team of its own, by the latency of K dependent multiply-adds. Nothing else may delay these, so a lane reads values of
// the next columns before it adds.
#pragma once

#include "float_types.cuh"
#include "rows.cuh"
#include "simd/dot.h"

#if LLAMACLUST_ARCH >= 900
namespace llamaclust::cuda {
namespace {

constexpr int kArrivalBytes = 8, kStageBytes = 8192;
template <class Type>
constexpr int kStageColumns = kStageBytes / kColumnBytes<Type>;
// Floats of a row of activations. With this padding, adjacent rows start in different banks.
template <class Type>
constexpr int kRowStride = kStageColumns<Type> + 4;

// The place of a thread in blocks of (kWarp * warps of a team, teams) threads.
struct TeamPlace {
  int warp, warps, lane;
  int first_tile, step;  // The team's tiles are first_tile, first_tile + step, ...
};

// Shared memory of a team: its stages; the activations of each of its warps (two stages of two rows for each warp of
// the team); and two arrivals for each stage, for when it is full and for when the second warp has read it.
template <class Type>
constexpr int kActivationBytes = 2 * 2 * 4 * kRowStride<Type>;

// The weights of a team. Lane 0 of its first warp requests stages.
template <class Type>
class TeamWeights {
 public:
  DEVICE TeamWeights(const Products& all, const TeamPlace& at, uint8_t* memory, int team_bytes)
      : all_(all), requests_(at.warp == 0 && at.lane == 0), is_second_(at.warp == 1 && at.lane == 0), warps_(at.warps),
        stages_((team_bytes - at.warps * at.warps * kActivationBytes<Type>) / (kStageBytes + 2 * kArrivalBytes)),
        step_(at.step), memory_(memory), to_(shared_address(memory)),
        arrivals_(to_ + (team_bytes - stages_ * 2 * kArrivalBytes)), next_tile_(at.first_tile) {
    if (!requests_) return;
    NO_UNROLL for (int i = 0; i < 2 * stages_; i++) arrival_init(arrivals_ + kArrivalBytes * i);
    publish_shared();
  }

  DEVICE float* activations() const { return reinterpret_cast<float*>(memory_ + stages_ * kStageBytes); }

  // Requests the first stages of this expert's matrices (0 without experts).
  DEVICE void start(int expert) {
    if (!requests_) return;
    expert_ = expert;
    find_tile();
    NO_UNROLL for (int i = 0; i < stages_; i++) request(i);
  }

  // Waits for the next stage. It stays in place until `release`, which requests another one instead.
  DEVICE const uint8_t* take() const {
    arrival_wait(full(at_), parity_);
    return memory_ + at_ * kStageBytes;
  }
  // Called once all lanes of the warp have read the stage.
  DEVICE void release() {
    if (is_second_) arrival_announce(read(at_), 0);
    if (requests_ && next_tile_ < all_.tile_count()) {
      if (warps_ == 2) arrival_wait(read(at_), parity_);
      request(at_);
    }
    if (++at_ < stages_) return;
    at_ = 0;
    parity_ ^= 1;
  }
  // Waits for the requested copies if nothing was taken. No copy may be in flight when the block ends.
  DEVICE void drop() const {
    NO_UNROLL for (int i = 0; i < requested_; i++) arrival_wait(full(i), 0);
  }

 private:
  DEVICE SharedAddress full(int stage) const { return arrivals_ + 2 * kArrivalBytes * stage; }
  DEVICE SharedAddress read(int stage) const { return full(stage) + kArrivalBytes; }

  DEVICE void find_tile() {
    if (next_tile_ >= all_.tile_count()) return;
    const Product p = product_of(all_, 1, next_tile_);
    from_ = tile_of(p, {expert_, 0, 0}, p.block);
    left_ = all_.cols * kColumnBytes<Type>;
  }

  DEVICE void request(int stage) {
    if (next_tile_ >= all_.tile_count()) return;
    const int bytes = left_ < kStageBytes ? left_ : kStageBytes;
    arrival_announce(full(stage), bytes);
    copy_bulk(to_ + stage * kStageBytes, from_, bytes, full(stage));
    requested_++;
    from_ += bytes;
    left_ -= bytes;
    if (left_ > 0) return;
    next_tile_ += step_;
    find_tile();
  }

  const Products& all_;
  bool requests_, is_second_;  // Roles of this lane.
  int warps_, stages_, step_;
  uint8_t* memory_;
  SharedAddress to_, arrivals_;
  int at_ = 0, parity_ = 0;  // The stage that take() returns next, and its parity.
  // State of the requesting lane: the rest of a tile.
  int next_tile_, expert_ = 0, left_ = 0, requested_ = 0;
  const uint8_t* from_ = nullptr;
};

// Rows of activations of a warp, up to 2 * `outputs`. They are loaded in stages of columns, with the next stage in
// flight.
template <class Type, int outputs>
class WarpActivations {
 public:
  // Parts of a stage, each of 32 columns of a row; as many as there are `Columns` in the stage.
  static constexpr int kParts = 2 * outputs * kStageColumns<Type> / kWarp;

  DEVICE WarpActivations(const Products& all, const Share& share, const TeamPlace& at, float* memory)
      : cols_(all.cols), lane_(at.lane), memory_(memory + at.warp * at.warps * (kActivationBytes<Type> / 4)),
        to_(shared_address(memory_ + at.lane)) {
    const int first = 2 * outputs * at.warp, left = share.n - first;
    there_ = left < 1 ? 1 : left;
    const auto* x = reinterpret_cast<const float*>(all.activations);
    UNROLL for (int i = 0; i < 2 * outputs; i++)
      from_[i] = next_[i] = x + static_cast<size_t>(activation_row(all, share, first + i)) * all.cols + at.lane;
    left_ = cols_ - lane_;
    request(0, kParts);
  }

  // Waits for the next stage. Row i of the warp starts at i * kRowStride.
  DEVICE const float* take() {
    copy_async_commit();
    copy_async_wait<0>();
    __syncwarp();
    const float* taken = memory_ + at_ * kBufferFloats;
    at_ ^= 1;
    column_ = column_ + kStageColumns<Type> < cols_ ? column_ + kStageColumns<Type> : 0;
    left_ = cols_ - column_ - lane_;
    UNROLL for (int i = 0; i < 2 * outputs; i++) next_[i] = from_[i] + column_;
    return taken;
  }
  // Requests parts [begin, end) of the stage after the one that was taken.
  DEVICE void request(int begin, int end) const {
    const SharedAddress to = to_ + at_ * (4 * kBufferFloats);
    UNROLL for (int part = begin; part < end; part++) {
      const int i = part % (2 * outputs), k = part / (2 * outputs) * kWarp;
      if (i < there_ && k < left_) copy_async_4(to + 4 * (i * kRowStride<Type> + k), next_[i] + k);
    }
  }
  // Offset of the lane's row i of activations. Rows beyond the end repeat the last one.
  DEVICE int row(int i) const {
    const int row = lane_ / 16 * outputs + i;
    return (row < there_ ? row : there_ - 1) * kRowStride<Type>;
  }

 private:
  static constexpr int kBufferFloats = 2 * outputs * kRowStride<Type>;

  int cols_, lane_, there_;
  float* memory_;
  SharedAddress to_;  // Address of the lane.
  const float* from_[2 * outputs];
  // The stage to request: its memory, its first column, the columns left there, and its source.
  int at_ = 0, column_ = 0, left_;
  const float* next_[2 * outputs];
};

// Some columns of a lane's row of weights and rows of activations. Weights are widened when they are added, so that the
// conversions are spread between additions.
template <class Type, int outputs>
struct Columns {
  using Stored = typename Type::Stored;
  static constexpr int kCount = 16 / outputs;
  Stored w[kCount];
  float x[outputs][kCount];

  DEVICE void load(const uint8_t* weights, const float* const (&rows)[outputs], int k) {
    UNROLL for (int i = 0; i < kCount; i++)
      w[i] = *reinterpret_cast<const Stored*>(weights + (k + i) * kColumnBytes<Type>);
    UNROLL for (int n = 0; n < outputs; n++) load_fours(rows[n] + k, x[n]);
  }
  DEVICE void add_to(float (&totals)[outputs]) const {
    UNROLL for (int i = 0; i < kCount; i++) UNROLL for (int n = 0; n < outputs; n++)
      totals[n] = fma(Type::widened(w[i]), x[n][i], totals[n]);
  }
};

// Adds a stage, whole or the rest of a tile, while the activations of the next stage are requested.
template <class Type, int outputs>
DEVICE void add_stage(const uint8_t* weights, const float* const (&rows)[outputs], int columns,
                      const WarpActivations<Type, outputs>& next, float (&totals)[outputs]) {
  using Some = Columns<Type, outputs>;
  constexpr int kCount = Some::kCount;
  if (columns == kStageColumns<Type>) {
    Some some[2];
    some[0].load(weights, rows, 0);
    UNROLL for (int i = 0; i < next.kParts; i++) {
      if (i < next.kParts / 2) next.request(2 * i, 2 * i + 2);
      if ((i + 1) * kCount < kStageColumns<Type>) some[(i + 1) % 2].load(weights, rows, (i + 1) * kCount);
      some[i % 2].add_to(totals);
    }
    return;
  }
  next.request(0, next.kParts);
  int k = 0;
  NO_UNROLL for (; k + kCount <= columns; k += kCount) {
    Some some;
    some.load(weights, rows, k);
    some.add_to(totals);
  }
  NO_UNROLL for (; k < columns; k++) UNROLL for (int n = 0; n < outputs; n++)
    totals[n] = fma(Type::value(weights + k * kColumnBytes<Type>), rows[n][k], totals[n]);
}

template <class Type, int outputs>
DEVICE void multiply_tiles(const Products& all, const Share& share, const TeamPlace& at, TeamWeights<Type>& weights) {
  WarpActivations<Type, outputs> activations(all, share, at, weights.activations());
  const int row = at.lane % 16, token = outputs * (2 * at.warp + at.lane / 16);
  NO_UNROLL for (int tile = at.first_tile; tile < all.tile_count(); tile += at.step) {
    float totals[outputs] = {};
    NO_UNROLL for (int left = all.cols; left > 0; left -= kStageColumns<Type>) {
      const float *x = activations.take(), *rows[outputs];
      UNROLL for (int n = 0; n < outputs; n++) rows[n] = x + activations.row(n);
      const uint8_t* stage = weights.take() + row * Type::kBytes;
      add_stage(stage, rows, left < kStageColumns<Type> ? left : kStageColumns<Type>, activations, totals);
      __syncwarp();
      weights.release();
    }
    const Product p = product_of(all, 1, tile);
    UNROLL for (int n = 0; n < outputs; n++)
      if (token + n < share.n)
        store_result(result_of(p, share), p.bias_rows, out_row(p, share, token + n), 16 * p.block + row, totals[n]);
  }
  copy_async_commit();
  copy_async_wait<0>();
}

// Grid: (groups of eight rows, or items; any number of blocks for the tiles of all matrices). A warp has two rows or
// four, so a team of one warp is for up to two rows, and one of two warps for up to eight.
template <class Type>
DEVICE void gemv_floats(const Products& all) {
  // The shuffles tell the compiler that these values are uniform in a warp.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / kWarp, 0);
  const int team = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.y), 0);
  const TeamPlace at{warp, static_cast<int>(blockDim.x) / kWarp, static_cast<int>(threadIdx.x) % kWarp,
                     static_cast<int>(blockIdx.y + gridDim.y * team), static_cast<int>(gridDim.y * blockDim.y)};
  const int team_bytes = dynamic_shared_bytes() / static_cast<int>(blockDim.y);
  TeamWeights<Type> weights(all, at, DYNAMIC_SHARED + team * team_bytes, team_bytes);
  let_next_kernel_begin();
  if (all.items == nullptr) weights.start(0);  // It does not depend on the rows, which the block does not know yet.
  __syncthreads();
  wait_for_earlier_kernels();
  const Share share = share_of(all, blockIdx.x, 8);
  if (share.n <= 0) return weights.drop();
  if (all.items != nullptr) weights.start(share.expert);
  if (share.n <= 2 * at.warps)
    multiply_tiles<Type, 1>(all, share, at, weights);
  else
    multiply_tiles<Type, 2>(all, share, at, weights);
}

}  // namespace
}  // namespace llamaclust::cuda
#endif
