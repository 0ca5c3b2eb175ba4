// Errors that the compiler's own checks find (-fsanitize=alignment,bounds,...: what they call is here, no library of theirs is linked), and
// segmentation faults: all of them become messages for Python.
#include <signal.h>
#include <stdio.h>
#include <string.h>

#include "scheduler.h"

#ifdef FASTRES_SANITIZED
namespace emulation {
void install_handlers() {}
void remove_handlers() {}
}  // namespace emulation
#else
#include <ucontext.h>

namespace emulation {
namespace {

struct sigaction before[2];
const void* crash_address;
alignas(16) char handler_stack[16 << 10], crash_stack[64 << 10];
stack_t old_stack;

void crashed() {
  fail("Crash", "segmentation fault at address %p, %s", crash_address, here != nullptr ? place_name(*current).c_str() : "in host code");
}

// Goes on in crashed(), on a stack that certainly has room.
void handle(int, siginfo_t* info, void* context) {
  crash_address = info->si_addr;
#ifdef __x86_64__
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RIP] = reinterpret_cast<greg_t>(&crashed);
  registers[REG_RSP] = reinterpret_cast<greg_t>(crash_stack + sizeof crash_stack - 8);
#else
  (void)context;
  crashed();
#endif
}

}  // namespace

void install_handlers() {
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action{};
  action.sa_sigaction = handle;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
}

void remove_handlers() {
  sigaction(SIGSEGV, &before[0], nullptr);
  sigaction(SIGBUS, &before[1], nullptr);
  sigaltstack(&old_stack, nullptr);
}

namespace {

struct Location {
  const char* file;
  uint32_t line, column;
};
struct TypeName {
  uint16_t kind, info;
  char name[1];
};
struct Mismatch {
  Location at;
  const TypeName* type;
  unsigned char log_alignment, kind;
};

std::string where(const Location& at) {
  return std::string(here != nullptr ? place_name(*current) : "host code") + " (" + at.file + ":" + std::to_string(at.line) + ")";
}

}  // namespace
}  // namespace emulation

using namespace emulation;

extern "C" {

void __ubsan_handle_type_mismatch_v1_abort(const Mismatch* data, uintptr_t address) {
  if (address == 0) fail("Crash", "access through a null pointer, %s", where(data->at).c_str());
  fail("Misaligned", "access to %s at an address that isn't a multiple of %d, %s", data->type->name, 1 << data->log_alignment,
       where(data->at).c_str());
}
void __ubsan_handle_out_of_bounds_abort(const Location* at, uintptr_t index) {
  fail("OutOfBounds", "index %lld of an array, %s", static_cast<long long>(index), where(*at).c_str());
}

#define FASTRES_OVERFLOW(name, what) \
  void __ubsan_handle_##name##_abort(const Location* at, uintptr_t, uintptr_t) { fail("Overflow", what ", %s", where(*at).c_str()); }
FASTRES_OVERFLOW(add_overflow, "a sum is too large for its type")
FASTRES_OVERFLOW(sub_overflow, "a difference is too large for its type")
FASTRES_OVERFLOW(mul_overflow, "a product is too large for its type")
FASTRES_OVERFLOW(negate_overflow, "a negated number is too large for its type")
FASTRES_OVERFLOW(divrem_overflow, "a division by zero, or too large for its type")
FASTRES_OVERFLOW(shift_out_of_bounds, "a shift by more bits than there are")
}
#endif

#ifdef FASTRES_TSAN
// The compiler marks volatile accesses by these calls: they are how a thread waits for another one, so they are no races.
extern "C" {
#define FASTRES_VOLATILE(bytes)                        \
  void __tsan_volatile_read##bytes(void*) {}           \
  void __tsan_volatile_write##bytes(void*) {}          \
  void __tsan_unaligned_volatile_read##bytes(void*) {} \
  void __tsan_unaligned_volatile_write##bytes(void*) {}
FASTRES_VOLATILE(1)
FASTRES_VOLATILE(2)
FASTRES_VOLATILE(4)
FASTRES_VOLATILE(8)
FASTRES_VOLATILE(16)
}
#endif
