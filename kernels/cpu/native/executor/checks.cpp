// Checks each step's buffers and weights, so that the program of a malicious file accesses no memory beyond its own.
#include <algorithm>
#include <cmath>
#include <limits>

#include "executor/executor.h"
#include "executor/gather_checks.h"
#include "pack/pack.h"

namespace llamaclust {

struct Plan::Checks {
  static constexpr int kMaxMerged = 1 << 12, kMaxLevels = 1 << 6;
  Plan& plan;
  const Buffer& buffer(BufferId id) const { return plan.buffer(id); }
  bool is_line(BufferId id) const { return buffer(id).multiple == 1; }
  const ActivationSlot& slot(int index) const { return slot_of(plan, index); }

  template <typename T>
  static const T& at(int index, const std::vector<T>& list, const char* otherwise) {
    require(index >= 0 && static_cast<size_t>(index) < list.size(), otherwise);
    return list[index];
  }

  void check_alike(BufferId a, BufferId b) const {
    require(buffer(a).width == buffer(b).width && buffer(a).multiple == buffer(b).multiple, "widths that differ");
  }

  void check_embedding(const Matrix& weight, BufferId out) const {
    require(is_supported(weight.type), "an embedding of an unsupported type");
    require(buffer(out).width == weight.cols && is_line(out), "embedding width");
  }

  static void check_epsilon(float value) { require(std::isfinite(value) && value >= 0, "a norm epsilon below 0"); }

  void check_rotation(const Rotation& rotation, int head_dim) const {
    const RotationAngles& angles = at(rotation.table, plan.rotations, "unknown rotation table");
    require(2 * angles.pairs() <= head_dim, "rotation wider than a head");
  }

  void check_product(const Matrix& weight, const std::vector<float>& bias, int width, int index) const {
    require(is_supported(weight.type), "weights of an unsupported type");
    require(weight.rows > 0 && width == weight.rows, "a product as wide as its weight has rows");
    require(weight.cols == slot(index).cols, "activations as wide as the weight");
    require(tile_layout(weight.type).activation == slot(index).format, "activations in the format of the weight");
    require(bias.empty() || bias.size() == static_cast<size_t>(weight.rows), "a bias as wide as its product");
  }

  Access operator()(const EmbedStep& step) const {
    check_embedding(step.weight, step.out);
    require(step.weight.rows > 0 && plan.has_all_rows(), "an embedding of nothing");
    plan.vocabulary = plan.vocabulary > 0 ? std::min(plan.vocabulary, step.weight.rows) : step.weight.rows;
    return {{}, {step.out}, true};
  }

  Access operator()(const InputStep& step) const {
    require(is_line(step.out) && plan.has_all_rows(), "a hidden state is one line a row");
    require(plan.hidden_width == 0 || plan.hidden_width == buffer(step.out).width, "hidden states of two widths");
    plan.hidden_width = buffer(step.out).width;
    return {{}, {step.out}, true};
  }

  Access operator()(const NormStep& step) const {
    check_alike(step.x, step.out);
    const int width = buffer(step.x).width;
    require(step.width > 0 && width % step.width == 0, "a norm of equal parts");
    require(step.weight.size() == static_cast<size_t>(step.width) ||
                (step.weight.size() == static_cast<size_t>(width) && is_line(step.x)),
            "a norm weight of another width");
    check_epsilon(step.epsilon);
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const LayerNormStep& step) const {
    check_alike(step.x, step.out);
    const size_t width = static_cast<size_t>(buffer(step.x).width);
    require(step.weight.size() == width && step.bias.size() == width && is_line(step.x),
            "a norm weight of another width");
    check_epsilon(step.epsilon);
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const PositionStep& step) const {
    check_alike(step.x, step.out);
    require(step.x != step.out && plan.has_all_rows(), "positions added in place");
    check_embedding(step.weight, step.out);
    require(step.weight.rows >= plan.limits.max_context_tokens, "fewer positions than the context has");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const AddRowStep& step) const {
    check_alike(step.x, step.out);
    require(step.x != step.out, "a row added in place");
    check_embedding(step.weight, step.out);
    require(step.row >= 0 && step.row < step.weight.rows, "a row that the weight does not have");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const RopeStep& step) const {
    check_alike(step.x, step.out);
    require(step.heads > 0 && step.head_dim > 0 && step.head_dim <= kMaxHeadChannels && is_line(step.x), "heads");
    require(static_cast<int64_t>(step.heads) * step.head_dim == buffer(step.x).width, "heads of another width");
    check_rotation(step.rotation, step.head_dim);
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const ElementwiseStep& step) const {
    check_alike(step.x, step.y);
    check_alike(step.x, step.out);
    const bool in_place = step.x == step.out && step.y == step.out;
    require(in_place || buffer(step.out).private_copy, "an elementwise step from one shared buffer to another");
    const bool may_be_infinite = step.op == RowOp::at_least || step.op == RowOp::at_most;
    require(std::isfinite(step.number) || (may_be_infinite && !std::isnan(step.number)), "a factor that is no number");
    require(step.op != RowOp::soft_cap || step.number > 0, "a soft cap that is no positive number");
    return {{step.x, step.y}, {step.out}, true};
  }

  Access operator()(const AddAdaptedStep& step) const {
    check_alike(step.x, step.y);
    require(step.x != step.y && is_line(step.x) && is_line(step.scale), "a sum of an adapter in one buffer");
    require(!buffer(step.x).private_copy && !buffer(step.y).private_copy && !buffer(step.scale).private_copy,
            "a sum of an adapter in private copies");
    return {{step.x, step.y}, {step.x}, true};
  }

  Access operator()(const PositionScaleStep& step) const {
    check_alike(step.x, step.out);
    require(std::isfinite(step.factor) && step.length > 0 && step.offset >= 0, "a scale by position that is no number");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const CopyChannelsStep& step) const {
    const auto holds = [&](BufferId id, int start) {
      return buffer(id).width % step.parts == 0 && start >= 0 && start <= buffer(id).width / step.parts - step.channels;
    };
    require(step.parts > 0 && step.channels > 0 && step.x != step.out, "channels copied in place");
    require(buffer(step.x).multiple == buffer(step.out).multiple, "as many lines");
    require(holds(step.x, step.x_start) && holds(step.out, step.out_start), "channels beyond their part");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const GivenStep& step) const {
    check_alike(step.x, step.out);
    const int width = buffer(step.out).width;
    require(is_line(step.x) && plan.has_all_rows() && step.level >= 0 && step.level < kMaxLevels, "given rows");
    require(plan.given_width == 0 || plan.given_width == width, "given rows of two widths");
    plan.given_width = width;
    plan.given_levels = std::max(plan.given_levels, step.level + 1);
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const MixStep& step) const {
    const bool weighed = step.coefficients >= 0;
    check_alike(step.y, step.out);
    require(is_line(step.x) && is_line(step.y) && step.x != step.out, "parts of a row mixed in place");
    require(step.width > 0 && buffer(step.x).width % step.width == 0 && buffer(step.out).width % step.width == 0,
            "equal parts");
    const int64_t from = buffer(step.x).width / step.width, to = buffer(step.out).width / step.width;
    require(step.first >= 0 && step.first <= to && std::isfinite(step.offset), "parts of a row out of range");
    if (!weighed) return {{step.x, step.y}, {step.out}, true};
    require(is_line(step.coefficients) && step.coefficients != step.out && buffer(step.coefficients).width == from * to,
            "a coefficient for each two parts");
    return {{step.x, step.y, step.coefficients}, {step.out}, true};
  }

  Access operator()(const MagnitudeStep& step) const {
    check_alike(step.x, step.out);
    require(is_line(step.x) && is_line(step.y) && step.y != step.out, "a magnitude of one line");
    require(buffer(step.x).width % buffer(step.y).width == 0, "parts as wide as the magnitude's line");
    check_epsilon(step.epsilon);
    return {{step.x, step.y}, {step.out}, true};
  }

  Access operator()(const TopKStep& step) const {
    check_alike(step.x, step.out);
    require(is_line(step.x) && std::isfinite(step.factor), "a quantile that is no number");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const ChannelScaleStep& step) const {
    check_alike(step.x, step.out);
    require(is_line(step.x) && step.weight.size() == static_cast<size_t>(buffer(step.x).width),
            "channels scaled by a weight of another width");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const SigmoidGateStep& step) const {
    check_alike(step.y, step.out);
    require(is_line(step.x) && is_line(step.y), "a gate is one number a row");
    require(step.weight.size() == static_cast<size_t>(buffer(step.x).width), "a gate's weight of another width");
    return {{step.x, step.y}, {step.out}, true};
  }

  Access operator()(const DecayStep& step) const {
    check_alike(step.x, step.out);
    const size_t width = static_cast<size_t>(buffer(step.x).width);
    require(is_line(step.x) && step.weight.size() == width && step.bias.size() == width, "a decay of another width");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const QuantizeStep& step) const {
    const Buffer& x = buffer(step.x);
    require(step.parts > 0 && x.width % step.parts == 0, "equal parts");
    return into_slot(plan, step.x, step.slot, {x.width / step.parts, x.multiple * step.parts, step.format});
  }

  Access operator()(const PackStep& step) const { return check_pack(plan, step); }
  Access operator()(const UnpackStep& step) const { return check_unpack(plan, step); }

  Access operator()(const ChooseStep& step) const {
    require(step.experts > 0 && step.used > 0 && step.used <= step.experts && step.used <= 256, "experts");
    require(buffer(step.logits).width == step.experts && is_line(step.logits), "router width");
    require(buffer(step.out).width == 2 * step.used && is_line(step.out), "choice width");
    require(step.groups > 0 && step.experts % step.groups == 0, "experts in equal groups");
    require(step.used_groups > 0 && step.used_groups <= step.groups, "groups of experts");
    require(step.used <= step.used_groups * (step.experts / step.groups), "more experts than the groups have");
    require(step.selection_bias.empty() || step.selection_bias.size() == static_cast<size_t>(step.experts),
            "a bias for each expert");
    require(step.expert_scales.empty() || step.expert_scales.size() == static_cast<size_t>(step.experts),
            "a scale for each expert");
    require(std::isfinite(step.scale), "a scale that is no number");
    plan.choosable_ = std::max(plan.choosable_, static_cast<size_t>(step.experts));
    return {{step.logits}, {step.out}, true};
  }

  Access operator()(const ExpertRowStep& step) const {
    check_alike(step.x, step.out);
    require(step.x != step.out, "rows of experts added in place");
    require(buffer(step.choice).width == 2 * step.used && is_line(step.choice), "choice width");
    require(buffer(step.x).multiple == step.used, "a line for each expert used");
    require(is_supported(step.weight.type) && buffer(step.out).width == step.weight.cols, "rows of another width");
    require(step.first >= 0 && step.weight.rows > 0, "rows of experts");
    return {{step.choice, step.x}, {step.out}, true};
  }

  Access operator()(const PlaceExpertsStep& step) const {
    const auto holds = [&](BufferId id, int start) {
      const int64_t ranks = int64_t{buffer(step.x).width} * step.used;
      return start >= 0 && start + ranks <= int64_t{buffer(id).width} * buffer(id).multiple;
    };
    require(buffer(step.choice).width == 2 * step.used && is_line(step.choice), "choice width");
    require(buffer(step.x).multiple == step.used && step.first >= 0 && step.count > 0, "a line for each expert used");
    require(step.x != step.out && step.given != step.out && holds(step.out, step.out_start), "ranks beyond a line");
    if (step.given < 0) return {{step.choice, step.x}, {step.out}, true};
    require(holds(step.given, step.given_start), "ranks beyond a line");
    return {{step.choice, step.x, step.given}, {step.out}, true};
  }

  // `lines` has one line per used expert of a row, `line` has one per row.
  Access check_ranks(const auto& step, BufferId lines, BufferId line) const {
    require(buffer(step.choice).width == 2 * step.used && is_line(step.choice), "choice width");
    require(buffer(lines).multiple == step.used && is_line(line), "a line for each expert used");
    require(buffer(lines).width == buffer(line).width && lines != line, "widths that differ");
    return {{step.choice, step.x}, {step.out}, true};
  }
  Access operator()(const WeighStep& step) const { return check_ranks(step, step.out, step.x); }
  Access operator()(const CombineStep& step) const { return check_ranks(step, step.x, step.out); }

  Access operator()(const SelectStep& step) const {
    check_alike(step.x, step.out);
    require(plan.has_all_rows() && step.x != step.out && is_line(step.x), "rows selected twice or in place");
    plan.selects = true;
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const MergeStep& step) const {
    const int64_t width = int64_t{buffer(step.x).width} * (step.is_mean ? 1 : step.factor);
    require(!plan.selects && step.x != step.out && is_line(step.x) && is_line(step.out), "rows merged in place");
    require(step.factor > 0 && step.factor <= kMaxMerged / plan.merged, "too many rows merged");
    require(buffer(step.out).width == width, "merged rows of another width");
    plan.merged *= step.factor;
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const OutputStep& step) const {
    check_alike(step.x, step.out);
    require(!buffer(step.out).private_copy, "a copy for the caller is one that all threads share");
    return {{step.x}, {step.out}, true};
  }

  Access operator()(const MatmulStep& step) const {
    Access access{{}, {}, false};
    require(!step.products.empty(), "a step of no products");
    for (const Product& product : step.products) {
      check_product(product.weight, product.bias, buffer(product.out).width, product.slot);
      require(buffer(product.out).multiple == slot(product.slot).multiple, "as many lines as activations");
      require(std::ranges::count(access.writes, product.out) == 0, "two products into one buffer");
      access.writes.push_back(product.out);
    }
    return access;
  }

  Access operator()(const ExpertsStep& step) const {
    Access access{{step.choice}, {}, false};
    require(!step.products.empty() && !step.products[0].experts.empty() && step.first >= 0, "a step of no experts");
    require(step.is_shard || (plan.choosable_ > 0 && step.first == 0), "a choice of experts");
    require(buffer(step.choice).width == 2 * step.used, "choice width");
    require(slot(step.slot).multiple == (step.per_rank ? step.used : 1), "as many activations as ranks");
    for (const ExpertProduct& product : step.products) {
      require(step.is_shard || product.experts.size() >= plan.choosable_, "as many experts as may be chosen");
      require(product.experts.size() == step.products[0].experts.size(), "products of the same experts");
      require(buffer(product.out).multiple == step.used, "a line for each expert used");
      require(std::ranges::count(access.writes, product.out) == 0, "two products into one buffer");
      for (const Matrix& expert : product.experts) check_product(expert, {}, buffer(product.out).width, step.slot);
      access.writes.push_back(product.out);
    }
    return access;
  }

  Access operator()(const HeadsStep& step) const {
    require(step.parts() > 0 && slot(step.slot).multiple == step.parts(), "as many activations as matrices");
    const int width = buffer(step.out).width;
    require(is_line(step.out) && width % step.parts() == 0, "equal parts");
    for (const Matrix& weight : step.weights) check_product(weight, {}, width / step.parts(), step.slot);
    return {{}, {step.out}, false};
  }

  Access operator()(const AttentionStep& step) const {
    const KvShape& shape = at(step.layer, plan.kv_layers, "unknown layer of KV memory");
    require(shape.state_floats == 0 && shape.kv_heads == step.kv_heads && shape.head_dim == step.head_dim,
            "KV memory of another shape");
    require(!step.stores() || shape.latent == (step.v < 0), "values apart from keys, or none");
    require(step.value_dim > 0 && (shape.latent || step.value_dim == step.head_dim), "values of another width");
    const bool has_window = step.window != std::numeric_limits<int>::max();
    require(!shape.latent || (step.causal && !has_window), "latent attention with a window");
    require(!shape.latent || (step.value_dim % 2 == 0 && step.value_dim <= step.head_dim), "odd latent values");
    require(step.heads > 0 && step.heads % step.kv_heads == 0 && step.heads <= 65536, "heads in groups");
    std::vector<BufferId> reads{step.q};
    if (step.stores()) reads.push_back(step.k);
    if (step.stores() && !shape.latent) reads.push_back(step.v);
    require(buffer(step.q).width == step.heads * step.head_dim, "query width");
    require(buffer(step.out).width == step.heads * step.value_dim, "result width");
    for (BufferId id : reads) require(is_line(id) && id != step.out, "attention in place");
    for (size_t i = 1; i < reads.size(); i++)
      require(buffer(reads[i]).width == step.kv_heads * step.head_dim, "key and value width");
    require(is_line(step.out) && plan.has_all_rows(), "one line a row");
    require(std::isfinite(step.scale), "an attention scale that is no number");
    require(std::isfinite(step.soft_cap) && step.soft_cap >= 0, "a soft cap that is no positive number");
    require(step.slopes.empty() || step.slopes.size() == static_cast<size_t>(step.heads), "a slope for each head");
    require(step.sinks.empty() || step.sinks.size() == static_cast<size_t>(step.heads), "a sink for each head");
    for (float slope : step.slopes) require(std::isfinite(slope), "a slope that is no number");
    require(step.window > 0 && (step.causal || !step.chunked), "an attention window of nothing");
    require(!step.grouped || !(step.causal || has_window), "attention of groups with a window");
    if (shape.windowed) plan.window = std::max(plan.window, step.window);
    for (const auto& rotation : {step.rotate_q, step.rotate_k}) if (rotation) check_rotation(*rotation, step.head_dim);
    return {reads, {step.out}, false};
  }

  void check_state(int layer, int64_t floats) const {
    const KvShape& shape = at(layer, plan.kv_layers, "unknown layer of KV memory");
    require(plan.has_all_rows(), "a state of the wanted rows alone");
    require(shape.state_floats == floats, "a state of another size");
  }

  Access operator()(const ConvolveStep& step) const {
    check_alike(step.x, step.out);
    require(is_line(step.x) && step.x != step.out, "a convolution in place");
    require(step.taps >= 2 && step.taps <= kMaxTaps, "taps of a convolution out of range");
    const size_t width = static_cast<size_t>(buffer(step.x).width);
    require(step.weight.size() == static_cast<size_t>(step.taps) * width, "a weight for each tap and channel");
    require(step.bias.empty() || step.bias.size() == width, "a bias as wide as its product");
    check_state(step.layer, (step.taps - 1) * static_cast<int64_t>(width));
    return {{step.x}, {step.out}, false};
  }

  Access operator()(const DeltaRuleStep& step) const {
    const std::vector<BufferId> reads{step.q, step.k, step.v, step.decay, step.beta};
    for (BufferId id : reads) require(is_line(id) && id != step.out, "a delta rule in place");
    require(step.heads > 0 && step.key_heads > 0 && step.heads % step.key_heads == 0, "heads in groups");
    const int width = buffer(step.q).width, keys = width / step.key_heads, values = buffer(step.v).width / step.heads;
    check_alike(step.q, step.k);
    check_alike(step.v, step.out);
    require(keys > 0 && keys <= kMaxKeyChannels && keys * step.key_heads == width, "keys of a delta rule");
    require(values > 0 && values % 16 == 0 && values * step.heads == buffer(step.v).width, "values of a delta rule");
    require(buffer(step.beta).width == step.heads, "a beta for each head");
    require(buffer(step.decay).width == step.heads || buffer(step.decay).width == step.heads * keys,
            "a decay for each head or key channel");
    check_state(step.layer, static_cast<int64_t>(step.heads) * keys * values);
    return {reads, {step.out}, false};
  }

  Access operator()(const ScanStep& step) const {
    const int heads = step.heads(), width = buffer(step.out).width;
    require(heads > 0 && width % heads == 0 && buffer(step.dt).width == heads, "channels of heads");
    require(step.rates.size() == step.bias.size() && step.skips.size() == step.bias.size(), "a number for each head");
    require(step.groups > 0 && heads % step.groups == 0 && step.state_size > 0, "heads in equal groups");
    require(buffer(step.x).width == width + 2 * static_cast<int64_t>(step.groups) * step.state_size, "b and c of groups");
    require(is_line(step.x) && is_line(step.dt) && is_line(step.out), "one line a row");
    require(step.out != step.x && step.out != step.dt, "a scan in place");
    check_state(step.layer, static_cast<int64_t>(width) * step.state_size);
    return {{step.x, step.dt}, {step.out}, false};
  }

  Access operator()(const GatherStep& step) const { return check_gather(plan, step); }
};

Access Plan::check(const Step& step) { return std::visit(Checks{*this}, step); }

}  // namespace llamaclust
