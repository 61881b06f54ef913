// All samplers of a request in the order that it gives: logits, then candidates, then one token.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler/sampler.h"

namespace llamaclust {

// Penalties: subtracted from the logits of tokens that occurred before.

// What cannot be ordered or subtracted becomes the nearest thing that can.
float orderly(float logit);

bool penalizes(const Choice& choice);

// logits[vocabulary]: repetition, frequency and presence penalties.
void penalize(const Choice& choice, float* logits);

// logits[vocabulary]: DRY, for each token that would go on with a repetition of the history's end.
void penalize_repetitions(const Choice& choice, const Chain& chain, float* logits);

class ChainRun {
 public:
  // values[vocabulary]: logits after bias, -infinity for what may not be sampled, one at least above it. They are changed.
  ChainRun(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice)
      : ops_(ops), values_(values), vocabulary_(vocabulary), choice_(choice), chain_(*choice.chain) {}

  // Runs the steps; -1 where penalties leave no token. *mu is set where Mirostat samples.
  int32_t sample(double* mu);

 private:
  // Candidates are values above -infinity until a step ranks them: then they are the first `ids_`, best first, with their
  // values, which count as divided by the temperature.
  void step(Step step);
  void rank(int most);
  void spread();
  int size() const { return static_cast<int>(ids_.size()); }
  void keep(int count);
  void drop(int count);
  void weigh();
  double information(int rank) const;  // -ln of its probability; weigh() comes first
  double entropy() const;              // likewise

  void top_n_sigma();
  void tail_free();
  void typical();
  void top_p();
  void min_p();
  void xtc();
  void temperature();
  double dynamic_temperature();
  int mirostat_candidates();  // of version 1
  int draw();

  const SamplerOps& ops_;
  float* values_;
  int vocabulary_;
  const Choice& choice_;
  const Chain& chain_;
  bool is_ranked_ = false;
  float divisor_ = 1;
  std::vector<int32_t> ids_;
  std::vector<float> ranked_;
  std::vector<int64_t> weights_;  // exp((value - best) / divisor) in units of 2^-40
  int64_t total_ = 0;
  double log_total_ = 0;
};

}  // namespace llamaclust
