// Row by row arithmetic. Every output is a fixed sequence of IEEE operations, independent of the register width.
#include "level/level.h"
#include "simd/math.h"
#include "simd/pieces.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Sums n elements in 64 interleaved lanes. accumulate(lanes, i, load) adds sixteen elements, which start at i; element
// i goes to lane i % 64. Then halves are added: 32 + 32, 16 + 16, ... 1 + 1. Missing elements of the last piece are 0.
template <typename Accumulate>
INLINE float sum_interleaved(int n, Accumulate accumulate) {
  F32x16 lanes[4] = {zero(), zero(), zero(), zero()};
  const auto whole = [](const float* p) { return load(p); };
  int i = 0;
  for (; i + 64 <= n; i += 64)
    for (int k = 0; k < 4; k++) lanes[k] = accumulate(lanes[k], i + 16 * k, whole);
  for (int k = 0; i < n; i += 16, k++) {
    const int rest = n - i;
    if (rest < 16)
      lanes[k] = accumulate(lanes[k], i, [rest](const float* p) { return load_first(rest, p); });
    else
      lanes[k] = accumulate(lanes[k], i, whole);
  }
  return sum_tree(add(add(lanes[0], lanes[2]), add(lanes[1], lanes[3])));
}

INLINE F32x16 sum_of(const float* x, int n) {
  return broadcast(sum_interleaved(n, [x](F32x16 sum, int i, auto read) { return add(sum, read(x + i)); }));
}

INLINE float mean_of_squares(const float* x, int n) {
  const float squares = sum_interleaved(n, [x](F32x16 sum, int i, auto read) {
    const F32x16 v = read(x + i);
    return fma(v, v, sum);
  });
  return squares / static_cast<float>(n);
}

// 1 / sqrt(mean(x^2) + epsilon)
INLINE F32x16 inverse_root(const float* x, float epsilon, int n) {
  return broadcast(1.0f / __builtin_sqrtf(mean_of_squares(x, n) + epsilon));
}

void rms_norm(const float* x, const float* weight, float epsilon, int n, float* out) {
  const F32x16 scale = inverse_root(x, epsilon, n);
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, mul(mul(read(x + i), scale), read(weight + i))); });
}

// out = x - mean(x)
INLINE void centre(const float* x, int n, float* out) {
  const F32x16 mean = div(sum_of(x, n), broadcast(static_cast<float>(n)));
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, sub(read(x + i), mean)); });
}

void layer_norm(const float* x, const float* weight, const float* bias, float epsilon, int n, float* out) {
  centre(x, n, out);
  const F32x16 scale = inverse_root(out, epsilon, n);
  each_lanes(n, [&](int i, auto read, auto write) {
    write(out + i, fma(mul(read(out + i), scale), read(weight + i), read(bias + i)));
  });
}

struct RopePairs {
  F32x16 first, second;
};

// Load and store sixteen pairs of adjacent floats.
INLINE RopePairs load_neighbours(const float* x) {
  alignas(64) float first[16], second[16];
  for (int i = 0; i < 16; i++) {
    first[i] = x[2 * i];
    second[i] = x[2 * i + 1];
  }
  return {load(first), load(second)};
}
INLINE void store_neighbours(float* out, const RopePairs& pairs) {
  alignas(64) float first[16], second[16];
  store(first, pairs.first);
  store(second, pairs.second);
  for (int i = 0; i < 16; i++) {
    out[2 * i] = first[i];
    out[2 * i + 1] = second[i];
  }
}

INLINE RopePairs rotate(const RopePairs& x, const float* cosine, const float* sine) {
  const F32x16 c = load(cosine), s = load(sine);
  return {fnma(x.second, s, mul(x.first, c)), fma(x.second, c, mul(x.first, s))};
}

void rope(const float* x, const float* rotation, int pairs, int head_dim, RopeStyle style, float* out) {
  const float *cosine = rotation, *sine = rotation + pairs;
  const int step = style == RopeStyle::Norm ? 2 : 1, partner = style == RopeStyle::Norm ? 1 : pairs;
  int i = 0;
  for (; i + 16 <= pairs; i += 16)
    if (style == RopeStyle::Norm) {
      store_neighbours(out + 2 * i, rotate(load_neighbours(x + 2 * i), cosine + i, sine + i));
    } else {
      const RopePairs rotated = rotate({load(x + i), load(x + i + pairs)}, cosine + i, sine + i);
      store(out + i, rotated.first);
      store(out + i + pairs, rotated.second);
    }
  for (; i < pairs; i++) {
    const float a = x[i * step], b = x[i * step + partner];
    out[i * step] = __builtin_fmaf(-b, sine[i], a * cosine[i]);
    out[i * step + partner] = __builtin_fmaf(b, cosine[i], a * sine[i]);
  }
  if (out != x)
    for (int i = 2 * pairs; i < head_dim; i++) out[i] = x[i];
}

template <typename F>
INLINE void map(const float* x, int n, float* out, F f) {
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, f(read(x + i))); });
}

template <typename F>
INLINE void map(const float* x, const float* y, int n, float* out, F f) {
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, f(read(x + i), read(y + i))); });
}

void elementwise(RowOp op, const float* x, const float* y, float number, int n, float* out) {
  const F32x16 by = broadcast(number);
  switch (op) {
    case RowOp::add: return map(x, y, n, out, [](F32x16 a, F32x16 b) { return add(a, b); });
    case RowOp::mul: return map(x, y, n, out, [](F32x16 a, F32x16 b) { return mul(a, b); });
    case RowOp::scale: return map(x, n, out, [by](F32x16 a) { return mul(a, by); });
    case RowOp::soft_cap: return map(x, n, out, [by](F32x16 a) { return soft_cap(a, by); });
    // If an operand is NaN, the second one is returned.
    case RowOp::at_least: return map(x, n, out, [by](F32x16 a) { return max(by, a); });
    case RowOp::at_most: return map(x, n, out, [by](F32x16 a) { return min(by, a); });
    case RowOp::silu_mul: return map(x, y, n, out, [](F32x16 a, F32x16 b) { return mul(silu(a), b); });
    case RowOp::clamped_swiglu:
      return map(x, y, n, out, [by](F32x16 a, F32x16 b) { return clamped_swiglu(a, b, by); });
#define ACTIVATION(function) \
  case RowOp::function: return map(x, n, out, [](F32x16 a) { return function(a); });
      LLAMACLUST_ACTIVATIONS(ACTIVATION)
#undef ACTIVATION
  }
}

float sigmoid_dot(const float* x, const float* y, int n) {
  alignas(64) float out[16];
  const auto product = [x, y](F32x16 sum, int i, auto read) { return fma(read(x + i), read(y + i), sum); };
  const float sum = sum_interleaved(n, product);
  store(out, sigmoid(broadcast(sum)));
  return out[0];
}

void add_scaled(const float* x, float scale, int n, float* out) {
  const F32x16 factor = broadcast(scale);
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, fma(read(x + i), factor, read(out + i))); });
}

void softmax(float* x, int n) {
  float maximum = x[0];
  for (int i = 1; i < n; i++) maximum = maximum > x[i] ? maximum : x[i];
  const F32x16 shift = broadcast(maximum);
  each_lanes(n, [&](int i, auto read, auto write) { write(x + i, exp(sub(read(x + i), shift))); });
  const F32x16 sum = sum_of(x, n);
  each_lanes(n, [&](int i, auto read, auto write) { write(x + i, div(read(x + i), sum)); });
}

void decay(const float* x, const float* weight, const float* bias, int n, float* out) {
  each_lanes(n, [&](int i, auto read, auto write) {
    write(out + i, exp(mul(softplus(add(read(x + i), read(bias + i))), read(weight + i))));
  });
}

void match_magnitude(const float* x, const float* y, float epsilon, int n, float* out) {
  const float mean = mean_of_squares(x, n), least = epsilon > mean ? epsilon : mean;  // NaN for NaN
  const F32x16 factor = broadcast(__builtin_sqrtf(mean_of_squares(y, n)) / __builtin_sqrtf(least));
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, mul(read(x + i), factor)); });
}

void gaussian_top_k(const float* x, float factor, int n, float* out) {
  centre(x, n, out);
  const F32x16 cutoff = broadcast(factor * __builtin_sqrtf(mean_of_squares(out, n)));
  each_lanes(n, [&](int i, auto read, auto write) { write(out + i, max(zero(), sub(read(out + i), cutoff))); });
}

}  // namespace

extern const VectorOps vector_ops;
const VectorOps vector_ops = {rms_norm,   layer_norm, rope,  elementwise,     sigmoid_dot,
                              add_scaled, softmax,    decay, match_magnitude, gaussian_top_k};

}  // namespace llamaclust::LLAMACLUST_LEVEL
