// Weights on their way to a warp: piece after piece of tile after tile, copied into shared memory in the background.
#pragma once

#include "matmul.cuh"

namespace llamaclust::cuda {
namespace {

// Of a block: more where all of a warp's pieces can be under way, so that few tiles keep many warps busy.
#if LLAMACLUST_ARCH >= 900
inline constexpr int kGemvWarps = 8;
#else
inline constexpr int kGemvWarps = 4;
#endif
// Of a warp, for terms of the pieces of a turn but the last.
inline constexpr int kKeptBytes = 2560;
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

// A warp's pieces in order: of the tiles blockIdx.y, blockIdx.y + gridDim.y, ... warps take turns of several neighbouring
// pieces each, the last of a tile of those that are left.
struct Place {
  int tile, begin, at;      // the first piece of the turn, and how many were before this one
  int pieces, whole, turn;  // of each tile, also rounded up to whole turns; of a turn

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
// The pieces of one warp of the block: each takes one in turn.
template <class Type>
class Pieces {
 public:
  DEVICE Pieces(const Products& all, int turn, int warp, int lane, uint8_t* shared)
      : all_(all), segments_(all.cols / Type::kLayout.segment_cols), lane_(16 * lane),
        memory_(shared + warp * kStages<Type> * kPieceBytes<Type>), to_(shared_address(memory_ + lane_)),
        next_((segments_ + kTogether<Type> - 1) / kTogether<Type>, turn, warp) {}

  DEVICE Place next() const { return next_; }
  DEVICE float2* kept(int, uint8_t*) const { return nullptr; }  // a turn is one piece

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
  // Waits for what was requested, where nothing was taken: none may be under way when the block ends.
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
    copy_async_commit();  // also of nothing: as many groups as pieces
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
#else
// The same by bulk copies: lane 0 requests whole pieces, as many as the block's dynamic shared memory has stages for.
// Behind all pieces are their arrivals, and behind these what warps keep of pieces until the turn ends.
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

  // Requests the first ones, of this expert's matrices (0 without experts).
  DEVICE void start(int expert) {
    expert_ = expert;
    find_tile();
    NO_UNROLL for (int i = 0; i < stages_; i++) request(i);
  }

  // The next one, when it is there; it stays until `release`, which requests another one in its place.
  DEVICE const uint8_t* take() const {
    arrival_wait(arrival(at_), parity_);
    return memory_ + at_ * kPieceBytes<Type>;
  }
  DEVICE void release() {
    __syncwarp();  // all lanes have read it
    request(at_);
    if (++at_ < stages_) return;
    at_ = 0;
    parity_ ^= 1;
  }
  // Waits for what was requested, where nothing was taken: none may be under way when the block ends.
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
  int segments_;   // of a tile
  bool requests_;  // this lane
  int stages_;
  uint8_t* memory_;
  SharedAddress to_, arrivals_;  // of the warp
  Place next_;                   // to request
  int expert_ = 0, at_ = 0, parity_ = 0;  // the stage of the next one to take
  const uint8_t* from_ = nullptr;         // the tile of the next one to request
};
#endif

}  // namespace
}  // namespace llamaclust::cuda
