#include "runtime/dtype_cast.h"

#include <cstring>

#include "runtime/float_mode.h"
#include "runtime/levels.h"

namespace llamaclust {

size_t source_bytes(SourceDtype source, size_t count) { return source == SourceDtype::F32 ? 4 * count : 2 * count; }

size_t target_bytes(TargetDtype target, size_t count) {
  if (target == TargetDtype::Q8_0) return count / 32 * 34;
  return target == TargetDtype::F32 ? 4 * count : 2 * count;
}

namespace {
namespace any {
#include "runtime/dtype_cast_loops.h"
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC target("avx2")
namespace avx2 {
#include "runtime/dtype_cast_loops.h"
}
#pragma GCC pop_options
#define LLAMACLUST_WIDE avx2::run
#endif
}  // namespace

bool cast_dtype(const uint8_t* from, SourceDtype source, size_t count, TargetDtype target, uint8_t* to) {
  const FloatMode mode;
#ifdef LLAMACLUST_WIDE
  static const bool wide = cpu_features().avx2;
  if (wide) return LLAMACLUST_WIDE(from, source, count, target, to);
#endif
  return any::run(from, source, count, target, to);
}

}  // namespace llamaclust
