// Row by row steps: each thread does its own rows, or all of them into buffers of its own.
#include <cstring>

#include "executor/worker.h"
#include "pack/pack.h"

namespace llamaclust {

void Worker::compute(const EmbedStep& step, Range rows) {
  for (int row = rows.begin; row < rows.end; row++)
    run_.level.matmul.dequantize_row(step.weight, run_.batch.tokens[row], line(step.out, row));
}

void Worker::compute(const InputStep& step, Range rows) {
  const size_t width = static_cast<size_t>(line_width(step.out));
  for (int row = rows.begin; row < rows.end; row++)
    memcpy(line(step.out, row), run_.batch.hidden + static_cast<size_t>(row) * width, width * sizeof(float));
}

void Worker::compute(const NormStep& step, Range rows) {
  const int width = static_cast<int>(step.weight.size()), parts = line_width(step.x) / width;
  for (int i = rows.begin * parts; i < rows.end * parts; i++) {
    const size_t offset = static_cast<size_t>(i) * static_cast<size_t>(width);
    run_.level.vector.rms_norm(line(step.x, 0) + offset, step.weight.data(), step.epsilon, width,
                               line(step.out, 0) + offset);
  }
}

void Worker::compute(const LayerNormStep& step, Range rows) {
  for (int row = rows.begin; row < rows.end; row++)
    run_.level.vector.layer_norm(line(step.x, row), step.weight.data(), step.bias.data(), step.epsilon,
                                 line_width(step.x), line(step.out, row));
}

void Worker::compute(const PositionStep& step, Range rows) {
  for (int row = rows.begin; row < rows.end; row++) {
    float* out = line(step.out, row);
    run_.level.matmul.dequantize_row(step.weight, run_.batch.positions[row], out);
    run_.level.vector.elementwise(RowOp::add, line(step.x, row), out, 0, line_width(step.out), out);
  }
}

void Worker::compute(const RopeStep& step, Range rows) {
  const RotationTable& table = run_.rotations[step.rotation.table];
  for (int row = rows.begin; row < rows.end; row++) {
    const float* angles = table.row(run_.batch.positions[row]);
    for (int head = 0; head < step.heads; head++)
      run_.level.vector.rope(line(step.x, row) + head * step.head_dim, angles, table.pairs(), step.head_dim,
                             step.rotation.style, line(step.out, row) + head * step.head_dim);
  }
}

void Worker::compute(const ElementwiseStep& step, Range rows) {
  if (!buffer(step.out).private_copy && alone_ && thread_ != 0) return;
  for (int row = rows.begin; row < rows.end; row++)
    run_.level.vector.elementwise(step.op, line(step.x, row), line(step.y, row), step.number, line_width(step.out),
                                  line(step.out, row));
}

void Worker::compute(const SliceStep& step, Range rows) {
  for (int row = rows.begin; row < rows.end; row++)
    memcpy(line(step.out, row), line(step.x, row) + step.start,
           static_cast<size_t>(line_width(step.out)) * sizeof(float));
}

void Worker::compute(const SigmoidGateStep& step, Range rows) {
  const int cols = static_cast<int>(step.weight.size());
  for (int row = rows.begin; row < rows.end; row++) {
    const float factor = run_.level.vector.sigmoid_dot(line(step.x, row), step.weight.data(), cols);
    const float* y = line(step.y, row);
    run_.level.vector.elementwise(RowOp::scale, y, y, factor, line_width(step.out), line(step.out, row));
  }
}

void Worker::compute(const QuantizeStep& step, Range rows) {
  const Buffer& x = buffer(step.x);
  const size_t bytes = activation_bytes(step.format, x.width);
  const float* from = line(step.x, 0);
  uint8_t* to = slot(step.slot);
  for (int i = rows.begin * x.multiple; i < rows.end * x.multiple; i++)
    run_.level.matmul.quantize(step.format, from + static_cast<size_t>(i) * static_cast<size_t>(x.width), x.width,
                               to + static_cast<size_t>(i) * bytes);
}

// The best experts first, ties to the lower id; the sum of their weights is added in that order.
void Worker::compute(const ChooseStep& step, Range rows) {
  float* probabilities = reinterpret_cast<float*>(run_.workspace.scratch(thread_));
  for (int row = rows.begin; row < rows.end; row++) {
    float *ids = line(step.out, row), *weights = ids + step.used, sum = 0.0f;
    memcpy(probabilities, line(step.logits, row), static_cast<size_t>(step.experts) * sizeof(float));
    run_.level.vector.softmax(probabilities, step.experts);
    for (int rank = 0; rank < step.used; rank++) {
      int best = 0;
      for (int id = 1; id < step.experts; id++)
        if (probabilities[id] > probabilities[best]) best = id;
      ids[rank] = static_cast<float>(best);
      weights[rank] = probabilities[best];
      sum += probabilities[best];
      probabilities[best] = -1.0f;
    }
    for (int rank = 0; step.normalized && rank < step.used; rank++) weights[rank] /= sum;
  }
}

void Worker::compute(const CombineStep& step, Range rows) {
  const int width = buffer(step.out).width;
  for (int row = rows.begin; row < rows.end; row++) {
    const float *weights = line(step.choice, row) + step.used, *x = line(step.x, row);
    float* out = line(step.out, row);
    memset(out, 0, static_cast<size_t>(width) * sizeof(float));
    for (int rank = 0; rank < step.used; rank++)
      run_.level.vector.add_scaled(x + static_cast<size_t>(rank) * static_cast<size_t>(width), weights[rank], width,
                                   out);
  }
}

void Worker::execute(const SelectStep& step) {
  const float* x = line(step.x, 0);
  const size_t width = static_cast<size_t>(line_width(step.x));
  set_rows(static_cast<int>(run_.batch.output_rows.size()));
  const Range rows = own_rows();
  for (int row = rows.begin; row < rows.end; row++) {
    const size_t from = static_cast<size_t>(run_.batch.output_rows[row]);
    memcpy(line(step.out, row), x + from * width, width * sizeof(float));
  }
}

void Worker::compute(const OutputStep& step, Range rows) {
  if (alone_ && thread_ != 0) return;
  for (int row = rows.begin; row < rows.end; row++)
    memcpy(line(step.out, row), line(step.x, row), static_cast<size_t>(line_width(step.x)) * sizeof(float));
}

}  // namespace llamaclust
