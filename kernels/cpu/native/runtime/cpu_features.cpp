#include "runtime/cpu_features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace llamaclust {

#if defined(__x86_64__)

namespace {

bool bit(unsigned int word, int index) { return (word >> index & 1) != 0; }

// Which register files the operating system saves at a task switch; without it, wide registers would lose their upper
// parts or fault, whatever the chip can do.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
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
  features.avxvnni = features.avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && bit(a, 4);
  return features;
}

#elif defined(__aarch64__)

CpuFeatures cpu_features() {
  const unsigned long has = getauxval(AT_HWCAP);
  CpuFeatures features;
  features.neon = (has & HWCAP_ASIMD) != 0;
  features.neon_dotprod = features.neon && (has & HWCAP_ASIMDDP) != 0;
  return features;
}

#else

CpuFeatures cpu_features() { return {}; }

#endif

}  // namespace llamaclust
