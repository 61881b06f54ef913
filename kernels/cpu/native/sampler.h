// Chooses or scores the token after a row of logits. docs/numerics.md says in which order and why the answer cannot vary.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "sampler_ops.h"

namespace llamaclust {

using TokenValue = std::pair<int32_t, float>;

// As SamplingParams and SampleTask in wire/messages.py.
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
};

struct RowTask {
  bool scored;     // `token` is given; else it is chosen
  int32_t token;
  Choice choice;
  int32_t top_logprobs;
};

struct RowOutcome {
  int32_t token = -1;
  float logprob = 0;
  std::vector<TokenValue> top_logprobs;
  std::string failure;  // empty: none
};

class Sampler {
 public:
  Sampler(const SamplerOps& ops, int vocabulary) : ops_(ops), vocabulary_(vocabulary) {}
  int vocabulary() const { return vocabulary_; }

  // logits[vocabulary]. One call at a time.
  RowOutcome run(const float* logits, const RowTask& task);

 private:
  const float* adjusted(const float* logits, const Choice& choice);

  SamplerOps ops_;
  int vocabulary_;
  std::vector<float> scratch_;  // [vocabulary] logits after bias, penalties and suppression
};

}  // namespace llamaclust
