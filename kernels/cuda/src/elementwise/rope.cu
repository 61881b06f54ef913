// Rotation of queries and keys by their positions.
#include "lines.cuh"
#include "math.cuh"
#include "rope.cuh"

namespace llamaclust::cuda {

// rotation[row] = cosines, then sines, of position * frequencies, both times `scale`. Computed once for all layers with
// this table. Grid: (pairs / 64 rounded up, rows), blocks of 64 threads.
KERNEL(64, rotation, const int32_t* __restrict__ positions, const double* __restrict__ frequencies, double scale,
       int32_t pairs, const int32_t* rows, float* __restrict__ rotation) {
  const int row = blockIdx.y, i = 64 * blockIdx.x + threadIdx.x;
  if (row >= *rows || i >= pairs) return;
  double sine, cosine;
  sine_and_cosine(positions[row] * frequencies[i], sine, cosine);
  rotation[line(row, 2 * pairs) + i] = static_cast<float>(cosine * scale);
  rotation[line(row, 2 * pairs) + pairs + i] = static_cast<float>(sine * scale);
}

// The same with sections: pair i uses positions[sections[i]][row]. A section has max_rows positions.
KERNEL(64, rotation_in_sections, const int32_t* __restrict__ positions, int32_t max_rows,
       const int32_t* __restrict__ sections, const double* __restrict__ frequencies, double scale, int32_t pairs,
       const int32_t* rows, float* __restrict__ rotation) {
  const int row = blockIdx.y, i = 64 * blockIdx.x + threadIdx.x;
  if (row >= *rows || i >= pairs) return;
  double sine, cosine;
  sine_and_cosine(positions[line(sections[i], max_rows) + row] * frequencies[i], sine, cosine);
  rotation[line(row, 2 * pairs) + i] = static_cast<float>(cosine * scale);
  rotation[line(row, 2 * pairs) + pairs + i] = static_cast<float>(sine * scale);
}

// Rotates x[row] in place: in each head the pairs (2i, 2i + 1), or (i, i + pairs) if `neox`. Later channels are
// unchanged. Grid: (heads * pairs / 256 rounded up, rows), blocks of 256 threads.
KERNEL(256, rope, float* __restrict__ x, const float* __restrict__ rotation, int32_t heads, int32_t head_dim,
       int32_t pairs, int32_t neox, const int32_t* rows) {
  const int row = blockIdx.y, n = 256 * blockIdx.x + threadIdx.x, head = n / pairs, i = n % pairs;
  if (row >= *rows || head >= heads) return;
  Rotation{rotation + line(row, 2 * pairs), pairs, neox}.turn(x + line(row, heads * head_dim) + head * head_dim, i);
}

}  // namespace llamaclust::cuda
