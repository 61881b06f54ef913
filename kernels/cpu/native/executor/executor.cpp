#include "executor/executor.h"

#include <algorithm>
#include <utility>

#include "executor/prefetch_choice.h"
#include "executor/worker.h"

namespace llamaclust {
namespace {

std::vector<RotationTable> tables_of(const Plan& plan) {
  std::vector<RotationTable> tables;
  for (const RotationAngles& angles : plan.rotations) tables.emplace_back(angles, plan.limits.max_context_tokens);
  return tables;
}

std::vector<Tiling> tilings_of(const Plan& plan) {
  std::vector<Tiling> tilings;
  for (const PlannedStep& planned : plan.steps)
    if (const auto* step = std::get_if<AttentionStep>(&planned.step)) {
      const int rows = tile_rows(step->heads / step->kv_heads);
      if (std::ranges::count(tilings, rows, &Tiling::rows) > 0) continue;
      tilings.push_back({rows, {}});
      tilings.back().tiles.reserve(static_cast<size_t>(plan.limits.max_tokens));
    }
  return tilings;
}

// For each step the products that come next in every run, itself included; null after the last ones.
std::vector<const MatmulStep*> next_matmul_of(const Plan& plan) {
  std::vector<const MatmulStep*> found(plan.steps.size());
  const MatmulStep* next = nullptr;
  for (size_t i = plan.steps.size(); i-- > 0; found[i] = next)
    if (const auto* step = std::get_if<MatmulStep>(&plan.steps[i].step); step != nullptr && !plan.steps[i].adapter)
      next = step;
  return found;
}

// Of products that take most of the time, in the order of steps.
std::vector<Matrix> weights_of(const Plan& plan) {
  std::vector<Matrix> weights;
  for (const PlannedStep& planned : plan.steps) {
    if (const auto* step = std::get_if<MatmulStep>(&planned.step))
      for (const Product& product : step->products) weights.push_back(product.weight);
    if (const auto* step = std::get_if<ExpertsStep>(&planned.step))
      for (const ExpertProduct& product : step->products)
        weights.insert(weights.end(), product.experts.begin(), product.experts.end());
  }
  return weights;
}

void cut_into_tiles(const Batch& batch, Tiling& tiling) {
  tiling.tiles.clear();
  for (int sequence = 0; sequence < batch.sequences(); sequence++) {
    const int end = batch.sequence_starts[sequence + 1];
    for (int row = batch.sequence_starts[sequence]; row < end; row += tiling.rows)
      tiling.tiles.push_back({sequence, row, std::min(row + tiling.rows, end)});
  }
}

}  // namespace

void Worker::work() {
  const std::vector<PlannedStep>& steps = stage_.plan.steps;
  const auto [begin, last] = stage_.plan.steps_of(stage_.part);
  for (size_t at = begin, end; at < last; at = end) {
    if (const std::optional<int> adapter = steps[at].adapter; adapter && !(stage_.adapters >> *adapter & 1u)) {
      end = at + 1;
      continue;
    }
    const Sync before = steps[at].before;
    if (const MatmulStep* next = stage_.next_matmul[at]; next != nullptr && rows_ <= kFewRows)
      lookahead_.set_target(*next, fixed_begin(fixed_tiles(next->tiles()), 1, thread_));
    if (before == Sync::Always || (before == Sync::IfShared && !alone_))
      synchronize(at > begin && std::holds_alternative<GatherStep>(steps[at - 1].step));
    if (at >= stage_.ends_at.load(std::memory_order_relaxed)) return;
    for (end = at + 1; end < last && steps[at].row_by_row; end++)
      if (!steps[end].row_by_row || steps[end].before != Sync::None || steps[end].adapter != steps[at].adapter) break;
    compute(at, end);
    if (thread_ == 0 && stage_.failure) stage_.ends_at.store(end, std::memory_order_relaxed);
  }
}

// By the caller of run(); the others wait before the next step, and fetch its weights.
void Worker::execute(const GatherStep& step) {
  if (thread_ != 0 || rows_ == 0) return;
  try {
    stage_.gatherer->gather({step.number, rows_, step.to, step.borders, line_width(step.x),
                             stage_.workspace.shared(step.x), stage_.workspace.shared(step.out)});
  } catch (...) {
    stage_.failure = std::current_exception();
  }
}

// Row by row steps that follow each other are done for a few rows at a time, which then are still in the cache.
void Worker::compute(size_t begin, size_t end) {
  constexpr int kRowsAtOnce = 4;
  const std::vector<PlannedStep>& steps = stage_.plan.steps;
  const auto shared = [this](const auto& step) {
    if constexpr (requires { execute(step); }) execute(step);
  };
  if (!steps[begin].row_by_row) return std::visit(shared, steps[begin].step);
  const Range mine = own_rows();
  for (int first = mine.begin; first < mine.end; first += kRowsAtOnce)
    for (size_t i = begin; i < end; i++) {
      lookahead_.fetch();
      for (int row = first; row < std::min(first + kRowsAtOnce, mine.end); row++) compute_row(steps[i].step, row);
    }
}

Stage::Stage(Plan given, const Level& level, int threads)
    : plan((require(given.result.has_value(), "a program without a result"), std::move(given))),
      level(level),
      workspace(plan, threads),
      kv(plan.kv_layers, plan.limits),
      rotations(tables_of(plan)),
      tilings(tilings_of(plan)),
      next_matmul(next_matmul_of(plan)) {
  workspace.allocate();
}

void Executor::prepare() const {
  stage_.workspace.touch();
  stage_.kv.touch(Memory::kHugePage);
  choose_prefetch(stage_.level.matmul, weights_of(stage_.plan), pool_.threads());
}

int Executor::run(const Batch& batch) {
  check_batch(batch, stage_.plan);
  if (stage_.plan.gathers > 0 && stage_.gatherer == nullptr)
    throw std::invalid_argument("batch: a group's member that was given no gatherer");
  for (Tiling& tiling : stage_.tilings) cut_into_tiles(batch, tiling);
  for (Shares::Counter& counter : stage_.shares.counters) counter.taken.store(0, std::memory_order_relaxed);
  const auto work = [&](int thread) { Worker(stage_, batch, pool_, thread).work(); };
  stage_.ends_at.store(std::numeric_limits<size_t>::max(), std::memory_order_relaxed);
  pool_.run(work, batch.rows());
  if (stage_.failure) std::rethrow_exception(std::exchange(stage_.failure, nullptr));
  return stage_.plan.selects ? static_cast<int>(batch.output_rows.size()) : batch.rows();
}

int Executor::capacity(BufferId id) const {
  const Buffer& buffer = stage_.plan.buffers.at(static_cast<size_t>(id));
  return buffer.multiple * (buffer.outputs_only ? stage_.plan.limits.max_outputs : stage_.plan.limits.max_tokens);
}

size_t Executor::workspace_bytes() const {
  size_t bytes = stage_.workspace.bytes();
  for (const RotationTable& table : stage_.rotations) bytes += table.bytes();
  return bytes;
}

size_t workspace_bytes(const Plan& plan, int threads) {
  size_t bytes = Workspace(plan, threads).bytes();
  for (const RotationAngles& angles : plan.rotations)
    bytes += static_cast<size_t>(plan.limits.max_context_tokens) * 2 * angles.frequencies.size() * sizeof(float);
  return bytes;
}

}  // namespace llamaclust
