// A stage's program for the executor: steps over numbered buffers. Adding a step checks its widths and weights.
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

// A float32 matrix with `multiple` lines per row (one per expert that a row uses) and room for `rows` rows. There are
// fewer rows than in a microbatch if rows were selected or merged before. Buffers that row by row steps write are
// `private_copy`: with few rows, each thread computes its own copy, which is cheaper than dividing the rows and
// synchronizing. All threads together write the other buffers.
struct Buffer {
  int width;
  int multiple;
  bool private_copy;
  int rows;
  bool is_local = true;  // Values are read only in the stretch of steps that writes them (has_bands()).
  int stretch = -1;      // The last stretch that wrote the buffer.
  int filled = 0;        // Number of channels of a line that it wrote.
};

// Row by row steps.
struct EmbedStep {
  Matrix weight;
  BufferId out;
};
struct InputStep { BufferId out; };  // The hidden state that run() is given.
// Each part of `width` channels is normalized. The weight has one part for all, or one for each.
struct NormStep {
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
struct PositionStep {  // out = x + the row of the weight for the position
  BufferId x, out;
  Matrix weight;
};
struct AddRowStep {  // out = x + one row of the weight
  BufferId x, out;
  Matrix weight;
  int row;
};
struct Rotation {
  int table;  // Index into the plan's tables.
  RopeStyle style;
};
struct RopeStep {
  BufferId x, out;
  int heads, head_dim;
  Rotation rotation;
};
// y is x if the operation has one operand. In place if the buffers have no private copies.
struct ElementwiseStep {
  RowOp op;
  BufferId x, y, out;
  float number;
};
// x += y in rows whose scale is not 0; other rows keep their bits. No buffer has private copies.
struct AddAdaptedStep {
  BufferId x, y, scale;
};
struct PositionScaleStep {  // out = x * (1 + factor * ln(1 + (position + offset) / length))
  BufferId x, out;
  double factor;
  int length, offset;
};
// Copies channels [x_start, x_start + channels) of each part of x to the same part of out, from out_start on.
struct CopyChannelsStep {
  BufferId x, out;
  int parts, x_start, out_start, channels;
};
// out = part `level` of a given row, plus x if `adds`. Rows that are not given copy x.
struct GivenStep {
  BufferId x, out;
  int level;
  bool adds;
};
// Part i of out = part i of y + the sum over j of (coefficients[i][j] + offset) * part j of x. Parts are `width`
// channels. Parts before `first` are those of y.
struct MixStep {
  BufferId x, y, out;
  BufferId coefficients;  // -1 if each factor is 1.
  int width, first;
  float offset;
};
struct MagnitudeStep {  // Each part of out = that part of x, scaled to the magnitude of y.
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
// Quantizes x into an activation slot; each line of x becomes `parts` lines of equal length.
struct QuantizeStep {
  BufferId x;
  int slot;
  ActivationFormat format;
  int parts = 1;
};
struct PackStep {  // out = the int8 values and scales to which a product quantizes x.
  BufferId x, out;
  ActivationFormat format;
};
struct UnpackStep {  // Writes the values of a PackStep into an activation slot.
  BufferId x;
  int slot;
  ActivationFormat format;
};
// The router's weights: softmax or sigmoid of all logits, or softmax of the chosen logits.
enum class Gating { Softmax, Sigmoid, SoftmaxOfChosen };
inline constexpr int kGatings = 3;
struct ChooseStep {  // out [2 * used]: expert ids, then their weights.
  BufferId logits, out;
  int experts, used;
  Gating gating;
  bool normalized;                    // Weights are divided by their sum.
  float scale;                        // Factor of the weights.
  int groups, used_groups;            // Only experts of the best `used_groups` groups are chosen.
  std::vector<float> selection_bias;  // Added to weights for the choice only; empty for none.
  std::vector<float> expert_scales;   // Factor of each expert's weight; empty for none.
};
// The experts of a step. A choice may also name others, which are skipped because another worker may have them.
struct ExpertIds {
  int first;
  size_t count;
  bool has(float id) const {
    const float from = static_cast<float>(first);
    return id >= from && id < from + static_cast<float>(count);
  }
  size_t place(float id) const { return static_cast<size_t>(id) - static_cast<size_t>(first); }
};
struct ExpertRowStep {  // Line `rank` of out = that line of x + the row of the weight for the rank's expert.
  BufferId choice, x, out;
  Matrix weight;
  int used;
  int first;  // The expert of the weight's row 0. Lines of experts without a row are not written.
  ExpertIds ids() const { return {first, static_cast<size_t>(weight.rows)}; }
};
// Line `rank` of out = that line of x if the step has the rank's expert, else that of `given` (zeros if it is -1).
struct PlaceExpertsStep {
  BufferId choice, x, given, out;
  int given_start, out_start;  // Channel of a line at which rank 0 starts.
  int used, first, count;
  ExpertIds ids() const { return {first, static_cast<size_t>(count)}; }
};
struct WeighStep {  // Line `rank` of out = the rank's weight * x.
  BufferId choice, x, out;
  int used;
};
struct CombineStep {  // out = the sum over ranks of x[rank], multiplied by the rank's weight if `weighs`.
  BufferId choice, x, out;
  int used;
  bool weighs;
};
struct SelectStep {  // Copies the requested rows. Later steps have only these.
  BufferId x, out;
};
// Each line of out = `factor` lines of x concatenated, or their mean. Later steps have only these lines.
struct MergeStep {
  BufferId x, out;
  int factor;
  bool is_mean;
};
struct OutputStep {  // Copies a line for the caller, into a buffer that no other step writes.
  BufferId x, out;
};

// Steps that all threads compute together.
struct Product {
  Matrix weight;
  std::vector<float> bias;  // Empty for none.
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
struct ExpertsStep {  // Line row * used + rank of every out = the rank's expert @ activations.
  std::vector<ExpertProduct> products;
  BufferId choice;
  int slot, used;
  bool per_rank;  // Activations differ between ranks.
  int first;      // The first expert of the step. Lines of ranks with other experts are not written.
  bool is_shard;  // The step may lack experts that a choice names.
  ExpertIds ids() const { return {first, products[0].experts.size()}; }
};
struct HeadsStep {  // Each part of out = the matrix of the part @ its activations.
  std::vector<Matrix> weights;
  BufferId out;
  int slot;
  int parts() const { return static_cast<int>(weights.size()); }
};
struct AttentionStep {
  // k is -1 if an earlier step has stored the layer's keys and values. v is -1 then, and in latent attention.
  BufferId q, k, v, out;
  int layer;  // Index in the stage's KV memory.
  int heads, kv_heads, head_dim, value_dim;
  float scale;
  float soft_cap;             // Soft cap of scores; 0 for none.
  std::vector<float> slopes;  // ALiBi slope of each query head; empty for none.
  int window;                 // A row attends to its own position and window - 1 before it.
  bool chunked;               // Chunked: it attends from the last multiple of `window` instead.
  std::optional<Rotation> rotate_q, rotate_k;
  bool causal;  // Rows attend to no later positions but those of their group. If false, to window / 2 on both sides.
  bool grouped;  // If true, attention is not causal, and a row attends to exactly its group.
  std::vector<float> sinks;  // Score without a value for each query head; empty for none.
  bool stores() const { return k >= 0; }
};

// Convolves each channel of a row with the taps - 1 rows before it, which are the state [taps - 1][width].
struct ConvolveStep {
  BufferId x, out;
  int layer;  // Index in the stage's KV memory.
  int taps;
  std::vector<float> weight;  // [taps][width]
  std::vector<float> bias;    // Empty for none.
};

struct DecayStep {  // out = exp(weight * softplus(x + bias))
  BufferId x, out;
  std::vector<float> weight, bias;
};
struct DeltaRuleStep {  // Value head h uses key head h % key_heads if `tiled`, else h / (heads / key_heads).
  BufferId q, k, v, decay, beta, out;  // decay has one value per head, or one per key channel of a head.
  int layer;  // Index in the stage's KV memory.
  int heads, key_heads;
  bool tiled;
};
// Mamba 2. x has the channels of all heads, then b and c of each group; dt has one value per head. The state is
// [heads][state_size][head_dim].
struct ScanStep {
  BufferId x, dt, out;
  int layer;  // Index in the stage's KV memory.
  int groups, state_size;
  std::vector<float> bias, rates, skips;  // One value per head.
  int heads() const { return static_cast<int>(bias.size()); }
};

// out = the columns of all members of a group, line by line; x has this member's columns (Gathering).
struct GatherStep {
  BufferId x, out;  // x is -1 for a member without columns.
  int number;
  std::vector<int> borders;
  int to;  // The only member that receives them; -1 for all.
  bool has_columns() const { return x >= 0; }
};

using Step = std::variant<EmbedStep, InputStep, NormStep, LayerNormStep, PositionStep, AddRowStep, RopeStep,
                          ElementwiseStep, AddAdaptedStep, PositionScaleStep, CopyChannelsStep, SigmoidGateStep,
                          GivenStep, MixStep, MagnitudeStep, TopKStep, ChannelScaleStep,
                          DecayStep, QuantizeStep, PackStep, UnpackStep, ChooseStep, ExpertRowStep, PlaceExpertsStep,
                          WeighStep, CombineStep, SelectStep, MergeStep, OutputStep, MatmulStep, ExpertsStep, HeadsStep,
                          AttentionStep, ConvolveStep, DeltaRuleStep, ScanStep, GatherStep>;

// Threads synchronize before a step never, only if rows are divided among them, or always.
enum class Sync { None, IfShared, Always };

struct PlannedStep {
  Step step;
  Sync before;
  bool row_by_row;
  std::optional<int> adapter = std::nullopt;  // Runs without this adapter skip the step.
};

inline constexpr int kMaxAdapters = 32;

// angle(position, i) = position * frequencies[i]; `scale` multiplies cosine and sine. `sections`: one per pair.
struct RotationAngles {
  std::vector<double> frequencies;
  double scale;
  std::vector<int> sections = {};
  size_t floats() const { return 2 * frequencies.size(); }
  int pairs() const { return static_cast<int>(frequencies.size()); }
};

// Room for the quantized activations of one step's products. Later steps reuse it.
struct ActivationSlot {
  int cols = 0, multiple = 0;
  ActivationFormat format = ActivationFormat::F32;
  int stretch = -1;               // The stretch that wrote it.
  size_t max_row_bytes = 0;       // Bytes of the `multiple` lines of a row.
  size_t max_bytes = 0;           // Bytes of all rows.
  size_t max_selected_bytes = 0;  // Bytes of all rows after a selection, which bands do not divide.
};

inline constexpr int kMaxSlots = 4;

// Buffers that a step reads and writes. A row by row step accesses only lines of its own row.
struct Access {
  std::vector<BufferId> reads, writes;
  bool row_by_row;
};

class Plan {
 public:
  explicit Plan(const Limits& limits);

  // All of these throw std::invalid_argument for widths, ids or shapes that do not match.
  BufferId add_buffer(const Buffer& buffer);
  int add_rotation(RotationAngles angles);
  int add_kv_layer(const KvShape& shape);
  int add_state(int floats);  // Returns a layer of KV memory.
  void add(Step step);
  // Runs without the adapter skip the steps that are added between these calls.
  void enter_adapter(int adapter);
  void leave_adapter();
  // Starts a part: the steps that are added next can run without the others.
  void begin_part();
  std::pair<size_t, size_t> steps_of(int part) const;  // The range of the part's steps.
  int unpacked_cols(const UnpackStep& step) const;
  void set_result(BufferId buffer);  // The buffer (without private copies) that run() leaves for the caller.

  const Limits limits;
  std::vector<Buffer> buffers;
  std::vector<PlannedStep> steps;
  std::vector<size_t> parts;  // Index of each part's first step; empty if the steps are one part.
  std::vector<RotationAngles> rotations;
  std::vector<KvShape> kv_layers;
  std::vector<ActivationSlot> slots;
  std::optional<BufferId> result;
  int vocabulary = 0;    // If > 0, an embed step reads token ids below it.
  int hidden_width = 0;  // If > 0, an input step reads a hidden state of this width.
  int window = 0;        // The largest window of windowed layers.
  int gathers = 0;       // If > 0, this is a member of a group, which needs a gatherer.
  bool has_states = false;
  bool selects = false;  // The result has lines for the requested rows only.
  int merged = 1;        // Number of rows that become one row of the result.
  int sections = 0;      // Minimum number of sections of the rope positions.
  int given_width = 0;   // Width of a part of given rows; 0 if none are read.
  int given_levels = 0;  // Minimum number of parts of given rows.
  bool has_all_rows() const { return !selects && merged == 1; }

  // Maximum number of rows that the next added steps compute.
  int rows() const { return selects ? limits.max_outputs : (limits.max_tokens + merged - 1) / merged; }

  // In non-causal attention each row needs all others, so a long run cannot be divided into chunks. Instead, its other
  // steps run in bands of rows: each band in turn computes a stretch of steps, up to the next that needs all rows. A
  // buffer that is read only in the stretch that writes it has room for one band.
  bool has_bands() const;
  int bands(int rows) const;
  int stretch() const { return stretch_; }     // Index of the stretch of the last added step.
  size_t end_of_stretch(size_t step) const;    // First step from `step` on that needs all rows.
  size_t in_band(size_t rows_or_bytes) const;  // The share of a band in a number for all rows.
  size_t rows_of(const Buffer& buffer) const;  // Number of rows that it has room for.

 private:
  const Buffer& buffer(BufferId id) const;
  struct Checks;
  Access check(const Step& step);
  void fill(Buffer& buffer, int start, int end);
  void follow(const Step& step, const Access& access);
  int band_units() const;
  Sync sync_before(const Access& access, bool waits);

  std::optional<int> adapter_;  // Adapter of the steps that are being added.
  bool has_adapters_ = false, looks_ahead_ = false;
  int stretch_ = 0;
  size_t choosable_ = 0;              // Number of experts that a choice may name.
  bool after_shared_ = false;         // The last step was computed by all threads together.
  bool after_selection_ = false;      // The last step has changed the number of rows.
  bool after_rows_ = false;           // There were row by row steps since the threads synchronized.
  std::vector<BufferId> read_since_;  // Buffers that those steps read.
};

}  // namespace llamaclust
