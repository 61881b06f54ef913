#include "runtime/levels.h"

#include <cerrno>
#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <asm/prctl.h>
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

// The build defines LLAMACLUST_LEVELS(X) as a list of X(name, attention, base), one for each compiled level
// (arithmetic.cmake). `attention` is the level whose attention code a level shares, `base` the level whose code it
// shares for all but products and attention. The tables are copied in this file because code in level/ must not run
// before the CPU is known to support it.
#define DECLARE(name, attention, base)     \
  namespace llamaclust::name {             \
  extern const MatmulOps matmul_ops;       \
  extern const VectorOps vector_ops;       \
  extern const AttentionOps attention_ops; \
  extern const SamplerOps sampler_ops;     \
  extern const QuantizeOps quantize_ops;   \
  extern const StateOps state_ops;         \
  extern const ScanOps scan_ops;           \
  }

LLAMACLUST_LEVELS(DECLARE)

namespace llamaclust {

#if defined(__x86_64__)

namespace {

bool bit(unsigned int word, int index) { return (word >> index & 1) != 0; }

// Returns XCR0, the register files that the operating system saves at a task switch. Wide registers that it does not
// save would fault or lose their upper parts, even on a CPU that has them.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// AMX tile registers. The system saves them only for processes that have requested and obtained the permission.
constexpr int kTileConfig = 17, kTileData = 18;
#ifndef ARCH_GET_XCOMP_SUPP
#define ARCH_GET_XCOMP_SUPP 0x1021
#define ARCH_REQ_XCOMP_PERM 0x1023
#endif
bool system_has_tiles(uint64_t saved) {
  uint64_t supported = 0;
  return (saved >> kTileConfig & saved >> kTileData & 1) != 0 &&
         syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &supported) == 0 && (supported >> kTileData & 1) != 0;
}

// Returns the error number with which the system refuses tile registers to this process, or 0 if it permits them.
// Requests the permission once.
int tiles_error() {
  static const int error = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, kTileData) == 0 ? 0 : errno;
  return error;
}

}  // namespace

CpuFeatures cpu_features() {
  unsigned int a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !bit(c, 27)) return {};
  const bool fma = bit(c, 12), avx = bit(c, 28), f16c = bit(c, 29);
  const uint64_t saved = saved_state();
  const bool ymm = (saved & 0x06) == 0x06, zmm = (saved & 0xe6) == 0xe6;
  CpuFeatures features;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return features;
  features.avx2 = ymm && avx && fma && f16c && bit(b, 5);
  features.avx512 = features.avx2 && zmm && bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31);
  features.avx512vnni = features.avx512 && bit(c, 11);
  features.avx512vbmi = features.avx512vnni && bit(c, 1);
  features.amx = features.avx512vbmi && bit(d, 24) && bit(d, 25) && system_has_tiles(saved);
  features.avxvnni = features.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4);
  return features;
}

#elif defined(__aarch64__)

CpuFeatures cpu_features() {
  const unsigned long has = getauxval(AT_HWCAP);
  CpuFeatures features;
  features.neon = (has & HWCAP_ASIMD) != 0;
  features.neon_dotprod = features.neon && (has & HWCAP_ASIMDDP) != 0;
  features.neon_i8mm = features.neon_dotprod && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0;
  return features;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

std::string refusal([[maybe_unused]] const std::string& level) {
#if defined(__x86_64__)
  if (level == "amx" && cpu_features().amx && tiles_error() != 0)
    return "the system does not permit tile registers (error " + std::to_string(tiles_error()) + ")";
#endif
  return "";
}

std::vector<Level> available_levels() {
  CpuFeatures can = cpu_features();
  can.amx = can.amx && refusal("amx").empty();
  std::vector<Level> levels;
#define ADD(name, attention, base) \
  if (can.name)         \
    levels.push_back({#name, name::matmul_ops, base::vector_ops, attention::attention_ops, base::sampler_ops, \
                      base::quantize_ops, base::state_ops, base::scan_ops});
  LLAMACLUST_LEVELS(ADD)
  return levels;
}

Level find_level(const std::string& name) {
  const std::vector<Level> levels = available_levels();
  if (name.empty() && !levels.empty()) return levels.back();
  std::string names;
  for (const Level& level : levels) {
    if (name == level.name) return level;
    names += (names.empty() ? "" : ", ") + std::string(level.name);
  }
  const std::string why = refusal(name);
  throw std::invalid_argument("feature level " + name + " is not available here" + (why.empty() ? "" : ": " + why) +
                              "; available: " + names);
}

}  // namespace llamaclust
