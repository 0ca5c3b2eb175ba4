// Switching from one fiber to another, and what the sanitizers have to be told about it.
#pragma once

#include "scheduler.h"

#ifndef __x86_64__
#include <ucontext.h>
#endif

#ifdef FASTRES_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* object);
void __tsan_release(void* object);
void __tsan_func_entry(void* caller);
void __tsan_func_exit();
}
#endif
#ifdef FASTRES_ASAN
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* size);
void __asan_unpoison_memory_region(const void* address, size_t size);
}
#endif

#ifdef __x86_64__
// Keeps what a called function has to keep on the old stack and takes it from the new one. No system call, unlike swapcontext.
extern "C" void emulation_switch(void** old_stack, void* new_stack);
#endif

namespace emulation {

inline void sanitizer_release(void* object) {
#ifdef FASTRES_TSAN
  __tsan_release(object);
#else
  (void)object;
#endif
}
inline void sanitizer_acquire(void* object) {
#ifdef FASTRES_TSAN
  __tsan_acquire(object);
#else
  (void)object;
#endif
}

inline void main_fiber(Thread& main) {
#ifdef FASTRES_TSAN
  main.fiber = __tsan_get_current_fiber();
#endif
#ifndef __x86_64__
  if (main.stack_pointer == nullptr) main.stack_pointer = new ucontext_t;
#endif
  (void)main;
}

// Everything that a fiber is before it has run: an empty stack, at whose end it returns to `enter`.
inline void prepare_fiber(Thread& t, void (*enter)()) {
  // Tops of stacks at equal distances would share few lines of the caches.
  unsigned char* top = t.stack + kStackBytes - t.number % 61 * 192;
#ifdef __x86_64__
  void** end = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) / 16 * 16);
  end[-1] = nullptr;
  end[-2] = reinterpret_cast<void*>(enter);
  t.stack_pointer = end - 8;  // six registers
#else
  if (t.stack_pointer == nullptr) t.stack_pointer = new ucontext_t;
  ucontext_t* context = static_cast<ucontext_t*>(t.stack_pointer);
  getcontext(context);
  context->uc_stack.ss_sp = t.stack;
  context->uc_stack.ss_size = static_cast<size_t>(top - t.stack);
  context->uc_link = nullptr;
  makecontext(context, enter, 0);
#endif
#ifdef FASTRES_TSAN
  if (t.fiber == nullptr) t.fiber = __tsan_create_fiber(0);
#endif
#ifdef FASTRES_ASAN
  __asan_unpoison_memory_region(t.stack, kStackBytes);
  t.fake_stack = nullptr;
#endif
}

#ifdef FASTRES_ASAN
inline const void* main_bottom;
inline size_t main_size;
#endif

// The first thing on a new fiber.
inline void arrived_on_fiber(Thread& t) {
#ifdef FASTRES_ASAN
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(t.fake_stack, &bottom, &size);
  if (main_bottom == nullptr) main_bottom = bottom, main_size = size;
#endif
  (void)t;
}

inline void switch_fiber(Thread& from, Thread& to) {
#ifdef FASTRES_TSAN
  __tsan_switch_to_fiber(to.fiber, 1);  // 1: no synchronisation
#endif
#ifdef FASTRES_ASAN
  if (to.stack != nullptr) {
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, kStackBytes);
  } else {
    __sanitizer_start_switch_fiber(&from.fake_stack, main_bottom, main_size);
  }
#endif
#ifdef __x86_64__
  emulation_switch(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(static_cast<ucontext_t*>(from.stack_pointer), static_cast<ucontext_t*>(to.stack_pointer));
#endif
#ifdef FASTRES_ASAN
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

}  // namespace emulation
