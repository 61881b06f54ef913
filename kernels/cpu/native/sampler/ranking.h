// Logits ordered by (value descending, id ascending), sorted only as far as it is read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "level/level.h"

namespace llamaclust {

class Ranking {
 public:
  // values[n] has no NaN and stays where it is. -infinity is never ranked.
  Ranking(const SamplerOps& ops, const float* values, int n);

  float maximum() const { return maximum_; }
  int size() const { return n_; }
  int best() const;  // id of the first entry; needs a maximum above -infinity

  // Makes entries [0, count) ready, or as many as there are; returns how many are.
  int extend(int count);
  int id(int rank) const { return static_cast<int>(keys_[rank] & 0xFFFFFFFF); }
  const float* ready_values() const { return ready_values_.data(); }  // of the ready entries, best first

  // Sum of the weights of all values (SamplerOps::weigh); 0 where they are not numbers or the maximum is not finite.
  int64_t total(float divisor) const { return ops_.weigh(values_, n_, maximum_, divisor, nullptr); }
  const SamplerOps& ops() const { return ops_; }

 private:
  float threshold(int count) const;
  void collect(float threshold);

  const SamplerOps& ops_;
  const float* values_;
  int n_;
  std::vector<float> blocks_;  // greatest value of each 64
  float maximum_;
  bool complete_ = false;       // every value that can be ranked is ready
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
