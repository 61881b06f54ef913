// Runs a plan on microbatches. A run dispatches all steps to the threads at once.
#pragma once

#include <atomic>
#include <exception>
#include <limits>
#include <memory>
#include <span>
#include <vector>

#include "executor/gatherer.h"
#include "executor/workspace.h"
#include "level/level.h"
#include "runtime/float_mode.h"
#include "runtime/math.h"
#include "runtime/thread_pool.h"

namespace llamaclust {

// State blocks of a batch, if states have blocks of their own. The first row of sequence s reads block before[s],
// unless its position is 0. For i in [starts[s], starts[s + 1]), the state after row rows[i] is written to blocks[i].
struct StateTables {
  std::span<const int32_t> before, starts, rows, blocks;
};

// Rows whose values are given instead of computed, such as those of an image. `rows` is ascending; each row has `width`
// values, which consist of one part per level.
struct GivenTable {
  std::span<const int32_t> rows;
  const float* values = nullptr;  // [rows][width]
  int width = 0;
};

// One microbatch. Rows [sequence_starts[s], sequence_starts[s + 1]) belong to sequence s, at consecutive positions.
// Position p is in KV block block_tables[table_starts[s] + p / 16]. Windowed layers use window_tables with the same
// index; an entry is -1 if no row attends to the block any more, or if none has been stored yet.
struct Batch {
  std::span<const int32_t> tokens;  // Empty if the stage embeds no tokens.
  std::span<const int32_t> positions;
  std::span<const int32_t> sequence_starts;
  std::span<const int32_t> table_starts;
  std::span<const int32_t> block_tables;
  std::span<const int32_t> window_tables;  // Empty if no layer is windowed.
  std::span<const int32_t> output_rows;
  const float* hidden;  // [rows][hidden width]; null if the stage reads none.
  StateTables states = {};
  // [sections][rows]; empty if all sections use `positions`.
  std::span<const int32_t> rope_positions = {};
  // [rows][2]: positions [start, end) of a row's group; empty if each row forms a group.
  std::span<const int32_t> groups = {};
  GivenTable given = {};

  int rows() const { return static_cast<int>(positions.size()); }
  int sequences() const { return static_cast<int>(sequence_starts.size()) - 1; }
};

// Throws std::invalid_argument if the batch exceeds the plan's limits or contradicts itself.
void check_batch(const Batch& batch, const Plan& plan);

// Cosine and sine of every rotation angle that a stage can need, computed once.
class RotationTable {
 public:
  RotationTable(const RotationAngles& angles, int positions) : pairs_(angles.pairs()), values_(row_offset(positions)) {
    const FloatMode mode;
    for (int position = 0; position < positions; position++) {
      float* row = values_.data() + row_offset(position);
      for (int i = 0; i < pairs_; i++) {
        double sine, cosine;
        sincos_double(position * angles.frequencies[i], &sine, &cosine);
        row[i] = static_cast<float>(cosine * angles.scale);
        row[pairs_ + i] = static_cast<float>(sine * angles.scale);
      }
    }
  }

  int pairs() const { return pairs_; }
  // Returns cos[pairs], followed by sin[pairs].
  const float* row(int position) const { return values_.data() + row_offset(position); }
  size_t bytes() const { return values_.size() * sizeof(float); }

 private:
  size_t row_offset(int position) const { return static_cast<size_t>(position) * 2 * static_cast<size_t>(pairs_); }

  int pairs_;
  std::vector<float> values_;  // [positions][2 * pairs]
};

// Rows of one sequence that are computed together in attention.
struct RowTile {
  int sequence, row_begin, row_end;
};

// A microbatch divided into tiles of up to `rows` rows, in the order of rows.
struct Tiling {
  int rows;
  std::vector<RowTile> tiles;
};

// Number of rows in a tile, for a model with `group` query heads per KV head.
int tile_rows(int group);

// Rows that are computed together, starting with row `first` of the run. A large run is divided into bands for one of
// two reasons: one band's gather overlaps with the computation of another band, or the bands use the same buffers in
// turn (Plan::has_bands).
struct Band {
  int first = 0;
  Batch batch;
  std::vector<Tiling> tilings;
  std::vector<int32_t> sequence_starts;  // Storage of batch.sequence_starts, if the band is a part of the run.
};

// Counters from which threads take pieces of work. Three are used in turn, so that one can be cleared while another is
// in use.
struct Shares {
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  Counter counters[3];
};

// Returns Executor::workspace_bytes() of this plan: all memory that it needs besides weights and KV memory.
size_t workspace_bytes(const Plan& plan, int threads);

// A plan and all that its runs use.
struct Stage {
  // `shares_kv` is the stage of Executor's parameter `shares_kv`.
  Stage(Plan plan, const Level& level, int threads, const Stage* shares_kv);

  // Sets the batch of the next run.
  void set_batch(const Batch& batch);

  // Returns cosines and sines of a row of the run, in the layout of RotationTable::row().
  const float* angles(int table, int row) const {
    const std::vector<float>& own = section_angles[static_cast<size_t>(table)];
    const RotationTable& all = rotations[static_cast<size_t>(table)];
    if (own.empty() || whole.batch.rope_positions.empty()) return all.row(whole.batch.positions[row]);
    return own.data() + static_cast<size_t>(row) * 2 * static_cast<size_t>(all.pairs());
  }

  // Returns whether runs compute the step: all but those of adapters that are not chosen.
  bool computes(const PlannedStep& step) const { return !step.adapter || (adapters >> *step.adapter & 1u); }

  const Plan plan;
  const Level& level;
  Workspace workspace;
  const std::shared_ptr<const KvCache> kv;
  const std::vector<RotationTable> rotations;
  // [max_tokens][2 * pairs] for each rotation with sections.
  std::vector<std::vector<float>> section_angles;
  Band whole;                                        // All rows of this run.
  std::vector<Band> bands;                           // Parts of the rows; empty if all rows are computed together.
  const std::vector<const MatmulStep*> next_matmul;  // Entry i: the first product at or after step i.
  // The first step (after a gather) that needs all rows of a run; 0 if there are no bands before it.
  const size_t joins_at;
  const bool in_bands;  // Plan::has_bands(): bands that use the same buffers in turn.
  Shares shares;
  uint32_t adapters = 0;  // Adapters that runs compute, one bit each.
  int part = 0;           // Part of the plan that runs compute.
  Gatherer* gatherer = nullptr;
  std::exception_ptr failure;  // Failure of a gather in this run.
  // Number of the synchronization after a gather at which all threads leave the run, so that none waits for one that
  // has left.
  std::atomic<int> ends_at{std::numeric_limits<int>::max()};
};

class Executor {
 public:
  // The level, the pool and the plan's weights must outlive the executor. `shares_kv` is an executor whose KV memory,
  // with its contents, the new one also uses; runs of the two must not overlap. Throws std::invalid_argument if its
  // layers differ.
  Executor(Plan plan, const Level& level, ThreadPool& pool, const Executor* shares_kv = nullptr)
      : stage_(std::move(plan), level, pool.threads(), shares_kv == nullptr ? nullptr : &shares_kv->stage_),
        pool_(pool) {}

  // Makes the first runs as fast as later ones: takes their memory from the system, and measures which kind of
  // prefetching is faster. Called before the first run.
  void prepare() const;

  // Computes the batch and returns the number of lines in result(). Throws std::invalid_argument for a batch out of
  // bounds. An exception of the gatherer ends the run.
  int run(const Batch& batch);

  // Sets the gatherer of later runs, which must outlive them; null for none.
  void set_gatherer(Gatherer* gatherer) { stage_.gatherer = gatherer; }

  // Sets the adapters of later runs, one bit each. Steps of other adapters are skipped.
  void set_adapters(uint32_t adapters) { stage_.adapters = adapters; }

  // Sets the part of the plan that later runs compute.
  void set_part(int part) {
    require(part >= 0 && static_cast<size_t>(part) < stage_.plan.parts.size(), "part out of range");
    stage_.part = part;
  }

  // Contents of a buffer without private copies after a run; the number of lines it has room for; and their width.
  float* contents(BufferId id) const { return stage_.workspace.shared(id); }
  int capacity(BufferId id) const;
  int width(BufferId id) const { return stage_.plan.buffers.at(static_cast<size_t>(id)).width; }
  BufferId result() const { return *stage_.plan.result; }
  int hidden_width() const { return stage_.plan.hidden_width; }
  size_t kv_bytes() const { return stage_.kv->bytes(); }
  // KV memory of a layer without a window: [kv_blocks][kv_block_bytes].
  uint8_t* kv_layer(int layer) const { return stage_.kv->layer(layer); }
  const Plan& plan() const { return stage_.plan; }
  size_t workspace_bytes() const;

 private:
  Stage stage_;
  ThreadPool& pool_;
};

}  // namespace llamaclust
