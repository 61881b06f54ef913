// Row by row steps. Each thread computes its own rows, or computes all rows into its own buffers.
#include <algorithm>
#include <cstring>
#include <limits>

#include "executor/worker.h"
#include "pack/pack.h"
#include "runtime/math.h"

namespace llamaclust {
namespace {

constexpr float kLeastWeightSum = 0x1p-14f;

// Removes the maximum and returns its index, the lowest of equal ones; 0 if all entries are NaN.
int take_best(float* x, int count) {
  int best = 0;
  float greatest = -std::numeric_limits<float>::infinity();
  for (int i = 0; i < count; i++)
    if (x[i] > greatest) greatest = x[best = i];
  x[best] = -std::numeric_limits<float>::infinity();
  return best;
}

float sum_of_best_two(const float* x, int count) {
  float first = -std::numeric_limits<float>::infinity(), second = first;
  for (int i = 0; i < count; i++) {
    second = std::max(second, std::min(first, x[i]));
    first = std::max(first, x[i]);
  }
  return count == 1 ? first : first + second;
}

}  // namespace

// Computes a step for one row.
struct RowStep {
  const Worker& worker;
  const int row;

  float* line(BufferId id) const { return worker.line(id, row); }
  const Batch& batch() const { return worker.batch(); }
  const VectorOps& vector() const { return worker.stage_.level.vector; }
  const MatmulOps& matmul() const { return worker.stage_.level.matmul; }
  // Returns whether thread 0 alone does the step, because each thread computes all rows but this step's buffer is
  // shared.
  bool is_done_elsewhere() const { return worker.alone_ && worker.thread_ != 0; }
  void copy(const float* from, BufferId out) const {
    memcpy(line(out), from, static_cast<size_t>(worker.line_width(out)) * sizeof(float));
  }

  void operator()(const EmbedStep& step) const {
    matmul().dequantize_row(step.weight, batch().tokens[row], line(step.out));
  }

  void operator()(const InputStep& step) const {
    copy(batch().hidden + static_cast<size_t>(row) * static_cast<size_t>(worker.line_width(step.out)), step.out);
  }

  void operator()(const NormStep& step) const {
    // 1 if each part has its own weights, else 0.
    const size_t own = step.weight.size() == static_cast<size_t>(step.width) ? 0 : 1;
    for (int i = 0; i < worker.line_width(step.x); i += step.width)
      vector().rms_norm(line(step.x) + i, step.weight.data() + own * static_cast<size_t>(i), step.epsilon, step.width,
                        line(step.out) + i);
  }

  void operator()(const LayerNormStep& step) const {
    vector().layer_norm(line(step.x), step.weight.data(), step.bias.data(), step.epsilon, worker.line_width(step.x),
                        line(step.out));
  }

  void operator()(const PositionStep& step) const {
    float* out = line(step.out);
    matmul().dequantize_row(step.weight, batch().positions[row], out);
    vector().elementwise(RowOp::add, line(step.x), out, 0, worker.line_width(step.out), out);
  }

  void operator()(const AddRowStep& step) const {
    float* out = line(step.out);
    matmul().dequantize_row(step.weight, step.row, out);
    vector().elementwise(RowOp::add, line(step.x), out, 0, worker.line_width(step.out), out);
  }

  void operator()(const RopeStep& step) const {
    const int pairs = worker.stage_.rotations[step.rotation.table].pairs();
    const float* angles = worker.angles(step.rotation.table, row);
    for (int i = 0; i < step.heads * step.head_dim; i += step.head_dim)
      vector().rope(line(step.x) + i, angles, pairs, step.head_dim, step.rotation.style, line(step.out) + i);
  }

  void operator()(const ElementwiseStep& step) const {
    if (!worker.buffer(step.out).private_copy && is_done_elsewhere()) return;
    vector().elementwise(step.op, line(step.x), line(step.y), step.number, worker.line_width(step.out), line(step.out));
  }

  void operator()(const AddAdaptedStep& step) const {
    if (is_done_elsewhere() || *line(step.scale) == 0.0f) return;
    vector().elementwise(RowOp::add, line(step.x), line(step.y), 0, worker.line_width(step.x), line(step.x));
  }

  void operator()(const PositionScaleStep& step) const {
    const double lengths = 1.0 + (int64_t{batch().positions[row]} + step.offset) / step.length;
    const float factor = static_cast<float>(1.0 + step.factor * log_double(lengths));
    const float* x = line(step.x);
    vector().elementwise(RowOp::scale, x, x, factor, worker.line_width(step.out), line(step.out));
  }

  void operator()(const CopyChannelsStep& step) const {
    if (!worker.buffer(step.out).private_copy && is_done_elsewhere()) return;
    const Buffer &x = worker.buffer(step.x), &out = worker.buffer(step.out);
    const float* from = line(step.x) + step.x_start;
    float* to = line(step.out) + step.out_start;
    for (int i = 0; i < x.multiple * step.parts; i++, from += x.width / step.parts, to += out.width / step.parts)
      memcpy(to, from, static_cast<size_t>(step.channels) * sizeof(float));
  }

  // Given rows are identified by their row numbers in the run.
  void operator()(const GivenStep& step) const {
    const GivenTable& given = batch().given;
    const int32_t own = worker.band_->first + row;
    const auto found = std::ranges::lower_bound(given.rows, own);
    const int width = worker.line_width(step.out);
    if (found == given.rows.end() || *found != own) {
      if (step.out != step.x) copy(line(step.x), step.out);
      return;
    }
    const float* from = given.values + (found - given.rows.begin()) * given.width + step.level * width;
    if (step.adds) return vector().elementwise(RowOp::add, line(step.x), from, 0, width, line(step.out));
    copy(from, step.out);
  }

  void operator()(const MixStep& step) const {
    const int width = step.width, parts = worker.line_width(step.x) / width;
    const float *y = line(step.y), *factors = step.coefficients < 0 ? nullptr : line(step.coefficients);
    float* out = line(step.out);
    if (step.out != step.y) copy(y, step.out);
    for (int i = step.first; i < worker.line_width(step.out) / width; i++)
      for (int j = 0; j < parts; j++)
        vector().add_scaled(line(step.x) + j * width, factors == nullptr ? 1.0f : factors[i * parts + j] + step.offset,
                            width, out + i * width);
  }

  void operator()(const MagnitudeStep& step) const {
    const int width = worker.line_width(step.y);
    for (int i = 0; i < worker.line_width(step.x); i += width)
      vector().match_magnitude(line(step.x) + i, line(step.y), step.epsilon, width, line(step.out) + i);
  }

  void operator()(const TopKStep& step) const {
    vector().gaussian_top_k(line(step.x), step.factor, worker.line_width(step.x), line(step.out));
  }

  void operator()(const ChannelScaleStep& step) const {
    vector().elementwise(RowOp::mul, line(step.x), step.weight.data(), 0, worker.line_width(step.out), line(step.out));
  }

  void operator()(const SigmoidGateStep& step) const {
    const float *y = line(step.y), *weight = step.weight.data();
    const float factor = vector().sigmoid_dot(line(step.x), weight, static_cast<int>(step.weight.size()));
    vector().elementwise(RowOp::scale, y, y, factor, worker.line_width(step.out), line(step.out));
  }

  void operator()(const DecayStep& step) const {
    vector().decay(line(step.x), step.weight.data(), step.bias.data(), worker.line_width(step.x), line(step.out));
  }

  void operator()(const QuantizeStep& step) const {
    const Buffer& x = worker.buffer(step.x);
    const int cols = x.width / step.parts, lines = x.multiple * step.parts;
    const size_t bytes = activation_bytes(step.format, cols), first = static_cast<size_t>(row) * lines;
    const float* from = line(step.x);
    uint8_t* to = worker.slot(step.slot) + first * bytes;
    for (int i = 0; i < lines; i++, from += cols, to += bytes) matmul().quantize(step.format, from, cols, to);
  }

  void operator()(const PackStep& step) const {
    if (!is_done_elsewhere()) matmul().pack(step.format, line(step.x), worker.line_width(step.x), line(step.out));
  }

  void operator()(const UnpackStep& step) const {
    const Buffer& x = worker.buffer(step.x);
    const int cols = worker.stage_.plan.unpacked_cols(step);
    const size_t bytes = activation_bytes(step.format, cols), first = static_cast<size_t>(row) * x.multiple;
    const float* from = line(step.x);
    uint8_t* to = worker.slot(step.slot) + first * bytes;
    for (int i = 0; i < x.multiple; i++, from += x.width, to += bytes) matmul().unpack(step.format, from, cols, to);
  }

  // Chooses the best experts first, the lower id among equal ones, and sums their weights in that order. A row of NaN
  // chooses expert 0 at every rank.
  void operator()(const ChooseStep& step) const {
    float* scores = reinterpret_cast<float*>(worker.stage_.workspace.scratch(worker.thread_));
    float *selection = scores + step.experts, *ids = line(step.out), *weights = ids + step.used, sum = 0.0f;
    memcpy(scores, line(step.logits), static_cast<size_t>(step.experts) * sizeof(float));
    if (step.gating == Gating::Softmax) vector().softmax(scores, step.experts);
    if (step.gating == Gating::Sigmoid) vector().elementwise(RowOp::sigmoid, scores, scores, 0, step.experts, scores);
    select_from(step, scores, selection);
    for (int rank = 0; rank < step.used; rank++) {
      const int best = take_best(selection, step.experts);
      ids[rank] = static_cast<float>(best);
      weights[rank] = scores[best];
    }
    if (step.gating == Gating::SoftmaxOfChosen) vector().softmax(weights, step.used);
    for (int rank = 0; rank < step.used; rank++) sum += weights[rank];
    sum = std::max(sum, kLeastWeightSum);
    for (int rank = 0; step.normalized && rank < step.used; rank++) weights[rank] /= sum;
    for (int rank = 0; step.scale != 1.0f && rank < step.used; rank++) weights[rank] *= step.scale;
    for (int rank = 0; !step.expert_scales.empty() && rank < step.used; rank++)
      weights[rank] *= step.expert_scales[static_cast<size_t>(ids[rank])];
  }

  // Computes the values by which experts are chosen. Experts of groups that are not chosen get -infinity.
  void select_from(const ChooseStep& step, const float* scores, float* selection) const {
    if (step.selection_bias.empty())
      memcpy(selection, scores, static_cast<size_t>(step.experts) * sizeof(float));
    else
      vector().elementwise(RowOp::add, scores, step.selection_bias.data(), 0, step.experts, selection);
    if (step.groups == 1) return;
    const int each = step.experts / step.groups;
    float *sums = selection + step.experts, *kept = sums + step.groups;
    for (int group = 0; group < step.groups; group++) sums[group] = sum_of_best_two(selection + group * each, each);
    std::fill_n(kept, step.groups, 0.0f);
    for (int i = 0; i < step.used_groups; i++) kept[take_best(sums, step.groups)] = 1.0f;
    for (int group = 0; group < step.groups; group++)
      if (kept[group] == 0.0f) std::fill_n(selection + group * each, each, -std::numeric_limits<float>::infinity());
  }

  void operator()(const ExpertRowStep& step) const {
    const int width = worker.buffer(step.out).width;
    const float *ids = line(step.choice), *x = line(step.x);
    float* out = line(step.out);
    const ExpertIds own = step.ids();
    for (int rank = 0; rank < step.used; rank++, x += width, out += width) {
      if (!own.has(ids[rank])) continue;
      matmul().dequantize_row(step.weight, static_cast<int>(own.place(ids[rank])), out);
      vector().elementwise(RowOp::add, x, out, 0, width, out);
    }
  }

  void operator()(const PlaceExpertsStep& step) const {
    if (!worker.buffer(step.out).private_copy && is_done_elsewhere()) return;
    const size_t width = static_cast<size_t>(worker.buffer(step.x).width);
    const float *ids = line(step.choice), *x = line(step.x);
    const float* given = step.given < 0 ? nullptr : line(step.given) + step.given_start;
    float* out = line(step.out) + step.out_start;
    const ExpertIds own = step.ids();
    for (int rank = 0; rank < step.used; rank++, x += width, out += width) {
      const float* from = own.has(ids[rank]) ? x : given == nullptr ? nullptr : given + static_cast<size_t>(rank) * width;
      if (from == nullptr)
        memset(out, 0, width * sizeof(float));
      else
        memcpy(out, from, width * sizeof(float));
    }
  }

  void operator()(const WeighStep& step) const {
    const int width = worker.buffer(step.out).width;
    const float *weights = line(step.choice) + step.used, *x = line(step.x);
    float* out = line(step.out);
    for (int rank = 0; rank < step.used; rank++, out += width)
      vector().elementwise(RowOp::scale, x, x, weights[rank], width, out);
  }

  void operator()(const CombineStep& step) const {
    const int width = worker.buffer(step.out).width;
    const float *weights = line(step.choice) + step.used, *x = line(step.x);
    float* out = line(step.out);
    memset(out, 0, static_cast<size_t>(width) * sizeof(float));
    for (int rank = 0; rank < step.used; rank++, x += width)
      vector().add_scaled(x, step.weighs ? weights[rank] : 1.0f, width, out);
  }

  void operator()(const OutputStep& step) const {
    if (!is_done_elsewhere()) copy(line(step.x), step.out);
  }

  template <typename Shared>
  void operator()(const Shared&) const {}
};

void Worker::compute_row(const Step& step, int row) { std::visit(RowStep{*this, row}, step); }

void Worker::execute(const SelectStep& step) {
  const float* x = line(step.x, 0);
  const size_t width = static_cast<size_t>(line_width(step.x));
  set_rows(static_cast<int>(batch().output_rows.size()));
  share_rows([&](int begin, int end) {
    for (int row = begin; row < end; row++) {
      const size_t from = static_cast<size_t>(batch().output_rows[row]);
      memcpy(line(step.out, row), x + from * width, width * sizeof(float));
    }
  });
}

void Worker::execute(const MergeStep& step) {
  const float* first = line(step.x, 0);
  const int width = line_width(step.x);
  first_ /= step.factor;
  set_rows(rows_ / step.factor);
  share_rows([&](int begin, int end) {
    const float* x = first + int64_t{begin} * step.factor * width;
    for (int row = begin; row < end; row++) {
      float* out = line(step.out, row);
      for (int i = 0; i < step.factor; i++, x += width) {
        const bool adds = step.is_mean && i > 0;
        if (adds)
          stage_.level.vector.elementwise(RowOp::add, out, x, 0, width, out);
        else
          memcpy(out + (step.is_mean ? 0 : i * width), x, static_cast<size_t>(width) * sizeof(float));
      }
      if (step.is_mean)
        stage_.level.vector.elementwise(RowOp::scale, out, out, 1.0f / static_cast<float>(step.factor), width, out);
    }
  });
}

}  // namespace llamaclust
