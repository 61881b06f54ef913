// Frames of microbatches (wire/microbatch/frames.py, proto/microbatch.proto) as arrays for a backend, and the frame for
// the next stage. Only microbatches of the usual kind are read; of all others the codec says what they are.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "frames/fields.h"

namespace llamaclust {

// What a stage takes: nothing beyond it is read.
struct FrameLimits {
  std::string model_id;
  uint32_t max_tokens, max_outputs, max_sequences, max_context, kv_blocks, vocabulary;
  uint32_t window, window_blocks;  // of layers that give up blocks behind a window; 0: it has none
  size_t hidden_width;             // 0: of a first stage
  uint32_t max_stages, max_rows, max_kv_blocks;  // of the wire: stages before this one, rows, blocks of any stage
  size_t max_header_bytes;
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

// The arrays are those of kernels.backend.Batch.
struct MicrobatchFrame {
  uint64_t epoch = 0, number = 0;
  uint64_t attended = 0;  // about how many keys its rows look at in all
  std::vector<int32_t> tokens, positions, sequence_starts, table_starts, block_tables, output_rows;
  std::vector<int32_t> window_tables;  // empty where the stage has no window
  std::vector<Dependency> dependencies;
  std::vector<Timing> timings;
  size_t body_at = 0, header_at = 0;  // in the frame's bytes
};

// None where the bytes are no such frame, or one of a kind or size that is not read here.
std::optional<MicrobatchFrame> read_frame(Bytes data, const FrameLimits& limits);

// Puts the tokens of an earlier microbatch where they were to come; false where one is missing or unknown.
bool fill_tokens(MicrobatchFrame& frame, uint64_t number, const std::vector<int64_t>& tokens, uint32_t vocabulary);

// The number of a microbatch and the tokens that it sampled, of message SampledTokens; none where the bytes are no such
// message in its usual form.
std::optional<std::pair<uint64_t, std::vector<int32_t>>> read_sampled_tokens(Bytes data, uint32_t max_rows,
                                                                             uint32_t max_vocabulary);

// The frame for the next stage: the same header, one more timing and another hidden state.
size_t next_frame_bytes(Bytes data, const MicrobatchFrame& frame, size_t hidden_bytes);
void write_next_frame(Bytes data, const MicrobatchFrame& frame, const Timing& timing, const float* hidden,
                      size_t hidden_bytes, uint8_t* out);

}  // namespace llamaclust
