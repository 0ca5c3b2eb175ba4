// Launches: FASTRES_LAUNCH(kernel, grid, block, shared_bytes, stream, args...) runs the blocks one after the other, or records the launch.
#pragma once

#include <string.h>

#include <tuple>
#include <utility>

#include "runtime.h"

namespace emulation {

struct LaunchShape {
  dim3 grid, block;
  size_t shared_bytes;
  bool cooperative;  // all blocks at once
};

// The parameters of a kernel, as bytes in the order and with the alignment that CUDA gives them.
struct Parameters {
  const unsigned char* bytes;
  const size_t* places;  // offset and size of each
  size_t count, total;
};

void launch_raw(const void* kernel, const LaunchShape& shape, void (*call)(const void* arguments), const void* arguments,
                const Parameters& parameters);

template <class... P, class... A>
void launch(bool cooperative, void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, void*, A&&... args) {
  struct Arguments {
    void (*kernel)(P...);
    std::tuple<P...> values;
  };
  const Arguments arguments{kernel, std::tuple<P...>(static_cast<P>(std::forward<A>(args))...)};
  constexpr size_t most = (sizeof(P) + ... + 0) + (alignof(P) + ... + 1);
  unsigned char bytes[most] = {};
  size_t places[2 * sizeof...(P) + 1] = {}, at = 0, n = 0;
  const auto add = [&](const auto& value) {
    at = (at + alignof(decltype(value)) - 1) / alignof(decltype(value)) * alignof(decltype(value));
    memcpy(bytes + at, &value, sizeof value);
    places[n++] = at;
    at += places[n++] = sizeof value;
  };
  std::apply([&](const auto&... value) { (add(value), ...); }, arguments.values);
  const auto call = [](const void* p) {
    const Arguments& a = *static_cast<const Arguments*>(p);
    std::apply(a.kernel, a.values);
  };
  launch_raw(reinterpret_cast<const void*>(kernel), {grid, block, shared_bytes, cooperative}, call, &arguments,
             {bytes, places, sizeof...(P), at});
}

}  // namespace emulation

#define FASTRES_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(false, (kernel), (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
// All blocks run at once, for kernels whose blocks wait for each other.
#define FASTRES_LAUNCH_COOPERATIVE(kernel, grid, block, shared_bytes, stream, ...) \
  emulation::launch(true, (kernel), (grid), (block), (shared_bytes), (stream), __VA_ARGS__)
