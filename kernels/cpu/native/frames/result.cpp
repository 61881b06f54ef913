#include "frames/result.h"

#include <algorithm>
#include <cmath>

namespace llamaclust {
namespace {

// Writes fields of a message as protobuf does: in ascending order, without fields that are 0 or empty.
class Message {
 public:
  void number(uint32_t field, uint64_t value) {
    if (value == 0) return;
    varint(field << 3);
    varint(value);
  }

  void bytes(uint32_t field, Bytes value) {
    if (value.empty()) return;
    varint(field << 3 | 2);
    varint(value.size());
    text_.append(reinterpret_cast<const char*>(value.data()), value.size());
  }

  void bytes(uint32_t field, const std::string& value) {
    bytes(field, Bytes(reinterpret_cast<const uint8_t*>(value.data()), value.size()));
  }

  template <typename T>
  void records(uint32_t field, const std::vector<T>& records) {
    bytes(field, Bytes(reinterpret_cast<const uint8_t*>(records.data()), records.size() * sizeof(T)));
  }

  std::string text() && { return std::move(text_); }

 private:
  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) text_ += static_cast<char>(value | 0x80);
    text_ += static_cast<char>(value);
  }

  std::string text_;
};

struct Following {
  int32_t row, forced, forced_draft, drafted;
};
struct MatcherTime {
  uint64_t row, ns;
};
static_assert(sizeof(TokenValue) == 8, "a token and its logprob, as they lie in a result");

int32_t size_of(const auto& values) { return static_cast<int32_t>(values.size()); }

// The fields of Result that are arrays of records. Most have at most one record per row.
struct Columns {
  explicit Columns(const std::vector<RowAnswer>& rows) {
    for (size_t i = 0; i < rows.size(); i++) add(static_cast<int32_t>(i), rows[i]);
    if (top_logprobs.empty()) top_counts.clear();
    if (std::all_of(mus.begin(), mus.end(), [](double mu) { return std::isnan(mu); })) mus.clear();
  }

  void add(int32_t place, const RowAnswer& row) {
    const bool is_answered = row.failure.empty() && !row.is_deferred;
    tokens.push_back(is_answered ? row.token : -1);
    logprobs.push_back(is_answered ? row.logprob : 0);
    top_counts.push_back(is_answered ? size_of(row.top_logprobs) : 0);
    mus.push_back(is_answered ? row.mu : std::numeric_limits<double>::quiet_NaN());
    if (row.is_deferred) deferred.push_back(place);
    if (!row.failure.empty()) failed.push_back(place);
    if (!is_answered) return;
    top_logprobs.insert(top_logprobs.end(), row.top_logprobs.begin(), row.top_logprobs.end());
    if (row.matcher_ns > 0) times.push_back({static_cast<uint64_t>(place), row.matcher_ns});
    const Following counts{place, size_of(row.forced), size_of(row.forced_draft), size_of(row.drafted)};
    if (counts.forced + counts.forced_draft + counts.drafted == 0) return;
    following.push_back(counts);
    for (const auto* more : {&row.forced, &row.forced_draft, &row.drafted})
      following_tokens.insert(following_tokens.end(), more->begin(), more->end());
  }

  std::vector<int32_t> tokens, top_counts, following_tokens, deferred, failed;
  std::vector<float> logprobs;
  std::vector<TokenValue> top_logprobs;
  std::vector<double> mus;
  std::vector<Following> following;
  std::vector<MatcherTime> times;
};

std::string failure_of(int32_t place, const RowAnswer& row) {
  Message failure;
  failure.number(1, static_cast<uint64_t>(place));
  failure.bytes(2, row.failure);
  failure.number(3, row.is_request_fault);
  return std::move(failure).text();
}

}  // namespace

std::string StageResult::bytes() const {
  const Columns columns(rows);
  std::vector<Timing> timings = frame.timings;
  if (timing) timings.push_back(*timing);
  Message result;
  result.number(1, frame.epoch);
  result.number(2, frame.number);
  result.records(3, columns.tokens);
  result.records(4, columns.logprobs);
  result.records(5, timings);
  result.bytes(6, failure);
  result.bytes(7, embeddings);
  result.number(8, drafting_ns);
  result.records(9, columns.top_counts);
  result.records(10, columns.top_logprobs);
  result.records(11, columns.mus);
  result.records(12, columns.following);
  result.records(13, columns.following_tokens);
  result.records(14, columns.times);
  for (const int32_t place : columns.failed) {
    const std::string failed = failure_of(place, rows[static_cast<size_t>(place)]);
    result.bytes(15, failed);
  }
  result.records(16, columns.deferred);
  return std::move(result).text();
}

}  // namespace llamaclust
