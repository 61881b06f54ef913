#include "frames/result.h"

#include <bit>
#include <cstring>

namespace llamaclust {
namespace {

// Fields of a message, as protobuf's writers give them: in ascending order, none for a 0.
class Message {
 public:
  void number(uint32_t field, uint64_t value) {
    if (value == 0) return;
    tag(field, 0);
    varint(value);
  }

  void real32(uint32_t field, float value) {
    if (std::bit_cast<uint32_t>(value) == 0) return;
    tag(field, 5);
    fixed32(value);
  }

  void bytes(uint32_t field, const std::string& value) {
    tag(field, 2);
    varint(value.size());
    text_ += value;
  }

  void varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) text_ += static_cast<char>(value | 0x80);
    text_ += static_cast<char>(value);
  }

  void fixed32(float value) {
    char raw[sizeof value];
    std::memcpy(raw, &value, sizeof value);
    text_.append(raw, sizeof value);
  }

  const std::string& text() const { return text_; }

 private:
  void tag(uint32_t field, uint32_t kind) { varint(field << 3 | kind); }

  std::string text_;
};

Message row_of(const RowOutcome& outcome) {
  Message row, chosen, tokens, logprobs;
  chosen.number(1, static_cast<uint32_t>(outcome.token));
  chosen.real32(2, outcome.logprob);
  row.bytes(1, chosen.text());
  for (const auto& [token, logprob] : outcome.top_logprobs) {
    tokens.varint(static_cast<uint32_t>(token));
    logprobs.fixed32(logprob);
  }
  if (!outcome.top_logprobs.empty()) {
    row.bytes(2, tokens.text());
    row.bytes(3, logprobs.text());
  }
  return row;
}

Message timing_of(const Timing& timing) {
  Message message;
  message.number(1, timing.queue_ns);
  message.number(2, timing.compute_ns);
  message.number(3, timing.wire_ns);
  message.number(4, timing.rows);
  return message;
}

}  // namespace

std::string write_result(const MicrobatchFrame& frame, const Timing& timing, const std::vector<RowOutcome>& rows) {
  Message result;
  result.number(1, frame.epoch);
  result.number(2, frame.number);
  for (const RowOutcome& row : rows) result.bytes(3, row_of(row).text());
  for (const Timing& before : frame.timings) result.bytes(4, timing_of(before).text());
  result.bytes(4, timing_of(timing).text());
  return result.text();
}

}  // namespace llamaclust
