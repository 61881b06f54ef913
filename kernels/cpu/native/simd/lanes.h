// Sixteen float32 or int32 lanes on every instruction set: the vocabulary that level code is written in.
// Every operation is one IEEE-754 operation per lane (fma rounds once), so all levels give the same bits.
// LLAMACLUST_LEVEL names the namespace; the compiler's own macros choose the implementation.
#pragma once

#ifndef LLAMACLUST_LEVEL
#error "level code is compiled with -DLLAMACLUST_LEVEL=<name>"
#endif

#if defined(__AVX512F__)
#include "lanes_avx512.h"
#elif defined(__AVX2__)
#include "lanes_avx2.h"
#else
#include "lanes_generic.h"
#endif

namespace llamaclust::LLAMACLUST_LEVEL {
namespace {

// Fixed tree over sixteen lanes: halves are added, 8 + 8, 4 + 4, 2 + 2, 1 + 1.
[[maybe_unused]] float sum_tree(F32x16 x) {
  alignas(64) float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] += v[i + half];
  return v[0];
}

[[maybe_unused]] float max_tree(F32x16 x) {
  alignas(64) float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; i++) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  return v[0];
}

}  // namespace
}  // namespace llamaclust::LLAMACLUST_LEVEL
