#include "frames/sampling_inputs.h"

#include <algorithm>
#include <iterator>

namespace llamaclust {
namespace {

// Fields of SamplingParams: all reals but the second.
constexpr uint32_t kTopK = 2, kLastParam = 7;

class Reading {
 public:
  Reading(const InputsBounds& bounds, SamplingTasks& tasks) : bounds_(bounds), tasks_(tasks), rows_(tasks.rows) {}

  bool task(Bytes message) {
    Fields fields(message);
    const uint32_t kind = fields.next();
    if (kind != 1 && kind != 2) return false;
    const Bytes task = fields.bytes();
    return fields.next() == 0 && fields.is_whole() && (kind == 1 ? sampled(task) : scored(task));
  }

 private:
  bool scored(Bytes message) {
    Fields fields(message);
    uint32_t token = 0, top = 0;
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        token = fields.number32();
      else if (field == 2)
        top = fields.number32();
      else
        fields.fail();
    }
    if (!fields.is_whole() || token >= bounds_.max_vocabulary || top > bounds_.max_top_logprobs) return false;
    if (rows_.size() >= bounds_.max_rows) return false;
    rows_.push_back({true, static_cast<int32_t>(token), {}, static_cast<int32_t>(top)});
    return true;
  }

  bool sampled(Bytes message) {
    Fields fields(message);
    RowTask row{false, -1, {}, 0};
    Choice& choice = row.choice;
    uint32_t top = 0, further = 0, history_rows = 0, window = 0;
    bool has_params = false;
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        has_params = params(fields.bytes(), choice);
      else if (field == 2)
        choice.seed = fields.number64();
      else if (field == 3)
        choice.choice = fields.number32();
      else if (field == 4)
        choice.position = fields.number32();
      else if (field == 5)
        fields.words([&](uint32_t token) { add_token(fields, token, bounds_.max_context, choice.history); });
      else if (field == 6)
        fields.numbers([&](uint32_t token) { add_token(fields, token, bounds_.max_vocabulary, choice.suppressed); });
      else if (field == 7)
        top = fields.number32();
      else if (field == 8)
        history_rows = fields.number32();
      else if (field == 9)
        window = fields.number32();
      else if (field == 14)
        further = fields.number32();
      else
        fields.fail();
    }
    if (!fields.is_whole() || !has_params || top > bounds_.max_top_logprobs) return false;
    if (history_rows > bounds_.max_rows || window > bounds_.max_context) return false;
    row.top_logprobs = static_cast<int32_t>(top);
    return add(row, further, {0, history_rows, window});
  }

  void add_token(Fields& fields, uint32_t token, size_t most, std::vector<int32_t>& to) const {
    if (token >= bounds_.max_vocabulary || to.size() >= most)
      fields.fail();
    else
      to.push_back(static_cast<int32_t>(token));
  }

  bool add(RowTask& row, uint32_t further, GrowingHistory history) {
    if (uint64_t{row.choice.position} + further > bounds_.max_context) return false;
    if (rows_.size() + 1 + further > bounds_.max_rows) return false;
    tokens_ += (uint64_t{1} + further) * (row.choice.history.size() + row.choice.suppressed.size());
    if (tokens_ > bounds_.max_tokens) return false;
    for (uint32_t i = 0; i <= further; i++) {
      if (history.tokens > 0) tasks_.histories.push_back({rows_.size(), history.tokens + i, history.window});
      rows_.push_back(row);
      row.choice.position++;
    }
    return true;
  }

  bool params(Bytes message, Choice& choice) const {
    Fields fields(message);
    std::array<double, 6> reals{};
    uint32_t top_k = 0;
    while (const uint32_t field = fields.next()) {
      if (field == kTopK)
        top_k = fields.number32();
      else if (field <= kLastParam)
        reals[field < kTopK ? 0 : field - 2] = fields.real();
      else
        fields.fail();
    }
    for (size_t i = 0; i < reals.size(); i++)
      if (!(reals[i] >= bounds_.reals[i].first && reals[i] <= bounds_.reals[i].second)) return false;
    choice.temperature = static_cast<float>(reals[0]);
    choice.top_k = static_cast<int32_t>(top_k);
    choice.top_p = reals[1];
    choice.min_p = reals[2];
    choice.repetition_penalty = static_cast<float>(reals[3]);
    choice.frequency_penalty = static_cast<float>(reals[4]);
    choice.presence_penalty = static_cast<float>(reals[5]);
    return fields.is_whole() && top_k <= bounds_.max_top_k;
  }

  const InputsBounds& bounds_;
  SamplingTasks& tasks_;
  std::vector<RowTask>& rows_;
  uint64_t tokens_ = 0;
};

}  // namespace

std::optional<SamplingTasks> read_inputs(Bytes data, const InputsBounds& bounds) {
  if (data.size() > bounds.max_bytes) return std::nullopt;
  SamplingTasks tasks;
  Reading reading(bounds, tasks);
  Fields fields(data, 3);
  while (const uint32_t field = fields.next()) {
    if (field == 1)
      tasks.epoch = fields.number64();
    else if (field == 2)
      tasks.number = fields.number64();
    else if (field != 3 || !reading.task(fields.bytes()))
      fields.fail();
  }
  return fields.is_whole() ? std::optional(std::move(tasks)) : std::nullopt;
}

bool complete_histories(SamplingTasks& tasks, const MicrobatchFrame& frame) {
  if (tasks.rows.size() != frame.output_rows.size()) return false;
  const auto place = [&](const GrowingHistory& history) {  // the row, and the first one of its chunk
    const int32_t row = frame.output_rows[history.row];
    const auto after = std::upper_bound(frame.sequence_starts.begin(), frame.sequence_starts.end(), row);
    return std::pair(row, *std::prev(after));
  };
  for (const GrowingHistory& history : tasks.histories) {
    const auto [row, start] = place(history);
    if (history.tokens > static_cast<uint32_t>(row - start + 1)) return false;
  }
  for (const GrowingHistory& history : tasks.histories) {
    const auto end = frame.tokens.begin() + place(history).first + 1;
    std::vector<int32_t>& known = tasks.rows[history.row].choice.history;
    known.insert(known.end(), end - history.tokens, end);
    if (history.window > 0 && known.size() > history.window) known.erase(known.begin(), known.end() - history.window);
  }
  tasks.histories.clear();
  return true;
}

}  // namespace llamaclust
