// A stage's program as the executor runs it: steps over numbered buffers, every width and weight checked on the way in.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "executor/limits.h"
#include "level/level.h"
#include "level/matmul_ops.h"

namespace llamaclust {

using BufferId = int;

// A matrix of float32 with `multiple` lines for each row (one for each expert a row uses) and room for `rows` rows, which
// are fewer than those of a microbatch where rows were selected or merged before.
// Buffers that row by row steps write are `private_copy`: with few rows every thread computes them for itself, which is
// cheaper than to share the work and wait. All others are written by all threads together.
struct Buffer {
  int width;
  int multiple;
  bool private_copy;
  int rows;
  bool is_local = true;  // values are read in the stretch that wrote them, if at all; see Plan::stretch
  int stretch = -1;      // the last that wrote
  int filled = 0;        // channels of a line that it wrote
};

// Row by row steps.
struct EmbedStep {
  Matrix weight;
  BufferId out;
};
struct InputStep { BufferId out; };  // the hidden state that run() is given
struct NormStep {  // of parts of so many channels, each with the same weight or with its own part of it
  BufferId x, out;
  std::vector<float> weight;
  float epsilon;
  int width;
};
struct LayerNormStep {
  BufferId x, out;
  std::vector<float> weight, bias;
  float epsilon;
};
struct PositionStep {  // out = x + the weight's row of the position
  BufferId x, out;
  Matrix weight;
};
struct AddRowStep {  // out = x + one row of the weight
  BufferId x, out;
  Matrix weight;
  int row;
};
struct Rotation {
  int table;  // index into the plan's tables
  RopeStyle style;
};
struct RopeStep {
  BufferId x, out;
  int heads, head_dim;
  Rotation rotation;
};
struct ElementwiseStep {  // y is x where the operation has one; in place of a buffer without private copies where all
                          // are
  RowOp op;
  BufferId x, y, out;
  float number;
};
struct AddAdaptedStep {  // x += y in rows whose scale is not 0; others keep their bits. Buffers without private copies
  BufferId x, y, scale;
};
struct PositionScaleStep {  // out = x * (1 + factor * ln(1 + (position + offset) / length))
  BufferId x, out;
  double factor;
  int length, offset;
};
struct CopyChannelsStep {  // of each part of a line of x channels [x_start, x_start + channels) to the same part of out
  BufferId x, out;
  int parts, x_start, out_start, channels;
};
struct GivenStep {  // out = the row's part `level` of the given rows, or x and that; of rows that are not given, x
  BufferId x, out;
  int level;
  bool adds;
};
struct MixStep {  // part i of out = that of y + the sum over j of (coefficients[i][j] + offset) * part j of x, of `width`
                  // channels each; those before `first` are copied
  BufferId x, y, out;
  BufferId coefficients;  // -1: each factor is 1
  int width, first;
  float offset;
};
struct MagnitudeStep {  // each part of out = that of x with the magnitude of y
  BufferId x, y, out;
  float epsilon;
};
struct TopKStep {  // out = max(x - mean - factor * standard deviation, 0)
  BufferId x, out;
  float factor;
};
struct ChannelScaleStep {  // out = x * weight
  BufferId x, out;
  std::vector<float> weight;
};
struct SigmoidGateStep {  // out = y * sigmoid(x . weight)
  BufferId x, y, out;
  std::vector<float> weight;
};
struct QuantizeStep {  // into an activation slot; each line as so many lines, equal parts of it
  BufferId x;
  int slot;
  ActivationFormat format;
  int parts = 1;
};
struct PackStep {  // out = the int8 values and scales of x that its products would quantize it to
  BufferId x, out;
  ActivationFormat format;
};
struct UnpackStep {  // into an activation slot, what such values and scales stand for
  BufferId x;
  int slot;
  ActivationFormat format;
};
// How the router's logits become weights: softmax or sigmoid of all, or softmax of those chosen by logits.
enum class Gating { Softmax, Sigmoid, SoftmaxOfChosen };
inline constexpr int kGatings = 3;
struct ChooseStep {  // out [2 * used] holds ids, then weights
  BufferId logits, out;
  int experts, used;
  Gating gating;
  bool normalized;            // weights are divided by their sum
  float scale;                // of weights
  int groups, used_groups;    // experts of the best groups are chosen alone
  std::vector<float> selection_bias;  // added to weights for the choice; empty: none
  std::vector<float> expert_scales;   // of the weights, one an expert; empty: none
};
// The experts that a step has, of all that a choice may name. Ids outside are skipped: they may come from elsewhere.
struct ExpertIds {
  int first;
  size_t count;
  bool has(float id) const {
    const float from = static_cast<float>(first);
    return id >= from && id < from + static_cast<float>(count);
  }
  size_t place(float id) const { return static_cast<size_t>(id) - static_cast<size_t>(first); }
};
struct ExpertRowStep {  // line `rank` of out = that of x + the weight's row of the rank's expert
  BufferId choice, x, out;
  Matrix weight;
  int used;
  int first;  // the expert that the first row is of; lines of experts without a row stay as they are
  ExpertIds ids() const { return {first, static_cast<size_t>(weight.rows)}; }
};
struct PlaceExpertsStep {  // line `rank` of out = that of x, or of `given` (-1: 0) where the step has not the rank's expert
  BufferId choice, x, given, out;
  int given_start, out_start;  // channels of a line before the first rank's
  int used, first, count;
  ExpertIds ids() const { return {first, static_cast<size_t>(count)}; }
};
struct WeighStep {  // line `rank` of out = the rank's weight * x
  BufferId choice, x, out;
  int used;
};
struct CombineStep {  // out = sum over ranks of weight * x[rank], or of x[rank] alone
  BufferId choice, x, out;
  int used;
  bool weighs;
};
struct SelectStep {  // from all rows to the wanted ones
  BufferId x, out;
};
struct MergeStep {  // each line of out = `factor` lines of x one after the other, or their mean; later steps have only these
  BufferId x, out;
  int factor;
  bool is_mean;
};
struct OutputStep {  // a copy for the caller, into a buffer that no other step writes
  BufferId x, out;
};

// Steps that all threads share.
struct Product {
  Matrix weight;
  std::vector<float> bias;  // empty: none
  BufferId out;
  int slot;
};
struct MatmulStep {
  std::vector<Product> products;
  int64_t tiles() const {
    int64_t tiles = 0;
    for (const Product& product : products) tiles += product.weight.tile_count();
    return tiles;
  }
};
struct ExpertProduct {
  std::vector<Matrix> experts;
  BufferId out;
};
struct ExpertsStep {  // line r * used + rank of every out = the rank's expert @ activations
  std::vector<ExpertProduct> products;
  BufferId choice;
  int slot, used;
  bool per_rank;   // activations differ from rank to rank
  int first;       // the first of its experts; lines of ranks whose expert it has not stay as they are
  bool is_shard;   // it need not have all experts that may be chosen
  ExpertIds ids() const { return {first, products[0].experts.size()}; }
};
struct HeadsStep {  // each part of out = the part's matrix @ its activations
  std::vector<Matrix> weights;
  BufferId out;
  int slot;
  int parts() const { return static_cast<int>(weights.size()); }
};
struct AttentionStep {
  BufferId q, k, v, out;  // k is -1 where another step has stored the layer's keys and values; v, where it is latent, too
  int layer;  // of the stage's KV memory
  int heads, kv_heads, head_dim, value_dim;
  float scale;
  float soft_cap;             // of scores; 0: none
  std::vector<float> slopes;  // of a linear bias, one a query head; empty: none
  int window;                 // a row sees its own position and window - 1 before it
  bool chunked;               // or of those only positions from its own multiple of window on
  std::optional<Rotation> rotate_q, rotate_k;
  bool causal;  // else a row sees those behind it, too, with a window at most window / 2 on either side
  bool grouped;  // or exactly its group. Of causal attention, a row also sees its group's positions behind it
  std::vector<float> sinks;  // a score without a value, one a query head; empty: none
  bool stores() const { return k >= 0; }
};

struct ConvolveStep {  // of each channel with those of the taps - 1 rows before, which are the state [taps - 1][width]
  BufferId x, out;
  int layer;  // of the stage's KV memory
  int taps;
  std::vector<float> weight;  // [taps][width]
  std::vector<float> bias;    // empty: none
};

struct DecayStep {  // out = exp(weight * softplus(x + bias))
  BufferId x, out;
  std::vector<float> weight, bias;
};
struct DeltaRuleStep {  // value head h has key head h % key_heads if they are `tiled`, else h / (heads / key_heads)
  BufferId q, k, v, decay, beta, out;  // decay has a number for each head, or each of its key channels
  int layer;  // of the stage's KV memory
  int heads, key_heads;
  bool tiled;
};
struct ScanStep {  // Mamba 2: x has the channels of all heads, then b and c of each group of heads; dt a number a head.
                   // The state is [heads][state_size][head_dim]
  BufferId x, dt, out;
  int layer;  // of the stage's KV memory
  int groups, state_size;
  std::vector<float> bias, rates, skips;  // of each head
  int heads() const { return static_cast<int>(bias.size()); }
};

struct GatherStep {  // out = the columns of all members of a group, of which x has this one's, line by line; see Gathering
  BufferId x, out;  // x: -1 for a member without columns
  int number;
  std::vector<int> borders;
  int to;  // the only member that gets them; -1: all
  bool has_columns() const { return x >= 0; }
};

using Step = std::variant<EmbedStep, InputStep, NormStep, LayerNormStep, PositionStep, AddRowStep, RopeStep,
                          ElementwiseStep, AddAdaptedStep, PositionScaleStep, CopyChannelsStep, SigmoidGateStep,
                          GivenStep, MixStep, MagnitudeStep, TopKStep, ChannelScaleStep,
                          DecayStep, QuantizeStep, PackStep, UnpackStep, ChooseStep, ExpertRowStep, PlaceExpertsStep,
                          WeighStep, CombineStep, SelectStep, MergeStep, OutputStep, MatmulStep, ExpertsStep, HeadsStep,
                          AttentionStep, ConvolveStep, DeltaRuleStep, ScanStep, GatherStep>;

// Whether the threads must synchronize before a step: at all times, or only where rows were shared out among them.
enum class Sync { None, IfShared, Always };

struct PlannedStep {
  Step step;
  Sync before;
  bool row_by_row;
  std::optional<int> adapter = std::nullopt;  // runs without this adapter skip the step
};

inline constexpr int kMaxAdapters = 32;

// angle(position, i) = position * frequencies[i]; `scale` multiplies cos and sin. `sections`: those of the pairs.
struct RotationAngles {
  std::vector<double> frequencies;
  double scale;
  std::vector<int> sections = {};
  size_t floats() const { return 2 * frequencies.size(); }
  int pairs() const { return static_cast<int>(frequencies.size()); }
};

// Room for the activations of one step's products; what stands in it changes from step to step.
struct ActivationSlot {
  int cols = 0, multiple = 0;
  ActivationFormat format = ActivationFormat::F32;
  int stretch = -1;          // that wrote it
  size_t max_row_bytes = 0;  // of the `multiple` lines of one row
  size_t max_bytes = 0;      // of all rows
  size_t max_selected_bytes = 0;  // of all rows behind a selection, which no band computes
};

inline constexpr int kMaxSlots = 4;

// What a step reads and writes. Row by row steps touch lines of their own row only.
struct Access {
  std::vector<BufferId> reads, writes;
  bool row_by_row;
};

class Plan {
 public:
  explicit Plan(const Limits& limits);

  // All of these throw std::invalid_argument for widths, ids or shapes that do not fit together.
  BufferId add_buffer(const Buffer& buffer);
  int add_rotation(RotationAngles angles);
  int add_kv_layer(const KvShape& shape);
  int add_state(int floats);  // a layer of KV memory, too
  void add(Step step);
  // Products and their sums that are added in between are skipped by runs without the adapter.
  void enter_adapter(int adapter);
  void leave_adapter();
  // The steps that are added next are a part of its own, which runs without the others.
  void begin_part();
  std::pair<size_t, size_t> steps_of(int part) const;  // where it begins and ends
  int unpacked_cols(const UnpackStep& step) const;
  void set_result(BufferId buffer);  // what run() leaves for the caller; without private copies

  const Limits limits;
  std::vector<Buffer> buffers;
  std::vector<PlannedStep> steps;
  std::vector<size_t> parts;  // where they begin; none: all steps are one
  std::vector<RotationAngles> rotations;
  std::vector<KvShape> kv_layers;
  std::vector<ActivationSlot> slots;
  std::optional<BufferId> result;
  int vocabulary = 0;    // > 0: an embed step reads token ids below it
  int hidden_width = 0;  // > 0: an input step reads a hidden state of that width
  int window = 0;        // the largest one of windowed layers
  int gathers = 0;       // > 0: it is a group's member, which needs a gatherer
  bool has_states = false;
  bool selects = false;  // the result has lines for the wanted rows only
  int merged = 1;        // rows that become one row of the result
  int sections = 0;      // at least so many sections of rope positions are read
  int given_width = 0;   // of a part of given rows; 0: none are read
  int given_levels = 0;  // at least so many parts
  bool has_all_rows() const { return !selects && merged == 1; }

  // The most rows that the steps that are added next compute.
  int rows() const { return selects ? limits.max_outputs : (limits.max_tokens + merged - 1) / merged; }

  // Where each row needs all others, in attention that looks ahead, a run is long: it cannot be cut into chunks. All else
  // of it is computed in bands of rows: each band in turn computes a stretch of steps, up to the next that needs all rows.
  // A buffer for values that only their stretch reads has room for one band.
  bool has_bands() const;
  int bands(int rows) const;
  int stretch() const { return stretch_; }  // of the step that was added last
  size_t end_of_stretch(size_t step) const;  // that begins there; the step itself if it needs all rows
  size_t in_band(size_t rows_or_bytes) const;  // of those of all rows
  size_t rows_of(const Buffer& buffer) const;  // that it has room for

 private:
  const Buffer& buffer(BufferId id) const;
  struct Checks;
  Access check(const Step& step);
  void fill(Buffer& buffer, int start, int end);
  void follow(const Step& step, const Access& access);
  int band_units() const;
  Sync sync_before(const Access& access, bool waits);

  std::optional<int> adapter_;        // of the steps that are added
  bool has_adapters_ = false, looks_ahead_ = false;
  int stretch_ = 0;
  size_t choosable_ = 0;              // experts that a choice may name
  bool after_shared_ = false;         // the last step was shared by all threads
  bool after_rows_ = false;           // row by row steps since the threads met
  std::vector<BufferId> read_since_;  // what these read
};

}  // namespace llamaclust
