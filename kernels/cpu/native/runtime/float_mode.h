// Sets the floating-point environment of native calls: round to nearest, keep subnormals, no traps. The host program
// may have set another one (some libraries flush subnormals to zero), which would change results.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#include <xmmintrin.h>
#elif !defined(__aarch64__)
#include <cfenv>
#endif

namespace llamaclust {

class FloatMode {
 public:
  FloatMode() : before_(read()) { write(kDefault); }
  ~FloatMode() { write(before_); }
  FloatMode(const FloatMode&) = delete;
  FloatMode& operator=(const FloatMode&) = delete;

 private:
#if defined(__x86_64__)
  using Word = unsigned int;
  static constexpr Word kDefault = 0x1f80;
  static Word read() { return _mm_getcsr(); }
  static void write(Word word) { _mm_setcsr(word); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kDefault = 0;
  static Word read() {
    Word word;
    __asm__ volatile("mrs %0, fpcr" : "=r"(word));
    return word;
  }
  static void write(Word word) { __asm__ volatile("msr fpcr, %0" : : "r"(word)); }
#else
  struct Word {
    bool is_default;
    std::fenv_t environment;
  };
  static constexpr Word kDefault{true, {}};
  static Word read() {
    Word word{};
    std::fegetenv(&word.environment);
    return word;
  }
  static void write(const Word& word) { std::fesetenv(word.is_default ? FE_DFL_ENV : &word.environment); }
#endif
  Word before_;
};

}  // namespace llamaclust
