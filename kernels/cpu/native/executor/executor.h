// Runs a plan on microbatches: all steps in one dispatch to the threads.
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

// State blocks of a batch, where states have blocks of their own: the first row of sequence s reads block before[s]
// unless its position is 0; for i in starts[s] .. starts[s + 1], the state behind row rows[i] is written to blocks[i].
struct StateTables {
  std::span<const int32_t> before, starts, rows, blocks;
};

// Rows that are given instead of computed, such as those of an image: for each of `rows`, ascending, `width` numbers, which
// have a part for each level.
struct GivenTable {
  std::span<const int32_t> rows;
  const float* values = nullptr;  // [rows][width]
  int width = 0;
};

// One microbatch as run() is given it.
// Rows sequence_starts[s] .. sequence_starts[s + 1] belong to sequence s, at consecutive positions; position p lives in
// KV block block_tables[table_starts[s] + p / 16], and in windowed layers in window_tables[the same], which is -1 where
// no row sees the block any more, or none is yet to be stored.
struct Batch {
  std::span<const int32_t> tokens;  // empty where the stage embeds nothing
  std::span<const int32_t> positions;
  std::span<const int32_t> sequence_starts;
  std::span<const int32_t> table_starts;
  std::span<const int32_t> block_tables;
  std::span<const int32_t> window_tables;  // empty where no layer is windowed
  std::span<const int32_t> output_rows;
  const float* hidden;  // [rows][hidden width]; null where the stage reads none
  StateTables states = {};
  std::span<const int32_t> rope_positions = {};  // [sections][rows]; empty: `positions` in each
  std::span<const int32_t> groups = {};  // [rows][2] positions [start, end) of a row's group; empty: each row is one
  GivenTable given = {};

  int rows() const { return static_cast<int>(positions.size()); }
  int sequences() const { return static_cast<int>(sequence_starts.size()) - 1; }
};

// std::invalid_argument where anything lies outside the plan's limits or contradicts itself.
void check_batch(const Batch& batch, const Plan& plan);

// Cosine and sine of every angle a stage can need, computed once.
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
  // cos[pairs], then sin[pairs].
  const float* row(int position) const { return values_.data() + row_offset(position); }
  size_t bytes() const { return values_.size() * sizeof(float); }

 private:
  size_t row_offset(int position) const { return static_cast<size_t>(position) * 2 * static_cast<size_t>(pairs_); }

  int pairs_;
  std::vector<float> values_;  // [positions][2 * pairs]
};

// Rows of one sequence that attend together.
struct RowTile {
  int sequence, row_begin, row_end;
};

// A microbatch cut into tiles of up to `rows` rows, in the order of rows.
struct Tiling {
  int rows;
  std::vector<RowTile> tiles;
};

// Rows of a tile for a model whose KV heads serve `group` query heads each.
int tile_rows(int group);

// Rows that are computed together, from `first` of the run's on. Of a large run, one band's gather goes on while another
// band is computed; or they take turns to use the same buffers, see Plan::has_bands.
struct Band {
  int first = 0;
  Batch batch;
  std::vector<Tiling> tilings;
  std::vector<int32_t> sequence_starts;  // of `batch`, where it is a part of the run's
};

// Counters from which threads take pieces of work; three in turn, so that one can be cleared while another is in use.
struct Shares {
  struct alignas(64) Counter {
    std::atomic<int64_t> taken{0};
  };
  Counter counters[3];
};

// What `Executor::workspace_bytes` of this plan will be: all that it takes besides weights and KV memory.
size_t workspace_bytes(const Plan& plan, int threads);

// A plan and all that its runs use.
struct Stage {
  // `shares_kv`: see Executor.
  Stage(Plan plan, const Level& level, int threads, const Stage* shares_kv);

  // What the next run computes.
  void set_batch(const Batch& batch);

  // Cosines and sines of a row of the run, as RotationTable has them.
  const float* angles(int table, int row) const {
    const std::vector<float>& own = section_angles[static_cast<size_t>(table)];
    const RotationTable& all = rotations[static_cast<size_t>(table)];
    if (own.empty() || whole.batch.rope_positions.empty()) return all.row(whole.batch.positions[row]);
    return own.data() + static_cast<size_t>(row) * 2 * static_cast<size_t>(all.pairs());
  }

  const Plan plan;
  const Level& level;
  Workspace workspace;
  const std::shared_ptr<const KvCache> kv;
  const std::vector<RotationTable> rotations;
  std::vector<std::vector<float>> section_angles;  // [max_tokens][2 * pairs] of each rotation that has sections
  Band whole;               // of this run, with all rows
  std::vector<Band> bands;  // with some of them; empty where they are computed together
  const std::vector<const MatmulStep*> next_matmul;  // for each step
  const size_t joins_at;  // the first step, behind a gather, for which all rows of a run must be there; 0: all steps are such
  const bool in_bands;  // has bands without gathers
  Shares shares;
  uint32_t adapters = 0;  // that runs compute, one bit each
  int part = 0;           // that runs compute, of a plan in parts
  Gatherer* gatherer = nullptr;
  std::exception_ptr failure;  // of a gather in this run
  // All threads leave the run when they synchronize behind a gather for that time: none may wait for one that has left.
  std::atomic<int> ends_at{std::numeric_limits<int>::max()};
};

class Executor {
 public:
  // Level and pool outlive the executor, and so do the weights of the plan.
  // `shares_kv`: whose KV memory it also uses, in which what that one has computed stays; runs of the two take turns.
  // std::invalid_argument where its layers are others.
  Executor(Plan plan, const Level& level, ThreadPool& pool, const Executor* shares_kv = nullptr)
      : stage_(std::move(plan), level, pool.threads(), shares_kv == nullptr ? nullptr : &shares_kv->stage_),
        pool_(pool) {}

  // Before the first runs, so that they take no longer than others: takes the memory that they use from the system, and
  // finds how weights are best prefetched.
  void prepare() const;

  // Computes the batch and returns the number of lines in result(); std::invalid_argument for a batch out of bounds.
  // What a gatherer throws ends the run.
  int run(const Batch& batch);

  // Of the runs that follow; it has to outlive them. Null: none.
  void set_gatherer(Gatherer* gatherer) { stage_.gatherer = gatherer; }

  // Adapters of the runs that follow, one bit each; steps of others are skipped.
  void set_adapters(uint32_t adapters) { stage_.adapters = adapters; }

  // The part of the plan that the runs that follow compute.
  void set_part(int part) {
    require(part >= 0 && static_cast<size_t>(part) < stage_.plan.parts.size(), "part out of range");
    stage_.part = part;
  }

  // What a run leaves in a buffer without private copies; the number of lines there is room for, and their width.
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
