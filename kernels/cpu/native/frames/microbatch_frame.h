// Parses frames of microbatches (wire/microbatch/frames.py, proto/microbatch.proto) into arrays for a backend, and
// builds the frame for the next stage.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "frames/fields.h"

namespace llamaclust {

// Limits of a stage. Anything beyond them throws a ProtocolViolation.
struct FrameLimits {
  std::string model_id;
  int32_t max_tokens, max_outputs, max_sequences, max_context, kv_blocks, vocabulary;
  // Window of layers that release the blocks outside of it, and their number of blocks; 0 if the stage has none.
  int32_t window, window_blocks;
  int32_t state_blocks;  // 0 if states have no blocks of their own.
  int32_t adapters;  // Number of adapters of the model.
  size_t hidden_width;  // 0 for a first stage.
  size_t given_width;  // Values per row of an image; 0 if the model takes no images.
  int32_t rope_sections;  // Number in the model; 0 if a row's only rope position is its position.
  int32_t max_stages, max_rows, max_kv_blocks, max_drafts;  // Limits that hold for any stage.
  float max_scale;  // Limit of an adapter scale's magnitude.
  size_t max_header_bytes, max_failure_bytes;
};

// A row whose token is sampled by an earlier microbatch.
struct Dependency {
  uint64_t number;      // Number of the earlier microbatch.
  uint32_t output_row;  // Output row of the earlier microbatch.
  size_t row;           // Row of this microbatch.
};

struct Timing {
  uint64_t queue_ns, compute_ns, wire_ns, rows;
};

// Input of an MTP head for a chunk.
struct DraftOrder {
  int32_t chunk;
  int32_t next_token;  // The token that follows the chunk's last one; -1 if unknown.
  int32_t drafts;
};

// The arrays of kernels.backend.Batch and BatchStates.
struct MicrobatchFrame {
  uint64_t epoch = 0, number = 0;
  uint64_t attended = 0;  // Approximate number of keys that all rows together attend to.
  std::vector<int32_t> tokens, positions, sequence_starts, table_starts, block_tables, output_rows;
  std::vector<int32_t> window_tables;  // Empty if the stage has no window.
  std::vector<float> adapter_scales;   // [rows][adapters of the model]; empty if no row uses an adapter.
  // Empty if the stage has no states.
  std::vector<int32_t> states_before, state_starts, state_rows, state_blocks;
  std::vector<int32_t> given_rows;      // Rows of images.
  std::vector<float> given_values;      // [given rows][given width]
  std::vector<int32_t> groups;          // [rows][start, end); empty if no row is in a group.
  std::vector<int32_t> rope_positions;  // [sections][rows]; empty if all rope positions equal the positions.
  std::vector<int32_t> embedded_rows;   // Rows whose hidden state is requested.
  std::vector<int32_t> checked_chunks;  // Chunks whose hidden states this stage must check.
  std::vector<DraftOrder> draft_orders;
  std::vector<Dependency> dependencies;
  std::vector<Timing> timings;
  std::optional<std::string> failure;  // Failure of an earlier stage, in UTF-8.
  size_t body_at = 0, header_at = 0;   // Offsets in the bytes of the frame.
};

MicrobatchFrame read_frame(Bytes data, const FrameLimits& limits);

// Fills in the tokens that microbatch `number` sampled, where rows wait for them. Returns false if one is missing.
bool fill_tokens(MicrobatchFrame& frame, uint64_t number, const std::vector<int32_t>& tokens, int32_t vocabulary);

// Parses a message SampledTokens: the number of a microbatch and the tokens that it sampled.
std::pair<uint64_t, std::vector<int32_t>> read_sampled_tokens(Bytes data, size_t max_rows, int32_t max_vocabulary);

// The frame for the next stage: the same header with one more timing, and either a new hidden state or a failure.
struct FollowingFrame {
  Bytes data;  // The bytes of `frame`.
  const MicrobatchFrame& frame;
  std::optional<Timing> timing;  // Absent if the body is a failure.
  Bytes body;

  size_t bytes() const;
  void write(uint8_t* out) const;
};

}  // namespace llamaclust
