// Declares elementary functions and their coefficients. GPU sources define these macros first (kernels/cuda).
#pragma once

#ifndef ELEMENTARY
#define ELEMENTARY [[maybe_unused]] inline __attribute__((always_inline))
#define COEFFICIENTS [[maybe_unused]] constexpr
#endif
