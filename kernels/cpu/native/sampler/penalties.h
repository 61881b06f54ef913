// Penalties: subtracted from the logits of tokens that occurred before.
#pragma once

#include "sampler/sampler.h"

namespace llamaclust {

// What cannot be ordered or subtracted becomes the nearest thing that can.
float orderly(float logit);

bool penalizes(const Choice& choice);

// logits[vocabulary]: repetition, frequency and presence penalties.
void penalize(const Choice& choice, float* logits);

// logits[vocabulary]: DRY, for each token that would go on with a repetition of the history's end.
void penalize_repetitions(const Choice& choice, const Chain& chain, float* logits);

}  // namespace llamaclust
