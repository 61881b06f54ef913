#include "sampler/chain.h"

#include <algorithm>
#include <map>
#include <unordered_map>

namespace llamaclust {
namespace {

// The newest tokens of a history, newest first; all where `window` is negative.
std::vector<int32_t> newest(const std::vector<int32_t>& history, int32_t window) {
  const size_t count = window < 0 ? history.size() : std::min(history.size(), static_cast<size_t>(window));
  return {history.rbegin(), history.rbegin() + static_cast<std::ptrdiff_t>(count)};
}

// The tokens that penalties count, sorted.
std::vector<int32_t> counted(const Choice& c) {
  std::vector<int32_t> seen = newest(c.history, c.chain ? c.chain->penalty_window : -1);
  std::sort(seen.begin(), seen.end());
  return seen;
}

bool is_among(const std::vector<int32_t>& ids, int32_t id) { return std::find(ids.begin(), ids.end(), id) != ids.end(); }

// Tokens before the end, newest first, as far as a repetition may reach: back to the newest breaker.
size_t reach(const std::vector<int32_t>& newest_first, const Breakers& breakers) {
  std::unordered_multimap<int32_t, const std::vector<int32_t>*> by_head;
  for (const auto& sequence : breakers)
    if (!sequence.empty()) by_head.emplace(sequence[0], &sequence);
  if (by_head.empty()) return newest_first.size();
  for (size_t i = 0; i < newest_first.size(); i++) {
    size_t longest = 0;  // tokens of the longest breaker that begins here, none where no one does
    for (auto [at, end] = by_head.equal_range(newest_first[i]); at != end; ++at) {
      const std::vector<int32_t>& sequence = *at->second;
      if (sequence.size() > i + 1 || sequence.size() <= longest) continue;
      const auto oldest_first = newest_first.rend() - static_cast<std::ptrdiff_t>(i + 1);
      if (std::equal(sequence.begin(), sequence.end(), oldest_first)) longest = sequence.size();
    }
    if (longest > 0) return i + 1 - longest;
  }
  return newest_first.size();
}

// matches[k] = how many tokens before place k (newest first) are those at the end, in the same order; `reach` at most.
std::vector<size_t> matches(const std::vector<int32_t>& newest_first, size_t reach) {
  const size_t n = newest_first.size();
  std::vector<size_t> found(n, 0);
  size_t begin = 0, end = 0;  // the match that reaches furthest: places [begin, end) equal [0, end - begin)
  for (size_t k = 1; k < n; k++) {
    size_t length = k < end ? std::min(found[k - begin], end - k) : 0;
    while (k + length < n && newest_first[length] == newest_first[k + length]) length++;
    found[k] = length;
    if (k + length > end) begin = k, end = k + length;
  }
  for (size_t& length : found) length = std::min(length, reach);
  return found;
}

// multiplier * base^exponent, by repeated squaring.
float penalty_of(const Chain& chain, size_t exponent) {
  double power = 1, square = chain.dry_base;
  for (; exponent > 0; exponent >>= 1, square *= square)
    if (exponent & 1) power *= square;
  return static_cast<float>(std::min(chain.dry_multiplier * power, static_cast<double>(kLargest)));
}

}  // namespace

float orderly(float logit) { return logit != logit ? -kLargest : std::min(logit, kLargest); }

bool penalizes(const Choice& c) {
  return !c.history.empty() && (c.repetition_penalty != 1 || c.frequency_penalty != 0 || c.presence_penalty != 0);
}

void penalize(const Choice& c, float* logits) {
  const std::vector<int32_t> seen = counted(c);
  for (size_t i = 0; i < seen.size();) {
    size_t end = i;
    while (end < seen.size() && seen[end] == seen[i]) end++;
    if (!c.chain || !is_among(c.chain->unpenalized, seen[i])) {
      float& logit = logits[seen[i]];
      logit = logit <= 0 ? logit * c.repetition_penalty : logit / c.repetition_penalty;
      logit = orderly(logit - (static_cast<float>(end - i) * c.frequency_penalty + c.presence_penalty));
    }
    i = end;
  }
}

void penalize_repetitions(const Choice& c, const Chain& chain, float* logits) {
  const std::vector<int32_t> newest_first = newest(c.history, chain.dry_window);
  const size_t allowed = static_cast<size_t>(chain.dry_allowed_length);
  if (newest_first.size() <= allowed) return;
  const size_t limit = reach(newest_first, chain.breakers);
  if (limit < allowed) return;
  const std::vector<size_t> lengths = matches(newest_first, limit);
  std::map<int32_t, size_t> longest;  // repetition that a token would go on with
  for (size_t k = 1; k < newest_first.size(); k++) {
    if (lengths[k] < allowed) continue;
    size_t& most = longest[newest_first[k - 1]];
    most = std::max(most, lengths[k]);
  }
  for (const auto& sequence : chain.breakers)
    if (sequence.size() == 1) longest.erase(sequence[0]);
  for (const auto& [token, length] : longest) logits[token] = orderly(logits[token] - penalty_of(chain, length - allowed));
}

}  // namespace llamaclust
