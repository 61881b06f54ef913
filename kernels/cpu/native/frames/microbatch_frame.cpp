#include "frames/microbatch_frame.h"

#include <cstring>

#include "frames/microbatch.h"

namespace llamaclust {
namespace {

constexpr uint8_t kVersion = 2, kHidden = 1, kFailure = 2;

struct Prefix {
  char magic[4];
  uint8_t version, kind;
  uint16_t stages;
  uint32_t header_bytes, body_bytes;
};
static_assert(sizeof(Prefix) == 16 && sizeof(Timing) == 32);

std::string text(int64_t number) { return std::to_string(number); }

Prefix read_prefix(Bytes data, const FrameLimits& limits) {
  Prefix prefix;
  if (data.size() < sizeof prefix)
    throw ProtocolViolation("frame of " + std::to_string(data.size()) + " bytes, shorter than its prefix");
  std::memcpy(&prefix, data.data(), sizeof prefix);
  if (std::memcmp(prefix.magic, "LCST", 4) != 0) throw ProtocolViolation("frame does not begin with 'LCST'");
  if (prefix.version != kVersion)
    throw ProtocolViolation("frame version " + text(prefix.version) + ", this worker speaks " + text(kVersion));
  if (prefix.kind != kHidden && prefix.kind != kFailure)
    throw ProtocolViolation("frame kind " + text(prefix.kind) + " is not known");
  bounded<int64_t>("stages", prefix.stages, 0, limits.max_stages);
  bounded<size_t>("header bytes", prefix.header_bytes, 1, limits.max_header_bytes);
  if (prefix.kind == kFailure) bounded<size_t>("length of failure", prefix.body_bytes, 1, limits.max_failure_bytes);
  return prefix;
}

}  // namespace

MicrobatchFrame read_frame(Bytes data, const FrameLimits& limits) {
  const Prefix prefix = read_prefix(data, limits);
  MicrobatchFrame frame;
  frame.body_at = sizeof prefix + prefix.stages * sizeof(Timing);
  frame.header_at = frame.body_at + prefix.body_bytes;
  if (data.size() != frame.header_at + prefix.header_bytes)
    throw ProtocolViolation("frame of " + std::to_string(data.size()) + " bytes, its prefix says " +
                            std::to_string(frame.header_at + prefix.header_bytes));
  frame.timings = Records<Timing>("timings", data.subspan(sizeof prefix, frame.body_at - sizeof prefix)).slice(0, prefix.stages);
  for (const Timing& timing : frame.timings)
    bounded<uint64_t>("rows of a timing", timing.rows, 1, static_cast<uint64_t>(limits.max_rows));
  read_microbatch(data.subspan(frame.header_at), limits, frame);
  if (prefix.kind == kFailure)
    frame.failure.emplace(reinterpret_cast<const char*>(data.data()) + frame.body_at, prefix.body_bytes);
  else if (prefix.body_bytes != frame.positions.size() * limits.hidden_width * sizeof(float))
    throw ProtocolViolation("hidden state of " + std::to_string(prefix.body_bytes) + " bytes, " +
                            std::to_string(frame.positions.size()) + " x " + std::to_string(limits.hidden_width) +
                            " float32 expected");
  return frame;
}

bool fill_tokens(MicrobatchFrame& frame, uint64_t number, const std::vector<int32_t>& tokens, int32_t vocabulary) {
  for (const Dependency& dependency : frame.dependencies) {
    if (dependency.number != number) continue;
    if (dependency.output_row >= tokens.size()) return false;
    const int32_t token = tokens[dependency.output_row];
    if (token < 0 || token >= vocabulary)
      throw ProtocolViolation("token " + text(token) + " is not in the vocabulary of " + text(vocabulary));
    frame.tokens[dependency.row] = token;
  }
  return true;
}

std::pair<uint64_t, std::vector<int32_t>> read_sampled_tokens(Bytes data, size_t max_rows, int32_t max_vocabulary) {
  uint64_t number = 0;
  std::vector<int32_t> tokens;
  Fields fields("SampledTokens", data);
  while (const uint32_t field = fields.next()) {
    if (field == 1) {
      number = fields.number64();
    } else if (field == 2) {
      const Records<int32_t> records("sampled tokens", fields.bytes());
      tokens = records.slice(0, bounded<size_t>("sampled tokens", records.size(), 0, max_rows));
      for (const int32_t token : tokens) bounded("token", token, 0, max_vocabulary - 1);
    } else {
      fields.fail();
    }
  }
  return {number, std::move(tokens)};
}

size_t FollowingFrame::bytes() const {
  return frame.body_at + (timing ? sizeof(Timing) : 0) + body.size() + (data.size() - frame.header_at);
}

void FollowingFrame::write(uint8_t* out) const {
  Prefix prefix;
  std::memcpy(&prefix, data.data(), sizeof prefix);
  prefix.kind = timing ? kHidden : kFailure;
  if (timing) prefix.stages++;
  prefix.body_bytes = static_cast<uint32_t>(body.size());
  const auto add = [&](const void* bytes, size_t size) {
    if (size > 0) std::memcpy(out, bytes, size);
    out += size;
  };
  add(&prefix, sizeof prefix);
  add(data.data() + sizeof prefix, frame.body_at - sizeof prefix);
  if (timing) add(&*timing, sizeof *timing);
  add(body.data(), body.size());
  add(data.data() + frame.header_at, data.size() - frame.header_at);
}

}  // namespace llamaclust
