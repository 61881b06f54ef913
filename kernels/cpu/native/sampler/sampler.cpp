#include "sampler/sampler.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>

#include "runtime/math.h"
#include "sampler/chain.h"
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

Sampler::Sampler(const SamplerOps& ops, int vocabulary, int threads)
    : ops_(ops), vocabulary_(vocabulary), pool_(threads), scratch_(threads) {}

// The sampled token, -1 where every one is suppressed; *mu is set where Mirostat chose.
int32_t Sampler::sampled(Ranking& raw, const float* logits, const Choice& c, Scratch& scratch, double* mu) const {
  const bool is_penalized = !c.chain && penalizes(c);  // a chain says when
  if (!c.chain && c.logit_bias.empty() && c.suppressed.empty() && !is_penalized) return sample(raw, c);
  scratch.assign(logits, logits + vocabulary_);
  for (const auto& [id, bias] : c.logit_bias) scratch[id] = orderly(scratch[id] + bias);
  if (is_penalized) penalize(c, scratch.data());
  for (int32_t id : c.suppressed) scratch[id] = -kInfinity;
  Ranking ranking(ops_, scratch.data(), vocabulary_);
  if (!c.chain || ranking.maximum() == -kInfinity) return sample(ranking, c);
  return sample_by_chain(ops_, scratch.data(), vocabulary_, c, mu);
}

RowOutcome Sampler::run_row(const float* logits, const RowTask& task, Scratch& scratch) const {
  if (const auto id = foreign_token(task, vocabulary_))
    return failed("token " + std::to_string(*id) + " is outside the vocabulary of " + std::to_string(vocabulary_));
  Ranking raw(ops_, logits, vocabulary_);
  const int64_t total = raw.total(1.0f);
  if (total == 0) return failed("the logits are not finite numbers: damaged weights, or values beyond the KV type's range");
  RowOutcome outcome;
  outcome.token = task.token;
  if (!task.scored) {
    outcome.token = sampled(raw, logits, task.choice, scratch, &outcome.mu);
    if (outcome.token < 0) return failed("every token is suppressed");
  }
  // Log-softmax over raw logits.
  const double maximum = raw.maximum(), log_sum = log_double(static_cast<double>(total) / static_cast<double>(kUnitWeight));
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
