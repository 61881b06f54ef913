// What a GPU says of a row of logits, in place of the row: its best candidates and the sum of all weights.
#pragma once

#include <cstdint>

namespace llamaclust {

inline constexpr int kMostCandidates = 1024;  // of a record
inline constexpr int kSummedLogits = 4096;    // whose weights a record sums together

// Behind the rest of a record.
struct RankedEnd {
  float maximum;
  uint32_t least;  // ordered_bits of the least value that all candidates reach, and no other logit does; 0: all do
  int32_t count;   // of candidates; if more than kMostCandidates, keys are of no use
  int32_t unused;
};
inline constexpr int kEndWords = 2;  // int64s of it
static_assert(sizeof(RankedEnd) == 16);

// A record is int64: keys of candidates in any order [kMostCandidates], sums of weights, negative where a logit is no
// number [vocabulary / kSummedLogits, rounded up], and a RankedEnd. A key has the complement of the value's ordered bits
// above the id.

}  // namespace llamaclust
