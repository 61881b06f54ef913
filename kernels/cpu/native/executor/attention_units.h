// How the work of an attention step is cut: into units (rows of one sequence x query heads of one KV head), and a unit
// into the spans that its rows see.
#pragma once

#include <algorithm>

#include "executor/executor.h"

namespace llamaclust {

struct AttentionUnits {
  // Query heads [head, head + heads) of one KV head, for a tile of rows.
  struct Unit {
    RowTile tile;
    int kv_head, head, heads;
  };

  // The queries of a unit that a span concerns: [before, end) see some of it, and of those [joined, end) nothing before
  // it.
  struct QueryRange {
    int before, joined, end;
  };

  AttentionUnits(const AttentionStep& step, const Batch& batch, const std::vector<Tiling>& tilings)
      : step(step),
        batch(batch),
        group(step.heads / step.kv_heads),
        head_groups((group + kTileQueries - 1) / kTileQueries),
        tiles(std::ranges::find(tilings, tile_rows(group), &Tiling::rows)->tiles) {}

  // Every sequence has one tile, and every KV head one unit there.
  bool one_a_sequence() const { return head_groups == 1 && static_cast<int>(tiles.size()) == batch.sequences(); }
  int64_t heads_per_tile() const { return static_cast<int64_t>(step.kv_heads) * head_groups; }
  int64_t count() const { return static_cast<int64_t>(tiles.size()) * heads_per_tile(); }
  int position(int row) const { return batch.positions[row]; }
  // The first position that a row sees.
  int first_seen(int row) const { return std::max(0, position(row) - step.window + 1); }
  // Spans that a tile's rows see.
  int span_begin(const RowTile& tile) const { return first_seen(tile.row_begin) / kSpanTokens; }
  int span_end(const RowTile& tile) const { return position(tile.row_end - 1) / kSpanTokens + 1; }
  int spans(const RowTile& tile) const { return span_end(tile) - span_begin(tile); }

  // The last rows, which see the most, come first, so that the last units are short.
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
    return {rows_while([&](int row) { return position(row) / kSpanTokens < span; }),
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

}  // namespace llamaclust
