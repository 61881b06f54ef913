// Weights as checkpoints store them (float32, float16, bfloat16) to weights as model files do, many at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamaclust {

enum class SourceDtype { F32, F16, BF16 };
enum class TargetDtype { F32, F16, BF16, Q8_0 };

// Bytes that `count` weights take; of Q8_0, `count` is a multiple of 32.
size_t source_bytes(SourceDtype source, size_t count);
size_t target_bytes(TargetDtype target, size_t count);

// Rounds to nearest, ties to even; in a block of Q8_0 to the nearest step, halves away from zero. False where a number
// is none, is infinite or does not fit a float16 that is wanted (Q8_0 has one for its scale).
bool cast_dtype(const uint8_t* from, SourceDtype source, size_t count, TargetDtype target, uint8_t* to);

}  // namespace llamaclust
