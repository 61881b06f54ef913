// Attention, divided among the threads. A thread computes whole units, or single spans of units. The spans of a unit
// are merged in ascending order, whichever threads computed them.
#include "executor/worker.h"

namespace llamaclust {

int tile_rows(int group) { return std::max(1, kTileQueries / group); }

namespace {

// Divides an attention step into units (rows of one sequence x query heads of one KV head), and a unit into the spans
// that its rows attend to.
struct AttentionUnits {
  // Query heads [head, head + heads) of one KV head, for a tile of rows.
  struct Unit {
    RowTile tile;
    int kv_head, head, heads;
  };

  // The queries of a unit that attend to a span: [before, end). Of these, [joined, end) attend to no earlier span.
  struct QueryRange {
    int before, joined, end;
  };

  AttentionUnits(const AttentionStep& step, const Batch& batch, const std::vector<Tiling>& tilings)
      : step(step),
        batch(batch),
        group(step.heads / step.kv_heads),
        head_groups((group + kTileQueries - 1) / kTileQueries),
        tiles(std::ranges::find(tilings, tile_rows(group), &Tiling::rows)->tiles) {}

  // Returns whether every sequence has one tile, and every KV head one unit in that tile.
  bool one_a_sequence() const { return head_groups == 1 && static_cast<int>(tiles.size()) == batch.sequences(); }
  int64_t heads_per_tile() const { return static_cast<int64_t>(step.kv_heads) * head_groups; }
  int64_t count() const { return static_cast<int64_t>(tiles.size()) * heads_per_tile(); }
  int position(int row) const { return batch.positions[row]; }
  // The first and the last position that a row attends to.
  int first_seen(int row) const {
    if (step.grouped && !batch.groups.empty()) return batch.groups[2 * row];
    if (step.grouped) return position(row);
    if (step.chunked) return position(row) / step.window * step.window;
    return std::max(0, step.causal ? position(row) - step.window + 1 : position(row) - step.window / 2);
  }
  int last_seen(const RowTile& tile, int row) const {
    if (step.causal || step.grouped) return batch.groups.empty() ? position(row) : batch.groups[2 * row + 1] - 1;
    return std::min(position(batch.sequence_starts[tile.sequence + 1] - 1), position(row) + step.window / 2);
  }
  // The range of spans to which a tile's rows attend.
  int span_begin(const RowTile& tile) const { return first_seen(tile.row_begin) / kSpanTokens; }
  int span_end(const RowTile& tile) const { return last_seen(tile, tile.row_end - 1) / kSpanTokens + 1; }
  int spans(const RowTile& tile) const { return span_end(tile) - span_begin(tile); }

  // The last rows attend to the most positions. They come first, so that the units that finish last are short.
  Unit unit(int64_t index) const {
    const RowTile& tile = tiles[tiles.size() - 1 - static_cast<size_t>(index / heads_per_tile())];
    const int rest = static_cast<int>(index % heads_per_tile()), kv_head = rest / head_groups;
    const int first = rest % head_groups * kTileQueries;
    return {tile, kv_head, kv_head * group + first, std::min(kTileQueries, group - first)};
  }

  QueryRange queries(const Unit& unit, int span) const {
    const auto rows_while = [&](auto&& holds) {
      int row = unit.tile.row_begin;
      while (row < unit.tile.row_end && holds(row)) row++;
      return (row - unit.tile.row_begin) * unit.heads;
    };
    return {rows_while([&](int row) { return last_seen(unit.tile, row) / kSpanTokens < span; }),
            rows_while([&](int row) { return first_seen(row) / kSpanTokens < span; }),
            rows_while([&](int row) { return first_seen(row) / kSpanTokens <= span; })};
  }

  int most_queries() const {
    int rows = 0;
    for (const RowTile& tile : tiles) rows = std::max(rows, tile.row_end - tile.row_begin);
    return rows * std::min(group, kTileQueries);
  }
  int64_t span_count() const {
    int64_t count = 0;
    for (const RowTile& tile : tiles) count += spans(tile);
    return count * heads_per_tile();
  }

  const AttentionStep& step;
  const Batch& batch;
  const int group, head_groups;
  const std::vector<RowTile>& tiles;
};

}  // namespace

// Computes one attention step in one thread.
class AttentionWork {
  using Unit = AttentionUnits::Unit;
  using QueryRange = AttentionUnits::QueryRange;

 public:
  AttentionWork(Worker& worker, const AttentionStep& step)
      : worker_(worker),
        step_(step),
        level_(worker.stage_.level),
        batch_(worker.batch()),
        type_(shape().type),
        tables_(shape().windowed ? batch_.window_tables : batch_.block_tables),
        kv_(level_.attention.kv[static_cast<int>(type_)]),
        units_(step, batch_, worker.band_->tilings),
        scratch_(worker.stage_.workspace.attention_scratch(worker.thread_, step.head_dim)) {}

  void run() {
    const bool has_to_store = step_.stores() && !worker_.is_in_bands();
    stores_ = has_to_store && units_.one_a_sequence();
    if (has_to_store && !stores_) {
      store_all();
      worker_.synchronize();
    }
    if (splits_spans())
      run_spans();
    else
      worker_.share(units_.count(), 1, [this](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          worker_.lookahead_.fetch();
          whole_unit(i);
        }
      });
  }

  // Stores keys and values of all rows before any thread reads them.
  void store_all() const {
    worker_.share(static_cast<int64_t>(units_.tiles.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const RowTile& tile = units_.tiles[i];
        for (int row = tile.row_begin; row < tile.row_end; row++)
          for (int kv_head = 0; kv_head < step_.kv_heads; kv_head++) store(tile.sequence, row, kv_head);
      }
    });
  }

 private:
  const KvShape& shape() const { return worker_.stage_.plan.kv_layers[step_.layer]; }
  uint8_t* piece(int kv_head, int block) const {
    const int64_t index = int64_t{block} * step_.kv_heads + kv_head;
    return worker_.stage_.kv->layer(step_.layer) + static_cast<size_t>(index) * shape().piece_bytes();
  }
  const int32_t* table(int sequence) const { return tables_.data() + batch_.table_starts[sequence]; }

  const float* rotated(const std::optional<Rotation>& rotation, const float* x, int row, float* out) const {
    if (!rotation) return x;
    const int pairs = worker_.stage_.rotations[rotation->table].pairs();
    level_.vector.rope(x, worker_.angles(rotation->table, row), pairs, step_.head_dim, rotation->style, out);
    return out;
  }

  void store(int sequence, int row, int kv_head) const {
    const int at = units_.position(row), offset = kv_head * step_.head_dim;
    const float* key = rotated(step_.rotate_k, worker_.line(step_.k, row) + offset, row, scratch_.key);
    const float* value = shape().latent ? nullptr : worker_.line(step_.v, row) + offset;
    kv_.store(key, value, step_.head_dim, at % kKvBlockTokens,
              piece(kv_head, table(sequence)[at / kKvBlockTokens]));
  }

  // Stores a unit's rows of one span. Used if every sequence has one tile: only the unit itself reads these rows, so no
  // barrier is needed.
  void store_span(const Unit& unit, int span) const {
    for (int row = unit.tile.row_begin; stores_ && row < unit.tile.row_end; row++)
      if (units_.position(row) / kSpanTokens == span) store(unit.tile.sequence, row, unit.kv_head);
  }

  void load_queries(const Unit& unit) const {
    float* q = scratch_.q;
    for (int row = unit.tile.row_begin; row < unit.tile.row_end; row++)
      for (int head = unit.head; head < unit.head + unit.heads; head++, q += padded_head(step_.head_dim)) {
        const float* x = worker_.line(step_.q, row) + head * step_.head_dim;
        if (rotated(step_.rotate_q, x, row, q) != q) std::copy_n(x, step_.head_dim, q);
        kv_.prepare(q, step_.head_dim);
      }
  }

  // Computes one span for the loaded queries that attend to it. If this thread continues with the next span, prefetches
  // the beginning of that.
  void compute_span(const Unit& unit, int span, bool goes_on, const QueryRange& queries, const SpanSums& sums) const {
    const int start = span * kSpanTokens;
    for (int query = queries.before; query < queries.end; query++) {
      const int row = unit.tile.row_begin + query / unit.heads;
      scratch_.firsts[query - queries.before] = std::max(units_.first_seen(row) - start, 0);
      scratch_.ends[query - queries.before] = std::min(units_.last_seen(unit.tile, row) + 1 - start, kSpanTokens);
    }
    const bool biased = !step_.slopes.empty();
    if (biased) load_bias(unit, start, queries);
    store_span(unit, span);
    const size_t stride = kv_block_bytes(shape());
    const int blocks = units_.last_seen(unit.tile, unit.tile.row_end - 1) / kKvBlockTokens + 1;
    const SpanTask task{piece(unit.kv_head, 0),
                        stride,
                        table(unit.tile.sequence) + span * kSpanBlocks,
                        goes_on ? std::max(blocks - (span + 1) * kSpanBlocks, 0) : 0,
                        step_.head_dim,
                        step_.value_dim,
                        step_.scale,
                        queries.end - queries.before,
                        scratch_.q + queries.before * padded_head(step_.head_dim),
                        scratch_.firsts,
                        scratch_.ends,
                        scratch_.scores,
                        step_.soft_cap,
                        biased ? scratch_.slopes : nullptr,
                        biased ? scratch_.positions : nullptr};
    (shape().latent ? kv_.latent_span : kv_.span)(task, from(sums, queries.before));
  }

  void load_bias(const Unit& unit, int start, const QueryRange& queries) const {
    for (int query = queries.before; query < queries.end; query++) {
      scratch_.positions[query - queries.before] = units_.position(unit.tile.row_begin + query / unit.heads) - start;
      scratch_.slopes[query - queries.before] = step_.slopes[unit.head + query % unit.heads];
    }
  }

  SpanSums from(const SpanSums& sums, int query) const {
    return {sums.maximum + query, sums.sum + query, sums.values + query * padded_head(step_.value_dim)};
  }

  // Adds a span's sums to those of the earlier spans. The total of a query without earlier spans starts with this
  // span's sums.
  void merge(const QueryRange& queries, const SpanSums& total, const SpanSums& next) const {
    const int value_dim = step_.value_dim;
    if (queries.joined > queries.before)
      level_.attention.merge(from(total, queries.before), from(next, queries.before), queries.joined - queries.before,
                             value_dim);
    const int count = queries.end - queries.joined;
    const SpanSums to = from(total, queries.joined), source = from(next, queries.joined);
    std::copy_n(source.maximum, count, to.maximum);
    std::copy_n(source.sum, count, to.sum);
    std::copy_n(source.values, count * padded_head(value_dim), to.values);
  }

  // A sink acts as an additional span: its maximum is the sink's score, its sum of weights is 1 and its values are 0.
  void merge_sinks(const Unit& unit, const SpanSums& total) const {
    const int queries = (unit.tile.row_end - unit.tile.row_begin) * unit.heads;
    const SpanSums& next = scratch_.next;
    for (int query = 0; query < queries; query++) {
      next.maximum[query] = step_.sinks[unit.head + query % unit.heads];
      next.sum[query] = 1.0f;
    }
    std::fill_n(next.values, queries * padded_head(step_.value_dim), 0.0f);
    level_.attention.merge(total, next, queries, step_.value_dim);
  }

  void finish(const Unit& unit, const SpanSums& total) const {
    if (!step_.sinks.empty()) merge_sinks(unit, total);
    int query = 0;
    for (int row = unit.tile.row_begin; row < unit.tile.row_end; row++)
      for (int head = unit.head; head < unit.head + unit.heads; head++, query++)
        level_.attention.finish(from(total, query).values, total.sum[query], step_.value_dim,
                                worker_.line(step_.out, row) + head * step_.value_dim);
  }

  void whole_unit(int64_t index) const {
    const Unit unit = units_.unit(index);
    load_queries(unit);
    for (int span = units_.span_begin(unit.tile); span < units_.span_end(unit.tile); span++) {
      const QueryRange queries = units_.queries(unit, span);
      const bool begins = span == units_.span_begin(unit.tile);
      compute_span(unit, span, true, queries, begins ? scratch_.total : scratch_.next);
      if (!begins) merge(queries, scratch_.total, scratch_.next);
    }
    finish(unit, scratch_.total);
  }

  // Returns whether the spans of units go to different threads: if there are few units with several spans, and room for
  // the sums of all spans.
  size_t partial_floats() const { return span_sums_floats(units_.most_queries(), step_.value_dim); }
  bool splits_spans() const {
    const int threads = worker_.threads_;
    if (threads == 1 || units_.count() >= 4 * threads) return false;
    const int64_t count = units_.span_count();
    return count > units_.count() &&
           static_cast<size_t>(count) * partial_floats() <= worker_.stage_.workspace.partial_floats();
  }
  SpanSums partial(int64_t index) const {
    return span_sums_at(worker_.stage_.workspace.partials() + static_cast<size_t>(index) * partial_floats(),
                        units_.most_queries());
  }

  void run_spans() const {
    const int64_t all = units_.span_count();
    worker_.share(all, 1, fixed_tiles(all), [this](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (int64_t i = 0; i < units_.count() && first < end; i++) {
        const Unit unit = units_.unit(i);
        const int64_t count = units_.spans(unit.tile);
        if (first + count > begin) load_queries(unit);
        const int64_t last = std::min(end - first, count);
        for (int64_t at = std::max(begin - first, int64_t{0}); at < last; at++) {
          const int span = units_.span_begin(unit.tile) + static_cast<int>(at);
          compute_span(unit, span, at + 1 < last, units_.queries(unit, span), partial(first + at));
        }
        first += count;
      }
    });
    worker_.synchronize();
    worker_.share(units_.count(), 1, [this](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (int64_t i = 0; i < end; i++) {
        const Unit unit = units_.unit(i);
        if (i >= begin) merge_spans(unit, first);
        first += units_.spans(unit.tile);
      }
    });
  }

  void merge_spans(const Unit& unit, int64_t first) const {
    const SpanSums total = partial(first);
    for (int i = 1; i < units_.spans(unit.tile); i++)
      merge(units_.queries(unit, units_.span_begin(unit.tile) + i), total, partial(first + i));
    finish(unit, total);
  }

  Worker& worker_;
  const AttentionStep& step_;
  const Level& level_;
  const Batch& batch_;
  const KvType type_;
  const std::span<const int32_t> tables_;
  const KvOps& kv_;
  const AttentionUnits units_;
  const AttentionScratch scratch_;
  bool stores_ = false;
};

void Worker::execute(const AttentionStep& step) { AttentionWork(*this, step).run(); }

void Worker::store_band(const AttentionStep& step) {
  synchronize();
  AttentionWork(*this, step).store_all();
}

}  // namespace llamaclust
