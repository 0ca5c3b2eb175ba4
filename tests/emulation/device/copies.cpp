// Asynchronous copies from global to shared memory.
#include "scheduler.h"
#include "switch.h"

namespace emulation {

bool issue(const Copy& copy, const char* file, int line) {
  check_shared(copy.shared, copy.bytes, "the target of copy_async", file, line);
  if (copy.valid && reinterpret_cast<uintptr_t>(copy.global) % static_cast<uintptr_t>(copy.bytes) != 0) {
    fail("Misaligned", "copy_async: the source isn't a multiple of %d bytes, %s (%s:%d)", copy.bytes, place_name(*current).c_str(), file,
         line);
  }
#ifdef FASTRES_TSAN
  return true;
#endif
  Thread& t = *current;
  if (settings.landing == Landing::early || (settings.landing == Landing::random && random_number() % 2 == 0)) return true;
  t.copies.push_back(copy);
  t.groups.push_back(t.committed);
  return false;
}

void commit_copies() { ++current->committed; }

const Copy* next_landing(int groups) {
  Thread& t = *current;
  while (t.waited < t.committed - groups) acquire(&t.copy_sync[t.waited++ % kGroups]);
  if (t.landed < t.copies.size() && t.groups[t.landed] < t.committed - groups) return &t.copies[t.landed++];
  if (t.landed == t.copies.size()) {
    t.copies.clear();
    t.groups.clear();
    t.landed = 0;
  }
  return nullptr;
}

// A race is found on any schedule: the copy, made here at once, is ordered after its issue, and before nothing but the wait for its group.
void begin_copy(void* caller) {
#ifdef FASTRES_TSAN
  Thread& t = *current;
  if (t.copier == nullptr) t.copier = __tsan_create_fiber(0);
  release(&t.issue_sync);
  __tsan_switch_to_fiber(t.copier, 1);
  acquire(&t.issue_sync);
  __tsan_func_entry(caller);
#else
  (void)caller;
#endif
}

void end_copy() {
#ifdef FASTRES_TSAN
  Thread& t = *current;
  __tsan_func_exit();
  release(&t.copy_sync[t.committed % kGroups]);
  __tsan_switch_to_fiber(t.fiber, 1);
#endif
}

}  // namespace emulation
