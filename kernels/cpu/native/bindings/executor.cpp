// Python bindings of plans and stages. A plan is built step by step; a stage runs it in one call that releases the
// interpreter's lock.
#include <limits>

#include "bindings/batch_inputs.h"
#include "bindings/frames.h"
#include "executor/executor.h"
#include "pack/pack.h"
#include "runtime/levels.h"

namespace llamaclust {
namespace {

// (number of the rotation table, whether pairs are in NEOX style)
using PythonRotation = std::optional<std::pair<int, bool>>;

std::vector<float> vector_of(const Floats& x) { return {x.data(), x.data() + x.size()}; }
std::vector<float> vector_of(const std::optional<Floats>& x) { return x ? vector_of(*x) : std::vector<float>{}; }

std::optional<Rotation> rotation_of(const PythonRotation& rotation) {
  if (!rotation) return std::nullopt;
  return Rotation{rotation->first, rotation->second ? RopeStyle::Neox : RopeStyle::Norm};
}

KvType kv_type_of(int number) {
  require(number >= 0 && number < kKvTypes, "unknown KV type");
  return static_cast<KvType>(number);
}

RowOp row_op_named(const std::string& name) {
#define RETURN(op) \
  if (name == #op) return RowOp::op;
  LLAMACLUST_ROW_OPS(RETURN)
#undef RETURN
  throw std::invalid_argument("no elementwise operation " + name);
}

// A plan under construction, and the Python objects that own the memory to which it points.
struct PlanBuilder {
  PlanBuilder(int max_tokens, int max_outputs, int max_sequences, int max_context_tokens, int kv_blocks,
              int window_blocks, int state_blocks)
      : plan({max_tokens, max_outputs, max_sequences, max_context_tokens, kv_blocks, window_blocks, state_blocks}) {}

  Plan plan;
  std::vector<nb::object> kept;
  bool is_runnable = true;  // False if a weight has a shape only, without values.

  const Matrix& keep(nb::handle matrix) {
    kept.push_back(nb::borrow(matrix));
    const PackedMatrix& packed = nb::cast<const PackedMatrix&>(matrix);
    is_runnable = is_runnable && packed.bytes() > 0;
    return packed.matrix();
  }
};

struct NativeStage {
  NativeStage(PlanBuilder& builder, const std::string& feature_level, nb::object pool, const NativeStage* shares_kv)
      : kept((require(builder.is_runnable, "weights that were not loaded"), std::move(builder.kept))),
        pool(std::move(pool)),
        level(find_level(feature_level)),
        executor(std::move(builder.plan), level, nb::cast<ThreadPool&>(this->pool),
                 shares_kv == nullptr ? nullptr : &shares_kv->executor) {}

  int run(const Ints& tokens, const Ints& positions, const Ints& sequence_starts, const Ints& table_starts,
          const Ints& block_tables, const Ints& output_rows, const std::optional<FloatRows>& hidden,
          const std::optional<Ints>& window_tables, const PythonStates& states,
          const std::optional<IntRows>& rope_positions, const std::optional<IntRows>& groups,
          const std::optional<std::pair<Ints, FloatRows>>& given) {
    if (hidden &&
        (hidden->shape(0) != positions.size() || hidden->shape(1) != static_cast<size_t>(executor.hidden_width())))
      throw std::invalid_argument("batch: hidden states must be [rows, " + std::to_string(executor.hidden_width()) +
                                  "]");
    const Batch batch{span_of(tokens),          span_of(positions),
                      span_of(sequence_starts), span_of(table_starts),
                      span_of(block_tables),    window_tables ? span_of(*window_tables) : std::span<const int32_t>(),
                      span_of(output_rows),     hidden ? hidden->data() : nullptr,
                      states_of(states),        span_of(rope_positions, 0, positions.size()),
                      span_of(groups, positions.size(), 2), given_of(given)};
    const nb::gil_scoped_release unlocked;
    return executor.run(batch);
  }

  int run_frame(const ReadFrame& read) {
    if (read.hidden() && read.hidden_width != static_cast<size_t>(executor.hidden_width()))
      throw std::invalid_argument("frame: hidden states must be [rows, " + std::to_string(executor.hidden_width()) +
                                  "]");
    const MicrobatchFrame& frame = read.frame;
    const Batch batch{frame.tokens,       frame.positions,     frame.sequence_starts, frame.table_starts,
                      frame.block_tables, frame.window_tables, frame.output_rows,     read.hidden(),
                      {frame.states_before, frame.state_starts, frame.state_rows, frame.state_blocks},
                      frame.rope_positions, frame.groups,        given_of(frame)};
    const nb::gil_scoped_release unlocked;
    return executor.run(batch);
  }

  void prepare() const {
    const nb::gil_scoped_release unlocked;
    executor.prepare();
  }

  void set_gatherer(nb::object given) {
    executor.set_gatherer(&nb::cast<Gatherer&>(given));
    gatherer = std::move(given);
  }

  std::vector<nb::object> kept;
  nb::object gatherer;
  nb::object pool;
  const Level level;
  Executor executor;
};

nb::object contents_of(nb::handle self, int buffer) {
  const Executor& executor = nb::cast<NativeStage&>(self).executor;
  const size_t shape[2] = {static_cast<size_t>(executor.capacity(buffer)), static_cast<size_t>(executor.width(buffer))};
  return nb::cast(nb::ndarray<nb::numpy, float>(executor.contents(buffer), 2, shape, self));
}

nb::object result_of(nb::handle self) { return contents_of(self, nb::cast<NativeStage&>(self).executor.result()); }

nb::object kv_layer_of(nb::handle self, int layer) {
  const Executor& executor = nb::cast<NativeStage&>(self).executor;
  const KvShape& kv = executor.plan().kv_layers.at(static_cast<size_t>(layer));
  require(!kv.windowed, "a layer with a window");
  const size_t shape[2] = {static_cast<size_t>(block_count(kv, executor.plan().limits)), kv_block_bytes(kv)};
  return nb::cast(nb::ndarray<nb::numpy, uint8_t>(executor.kv_layer(layer), 2, shape, self));
}

void add_products(PlanBuilder& builder,
                  const std::vector<std::tuple<nb::object, std::optional<Floats>, int, int>>& products) {
  MatmulStep step;
  for (const auto& [weight, bias, out, slot] : products)
    step.products.push_back({builder.keep(weight), vector_of(bias), out, slot});
  builder.plan.add(std::move(step));
}

void add_experts(PlanBuilder& builder, const std::vector<std::pair<std::vector<nb::object>, int>>& products, int choice,
                 int slot, int used, bool per_rank, std::optional<int> first) {
  ExpertsStep step{{}, choice, slot, used, per_rank, first.value_or(0), first.has_value()};
  for (const auto& [experts, out] : products) {
    step.products.push_back({{}, out});
    for (const nb::object& expert : experts) step.products.back().experts.push_back(builder.keep(expert));
  }
  builder.plan.add(std::move(step));
}

// `given` is a buffer and the channel of its lines at which the ranks begin; `experts` is the range [first, end).
void add_placed(PlanBuilder& builder, int choice, int x, std::optional<std::pair<int, int>> given, int out,
                int out_start, int used, std::pair<int, int> experts) {
  require(!given || given->first >= 0, "unknown buffer");
  builder.plan.add(PlaceExpertsStep{choice, x, given ? given->first : -1, out, given ? given->second : 0, out_start,
                                    used, experts.first, experts.second - experts.first});
}

ActivationFormat format_of(int number) {
  require(number >= 0 && number <= static_cast<int>(ActivationFormat::Q8_256), "unknown activation format");
  return static_cast<ActivationFormat>(number);
}

void add_gather(PlanBuilder& builder, std::optional<int> x, int out, std::vector<int> borders, std::optional<int> to) {
  require(!x || *x >= 0, "a buffer that there is");
  builder.plan.add(GatherStep{x.value_or(-1), out, builder.plan.gathers, std::move(borders), to.value_or(-1)});
}

void add_heads(PlanBuilder& builder, const std::vector<nb::object>& weights, int out, int slot) {
  HeadsStep step{{}, out, slot};
  for (const nb::object& weight : weights) step.weights.push_back(builder.keep(weight));
  builder.plan.add(std::move(step));
}

void add_attention(PlanBuilder& builder, int q, std::optional<std::pair<int, std::optional<int>>> kv, int out,
                   int layer, int heads, int kv_heads, std::pair<int, int> head_dims, float scale,
                   std::optional<float> soft_cap, std::vector<float> slopes, std::optional<std::pair<int, bool>> window,
                   PythonRotation rotate_q, PythonRotation rotate_k, std::pair<bool, bool> causal_grouped,
                   const std::optional<Floats>& sinks) {
  require(!soft_cap || *soft_cap > 0, "a soft cap that is no positive number");
  const int k = kv ? kv->first : -1, v = kv ? kv->second.value_or(-1) : -1;
  require(!kv || (k >= 0 && kv->second.value_or(0) >= 0), "unknown buffer");
  builder.plan.add(AttentionStep{q, k, v, out, layer, heads, kv_heads, head_dims.first, head_dims.second, scale,
                                 soft_cap.value_or(0.0f), std::move(slopes),
                                 window ? window->first : std::numeric_limits<int>::max(), window && window->second,
                                 rotation_of(rotate_q),
                                 rotation_of(rotate_k), causal_grouped.first, causal_grouped.second,
                                 vector_of(sinks)});
}

void add_choice(PlanBuilder& builder, int logits, int out, int experts, int used, int gating, bool normalized,
                float scale, std::pair<int, int> groups, const std::optional<Floats>& selection_bias,
                const std::optional<Floats>& expert_scales) {
  require(gating >= 0 && gating < kGatings, "unknown gating");
  builder.plan.add(ChooseStep{logits, out, experts, used, static_cast<Gating>(gating), normalized, scale, groups.first,
                              groups.second, vector_of(selection_bias), vector_of(expert_scales)});
}

// Returns the weights row by row, as floats. They are 0 if the matrix has a shape only.
std::vector<float> rows_of(const Matrix& matrix) {
  require(is_supported(matrix.type), "weights of an unsupported type");
  const size_t cols = static_cast<size_t>(matrix.cols);
  std::vector<float> rows(static_cast<size_t>(matrix.rows) * cols);
  const Level level = find_level("generic");
  for (int row = 0; matrix.tiles != nullptr && row < matrix.rows; row++)
    level.matmul.dequantize_row(matrix, row, rows.data() + static_cast<size_t>(row) * cols);
  return rows;
}

// Transposes `weight` from [channels][taps] to [taps][channels].
void add_convolution(PlanBuilder& builder, int x, int out, int layer, nb::handle weight,
                     const std::optional<Floats>& bias) {
  const Matrix& matrix = builder.keep(weight);
  const std::vector<float> rows = rows_of(matrix);
  const size_t channels = static_cast<size_t>(matrix.rows), taps = static_cast<size_t>(matrix.cols);
  std::vector<float> turned(rows.size());
  for (size_t channel = 0; channel < channels; channel++)
    for (size_t tap = 0; tap < taps; tap++) turned[tap * channels + channel] = rows[channel * taps + tap];
  builder.plan.add(ConvolveStep{x, out, layer, matrix.cols, std::move(turned), vector_of(bias)});
}

void add_scan(PlanBuilder& builder, int x, int dt, int out, int layer, int groups, int state_size, const Floats& bias,
              nb::handle decay, nb::handle skip) {
  builder.plan.add(ScanStep{x, dt, out, layer, groups, state_size, vector_of(bias), rows_of(builder.keep(decay)),
                            rows_of(builder.keep(skip))});
}

void add_mix(PlanBuilder& builder, int x, int y, int out, std::optional<int> coefficients, int width, int first,
             float offset) {
  require(!coefficients || *coefficients >= 0, "unknown buffer");
  builder.plan.add(MixStep{x, y, out, coefficients.value_or(-1), width, first, offset});
}

void add_norm(PlanBuilder& builder, int x, int out, const Floats& weight, float epsilon) {
  builder.plan.add(NormStep{x, out, vector_of(weight), epsilon, static_cast<int>(weight.size())});
}

// `weight` is [groups][channels].
void add_group_norm(PlanBuilder& builder, int x, int out, nb::handle weight, float epsilon) {
  const Matrix& matrix = builder.keep(weight);
  builder.plan.add(NormStep{x, out, rows_of(matrix), epsilon, matrix.cols});
}

// Converts an argument from Python to the member of a step.
template <typename T>
T member(PlanBuilder&, T value) { return value; }
std::vector<float> member(PlanBuilder&, const Floats& x) { return vector_of(x); }
Matrix member(PlanBuilder& builder, nb::handle weight) { return builder.keep(weight); }
RowOp member(PlanBuilder&, const std::string& name) { return row_op_named(name); }
Rotation member(PlanBuilder&, const std::pair<int, bool>& rotation) { return *rotation_of(rotation); }

template <typename Step, typename... Members>
void add(PlanBuilder& builder, Members... members) {
  builder.plan.add(Step{member(builder, members)...});
}

void bind_row_steps(nb::class_<PlanBuilder>& plan) {
  plan.def("embed", &add<EmbedStep, nb::handle, int>)
      .def("read_hidden", &add<InputStep, int>)
      .def("rms_norm", &add_norm)
      .def("group_norm", &add_group_norm)
      .def("layer_norm", &add<LayerNormStep, int, int, Floats, Floats, float>)
      .def("add_position", &add<PositionStep, int, int, nb::handle>)
      .def("add_row", &add<AddRowStep, int, int, nb::handle, int>)
      .def("rope", &add<RopeStep, int, int, int, int, std::pair<int, bool>>)
      .def("elementwise", &add<ElementwiseStep, std::string, int, int, int, float>)
      .def("add_adapted", &add<AddAdaptedStep, int, int, int>)
      .def("scale_by_position", &add<PositionScaleStep, int, int, double, int, int>)
      .def("copy_channels", &add<CopyChannelsStep, int, int, int, int, int, int>)
      .def("add_given", &add<GivenStep, int, int, int, bool>)
      .def("mix", &add_mix, "x"_a, "y"_a, "out"_a, "coefficients"_a.none(), "width"_a, "first"_a, "offset"_a)
      .def("match_magnitude", &add<MagnitudeStep, int, int, int, float>)
      .def("gaussian_top_k", &add<TopKStep, int, int, float>)
      .def("scale_channels", &add<ChannelScaleStep, int, int, Floats>)
      .def("sigmoid_gate", &add<SigmoidGateStep, int, int, int, Floats>)
      .def("pack", [](PlanBuilder& b, int x, int out, int format) { b.plan.add(PackStep{x, out, format_of(format)}); })
      .def("unpack",
           [](PlanBuilder& b, int x, int slot, int format) { b.plan.add(UnpackStep{x, slot, format_of(format)}); })
      .def("quantize",
           [](PlanBuilder& b, int x, int slot, int format, int parts) {
             b.plan.add(QuantizeStep{x, slot, format_of(format), parts});
           },
           "x"_a, "slot"_a, "format"_a, "parts"_a = 1)
      .def("add_expert_rows", &add<ExpertRowStep, int, int, int, nb::handle, int, int>, "choice"_a, "x"_a, "out"_a,
           "weight"_a, "used"_a, "first"_a = 0)
      .def("place_experts", &add_placed, "choice"_a, "x"_a, "given"_a.none(), "out"_a, "out_start"_a, "used"_a,
           "experts"_a)
      .def("weigh_inputs", &add<WeighStep, int, int, int, int>)
      .def("combine_experts", &add<CombineStep, int, int, int, int, bool>)
      .def("convolve", &add_convolution)
      .def("decay", &add<DecayStep, int, int, Floats, Floats>)
      .def("delta_rule", &add<DeltaRuleStep, int, int, int, int, int, int, int, int, int, bool>, "q"_a, "k"_a, "v"_a,
           "decay"_a, "beta"_a, "out"_a, "layer"_a, "heads"_a, "key_heads"_a, "tiled"_a)
      .def("scan", &add_scan)
      .def("select_rows", &add<SelectStep, int, int>)
      .def("merge_rows", &add<MergeStep, int, int, int, bool>)
      .def("write_result", &add<OutputStep, int, int>);
}

}  // namespace

void bind_executor(nb::module_& module) {
  nb::class_<ThreadPool>(module, "ThreadPool")
      .def(nb::init<int, bool>(), "threads"_a, "yields"_a)
      .def_prop_ro("threads", &ThreadPool::threads)
      .def("set_speeds", &ThreadPool::set_speeds, "speeds"_a);  // Used by tests only.

  nb::class_<ThreadSpeeds>(module, "ThreadSpeeds")  // Used by tests only.
      .def(nb::init<int>(), "threads"_a)
      .def("open", &ThreadSpeeds::open, "threads"_a)
      .def("begin", &ThreadSpeeds::begin, "count"_a, "thread"_a)
      .def_prop_ro("measures", &ThreadSpeeds::measures)
      .def("add", &ThreadSpeeds::add, "thread"_a, "ns"_a)
      .def("close", &ThreadSpeeds::close);

  nb::class_<CoreContention>(module, "CoreContention")  // Used by tests only.
      .def(nb::init<int>(), "threads"_a)
      .def("threads", &CoreContention::threads, "rows"_a)
      .def("report", &CoreContention::report, "rows"_a, "began_ns"_a, "ended_ns"_a, "waited_ns"_a);

  nb::class_<PlanBuilder> plan(module, "Plan");
  plan.def(nb::init<int, int, int, int, int, int, int>(), "max_tokens"_a, "max_outputs"_a, "max_sequences"_a,
           "max_context_tokens"_a, "kv_blocks"_a, "window_blocks"_a = 0,
           "state_blocks"_a = 0)
      .def(
          "add_buffer",
          [](PlanBuilder& b, int width, int multiple, bool private_copy, int rows) {
            return b.plan.add_buffer({width, multiple, private_copy, rows});
          },
          "width"_a, "multiple"_a, "private_copy"_a, "rows"_a)
      .def("add_rotation",
           [](PlanBuilder& b, std::vector<double> frequencies, double scale, std::vector<int> sections) {
             return b.plan.add_rotation({std::move(frequencies), scale, std::move(sections)});
           })
      .def(
          "add_kv_layer",
          [](PlanBuilder& b, int kv_heads, int head_dim, int kv_type, bool windowed, bool latent) {
            return b.plan.add_kv_layer({kv_heads, head_dim, kv_type_of(kv_type), windowed, latent});
          },
          "kv_heads"_a, "head_dim"_a, "kv_type"_a, "windowed"_a = false, "latent"_a = false)
      .def(
          "add_state", [](PlanBuilder& b, int floats) { return b.plan.add_state(floats); }, "floats"_a)
      .def("set_result", [](PlanBuilder& b, int buffer) { b.plan.set_result(buffer); })
      .def("enter_adapter", [](PlanBuilder& b, int adapter) { b.plan.enter_adapter(adapter); })
      .def("leave_adapter", [](PlanBuilder& b) { b.plan.leave_adapter(); })
      .def("begin_part", [](PlanBuilder& b) { b.plan.begin_part(); })
      .def("multiply", &add_products)
      .def("multiply_experts", &add_experts, "products"_a, "choice"_a, "slot"_a, "used"_a, "per_rank"_a,
           "first"_a.none() = nb::none())
      .def("gather", &add_gather, "x"_a.none(), "out"_a, "borders"_a, "to"_a.none() = nb::none())
      .def("multiply_heads", &add_heads, "weights"_a, "out"_a, "slot"_a)
      .def("attend", &add_attention, "q"_a, "kv"_a.none(), "out"_a, "layer"_a, "heads"_a, "kv_heads"_a, "head_dims"_a,
           "scale"_a, "soft_cap"_a.none(), "slopes"_a, "window"_a.none(), "rotate_q"_a.none(), "rotate_k"_a.none(),
           "causal_grouped"_a, "sinks"_a.none())
      .def("choose_experts", &add_choice, "logits"_a, "out"_a, "experts"_a, "used"_a, "gating"_a, "normalized"_a,
           "scale"_a, "groups"_a, "selection_bias"_a.none(), "expert_scales"_a.none());
  bind_row_steps(plan);

  nb::class_<NativeStage>(module, "Stage")
      .def(nb::init<PlanBuilder&, const std::string&, nb::object, const NativeStage*>(), "plan"_a, "feature_level"_a,
           "pool"_a, "shares_kv"_a.none() = nb::none(),
           "`shares_kv`: a stage of the same layers, whose KV memory it also uses; runs of the two take turns.")
      .def("run", &NativeStage::run, "tokens"_a, "positions"_a, "sequence_starts"_a, "table_starts"_a, "block_tables"_a,
           "output_rows"_a, "hidden"_a.none(), "window_tables"_a.none() = nb::none(),
           "states"_a.none() = nb::none(), "rope_positions"_a.none() = nb::none(), "groups"_a.none() = nb::none(),
           "given"_a.none() = nb::none())
      .def("run_frame", &NativeStage::run_frame, "frame"_a)
      .def(
          "set_adapters", [](NativeStage& stage, uint32_t adapters) { stage.executor.set_adapters(adapters); },
          "adapters"_a, "Adapters that the next runs compute, one bit each; steps of others are skipped.")
      .def(
          "set_part", [](NativeStage& stage, int part) { stage.executor.set_part(part); }, "part"_a,
          "The part of the plan that the next runs compute.")
      .def("set_gatherer", &NativeStage::set_gatherer, "gatherer"_a, "Gathers in the next runs.")
      .def("prepare", &NativeStage::prepare,
           "Takes memory from the system that the first runs use, and finds how weights are best prefetched; to be called "
           "before them.")
      .def_prop_ro("result", &result_of)
      .def("contents", &contents_of, "buffer"_a, "Lines of a buffer that no thread has a copy of, as a run left them.")
      .def("kv_layer", &kv_layer_of, "layer"_a, "KV memory of a layer without a window: [KV blocks, bytes].")
      .def_prop_ro("kv_bytes", [](const NativeStage& stage) { return stage.executor.kv_bytes(); })
      .def_prop_ro("workspace_bytes", [](const NativeStage& stage) { return stage.executor.workspace_bytes(); });

  module.def(
      "workspace_bytes", [](const PlanBuilder& b, int threads) { return workspace_bytes(b.plan, threads); }, "plan"_a,
      "threads"_a, "Bytes that a stage of the plan needs besides weights and KV memory.");
  module.def(
      "kv_block_bytes",
      [](int kv_heads, int head_dim, int kv_type, bool latent) {
        return kv_block_bytes({kv_heads, head_dim, kv_type_of(kv_type), false, latent});
      },
      "kv_heads"_a, "head_dim"_a, "kv_type"_a, "latent"_a = false, "Bytes that one block of KV memory costs in a layer.");
}

}  // namespace llamaclust
