// Rotation tables: cosine and sine of every angle a stage can need, computed once.
#pragma once

#include "executor/plan.h"
#include "runtime/float_mode.h"
#include "runtime/math.h"

namespace llamaclust {

class RotationTable {
 public:
  RotationTable(const RotationAngles& angles, int positions) : pairs_(angles.pairs()), values_(row_offset(positions)) {
    const FloatMode mode;
    for (int position = 0; position < positions; position++) {
      float* row = values_.data() + row_offset(position);
      for (int i = 0; i < pairs_; i++) {
        double sine, cosine;
        sincos_double(position * angles.frequencies[i], &sine, &cosine);
        row[i] = static_cast<float>(cosine * angles.scale);
        row[pairs_ + i] = static_cast<float>(sine * angles.scale);
      }
    }
  }

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
