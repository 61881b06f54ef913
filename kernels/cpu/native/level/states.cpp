// Updates of states. Rows are computed in order, so dividing a sequence into chunks changes no bit.
#include "level/delta_rule.h"
#include "level/level.h"
#include "simd/pieces.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

void convolve(const float* const* x, const float* weight, int stride, const float* bias, int taps, int n, float* out) {
  each_lanes(n, [&](int i, auto read, auto write) {
    int t = 0;
    F32x16 sum;
    if (bias == nullptr)
      sum = mul(read(x[t++] + i), read(weight + i));
    else
      sum = read(bias + i);
    for (; t < taps; t++) sum = fma(read(x[t] + i), read(weight + t * stride + i), sum);
    write(out + i, sum);
  });
}

}  // namespace

extern const StateOps state_ops;
const StateOps state_ops = {convolve, delta_rule};

}  // namespace llamaclust::LLAMACLUST_LEVEL
