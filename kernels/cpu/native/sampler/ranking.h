// Logits in order of rank, sorted only as far as they are read, and their weights: of a whole row, or of what a GPU says of
// one (sampler/ranked.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "level/level.h"
#include "sampler/ranked.h"

namespace llamaclust {

constexpr int sums_of_row(int vocabulary) { return (vocabulary + kSummedLogits - 1) / kSummedLogits; }
constexpr size_t ranked_words(int vocabulary) { return kMostCandidates + sums_of_row(vocabulary) + kEndWords; }

// A record of a GPU (sampler/ranked.h) as it is read.
struct Ranked {
  const uint64_t* keys;
  int count;  // 0 where there were too many
  float maximum;
  bool is_complete;  // no logit above -infinity is missing
  int64_t total;     // of weights at a temperature of 1; 0 where a logit is no number
  float divisor = 1;  // a temperature, and the total at this one
  int64_t divided_total = 0;
};

inline Ranked read_ranked(const int64_t* record, int vocabulary) {
  const int64_t* sums = record + kMostCandidates;
  const int chunks = sums_of_row(vocabulary);
  const RankedEnd& end = *reinterpret_cast<const RankedEnd*>(sums + chunks);
  const bool fits = end.count <= kMostCandidates;
  int64_t total = 0;
  bool is_number = true;
  for (int i = 0; i < chunks; i++) is_number = is_number && sums[i] >= 0, total += sums[i];
  return {reinterpret_cast<const uint64_t*>(record), fits ? end.count : 0, end.maximum, fits && end.least == 0,
          is_number ? total : 0};
}

// Logits ordered by (value descending, id ascending).
class Ranking {
 public:
  // values[n] has no NaN and stays where it is. -infinity is never ranked.
  Ranking(const SamplerOps& ops, const float* values, int n);
  // Of a row of n values that is elsewhere. What needs more of it than there is makes `lacks_values`, and its result is
  // of no use.
  Ranking(const SamplerOps& ops, const Ranked& ranked, int n);

  float maximum() const { return maximum_; }
  int size() const { return n_; }
  int best();  // id of the first entry; needs a maximum above -infinity
  float value(int id);

  // Makes entries [0, count) ready, or as many as there are; returns how many are.
  int extend(int count);
  int id(int rank) const { return static_cast<int>(keys_[rank] & 0xFFFFFFFF); }
  const float* ready_values() const { return ready_values_.data(); }  // of the ready entries, best first

  // Sum of the weights of all values (SamplerOps::weigh), which are numbers.
  int64_t total(float divisor);
  // Likewise at 1; 0 where they are not.
  int64_t checked_total() const;
  const SamplerOps& ops() const { return ops_; }

  bool is_complete() const { return complete_; }  // whether no value can be ranked behind the ready ones
  bool lacks_values() const { return lacks_values_; }
  void need_values() { lacks_values_ = lacks_values_ || values_ == nullptr; }

 private:
  float threshold(int count) const;
  void collect(float threshold);
  void make_ready();

  const SamplerOps& ops_;
  const float* values_;  // null where they are elsewhere
  int n_;
  std::vector<float> blocks_;  // greatest value of each 64
  float maximum_;
  int64_t total_ = 0, divided_total_ = 0;  // of weights at 1 and at the divisor, where the values are elsewhere
  float divisor_ = 1;
  bool lacks_values_ = false;
  bool complete_ = false;       // every value that can be ranked is ready
  bool is_sorted_ = true;
  std::vector<uint64_t> keys_;  // of the ready entries, ascending
  std::vector<float> ready_values_;
};

// Weights of a ranking's entries at one temperature, computed as far as they are read.
class RankedWeights {
 public:
  RankedWeights(Ranking& ranking, float divisor) : ranking_(ranking), divisor_(divisor) {}

  bool has(int rank) { return rank < static_cast<int>(weights_.size()) || grow(rank + 1); }
  int64_t operator[](int rank) const { return weights_[rank]; }
  int64_t sum(int count);  // of entries [0, count), as many as there are

 private:
  bool grow(int count);

  Ranking& ranking_;
  float divisor_;
  std::vector<int64_t> weights_;
};

}  // namespace llamaclust
