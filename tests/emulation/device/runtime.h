// What kernel code asks of the runtime. Everything that touches a kernel's memory for a thread is here, inline, so that ThreadSanitizer
// and AddressSanitizer see it as that thread's access; the runtime itself (device/*.cpp) is compiled without them.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// Where a call stands in the source.
#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

struct Place {
  dim3 thread, block;
};
extern const Place* here;  // of the thread that runs
extern dim3 grid_size, block_size;

// Ends the launch; the message goes to Python. `kind`: a class of tests/emulation/errors.py.
[[noreturn]] void fail(const char* kind, const char* format, ...) __attribute__((format(printf, 2, 3)));

unsigned char* dynamic_shared();
void barrier(EMULATION_SITE);
void yield();  // lets the other threads go on: for loops that wait for them
void fence();

// ---- Warps ----------------------------------------------------------------------------------------------------------------------------
enum class Collective : int { sync, index, exclusive_or, down, up, ballot, any, all, matrices, product };
extern const char* const collective_names[];

// Every lane of `mask` must come to the same call; the last one does the work for all. Returns this lane's result.
uint64_t collective(Collective what, uint32_t mask, uint64_t value, int argument, int width, const char* file, int line);

template <class T>
T shuffle(Collective what, uint32_t mask, T value, int argument, int width, const char* file, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = collective(what, mask, bits, argument, width, file, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

// d += a·b of a warp; see kernels/common/cuda_device.cuh for who holds what.
void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* shape, EMULATION_SITE);

struct alignas(16) Row {
  uint32_t x[4];
};
// Distributes the rows that the lanes have read: lane l has row l % 8 of matrix l / 8.
void exchange_rows(uint32_t (&r)[4], const Row& row, bool transposed, const char* file, int line);
void check_shared(const void* shared, int bytes, const char* what, const char* file, int line);

inline void load_matrices(uint32_t (&r)[4], const void* shared, bool transposed, EMULATION_SITE) {
  check_shared(shared, 16, "a row of load_matrices", file, line);
  const Row row = *static_cast<const Row*>(shared);
  exchange_rows(r, row, transposed, file, line);
}

// ---- Asynchronous copies --------------------------------------------------------------------------------------------------------------
struct Copy {
  void* shared;
  const void* global;
  int bytes;
  bool valid;
};
// Whether the copy lands at once; if not, the runtime keeps it.
bool issue(const Copy& copy, const char* file, int line);
void commit_copies();
// The next copy that has to land before at most `groups` groups of this thread are left under way; null: no more.
const Copy* next_landing(int groups);
// ThreadSanitizer: what is done between these two is another thread's doing, which waits for this one, and for which this one waits only
// in next_landing. `caller`: where reports say it was called.
void begin_copy(void* caller);
void end_copy();

#define EMULATION_INLINE inline __attribute__((always_inline))

// Values only, nothing in memory of the thread's own: that would race with the thread.
template <class T>
EMULATION_INLINE void land_as(void* shared, const void* global, bool valid) {
  *static_cast<T*>(shared) = valid ? *static_cast<const T*>(global) : T{0};
}
EMULATION_INLINE void land(void* shared, const void* global, int bytes, bool valid) {
  if (bytes == 16) land_as<unsigned __int128>(shared, global, valid);
  if (bytes == 8) land_as<uint64_t>(shared, global, valid);
  if (bytes == 4) land_as<uint32_t>(shared, global, valid);
}

// Until it lands, the target is poisoned: nobody may use what is there.
EMULATION_INLINE void copy_async(void* shared, const void* global, int bytes, bool valid, EMULATION_SITE) {
  if (!issue({shared, global, bytes, valid}, file, line)) {
    memset(shared, 0xff, static_cast<size_t>(bytes));
    return;
  }
#ifdef FASTRES_TSAN
  begin_copy(__builtin_return_address(0));
  land(shared, global, bytes, valid);
  end_copy();
#else
  land(shared, global, bytes, valid);
#endif
}
EMULATION_INLINE void wait_copies(int groups) {
  while (const Copy* copy = next_landing(groups)) land(copy->shared, copy->global, copy->bytes, copy->valid);
}

}  // namespace emulation
