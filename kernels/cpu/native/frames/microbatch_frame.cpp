#include "frames/microbatch_frame.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace llamaclust {
namespace {

static_assert(std::endian::native == std::endian::little, "frames are little-endian");

constexpr uint32_t kBlockTokens = 16;
constexpr uint8_t kVersion = 1, kHidden = 1;

struct Prefix {
  char magic[4];
  uint8_t version, kind;
  uint16_t stages;
  uint32_t header_bytes, body_bytes;
};
static_assert(sizeof(Prefix) == 16 && sizeof(Timing) == 32);

struct Chunk {
  uint32_t position = 0, outputs = 0, window_start = 0;
  std::vector<int32_t> window_blocks;
  std::optional<Dependency> dependency;
};

class Reading {
 public:
  Reading(const FrameLimits& limits, MicrobatchFrame& frame) : limits_(limits), frame_(frame) {}

  bool microbatch(Bytes header) {
    Fields fields(header, 4);
    bool is_ours = false;
    frame_.sequence_starts.push_back(0);
    frame_.table_starts.push_back(0);
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        is_ours = is_model(fields.bytes());
      else if (field == 2)
        frame_.epoch = fields.number64();
      else if (field == 3)
        frame_.number = fields.number64();
      else if (field != 4 || !chunk(fields.bytes()))
        fields.fail();
    }
    return fields.is_whole() && is_ours && !frame_.tokens.empty() && frame_.output_rows.size() <= limits_.max_outputs;
  }

 private:
  bool is_model(Bytes id) const {
    return std::equal(id.begin(), id.end(), limits_.model_id.begin(), limits_.model_id.end());
  }

  bool chunk(Bytes message) {
    if (frame_.sequence_starts.size() > limits_.max_sequences) return false;
    Chunk chunk;
    Fields fields(message);
    const size_t row = frame_.tokens.size(), block = frame_.block_tables.size();
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        tokens(fields);
      else if (field == 2)
        chunk.position = fields.number32();
      else if (field == 3)
        table(fields, limits_.kv_blocks, frame_.block_tables);
      else if (field == 4)
        chunk.outputs = fields.number32();
      else if (field == 6)
        table(fields, limits_.window ? limits_.window_blocks : limits_.max_kv_blocks, chunk.window_blocks);
      else if (field == 7)
        chunk.window_start = fields.number32();
      else if (field != 5 || !dependency(fields.bytes(), row, chunk))
        fields.fail();
    }
    return fields.is_whole() && fits(chunk, row, block) && add(chunk, row, block);
  }

  void tokens(Fields& fields) {
    fields.numbers([&](uint32_t token) {
      if (token >= limits_.vocabulary || frame_.tokens.size() >= limits_.max_tokens)
        fields.fail();
      else
        frame_.tokens.push_back(static_cast<int32_t>(token));
    });
  }

  // Runs of blocks below `end`. A table has no more of them than a context, or a frame would make arrays of any size.
  void table(Fields& fields, uint32_t end, std::vector<int32_t>& to) const {
    const size_t most = to.size() + blocks_of(limits_.max_context);
    std::optional<uint32_t> start;
    fields.numbers([&](uint32_t number) {
      if (!start) {
        start = number;
        return;
      }
      const uint64_t last = uint64_t{*start} + number;
      if (number == 0 || last > end || number > most - to.size())
        fields.fail();
      else
        for (uint64_t id = *start; id < last; id++) to.push_back(static_cast<int32_t>(id));
      start.reset();
    });
    if (start) fields.fail();
  }

  bool dependency(Bytes message, size_t row, Chunk& chunk) const {
    Fields fields(message);
    Dependency found{0, 0, row};
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        found.number = fields.number64();
      else if (field == 2)
        found.output_row = fields.number32();
      else
        fields.fail();
    }
    chunk.dependency = found;
    return fields.is_whole() && found.output_row < limits_.max_rows;
  }

  bool fits(const Chunk& chunk, size_t row, size_t block) const {
    const size_t tokens = frame_.tokens.size() - row, blocks = frame_.block_tables.size() - block;
    const uint64_t context = uint64_t{chunk.position} + tokens;
    if (tokens == 0 || blocks == 0 || context > limits_.max_context || chunk.outputs > tokens) return false;
    if (chunk.dependency && (tokens != 1 || frame_.tokens[row] != 0)) return false;
    if (chunk.window_start > blocks_of(limits_.max_context)) return false;
    return blocks >= blocks_of(context) && (limits_.window == 0 || has_window(chunk, context));
  }

  // Whether the blocks that its rows see, or are stored in, are there.
  bool has_window(const Chunk& chunk, uint64_t context) const {
    const uint64_t seen = uint64_t{chunk.position} + 1;
    const uint64_t first = seen > limits_.window ? (seen - limits_.window) / kBlockTokens : 0;
    return chunk.window_start <= first && chunk.window_start + chunk.window_blocks.size() == blocks_of(context);
  }

  bool add(const Chunk& chunk, size_t row, size_t block) {
    if (limits_.window) {
      frame_.window_tables.resize(frame_.block_tables.size(), -1);
      std::copy(chunk.window_blocks.begin(), chunk.window_blocks.end(),
                frame_.window_tables.begin() + static_cast<std::ptrdiff_t>(block + chunk.window_start));
    }
    const size_t end = frame_.tokens.size();
    for (size_t at = row; at < end; at++)
      frame_.positions.push_back(static_cast<int32_t>(chunk.position + (at - row)));
    for (size_t at = end - chunk.outputs; at < end; at++) frame_.output_rows.push_back(static_cast<int32_t>(at));
    frame_.sequence_starts.push_back(static_cast<int32_t>(end));
    frame_.table_starts.push_back(static_cast<int32_t>(frame_.block_tables.size()));
    frame_.attended += (end - row) * (chunk.position + (end - row));
    if (chunk.dependency) frame_.dependencies.push_back(*chunk.dependency);
    return true;
  }

  static size_t blocks_of(uint64_t tokens) { return static_cast<size_t>((tokens + kBlockTokens - 1) / kBlockTokens); }

  const FrameLimits& limits_;
  MicrobatchFrame& frame_;
};

bool read_timings(Bytes bytes, const FrameLimits& limits, std::vector<Timing>& timings) {
  timings.resize(bytes.size() / sizeof(Timing));
  if (!timings.empty()) std::memcpy(timings.data(), bytes.data(), bytes.size());
  const auto is_bounded = [&](const Timing& t) { return t.rows >= 1 && t.rows <= limits.max_rows; };
  return std::all_of(timings.begin(), timings.end(), is_bounded);
}

}  // namespace

std::optional<MicrobatchFrame> read_frame(Bytes data, const FrameLimits& limits) {
  Prefix prefix;
  if (data.size() < sizeof prefix) return std::nullopt;
  std::memcpy(&prefix, data.data(), sizeof prefix);
  if (std::memcmp(prefix.magic, "LCST", 4) != 0 || prefix.version != kVersion || prefix.kind != kHidden)
    return std::nullopt;
  MicrobatchFrame frame;
  frame.body_at = sizeof prefix + prefix.stages * sizeof(Timing);
  frame.header_at = frame.body_at + prefix.body_bytes;
  if (prefix.stages > limits.max_stages || prefix.header_bytes > limits.max_header_bytes ||
      data.size() != frame.header_at + prefix.header_bytes)
    return std::nullopt;
  if (!read_timings(data.subspan(sizeof prefix, frame.body_at - sizeof prefix), limits, frame.timings))
    return std::nullopt;
  if (!Reading(limits, frame).microbatch(data.subspan(frame.header_at))) return std::nullopt;
  if (prefix.body_bytes != frame.tokens.size() * limits.hidden_width * sizeof(float)) return std::nullopt;
  const bool are_earlier = std::all_of(frame.dependencies.begin(), frame.dependencies.end(),
                                       [&](const Dependency& d) { return d.number < frame.number; });
  return are_earlier ? std::optional(std::move(frame)) : std::nullopt;
}

bool fill_tokens(MicrobatchFrame& frame, uint64_t number, const std::vector<int64_t>& tokens, uint32_t vocabulary) {
  for (const Dependency& dependency : frame.dependencies) {
    if (dependency.number != number) continue;
    if (dependency.output_row >= tokens.size()) return false;
    const int64_t token = tokens[dependency.output_row];
    if (token < 0 || token >= vocabulary) return false;
    frame.tokens[dependency.row] = static_cast<int32_t>(token);
  }
  return true;
}

std::optional<std::pair<uint64_t, std::vector<int32_t>>> read_sampled_tokens(Bytes data, uint32_t max_rows,
                                                                             uint32_t max_vocabulary) {
  uint64_t number = 0;
  std::vector<int32_t> tokens;
  Fields fields(data);
  while (const uint32_t field = fields.next()) {
    if (field == 1)
      number = fields.number64();
    else if (field == 2)
      fields.numbers([&](uint32_t token) {
        if (token >= max_vocabulary || tokens.size() >= max_rows)
          fields.fail();
        else
          tokens.push_back(static_cast<int32_t>(token));
      });
    else
      fields.fail();
  }
  return fields.is_whole() ? std::optional(std::pair(number, std::move(tokens))) : std::nullopt;
}

size_t next_frame_bytes(Bytes data, const MicrobatchFrame& frame, size_t hidden_bytes) {
  return frame.body_at + sizeof(Timing) + hidden_bytes + (data.size() - frame.header_at);
}

void write_next_frame(Bytes data, const MicrobatchFrame& frame, const Timing& timing, const float* hidden,
                      size_t hidden_bytes, uint8_t* out) {
  Prefix prefix;
  std::memcpy(&prefix, data.data(), sizeof prefix);
  prefix.stages++;
  prefix.body_bytes = static_cast<uint32_t>(hidden_bytes);
  std::memcpy(out, &prefix, sizeof prefix);
  std::memcpy(out + sizeof prefix, data.data() + sizeof prefix, frame.body_at - sizeof prefix);
  out += frame.body_at;
  std::memcpy(out, &timing, sizeof timing);
  std::memcpy(out + sizeof timing, hidden, hidden_bytes);
  std::memcpy(out + sizeof timing + hidden_bytes, data.data() + frame.header_at, data.size() - frame.header_at);
}

}  // namespace llamaclust
