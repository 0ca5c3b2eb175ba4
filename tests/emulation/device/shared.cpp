// Shared memory: static and dynamic, poisoned before each block.
#include <link.h>
#include <stdlib.h>

#include <algorithm>

#include "scheduler.h"

extern "C" void* __tls_get_addr(size_t* index);

namespace emulation {

namespace {

constexpr size_t kCanary = 128;
constexpr unsigned char kCanaryByte = 0xc5;

unsigned char* statics;
size_t statics_size, dynamic_size;
Block* resident;  // the block whose static memory is in place
bool cooperative;

}  // namespace

void find_statics() {
#ifndef FASTRES_SANITIZED
  // The thread-local variables of this very library: all of them are __shared__.
  const auto look = [](dl_phdr_info* info, size_t, void*) {
    bool mine = false;
    const ElfW(Phdr)* tls = nullptr;
    for (int n = 0; n < info->dlpi_phnum; ++n) {
      const ElfW(Phdr) & segment = info->dlpi_phdr[n];
      const uintptr_t low = info->dlpi_addr + segment.p_vaddr, address = reinterpret_cast<uintptr_t>(&here);
      if (segment.p_type == PT_LOAD && address >= low && address < low + segment.p_memsz) mine = true;
      if (segment.p_type == PT_TLS) tls = &segment;
    }
    if (!mine) return 0;
    if (tls != nullptr) {
      size_t index[2] = {info->dlpi_tls_modid, 0};
      statics = static_cast<unsigned char*>(__tls_get_addr(index));
      statics_size = tls->p_memsz;
    }
    return 1;
  };
  dl_iterate_phdr(look, nullptr);
#endif
}

void size_shared(size_t dynamic_bytes, bool several) {
  dynamic_size = dynamic_bytes;
  cooperative = several;
  resident = nullptr;
}

void free_shared(Block& block) {
  free(block.shared);
  block.shared = nullptr;
}

void swap_statics(Block* next) {
  if (!cooperative || next == nullptr || next == resident || statics_size == 0) return;
  if (resident != nullptr) memcpy(resident->statics.data(), statics, statics_size);
  memcpy(statics, next->statics.data(), statics_size);
  resident = next;
}

void poison(Block& block) {
#ifndef FASTRES_SANITIZED
  constexpr size_t behind = kCanary;
#else
  constexpr size_t behind = 0;  // of exactly the size that was asked for: the sanitizer guards the end
#endif
  if (block.shared == nullptr) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, std::max<size_t>(dynamic_size + behind, 1)) != 0) fail("EmulationError", "no memory");
    block.shared = static_cast<unsigned char*>(memory);
    memset(block.shared + dynamic_size, kCanaryByte, behind);
  }
  memset(block.shared, 0xff, dynamic_size);
  if (statics_size != 0) {
    memset(statics, 0xff, statics_size);
    if (cooperative) block.statics.assign(statics_size, 0xff);
  }
}

void check_canary(const Block& block) {
#ifndef FASTRES_SANITIZED
  for (size_t n = 0; n < kCanary; ++n) {
    if (block.shared[dynamic_size + n] != kCanaryByte) {
      fail("SharedMemoryError", "block (%u, %u, %u) has written to byte %zu of %zu bytes of dynamic shared memory", block.index.x,
           block.index.y, block.index.z, dynamic_size + n, dynamic_size);
    }
  }
#else
  (void)block;
#endif
}

bool in_shared(const void* address, size_t bytes) {
  const unsigned char *at = static_cast<const unsigned char*>(address), *dynamic = current->block->shared;
#ifdef FASTRES_SANITIZED
  if (at < dynamic || at >= dynamic + dynamic_size) return true;  // static, or found by the sanitizer
#endif
  return (at >= dynamic && at + bytes <= dynamic + dynamic_size) || (at >= statics && at + bytes <= statics + statics_size);
}

unsigned char* dynamic_shared() { return current->block->shared; }

}  // namespace emulation
