// How elementary functions and their coefficients are declared: for a GPU they are defined before (kernels/cuda).
#pragma once

#ifndef ELEMENTARY
#define ELEMENTARY [[maybe_unused]] inline __attribute__((always_inline))
#define COEFFICIENTS [[maybe_unused]] constexpr
#endif
