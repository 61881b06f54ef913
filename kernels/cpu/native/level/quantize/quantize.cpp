// Weights into blocks: how much each matters, and which code serves which type.
#include "level/quantize_ops.h"

#include "level/quantize/grid_types.h"
#include "level/quantize/k.h"
#include "level/quantize/simple.h"
#include "level/quantize/table.h"
#include "level/quantize/ternary.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

struct Quantizer {
  QuantType type;
  int block_cols;
  void (*quantize)(const Source& from, uint8_t* out);
};

constexpr Quantizer kQuantizers[] = {
    {QuantType::Q8_0, 32, quantize_q8_0},
    {QuantType::Q4_0, 32, quantize_symmetric<4>},
    {QuantType::Q4_1, 32, quantize_affine<4>},
    {QuantType::Q5_0, 32, quantize_symmetric<5>},
    {QuantType::Q5_1, 32, quantize_affine<5>},
    {QuantType::Q2_K, 256, quantize_q2_k},
    {QuantType::Q3_K, 256, quantize_q3_k},
    {QuantType::Q4_K, 256, quantize_q45_k<false>},
    {QuantType::Q5_K, 256, quantize_q45_k<true>},
    {QuantType::Q6_K, 256, quantize_q6_k},
    {QuantType::IQ4_NL, 32, quantize_iq4_nl},
    {QuantType::IQ4_XS, 256, quantize_iq4_xs},
    {QuantType::MXFP4, 32, quantize_mxfp4},
    {QuantType::TQ1_0, 256, quantize_tq1_0},
    {QuantType::TQ2_0, 256, quantize_tq2_0},
    {QuantType::IQ1_S, 256, quantize_iq1_s},
    {QuantType::IQ1_M, 256, quantize_iq1_m},
    {QuantType::IQ2_XXS, 256, quantize_iq2_xxs},
    {QuantType::IQ2_XS, 256, quantize_iq2_xs},
    {QuantType::IQ2_S, 256, quantize_iq2_s},
    {QuantType::IQ3_XXS, 256, quantize_iq3_xxs},
    {QuantType::IQ3_S, 256, quantize_iq3_s},
};

int block_cols(QuantType type) {
  for (const Quantizer& quantizer : kQuantizers)
    if (quantizer.type == type) return quantizer.block_cols;
  return 0;
}

void weigh(const float* x, const float* importance, int n, float* w) {
  double squares = 0;
  for (int i = 0; i < n; i++) squares += double{x[i]} * x[i];
  const float mean = static_cast<float>(squares / n);
  for (int i = 0; i < n; i++) w[i] = __builtin_sqrtf(mean + x[i] * x[i]);
  if (importance)
    for (int i = 0; i < n; i++) w[i] *= importance[i];
}

void quantize(QuantType type, const Source& from, uint8_t* out) {
  for (const Quantizer& quantizer : kQuantizers)
    if (quantizer.type == type) quantizer.quantize(from, out);
}

}  // namespace

extern const QuantizeOps quantize_ops;
const QuantizeOps quantize_ops = {block_cols, weigh, quantize};

}  // namespace llamaclust::LLAMACLUST_LEVEL
