#include "executor/rotation.h"

#include "runtime/float_mode.h"
#include "runtime/math.h"

namespace llamaclust {

RotationTable::RotationTable(const RotationAngles& angles, int positions)
    : pairs_(angles.pairs()), values_(row_offset(positions)) {
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

}  // namespace llamaclust
