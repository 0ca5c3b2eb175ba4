// A program that calls one function with one problem, for the sanitizers, which can't be loaded into Python. Reads the problem and the
// memory that it points into from a file; every piece of memory gets a place of exactly its size, and the problem's pointers follow. What
// the kernels have written goes into a second file. Linked with a test's kernels by tests/emulation/cuda.py.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <string>
#include <vector>

#include "scheduler.h"

extern "C" const char* emulation_run(void (*function)(const void*), const void* problem, const emulation::Settings* how);

namespace {

struct Region {
  uint64_t address, size;  // in the process that wrote the file
  unsigned char *room, *data;
};

void read_exactly(FILE* file, void* to, size_t bytes) {
  if (fread(to, 1, bytes, file) != bytes) {
    fprintf(stderr, "the input is too short\n");
    exit(2);
  }
}

uint64_t read_number(FILE* file) {
  uint64_t number;
  read_exactly(file, &number, sizeof number);
  return number;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  FILE* in = fopen(arguments[1], "rb");
  if (in == nullptr) return 2;
  std::string name(read_number(in), 0);
  read_exactly(in, name.data(), name.size());
  emulation::Settings settings{};
  read_exactly(in, &settings, sizeof settings);
  std::vector<uint64_t> problem(read_number(in) / 8);
  read_exactly(in, problem.data(), problem.size() * 8);
  std::vector<Region> regions(read_number(in));
  for (Region& r : regions) {
    r.address = read_number(in);
    r.size = read_number(in);
    const size_t before = r.address % 128;  // kernels choose by alignment
    void* room = nullptr;
    if (posix_memalign(&room, 128, before + r.size) != 0) return 2;
    r.room = static_cast<unsigned char*>(room);
    r.data = r.room + before;
    read_exactly(in, r.data, r.size);
  }
  fclose(in);
  for (uint64_t& word : problem) {
    for (const Region& r : regions) {
      if (word >= r.address && word < r.address + r.size) {
        word = reinterpret_cast<uint64_t>(r.data) + (word - r.address);
        break;
      }
    }
  }
  void* function = dlsym(RTLD_DEFAULT, name.c_str());
  if (function == nullptr) {
    fprintf(stderr, "there is no function %s\n", name.c_str());
    return 2;
  }
  const char* error = emulation_run(reinterpret_cast<void (*)(const void*)>(function), problem.data(), &settings);
  if (error != nullptr) {
    fprintf(stderr, "EMULATION %s\n", error);
    _Exit(3);  // threads that never ended have used what main would destroy
  }
  FILE* out = fopen(arguments[2], "wb");
  if (out == nullptr) return 2;
  for (const Region& r : regions) fwrite(r.data, 1, r.size, out);
  fclose(out);
  for (const Region& r : regions) free(r.room);
  return 0;
}
