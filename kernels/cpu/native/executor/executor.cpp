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

std::vector<std::vector<float>> section_angles_of(const Plan& plan) {
  std::vector<std::vector<float>> found;
  for (const RotationAngles& angles : plan.rotations)
    found.emplace_back(angles.sections.empty() ? 0 : static_cast<size_t>(plan.limits.max_tokens) * angles.floats());
  return found;
}

// Sets the rotation angles of a batch with rope positions: each pair uses the position of its section.
void set_section_angles(const Batch& batch, const RotationAngles& angles, const RotationTable& table, float* out) {
  const size_t pairs = static_cast<size_t>(angles.pairs()), rows = static_cast<size_t>(batch.rows());
  for (size_t row = 0; row < rows; row++, out += 2 * pairs)
    for (size_t i = 0; i < pairs; i++) {
      const float* from = table.row(batch.rope_positions[static_cast<size_t>(angles.sections[i]) * rows + row]);
      out[i] = from[i];
      out[pairs + i] = from[pairs + i];
    }
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

// Returns the index after the last gather before rows are selected, up to which each band of rows computes alone.
// Returns 0 if there are no such bands: in a plan with states or non-causal attention, rows of a run depend on each
// other by more than KV memory.
size_t joins_at_of(const Plan& plan) {
  const auto looks_ahead = [](const PlannedStep& planned) {
    const auto* step = std::get_if<AttentionStep>(&planned.step);
    return step != nullptr && !step->causal;
  };
  if (plan.has_states || plan.merged > 1 || !plan.parts.empty() || std::ranges::any_of(plan.steps, looks_ahead)) return 0;
  size_t found = 0;
  for (size_t i = 0; i < plan.steps.size() && !std::holds_alternative<SelectStep>(plan.steps[i].step); i++)
    if (std::holds_alternative<GatherStep>(plan.steps[i].step)) found = i + 1;
  return found;
}

// For each step, the first matrix product at or after it that every run computes; null if there is none.
std::vector<const MatmulStep*> next_matmul_of(const Plan& plan) {
  std::vector<const MatmulStep*> found(plan.steps.size());
  const MatmulStep* next = nullptr;
  for (size_t i = plan.steps.size(); i-- > 0; found[i] = next)
    if (const auto* step = std::get_if<MatmulStep>(&plan.steps[i].step); step != nullptr && !plan.steps[i].adapter)
      next = step;
  return found;
}

// Returns the weights of the products, which take most of the time, in the order of steps.
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

std::shared_ptr<const KvCache> kv_of(const Plan& plan, const Stage* other) {
  if (other == nullptr) return std::make_shared<const KvCache>(plan.kv_layers, plan.limits);
  const auto blocks = [](const Plan& of) {
    std::vector<size_t> bytes;
    for (const KvShape& shape : of.kv_layers)
      bytes.push_back(kv_block_bytes(shape) * static_cast<size_t>(block_count(shape, of.limits)));
    return bytes;
  };
  require(blocks(plan) == blocks(other->plan), "KV memory of other layers");
  return other->kv;
}

int bands_of(int rows, int most) { return rows < kLeastBandedRows ? 1 : std::min(most, rows / kLeastRowsOfBand); }

// The first band has two thirds of the rows of each other band. Its gathers then fit into the time of the other bands'
// products, where those are short. Every band but the last has whole tiles of rows.
int band_border(int rows, int bands, int at) {
  constexpr int kTileRows = 16;
  if (at == 0 || at == bands) return at == 0 ? 0 : rows;
  return (rows * (3 * at - 1) / (3 * bands - 1) + kTileRows / 2) / kTileRows * kTileRows;
}

// Sets `band` to rows [first, end) of a batch.
void set_band(Band& band, const Batch& batch, int first, int end) {
  const std::span<const int32_t> starts = batch.sequence_starts;
  const size_t from = static_cast<size_t>(std::ranges::upper_bound(starts, first) - starts.begin()) - 1;
  const size_t to = static_cast<size_t>(std::ranges::lower_bound(starts, end) - starts.begin());
  const size_t begin = static_cast<size_t>(first), rows = static_cast<size_t>(end - first);
  band.first = first;
  band.sequence_starts.clear();
  for (size_t i = from; i <= to; i++) band.sequence_starts.push_back(std::clamp(starts[i], first, end) - first);
  band.batch = batch;
  band.batch.tokens = batch.tokens.empty() ? batch.tokens : batch.tokens.subspan(begin, rows);
  band.batch.positions = batch.positions.subspan(begin, rows);
  band.batch.sequence_starts = band.sequence_starts;
  band.batch.table_starts = batch.table_starts.subspan(from);
  band.batch.output_rows = {};
}

}  // namespace

void Stage::set_batch(const Batch& batch) {
  whole.batch = batch;
  for (size_t i = 0; i < rotations.size() && !batch.rope_positions.empty(); i++)
    if (!section_angles[i].empty()) set_section_angles(batch, plan.rotations[i], rotations[i], section_angles[i].data());
  const bool may_gather = joins_at > 0 && gatherer != nullptr && batch.groups.empty();
  const int rows = batch.rows();
  const int count = in_bands ? plan.bands(rows) : may_gather ? bands_of(rows, gatherer->bands()) : 1;
  const auto border = [&](int at) {
    return in_bands ? rows / plan.merged * at / count * plan.merged : band_border(rows, count, at);
  };
  bands.resize(count > 1 ? static_cast<size_t>(count) : 0);
  for (int at = 0; Band& band : bands) {
    const int first = border(at);
    set_band(band, batch, first, border(++at));
    if (batch.hidden != nullptr) band.batch.hidden += int64_t{first} * plan.hidden_width;
    band.tilings = whole.tilings;
    for (Tiling& tiling : band.tilings) cut_into_tiles(band.batch, tiling);
  }
  for (Tiling& tiling : whole.tilings) cut_into_tiles(batch, tiling);
}

// Up to the last gather, the bands compute in turn, one gather after another. Then come the steps that need all rows.
void Worker::work() {
  const std::vector<PlannedStep>& steps = stage_.plan.steps;
  auto [at, last] = stage_.plan.steps_of(stage_.part);
  if (is_in_bands()) return work_in_bands(at, last);
  while (!stage_.bands.empty() && at < stage_.joins_at) {
    size_t end = at + 1;
    while (!std::holds_alternative<GatherStep>(steps[end - 1].step)) end++;
    for (size_t band = 0; band < stage_.bands.size(); band++) {
      enter(stage_.bands[band]);
      if (at > 0) finish_gather();
      if (!run(at, end)) return;
    }
    at = end;
  }
  enter(stage_.whole);
  while (in_flight_ > 0) finish_gather();
  run(at, last);
}

// In turn, the bands compute a stretch of steps and store keys and values for the attention that follows. Then all rows
// compute that attention (or, if the next step selects rows, that step and all later ones).
void Worker::work_in_bands(size_t at, size_t last) {
  while (at < last) {
    const size_t end = stage_.plan.end_of_stretch(at);
    const Step* next = end < last ? &stage_.plan.steps[end].step : nullptr;
    for (const Band& band : stage_.bands) {
      enter(band);
      if (band.first > 0) synchronize();
      run(at, end);
      if (const auto* attention = std::get_if<AttentionStep>(next); attention != nullptr && attention->stores())
        store_band(*attention);
    }
    enter(stage_.whole);
    if (next == nullptr) return;
    synchronize();
    at = std::holds_alternative<SelectStep>(*next) ? last : end + 1;
    run(end, at);
  }
}

void Worker::enter(const Band& band) {
  band_ = &band;
  first_ = band.first;
  set_rows(band.batch.rows());
}

// Returns false if a gather has failed.
bool Worker::run(size_t begin, size_t last) {
  const std::vector<PlannedStep>& steps = stage_.plan.steps;
  for (size_t at = begin, end; at < last; at = end) {
    if (!stage_.computes(steps[at])) {
      end = at + 1;
      continue;
    }
    const Sync before = steps[at].before;
    const bool after_gather = at > 0 && std::holds_alternative<GatherStep>(steps[at - 1].step);
    if (const MatmulStep* next = stage_.next_matmul[at]; next != nullptr && rows_ <= kFewRows)
      lookahead_.set_target(*next, fixed_begin(fixed_tiles(next->tiles()), 1, thread_));
    if (before == Sync::Always || (before == Sync::IfShared && !alone_))
      synchronize(after_gather);
    if (after_gather && ++joins_ >= stage_.ends_at.load(std::memory_order_relaxed)) return false;
    for (end = at + 1; end < last && steps[at].row_by_row; end++)
      if (!steps[end].row_by_row || steps[end].before != Sync::None) break;
    compute(at, end);
  }
  return true;
}

// Thread 0 gathers. The others wait before the next step, and prefetch its weights meanwhile.
void Worker::execute(const GatherStep& step) {
  if (thread_ != 0 || rows_ == 0) return;
  const bool is_whole = band_ == &stage_.whole;
  const int bands = std::max(1, static_cast<int>(stage_.bands.size()));
  const int number = step.number * bands + (is_whole ? 0 : static_cast<int>(band_ - stage_.bands.data()));
  try {
    const int columns = step.has_columns() ? buffer(step.x).width : 0;
    float* out = line(step.out, 0);
    stage_.gatherer->start({number, rows_ * buffer(step.out).multiple, step.to, step.borders, columns,
                            step.has_columns() ? line(step.x, 0) : out, out});
    if (is_whole) stage_.gatherer->finish(fetching());
    else in_flight_++;
  } catch (...) {
    fail();
  }
}

// Called before a step for which all threads synchronize.
void Worker::finish_gather() {
  if (thread_ != 0 || in_flight_ == 0) return;
  in_flight_--;
  try {
    stage_.gatherer->finish(fetching());
  } catch (...) {
    fail();
  }
}

// The first failure ends the run. Threads leave it at the next synchronization after a gather, which no thread has
// reached yet.
void Worker::fail() {
  if (stage_.failure) return;
  stage_.failure = std::current_exception();
  stage_.ends_at.store(joins_ + 1, std::memory_order_relaxed);
}

// Consecutive row by row steps process a few rows at a time, which then are still in the cache.
void Worker::compute(size_t begin, size_t end) {
  const std::vector<PlannedStep>& steps = stage_.plan.steps;
  const auto shared = [this](const auto& step) {
    if constexpr (requires { execute(step); }) execute(step);
  };
  if (!steps[begin].row_by_row) return std::visit(shared, steps[begin].step);
  share_rows([&](int first, int last) {
    for (size_t i = begin; i < end; i++) {
      if (!stage_.computes(steps[i])) continue;
      lookahead_.fetch();
      for (int row = first; row < last; row++) compute_row(steps[i].step, row);
    }
  });
}

Stage::Stage(Plan given, const Level& level, int threads, const Stage* shares_kv)
    : plan((require(given.result.has_value(), "a program without a result"), std::move(given))),
      level(level),
      workspace(plan, threads),
      kv(kv_of(plan, shares_kv)),
      rotations(tables_of(plan)),
      section_angles(section_angles_of(plan)),
      whole{0, {}, tilings_of(plan), {}},
      next_matmul(next_matmul_of(plan)),
      joins_at(joins_at_of(plan)),
      in_bands(plan.has_bands()) {
  workspace.allocate();
}

void Executor::prepare() const {
  stage_.workspace.touch();
  if (stage_.kv.use_count() == 1) stage_.kv->touch(Memory::kHugePage);
  choose_prefetch(stage_.level.matmul, weights_of(stage_.plan), pool_.threads());
}

int Executor::run(const Batch& batch) {
  check_batch(batch, stage_.plan);
  if (stage_.plan.gathers > 0 && stage_.gatherer == nullptr)
    throw std::invalid_argument("batch: a group's member that was given no gatherer");
  stage_.set_batch(batch);
  for (Shares::Counter& counter : stage_.shares.counters) counter.taken.store(0, std::memory_order_relaxed);
  const auto work = [&](int thread) { Worker(stage_, pool_, thread).work(); };
  stage_.ends_at.store(std::numeric_limits<int>::max(), std::memory_order_relaxed);
  pool_.run(work, batch.rows());
  if (stage_.failure) std::rethrow_exception(std::exchange(stage_.failure, nullptr));
  return stage_.plan.selects ? static_cast<int>(batch.output_rows.size()) : batch.rows() / stage_.plan.merged;
}

int Executor::capacity(BufferId id) const {
  const Buffer& buffer = stage_.plan.buffers.at(static_cast<size_t>(id));
  return buffer.multiple * static_cast<int>(stage_.plan.rows_of(buffer));
}

size_t Executor::workspace_bytes() const {
  size_t bytes = stage_.workspace.bytes();
  for (const RotationTable& table : stage_.rotations) bytes += table.bytes();
  for (const std::vector<float>& angles : stage_.section_angles) bytes += angles.size() * sizeof(float);
  return bytes;
}

size_t workspace_bytes(const Plan& plan, int threads) {
  size_t bytes = Workspace(plan, threads).bytes();
  for (const RotationAngles& angles : plan.rotations) {
    const int rows = plan.limits.max_context_tokens + (angles.sections.empty() ? 0 : plan.limits.max_tokens);
    bytes += static_cast<size_t>(rows) * angles.floats() * sizeof(float);
  }
  return bytes;
}

}  // namespace llamaclust
