#include "sampler/sampler.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>

#include "runtime/math.h"
#include "sampler/random.h"

namespace llamaclust {
namespace {

// An integer that grows as the value falls, then as the id grows. Both zeros are one value.
uint64_t key_of(float value, int id) {
  const uint32_t bits = std::bit_cast<uint32_t>(value + 0.0f);
  const uint32_t ascending = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t{~ascending} << 32 | static_cast<uint32_t>(id);
}

float value_of(uint64_t key) {
  const uint32_t ascending = ~static_cast<uint32_t>(key >> 32);
  return std::bit_cast<float>(ascending & 0x80000000 ? ascending & 0x7FFFFFFF : ~ascending);
}

// Sorts by the values in the upper halves; keys that come in order of id stay so within a value.
void sort_by_value(std::vector<uint64_t>& keys) {
  std::vector<uint64_t> other(keys.size());
  for (int shift = 32; shift < 64; shift += 8) {
    std::array<size_t, 257> starts{};
    for (uint64_t key : keys) starts[(key >> shift & 0xFF) + 1]++;
    for (int digit = 0; digit < 256; digit++) starts[digit + 1] += starts[digit];
    for (uint64_t key : keys) other[starts[key >> shift & 0xFF]++] = key;
    keys.swap(other);
  }
}

float nth_greatest(std::vector<float> values, int n) {
  std::nth_element(values.begin(), values.begin() + n, values.end(), std::greater<float>());
  return values[n];
}

std::optional<int32_t> foreign_token(const RowTask& task, int vocabulary) {
  const auto foreign = [vocabulary](int32_t id) { return id < 0 || id >= vocabulary; };
  if (task.scored) return foreign(task.token) ? std::optional(task.token) : std::nullopt;
  for (const auto& [id, bias] : task.choice.logit_bias)
    if (foreign(id)) return id;
  for (const auto* ids : {&task.choice.history, &task.choice.suppressed})
    for (int32_t id : *ids)
      if (foreign(id)) return id;
  return std::nullopt;
}

// -infinity for tokens whose bit is not set.
void keep_allowed(const std::vector<uint32_t>& allowed, float* logits, int vocabulary) {
  for (int begin = 0; begin < vocabulary; begin += 32) {
    const uint32_t bits = allowed[begin / 32];
    if (bits == 0xFFFFFFFF) continue;
    const int end = std::min(begin + 32, vocabulary);
    if (bits == 0) {
      std::fill(logits + begin, logits + end, -kInfinity);
      continue;
    }
    for (int i = begin; i < end; i++)
      if (!(bits >> (i - begin) & 1)) logits[i] = -kInfinity;
  }
}

// How many of the best candidates top-k, top-p and min-p keep; the vocabulary's size where they keep all.
int kept_candidates(Ranking& ranking, const Choice& c) {
  const int limit = c.top_k > 0 ? std::min(c.top_k, ranking.size()) : ranking.size();
  if (c.top_p >= 1 && c.min_p <= 0) return limit;
  RankedWeights weights(ranking, 1.0f);
  const int64_t total = limit < ranking.size() ? weights.sum(limit) : ranking.total(1.0f);
  const double nucleus = c.top_p < 1 ? c.top_p * static_cast<double>(total) : kInfinity;
  const double least = c.min_p * static_cast<double>(kUnitWeight);
  int64_t sum = 0;
  for (int i = 0; i < limit && weights.has(i); i++) {
    if (i > 0 && static_cast<double>(weights[i]) < least) return i;
    sum += weights[i];
    if (static_cast<double>(sum) >= nucleus) return i + 1;
  }
  return limit;
}

int draw(Ranking& ranking, const Choice& c) {
  const int kept = kept_candidates(ranking, c);
  RankedWeights weights(ranking, std::min(c.temperature, kLargest));
  const int64_t total = kept < ranking.size() ? weights.sum(kept) : ranking.total(std::min(c.temperature, kLargest));
  const int64_t target = scaled(random_bits(c.seed, c.choice, c.position), total);
  int rank = 0;
  for (int64_t sum = 0; weights.has(rank); rank++) {
    sum += weights[rank];
    if (sum > target) break;
  }
  return ranking.id(rank);
}

// -1 where every token is suppressed.
int sample(Ranking& ranking, const Choice& c) {
  if (ranking.maximum() == -kInfinity) return -1;
  return c.temperature > 0 ? draw(ranking, c) : ranking.best();
}

RowOutcome failed(std::string why) {
  RowOutcome outcome;
  outcome.failure = std::move(why);
  outcome.logprob = std::numeric_limits<float>::quiet_NaN();
  return outcome;
}

}  // namespace

Ranking::Ranking(const SamplerOps& ops, const float* values, int n)
    : ops_(ops), values_(values), n_(n), blocks_((n + kRankBlock - 1) / kRankBlock) {
  maximum_ = ops.maxima(values, n, blocks_.data());
}

// Blocks without a candidate have no weight; they would be slow, since exp is subnormal there.
int64_t Ranking::total(float divisor) const {
  int64_t total = 0;
  const auto block_count = blocks_.size();
  for (size_t begin = 0, end; begin < block_count; begin = end + 1) {
    for (end = begin; end < block_count && blocks_[end] != -kInfinity;) end++;
    const int first = static_cast<int>(begin) * kRankBlock, last = std::min(static_cast<int>(end) * kRankBlock, n_);
    if (end > begin) total += ops_.weigh(values_ + first, last - first, maximum_, divisor, nullptr);
  }
  return total;
}

int Ranking::best() const {
  const auto block = std::find(blocks_.begin(), blocks_.end(), maximum_);
  return static_cast<int>(std::find(values_ + (block - blocks_.begin()) * kRankBlock, values_ + n_, maximum_) - values_);
}

// A value that probably at least `count` entries reach, and not many more.
float Ranking::threshold(int count) const {
  // `count` blocks reach it, so certainly as many entries do.
  if (2 * count <= static_cast<int>(blocks_.size())) return nth_greatest(blocks_, count - 1);
  constexpr int kStride = 37;
  std::vector<float> sample;
  for (int i = 0; i < n_; i += kStride) sample.push_back(values_[i]);
  const int rank = count / kStride + count / (8 * kStride) + 16;
  return rank < static_cast<int>(sample.size()) ? nth_greatest(std::move(sample), rank) : -kInfinity;
}

// Makes every entry ready that reaches the threshold.
void Ranking::collect(float threshold) {
  complete_ = threshold == -kInfinity;
  size_t count = 0;
  for (size_t b = 0; b < blocks_.size(); b++) {
    if (blocks_[b] < threshold || blocks_[b] == -kInfinity) continue;
    const int begin = static_cast<int>(b) * kRankBlock, end = std::min(begin + kRankBlock, n_);
    if (keys_.size() < count + kRankBlock) keys_.resize(2 * count + kRankBlock);
    for (int i = begin; i < end; i++) {
      keys_[count] = key_of(values_[i], i);
      count += values_[i] >= threshold && values_[i] != -kInfinity;
    }
  }
  keys_.resize(count);
  sort_by_value(keys_);
  ready_values_.resize(count);
  std::transform(keys_.begin(), keys_.end(), ready_values_.begin(), value_of);
}

int Ranking::extend(int count) {
  count = std::min(count, n_);
  const auto lacking = [&] { return count > static_cast<int>(keys_.size()) && !complete_; };
  if (lacking()) collect(threshold(count));
  if (lacking()) collect(-kInfinity);
  return static_cast<int>(keys_.size());
}

bool RankedWeights::grow(int count) {
  const int from = static_cast<int>(weights_.size());
  const int to = ranking_.extend(std::max({count, 4 * from, kRankBlock}));
  if (to <= from) return false;
  weights_.resize(to);
  ranking_.ops().weigh(ranking_.ready_values() + from, to - from, ranking_.maximum(), divisor_, weights_.data() + from);
  return to >= count;
}

int64_t RankedWeights::sum(int count) {
  int64_t sum = 0;
  for (int i = 0; i < count && has(i); i++) sum += weights_[i];
  return sum;
}

Sampler::Sampler(const SamplerOps& ops, int vocabulary, int threads)
    : ops_(ops), vocabulary_(vocabulary), pool_(threads), scratch_(threads) {}

// The sampled token, -1 where every one is suppressed; *mu is set where Mirostat chose.
int32_t Sampler::sampled(Ranking& raw, const float* logits, const Choice& c, Scratch& scratch, double* mu) const {
  const bool is_penalized = !c.chain && penalizes(c);  // a chain says when
  const bool is_plain = c.logit_bias.empty() && c.suppressed.empty() && c.allowed.empty();
  if (!c.chain && is_plain && !is_penalized) return sample(raw, c);
  scratch.assign(logits, logits + vocabulary_);
  for (const auto& [id, bias] : c.logit_bias) scratch[id] = orderly(scratch[id] + bias);
  if (is_penalized) penalize(c, scratch.data());
  for (int32_t id : c.suppressed) scratch[id] = -kInfinity;
  if (!c.allowed.empty()) keep_allowed(c.allowed, scratch.data(), vocabulary_);
  Ranking ranking(ops_, scratch.data(), vocabulary_);
  if (!c.chain || ranking.maximum() == -kInfinity) return sample(ranking, c);
  return sample_by_chain(ops_, scratch.data(), vocabulary_, c, mu);
}

RowOutcome Sampler::run_row(const float* logits, const RowTask& task, Scratch& scratch) const {
  if (const auto id = foreign_token(task, vocabulary_))
    return failed("token " + std::to_string(*id) + " is outside the vocabulary of " + std::to_string(vocabulary_));
  const auto words = static_cast<size_t>(vocabulary_ + 31) / 32;
  if (!task.choice.allowed.empty() && task.choice.allowed.size() != words)
    return failed(std::to_string(task.choice.allowed.size()) + " words of allowed tokens instead of " + std::to_string(words));
  Ranking raw(ops_, logits, vocabulary_);
  const int64_t total = ops_.weigh(logits, vocabulary_, raw.maximum(), 1.0f, nullptr);
  if (total == 0) return failed("the logits are not finite numbers: damaged weights, or values beyond the KV type's range");
  RowOutcome outcome;
  outcome.token = task.token;
  if (!task.scored) {
    outcome.token = sampled(raw, logits, task.choice, scratch, &outcome.mu);
    if (outcome.token < 0) return failed("every token is suppressed");
  }
  // Log-softmax over raw logits.
  constexpr double kUnit = static_cast<double>(kUnitWeight);
  const double maximum = raw.maximum(), log_sum = log_double(static_cast<double>(total) / kUnit);
  const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - maximum - log_sum); };
  outcome.logprob = logprob(logits[outcome.token]);
  const int top = std::min(task.top_logprobs, raw.extend(task.top_logprobs));
  for (int i = 0; i < top; i++) outcome.top_logprobs.emplace_back(raw.id(i), logprob(raw.ready_values()[i]));
  return outcome;
}

std::vector<RowOutcome> Sampler::run(const float* logits, const std::vector<RowTask>& tasks) {
  constexpr size_t kWorthWaking = 4;  // fewer rows are done before another core is awake
  std::vector<RowOutcome> outcomes(tasks.size());
  std::atomic<size_t> next = 0;  // each thread takes the next row that is free
  const auto work = [&](int thread) {
    for (size_t row = next++; row < tasks.size(); row = next++)
      outcomes[row] = run_row(logits + row * vocabulary_, tasks[row], scratch_[thread]);
  };
  if (tasks.size() < kWorthWaking || pool_.threads() == 1)
    work(0);
  else
    pool_.run(work);
  return outcomes;
}

}  // namespace llamaclust
