// Scans of Mamba 2. A lane has one channel and sums over the state in order. One pass over the state computes several
// rows, but each value of the state is updated row after row.
#include "level/level.h"
#include "simd/math.h"
#include "simd/pieces.h"

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

constexpr int kRowsAtOnce = 4;

void time_steps(float* steps, float bias, float rate, int n, float* decays) {
  each_lanes(n, [&](int i, auto read, auto write) {
    const F32x16 step = softplus(add(read(steps + i), broadcast(bias)));
    write(steps + i, step);
    write(decays + i, exp(mul(step, broadcast(rate))));
  });
}

// Computes channels [i, i + 16) of rows [first, first + rows).
template <int rows, typename Read, typename Write>
INLINE void scan_rows(const ScanRows& task, int first, int i, Read read, Write write) {
  const float *b[rows], *c[rows];
  F32x16 x[rows], sums[rows];
  for (int row = 0; row < rows; row++) {
    const ptrdiff_t at = (first + row) * task.in_stride;
    b[row] = task.b + at;
    c[row] = task.c + at;
    x[row] = mul(read(task.x + at + i), broadcast(task.steps[first + row]));
    sums[row] = zero();
  }
  float* place = task.state + i;
  for (int k = 0; k < task.state_size; k++, place += task.head_dim) {
    F32x16 state = read(place);
    for (int row = 0; row < rows; row++) {
      state = fma(state, broadcast(task.decays[first + row]), mul(broadcast(b[row][k]), x[row]));
      sums[row] = fma(state, broadcast(c[row][k]), sums[row]);
    }
    write(place, state);
  }
  for (int row = 0; row < rows; row++) {
    const F32x16 input = read(task.x + (first + row) * task.in_stride + i);
    write(task.out + (first + row) * task.out_stride + i, fma(input, broadcast(task.skip), sums[row]));
  }
}

void scan(const ScanRows& task) {
  each_lanes(task.head_dim, [&](int i, auto read, auto write) {
    int row = 0;
    for (; row + kRowsAtOnce <= task.rows; row += kRowsAtOnce) scan_rows<kRowsAtOnce>(task, row, i, read, write);
    for (; row < task.rows; row++) scan_rows<1>(task, row, i, read, write);
  });
}

}  // namespace

extern const ScanOps scan_ops;
const ScanOps scan_ops = {time_steps, scan};

}  // namespace llamaclust::LLAMACLUST_LEVEL
