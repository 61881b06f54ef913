// Rotation tables: cosine and sine of every angle a stage can need, computed once.
#pragma once

#include <cstddef>
#include <vector>

#include "executor/plan.h"

namespace llamaclust {

class RotationTable {
 public:
  RotationTable(const RotationAngles& angles, int positions);

  int pairs() const { return pairs_; }
  // cos[pairs], then sin[pairs].
  const float* row(int position) const { return values_.data() + row_offset(position); }
  size_t bytes() const { return values_.size() * sizeof(float); }

 private:
  size_t row_offset(int position) const { return static_cast<size_t>(position) * 2 * static_cast<size_t>(pairs_); }

  int pairs_;
  std::vector<float> values_;  // [positions][2 * pairs]
};

}  // namespace llamaclust
