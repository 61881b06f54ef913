// The gated delta rule. Each row takes one pass over the state, which computes the row's update and output and the next
// row's sums.
#pragma once

#include "level/state_ops.h"
#include "simd/lanes.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

template <int pieces>
struct DeltaSums {
  F32x16 sums[pieces];
};

template <int pieces>
struct DeltaRule {
  explicit DeltaRule(const DeltaRows& rows) : task(rows) {}

  const DeltaRows& task;
  float weights[kMaxKeyChannels];  // Factors of the state in the next row's sums.

  const float* decay_of(int row) const { return task.decay + static_cast<ptrdiff_t>(row) * task.decay_width; }
  const float* keys_of(const float* first, int row) const { return first + static_cast<ptrdiff_t>(row) * task.key_width; }

  INLINE void weigh(int row) {
    const float *k = keys_of(task.k, row), *decay = decay_of(row);
    for (int key = 0; key < task.keys; key++) weights[key] = decay[task.per_key ? key : 0] * k[key];
  }

  INLINE DeltaSums<pieces> first_sums() const {
    DeltaSums<pieces> seen;
    for (int i = 0; i < pieces; i++) seen.sums[i] = zero();
    const float* state = task.state;
    for (int key = 0; key < task.keys; key++, state += 16 * pieces)
      for (int i = 0; i < pieces; i++) seen.sums[i] = fma(load(state + 16 * i), broadcast(weights[key]), seen.sums[i]);
    return seen;
  }

  // Computes the sums of the next row (if there is one) from those of this row.
  template <bool has_next>
  INLINE DeltaSums<pieces> update(int row, const DeltaSums<pieces>& seen) {
    const float *q = keys_of(task.q, row), *k = keys_of(task.k, row), *decay = decay_of(row);
    const ptrdiff_t at = static_cast<ptrdiff_t>(row) * task.value_width;
    const F32x16 beta = broadcast(task.beta[static_cast<ptrdiff_t>(row) * task.beta_width]);
    F32x16 delta[pieces], out[pieces];
    DeltaSums<pieces> next;
    for (int i = 0; i < pieces; i++) {
      delta[i] = mul(sub(load(task.v + at + 16 * i), seen.sums[i]), beta);
      out[i] = next.sums[i] = zero();
    }
    float* state = task.state;
    for (int key = 0; key < task.keys; key++, state += 16 * pieces) {
      const F32x16 kept = broadcast(decay[task.per_key ? key : 0]), added = broadcast(k[key]), read = broadcast(q[key]);
      for (int i = 0; i < pieces; i++) {
        const F32x16 value = fma(added, delta[i], mul(load(state + 16 * i), kept));
        store(state + 16 * i, value);
        out[i] = fma(value, read, out[i]);
        if constexpr (has_next) next.sums[i] = fma(value, broadcast(weights[key]), next.sums[i]);
      }
    }
    for (int i = 0; i < pieces; i++) store(task.out + at + 16 * i, out[i]);
    return next;
  }

  void run() {
    weigh(0);
    DeltaSums<pieces> seen = first_sums();
    for (int row = 0; row + 1 < task.rows; row++) {
      weigh(row + 1);
      seen = update<true>(row, seen);
    }
    update<false>(task.rows - 1, seen);
  }
};

void delta_rule(const DeltaRows& rows) {
  if (rows.channels == 32)
    DeltaRule<2>(rows).run();
  else
    DeltaRule<1>(rows).run();
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
