#include "executor/plan.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "pack/pack.h"

namespace llamaclust {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("program: ") + what);
}

namespace {

constexpr int kMaxWidth = 1 << 24;
constexpr int kMaxStateFloats = 1 << 26;
constexpr int kMaxSections = 16;
constexpr double kMaxAngle = 4e6;  // Limit of sincos_double.
// Decoding weights again for each band takes about as long as multiplying eight rows.
constexpr int kBandRows = 1024;

// Kinds of steps that an adapter may have. Of what they write, other steps read only sums, which are complete without
// them.
bool is_of_adapters(const Step& step) {
  return std::holds_alternative<QuantizeStep>(step) || std::holds_alternative<MatmulStep>(step) ||
         std::holds_alternative<ElementwiseStep>(step) || std::holds_alternative<AddAdaptedStep>(step);
}

bool needs_all_rows(const Step& step) {
  return std::holds_alternative<AttentionStep>(step) || std::holds_alternative<ConvolveStep>(step) ||
         std::holds_alternative<DeltaRuleStep>(step) || std::holds_alternative<ScanStep>(step) ||
         std::holds_alternative<SelectStep>(step);
}

// Returns whether the step may write only parts of lines, or a buffer whose contents must last until the end of the
// run.
bool keeps_lines(const Step& step) {
  return std::holds_alternative<ExpertsStep>(step) || std::holds_alternative<ExpertRowStep>(step) ||
         std::holds_alternative<PlaceExpertsStep>(step) || std::holds_alternative<OutputStep>(step);
}

}  // namespace

Plan::Plan(const Limits& limits) : limits(limits) {
  require(limits.max_tokens > 0 && limits.max_tokens <= 1 << 20, "max_tokens must be 1 to 2^20");
  require(limits.max_outputs > 0 && limits.max_outputs <= limits.max_tokens, "max_outputs must be 1 to max_tokens");
  require(limits.max_sequences > 0 && limits.max_sequences <= limits.max_tokens,
          "max_sequences must be 1 to max_tokens");
  require(limits.max_context_tokens > 0 && limits.max_context_tokens <= 1 << 24,
          "max_context_tokens must be 1 to 2^24");
  require(limits.kv_blocks > 0 && limits.kv_blocks <= 1 << 26, "kv_blocks must be 1 to 2^26");
  require(limits.window_blocks >= 0 && limits.window_blocks <= 1 << 26, "window_blocks must be 0 to 2^26");
  require(limits.state_blocks >= 0 && limits.state_blocks <= 1 << 26, "state_blocks must be 0 to 2^26");
}

const Buffer& Plan::buffer(BufferId id) const {
  require(id >= 0 && static_cast<size_t>(id) < buffers.size(), "unknown buffer");
  return buffers[id];
}

BufferId Plan::add_buffer(const Buffer& buffer) {
  require(buffer.width > 0 && buffer.width <= kMaxWidth, "buffer width out of range");
  require(buffer.multiple > 0 && buffer.multiple <= 256, "buffer multiple out of range");
  require(buffer.rows > 0 && buffer.rows <= limits.max_tokens, "buffer rows out of range");
  buffers.push_back(buffer);
  return static_cast<BufferId>(buffers.size()) - 1;
}

int Plan::add_rotation(RotationAngles angles) {
  require(angles.pairs() > 0 && angles.pairs() <= kMaxHeadChannels / 2, "rotation of no or too many channels");
  for (const double frequency : angles.frequencies)
    require(std::abs(frequency) * limits.max_context_tokens <= kMaxAngle, "rotation angles out of range");
  require(std::isfinite(angles.scale), "a rotation scale that is no number");
  require(angles.sections.empty() || angles.sections.size() == angles.frequencies.size(), "a section for each pair");
  for (const int section : angles.sections) {
    require(section >= 0 && section < kMaxSections, "a section of rope positions out of range");
    sections = std::max(sections, section + 1);
  }
  rotations.push_back(std::move(angles));
  return static_cast<int>(rotations.size()) - 1;
}

int Plan::add_kv_layer(const KvShape& shape) {
  require(shape.kv_heads > 0 && shape.kv_heads <= 65536, "KV heads out of range");
  require(shape.head_dim > 0 && shape.head_dim <= kMaxHeadChannels, "head_dim out of range");
  require(!shape.windowed || limits.window_blocks > 0, "a windowed layer without blocks");
  kv_layers.push_back(shape);
  return static_cast<int>(kv_layers.size()) - 1;
}

int Plan::add_state(int floats) {
  require(floats > 0 && floats <= kMaxStateFloats, "a state of no or too many numbers");
  kv_layers.push_back({.kv_heads = 0, .head_dim = 0, .type = KvType::F16, .state_floats = floats});
  has_states = true;
  return static_cast<int>(kv_layers.size()) - 1;
}

void Plan::set_result(BufferId id) {
  require(!buffer(id).private_copy && buffer(id).multiple == 1, "the result must be one line a row, shared");
  buffers[id].is_local = false;
  result = id;
}

int Plan::unpacked_cols(const UnpackStep& step) const {
  const int segment = segment_cols(step.format);
  return buffer(step.x).width / packed_floats(step.format, segment) * segment;
}

// Rows are divided among the threads, or if there are few, each thread computes all of them for itself. In both cases
// consecutive row by row steps of the same rows need no synchronization, because a thread computes all of them for a
// row. A shared step must wait until the rows of other threads are
// computed (if they were divided), and until slow threads have read what it overwrites.
Sync Plan::sync_before(const Access& access, bool waits) {
  Sync sync = after_shared_ ? Sync::Always : Sync::None;
  if (sync == Sync::None && (!access.row_by_row || waits)) {
    const auto was_read = [this](BufferId id) {
      return !buffer(id).private_copy && std::ranges::count(read_since_, id) > 0;
    };
    if (std::ranges::any_of(access.writes, was_read))
      sync = Sync::Always;
    else if (after_rows_)
      sync = Sync::IfShared;
  }
  if (sync == Sync::Always) read_since_.clear();
  if (sync != Sync::None) after_rows_ = false;
  after_shared_ = !access.row_by_row;
  if (access.row_by_row) {
    after_rows_ = true;
    read_since_.insert(read_since_.end(), access.reads.begin(), access.reads.end());
  }
  return sync;
}

// Records that channels [start, end) of each line are written. Lines must be filled from their first channel to the
// last.
void Plan::fill(Buffer& buffer, int start, int end) {
  const int before = buffer.stretch == stretch_ ? buffer.filled : 0;
  buffer.is_local &= start <= before;
  buffer.filled = std::max(before, end);
  buffer.stretch = stretch_;
}

void Plan::follow(const Step& step, const Access& access) {
  const bool is_whole = selects || needs_all_rows(step);
  const auto* attention = std::get_if<AttentionStep>(&step);
  for (BufferId id : access.reads) {
    Buffer& x = buffers[id];
    const bool is_stored = attention != nullptr && id != attention->q;  // It was stored in the previous stretch.
    x.is_local &= x.filled == x.width && (is_stored ? x.stretch == stretch_ - 1 : !is_whole && x.stretch == stretch_);
  }
  const auto* copied = std::get_if<CopyChannelsStep>(&step);
  for (BufferId id : access.writes) {
    Buffer& out = buffers[id];
    out.is_local &= !is_whole && !keeps_lines(step);
    const int start = copied == nullptr ? 0 : copied->out_start * copied->parts;
    fill(out, start, copied == nullptr ? out.width : start + copied->channels * copied->parts);
  }
}

// Number of result rows in a band. Rows that are merged into one row of the result stay in one band.
int Plan::band_units() const { return std::max(kBandRows / merged, 1); }

bool Plan::has_bands() const {
  return looks_ahead_ && gathers == 0 && parts.empty() && !has_adapters_ && limits.max_tokens > kBandRows;
}

int Plan::bands(int rows) const { return (rows / merged + band_units() - 1) / band_units(); }

size_t Plan::in_band(size_t rows_or_bytes) const {
  const size_t band = static_cast<size_t>(band_units()) * static_cast<size_t>(merged);
  const size_t all = static_cast<size_t>(limits.max_tokens);
  return has_bands() && band < all ? (rows_or_bytes * band + all - 1) / all : rows_or_bytes;
}

size_t Plan::rows_of(const Buffer& buffer) const {
  const size_t rows = static_cast<size_t>(buffer.rows);
  return buffer.is_local ? in_band(rows) : rows;
}

size_t Plan::end_of_stretch(size_t step) const {
  while (step < steps.size() && !needs_all_rows(steps[step].step)) step++;
  return step;
}

void Plan::add(Step step) {
  if (needs_all_rows(step) || (!steps.empty() && needs_all_rows(steps.back().step))) stretch_++;
  if (const auto* attention = std::get_if<AttentionStep>(&step)) looks_ahead_ |= !attention->causal;
  const int rows_before = rows();
  const Access access = check(step);
  const bool placed = std::holds_alternative<PlaceExpertsStep>(step) || std::holds_alternative<CopyChannelsStep>(step);
  const bool output =
      std::holds_alternative<OutputStep>(step) || std::holds_alternative<PackStep>(step) ||
      (placed && !buffer(access.writes[0]).private_copy);
  const bool in_place = std::holds_alternative<AddAdaptedStep>(step) ||
                        (std::holds_alternative<ElementwiseStep>(step) && !buffer(access.writes[0]).private_copy);
  require(!adapter_ || is_of_adapters(step), "a step of an adapter that others depend on");
  for (BufferId id : access.reads) require(buffer(id).rows >= rows_before, "a buffer for fewer rows");
  for (BufferId id : access.writes) {
    require(buffer(id).private_copy == (access.row_by_row && !output && !in_place),
            "a buffer written by both kinds of steps");
    require(buffer(id).rows >= rows(), "a buffer for fewer rows");
  }
  follow(step, access);
  const bool is_select = std::holds_alternative<SelectStep>(step) || std::holds_alternative<MergeStep>(step);
  const Sync before = sync_before(access, is_select || in_place || after_selection_);
  after_selection_ = is_select;
  after_shared_ = after_shared_ || in_place;  // A later step must not read what another thread is still writing.
  steps.push_back({std::move(step), before, access.row_by_row && !is_select, adapter_});
}

void Plan::enter_adapter(int adapter) {
  require(adapter >= 0 && adapter < kMaxAdapters, "adapter out of range");
  require(!adapter_, "an adapter in an adapter");
  adapter_ = adapter;
  has_adapters_ = true;
}

// The threads synchronize before the next step, as they do if the adapter's steps are skipped.
void Plan::leave_adapter() {
  adapter_.reset();
  after_shared_ = true;
}

// The threads synchronize at the start of a run.
void Plan::begin_part() {
  require(!adapter_ && !selects && (steps.empty() || !parts.empty()), "a part of a program that is whole");
  parts.push_back(steps.size());
  after_shared_ = after_rows_ = false;
  read_since_.clear();
}

std::pair<size_t, size_t> Plan::steps_of(int part) const {
  if (parts.empty()) return {0, steps.size()};
  const size_t at = static_cast<size_t>(part);
  return {parts[at], at + 1 < parts.size() ? parts[at + 1] : steps.size()};
}

}  // namespace llamaclust
