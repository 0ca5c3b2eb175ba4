// What the parts of the runtime share: fibers, blocks, settings. Kernels don't include this.
#pragma once

#include <string>
#include <vector>

#include "launch.h"

namespace emulation {

enum class Order : int { forward, reversed, random, starving };  // starving: one warp waits while any other can go on
enum class Landing : int { early, late, random };                // of asynchronous copies: at their issue, at the wait for their group

struct Settings {  // tests/emulation/cuda.py has the same fields
  int record;
  Order order;
  Landing landing;
  uint64_t seed;
};

struct Arrival {  // of a lane at a collective
  Collective what;
  uint32_t mask;
  uint64_t value;  // in and out
  int argument, width;
  void* out;
  const void* a;
  const void* b;
};

struct Thread;
constexpr int kGroups = 16;  // of copies that ThreadSanitizer tells apart

struct Block {
  dim3 index;
  Thread* threads = nullptr;
  unsigned size = 0, waiting = 0, left = 0, barriers = 0;
  const char* file = nullptr;  // of the barrier that some wait at
  int line = 0;
  unsigned char* shared = nullptr;
  std::vector<unsigned char> statics;  // static shared memory while another block runs
  char sync[2] = {};                   // what ThreadSanitizer knows barriers by, in turn
};

struct Warp {
  Thread* lanes[32];
  uint32_t waiting, left;  // lanes at a collective; lanes that have left the kernel, or never were
  char sync[2];
};

struct Thread {
  enum State : unsigned char { ready, at_barrier, at_collective, done };
  Place place;
  void* stack_pointer = nullptr;
  unsigned char* stack = nullptr;
  unsigned number = 0, index = 0;  // among all fibers; in its block
  State state = done;
  const char* file = nullptr;
  int line = 0;
  Block* block = nullptr;
  Warp* warp = nullptr;
  Arrival arrival{};
  std::vector<Copy> copies;  // under way, oldest first from `landed` on
  std::vector<int> groups;
  size_t landed = 0;
  int committed = 0, waited = 0;  // groups
  void* fiber = nullptr;          // ThreadSanitizer's
  void* copier = nullptr;         // the fiber that makes this one's asynchronous copies
  char issue_sync = 0, copy_sync[kGroups] = {};
  void* fake_stack = nullptr;  // AddressSanitizer's
  unsigned syncs = 0;          // of its warp
};

extern Thread* current;
extern Thread main_thread;
extern Settings settings;
extern const char* kernel_name;
constexpr unsigned kLanes = 32;
constexpr size_t kStackBytes = 256 << 10;

// ---- fibers.cpp -----------------------------------------------------------------------------------------------------------------------
void prepare_schedule();  // by the settings
// Makes room for that many blocks of `block_size` threads at once.
void reserve(unsigned blocks);
// Runs the blocks of the grid from number `first` on, `count` of them at once, until all threads have left or one has failed.
void run_blocks(uint64_t first, unsigned count, void (*body)(const void*), const void* arguments);
Block& block_at(unsigned slot);
uint64_t random_number();
void set_ready(Thread& thread);
void wait_in(Thread::State state, const char* file, int line);  // until another thread makes this one ready
void switch_to(Thread& thread);
std::string place_name(const Thread& thread);
void release(void* object);  // what this thread did happens before ...
void acquire(void* object);  // ... what that one does after

// ---- shared.cpp -----------------------------------------------------------------------------------------------------------------------
void find_statics();
void size_shared(size_t dynamic_bytes, bool cooperative);  // at the start of a launch
void poison(Block& block);
void swap_statics(Block* next);  // where several blocks run at once each has static memory of its own
void check_canary(const Block& block);
void free_shared(Block& block);
bool in_shared(const void* address, size_t bytes);

// ---- checks.cpp -----------------------------------------------------------------------------------------------------------------------
void install_handlers();
void remove_handlers();

}  // namespace emulation
