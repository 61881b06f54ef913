// All samplers of a request in the order that it gives: logits, then candidates, then one token.
#pragma once

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

// Runs the samplers of the choice's chain on values[vocabulary]: logits after bias, -infinity for what may not be
// sampled, one at least above it. They are changed. -1 where penalties leave no token; *mu is set where Mirostat samples.
int32_t sample_by_chain(const SamplerOps& ops, float* values, int vocabulary, const Choice& choice, double* mu);

}  // namespace llamaclust
