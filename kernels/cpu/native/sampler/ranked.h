// The record that a GPU returns in place of a row of logits: the best candidates and sums of the weights.
#pragma once

#include <cstdint>

namespace llamaclust {

inline constexpr int kMostCandidates = 1024;  // Maximum number of candidates in a record.
inline constexpr int kSummedLogits = 4096;    // Number of logits whose weights form one sum.

// The last bytes of a record.
struct RankedEnd {
  float maximum;
  // ordered_bits of a threshold that all candidates reach and no other logit does; 0 if all logits are candidates.
  uint32_t least;
  // Number of candidates. If it exceeds kMostCandidates, the keys are invalid.
  int32_t count;
  int32_t unused;
};
inline constexpr int kEndWords = 2;  // Size of RankedEnd in int64s.
static_assert(sizeof(RankedEnd) == 16);

// A record is an array of int64: keys of candidates in any order [kMostCandidates]; sums of weights [vocabulary /
// kSummedLogits, rounded up], negative if a logit is NaN or +infinity; and a RankedEnd. A key has the complement of the
// value's ordered bits in its upper half and the token id in its lower half.

}  // namespace llamaclust
