#include "frames/microbatch.h"

#include <algorithm>
#include <cmath>

#include "frames/image_rows.h"

namespace llamaclust {
namespace {

constexpr int32_t kBlockTokens = 16;

// Records of proto/microbatch.proto, in the order of its fields.
struct Chunk {
  int32_t tokens, position, outputs, runs, is_checked;
};
struct Run {
  int32_t first, count;
};
struct Followed {
  uint64_t chunk, number, row;
};
struct Window {
  int32_t start, runs;
};
struct Embedded {
  int32_t chunk, first, end;
};
struct Adapter {
  int32_t chunk, number;
  float scale;
};
struct State {
  int32_t chunk, tokens, block;
};

std::string text(int64_t number) { return std::to_string(number); }

int64_t blocks_of(int64_t tokens) { return (tokens + kBlockTokens - 1) / kBlockTokens; }

class Reading {
 public:
  Reading(const FrameLimits& limits, MicrobatchFrame& frame) : limits_(limits), frame_(frame) {}

  void microbatch(Bytes header) {
    Bytes sections[kSections];
    Fields fields("Microbatch", header);
    while (const uint32_t field = fields.next()) {
      if (field == 2)
        frame_.epoch = fields.number64();
      else if (field == 3)
        frame_.number = fields.number64();
      else if (field < kSections)
        sections[field] = fields.bytes();
      else
        fields.fail();
    }
    check_model(sections[1]);
    read_chunks({"chunks", sections[4]});
    read_tokens({"tokens", sections[5]});
    read_tables({"block tables", sections[6]});
    read_followed({"chunks that follow rows", sections[7]});
    read_windows({"windows", sections[8]}, {"window tables", sections[9]});
    read_embedded({"embedded rows", sections[10]});
    read_adapters({"adapters", sections[11]});
    read_states({"states before", sections[12]}, {"states", sections[13]});
    read_drafts({"drafts", sections[14]});
    read_image_rows(sections[15], limits_, frame_);
  }

 private:
  static constexpr uint32_t kSections = 16;
  static constexpr size_t kModelIdBytes = 128;

  void check_model(Bytes id) const {
    if (std::equal(id.begin(), id.end(), limits_.model_id.begin(), limits_.model_id.end())) return;
    bounded<size_t>("length of model_id", id.size(), 0, kModelIdBytes);
    std::string model(id.begin(), id.end());
    std::erase_if(model, [](unsigned char c) { return c < ' ' || c > '~'; });
    throw ProtocolViolation("microbatch of model " + model + ", this stage holds " + limits_.model_id);
  }

  void check_planned(const char* what, int64_t value, int64_t most) const {
    if (value > most)
      throw ProtocolViolation("microbatch with " + text(value) + " " + what + ", this stage is planned for " + text(most));
  }

  void read_chunks(Records<Chunk> chunks) {
    check_planned("sequences", static_cast<int64_t>(chunks.size()), limits_.max_sequences);
    bounded<int64_t>("chunks", static_cast<int64_t>(chunks.size()), 1, limits_.max_sequences);
    int64_t rows = 0, outputs = 0;
    for (size_t i = 0; i < chunks.size(); i++) {
      const Chunk chunk = chunks[i];
      bounded("tokens of a chunk", chunk.tokens, 1, limits_.max_rows);
      bounded("position", chunk.position, 0, std::numeric_limits<int32_t>::max() - limits_.max_rows);
      const int32_t context = chunk.position + chunk.tokens;
      if (context > limits_.max_context)
        throw ProtocolViolation("sequence of " + text(context) + " positions, this stage is planned for " +
                                text(limits_.max_context));
      bounded("outputs", chunk.outputs, 0, chunk.tokens);
      bounded("checked", chunk.is_checked, 0, 1);
      rows += chunk.tokens;
      outputs += chunk.outputs;
      chunks_.push_back(chunk);
    }
    check_planned("tokens", rows, limits_.max_tokens);
    check_planned("output rows", outputs, limits_.max_outputs);
    add_rows(static_cast<size_t>(rows), static_cast<size_t>(outputs));
  }

  void add_rows(size_t rows, size_t outputs) {
    frame_.positions.reserve(rows);
    frame_.output_rows.reserve(outputs);
    frame_.sequence_starts.reserve(chunks_.size() + 1);
    int32_t row = 0;
    frame_.sequence_starts.push_back(0);
    for (size_t i = 0; i < chunks_.size(); i++) {
      const Chunk& chunk = chunks_[i];
      for (int32_t at = 0; at < chunk.tokens; at++) frame_.positions.push_back(chunk.position + at);
      row += chunk.tokens;
      for (int32_t at = row - chunk.outputs; at < row; at++) frame_.output_rows.push_back(at);
      frame_.sequence_starts.push_back(row);
      frame_.attended += static_cast<uint64_t>(chunk.tokens) * static_cast<uint64_t>(chunk.position + chunk.tokens);
      if (chunk.is_checked) frame_.checked_chunks.push_back(static_cast<int32_t>(i));
    }
  }

  void read_tokens(Records<int32_t> tokens) {
    if (tokens.size() != frame_.positions.size())
      throw ProtocolViolation(text(static_cast<int64_t>(tokens.size())) + " tokens for chunks of " +
                              text(static_cast<int64_t>(frame_.positions.size())));
    frame_.tokens = tokens.slice(0, tokens.size());
    for (const int32_t token : frame_.tokens) check_token(token, limits_.vocabulary);
  }

  static void check_token(int32_t token, int32_t vocabulary) {
    if (token < 0 || token >= vocabulary)
      throw ProtocolViolation("token " + text(token) + " is not in the vocabulary of " + text(vocabulary));
  }

  // Appends `count` runs of block numbers, each below `end`, starting with run `at`, which is advanced. A table may
  // have `most` blocks: without a limit, a frame could create arrays of any size.
  static void add_runs(const char* what, const Records<Run>& runs, size_t& at, int32_t count, int32_t end, int64_t most,
                       std::vector<int32_t>& to) {
    const size_t before = to.size();
    for (int32_t i = 0; i < count; i++) {
      const Run run = runs[at++];
      bounded("first block of a run", run.first, 0, std::numeric_limits<int32_t>::max());
      bounded("blocks of a run", run.count, 1, std::numeric_limits<int32_t>::max());
      const int64_t last = int64_t{run.first} + run.count - 1;
      if (last >= end) throw ProtocolViolation(std::string(what) + " block " + text(last) + " of " + text(end));
      const int64_t length = static_cast<int64_t>(to.size() - before) + run.count;
      if (length > most)
        throw ProtocolViolation("block table of " + text(length) + " blocks or more, at most " + text(most));
      for (int64_t id = run.first; id <= last; id++) to.push_back(static_cast<int32_t>(id));
    }
  }

  template <typename T>
  static void check_all_used(const char* what, const Records<T>& records, size_t used) {
    if (records.size() != used)
      throw ProtocolViolation(text(static_cast<int64_t>(records.size())) + " " + what + ", chunks have " +
                              text(static_cast<int64_t>(used)));
  }

  void read_tables(Records<Run> runs) {
    const int64_t most = blocks_of(limits_.max_context);
    size_t at = 0;
    frame_.table_starts.push_back(0);
    for (const Chunk& chunk : chunks_) {
      bounded<int64_t>("runs of a table", chunk.runs, 1, static_cast<int64_t>(runs.size() - at));
      const size_t before = frame_.block_tables.size();
      add_runs("KV", runs, at, chunk.runs, limits_.kv_blocks, most, frame_.block_tables);
      const int64_t length = static_cast<int64_t>(frame_.block_tables.size() - before);
      const int64_t context = int64_t{chunk.position} + chunk.tokens;
      if (length * kBlockTokens < context)
        throw ProtocolViolation("block table of " + text(length) + " blocks for " + text(context) +
                                " positions, at most " + text(most));
      frame_.table_starts.push_back(static_cast<int32_t>(frame_.block_tables.size()));
    }
    check_all_used("runs of tables", runs, at);
  }

  // Returns the index of a chunk in a section whose records are in ascending order.
  size_t chunk_of(const char* what, int64_t chunk, int64_t least) const {
    return static_cast<size_t>(bounded<int64_t>(what, chunk, least, static_cast<int64_t>(chunks_.size()) - 1));
  }

  void read_followed(Records<Followed> followed) {
    int64_t least = 0;
    for (size_t i = 0; i < followed.size(); i++) {
      const Followed each = followed[i];
      const size_t chunk = chunk_of("chunk that follows a row", static_cast<int64_t>(each.chunk), least);
      least = static_cast<int64_t>(chunk) + 1;
      const auto row = static_cast<size_t>(frame_.sequence_starts[chunk]);
      if (chunks_[chunk].tokens != 1 || frame_.tokens[row] != 0)
        throw ProtocolViolation("a chunk that depends on a row has tokens of its own");
      if (each.number >= frame_.number)
        throw ProtocolViolation("microbatch " + std::to_string(frame_.number) + " depends on microbatch " +
                                std::to_string(each.number));
      bounded<uint64_t>("row depended on", each.row, 0, static_cast<uint64_t>(limits_.max_rows) - 1);
      frame_.dependencies.push_back({each.number, static_cast<uint32_t>(each.row), row});
    }
  }

  void read_windows(Records<Window> windows, Records<Run> runs) {
    if (windows.size() != 0) check_all_used("windows", windows, chunks_.size());
    const int64_t most = blocks_of(limits_.max_context);
    if (limits_.window) frame_.window_tables.assign(frame_.block_tables.size(), -1);
    size_t at = 0;
    for (size_t i = 0; i < chunks_.size(); i++) {
      const Window window = windows.size() ? windows[i] : Window{0, 0};
      bounded<int64_t>("window_start", window.start, 0, most);
      bounded<int64_t>("runs of a window", window.runs, 0, static_cast<int64_t>(runs.size() - at));
      std::vector<int32_t> blocks;
      const int32_t end = limits_.window ? limits_.window_blocks : limits_.max_kv_blocks;
      add_runs("window", runs, at, window.runs, end, most, blocks);
      if (limits_.window) add_window(chunks_[i], window, blocks, static_cast<size_t>(frame_.table_starts[i]));
    }
    check_all_used("runs of windows", runs, at);
  }

  // Checks that the table has all blocks that the chunk's rows read or write, and copies it.
  void add_window(const Chunk& chunk, const Window& window, const std::vector<int32_t>& blocks, size_t table_start) {
    const int64_t last = blocks_of(int64_t{chunk.position} + chunk.tokens);
    const int64_t first = std::max<int64_t>(0, int64_t{chunk.position} - limits_.window + 1) / kBlockTokens;
    const int64_t end = window.start + static_cast<int64_t>(blocks.size());
    if (window.start > first || end != last)
      throw ProtocolViolation("window table of blocks [" + text(window.start) + ", " + text(end) + "), of " +
                              text(limits_.window) + " positions to see needs [" + text(first) + ", " + text(last) + ")");
    std::copy(blocks.begin(), blocks.end(),
              frame_.window_tables.begin() + static_cast<std::ptrdiff_t>(table_start + static_cast<size_t>(window.start)));
  }

  void read_embedded(Records<Embedded> embedded) {
    int64_t least = 0;
    for (size_t i = 0; i < embedded.size(); i++) {
      const Embedded each = embedded[i];
      const size_t chunk = chunk_of("chunk with embedded rows", each.chunk, least);
      least = static_cast<int64_t>(chunk) + 1;
      bounded("end of embedded rows", each.end, 0, chunks_[chunk].tokens);
      bounded("first embedded row", each.first, 0, each.end);
      for (int32_t row = each.first; row < each.end; row++)
        frame_.embedded_rows.push_back(frame_.sequence_starts[chunk] + row);
    }
  }

  void read_adapters(Records<Adapter> adapters) {
    const auto count = static_cast<size_t>(limits_.adapters);
    if (adapters.size() > 0) frame_.adapter_scales.assign(frame_.positions.size() * count, 0.0f);
    int64_t least = 0, least_number = 0;
    for (size_t i = 0; i < adapters.size(); i++) {
      const Adapter each = adapters[i];
      const size_t chunk = chunk_of("chunk with an adapter", each.chunk, least);
      if (static_cast<int64_t>(chunk) > least) least_number = 0;
      least = static_cast<int64_t>(chunk);
      if (each.number >= limits_.adapters)
        throw ProtocolViolation("a sequence with adapter " + text(each.number) + ", the model has " +
                                text(limits_.adapters));
      bounded<int64_t>("adapter", each.number, least_number, limits_.adapters - 1);
      least_number = int64_t{each.number} + 1;
      if (!(std::abs(each.scale) <= limits_.max_scale))
        throw ProtocolViolation("scale is " + std::to_string(each.scale) + ", must be a finite number within " +
                                std::to_string(-limits_.max_scale) + ".." + std::to_string(limits_.max_scale));
      for (int32_t row = frame_.sequence_starts[chunk]; row < frame_.sequence_starts[chunk + 1]; row++)
        frame_.adapter_scales[static_cast<size_t>(row) * count + static_cast<size_t>(each.number)] = each.scale;
    }
  }

  void read_states(Records<int32_t> before, Records<State> states) {
    if (limits_.state_blocks == 0) return;
    if (before.size() == 0) throw no_state(chunks_[0]);
    check_all_used("states before", before, chunks_.size());
    frame_.states_before = before.slice(0, before.size());
    size_t at = 0;
    for (size_t i = 0; i < chunks_.size(); i++) {
      const Chunk& chunk = chunks_[i];
      frame_.state_starts.push_back(static_cast<int32_t>(at));
      int32_t rows = 0;
      while (at < states.size() && states[at].chunk == static_cast<int32_t>(i)) {
        const State state = states[at++];
        rows = bounded("rows before a state", state.tokens, rows + 1, chunk.tokens);
        check_state(state.block);
        frame_.state_rows.push_back(frame_.sequence_starts[i] + rows - 1);
        frame_.state_blocks.push_back(state.block);
      }
      if (rows != chunk.tokens) throw no_state(chunk);
      const int32_t first = frame_.states_before[i];
      if ((first == -1) != (chunk.position == 0))
        throw ProtocolViolation("a chunk from position " + text(chunk.position) + " on reads state block " +
                                (first == -1 ? "None" : text(first)));
      if (first != -1) check_state(first);
    }
    frame_.state_starts.push_back(static_cast<int32_t>(at));
    check_all_used("states", states, at);
    check_sharing();
  }

  static ProtocolViolation no_state(const Chunk& chunk) {
    return ProtocolViolation("a chunk of " + text(chunk.tokens) + " tokens has no block for the state after them");
  }

  void check_state(int32_t block) const {
    if (block < 0 || block >= limits_.state_blocks)
      throw ProtocolViolation("state block " + text(block) + " of " + text(limits_.state_blocks));
  }

  // Throws if a state block that one sequence writes is read or written by another one.
  void check_sharing() const {
    std::vector<std::pair<int32_t, size_t>> writers;  // block and chunk
    for (size_t i = 0; i < chunks_.size(); i++)
      for (int32_t at = frame_.state_starts[i]; at < frame_.state_starts[i + 1]; at++)
        writers.emplace_back(frame_.state_blocks[static_cast<size_t>(at)], i);
    std::sort(writers.begin(), writers.end());
    const std::string of = " of " + text(static_cast<int64_t>(chunks_.size()));
    for (size_t i = 1; i < writers.size(); i++)
      if (writers[i].first == writers[i - 1].first)
        throw ProtocolViolation("state block " + text(writers[i].first) + " is written twice, by chunks " +
                                text(static_cast<int64_t>(writers[i - 1].second)) + " and " +
                                text(static_cast<int64_t>(writers[i].second)) + of);
    for (size_t i = 0; i < chunks_.size(); i++) {
      const int32_t block = frame_.states_before[i];
      const auto found = std::lower_bound(writers.begin(), writers.end(), std::pair(block, size_t{0}));
      if (block >= 0 && found != writers.end() && found->first == block && found->second != i)
        throw ProtocolViolation("state block " + text(block) + " is written by chunk " +
                                text(static_cast<int64_t>(found->second)) + " and read by chunk " +
                                text(static_cast<int64_t>(i)) + of);
    }
  }

  void read_drafts(Records<DraftOrder> orders) {
    int64_t least = 0;
    for (size_t i = 0; i < orders.size(); i++) {
      const DraftOrder each = orders[i];
      least = static_cast<int64_t>(chunk_of("chunk with drafts", each.chunk, least)) + 1;
      if (each.next_token != -1) check_token(each.next_token, limits_.vocabulary);
      bounded("drafts", each.drafts, 0, limits_.max_drafts);
      frame_.draft_orders.push_back(each);
    }
  }

  const FrameLimits& limits_;
  MicrobatchFrame& frame_;
  std::vector<Chunk> chunks_;
};

}  // namespace

void read_microbatch(Bytes header, const FrameLimits& limits, MicrobatchFrame& frame) {
  Reading(limits, frame).microbatch(header);
}

}  // namespace llamaclust
