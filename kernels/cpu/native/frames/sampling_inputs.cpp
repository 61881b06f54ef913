#include "frames/sampling_inputs.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

namespace llamaclust {
namespace {

constexpr uint32_t kSecondDraw = 1u << 31;  // Added to a choice's index, which is always far smaller.

// Records of proto/sampling.proto.
struct TaskRecord {
  int32_t params, token;  // If params is -1, the token is scored.
  uint64_t seed;
  uint32_t choice, position, top_logprobs, history_rows;
  int32_t penalty_window, dry_window;  // -1 for all tokens.
  uint32_t history, history_tokens, suppressed, suppressed_tokens;
};
struct ChainedRecord {
  double mu;
  uint32_t row, first_breaker, breakers, zero;
};
struct MatcherRecord {
  uint64_t row, key, position;
};
struct Span {
  uint32_t first, count;
};
static_assert(sizeof(TaskRecord) == 56 && sizeof(ChainedRecord) == 24);

double within(const char* what, double value, const Range& range) {
  if (value >= range.first && value <= range.second) return value;
  throw ProtocolViolation(std::string(what) + " is " + std::to_string(value) + ", must be a finite number within " +
                          std::to_string(range.first) + ".." + std::to_string(range.second));
}

uint32_t whole(const char* what, uint32_t value, const Range& range) {
  return static_cast<uint32_t>(bounded<int64_t>(what, value, static_cast<int64_t>(range.first), static_cast<int64_t>(range.second)));
}

class Reading {
 public:
  Reading(const InputsBounds& bounds, SamplingTasks& tasks) : bounds_(bounds), tasks_(tasks) {}

  void inputs(Bytes data) {
    Bytes sections[kSections];
    Fields fields("SamplingInputs", data, 3);
    while (const uint32_t field = fields.next()) {
      if (field == 1)
        tasks_.epoch = fields.number64();
      else if (field == 2)
        tasks_.number = fields.number64();
      else if (field == 3)
        params_.push_back(params(fields.bytes()));
      else if (field < kSections)
        sections[field] = fields.bytes();
      else
        fields.fail();
    }
    read_tasks({"tasks", sections[4]}, {"tokens of tasks", sections[5]});
    read_chained({"rows with a chain", sections[6]}, {"breakers", sections[7]}, {"tokens of tasks", sections[5]});
    read_matcher_rows({"rows with a matcher", sections[8]});
    const Records<uint64_t> released("released", sections[9]);
    tasks_.released = released.slice(0, bounded<size_t>("released", released.size(), 0, bounds_.max_released));
    tasks_.starts.assign(sections[10].begin(), sections[10].end());
  }

 private:
  static constexpr uint32_t kSections = 11;

  void read_tasks(Records<TaskRecord> records, Records<int32_t> tokens) {
    bounded<size_t>("tasks", records.size(), 0, bounds_.max_rows);
    tasks_.rows.reserve(records.size());
    for (size_t i = 0; i < records.size(); i++) {
      const TaskRecord record = records[i];
      bounded("top_logprobs", record.top_logprobs, 0u, bounds_.max_top_logprobs);
      const auto top = static_cast<int32_t>(record.top_logprobs);
      if (record.params == -1)
        tasks_.rows.push_back({true, checked(record.token), {}, top});
      else
        tasks_.rows.push_back({false, -1, choice(record, i, tokens), top});
    }
  }

  Choice choice(const TaskRecord& record, size_t row, const Records<int32_t>& tokens) {
    bounded<int64_t>("parameters", record.params, 0, static_cast<int64_t>(params_.size()) - 1);
    bounded("position", record.position, 0u, bounds_.max_context);
    bounded("history", record.history_tokens, 0u, bounds_.max_context);
    bounded("suppressed", record.suppressed_tokens, 0u, bounds_.max_vocabulary);
    bounded("history_rows", record.history_rows, 0u, bounds_.max_rows);
    for (const int32_t window : {record.penalty_window, record.dry_window})
      bounded<int64_t>("window", window, -1, bounds_.max_context);
    Choice choice = params_[static_cast<size_t>(record.params)];
    look_at(uint64_t{record.history_tokens} + record.suppressed_tokens + choice.logit_bias.size());
    choice.seed = record.seed;
    choice.choice = record.choice;
    choice.position = record.position;
    choice.history = all_checked(tokens.slice(record.history, record.history_tokens));
    choice.suppressed = all_checked(tokens.slice(record.suppressed, record.suppressed_tokens));
    if (choice.chain) {
      auto chain = copied(*choice.chain);
      chain->penalty_window = record.penalty_window;
      chain->dry_window = record.dry_window;
      choice.chain = chain;
    }
    if (record.history_rows > 0) {
      const int32_t window = std::max({record.penalty_window, record.dry_window, 0});
      tasks_.histories.push_back({row, record.history_rows, static_cast<uint32_t>(window)});
    }
    return choice;
  }

  std::shared_ptr<Chain> copied(const Chain& chain) {
    look_at(chain.unpenalized.size());
    return std::make_shared<Chain>(chain);
  }

  // Limits the total number of tokens of a message's rows, because each row gets its own copy.
  void look_at(uint64_t tokens) {
    looked_at_ = bounded<uint64_t>("tokens that rows look at", looked_at_ + tokens, 0, bounds_.max_tokens);
  }

  void read_chained(Records<ChainedRecord> records, Records<Span> breakers, Records<int32_t> tokens) {
    for (size_t i = 0; i < records.size(); i++) {
      const ChainedRecord record = records[i];
      bounded<int64_t>("row with a chain", record.row, 0, static_cast<int64_t>(tasks_.rows.size()) - 1);
      within("mu", record.mu, {-bounds_.max_mu, bounds_.max_mu});
      bounded("breakers", record.breakers, 0u, bounds_.max_breakers);
      Breakers found;
      for (const Span& span : breakers.slice(record.first_breaker, record.breakers)) {
        bounded("tokens of a breaker", span.count, 1u, bounds_.max_breaker_tokens);
        look_at(span.count);
        found.push_back(all_checked(tokens.slice(span.first, span.count)));
      }
      Choice& choice = tasks_.rows[record.row].choice;
      if (!choice.chain) continue;
      auto chain = copied(*choice.chain);
      chain->mu = record.mu;
      chain->breakers = std::move(found);
      choice.chain = chain;
    }
  }

  void read_matcher_rows(Records<MatcherRecord> records) {
    bounded<size_t>("rows with a matcher", records.size(), 0, tasks_.rows.size());
    for (size_t i = 0; i < records.size(); i++) {
      const MatcherRecord record = records[i];
      const uint64_t least = i == 0 ? 0 : tasks_.matcher_rows.back().row + 1;
      bounded("row with a matcher", record.row, least, static_cast<uint64_t>(tasks_.rows.size()) - 1);
      bounded<uint64_t>("position in an answer", record.position, 0, bounds_.max_context);
      if (tasks_.rows[record.row].scored) throw ProtocolViolation("a scored row with a matcher");
      tasks_.matcher_rows.push_back({record.row, record.key, record.position});
    }
  }

  Choice params(Bytes message) const {
    static constexpr const char* kNames[] = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty",
                                             "presence_penalty"};
    static constexpr uint32_t kTopK = 2, kNumbers = 7;
    double numbers[kNumbers] = {};
    Bytes bias_tokens, biases;
    Choice choice{};
    Fields fields("SamplingParams", message);
    while (const uint32_t field = fields.next()) {
      if (field == kTopK)
        numbers[field - 1] = whole("top_k", fields.number32(), bounds_.params[1]);
      else if (field <= kNumbers)
        numbers[field - 1] = fields.real();
      else if (field == 8)
        bias_tokens = fields.bytes();
      else if (field == 9)
        biases = fields.bytes();
      else if (field == 10)
        choice.chain = chain(fields.bytes());
      else
        fields.fail();
    }
    for (uint32_t i = 0; i < kNumbers; i++) within(kNames[i], numbers[i], bounds_.params[i]);
    choice.temperature = static_cast<float>(numbers[0]);
    choice.top_k = static_cast<int32_t>(numbers[1]);
    choice.top_p = numbers[2];
    choice.min_p = numbers[3];
    choice.repetition_penalty = static_cast<float>(numbers[4]);
    choice.frequency_penalty = static_cast<float>(numbers[5]);
    choice.presence_penalty = static_cast<float>(numbers[6]);
    const Records<int32_t> tokens("logit biases", bias_tokens);
    const Records<float> added("logit biases", biases);
    bounded<size_t>("logit biases", tokens.size(), 0, bounds_.max_vocabulary);
    bounded<size_t>("numbers of logit biases", added.size(), tokens.size(), tokens.size());
    for (size_t i = 0; i < tokens.size(); i++) {
      within("logit_bias", added[i], {-bounds_.max_bias, bounds_.max_bias});
      choice.logit_bias.emplace_back(checked(tokens[i]), added[i]);
    }
    return choice;
  }

  std::shared_ptr<const Chain> chain(Bytes message) const {
    auto chain = std::make_shared<Chain>();
    chain->penalty_window = chain->dry_window = -1;
    Fields fields("SamplerChain", message);
    uint32_t field = fields.next(), number = 2;
    if (field == 1) {
      chain->order = steps(Records<int32_t>("steps", fields.bytes()));
      field = fields.next();
    }
    // The fields of the sampling table are numbered from 2 in its order. A missing field is 0.
    const auto read = [&]<typename T>(const char* name, T& to) {
      const Range& range = bounds_.chain[number - 2];
      T value = 0;
      if (field == number) {
        if constexpr (std::is_same_v<T, double>)
          value = fields.real();
        else
          value = static_cast<T>(std::min<uint32_t>(fields.number32(), std::numeric_limits<int32_t>::max()));
        field = fields.next();
      }
      to = static_cast<T>(within(name, static_cast<double>(value), range));
      number++;
    };
#define LLAMACLUST_READ(kind, name) read(#name, chain->name);
    LLAMACLUST_CHAIN_NUMBERS(LLAMACLUST_READ)
#undef LLAMACLUST_READ
    if (field == number) {
      const Records<int32_t> tokens("unpenalized", fields.bytes());
      chain->unpenalized = all_checked(tokens.slice(0, bounded<size_t>("unpenalized", tokens.size(), 0, bounds_.max_vocabulary)));
      field = fields.next();
    }
    if (field != 0) fields.fail();
    return chain;
  }

  static std::vector<int32_t> steps(const Records<int32_t>& records) {
    constexpr int32_t kSteps = static_cast<int32_t>(Step::kCount);
    const std::vector<int32_t> steps = records.slice(0, bounded<size_t>("steps", records.size(), 0, kSteps));
    for (const int32_t step : steps) bounded("step", step, 0, kSteps - 1);
    if (std::set<int32_t>(steps.begin(), steps.end()).size() < steps.size())
      throw ProtocolViolation("a sampler occurs twice in one order");
    return steps;
  }

  int32_t checked(int32_t token) const {
    return bounded<int32_t>("token", token, 0, static_cast<int32_t>(bounds_.max_vocabulary) - 1);
  }

  std::vector<int32_t> all_checked(std::vector<int32_t> tokens) const {
    for (const int32_t token : tokens) checked(token);
    return tokens;
  }

  const InputsBounds& bounds_;
  SamplingTasks& tasks_;
  std::vector<Choice> params_;
  uint64_t looked_at_ = 0;
};

}  // namespace

SamplingTasks read_inputs(Bytes data, const InputsBounds& bounds) {
  if (data.size() > bounds.max_bytes)
    throw ProtocolViolation("SamplingInputs: " + std::to_string(data.size()) + " bytes, at most " +
                            std::to_string(bounds.max_bytes) + " are taken");
  SamplingTasks tasks;
  Reading(bounds, tasks).inputs(data);
  return tasks;
}

void SamplingTasks::complete(const MicrobatchFrame& frame) {
  if (rows.size() != frame.output_rows.size())
    throw ProtocolViolation(std::to_string(rows.size()) + " tasks for " + std::to_string(frame.output_rows.size()) +
                            " output rows");
  const auto start_of = [&](int32_t row) {  // The first row of the row's chunk.
    return *std::prev(std::upper_bound(frame.sequence_starts.begin(), frame.sequence_starts.end(), row));
  };
  for (const GrowingHistory& history : histories) {
    const int32_t row = frame.output_rows[history.row], place = row - start_of(row) + 1;
    if (history.tokens > static_cast<uint32_t>(place))
      throw ProtocolViolation("a history that goes on with " + std::to_string(history.tokens) +
                              " tokens of a chunk, at its row " + std::to_string(place));
    const auto end = frame.tokens.begin() + row + 1;
    std::vector<int32_t>& known = rows[history.row].choice.history;
    known.insert(known.end(), end - history.tokens, end);
    if (history.window > 0 && known.size() > history.window) known.erase(known.begin(), known.end() - history.window);
  }
  histories.clear();
  for (MatcherRow& each : matcher_rows) {
    size_t behind = each.row;  // Index of the previous sampled row, plus one.
    while (behind > 0 && rows[behind - 1].scored) behind--;
    const int32_t row = frame.output_rows[each.row];
    if (behind > 0 && frame.output_rows[behind - 1] >= start_of(row)) each.drafted = frame.tokens[static_cast<size_t>(row)];
  }
}

SamplingTasks SamplingTasks::second_draws(const std::vector<size_t>& places,
                                          std::vector<std::vector<uint32_t>> allowed) const {
  SamplingTasks again{epoch, number, {}, {}, {}, {}, {}};
  for (size_t i = 0; i < places.size(); i++) {
    again.rows.push_back(rows.at(places[i]));
    again.rows.back().choice.choice += kSecondDraw;
    again.rows.back().choice.allowed = std::move(allowed.at(i));
  }
  return again;
}

SamplingTasks SamplingTasks::drafts(const std::vector<size_t>& places, uint32_t later) const {
  SamplingTasks drafts{epoch, number, {}, {}, {}, {}, {}};
  for (const size_t place : places) {
    RowTask task = rows.at(place);
    task.top_logprobs = 0;
    Choice& choice = task.choice;
    choice.repetition_penalty = 1;
    choice.frequency_penalty = choice.presence_penalty = 0;
    choice.chain.reset();
    choice.history.clear();
    choice.position += later;
    drafts.rows.push_back(std::move(task));
  }
  return drafts;
}

}  // namespace llamaclust
