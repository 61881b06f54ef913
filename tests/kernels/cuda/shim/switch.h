// From one stack to another: only what a call has to keep is saved. By hand on x86-64 and ARM, by the C library elsewhere
// and where LLAMACLUST_SHIM_UCONTEXT asks for it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace shim {

#if !defined(LLAMACLUST_SHIM_UCONTEXT) && (defined(__x86_64__) || defined(__aarch64__))

struct Context {
  void* stack_pointer;
};

extern "C" void llamaclust_shim_switch(void** from, void* to);

inline void switch_to(Context& from, Context& to) { llamaclust_shim_switch(&from.stack_pointer, to.stack_pointer); }

#if defined(__x86_64__)
asm(R"(
.text
.globl llamaclust_shim_switch
llamaclust_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
inline constexpr int kSavedWords = 6, kEntryWord = 6, kFrameWords = 8;  // the last: where entry would return to
#else
asm(R"(
.text
.globl llamaclust_shim_switch
llamaclust_shim_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
inline constexpr int kEntryWord = 11, kFrameWords = 20;
#endif

// A context that calls entry() when it is switched to; entry must not return.
inline void prepare(Context& context, uint8_t* stack, size_t bytes, void (*entry)()) {
  uint64_t* frame = reinterpret_cast<uint64_t*>(stack + bytes) - kFrameWords;
  for (int i = 0; i < kFrameWords; i++) frame[i] = 0;
  frame[kEntryWord] = reinterpret_cast<uint64_t>(entry);
  context.stack_pointer = frame;
}

#else
}
#include <ucontext.h>
namespace shim {

struct Context {
  ucontext_t context;
};

inline void switch_to(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Context& context, uint8_t* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = stack;
  context.context.uc_stack.ss_size = bytes;
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}

#endif

}  // namespace shim
