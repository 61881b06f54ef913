// The kernel that plans a microbatch's attention: it divides rows into tiles and items.
#pragma once

#include "sequences.cuh"
#include "work.cuh"

namespace llamaclust::cuda {
namespace {

// The tile that starts with a row.
struct Tile {
  int table, rows, span_begin, spans, kind;
  DEVICE int slots() const { return spans > 1 ? rows * spans : 0; }
};

struct Cutter {
  const int32_t *positions, *sequence_starts, *table_starts;
  int sequences, tile_rows, few_rows;
  Window window;

  // Returns a tile without rows if none starts with this row.
  DEVICE Tile tile(int row) const {
    const int sequence = sequence_of(row, sequence_starts, sequences);
    if ((row - sequence_starts[sequence]) % tile_rows != 0) return {0, 0, 0, 0, 0};
    const int left = sequence_starts[sequence + 1] - row, rows = left < tile_rows ? left : tile_rows;
    const int begin = window.first_seen(row, positions[row]) / kSpanTokens;
    const int last = row + rows - 1, end = (window.end_seen(last, positions[last]) - 1) / kSpanTokens + 1;
    return {table_starts[sequence], rows, begin, end - begin, rows <= few_rows ? Work::kFew : Work::kMany};
  }
};

DEVICE void write_rows(const Cutter& cutter, const Tile& tile, int row, int slot, const Work& work) {
  for (int i = 0; i < tile.rows; i++) {
    const int position = cutter.positions[row + i];
    const int begin = cutter.window.first_seen(row + i, position) / kSpanTokens;
    const int end = (cutter.window.end_seen(row + i, position) - 1) / kSpanTokens + 1;
    work.table(row + i) = tile.table;
    work.spans(row + i) = slot < 0 ? 0 : end - begin;
    work.slot(row + i) = slot + (begin - tile.span_begin) * tile.rows + i;
    work.stride(row + i) = tile.rows;
  }
}

DEVICE void write_items(const Tile& tile, int row, int position, int slot, int first, const Work& work) {
  if (slot < 0) {
    const int end = tile.span_begin + tile.spans;
    work.item(tile.kind, first) = {row, tile.rows, tile.table, tile.span_begin, end, -1, position, 0};
    return;
  }
  for (int i = 0; i < tile.spans; i++) {
    const int span = tile.span_begin + i;
    work.item(tile.kind, first + i) = {row, tile.rows, tile.table, span, span + 1, slot + i * tile.rows, position, tile.spans};
  }
}

// The division of the values of few queries (see PLAN).
struct Slices {
  int count, places;
};

DEVICE void cut_rows(const Cutter& cutter, int rows, int kv_heads, int slots, int split_below, const Slices& slices,
                     const Work& work) {
  SHARED(int32_t, tiles, [2]);
  SHARED(int32_t, wanted, [2]);
  SHARED(int32_t, items, [2]);
  SHARED(int32_t, taken, [1]);
  if (threadIdx.x < 2) tiles[threadIdx.x] = wanted[threadIdx.x] = items[threadIdx.x] = 0;
  if (threadIdx.x == 0) taken[0] = 0;
  for (int i = threadIdx.x; i < rows * kv_heads; i += 256) work.done(i) = 0;
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += 256) {
    const Tile tile = cutter.tile(row);
    if (tile.rows == 0) continue;
    atomicAdd(&tiles[tile.kind], 1);
    atomicAdd(&wanted[tile.kind], tile.slots());
  }
  __syncthreads();
  const bool few = wanted[Work::kFew] <= slots;
  const bool many = tiles[Work::kMany] < split_below && wanted[Work::kMany] <= slots - (few ? wanted[Work::kFew] : 0);
  for (int i = threadIdx.x; i < rows; i += 256) {
    const int row = rows - 1 - i;
    const Tile tile = cutter.tile(row);
    if (tile.rows == 0) continue;
    const bool split = (tile.kind == Work::kFew ? few : many) && tile.spans > 1;
    const int slot = split ? atomicAdd(&taken[0], tile.slots()) : -1;
    write_rows(cutter, tile, row, slot, work);
    write_items(tile, row, cutter.positions[row], slot, atomicAdd(&items[tile.kind], split ? tile.spans : 1), work);
  }
  __syncthreads();
  if (threadIdx.x < 2) work.count(threadIdx.x) = items[threadIdx.x];
  if (threadIdx.x == 0) work.slices() = items[Work::kFew] * slices.count <= slices.places ? slices.count : 1;
}

}  // namespace

// Divides the rows of each sequence into tiles of up to tile_rows rows, and tiles into spans for different blocks.
// Tiles of up to few_rows rows are divided; others only if there are fewer of them than split_below. No tile of a kind
// is divided unless there are slots for all sums of that kind. Long tiles come first. The values of few queries are
// divided into slices of channels if their items, times the slices, are at most `places`, the number of blocks for a KV
// head or for a part of its query heads; each slice computes the scores again. Launched once per microbatch, for any
// number of rows, with one block of 256 threads.
#define PLAN                                                                                                          \
  KERNEL(256, plan, const int32_t* header, const int32_t* positions, const int32_t* sequence_starts,                  \
         const int32_t* table_starts, int32_t tile_rows, int32_t few_rows, int32_t window, int32_t chunked,           \
         int32_t max_rows, int32_t slots, int32_t split_below, int32_t value_slices, int32_t places,                  \
         int32_t kv_heads, int32_t* to SEEN_ARGUMENTS) {                                                              \
    const Window seen_by{window, chunked SEEN_VALUES};                                                                \
    const Cutter cutter{positions, sequence_starts, table_starts, header[1], tile_rows, few_rows, seen_by};           \
    cut_rows(cutter, header[0], kv_heads, slots, split_below, {value_slices, places}, Work(to, max_rows, slots));     \
  }

}  // namespace llamaclust::cuda
