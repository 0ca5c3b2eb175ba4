// The plan in Python: numbers, names and addresses. fastres/inference checks tensors and keeps them alive.
#include "bindings.h"

#include <pybind11/stl.h>

#include "fingerprint.h"
#include "plan.h"

namespace py = pybind11;

namespace fastres {
namespace {

using Pair = std::array<int64_t, 2>;

template <class T>
const T* address(uintptr_t p) {
  return reinterpret_cast<const T*>(p);
}

std::vector<float> floats(uintptr_t p, int64_t n) {
  return n == 0 ? std::vector<float>() : std::vector<float>(address<float>(p), address<float>(p) + n);
}

// in, out: (height, width, channels) of one image.
ConvShape conv_shape(const std::array<int64_t, 3>& in, const std::array<int64_t, 3>& out, Pair kernel, Pair stride, Pair padding,
                     Pair dilation, int64_t groups) {
  return {1,         in[0],     in[1],     in[2],      out[0],     out[1],      out[2],      kernel[0],
          kernel[1], stride[0], stride[1], padding[0], padding[1], dilation[0], dilation[1], groups};
}

py::dict facts_of(const StepFacts& f) {
  const auto map = [](const Map& m) { return py::make_tuple(m.channels, m.height, m.width); };
  py::dict d;
  d["name"] = f.name;
  d["op"] = f.op;
  d["kernel"] = f.kernel;
  d["input"] = map(f.in);
  d["output"] = map(f.out);
  d["flops"] = f.flops;
  d["activation_bytes"] = f.activation_bytes;
  d["weight_bytes"] = f.weight_bytes;
  d["by_image"] = f.by_image;
  d["relu"] = f.relu;
  d["residual"] = f.residual;
  d["seconds"] = f.seconds;
  return d;
}

py::list facts_of(const std::vector<StepFacts>& all) {
  py::list list;
  for (const StepFacts& f : all) list.append(facts_of(f));
  return list;
}

InputMemory input_memory(uintptr_t data, const std::array<int64_t, 4>& strides) {
  return {address<void>(data), strides[0], strides[1], strides[2], strides[3]};
}

}  // namespace

void bind_plan(py::module_& m) {
  m.def(
      "conv_kernels",
      [] {
        std::vector<std::string> names;
        const ConvKernels& all = kernels().conv;
        for (int64_t i = 0; i < all.count; ++i) names.emplace_back(all.list[i]->name);
        return names;
      },
      "Convolution kernels of the instruction set in use, in order of preference.");

  py::class_<ConvShape>(m, "ConvShape")
      .def(py::init(&conv_shape), py::arg("input"), py::arg("output"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
           py::arg("dilation"), py::arg("groups"));

  py::class_<PackedWeights, std::shared_ptr<PackedWeights>>(m, "PackedWeights")
      .def(py::init([](const std::string& kernel, const ConvShape& shape, bool bfloat16, uintptr_t weight) {
             const py::gil_scoped_release release;
             return std::make_shared<PackedWeights>(kernel, shape, bfloat16, address<float>(weight));
           }),
           py::arg("kernel"), py::arg("shape"), py::arg("bfloat16"), py::arg("weight"))
      .def_property_readonly("bytes", &PackedWeights::bytes);

  py::class_<Plan, std::shared_ptr<Plan>>(m, "Plan")
      .def(py::init([](bool bfloat16, int64_t images, int64_t channels, int64_t height, int64_t width, int64_t depth_first_bytes,
                       int64_t images_per_turn, int64_t arena_limit) {
             const PlanOptions options{bfloat16, images, depth_first_bytes, images_per_turn, arena_limit};
             return std::make_shared<Plan>(options, Map{height, width, channels});
           }),
           py::arg("bfloat16"), py::arg("images"), py::arg("channels"), py::arg("height"), py::arg("width"),
           py::arg("depth_first_bytes") = PlanOptions{}.depth_first_bytes, py::arg("images_per_turn") = 1, py::arg("arena_limit") = 0)
      .def(
          "kernel_for",
          [](const Plan& p, const ConvShape& shape, bool linear, bool relu, bool residual, const std::string& kernel) {
            return std::string(p.kernel_for(shape, linear, relu, residual, kernel).name);
          },
          py::arg("shape"), py::arg("linear"), py::arg("relu"), py::arg("residual"), py::arg("kernel"))
      .def(
          "add_conv",
          [](Plan& p, const std::string& name, int input, const ConvShape& shape, bool linear, bool relu, int residual,
             std::shared_ptr<PackedWeights> weights, uintptr_t bias) {
            return p.add_conv(name, input, shape, linear, relu, residual, std::move(weights), floats(bias, shape.out_channels));
          },
          py::arg("name"), py::arg("input"), py::arg("shape"), py::arg("linear"), py::arg("relu"), py::arg("residual"), py::arg("weights"),
          py::arg("bias"))
      .def(
          "add_pool",
          [](Plan& p, const std::string& name, int input, bool mean, Pair out, Pair kernel, Pair stride, Pair padding, Pair dilation,
             int64_t divisor, bool count_padding) {
            MapPool pool{};
            pool.out_height = out[0], pool.out_width = out[1];
            pool.kernel_h = kernel[0], pool.kernel_w = kernel[1];
            pool.stride_h = stride[0], pool.stride_w = stride[1];
            pool.pad_h = padding[0], pool.pad_w = padding[1];
            pool.dilation_h = dilation[0], pool.dilation_w = dilation[1];
            pool.divisor = divisor;
            pool.count_padding = count_padding;
            return p.add_pool(name, input, mean, pool);
          },
          py::arg("name"), py::arg("input"), py::arg("mean"), py::arg("out"), py::arg("kernel"), py::arg("stride"), py::arg("padding"),
          py::arg("dilation"), py::arg("divisor") = 0, py::arg("count_padding") = true)
      .def(
          "add_adaptive_mean",
          [](Plan& p, const std::string& name, int input, Pair out) {
            MapPool pool{};
            pool.out_height = out[0], pool.out_width = out[1];
            pool.adaptive = true;
            return p.add_pool(name, input, true, pool);
          },
          py::arg("name"), py::arg("input"), py::arg("out"))
      .def(
          "add_scale_shift",
          [](Plan& p, const std::string& name, int input, int residual, bool relu, uintptr_t scale, uintptr_t center, uintptr_t shift) {
            p.map(input);  // throws where there is no such value
            const int64_t n = scale == 0 ? 0 : p.map(input).channels;
            return p.add_scale_shift(name, input, residual, relu, floats(scale, n), floats(center, n), floats(shift, n));
          },
          py::arg("name"), py::arg("input"), py::arg("residual"), py::arg("relu"), py::arg("scale") = 0, py::arg("center") = 0,
          py::arg("shift") = 0)
      .def(
          "add_place",
          [](Plan& p, const std::string& name, int input, const std::array<int64_t, 3>& out, const std::array<int64_t, 3>& first,
             Pair stride) {
            MapPlace place{};
            place.out_channels = out[0], place.out_height = out[1], place.out_width = out[2];
            place.first_c = first[0], place.first_h = first[1], place.first_w = first[2];
            place.stride_h = stride[0], place.stride_w = stride[1];
            return p.add_place(name, input, place);
          },
          py::arg("name"), py::arg("input"), py::arg("out"), py::arg("first"), py::arg("stride"))
      .def("add_flat", &Plan::add_flat, py::arg("input"))
      .def("finish", &Plan::finish, py::arg("output"))
      .def(
          "run",
          [](const Plan& p, uintptr_t x, const std::array<int64_t, 4>& strides, uintptr_t y) {
            p.run(input_memory(x, strides), reinterpret_cast<void*>(y));
          },
          py::arg("x"), py::arg("strides"), py::arg("y"), py::call_guard<py::gil_scoped_release>())
      .def(
          "profile",
          [](const Plan& p, uintptr_t x, const std::array<int64_t, 4>& strides, uintptr_t y, int repeats) {
            std::vector<StepFacts> all;
            {
              const py::gil_scoped_release release;
              all = p.profile(input_memory(x, strides), reinterpret_cast<void*>(y), repeats);
            }
            return facts_of(all);
          },
          py::arg("x"), py::arg("strides"), py::arg("y"), py::arg("repeats"))
      .def("steps", [](const Plan& p) { return facts_of(p.facts()); })
      .def_property_readonly("output",
                             [](const Plan& p) {
                               const Map& out = p.map(p.output());
                               return py::make_tuple(out.channels, out.height, out.width);
                             })
      .def_property_readonly("arena_bytes", &Plan::arena_bytes)
      .def_property_readonly("weight_bytes", &Plan::weight_bytes)
      .def_property_readonly("arenas", [](const Plan& p) { return p.arenas().count(); })
      .def_property_readonly("arenas_bytes", [](const Plan& p) { return p.arenas().bytes(); });

  py::class_<Samples>(m, "Fingerprint")
      .def(py::init([](const std::vector<std::array<int64_t, 3>>& samples) {
             Samples made;
             for (const auto& [data, bytes, step] : samples)
               made.all.push_back({address<unsigned char>(static_cast<uintptr_t>(data)), bytes, step});
             return made;
           }),
           py::arg("samples"), "(address, bytes, step) of each: all bytes (step 0), or words of 4 bytes, `step` bytes apart.")
      .def("__call__", &Samples::fingerprint);
}

}  // namespace fastres
