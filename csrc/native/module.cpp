// fastres._native: loading it registers the CPU operators (static initialisers of the other files); the module itself only tells facts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../plan/bindings.h"
#include "cpu.h"
#include "limits.h"

namespace py = pybind11;

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of fastres (operators in torch.ops.fastres) and facts about this build.";
  m.def("isa", [] { return fastres::isa().name; }, "The instruction set in use; empty when FASTRES_ISA can't be honoured.");
  m.def("isa_error", [] { return fastres::isa().error; }, "Why FASTRES_ISA can't be honoured, or an empty string.");
  m.def("isa_supported", [] { return fastres::isa().supported; }, "Instruction sets that this build has and this CPU runs, lowest first.");
  m.def(
      "has_weight_gradient", [] { return fastres::kernels().conv.weight_gradient != nullptr; },
      "Whether the instruction set in use has a kernel for weight gradients.");
  m.def(
      "build_facts",
      [] {
        py::dict facts;
        facts["version"] = FASTRES_VERSION;
        facts["compiler"] = FASTRES_COMPILER;
        facts["build_type"] = FASTRES_BUILD_TYPE;
        facts["torch_built_with"] = FASTRES_TORCH_VERSION;
        return facts;
      },
      "What the library was built from and with.");
  fastres::bind_plan(m);
  fastres::bind_limits(m);
}
