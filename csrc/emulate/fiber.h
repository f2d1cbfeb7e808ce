// Fibers: a stack each, switched by hand on x86-64 and by ucontext elsewhere, announced to the sanitizers.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#include <ucontext.h>
#define EMU_USES_UCONTEXT 1
#endif

#if defined(EMU_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#if defined(EMU_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
}
#endif

namespace emu {

#if defined(EMU_ASAN) || defined(EMU_TSAN)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kPage = 4096;

#if defined(EMU_USES_UCONTEXT)
using Context = ucontext_t;
inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }
#else
using Context = void*;  // the stack pointer; everything else lies on the stack
extern "C" void emu_switch_stacks(void** save, void* load);
asm(R"(
.text
.p2align 4
.globl emu_switch_stacks
.hidden emu_switch_stacks
.type emu_switch_stacks, @function
emu_switch_stacks:
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
.size emu_switch_stacks, .-emu_switch_stacks
)");
inline void switch_context(Context& from, Context& to) { emu_switch_stacks(&from, to); }
#endif

struct Fiber {
  Context context{};
  char* stack = nullptr;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};

// The scheduler's side of a switch.
struct Scheduler {
  Context context{};
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* asan_fake_stack = nullptr;
  void* tsan_fiber = nullptr;
};
inline Scheduler scheduler;

inline void enter_scheduler() {
#if defined(EMU_TSAN)
  scheduler.tsan_fiber = __tsan_get_current_fiber();
#endif
}

using Entry = void (*)();

// Where a new fiber begins: the sanitizer must hear of the switch before anything else happens.
inline Entry fiber_entry = nullptr;
[[noreturn]] inline void fiber_begin() {
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
#endif
  fiber_entry();
  std::abort();
}

// Prepares a fiber that is new, has returned, or was abandoned.
inline void start_fiber(Fiber& f, Entry entry) {
  fiber_entry = entry;
  if (!f.stack) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
      std::perror("the emulator cannot map a stack");
      std::abort();
    }
    f.stack = static_cast<char*>(memory);
#if defined(EMU_TSAN)
    f.tsan_fiber = __tsan_create_fiber(0);
#endif
  }
#if defined(EMU_USES_UCONTEXT)
  getcontext(&f.context);
  f.context.uc_stack.ss_sp = f.stack + kPage;
  f.context.uc_stack.ss_size = kStack - kPage;
  f.context.uc_link = nullptr;
  makecontext(&f.context, reinterpret_cast<void (*)()>(fiber_begin), 0);
#else
  auto* top = reinterpret_cast<uint64_t*>(f.stack + kStack);
  *--top = 0;  // the return address of fiber_begin: at its first instruction the stack pointer is 8 mod 16
  *--top = reinterpret_cast<uint64_t>(&fiber_begin);
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  f.context = top;
#endif
}

// From the scheduler into a fiber, until it leaves.
inline void enter_fiber(Fiber& f) {
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(&scheduler.asan_fake_stack, f.stack + kPage, kStack - kPage);
#endif
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(f.tsan_fiber, 1);  // 1: the switch itself orders nothing
#endif
  switch_context(scheduler.context, f.context);
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(scheduler.asan_fake_stack, nullptr, nullptr);
#endif
}

// From a fiber back into the scheduler; for_good when it will not be entered again.
inline void leave_fiber(Fiber& f, [[maybe_unused]] bool for_good) {
#if defined(EMU_ASAN)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &f.asan_fake_stack, scheduler.stack, scheduler.stack_bytes);
#endif
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan_fiber, 1);
#endif
  switch_context(f.context, scheduler.context);
#if defined(EMU_ASAN)
  __sanitizer_finish_switch_fiber(f.asan_fake_stack, &scheduler.stack, &scheduler.stack_bytes);
#endif
}

// After a failed launch: whatever the sanitizers remember of an abandoned fiber must not reach the next launch.
inline void forget_fiber([[maybe_unused]] Fiber& f) {
#if defined(EMU_ASAN)
  __asan_unpoison_memory_region(f.stack, kStack);
#endif
#if defined(EMU_TSAN)
  __tsan_switch_to_fiber(f.tsan_fiber, 0);  // there and back: what it did comes before what follows
  __tsan_switch_to_fiber(scheduler.tsan_fiber, 0);
#endif
}

}  // namespace emu
