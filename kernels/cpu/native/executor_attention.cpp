// Attention: work is cut into units (rows of one sequence x query heads of one KV head), and long contexts of few units
// into spans. A unit's spans are merged in ascending order wherever they were computed.
#include <algorithm>

#include "executor_worker.h"

namespace llamaclust {

int tile_rows(int group) { return std::max(1, kTileQueries / group); }

// One attention step in one thread.
class AttentionWork {
 public:
  AttentionWork(Worker& worker, const AttentionStep& step)
      : worker_(worker),
        step_(step),
        level_(worker.run_.level),
        batch_(worker.run_.batch),
        type_(worker.run_.plan.kv_layers[static_cast<size_t>(step.layer)].type),
        kv_(level_.attention.kv[static_cast<int>(type_)]),
        group_(step.heads / step.kv_heads),
        parts_((group_ + kTileQueries - 1) / kTileQueries),
        tiles_(find_tiles()),
        scratch_(worker.run_.workspace.attention_scratch(worker.thread_, step.head_dim)) {}

  void run() {
    stores_ = parts_ == 1 && static_cast<int>(tiles_.size()) == batch_.sequences();
    if (!stores_) store_all();
    if (splits_spans())
      run_spans();
    else
      worker_.share(unit_count(), 1, [this](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
          worker_.ahead_.fetch();
          whole_unit(i);
        }
      });
  }

 private:
  // Query heads [head, head + heads) of one KV head, for a tile of rows.
  struct Unit {
    RowTile tile;
    int kv_head, head, heads;
  };

  const std::vector<RowTile>& find_tiles() const {
    const auto& all = worker_.run_.tilings;
    return std::ranges::find(all, tile_rows(group_), &Tiling::rows)->tiles;
  }
  int64_t heads_per_tile() const { return static_cast<int64_t>(step_.kv_heads) * parts_; }
  int64_t unit_count() const { return static_cast<int64_t>(tiles_.size()) * heads_per_tile(); }
  int position(int row) const { return batch_.positions[static_cast<size_t>(row)]; }
  // The first position that a row sees.
  int first_seen(int row) const { return std::max(0, position(row) - step_.window + 1); }
  // Spans that a tile's rows see.
  int span_begin(const RowTile& tile) const { return first_seen(tile.row_begin) / kSpanTokens; }
  int span_end(const RowTile& tile) const { return position(tile.row_end - 1) / kSpanTokens + 1; }
  int spans(const RowTile& tile) const { return span_end(tile) - span_begin(tile); }

  // The last rows, which see the most, come first: what is left at the end is short.
  Unit unit(int64_t index) const {
    const RowTile& tile = tiles_[tiles_.size() - 1 - static_cast<size_t>(index / heads_per_tile())];
    const int rest = static_cast<int>(index % heads_per_tile()), kv_head = rest / parts_, part = rest % parts_;
    const int first = part * kTileQueries;
    return {tile, kv_head, kv_head * group_ + first, std::min(kTileQueries, group_ - first)};
  }

  uint8_t* piece(int kv_head, int block) const {
    const size_t piece_index =
        static_cast<size_t>(block) * static_cast<size_t>(step_.kv_heads) + static_cast<size_t>(kv_head);
    return worker_.run_.kv.layer(step_.layer) + piece_index * kv_piece_bytes(type_, step_.head_dim);
  }
  const int32_t* table(int sequence) const {
    return batch_.block_tables.data() + batch_.table_starts[static_cast<size_t>(sequence)];
  }

  const float* rotated(const std::optional<Rotation>& rotation, const float* x, int row, float* out) const {
    if (!rotation) return x;
    const RotationTable& angles = worker_.run_.rotations[static_cast<size_t>(rotation->table)];
    level_.vector.rope(x, angles.row(position(row)), angles.pairs(), step_.head_dim, rotation->style, out);
    return out;
  }

  void store(int sequence, int row, int kv_head) const {
    const int at = position(row), offset = kv_head * step_.head_dim;
    const float* key = rotated(step_.rotate_k, worker_.line(step_.k, row) + offset, row, scratch_.key);
    kv_.store(key, worker_.line(step_.v, row) + offset, step_.head_dim, at % kKvBlockTokens,
              piece(kv_head, table(sequence)[at / kKvBlockTokens]));
  }

  // Keys and values of all rows, before anyone reads them.
  void store_all() const {
    worker_.share(static_cast<int64_t>(tiles_.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const RowTile& tile = tiles_[static_cast<size_t>(i)];
        for (int row = tile.row_begin; row < tile.row_end; row++)
          for (int kv_head = 0; kv_head < step_.kv_heads; kv_head++) store(tile.sequence, row, kv_head);
      }
    });
    worker_.meet();
  }

  // Where every sequence has one tile, a unit stores the rows that only it reads, and nobody waits.
  void store_span(const Unit& unit, int span) const {
    for (int row = unit.tile.row_begin; stores_ && row < unit.tile.row_end; row++)
      if (position(row) / kSpanTokens == span) store(unit.tile.sequence, row, unit.kv_head);
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

  // Which queries of a unit have to do with a span: [before, end) see some of it, and of those [joined, end) nothing
  // before it.
  struct Part {
    int before, joined, end;
  };
  Part part(const Unit& unit, int span) const {
    const auto rows_while = [&](auto&& holds) {
      int row = unit.tile.row_begin;
      while (row < unit.tile.row_end && holds(row)) row++;
      return (row - unit.tile.row_begin) * unit.heads;
    };
    return {rows_while([&](int row) { return position(row) / kSpanTokens < span; }),
            rows_while([&](int row) { return first_seen(row) / kSpanTokens < span; }),
            rows_while([&](int row) { return first_seen(row) / kSpanTokens <= span; })};
  }

  // Computes one span for those of the loaded queries that see some of it, and fetches the beginning of the next one if
  // this thread goes on there.
  void compute_span(const Unit& unit, int span, bool goes_on, const Part& part, const SpanSums& sums) const {
    const int start = span * kSpanTokens;
    for (int query = part.before; query < part.end; query++) {
      const int row = unit.tile.row_begin + query / unit.heads;
      scratch_.firsts[query - part.before] = std::max(first_seen(row) - start, 0);
      scratch_.ends[query - part.before] = std::min(position(row) + 1 - start, kSpanTokens);
    }
    store_span(unit, span);
    const size_t stride = static_cast<size_t>(step_.kv_heads) * kv_piece_bytes(type_, step_.head_dim);
    const int blocks = position(unit.tile.row_end - 1) / kKvBlockTokens + 1;
    const SpanTask task{piece(unit.kv_head, 0),
                        stride,
                        table(unit.tile.sequence) + span * kSpanBlocks,
                        goes_on ? std::max(blocks - (span + 1) * kSpanBlocks, 0) : 0,
                        step_.head_dim,
                        step_.scale,
                        part.end - part.before,
                        scratch_.q + part.before * padded_head(step_.head_dim),
                        scratch_.firsts,
                        scratch_.ends,
                        scratch_.scores};
    kv_.span(task, from(sums, part.before));
  }

  SpanSums from(const SpanSums& sums, int query) const {
    return {sums.maximum + query, sums.sum + query, sums.values + query * padded_head(step_.head_dim)};
  }

  // Adds a span's sums to those of the spans before it; queries that see nothing before it begin with them.
  void merge(const Part& part, const SpanSums& total, const SpanSums& next) const {
    const int head_dim = step_.head_dim;
    if (part.joined > part.before)
      level_.attention.merge(from(total, part.before), from(next, part.before), part.joined - part.before, head_dim);
    const int count = part.end - part.joined;
    const SpanSums to = from(total, part.joined), source = from(next, part.joined);
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
    const Unit unit = this->unit(index);
    load_queries(unit);
    for (int span = span_begin(unit.tile); span < span_end(unit.tile); span++) {
      const Part part = this->part(unit, span);
      const bool begins = span == span_begin(unit.tile);
      compute_span(unit, span, true, part, begins ? scratch_.total : scratch_.next);
      if (!begins) merge(part, scratch_.total, scratch_.next);
    }
    finish(unit, scratch_.total);
  }

  // Few long units: their spans go to different threads, if there is room for all their sums.
  int most_queries() const {
    int rows = 0;
    for (const RowTile& tile : tiles_) rows = std::max(rows, tile.row_end - tile.row_begin);
    return rows * std::min(group_, kTileQueries);
  }
  size_t partial_floats() const { return span_sums_floats(most_queries(), step_.head_dim); }
  int64_t span_count() const {
    int64_t count = 0;
    for (const RowTile& tile : tiles_) count += spans(tile);
    return count * heads_per_tile();
  }
  bool splits_spans() const {
    const int threads = worker_.threads_;
    if (threads == 1 || unit_count() >= 4 * threads) return false;
    const int64_t count = span_count();
    return count > unit_count() &&
           static_cast<size_t>(count) * partial_floats() <= worker_.run_.workspace.partial_floats();
  }
  SpanSums partial(int64_t index) const {
    return span_sums_at(worker_.run_.workspace.partials() + static_cast<size_t>(index) * partial_floats(),
                        most_queries());
  }

  void run_spans() const {
    const int64_t count = span_count();
    worker_.share(count, 1, fixed_tiles(count, worker_.threads_), [this](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (int64_t i = 0; i < unit_count() && first < end; i++) {
        const Unit unit = this->unit(i);
        const int64_t count = spans(unit.tile);
        if (first + count > begin) load_queries(unit);
        const int64_t last = std::min(end - first, count);
        for (int64_t at = std::max(begin - first, int64_t{0}); at < last; at++) {
          const int span = span_begin(unit.tile) + static_cast<int>(at);
          compute_span(unit, span, at + 1 < last, part(unit, span), partial(first + at));
        }
        first += count;
      }
    });
    worker_.meet();
    worker_.share(unit_count(), 1, [this](int64_t begin, int64_t end) {
      int64_t first = 0;
      for (int64_t i = 0; i < end; i++) {
        const Unit unit = this->unit(i);
        if (i >= begin) merge_spans(unit, first);
        first += spans(unit.tile);
      }
    });
  }

  void merge_spans(const Unit& unit, int64_t first) const {
    const SpanSums total = partial(first);
    for (int i = 1; i < spans(unit.tile); i++)
      merge(part(unit, span_begin(unit.tile) + i), total, partial(first + i));
    finish(unit, total);
  }

  Worker& worker_;
  const AttentionStep& step_;
  const Level& level_;
  const Batch& batch_;
  const KvType type_;
  const KvOps& kv_;
  const int group_, parts_;
  const std::vector<RowTile>& tiles_;
  const AttentionScratch scratch_;
  bool stores_ = false;
};

void Worker::execute(const AttentionStep& step) { AttentionWork(*this, step).run(); }

}  // namespace llamaclust
