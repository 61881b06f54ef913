// Matrix products. Threads divide tiles of 16 output rows, never the sum over k. In mixtures of experts, lines are
// grouped by expert, so that an expert's weights are read once for all of its lines. Grouping does not affect results:
// each line is computed independently, and the experts' outputs are added later, row by row in the router's order.
#include <numeric>

#include "executor/prefetch_choice.h"
#include "executor/worker.h"
#include "level/matmul_ops.h"

namespace llamaclust {

void Worker::multiply_tiles(const MatmulStep& step, int64_t begin, int64_t end, Range rows) {
  int64_t first = 0;
  for (const Product& product : step.products) {
    const Matrix& weight = product.weight;
    const int64_t count = weight.tile_count();
    const int64_t from = std::max(begin - first, int64_t{0}), to = std::min(end - first, count);
    const int multiple = buffer(product.out).multiple;
    const size_t line_bytes = activation_bytes(tile_layout(weight.type).activation, weight.cols);
    if (from < to)
      stage_.level.matmul.matmul(weight, slot(product.slot) + static_cast<size_t>(rows.begin * multiple) * line_bytes,
                                 (rows.end - rows.begin) * multiple, {}, line(product.out, rows.begin),
                                 static_cast<size_t>(weight.rows),
                                 product.bias.empty() ? nullptr : product.bias.data(), static_cast<int>(from),
                                 static_cast<int>(to), stage_.workspace.scratch(thread_), prefetch_of_process());
    first += count;
  }
}

// Returns the number of parts into which rows are divided. It is more than 1 if there are too few panels to occupy the
// threads evenly. Each part decodes the panels again, which takes about as long as multiplying eight rows.
int64_t Worker::row_parts(int64_t panels) const {
  constexpr int64_t kPanelsPerThread = 8, kLeastRows = 96;
  const int64_t wanted = kPanelsPerThread * threads_;
  if (threads_ == 1 || panels >= wanted) return 1;
  return std::clamp(rows_ / kLeastRows, int64_t{1}, (wanted + panels - 1) / panels);
}

void Worker::execute(const MatmulStep& step) {
  const int64_t tiles = rows_ > 0 ? step.tiles() : 0;
  if (rows_ <= kFewRows) {
    const auto multiply = [&](int64_t begin, int64_t end) { multiply_tiles(step, begin, end, {0, rows_}); };
    return share(tiles, 1, fixed_tiles(tiles), multiply, speeds_.measures());
  }
  const int64_t panels = (tiles + kPanelTiles - 1) / kPanelTiles, parts = row_parts(panels);
  const auto multiply_panels = [&](int64_t begin, int64_t end) {
    for (int64_t part = begin / panels; part * panels < end; part++) {
      const int64_t from = std::max(begin - part * panels, int64_t{0}), to = std::min(end - part * panels, panels);
      const Range rows{static_cast<int>(rows_ * part / parts), static_cast<int>(rows_ * (part + 1) / parts)};
      multiply_tiles(step, kPanelTiles * from, std::min(kPanelTiles * to, tiles), rows);
    }
  };
  share(parts * panels, 1, multiply_panels);
}

namespace {

// Reading and decoding a tile takes about as long as multiplying it with this number of lines.
constexpr int64_t kLinesOfReading = 8;

// Divides experts' products among threads, in pieces of some tiles. Every expert with lines has equally many pieces.
struct ExpertWork {
  const ExpertLines& groups;
  int64_t pieces;  // Number of pieces of an expert.

  int64_t of_piece(size_t expert) const {
    const int lines = groups.count(expert);
    return lines == 0 ? 0 : kLinesOfReading + lines;
  }
  int64_t of_expert(size_t expert) const { return pieces * of_piece(expert); }

  // Returns the index of the first piece whose start is at least `work` units after the start of the expert.
  int piece_from(size_t expert, int64_t work) const {
    const int64_t each = of_piece(expert);
    return static_cast<int>(std::clamp((work + each - 1) / each, int64_t{0}, pieces));
  }
};

}  // namespace

// Every thread groups for itself, which is faster than waiting for another one.
ExpertLines Worker::group_by_expert(const ExpertsStep& step) const {
  const ExpertLines groups = stage_.workspace.expert_lines(thread_);
  const ExpertIds own = step.ids();
  const auto chosen = [&](int index) { return line(step.choice, index / step.used)[index % step.used]; };
  const int lines = rows_ * step.used;
  std::fill_n(groups.starts, own.count + 1, 0);
  for (int index = 0; index < lines; index++)
    if (own.has(chosen(index))) groups.starts[own.place(chosen(index))]++;
  std::partial_sum(groups.starts, groups.starts + own.count + 1, groups.starts);
  for (int index = lines - 1; index >= 0; index--) {
    if (!own.has(chosen(index))) continue;
    const int32_t place = --groups.starts[own.place(chosen(index))];
    groups.lines[place] = index;
    groups.rows[place] = index / step.used;
  }
  return groups;
}

void Worker::multiply_expert(const ExpertsStep& step, const ExpertLines& groups, size_t expert, int tile_begin,
                             int tile_end) {
  const int32_t first_line = groups.starts[expert];
  const int32_t* lines = groups.lines + first_line;
  const TokenLines places{step.per_rank ? lines : groups.rows + first_line, lines};
  int first = 0;
  for (const ExpertProduct& product : step.products) {
    const Matrix& weight = product.experts[expert];
    const int from = std::max(tile_begin - first, 0), to = std::min(tile_end - first, weight.tile_count());
    if (from < to)
      stage_.level.matmul.matmul(weight, slot(step.slot), groups.count(expert), places, line(product.out, 0),
                               static_cast<size_t>(weight.rows), nullptr, from, to, stage_.workspace.scratch(thread_),
                               prefetch_of_process());
    first += weight.tile_count();
  }
}

void Worker::execute(const ExpertsStep& step) {
  const ExpertLines groups = group_by_expert(step);
  const size_t experts = step.products[0].experts.size();
  int tiles = 0;
  for (const ExpertProduct& product : step.products) tiles += product.experts[0].tile_count();
  const int piece_tiles = rows_ > kFewRows ? kPanelTiles : 1;
  const ExpertWork work{groups, (tiles + piece_tiles - 1) / piece_tiles};
  int64_t all = 0, greatest = 1;
  for (size_t expert = 0; expert < experts; expert++) {
    all += work.of_expert(expert);
    greatest = std::max(greatest, work.of_piece(expert));
  }
  share(all, greatest, [&](int64_t begin, int64_t end) {
    for (size_t expert = 0; expert < experts; expert++) {
      if (groups.count(expert) == 0) continue;
      const int from = work.piece_from(expert, begin), to = work.piece_from(expert, end);
      if (from < to) multiply_expert(step, groups, expert, from * piece_tiles, std::min(to * piece_tiles, tiles));
      begin -= work.of_expert(expert);
      end -= work.of_expert(expert);
    }
  });
}

// Line row * parts + part of the activations and of the result belongs to `part`.
void Worker::execute(const HeadsStep& step) {
  const int parts = step.parts(), tiles = step.weights[0].tile_count();
  int32_t* lines = stage_.workspace.expert_lines(thread_).lines;
  const int64_t grain = rows_ > kFewRows ? kPanelTiles : 1;
  share(int64_t{parts} * tiles, grain, [&](int64_t begin, int64_t end) {
    for (int part = static_cast<int>(begin / tiles); part * int64_t{tiles} < end; part++) {
      const int from = static_cast<int>(std::max(begin - part * int64_t{tiles}, int64_t{0}));
      const int to = static_cast<int>(std::min(end - part * int64_t{tiles}, int64_t{tiles}));
      for (int row = 0; row < rows_; row++) lines[row] = row * parts + part;
      const Matrix& weight = step.weights[part];
      stage_.level.matmul.matmul(weight, slot(step.slot), rows_, {lines, lines}, line(step.out, 0),
                                 static_cast<size_t>(weight.rows), nullptr, from, to,
                                 stage_.workspace.scratch(thread_), prefetch_of_process());
    }
  });
}

}  // namespace llamaclust
