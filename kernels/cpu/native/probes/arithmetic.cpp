#include "probes/probes.h"
#include "runtime/levels.h"

namespace llamaclust {
namespace {

constexpr int kRounds = 4000;

#if defined(__x86_64__)

// Twelve independent accumulators hide the latency of any of these instructions.
#define TWELVE(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define CLOBBERS                                                                                                  \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define CLEAR_ZMM(i) "vpxord %%zmm" #i ", %%zmm" #i ", %%zmm" #i "\n"
#define DOT_ZMM(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
#define FMA_ZMM(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n"
#define CLEAR_YMM(i) "vpxor %%ymm" #i ", %%ymm" #i ", %%ymm" #i "\n"
// VEX encoding of AVX-VNNI; otherwise the assembler may choose EVEX.
#define DOT_VEX(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
#define FMA_YMM(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n"
#define PAIRS(r, i)                                                                         \
  "vpmaddubsw %%" r "14, %%" r "15, %%" r "12\nvpmaddwd %%" r "14, %%" r "12, %%" r "12\n" \
  "vpaddd %%" r "12, %%" r #i ", %%" r #i "\n"
#define PAIRS_YMM(i) PAIRS("ymm", i)
#define PAIRS_ZMM(i) PAIRS("zmm", i)
#define PEAK(name, bytes, clear, op)                                                                             \
  double name() {                                                                                                \
    int rounds = kRounds;                                                                                        \
    __asm__ volatile(                                                                                            \
        TWELVE(clear) clear(14) clear(15) "1:\n" TWELVE(op) TWELVE(op) "decl %0\njnz 1b\nvzeroupper\n"           \
        : "+r"(rounds) : : "cc", CLOBBERS);                                                                      \
    return 24.0 * bytes * kRounds;                                                                               \
  }

PEAK(int8_avx512vnni, 64, CLEAR_ZMM, DOT_ZMM)
PEAK(int8_avxvnni, 32, CLEAR_YMM, DOT_VEX)
PEAK(int8_avx512, 64, CLEAR_ZMM, PAIRS_ZMM)
PEAK(int8_avx2, 32, CLEAR_YMM, PAIRS_YMM)
PEAK(fma_avx512, 16, CLEAR_ZMM, FMA_ZMM)
PEAK(fma_avx2, 8, CLEAR_YMM, FMA_YMM)

#elif defined(__aarch64__)

// Twenty-four independent accumulators. Four pipes with a latency of four cycles need sixteen.
#define EIGHT(op, n) op(n##0) op(n##1) op(n##2) op(n##3) op(n##4) op(n##5) op(n##6) op(n##7)
#define TWENTY_FOUR(op) EIGHT(op, ) EIGHT(op, 1) op(8) op(9) op(18) op(19) op(20) op(21) op(22) op(23)
#define CLOBBERS                                                                                                     \
  "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16", "v17", \
      "v18", "v19", "v20", "v21", "v22", "v23", "v30", "v31"
#define CLEAR(i) "movi v" #i ".4s, #0\n"
#define DOT_V(i) "sdot v" #i ".4s, v30.16b, v31.16b\n"
#define MMLA_V(i) "smmla v" #i ".4s, v30.16b, v31.16b\n"
#define MLAL_V(i) "smlal v" #i ".8h, v30.8b, v31.8b\n"
#define FMA_V(i) "fmla v" #i ".4s, v30.4s, v31.4s\n"
#define PEAK(name, lanes, op)                                                                                       \
  double name() {                                                                                                   \
    int rounds = kRounds;                                                                                           \
    __asm__ volatile(TWENTY_FOUR(CLEAR) CLEAR(30) CLEAR(31) "1:\n" TWENTY_FOUR(op) "subs %w0, %w0, #1\nb.ne 1b\n" \
                     : "+r"(rounds) : : "cc", CLOBBERS);                                                            \
    return 24.0 * lanes * kRounds;                                                                                  \
  }

__attribute__((target("arch=armv8.2-a+i8mm"))) PEAK(int8_neon_i8mm, 32, MMLA_V)
__attribute__((target("arch=armv8.2-a+dotprod"))) PEAK(int8_neon_dotprod, 16, DOT_V)
PEAK(int8_neon, 8, MLAL_V)
PEAK(fma_neon, 4, FMA_V)

#endif

// Plain loops, as the compiler vectorizes them for any CPU of this architecture. The operands are volatile, so that the
// compiler cannot compute the results.
constexpr int kPlainLanes = 64;
volatile signed char unknown_byte = 3;
volatile float unknown_float = 1e-3f;

double int8_generic() {
  signed char a[kPlainLanes], b[kPlainLanes];
  int sums[kPlainLanes] = {};
  for (int i = 0; i < kPlainLanes; i++) a[i] = b[i] = unknown_byte;
  for (int round = 0; round < kRounds / 16; round++) {
    for (int i = 0; i < kPlainLanes; i++) sums[i] += a[i] * b[i];
    __asm__ volatile("" : : "r"(sums), "r"(a) : "memory");
  }
  return static_cast<double>(kPlainLanes) * (kRounds / 16);
}

double fma_generic() {
  float sums[kPlainLanes] = {};
  const float a = unknown_float, b = unknown_float;
  for (int round = 0; round < kRounds / 16; round++) {
    for (int i = 0; i < kPlainLanes; i++) sums[i] += a * b * sums[i];
    __asm__ volatile("" : : "r"(sums) : "memory");
  }
  return static_cast<double>(kPlainLanes) * (kRounds / 16);
}

}  // namespace

ArithmeticPiece int8_piece() {
#if defined(__x86_64__)
  if (cpu_features().avx512vnni) return &int8_avx512vnni;
  if (cpu_features().avxvnni) return &int8_avxvnni;
  if (cpu_features().avx512) return &int8_avx512;
  if (cpu_features().avx2) return &int8_avx2;
#elif defined(__aarch64__)
  if (cpu_features().neon_i8mm) return &int8_neon_i8mm;
  if (cpu_features().neon_dotprod) return &int8_neon_dotprod;
  if (cpu_features().neon) return &int8_neon;
#endif
  return &int8_generic;
}

ArithmeticPiece fma_piece() {
#if defined(__x86_64__)
  if (cpu_features().avx512) return &fma_avx512;
  if (cpu_features().avx2) return &fma_avx2;
#elif defined(__aarch64__)
  if (cpu_features().neon) return &fma_neon;
#endif
  return &fma_generic;
}

}  // namespace llamaclust
