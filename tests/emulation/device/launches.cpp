// Launches: run, or recorded for Python; what Python calls; errors.
#include <cxxabi.h>
#include <dlfcn.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include "scheduler.h"

namespace emulation {

const char* kernel_name = "";

namespace {

std::string error;
jmp_buf escape;
bool inside;  // a function that Python called
unsigned resident_blocks;

struct Recorded {
  std::string name;
  LaunchShape shape;
  std::vector<unsigned char> bytes;
  std::vector<size_t> places;  // offset and size of each parameter
};
std::vector<Recorded> recorded;

void check_shape(const LaunchShape& s) {
  const uint64_t size = static_cast<uint64_t>(s.block.x) * s.block.y * s.block.z;
  if (size == 0 || size > 1024) fail("EmulationError", "a block of %llu threads", static_cast<unsigned long long>(size));
  if (s.grid.x == 0 || s.grid.y == 0 || s.grid.z == 0 || s.grid.x > 0x7fffffffu || s.grid.y > 65535 || s.grid.z > 65535) {
    fail("EmulationError", "a grid of (%u, %u, %u) blocks", s.grid.x, s.grid.y, s.grid.z);
  }
  if (s.shared_bytes > 163 << 10) fail("SharedMemoryError", "%zu bytes of dynamic shared memory", s.shared_bytes);
}

void free_blocks() {
  for (; resident_blocks != 0; --resident_blocks) free_shared(block_at(resident_blocks - 1));
}

}  // namespace

void fail(const char* kind, const char* format, ...) {
  char text[2000];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  error = std::string(kind) + ": " + text;
  if (*kernel_name) {
    char* readable = abi::__cxa_demangle(kernel_name, nullptr, nullptr, nullptr);
    error += std::string(", in ") + (readable != nullptr ? readable : kernel_name);
    free(readable);
  }
  if (!inside) {
    fprintf(stderr, "%s\n", error.c_str());
    abort();
  }
  if (here == nullptr) longjmp(escape, 1);
  release(&error);
  switch_to(main_thread);
  abort();
}

void launch_raw(const void* kernel, const LaunchShape& shape, void (*call)(const void*), const void* arguments, const Parameters& p) {
  Dl_info info{};
  kernel_name = dladdr(const_cast<void*>(kernel), &info) != 0 && info.dli_sname != nullptr ? info.dli_sname : "";
  check_shape(shape);
  if (settings.record) {
    if (*kernel_name == 0 || info.dli_saddr != kernel) fail("EmulationError", "a kernel without an external name can't be recorded");
    recorded.push_back({kernel_name, shape, {p.bytes, p.bytes + p.total}, {p.places, p.places + 2 * p.count}});
    return;
  }
  grid_size = shape.grid;
  block_size = shape.block;
  const uint64_t total = static_cast<uint64_t>(grid_size.x) * grid_size.y * grid_size.z;
  const unsigned at_once = shape.cooperative ? static_cast<unsigned>(total) : 1;
  size_shared(shape.shared_bytes, shape.cooperative);
  reserve(at_once);
  resident_blocks = at_once;
  for (uint64_t first = 0; first < total; first += at_once) {
    run_blocks(first, at_once, call, arguments);
    acquire(&error);
    if (!error.empty()) longjmp(escape, 1);
    for (unsigned n = 0; n < at_once; ++n) check_canary(block_at(n));
  }
  free_blocks();
  kernel_name = "";
}

}  // namespace emulation

// ---- What Python calls ----------------------------------------------------------------------------------------------------------------
#pragma GCC visibility push(default)
extern "C" {

using namespace emulation;

// Calls function(problem), whose launches run or are recorded. The result is null, or "Kind: what went wrong".
const char* emulation_run(void (*function)(const void*), const void* problem, const Settings* how) {
  settings = *how;
  prepare_schedule();
  error.clear();
  recorded.clear();
  kernel_name = "";
  here = nullptr;
  inside = true;
  find_statics();
  install_handlers();
  if (setjmp(escape) == 0) function(problem);
  remove_handlers();
  inside = false;
#ifdef FASTRES_TSAN
  if (!error.empty()) return error.c_str();  // memory that threads which never ended have used stays
#endif
  free_blocks();
  return error.empty() ? nullptr : error.c_str();
}

int emulation_launches() { return static_cast<int>(recorded.size()); }

struct LaunchRecord {
  const char* name;
  unsigned grid[3], block[3];
  uint64_t shared_bytes, parameters, bytes_size;
  const unsigned char* bytes;
  const size_t* places;
  int cooperative;
};

void emulation_launch(int number, LaunchRecord* out) {
  const Recorded& r = recorded[static_cast<size_t>(number)];
  const dim3 g = r.shape.grid, b = r.shape.block;
  *out = {r.name.c_str(), {g.x, g.y, g.z}, {b.x, b.y, b.z}, r.shape.shared_bytes, r.places.size() / 2,
          r.bytes.size(), r.bytes.data(),  r.places.data(), r.shape.cooperative};
}
}
#pragma GCC visibility pop
