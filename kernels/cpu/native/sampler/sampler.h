// Samples or scores the token that follows a row of logits. docs/internals/numerics.md has the order of operations and
// why results cannot vary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "level/level.h"
#include "runtime/thread_pool.h"
#include "sampler/ranking.h"

namespace llamaclust {

inline constexpr float kLargest = std::numeric_limits<float>::max(), kInfinity = std::numeric_limits<float>::infinity();

using TokenValue = std::pair<int32_t, float>;
using Breakers = std::vector<std::vector<int32_t>>;

// Numbers of the samplers, as in core/sampler/params.py.
enum class Step : int32_t {
  kPenalties, kDry, kTopNSigma, kTopK, kTailFree, kTypical, kTopP, kMinP, kXtc, kTemperature, kCount
};

// Rows of the sampling table in core/sampler/params.py. Each is a member of Chain and an argument of the
// binding with the same name.
#define LLAMACLUST_CHAIN_NUMBERS(NUMBER) \
  NUMBER(double, top_n_sigma)            \
  NUMBER(double, tfs_z)                  \
  NUMBER(double, typical_p)              \
  NUMBER(double, xtc_probability)        \
  NUMBER(double, xtc_threshold)          \
  NUMBER(double, dynatemp_range)         \
  NUMBER(double, dynatemp_exponent)      \
  NUMBER(double, dry_multiplier)         \
  NUMBER(double, dry_base)               \
  NUMBER(int32_t, dry_allowed_length)    \
  NUMBER(int32_t, mirostat)              \
  NUMBER(double, mirostat_tau)           \
  NUMBER(double, mirostat_eta)

// Fields of SamplerChain in core/sampler/params.py, and those of a SampleTask that concern it.
struct Chain {
#define LLAMACLUST_MEMBER(kind, name) kind name;
  LLAMACLUST_CHAIN_NUMBERS(LLAMACLUST_MEMBER)
#undef LLAMACLUST_MEMBER
  std::vector<int32_t> order;
  std::vector<int32_t> unpenalized;
  int32_t penalty_window, dry_window;  // Number of newest tokens of the history; negative for all.
  Breakers breakers;
  double mu;
};

// Fields of SamplingParams and SampleTask in core/sampler/.
struct Choice {
  float temperature;
  int32_t top_k;
  double top_p;
  double min_p;
  float repetition_penalty;
  float frequency_penalty;
  float presence_penalty;
  std::vector<TokenValue> logit_bias;
  uint64_t seed;
  uint32_t choice;
  uint32_t position;
  std::vector<int32_t> history;
  std::vector<int32_t> suppressed;
  std::vector<uint32_t> allowed;  // One bit per token, lowest first; empty if all are allowed.
  // Null for the plain samplers in their fixed order.
  std::shared_ptr<const Chain> chain;
};

struct RowTask {
  bool scored;  // True if `token` is given and scored; false if a token is sampled.
  int32_t token;
  Choice choice;
  int32_t top_logprobs;
};

struct RowOutcome {
  int32_t token = -1;
  float logprob = 0;
  std::vector<TokenValue> top_logprobs;
  std::string failure;  // Empty if there was no failure.
  // Next mu of Mirostat; NaN if Mirostat did not sample.
  double mu = std::numeric_limits<double>::quiet_NaN();
  bool lacks_logits = false;  // True if the result needs the row of logits itself.
};

class Sampler {
 public:
  // Throws std::invalid_argument unless `threads` is 1 to 1024.
  Sampler(const SamplerOps& ops, int vocabulary, int threads);
  int vocabulary() const { return vocabulary_; }

  // Samples from logits [tasks][vocabulary]; rows are distributed over the threads. One call at a time.
  std::vector<RowOutcome> run(const float* logits, const std::vector<RowTask>& tasks);

  // Returns for each row the temperature at which run_ranked() needs sums of weights, or 0 if the row's record
  // suffices.
  std::vector<float> divisors(const std::vector<RowTask>& tasks) const;
  // Samples from records [tasks][ranked_words]. Outcomes for which a record does not suffice have lacks_logits set.
  // totals[tasks][sums_of_row] are sums of weights at the temperatures of divisors(); null if all of these are 0.
  std::vector<RowOutcome> run_ranked(const int64_t* records, const int64_t* totals, const std::vector<RowTask>& tasks);
  // Completes the outcomes that lack logits, in their order, from logits [number of such outcomes][vocabulary].
  void complete(const float* logits, const std::vector<RowTask>& tasks, std::vector<RowOutcome>& outcomes);

 private:
  // [vocabulary]: logits after bias, penalties and suppression.
  using Scratch = std::vector<float>;

  // Calls f(row, scratch) for each of `rows` rows.
  template <class F>
  void each_row(size_t rows, F f);
  // `logits` is null if the ranking does without them.
  RowOutcome run_row(Ranking raw, const float* logits, const RowTask& task, Scratch& scratch) const;
  int32_t sampled(Ranking& raw, const float* logits, const Choice& choice, Scratch& scratch, double* mu) const;
  std::string refusal(const RowTask& task) const;

  SamplerOps ops_;
  int vocabulary_;
  ThreadPool pool_;
  std::vector<Scratch> scratch_;  // One for each thread.
};

// Replaces NaN by -kLargest and limits the logit to kLargest, so that logits can be ordered and subtracted.
float orderly(float logit);

bool penalizes(const Choice& choice);

// Applies repetition, frequency and presence penalties to logits [vocabulary].
void penalize(const Choice& choice, float* logits);

// Runs the samplers of the choice's chain. values[vocabulary] are logits after bias, with -infinity for tokens that
// must not be sampled; at least one is above -infinity. Modifies the values. Returns -1 if penalties leave no token;
// sets *mu if Mirostat samples.
int32_t sample_by_chain(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice, double* mu);

}  // namespace llamaclust
