#include "sampler/sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "runtime/math.h"
#include "sampler/random.h"

namespace llamaclust {
namespace {

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

// Sets the logits of tokens whose bit is not set to -infinity.
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

bool is_plain(const Choice& c) { return c.logit_bias.empty() && c.suppressed.empty() && c.allowed.empty(); }

float divisor_of(const Choice& c) { return std::min(c.temperature, kLargest); }

// Returns how many of the best candidates top-k, top-p and min-p keep, or the vocabulary's size if they keep all.
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
  RankedWeights weights(ranking, divisor_of(c));
  const int64_t total = kept < ranking.size() ? weights.sum(kept) : ranking.total(divisor_of(c));
  const int64_t target = scaled(random_bits(c.seed, c.choice, c.position), total);
  if (ranking.lacks_values()) return 0;
  int rank = 0;
  for (int64_t sum = 0; weights.has(rank); rank++) {
    sum += weights[rank];
    if (sum > target) break;
  }
  return ranking.lacks_values() ? 0 : ranking.id(rank);
}

// Returns the sampled token, or -1 if every token is suppressed.
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

Sampler::Sampler(const SamplerOps& ops, int vocabulary, int threads)
    : ops_(ops), vocabulary_(vocabulary), pool_(threads), scratch_(threads) {}

// Returns the sampled token, or -1 if every token is suppressed. Sets *mu if Mirostat sampled.
int32_t Sampler::sampled(Ranking& raw, const float* logits, const Choice& c, Scratch& scratch, double* mu) const {
  const bool is_penalized = !c.chain && penalizes(c);  // In a chain, penalties are one of its steps.
  if (!c.chain && is_plain(c) && !is_penalized) return sample(raw, c);
  raw.need_values();
  if (logits == nullptr) return 0;
  scratch.assign(logits, logits + vocabulary_);
  for (const auto& [id, bias] : c.logit_bias) scratch[id] = orderly(scratch[id] + bias);
  if (is_penalized) penalize(c, scratch.data());
  for (int32_t id : c.suppressed) scratch[id] = -kInfinity;
  if (!c.allowed.empty()) keep_allowed(c.allowed, scratch.data(), vocabulary_);
  Ranking ranking(ops_, scratch.data(), vocabulary_);
  if (!c.chain || ranking.maximum() == -kInfinity) return sample(ranking, c);
  return sample_by_chain(ops_, scratch.data(), vocabulary_, c, mu);
}

// Returns why the task cannot be computed; empty if it can.
std::string Sampler::refusal(const RowTask& task) const {
  if (const auto id = foreign_token(task, vocabulary_))
    return "token " + std::to_string(*id) + " is outside the vocabulary of " + std::to_string(vocabulary_);
  const auto words = static_cast<size_t>(vocabulary_ + 31) / 32;
  if (!task.choice.allowed.empty() && task.choice.allowed.size() != words)
    return std::to_string(task.choice.allowed.size()) + " words of allowed tokens instead of " + std::to_string(words);
  return {};
}

RowOutcome Sampler::run_row(Ranking raw, const float* logits, const RowTask& task, Scratch& scratch) const {
  const int64_t total = raw.checked_total();
  if (total == 0) return failed("the logits are not finite numbers: damaged weights, or values beyond the KV type's range");
  RowOutcome outcome;
  outcome.token = task.token;
  if (!task.scored) {
    outcome.token = sampled(raw, logits, task.choice, scratch, &outcome.mu);
    if (outcome.token < 0) return failed("every token is suppressed");
  }
  // Log-softmax over the raw logits.
  constexpr double kUnit = static_cast<double>(kUnitWeight);
  const double maximum = raw.maximum(), log_sum = log_double(static_cast<double>(total) / kUnit);
  const auto logprob = [&](float x) { return static_cast<float>(static_cast<double>(x) - maximum - log_sum); };
  outcome.logprob = logprob(raw.value(outcome.token));
  const int wanted = std::min(task.top_logprobs, vocabulary_), top = wanted > 0 ? std::min(wanted, raw.extend(wanted)) : 0;
  if (top < wanted && !raw.is_complete()) raw.need_values();
  for (int i = 0; i < top; i++) outcome.top_logprobs.emplace_back(raw.id(i), logprob(raw.ready_values()[i]));
  if (!raw.lacks_values()) return outcome;
  RowOutcome lacking;
  lacking.lacks_logits = true;
  return lacking;
}

template <class F>
void Sampler::each_row(size_t rows, F f) {
  // Fewer rows are finished before another core would be awake.
  constexpr size_t kWorthWaking = 4;
  std::atomic<size_t> next = 0;  // Each thread takes the next free row.
  const auto work = [&](int thread) {
    for (size_t row = next++; row < rows; row = next++) f(row, scratch_[thread]);
  };
  if (rows < kWorthWaking || pool_.threads() == 1)
    work(0);
  else
    pool_.run(work);
}

std::vector<RowOutcome> Sampler::run(const float* logits, const std::vector<RowTask>& tasks) {
  std::vector<RowOutcome> outcomes(tasks.size());
  for (RowOutcome& outcome : outcomes) outcome.lacks_logits = true;
  complete(logits, tasks, outcomes);
  return outcomes;
}

std::vector<float> Sampler::divisors(const std::vector<RowTask>& tasks) const {
  std::vector<float> found;
  for (const RowTask& task : tasks) {
    const Choice& c = task.choice;
    const bool keeps_all = c.top_p >= 1 && c.min_p <= 0 && (c.top_k <= 0 || c.top_k >= vocabulary_);
    const bool wants_total = !task.scored && !c.chain && is_plain(c) && !penalizes(c) && c.temperature > 0 && keeps_all;
    found.push_back(wants_total && c.temperature != 1 ? divisor_of(c) : 0);
  }
  return found;
}

std::vector<RowOutcome> Sampler::run_ranked(const int64_t* records, const int64_t* totals,
                                            const std::vector<RowTask>& tasks) {
  std::vector<RowOutcome> outcomes(tasks.size());
  const std::vector<float> by = divisors(tasks);
  each_row(tasks.size(), [&](size_t row, Scratch& scratch) {
    Ranked ranked = read_ranked(records + row * ranked_words(vocabulary_), vocabulary_);
    if (totals != nullptr && by[row] != 0) {
      const int64_t* sums = totals + row * sums_of_row(vocabulary_);
      ranked.divisor = by[row];
      ranked.divided_total = std::accumulate(sums, sums + sums_of_row(vocabulary_), int64_t{0});
    }
    std::string refused = refusal(tasks[row]);
    outcomes[row] = refused.empty() ? run_row(Ranking(ops_, ranked, vocabulary_), nullptr, tasks[row], scratch)
                                    : failed(std::move(refused));
  });
  return outcomes;
}

void Sampler::complete(const float* logits, const std::vector<RowTask>& tasks, std::vector<RowOutcome>& outcomes) {
  std::vector<size_t> lacking;
  for (size_t row = 0; row < outcomes.size(); row++)
    if (outcomes[row].lacks_logits) lacking.push_back(row);
  each_row(lacking.size(), [&](size_t i, Scratch& scratch) {
    const float* own = logits + i * vocabulary_;
    const RowTask& task = tasks[lacking[i]];
    std::string refused = refusal(task);
    outcomes[lacking[i]] = refused.empty() ? run_row(Ranking(ops_, own, vocabulary_), own, task, scratch)
                                           : failed(std::move(refused));
  });
}

}  // namespace llamaclust
