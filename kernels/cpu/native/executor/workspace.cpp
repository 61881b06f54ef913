#include "executor/workspace.h"

#include <algorithm>

#include "level/matmul_ops.h"

namespace llamaclust {
namespace {

constexpr size_t kPage = 4096;

size_t attention_scratch_bytes(int head_dim) {
  const size_t channels = static_cast<size_t>(head_dim) + 16;
  return sizeof(float) * (kTileQueries * channels + kScoredQueries * kSpanTokens + channels + 4 * kTileQueries +
                          2 * span_sums_floats(kTileQueries, head_dim));
}

// Collects the maximum needs of the steps. They are per thread, except the sums of spans.
struct Needs {
  const Limits& limits;
  size_t scratch_bytes = 0, expert_lines = 0, experts = 0, partial_floats = 0;

  void operator()(const MatmulStep&) { add_scratch(kMatmulScratchBytes); }
  void operator()(const ExpertsStep& step) {
    add_scratch(kMatmulScratchBytes);
    expert_lines = std::max(expert_lines, static_cast<size_t>(limits.max_tokens) * static_cast<size_t>(step.used));
    experts = std::max(experts, step.products[0].experts.size());
  }
  void operator()(const HeadsStep&) {
    add_scratch(kMatmulScratchBytes);
    expert_lines = std::max(expert_lines, static_cast<size_t>(limits.max_tokens));
  }
  // Scores and selection values, of experts and groups.
  void operator()(const ChooseStep& step) {
    add_scratch(2 * static_cast<size_t>(step.experts + step.groups) * sizeof(float));
  }
  // Room for sums of spans suffices for two sequences that decode at the end of the maximum context.
  void operator()(const AttentionStep& step) {
    add_scratch(attention_scratch_bytes(step.head_dim));
    const size_t spans = static_cast<size_t>(limits.max_context_tokens + kSpanTokens - 1) / kSpanTokens;
    const int group = step.heads / step.kv_heads, head_groups = (group + kTileQueries - 1) / kTileQueries;
    const size_t units = static_cast<size_t>(step.kv_heads) * static_cast<size_t>(head_groups);
    const size_t floats = 2 * units * spans * span_sums_floats(std::min(group, kTileQueries), step.value_dim);
    partial_floats = std::max(partial_floats, floats);
  }
  void operator()(const auto&) {}
  void add_scratch(size_t bytes) { scratch_bytes = std::max(scratch_bytes, bytes); }
};

}  // namespace

Workspace::Workspace(const Plan& plan, int threads) {
  Layout all, each;
  for (const Buffer& buffer : plan.buffers) {
    const size_t row_bytes = sizeof(float) * static_cast<size_t>(buffer.width) * static_cast<size_t>(buffer.multiple);
    shared_.push_back(all.add(plan.rows_of(buffer) * row_bytes));
    own_.push_back(each.add(buffer.private_copy ? kPrivateRows * row_bytes : 0));
  }
  for (const ActivationSlot& slot : plan.slots) {
    shared_slots_.push_back(all.add(std::max(plan.in_band(slot.max_bytes), slot.max_selected_bytes)));
    own_slots_.push_back(each.add(kPrivateRows * slot.max_row_bytes));
  }
  Needs needs{plan.limits};
  for (const PlannedStep& planned : plan.steps) std::visit(needs, planned.step);
  scratch_ = each.add(needs.scratch_bytes);
  max_expert_lines_ = needs.expert_lines;
  const size_t expert_ints = needs.expert_lines == 0 ? 0 : 2 * needs.expert_lines + needs.experts + 1;
  expert_lines_ = each.add(expert_ints * sizeof(int32_t));
  partial_floats_ = threads > 1 ? needs.partial_floats : 0;
  partials_ = all.add(partial_floats_ * sizeof(float));
  threads_ = (all.bytes() + kPage - 1) / kPage * kPage;
  thread_bytes_ = (each.bytes() + kPage - 1) / kPage * kPage;
  bytes_ = threads_ + static_cast<size_t>(threads) * thread_bytes_;
}

AttentionScratch Workspace::attention_scratch(int thread, int head_dim) const {
  const size_t channels = static_cast<size_t>(head_dim) + 16;
  float* q = reinterpret_cast<float*>(scratch(thread));
  float* scores = q + kTileQueries * channels;
  float* key = scores + kScoredQueries * kSpanTokens;
  int* firsts = reinterpret_cast<int*>(key + channels);
  float* slopes = key + channels + 3 * kTileQueries;
  float* total = slopes + kTileQueries;
  float* next = total + span_sums_floats(kTileQueries, head_dim);
  return {q,
          scores,
          key,
          firsts,
          firsts + kTileQueries,
          firsts + 2 * kTileQueries,
          slopes,
          span_sums_at(total, kTileQueries),
          span_sums_at(next, kTileQueries)};
}

ExpertLines Workspace::expert_lines(int thread) const {
  int32_t* lines = reinterpret_cast<int32_t*>(thread_base(thread) + expert_lines_);
  return {lines, lines + max_expert_lines_, lines + 2 * max_expert_lines_};
}

SpanSums span_sums_at(float* memory, int queries) {
  const size_t padded = (static_cast<size_t>(queries) + 15) / 16 * 16 + 16;
  return {memory, memory + padded, memory + 2 * padded};
}

}  // namespace llamaclust
