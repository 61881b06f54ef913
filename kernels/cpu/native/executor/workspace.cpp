#include "executor/workspace.h"

#include <algorithm>

#include "pack/pack.h"

namespace llamaclust {
namespace {

constexpr size_t kPage = 4096;

size_t attention_scratch_bytes(int head_dim) {
  const size_t channels = static_cast<size_t>(head_dim) + 16;
  return sizeof(float) * (kTileQueries * channels + kScoredQueries * kSpanTokens + channels + 4 * kTileQueries +
                          2 * span_sums_floats(kTileQueries, head_dim));
}

struct ScratchBytes {
  size_t operator()(const MatmulStep& step) const {
    size_t bytes = 0;
    for (const Product& product : step.products) bytes = std::max(bytes, matmul_scratch_bytes(product.weight.cols));
    return bytes;
  }
  size_t operator()(const ExpertsStep& step) const {
    size_t bytes = 0;
    for (const ExpertProduct& product : step.products)
      bytes = std::max(bytes, matmul_scratch_bytes(product.experts[0].cols));
    return bytes;
  }
  size_t operator()(const ChooseStep& step) const { return static_cast<size_t>(step.experts) * sizeof(float); }
  size_t operator()(const AttentionStep& step) const { return attention_scratch_bytes(step.head_dim); }
  template <typename Other>
  size_t operator()(const Other&) const {
    return 0;
  }
};

// Enough for two sequences that decode at the end of the longest context.
size_t partial_floats_of(const AttentionStep& step, int max_context_tokens) {
  const size_t spans = static_cast<size_t>(max_context_tokens + kSpanTokens - 1) / kSpanTokens;
  const int group = step.heads / step.kv_heads, head_groups = (group + kTileQueries - 1) / kTileQueries;
  const size_t units = static_cast<size_t>(step.kv_heads) * static_cast<size_t>(head_groups);
  return 2 * units * spans * span_sums_floats(std::min(group, kTileQueries), step.head_dim);
}

}  // namespace

Workspace::Workspace(const Plan& plan, int threads) {
  Layout all, each;
  const size_t tokens = static_cast<size_t>(plan.limits.max_tokens),
               outputs = static_cast<size_t>(plan.limits.max_outputs);
  for (const Buffer& buffer : plan.buffers) {
    const size_t row_bytes = sizeof(float) * static_cast<size_t>(buffer.width) * static_cast<size_t>(buffer.multiple);
    shared_.push_back(all.add((buffer.outputs_only ? outputs : tokens) * row_bytes));
    own_.push_back(each.add(buffer.private_copy ? kPrivateRows * row_bytes : 0));
  }
  for (const ActivationSlot& slot : plan.slots) {
    shared_slots_.push_back(all.add(tokens * slot.max_row_bytes));
    own_slots_.push_back(each.add(kPrivateRows * slot.max_row_bytes));
  }
  size_t scratch = 0, experts = 0;
  for (const PlannedStep& planned : plan.steps) {
    scratch = std::max(scratch, std::visit(ScratchBytes{}, planned.step));
    if (const auto* step = std::get_if<ExpertsStep>(&planned.step)) {
      max_expert_lines_ = std::max(max_expert_lines_, tokens * static_cast<size_t>(step->used));
      experts = std::max(experts, step->products[0].experts.size());
    } else if (const auto* step = std::get_if<AttentionStep>(&planned.step); step && threads > 1) {
      partial_floats_ = std::max(partial_floats_, partial_floats_of(*step, plan.limits.max_context_tokens));
    }
  }
  scratch_ = each.add(scratch);
  expert_lines_ = each.add(max_expert_lines_ == 0 ? 0 : (2 * max_expert_lines_ + experts + 1) * sizeof(int32_t));
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
