// Weights on their way to a warp: piece after piece of tile after tile, copied into shared memory in the background.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

inline constexpr int kGemvWarps = 4;  // of a block
// Segments of a piece: of 32 columns, addresses would take as many instructions as arithmetic, so four share theirs.
template <class Type>
constexpr int kTogether = kWide<Type> ? 1 : 4;
template <class Type>
constexpr int kSegmentBytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes;
template <class Type>
constexpr int kPieceBytes = kTogether<Type> * kSegmentBytes<Type>;
// Pieces of a warp in shared memory: one that it multiplies, and one or two on their way; GPUs that copy no piece in the
// background have one.
#if LLAMACLUST_ARCH < 800
template <class Type>
constexpr int kStages = 1;
#else
template <class Type>
constexpr int kStages = kPieceBytes<Type> > 1536 ? 2 : 3;
#endif

// A block's pieces in order, tile after tile: those of all tiles blockIdx.y, blockIdx.y + gridDim.y, ...
struct Place {
  int tile, piece, pieces;  // the last: of each tile

  DEVICE void advance(int by) {
    for (piece += by; piece >= pieces; piece -= pieces) tile += gridDim.y;
  }
};

// The pieces of one warp of the block: each takes one in turn.
template <class Type>
class Pieces {
 public:
  DEVICE Pieces(const Products& all, int warp, int lane, uint8_t* shared)
      : all_(all), segments_(all.cols / Type::kLayout.segment_cols), lane_(16 * lane),
        memory_(shared + warp * kStages<Type> * kPieceBytes<Type>), to_(shared_address(memory_ + lane_)),
        next_{static_cast<int>(blockIdx.y), 0, (segments_ + kTogether<Type> - 1) / kTogether<Type>} {
    next_.advance(warp);
  }

  DEVICE Place next() const { return next_; }

  // Requests the first ones, of this expert's matrices (0 without experts).
  DEVICE void start(int expert) {
    expert_ = expert;
    find_tile();
    for (int i = 0; i < kStages<Type> - 1; i++) request(i);
  }

  // The next one, which is there, while another one is requested. It stays until `release`.
  DEVICE const uint8_t* take() {
    request(at_ == 0 ? kStages<Type> - 1 : at_ - 1);
    copy_async_wait<kStages<Type> - 1>();
    __syncwarp();
    return memory_ + at_ * kPieceBytes<Type>;
  }
  DEVICE void release() {
    __syncwarp();
    at_ = at_ + 1 == kStages<Type> ? 0 : at_ + 1;
  }

 private:
  DEVICE void find_tile() {
    if (next_.tile >= all_.tile_count()) return;
    const Product p = product_of(all_, 1, next_.tile);
    from_ = tile_of(p, {expert_, 0, 0}, p.block) + lane_;
  }

  DEVICE void request(int stage) {
    if (next_.tile < all_.tile_count()) {
      copy(to_ + stage * kPieceBytes<Type>);
      const int tile = next_.tile;
      next_.advance(kGemvWarps);
      if (next_.tile != tile) find_tile();
    }
    copy_async_commit();  // also of nothing: as many groups as pieces
  }

  DEVICE void copy(SharedAddress to) const {
    constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
    const int first = next_.piece * kTogether<Type>;
    if constexpr (kTogether<Type> % kGroupSegments<Type> == 0) {
      const uint8_t* from = from_ + static_cast<size_t>(next_.piece) * kPieceBytes<Type>;
      copy<kPieceBytes<Type>>(from, (segments_ - first) * kSegmentBytes<Type>, to);
    } else {
      const Segment segment = segment_of<Type>(from_, first, segments_);
      copy<body_bytes>(segment.body, body_bytes, to);
      copy<tail_bytes>(segment.tail, tail_bytes, to + body_bytes);
    }
  }
  // `bytes`, or as many as are left; both places are the lane's.
  template <int bytes>
  DEVICE void copy(const uint8_t* from, int left, SharedAddress to) const {
    const int end = (left < bytes ? left : bytes) - lane_;
    UNROLL for (int i = 0; i < bytes; i += 16 * kWarp)
      if (i < end) copy_async_16(to + i, from + i);
  }

  const Products& all_;
  int segments_, lane_;            // of a tile; in bytes
  uint8_t* memory_;
  SharedAddress to_;               // the lane's
  Place next_;                     // to request
  int expert_ = 0, at_ = 0;        // the stage of the next one to take
  const uint8_t* from_ = nullptr;  // the tile of the next one to request
};

}  // namespace
}  // namespace llamaclust::cuda
