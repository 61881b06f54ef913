#include "level/level.h"

#include <limits>

#include "simd/math.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

float block_maximum(const float* x) {
  return max_tree(max(max(load(x), load(x + 16)), max(load(x + 32), load(x + 48))));
}

// Loads x[0, n), followed by -infinity, for n < 16.
F32x16 load_tail(const float* x, int n) {
  alignas(64) float v[16];
  for (int i = 0; i < 16; i++) v[i] = i < n ? x[i] : kLowest;
  return load(v);
}

// Returns the maximum of x[0, n), for n < 64.
float short_block_maximum(const float* x, int n) {
  float greatest = kLowest;
  for (int i = 0; i < n; i++) greatest = x[i] > greatest ? x[i] : greatest;
  return greatest;
}

float maxima(const float* x, int n, float* blocks) {
  float greatest = kLowest;
  for (int i = 0; i < n; i += kRankBlock) {
    const float m = i + kRankBlock <= n ? block_maximum(x + i) : short_block_maximum(x + i, n - i);
    blocks[i / kRankBlock] = m;
    greatest = m > greatest ? m : greatest;
  }
  return greatest;
}

// Weights as high * 2^20 + low. Both parts are exact int32s.
struct Weights {
  I32x16 high, low;
};

// `wrong` becomes NaN if a weight is NaN.
INLINE Weights weigh_lanes(F32x16 x, F32x16 maximum, F32x16 divisor, F32x16* wrong) {
  const F32x16 scale = broadcast(0x1p20f);
  F32x16 w = exp(div(sub(x, maximum), divisor));
  *wrong = add(*wrong, w);
  w = select_less(w, broadcast(2.0f), w, zero());  // NaN cannot be converted to an integer.
  const I32x16 high = to_int(mul(w, scale));
  const F32x16 rest = sub(mul(w, scale), to_float(high));
  return {high, to_int(mul(rest, scale))};
}

void combine(Weights w, int n, int64_t* out) {
  alignas(64) int32_t high[16], low[16];
  store(high, w.high);
  store(low, w.low);
  for (int i = 0; i < n; i++) out[i] = (int64_t{high[i]} << 20) + low[i];
}

int64_t total(Weights w) {
  int64_t each[16], sum = 0;
  combine(w, 16, each);
  for (int64_t weight : each) sum += weight;
  return sum;
}

// Number of weights whose sum fits into an int32 lane.
constexpr int kSummands = 1024;

int64_t weigh(const float* x, int n, float maximum, float divisor, int64_t* weights) {
  const F32x16 m = broadcast(maximum), d = broadcast(divisor);
  F32x16 wrong = zero();
  int64_t sum = 0;
  for (int begin = 0; begin < n; begin += kSummands * 16) {
    const int end = n - begin < kSummands * 16 ? n : begin + kSummands * 16;
    Weights all{broadcast(0), broadcast(0)};
    for (int i = begin; i < end; i += 16) {
      const int lanes = end - i < 16 ? end - i : 16;
      const Weights w = weigh_lanes(lanes < 16 ? load_tail(x + i, lanes) : load(x + i), m, d, &wrong);
      all = {add(all.high, w.high), add(all.low, w.low)};
      if (weights) combine(w, lanes, weights + i);
    }
    sum += total(all);
  }
  const float check = sum_tree(wrong);
  return check == check ? sum : 0;
}

void exp_all(const float* x, int n, float* out) {
  for (int i = 0; i < n; i += 16) {
    alignas(64) float v[16];
    const int lanes = n - i < 16 ? n - i : 16;
    store(v, exp(lanes < 16 ? load_tail(x + i, lanes) : load(x + i)));
    for (int lane = 0; lane < lanes; lane++) out[i + lane] = v[lane];
  }
}

}  // namespace

extern const SamplerOps sampler_ops;
const SamplerOps sampler_ops = {&maxima, &weigh, &exp_all};

}  // namespace llamaclust::LLAMACLUST_LEVEL
