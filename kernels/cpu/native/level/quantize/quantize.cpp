// Quantizes weights to blocks: the importance of each weight, and dispatching on the type.
#include "level/level.h"

#include "level/quantize/grid.h"
#include "level/quantize/k.h"
#include "level/quantize/simple.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

void weigh(const float* x, const float* importance, int n, float* w) {
  double squares = 0;
  for (int i = 0; i < n; i++) squares += double{x[i]} * x[i];
  const float mean = static_cast<float>(squares / n);
  for (int i = 0; i < n; i++) w[i] = __builtin_sqrtf(mean + x[i] * x[i]);
  if (importance)
    for (int i = 0; i < n; i++) w[i] *= importance[i];
}

void quantize(QuantType type, const Source& from, uint8_t* out) {
  switch (type) {
#define QUANTIZE(name, ...) \
  case QuantType::name: return quantize_##name(from, out);
    LLAMACLUST_QUANTIZED_TYPES(QUANTIZE)
#undef QUANTIZE
    default: return;
  }
}

}  // namespace

extern const QuantizeOps quantize_ops;
const QuantizeOps quantize_ops = {weigh, quantize};

}  // namespace llamaclust::LLAMACLUST_LEVEL
