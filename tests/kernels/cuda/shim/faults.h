// Accesses outside of memory, and misaligned ones, become errors of the launch.
#pragma once

#include <csetjmp>
#include <csignal>
#include <cstddef>
#include <cstdint>

namespace shim {

inline constexpr size_t kPageBytes = 65536;  // the largest page of any machine

// While one of these lives, the process's own handlers do not.
class Faults {
 public:
  Faults() {
    stack_t stack{};
    stack.ss_sp = handler_stack_;
    stack.ss_size = sizeof handler_stack_;
    sigaltstack(&stack, &stack_before_);
    struct sigaction action {};
    action.sa_handler = caught;
    action.sa_flags = SA_ONSTACK;
    for (int i = 0; i < kSignals; i++) sigaction(kNumbers[i], &action, &before_[i]);
  }
  ~Faults() {
    for (int i = 0; i < kSignals; i++) sigaction(kNumbers[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  Faults(const Faults&) = delete;
  Faults& operator=(const Faults&) = delete;

  // Runs `work`. Returns a description of its fault, or null.
  template <class Work>
  const char* run(Work work) const {
    switch (sigsetjmp(back_, 1)) {
      case 0:
        work();
        return nullptr;
      case SIGILL:
      case SIGTRAP:
        return "an index outside of an array, or an address that is not aligned";
      case SIGFPE:
        return "a division by zero";
      default:
        return "an access outside of every buffer";
    }
  }

 private:
  static void caught(int signal) { siglongjmp(back_, signal); }

  static constexpr int kSignals = 5;
  static constexpr int kNumbers[kSignals] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};
  static inline sigjmp_buf back_;
  alignas(16) static inline uint8_t handler_stack_[65536];
  struct sigaction before_[kSignals];
  stack_t stack_before_{};
};

}  // namespace shim
