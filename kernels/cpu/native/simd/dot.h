// Integer dot products on every instruction set: sixteen rows a step, four columns each.
//
// A `Bytes` is a k-group: 64 unsigned bytes, byte 4 * row + column. `step` adds one k-group times four activation bytes
// (each in [-127, 127], packed in an int32) to `Sums`, which hold kGroupsPerSum<kBits> such steps if no byte has more
// than kBits bits; then they go to int32 lanes, plain or times a scale per row. All of it is exact.
#pragma once

#include "lanes.h"

// Loops over rows, tokens and k-groups whose counts are constants: unrolled, so that arrays of registers are registers.
#if defined(__AVX2__) || defined(LLAMACLUST_NEON)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL
#endif

#define DOT [[maybe_unused]] inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)
#include "dot_avx512vnni.h"
#elif defined(__AVX512BW__)
#include "dot_avx512.h"
#elif defined(__AVXVNNI__)
#include "dot_avxvnni.h"
#elif defined(__AVX2__)
#include "dot_avx2.h"
#elif defined(LLAMACLUST_NEON) && defined(__ARM_FEATURE_DOTPROD)
#include "dot_neon_dotprod.h"
#elif defined(LLAMACLUST_NEON)
#include "dot_neon.h"
#else
#include "dot_generic.h"
#endif

#if defined(__AVX512BW__)
#include "points_avx512.h"
#elif defined(__AVX2__)
#include "points_avx2.h"
#elif defined(LLAMACLUST_NEON)
#include "points_neon.h"
#else
#include "points_generic.h"
#endif

#undef DOT
