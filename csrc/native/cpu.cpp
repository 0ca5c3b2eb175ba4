#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

#if defined(FASTRES_HAS_X86_KERNELS)
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace fastres {

namespace baseline {
extern const KernelTable kernel_table;
}
#ifdef FASTRES_HAS_X86_KERNELS
namespace avx2 {
extern const KernelTable kernel_table;
}
namespace avx512 {
extern const KernelTable kernel_table;
}
namespace avx512_bf16 {
extern const KernelTable kernel_table;
}
namespace amx {
extern const KernelTable kernel_table;
}
#endif

namespace {

#ifdef FASTRES_HAS_X86_KERNELS
// Whether the CPU has bf16 tiles and the operating system lets this process use them. Linux grants the tile registers on request, for the
// whole process; asking twice does no harm.
bool may_use_tiles() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kTile = 1u << 24, kTileBf16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTile) == 0 || (edx & kTileBf16) == 0) return false;
#ifdef __linux__
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Candidate {
  const char* name;
  const KernelTable* table;
  bool runs;
};

// Lowest first. The features asked for are exactly the flags that CMakeLists.txt compiles with; __builtin_cpu_supports also asks
// whether the operating system saves the registers.
std::vector<Candidate> candidates() {
  std::vector<Candidate> list{{"baseline", &baseline::kernel_table, true}};
#ifdef FASTRES_HAS_X86_KERNELS
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  list.push_back({"avx2", &avx2::kernel_table, avx2});
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  list.push_back({"avx512", &avx512::kernel_table, avx512});
  list.push_back({"avx512_bf16", &avx512_bf16::kernel_table, avx512_bf16});
  list.push_back({"amx", &amx::kernel_table, avx512_bf16 && may_use_tiles()});
#endif
  return list;
}

struct Choice {
  Isa isa;
  const KernelTable* table = nullptr;
};

Choice choose() {
  Choice choice;
  std::string known, usable;
  const char* variable = std::getenv("FASTRES_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  bool is_known = false;
  for (const Candidate& c : candidates()) {
    known += (known.empty() ? "" : ", ") + std::string(c.name);
    is_known |= wanted == c.name;
    if (!c.runs) continue;
    usable += (usable.empty() ? "" : ", ") + std::string(c.name);
    choice.isa.supported.push_back(c.name);
    if (wanted.empty() || wanted == c.name) {
      choice.isa.name = c.name;
      choice.table = c.table;
    }
  }
  if (choice.table == nullptr) {
    choice.isa.error = is_known ? "FASTRES_ISA=" + wanted + " asks for instructions that this CPU lacks; it can run: " + usable
                                : "FASTRES_ISA=" + wanted + " is not an instruction set of this build; expected one of: " + known;
  }
  return choice;
}

const Choice& choice() {
  static const Choice chosen = choose();
  return chosen;
}

}  // namespace

const Isa& isa() { return choice().isa; }

const KernelTable& kernels() {
  if (choice().table == nullptr) throw std::runtime_error(isa().error);
  return *choice().table;
}

}  // namespace fastres
