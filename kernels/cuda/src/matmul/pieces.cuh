// Copies the weights of a warp to shared memory in the background, piece after piece of tile after tile.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

// Warps of a block. There are more if all pieces of a warp can be in flight, so that few tiles keep many warps busy.
#if LLAMACLUST_ARCH >= 900
inline constexpr int kGemvWarps = 8;
#else
inline constexpr int kGemvWarps = 4;
#endif
// Bytes of a warp for the terms of a turn's pieces, except the last one.
inline constexpr int kKeptBytes = 2560;
// Segments of a piece. Four segments of 32 columns share an address, because computing one for each would take as many
// instructions as the arithmetic.
template <class Type>
constexpr int kTogether = kWide<Type> ? 1 : 4;
template <class Type>
constexpr int kSegmentBytes = Type::kLayout.body_bytes + Type::kLayout.tail_bytes;
template <class Type>
constexpr int kPieceBytes = kTogether<Type> * kSegmentBytes<Type>;
// Pieces of a warp in shared memory: one that it multiplies, and one or two in flight. There is one on GPUs that cannot
// copy in the background.
#if LLAMACLUST_ARCH < 800
template <class Type>
constexpr int kStages = 1;
#else
template <class Type>
constexpr int kStages = kPieceBytes<Type> > 1536 ? 2 : 3;
#endif

// Position in a warp's sequence of pieces. The block has tiles blockIdx.y, blockIdx.y + gridDim.y, ... In each tile,
// warps take turns of several adjacent pieces; the last turn has those that are left.
struct Place {
  int tile, begin, at;  // First piece of the turn; number of its pieces before this one.
  // Pieces of a tile; the same rounded up to whole turns; pieces of a turn.
  int pieces, whole, turn;

  DEVICE Place(int pieces, int turn, int warp)
      : tile(blockIdx.y), begin(0), at(0), pieces(pieces), whole((pieces + turn - 1) / turn * turn), turn(turn) {
    skip(warp);
  }
  DEVICE int piece() const { return begin + at; }
  DEVICE bool ends_tile() const { return begin + at + 1 == pieces; }
  DEVICE bool ends_turn() const { return at + 1 == turn || ends_tile(); }
  DEVICE void advance() {
    if (!ends_turn()) {
      at++;
    } else {
      at = 0;
      skip(kGemvWarps);
    }
  }

 private:
  DEVICE void skip(int turns) {
    for (begin += turns * turn; begin >= whole; begin -= whole) tile += gridDim.y;
  }
};

#if LLAMACLUST_ARCH < 900
// The pieces of one warp of the block. A turn is one piece.
template <class Type>
class Pieces {
 public:
  DEVICE Pieces(const Products& all, int turn, int warp, int lane, uint8_t* shared)
      : all_(all), segments_(all.cols / Type::kLayout.segment_cols), lane_(16 * lane),
        memory_(shared + warp * kStages<Type> * kPieceBytes<Type>), to_(shared_address(memory_ + lane_)),
        next_((segments_ + kTogether<Type> - 1) / kTogether<Type>, turn, warp) {}

  DEVICE Place next() const { return next_; }
  DEVICE float2* kept(int, uint8_t*) const { return nullptr; }

  // Requests the first pieces of this expert's matrices (0 without experts).
  DEVICE void start(int expert) {
    expert_ = expert;
    find_tile();
    for (int i = 0; i < kStages<Type> - 1; i++) request(i);
  }

  // Requests another piece, and waits for the next one, which stays in place until `release`.
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
  // Waits for the requested copies if nothing was taken. No copy may be in flight when the block ends.
  DEVICE void drop(Place) const { copy_async_wait<0>(); }

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
      next_.advance();
      if (next_.tile != tile) find_tile();
    }
    copy_async_commit();  // A group may be empty: there are as many groups as pieces.
  }

  DEVICE void copy(SharedAddress to) const {
    constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
    const int first = next_.piece() * kTogether<Type>;
    if constexpr (kTogether<Type> % kGroupSegments<Type> == 0) {
      const uint8_t* from = from_ + static_cast<size_t>(next_.piece()) * kPieceBytes<Type>;
      copy<kPieceBytes<Type>>(from, (segments_ - first) * kSegmentBytes<Type>, to);
    } else {
      const Segment segment = segment_of<Type>(from_, first, segments_);
      copy<body_bytes>(segment.body, body_bytes, to);
      copy<tail_bytes>(segment.tail, tail_bytes, to + body_bytes);
    }
  }
  // Copies `bytes` bytes, or as many as are left. Both addresses are those of the lane.
  template <int bytes>
  DEVICE void copy(const uint8_t* from, int left, SharedAddress to) const {
    const int end = (left < bytes ? left : bytes) - lane_;
    UNROLL for (int i = 0; i < bytes; i += 16 * kWarp)
      if (i < end) copy_async_16(to + i, from + i);
  }

  const Products& all_;
  int segments_, lane_;  // Segments of a tile; offset in bytes.
  uint8_t* memory_;
  SharedAddress to_;               // Address of the lane.
  Place next_;                     // The next piece to request.
  int expert_ = 0, at_ = 0;        // at_ is the stage that take() returns next.
  const uint8_t* from_ = nullptr;  // The tile of the next piece to request, at the lane's offset.
};
#else
// The variant with bulk copies. Lane 0 requests whole pieces, as many as fit into the block's dynamic shared memory.
// The arrivals follow all pieces, and are followed by the terms that warps keep until the end of a turn.
template <class Type>
class Pieces {
 public:
  DEVICE Pieces(const Products& all, int turn, int warp, int lane, uint8_t* shared)
      : all_(all), segments_(all.cols / Type::kLayout.segment_cols), requests_(lane == 0),
        stages_((dynamic_shared_bytes() / kGemvWarps - (turn > 1 ? kKeptBytes : 0)) / kStageBytes),
        memory_(shared + warp * stages_ * kPieceBytes<Type>), to_(shared_address(memory_)),
        arrivals_(shared_address(shared + kGemvWarps * stages_ * kPieceBytes<Type> + warp * stages_ * kArrivalBytes)),
        next_((segments_ + kTogether<Type> - 1) / kTogether<Type>, turn, warp) {
    if (requests_) {
      NO_UNROLL for (int i = 0; i < stages_; i++) arrival_init(arrival(i));
      publish_shared();
    }
    __syncwarp();
  }

  DEVICE Place next() const { return next_; }
  DEVICE float2* kept(int warp, uint8_t* shared) const {
    return reinterpret_cast<float2*>(shared + kGemvWarps * stages_ * kStageBytes + warp * kKeptBytes);
  }

  // Requests the first pieces of this expert's matrices (0 without experts).
  DEVICE void start(int expert) {
    expert_ = expert;
    find_tile();
    NO_UNROLL for (int i = 0; i < stages_; i++) request(i);
  }

  // Waits for the next piece. It stays in place until `release`, which requests another one instead.
  DEVICE const uint8_t* take() const {
    arrival_wait(arrival(at_), parity_);
    return memory_ + at_ * kPieceBytes<Type>;
  }
  DEVICE void release() {
    __syncwarp();  // All lanes have read it.
    request(at_);
    if (++at_ < stages_) return;
    at_ = 0;
    parity_ ^= 1;
  }
  // Waits for the requested copies if nothing was taken. No copy may be in flight when the block ends.
  DEVICE void drop(Place first) const {
    NO_UNROLL for (int i = 0; i < stages_ && first.tile < all_.tile_count(); i++, first.advance()) arrival_wait(arrival(i), 0);
  }

 private:
  static constexpr int kArrivalBytes = 8, kStageBytes = kPieceBytes<Type> + kArrivalBytes;

  DEVICE SharedAddress arrival(int stage) const { return arrivals_ + kArrivalBytes * stage; }

  DEVICE void find_tile() {
    if (next_.tile >= all_.tile_count()) return;
    const Product p = product_of(all_, 1, next_.tile);
    from_ = tile_of(p, {expert_, 0, 0}, p.block);
  }

  DEVICE void request(int stage) {
    if (next_.tile >= all_.tile_count()) return;
    if (requests_) copy(to_ + stage * kPieceBytes<Type>, arrival(stage));
    const int tile = next_.tile;
    next_.advance();
    if (next_.tile != tile) find_tile();
  }

  DEVICE void copy(SharedAddress to, SharedAddress arrival) const {
    constexpr int body_bytes = Type::kLayout.body_bytes, tail_bytes = Type::kLayout.tail_bytes;
    const int first = next_.piece() * kTogether<Type>, left = segments_ - first;
    if constexpr (kTogether<Type> % kGroupSegments<Type> == 0) {
      const int bytes = (kTogether<Type> > 1 && left < kTogether<Type> ? left : kTogether<Type>) * kSegmentBytes<Type>;
      arrival_announce(arrival, bytes);
      copy_bulk(to, from_ + static_cast<size_t>(next_.piece()) * kPieceBytes<Type>, bytes, arrival);
    } else {
      const Segment segment = segment_of<Type>(from_, first, segments_);
      arrival_announce(arrival, body_bytes + tail_bytes);
      copy_bulk(to, segment.body, body_bytes, arrival);
      copy_bulk(to + body_bytes, segment.tail, tail_bytes, arrival);
    }
  }

  const Products& all_;
  int segments_;   // Segments of a tile.
  bool requests_;  // Whether this lane requests pieces.
  int stages_;
  uint8_t* memory_;
  SharedAddress to_, arrivals_;           // Addresses of the warp.
  Place next_;                            // The next piece to request.
  int expert_ = 0, at_ = 0, parity_ = 0;  // at_ and parity_ belong to the stage that take() returns next.
  const uint8_t* from_ = nullptr;         // The tile of the next piece to request.
};
#endif

}  // namespace
}  // namespace llamaclust::cuda
