// Measures what the threads of this machine reach together: arithmetic on registers, and reading buffers of several sizes.
#include "limits.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cpu.h"

namespace py = pybind11;

namespace fastres {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kSeconds = 0.02;  // of one measurement
constexpr int kTries = 5;          // the best counts: a limit is what is possible

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Seconds until all threads have run f(thread), from a common start.
template <class F>
double together(int threads, const F& f) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) {
    workers.emplace_back([&, t] {
      ready.fetch_add(1);
      while (!go.load()) std::this_thread::yield();
      f(t);
    });
  }
  while (ready.load() != threads - 1) std::this_thread::yield();
  const auto start = Clock::now();
  go.store(true);
  f(0);
  for (std::thread& worker : workers) worker.join();
  return seconds_since(start);
}

// Work a second of all threads; work(thread, rounds) returns how much one thread did.
template <class F>
double best_rate(int threads, const F& work) {
  int64_t rounds = 1;
  for (;;) {
    const auto start = Clock::now();
    work(0, rounds);
    const double seconds = seconds_since(start);
    if (seconds >= kSeconds / 4) {
      rounds = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(rounds) * kSeconds / seconds));
      break;
    }
    rounds *= 2;
  }
  double best = 0;
  for (int i = 0; i < kTries; ++i) {
    std::atomic<int64_t> done{0};
    const double seconds = together(threads, [&](int t) { done.fetch_add(work(t, rounds)); });
    best = std::max(best, static_cast<double>(done.load()) / seconds);
  }
  return best;
}

struct Free {
  void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<char[], Free>;

py::dict machine_limits(int threads) {
  if (threads < 1) throw std::invalid_argument("threads must be at least 1, got " + std::to_string(threads));
  const MachineKernels& kernel = *kernels().machine;
  std::vector<std::pair<const char*, double>> peaks;
  std::vector<std::pair<int64_t, double>> reads;
  {
    py::gil_scoped_release release;
    const auto peak = [&](const char* name, int64_t (*f)(int64_t)) {
      if (f != nullptr) peaks.emplace_back(name, best_rate(threads, [f](int, int64_t rounds) { return f(1000 * rounds); }));
    };
    peak("fp32", kernel.multiply_add);
    peak("bf16", kernel.multiply_add_bf16);
    peak("bf16_tiles", kernel.multiply_tiles);
    for (const int64_t bytes : {int64_t{32} << 10, int64_t{1} << 20, int64_t{8} << 20, int64_t{64} << 20}) {
      std::vector<Buffer> buffers;
      for (int t = 0; t < threads; ++t) {
        buffers.emplace_back(static_cast<char*>(::operator new[](static_cast<size_t>(bytes), std::align_val_t{64})));
        std::memset(buffers.back().get(), 1, static_cast<size_t>(bytes));
      }
      reads.emplace_back(bytes, best_rate(threads, [&](int t, int64_t rounds) {
                           for (int64_t i = 0; i < rounds; ++i) kernel.read(buffers[static_cast<size_t>(t)].get(), bytes);
                           return rounds * bytes;
                         }));
    }
  }
  py::dict flops, bandwidth, found;
  for (const auto& [name, rate] : peaks) flops[name] = rate;
  for (const auto& [bytes, rate] : reads) bandwidth[py::int_(bytes)] = rate;
  found["threads"] = threads;
  found["flops"] = flops;
  found["read"] = bandwidth;
  return found;
}

}  // namespace

void bind_limits(py::module_& m) {
  m.def("machine_limits", machine_limits, py::arg("threads"),
        "What this many threads reach together: `flops` (operations a second, by kind of instruction) and `read` (bytes a second, by "
        "bytes of each thread's buffer).");
}

}  // namespace fastres
