// Frames of microbatches (wire/microbatch/frames.py, proto/microbatch.proto) as arrays for a backend, and the frame for
// the next stage.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "frames/fields.h"

namespace llamaclust {

// What a stage takes: anything beyond it is a ProtocolViolation.
struct FrameLimits {
  std::string model_id;
  int32_t max_tokens, max_outputs, max_sequences, max_context, kv_blocks, vocabulary;
  int32_t window, window_blocks;  // of layers that give up blocks behind a window; 0: it has none
  int32_t state_blocks;           // 0: states have no blocks of their own
  int32_t adapters;               // of the model
  size_t hidden_width;            // 0: of a first stage
  size_t given_width;             // of a row of an image; 0: the model takes none
  int32_t rope_sections;          // of the model; 0: a row has one rope position, its own
  int32_t max_stages, max_rows, max_kv_blocks, max_drafts;  // of any stage
  float max_scale;                                          // of an adapter, positive or negative
  size_t max_header_bytes, max_failure_bytes;
};

// A row whose token an earlier microbatch samples.
struct Dependency {
  uint64_t number;      // of that microbatch
  uint32_t output_row;  // of it
  size_t row;           // of this one
};

struct Timing {
  uint64_t queue_ns, compute_ns, wire_ns, rows;
};

// What an MTP head needs of a chunk.
struct DraftOrder {
  int32_t chunk;
  int32_t next_token;  // behind its last one; -1: unknown
  int32_t drafts;
};

// The arrays are those of kernels.backend.Batch and BatchStates.
struct MicrobatchFrame {
  uint64_t epoch = 0, number = 0;
  uint64_t attended = 0;  // about how many keys its rows look at in all
  std::vector<int32_t> tokens, positions, sequence_starts, table_starts, block_tables, output_rows;
  std::vector<int32_t> window_tables;   // empty where the stage has no window
  std::vector<float> adapter_scales;    // [rows][adapters of the model]; empty: no row has one
  std::vector<int32_t> states_before, state_starts, state_rows, state_blocks;  // empty where the stage has none
  std::vector<int32_t> given_rows;      // of images
  std::vector<float> given_values;      // [given rows][given width]
  std::vector<int32_t> groups;          // [rows][start, end); empty: no row is in one
  std::vector<int32_t> rope_positions;  // [sections][rows]; empty: those of all rows are their positions
  std::vector<int32_t> embedded_rows;   // whose hidden state is wanted
  std::vector<int32_t> checked_chunks;  // whose hidden state was not finite before
  std::vector<DraftOrder> draft_orders;
  std::vector<Dependency> dependencies;
  std::vector<Timing> timings;
  std::optional<std::string> failure;   // of a stage before this one, UTF-8
  size_t body_at = 0, header_at = 0;    // in the frame's bytes
};

MicrobatchFrame read_frame(Bytes data, const FrameLimits& limits);

// Puts the tokens of an earlier microbatch where they were to come; false where one is missing.
bool fill_tokens(MicrobatchFrame& frame, uint64_t number, const std::vector<int32_t>& tokens, int32_t vocabulary);

// The number of a microbatch and the tokens that it sampled, of message SampledTokens.
std::pair<uint64_t, std::vector<int32_t>> read_sampled_tokens(Bytes data, size_t max_rows, int32_t max_vocabulary);

// The frame for the next stage: the same header, with one more timing and another hidden state, or with a failure.
struct FollowingFrame {
  Bytes data;  // of `frame`
  const MicrobatchFrame& frame;
  std::optional<Timing> timing;  // none: the body is a failure
  Bytes body;

  size_t bytes() const;
  void write(uint8_t* out) const;
};

}  // namespace llamaclust
