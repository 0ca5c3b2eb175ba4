// The fibers of a launch: who runs next, barriers, the blocks that run at once.
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>

#include "scheduler.h"
#include "switch.h"

#ifdef __x86_64__
asm(R"(
  .text
  .hidden emulation_switch
  .globl emulation_switch
  .type emulation_switch, @function
emulation_switch:
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
  .size emulation_switch, . - emulation_switch
)");
#endif

namespace emulation {

const Place* here;
dim3 grid_size, block_size;
Thread* current;
Thread main_thread;
Settings settings;

namespace {

constexpr int kPatience = 64;  // passes that a warp is starved for
constexpr int64_t kSpins = 2'000'000;

std::vector<std::unique_ptr<Thread>> threads;
std::vector<std::unique_ptr<Block>> blocks;
std::vector<Warp> warps;
std::vector<uint32_t> ready;  // a bit a thread, a word a warp
unsigned warps_of_block, used, unfinished;
unsigned cursor;
size_t starved_first, starved_last;
int64_t patience, spins;
uint64_t random_state;
char start_sync, end_sync, fence_sync;
void (*body)(const void*);
const void* body_arguments;

// ---- Who runs next -------------------------------------------------------------------------------------------------------------------
unsigned lowest(uint32_t word) { return static_cast<unsigned>(__builtin_ctz(word)); }

// The first ready thread from `from` on, around, outside of the starved warps; `used` if there is none.
unsigned find_forward(unsigned from) {
  const unsigned words = used / kLanes;
  for (unsigned step = 0; step <= words; ++step) {
    const unsigned word = (from / kLanes + step) % words;
    if (word >= starved_first && word < starved_last) continue;
    uint32_t bits = ready[word];
    if (step == 0) bits &= ~0u << from % kLanes;
    if (step == words) bits &= ~(~0u << from % kLanes);
    if (bits != 0) return word * kLanes + lowest(bits);
  }
  return used;
}

unsigned find_backward(unsigned from) {
  const unsigned words = used / kLanes;
  for (unsigned step = 0; step <= words; ++step) {
    const unsigned word = (from / kLanes + words - step % words) % words;
    uint32_t bits = ready[word];
    if (step == 0) bits &= ~0u >> (kLanes - 1 - from % kLanes);
    if (step == words) bits &= ~(~0u >> (kLanes - 1 - from % kLanes));
    if (bits != 0) return word * kLanes + kLanes - 1 - static_cast<unsigned>(__builtin_clz(bits));
  }
  return used;
}

void choose_starved() {
  patience = static_cast<int64_t>(kPatience) * used;
  const size_t blocks_here = used / kLanes / warps_of_block;
  if (blocks_here > 1 && random_number() % 2 == 0) {  // a whole block
    starved_first = random_number() % blocks_here * warps_of_block;
    starved_last = starved_first + warps_of_block;
  } else {
    starved_first = random_number() % (used / kLanes);
    starved_last = starved_first + 1;
  }
}

unsigned pick() {
  if (settings.order == Order::forward) return cursor = find_forward((cursor + 1) % used);
  if (settings.order == Order::reversed) return cursor = find_backward((cursor + used - 1) % used);
  const unsigned from = static_cast<unsigned>(random_number() % used);
  if (settings.order == Order::random) return find_forward(from);
  if (--patience < 0) choose_starved();
  const unsigned found = find_forward(from);
  if (found != used) return found;
  const size_t first = starved_first, last = starved_last;
  starved_first = starved_last = 0;  // nobody else can go on
  const unsigned only = find_forward(from);
  starved_first = first, starved_last = last;
  return only;
}

[[noreturn]] void report_deadlock() {
  std::string text;
  int named = 0;
  for (unsigned n = 0; n < used && named < 2; ++n) {
    const Thread& t = *threads[n];
    if (t.state == Thread::done || t.state == Thread::ready || (named == 1 && t.line == current->line && t.file == current->file)) continue;
    text += (named++ ? "; " : "") + place_name(t) + " waits at " +
            (t.state == Thread::at_barrier ? "a barrier" : collective_names[static_cast<int>(t.arrival.what)]) + " (" + t.file + ":" +
            std::to_string(t.line) + ")";
  }
  fail("Divergence", "no thread can go on: %s", text.c_str());
}

void reschedule() {
  const unsigned next = pick();
  if (next == used) report_deadlock();
  switch_to(*threads[next]);
}

[[noreturn]] void enter() {
  arrived_on_fiber(*current);
  acquire(&start_sync);
  body(body_arguments);
  Thread& t = *current;
  t.state = Thread::done;
  ready[t.number / kLanes] &= ~(1u << t.number % kLanes);
  spins = 0;
  Block& b = *t.block;
  ++b.left;
  if (b.waiting != 0) {
    fail("Divergence", "%s leaves the kernel while others wait at the barrier %s:%d", place_name(t).c_str(), b.file, b.line);
  }
  t.warp->left |= 1u << t.number % kLanes;
  for (uint32_t waiting = t.warp->waiting; waiting != 0; waiting &= waiting - 1) {
    const Thread& other = *t.warp->lanes[lowest(waiting)];
    if (other.arrival.mask >> t.number % kLanes & 1) {
      fail("Divergence", "%s leaves the kernel while %s waits for it at %s (%s:%d)", place_name(t).c_str(), place_name(other).c_str(),
           collective_names[static_cast<int>(other.arrival.what)], other.file, other.line);
    }
  }
  for (char& group : t.copy_sync) acquire(&group);  // copies that nobody needs end with the block
  release(&end_sync);
  if (--unfinished == 0) switch_to(main_thread);
  reschedule();
  abort();
}

void start_block(Block& block, unsigned slot, uint64_t number) {
  block.index = dim3(static_cast<unsigned>(number % grid_size.x), static_cast<unsigned>(number / grid_size.x % grid_size.y),
                     static_cast<unsigned>(number / grid_size.x / grid_size.y));
  block.waiting = block.left = block.barriers = 0;
  block.size = block_size.x * block_size.y * block_size.z;
  poison(block);
  for (unsigned n = 0; n < block.size; ++n) {
    Thread& t = *threads[slot * warps_of_block * kLanes + n];
    t.number = slot * warps_of_block * kLanes + n;
    t.index = n;
    t.place.thread = dim3(n % block_size.x, n / block_size.x % block_size.y, n / block_size.x / block_size.y);
    t.place.block = block.index;
    t.block = &block;
    t.warp = &warps[t.number / kLanes];
    t.warp->lanes[t.number % kLanes] = &t;
    t.warp->left &= ~(1u << t.number % kLanes);
    t.copies.clear();
    t.groups.clear();
    t.landed = 0;
    t.committed = t.waited = 0;
    t.syncs = 0;
    set_ready(t);
    prepare_fiber(t, enter);
  }
}

}  // namespace

void prepare_schedule() {
  main_fiber(main_thread);
  current = &main_thread;
  here = nullptr;
  random_state = (settings.seed + 1) * 0x9e3779b97f4a7c15u | 1;
  for (int n = 0; n < 8; ++n) random_number();
}

void reserve(unsigned count) {
  warps_of_block = (block_size.x * block_size.y * block_size.z + kLanes - 1) / kLanes;
  used = count * warps_of_block * kLanes;
  ready.assign(used / kLanes, 0);
  warps.resize(used / kLanes);
  while (blocks.size() < count) blocks.push_back(std::make_unique<Block>());
  if (threads.size() >= used) return;
  const size_t page = 4096, more = used - threads.size();
  const size_t each = kStackBytes + page;
  void* room = mmap(nullptr, more * each, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) fail("EmulationError", "no memory for the stacks of %u threads", used);
  for (size_t n = 0; n < more; ++n) {
    unsigned char* low = static_cast<unsigned char*>(room) + n * each;
    mprotect(low, page, PROT_NONE);
    threads.push_back(std::make_unique<Thread>());
    threads.back()->stack = low + page;
  }
}

void run_blocks(uint64_t first, unsigned count, void (*call)(const void*), const void* arguments) {
  body = call;
  body_arguments = arguments;
  for (unsigned n = 0; n < used; ++n) threads[n]->state = Thread::done;
  std::fill(ready.begin(), ready.end(), 0);
  for (Warp& warp : warps) warp.waiting = 0, warp.left = ~0u;
  for (unsigned n = 0; n < count; ++n) start_block(*blocks[n], n, first + n);
  unfinished = count * blocks[0]->size;
  cursor = settings.order == Order::forward ? used - 1 : 0;
  spins = 0;
  starved_first = starved_last = 0;
  if (settings.order == Order::starving) choose_starved();
  release(&start_sync);
  current = &main_thread;
  reschedule();
  acquire(&end_sync);
  here = nullptr;
}

Block& block_at(unsigned slot) { return *blocks[slot]; }

void switch_to(Thread& next) {
  Thread& before = *current;
  if (&next == &before) return;
  swap_statics(next.block);
  current = &next;
  here = &next.place;
  switch_fiber(before, next);
}

uint64_t random_number() {  // xorshift
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  return random_state ^= random_state << 17;
}

void set_ready(Thread& t) {
  t.state = Thread::ready;
  ready[t.number / kLanes] |= 1u << t.number % kLanes;
}

void wait_in(Thread::State state, const char* file, int line) {
  Thread& t = *current;
  t.state = state;
  t.file = file;
  t.line = line;
  spins = 0;
  ready[t.number / kLanes] &= ~(1u << t.number % kLanes);
  reschedule();
}

void release(void* object) { sanitizer_release(object); }
void acquire(void* object) { sanitizer_acquire(object); }

std::string place_name(const Thread& t) {
  const auto triple = [](dim3 d) { return "(" + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")"; };
  return "thread " + triple(t.place.thread) + " of block " + triple(t.place.block);
}

void barrier(const char* file, int line) {
  Block& b = *current->block;
  if (b.left != 0) {
    fail("Divergence", "%s waits at the barrier %s:%d, but %u threads have left", place_name(*current).c_str(), file, line, b.left);
  }
  if (b.waiting != 0 && (b.line != line || (b.file != file && strcmp(b.file, file) != 0))) {
    fail("Divergence", "%s waits at the barrier %s:%d, others wait at %s:%d", place_name(*current).c_str(), file, line, b.file, b.line);
  }
  b.file = file;
  b.line = line;
  void* sync = &b.sync[b.barriers & 1];
  release(sync);
  if (++b.waiting == b.size) {
    b.waiting = 0;
    ++b.barriers;
    const unsigned first = current->number - current->index;
    for (unsigned n = 0; n < b.size; ++n) set_ready(*threads[first + n]);
    cursor = settings.order == Order::forward ? used - 1 : 0;
    reschedule();
  } else {
    wait_in(Thread::at_barrier, file, line);
  }
  acquire(sync);
}

void yield() {
  if (++spins > kSpins) fail("Hang", "all threads that can go on wait for something that doesn't happen; %s", place_name(*current).c_str());
  reschedule();
}

void fence() {
  acquire(&fence_sync);
  release(&fence_sync);
}

}  // namespace emulation
