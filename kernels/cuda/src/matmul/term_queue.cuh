// Terms of one row on their way to the warp that adds them, in k order: warps that multiply write the terms of a round, a
// piece of each, and go on; the adding warp lags some instructions behind the last of them.
#pragma once

#include "one_row.cuh"

namespace llamaclust::cuda {
namespace {

inline constexpr int kRounds = 4;  // in memory
template <class Type>
constexpr int kTermFloats = Type::kHasMin ? 4 : 2;  // of an output
template <class Type>
using RoundTerms = float[kGemvWarps][16][kTermFloats<Type>];

struct QueueArrivals {
  uint64_t full[kRounds], empty[kRounds];
};

template <class Type>
class TermQueue {
 public:
  DEVICE TermQueue(RoundTerms<Type> (&terms)[kRounds], QueueArrivals& arrivals)
      : terms_(terms), full_(shared_address(arrivals.full)), empty_(shared_address(arrivals.empty)) {}

  // By kRounds threads, before the block's threads wait for each other.
  DEVICE void init(int i) const {
    arrival_init(full_ + 8 * i, kGemvWarps);
    arrival_init(empty_ + 8 * i, 1);
  }

  // What a warp that multiplies has for this round: a term, or none in the last one.
  DEVICE void put(int round, int warp, int lane, const Terms<Type, 1>& terms) const {
    const int place = round % kRounds;
    if (round >= kRounds) arrival_wait(empty_ + 8 * place, (round / kRounds - 1) % 2);
    const int row = lane / 4 + 8 * (lane % 4 / 2);
    if constexpr (Type::kHasMin) {
      const Term& mine = lane % 2 == 0 ? terms[0][0] : terms[0][1];
      *reinterpret_cast<float2*>(&terms_[place][warp][row][2 * (lane % 2)]) = make_float2(mine.factor, mine.sum);
    } else {
      if (lane % 2 == 0) *reinterpret_cast<float2*>(&terms_[place][warp][row]) = make_float2(terms[0][0].factor, terms[0][0].sum);
    }
    put_nothing(round, lane);
  }
  DEVICE void put_nothing(int round, int lane) const {
    __syncwarp();  // all lanes have written
    if (lane == 0) arrival_arrive(full_ + 8 * (round % kRounds));
  }

  // What the adding warp gets of a round, of row lane % 16.
  DEVICE void take(int round, int lane, float (&terms)[kGemvWarps][kTermFloats<Type>]) const {
    const int place = round % kRounds;
    arrival_wait(full_ + 8 * place, round / kRounds % 2);
    UNROLL for (int i = 0; i < kGemvWarps; i++) {
      const float* from = terms_[place][i][lane % 16];
      if constexpr (Type::kHasMin) {
        load_fours(from, terms[i]);
      } else {
        const float2 term = *reinterpret_cast<const float2*>(from);
        terms[i][0] = term.x, terms[i][1] = term.y;
      }
    }
    __syncwarp();  // all lanes have read
    if (lane == 0) arrival_arrive(empty_ + 8 * place);
  }

 private:
  RoundTerms<Type> (&terms_)[kRounds];
  SharedAddress full_, empty_;
};

// A warp that multiplies: all its pieces.
template <class Type>
DEVICE void put_terms(const Products& all, const Share& share, Pieces<Type>& pieces, Place now, int warp, int lane,
                      const TermQueue<Type>& queue) {
  const int tiles = all.tile_count();
  OneRow<Type> row(all, share, now.pieces, lane);
  row.look_ahead(now.piece);
  int round = 0;
  for (; now.tile < tiles; round++) {
    now.advance(kGemvWarps);
    row.look_ahead(now.piece);
    Terms<Type, 1> terms;
    row.terms(pieces.take(), terms);
    pieces.release();
    queue.put(round, warp, lane, terms);
  }
  const int of_block = (tiles - 1 - static_cast<int>(blockIdx.y)) / static_cast<int>(gridDim.y) + 1;
  if (round * kGemvWarps < of_block * now.pieces) queue.put_nothing(round, lane);
}

// The adding warp. `ended`: results of a lane, which are there once in the program's text.
template <class Type>
DEVICE void add_terms_in_order(const Products& all, const Share& share, Place now, int lane, const TermQueue<Type>& queue,
                               float (&ended)[kGemvWarps][kWarp]) {
  const int tiles = all.tile_count();
  float total = 0.0f;
  for (int round = 0, tile = now.tile; tile < tiles; round++) {
    float terms[kGemvWarps][kTermFloats<Type>];
    queue.take(round, lane, terms);
    int count = 0;
    UNROLL for (int i = 0; i < kGemvWarps; i++) {  // the last round may have less: those past the end change nothing
      UNROLL for (int n = 0; n < kTermFloats<Type>; n += 2) total = fma(terms[i][n], terms[i][n + 1], total);
      if (++now.piece < now.pieces) continue;
      ended[count++][lane] = total;
      total = 0.0f, now.piece = 0;
    }
    NO_UNROLL for (int i = 0; i < count && tile < tiles; i++, tile += gridDim.y)
      store_row(product_of(all, 1, tile), share, lane, ended[i][lane]);
  }
}

}  // namespace
}  // namespace llamaclust::cuda
