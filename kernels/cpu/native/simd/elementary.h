// How elementary functions and their coefficients are declared: a compiler for GPUs has been told its own way before.
#pragma once

#ifndef ELEMENTARY
#define ELEMENTARY [[maybe_unused]] inline __attribute__((always_inline))
#define COEFFICIENTS [[maybe_unused]] constexpr
#endif
