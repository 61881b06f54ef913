// Chooses or scores the token after a row of logits. internals/numerics.md says in which order and why the answer cannot vary.
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

// The number of a step, as in core/sampler/params.py.
enum class Step : int32_t {
  kPenalties, kDry, kTopNSigma, kTopK, kTailFree, kTypical, kTopP, kMinP, kXtc, kTemperature, kCount
};

// The rows of the sampling table in core/sampler/params.py: members of a chain, and arguments of the binding by name.
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

// As SamplerChain in core/sampler/params.py, and what a SampleTask says for it.
struct Chain {
#define LLAMACLUST_MEMBER(kind, name) kind name;
  LLAMACLUST_CHAIN_NUMBERS(LLAMACLUST_MEMBER)
#undef LLAMACLUST_MEMBER
  std::vector<int32_t> order;
  std::vector<int32_t> unpenalized;
  int32_t penalty_window, dry_window;  // newest tokens of the history; negative: all
  Breakers breakers;
  double mu;
};

// As SamplingParams and SampleTask in core/sampler/.
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
  std::vector<uint32_t> allowed;  // a bit for each token, lowest first; empty: all
  std::shared_ptr<const Chain> chain;  // may be null: the plain samplers in their order
};

struct RowTask {
  bool scored;     // `token` is given; else it is sampled
  int32_t token;
  Choice choice;
  int32_t top_logprobs;
};

struct RowOutcome {
  int32_t token = -1;
  float logprob = 0;
  std::vector<TokenValue> top_logprobs;
  std::string failure;  // empty: none
  double mu = std::numeric_limits<double>::quiet_NaN();  // of Mirostat, where it chose
  bool lacks_logits = false;  // there is no answer without the row itself
};

class Sampler {
 public:
  // std::invalid_argument outside 1..1024 threads.
  Sampler(const SamplerOps& ops, int vocabulary, int threads);
  int vocabulary() const { return vocabulary_; }

  // logits[tasks][vocabulary]; rows are spread over the threads. One call at a time.
  std::vector<RowOutcome> run(const float* logits, const std::vector<RowTask>& tasks);

  // What weights are to be divided by, of each row whose record alone does not suffice for this; else 0.
  std::vector<float> divisors(const std::vector<RowTask>& tasks) const;
  // The same of records[tasks][ranked_words], as far as these suffice: others lack logits. totals[tasks][sums_of_row]: sums
  // of weights by these divisors, where these are not 0; null where all are.
  std::vector<RowOutcome> run_ranked(const int64_t* records, const int64_t* totals, const std::vector<RowTask>& tasks);
  // logits[number of outcomes that lack them][vocabulary]: completes these, in their order.
  void complete(const float* logits, const std::vector<RowTask>& tasks, std::vector<RowOutcome>& outcomes);

 private:
  using Scratch = std::vector<float>;  // [vocabulary] logits after bias, penalties and suppression

  // f(row, scratch) for each of so many rows.
  template <class F>
  void each_row(size_t rows, F f);
  // `logits` are null where the ranking does without them.
  RowOutcome run_row(Ranking raw, const float* logits, const RowTask& task, Scratch& scratch) const;
  int32_t sampled(Ranking& raw, const float* logits, const Choice& choice, Scratch& scratch, double* mu) const;
  std::string refusal(const RowTask& task) const;

  SamplerOps ops_;
  int vocabulary_;
  ThreadPool pool_;
  std::vector<Scratch> scratch_;  // a thread each
};

// What cannot be ordered or subtracted becomes the nearest thing that can.
float orderly(float logit);

bool penalizes(const Choice& choice);

// logits[vocabulary]: repetition, frequency and presence penalties.
void penalize(const Choice& choice, float* logits);

// Runs the samplers of the choice's chain on values[vocabulary]: logits after bias, -infinity for what may not be
// sampled, one at least above it. They are changed. -1 where penalties leave no token; *mu is set where Mirostat samples.
int32_t sample_by_chain(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice, double* mu);

}  // namespace llamaclust
