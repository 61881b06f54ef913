// Ranks logits, sorting only as many as are read, and computes their weights. The source is a whole row, or the record
// that a GPU returns in place of it (sampler/ranked.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "level/level.h"
#include "sampler/ranked.h"

namespace llamaclust {

constexpr int sums_of_row(int vocabulary) { return (vocabulary + kSummedLogits - 1) / kSummedLogits; }
constexpr size_t ranked_words(int vocabulary) { return kMostCandidates + sums_of_row(vocabulary) + kEndWords; }

// A parsed record of a GPU (sampler/ranked.h).
struct Ranked {
  const uint64_t* keys;
  int count;  // 0 if there were more than kMostCandidates.
  float maximum;
  bool is_complete;  // True if the keys include every logit above -infinity.
  // Sum of the weights at temperature 1; 0 if a logit is NaN or +infinity.
  int64_t total;
  float divisor = 1;  // A temperature, and below the sum of the weights at it.
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

// Logits ordered by value (descending), then by id (ascending).
class Ranking {
 public:
  // values[n] has no NaN and must outlive the ranking. -infinity is never ranked.
  Ranking(const SamplerOps& ops, const float* values, int n);
  // Ranks a record; its row of n values is not available. A function that needs more than the record sets
  // lacks_values(), and then its result is meaningless.
  Ranking(const SamplerOps& ops, const Ranked& ranked, int n);

  float maximum() const { return maximum_; }
  int size() const { return n_; }
  int best();  // Id of the first entry; requires a maximum above -infinity.
  float value(int id);

  // Makes entries [0, count) ready, or as many as exist. Returns the number of ready entries.
  int extend(int count);
  int id(int rank) const { return static_cast<int>(keys_[rank] & 0xFFFFFFFF); }
  const float* ready_values() const { return ready_values_.data(); }  // Values of the ready entries, best first.

  // Returns the sum of the weights of all values (SamplerOps::weigh), none of which may be NaN.
  int64_t total(float divisor);
  // Returns this sum at temperature 1, or 0 if a value is NaN or +infinity.
  int64_t checked_total() const;
  const SamplerOps& ops() const { return ops_; }

  // Returns whether the ready entries include every value that can be ranked.
  bool is_complete() const { return complete_; }
  bool lacks_values() const { return lacks_values_; }
  void need_values() { lacks_values_ = lacks_values_ || values_ == nullptr; }

 private:
  float threshold(int count) const;
  void collect(float threshold);
  void make_ready();

  const SamplerOps& ops_;
  const float* values_;  // Null if only a record is available.
  int n_;
  std::vector<float> blocks_;  // Maximum of each block of 64 values.
  float maximum_;
  // Sums of the weights at temperature 1 and at divisor_, if only a record is available.
  int64_t total_ = 0, divided_total_ = 0;
  float divisor_ = 1;
  bool lacks_values_ = false;
  bool complete_ = false;  // Every value that can be ranked is ready.
  bool is_sorted_ = true;
  std::vector<uint64_t> keys_;  // Keys of the ready entries, ascending.
  std::vector<float> ready_values_;
};

// Weights of a ranking's entries at one temperature, computed as far as they are read.
class RankedWeights {
 public:
  RankedWeights(Ranking& ranking, float divisor) : ranking_(ranking), divisor_(divisor) {}

  bool has(int rank) { return rank < static_cast<int>(weights_.size()) || grow(rank + 1); }
  int64_t operator[](int rank) const { return weights_[rank]; }
  int64_t sum(int count);  // Sum over entries [0, count), or over as many as exist.

 private:
  bool grow(int count);

  Ranking& ranking_;
  float divisor_;
  std::vector<int64_t> weights_;
};

}  // namespace llamaclust
