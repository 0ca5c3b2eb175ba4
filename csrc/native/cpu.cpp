#include "cpu.h"

#include <cstdlib>
#include <stdexcept>

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
#endif

namespace {

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
  list.push_back({"avx512", &avx512::kernel_table, avx512});
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
