// Casts weights from the types of checkpoints (float32, float16, bfloat16) to those of model files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace llamaclust {

enum class SourceDtype { F32, F16, BF16 };
enum class TargetDtype { F32, F16, BF16, Q8_0 };

// Size of `count` weights in bytes. For Q8_0, `count` is a multiple of 32.
size_t source_bytes(SourceDtype source, size_t count);
size_t target_bytes(TargetDtype target, size_t count);

// Rounds to nearest with ties to even; Q8_0 quants round to nearest with ties away from zero. Returns false if the
// target is F16 or Q8_0 and a float16 result (a weight, or the scale of a block) would be NaN, infinite or too large.
bool cast_dtype(const uint8_t* from, SourceDtype source, size_t count, TargetDtype target, uint8_t* to);

}  // namespace llamaclust
