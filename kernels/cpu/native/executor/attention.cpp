// Attention in the threads: whole units, or their spans apart. A unit's spans are merged in ascending order wherever
// they were computed.
#include "executor/attention_units.h"
#include "executor/worker.h"

namespace llamaclust {

int tile_rows(int group) { return std::max(1, kTileQueries / group); }

// One attention step in one thread.
class AttentionWork {
  using Unit = AttentionUnits::Unit;
  using QueryRange = AttentionUnits::QueryRange;

 public:
  AttentionWork(Worker& worker, const AttentionStep& step)
      : worker_(worker),
        step_(step),
        level_(worker.run_.level),
        batch_(worker.run_.batch),
        type_(shape().type),
        tables_(shape().windowed ? batch_.window_tables : batch_.block_tables),
        kv_(level_.attention.kv[static_cast<int>(type_)]),
        units_(step, batch_, worker.run_.tilings),
        scratch_(worker.run_.workspace.attention_scratch(worker.thread_, step.head_dim)) {}

  void run() {
    stores_ = units_.one_a_sequence();
    if (!stores_) store_all();
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

 private:
  const KvShape& shape() const { return worker_.run_.plan.kv_layers[step_.layer]; }
  uint8_t* piece(int kv_head, int block) const {
    const size_t piece_index =
        static_cast<size_t>(block) * static_cast<size_t>(step_.kv_heads) + static_cast<size_t>(kv_head);
    return worker_.run_.kv.layer(step_.layer) + piece_index * kv_piece_bytes(type_, step_.head_dim);
  }
  const int32_t* table(int sequence) const { return tables_.data() + batch_.table_starts[sequence]; }

  const float* rotated(const std::optional<Rotation>& rotation, const float* x, int row, float* out) const {
    if (!rotation) return x;
    const RotationTable& angles = worker_.run_.rotations[rotation->table];
    level_.vector.rope(x, angles.row(units_.position(row)), angles.pairs(), step_.head_dim, rotation->style, out);
    return out;
  }

  void store(int sequence, int row, int kv_head) const {
    const int at = units_.position(row), offset = kv_head * step_.head_dim;
    const float* key = rotated(step_.rotate_k, worker_.line(step_.k, row) + offset, row, scratch_.key);
    kv_.store(key, worker_.line(step_.v, row) + offset, step_.head_dim, at % kKvBlockTokens,
              piece(kv_head, table(sequence)[at / kKvBlockTokens]));
  }

  // Keys and values of all rows, before any thread reads them.
  void store_all() const {
    worker_.share(static_cast<int64_t>(units_.tiles.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const RowTile& tile = units_.tiles[i];
        for (int row = tile.row_begin; row < tile.row_end; row++)
          for (int kv_head = 0; kv_head < step_.kv_heads; kv_head++) store(tile.sequence, row, kv_head);
      }
    });
    worker_.synchronize();
  }

  // Where every sequence has one tile, a unit stores the rows that only it reads, without a barrier.
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

  // Computes one span for those of the loaded queries that see some of it, and fetches the beginning of the next one if
  // this thread goes on there.
  void compute_span(const Unit& unit, int span, bool goes_on, const QueryRange& queries, const SpanSums& sums) const {
    const int start = span * kSpanTokens;
    for (int query = queries.before; query < queries.end; query++) {
      const int row = unit.tile.row_begin + query / unit.heads;
      scratch_.firsts[query - queries.before] = std::max(units_.first_seen(row) - start, 0);
      scratch_.ends[query - queries.before] = std::min(units_.position(row) + 1 - start, kSpanTokens);
    }
    const bool biased = !step_.slopes.empty();
    if (biased) load_bias(unit, start, queries);
    store_span(unit, span);
    const size_t stride = static_cast<size_t>(step_.kv_heads) * kv_piece_bytes(type_, step_.head_dim);
    const int blocks = units_.position(unit.tile.row_end - 1) / kKvBlockTokens + 1;
    const SpanTask task{piece(unit.kv_head, 0),
                        stride,
                        table(unit.tile.sequence) + span * kSpanBlocks,
                        goes_on ? std::max(blocks - (span + 1) * kSpanBlocks, 0) : 0,
                        step_.head_dim,
                        step_.scale,
                        queries.end - queries.before,
                        scratch_.q + queries.before * padded_head(step_.head_dim),
                        scratch_.firsts,
                        scratch_.ends,
                        scratch_.scores,
                        step_.soft_cap,
                        biased ? scratch_.slopes : nullptr,
                        biased ? scratch_.positions : nullptr};
    kv_.span(task, from(sums, queries.before));
  }

  void load_bias(const Unit& unit, int start, const QueryRange& queries) const {
    for (int query = queries.before; query < queries.end; query++) {
      scratch_.positions[query - queries.before] = units_.position(unit.tile.row_begin + query / unit.heads) - start;
      scratch_.slopes[query - queries.before] = step_.slopes[unit.head + query % unit.heads];
    }
  }

  SpanSums from(const SpanSums& sums, int query) const {
    return {sums.maximum + query, sums.sum + query, sums.values + query * padded_head(step_.head_dim)};
  }

  // Adds a span's sums to those of the spans before it; queries that see nothing before it begin with them.
  void merge(const QueryRange& queries, const SpanSums& total, const SpanSums& next) const {
    const int head_dim = step_.head_dim;
    if (queries.joined > queries.before)
      level_.attention.merge(from(total, queries.before), from(next, queries.before), queries.joined - queries.before,
                             head_dim);
    const int count = queries.end - queries.joined;
    const SpanSums to = from(total, queries.joined), source = from(next, queries.joined);
    std::copy_n(source.maximum, count, to.maximum);
    std::copy_n(source.sum, count, to.sum);
    std::copy_n(source.values, count * padded_head(head_dim), to.values);
  }

  void finish(const Unit& unit, const SpanSums& total) const {
    int query = 0;
    for (int row = unit.tile.row_begin; row < unit.tile.row_end; row++)
      for (int head = unit.head; head < unit.head + unit.heads; head++, query++)
        level_.attention.finish(from(total, query).values, total.sum[query], step_.head_dim,
                                worker_.line(step_.out, row) + head * step_.head_dim);
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

  // Few long units: their spans go to different threads, if there is room for all their sums.
  size_t partial_floats() const { return span_sums_floats(units_.most_queries(), step_.head_dim); }
  bool splits_spans() const {
    const int threads = worker_.threads_;
    if (threads == 1 || units_.count() >= 4 * threads) return false;
    const int64_t count = units_.span_count();
    return count > units_.count() &&
           static_cast<size_t>(count) * partial_floats() <= worker_.run_.workspace.partial_floats();
  }
  SpanSums partial(int64_t index) const {
    return span_sums_at(worker_.run_.workspace.partials() + static_cast<size_t>(index) * partial_floats(),
                        units_.most_queries());
  }

  void run_spans() const {
    const int64_t all = units_.span_count();
    worker_.share(all, 1, fixed_tiles(all, worker_.threads_), [this](int64_t begin, int64_t end) {
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

}  // namespace llamaclust
