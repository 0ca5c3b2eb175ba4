// Drives the convolution kernels with threads and buffers of their exact size, for AddressSanitizer, UBSan and ThreadSanitizer: no torch,
// no Python. Every result is also compared with sums in double, so that a check can't pass because nothing was computed.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#ifdef FASTRES_HAS_X86_KERNELS
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "../../kernels/conv/cpu_conv.h"

#ifdef FASTRES_HAS_X86_KERNELS
namespace fastres::avx2 {
extern const ConvKernels conv_kernels;
}
namespace fastres::amx {
extern const ConvKernels conv_kernels;
}
#else
namespace fastres::baseline {
extern const ConvKernels conv_kernels;
}
#endif

namespace {

using namespace fastres;

std::string instructions;  // the set that is being checked

uint32_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
}

// N numbers in memory of exactly that size, as float or bf16.
class Numbers {
 public:
  Numbers(int64_t n, bool half, float fill) : half_(half), n_(n), bytes_(new char[n * (half ? 2 : 4)]) {
    for (int64_t i = 0; i < n; ++i) set(i, fill);
  }
  static Numbers random(int64_t n, bool half) {
    Numbers out(n, half, 0);
    for (int64_t i = 0; i < n; ++i) out.set(i, uniform());
    return out;
  }
  void set(int64_t i, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint16_t upper = static_cast<uint16_t>(bits >> 16);  // truncation is good enough for inputs
    half_ ? std::memcpy(bytes_.get() + 2 * i, &upper, 2) : std::memcpy(bytes_.get() + 4 * i, &bits, 4);
  }
  float operator[](int64_t i) const {
    uint32_t bits = 0;
    half_ ? std::memcpy(reinterpret_cast<char*>(&bits) + 2, bytes_.get() + 2 * i, 2) : std::memcpy(&bits, bytes_.get() + 4 * i, 4);
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  void* data() const { return bytes_.get(); }
  float* floats() const { return reinterpret_cast<float*>(bytes_.get()); }
  int64_t size() const { return n_; }

 private:
  bool half_;
  int64_t n_;
  std::unique_ptr<char[]> bytes_;
};

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<void, Free>;

// Aligned as kernels are promised, of arbitrary contents: NaNs in every format.
Block block(int64_t bytes) {
  const size_t n = static_cast<size_t>(round_up(bytes < 1 ? 1 : bytes, 64));
  Block out(std::aligned_alloc(64, n));
  std::memset(out.get(), 0xff, n);
  return out;
}

template <class F>
void on_threads(int64_t tasks, int64_t scratch_bytes, const F& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      const Block scratch = block(scratch_bytes);
      for (int64_t task; (task = next.fetch_add(1)) < tasks;) f(task, scratch.get());
    });
  }
  for (std::thread& t : threads) t.join();
}

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", instructions.c_str(), what.c_str());
  std::exit(1);
}

enum class Kind { act, stats, mask };

struct Tensors {
  Numbers x, raw, weight, bias, residual, pre, scale, center, shift, mean, offset, slope, out_scale, out_center, out_shift;
};

Tensors tensors_of(const ConvShape& s, bool half) {
  const int64_t in = s.images * s.height * s.width * s.in_channels, out = s.images * s.out_height * s.out_width * s.out_channels;
  const auto channels = [](int64_t n) { return Numbers::random(n, false); };
  const int64_t C = s.in_channels, K = s.out_channels;
  return {Numbers::random(in, half),
          Numbers::random(in, half),
          Numbers::random(K * (C / s.groups) * s.kernel_h * s.kernel_w, half),
          channels(K),
          Numbers::random(out, half),
          Numbers::random(out, half),
          channels(C),
          channels(C),
          channels(C),
          channels(C),
          channels(C),
          channels(C),
          channels(K),
          channels(K),
          channels(K)};
}

// What goes in: prologue with ReLU for statistics, a gradient's share of the statistics for the mask.
double read(const Tensors& t, Kind kind, int64_t at, int64_t c) {
  const double x = t.x[at];
  if (kind == Kind::stats) return std::fmax(0.0, t.scale[c] * (x - t.center[c]) + t.shift[c]);
  if (kind == Kind::mask) return x + t.offset[c] + t.slope[c] * (t.raw[at] - t.mean[c]);
  return x;
}

double expected(const Conv& conv, const Tensors& t, Kind kind, int64_t n, int64_t p, int64_t q, int64_t k) {
  const ConvShape& s = conv.shape;
  const int64_t C = s.in_channels / s.groups, K = s.out_channels / s.groups, first = k / K * C;
  double sum = 0;
  for (int64_t r = 0; r < s.kernel_h; ++r) {
    for (int64_t j = 0; j < s.kernel_w; ++j) {
      const int64_t h = p * s.stride_h + r * s.dilation_h - s.pad_h, w = q * s.stride_w + j * s.dilation_w - s.pad_w;
      if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
      for (int64_t c = 0; c < C; ++c) {
        const int64_t at = ((n * s.height + h) * s.width + w) * s.in_channels + first + c;
        sum += read(t, kind, at, first + c) * t.weight[((k * C + c) * s.kernel_h + r) * s.kernel_w + j];
      }
    }
  }
  const int64_t at = ((n * s.out_height + p) * s.out_width + q) * s.out_channels + k;
  if (kind == Kind::act) return std::fmax(0.0, sum + t.bias[k] + t.residual[at]);
  if (kind == Kind::stats) return sum;
  const double z = t.out_scale[k] * (static_cast<double>(t.pre[at]) - t.out_center[k]) + t.out_shift[k];
  return z > 0 ? sum * t.out_scale[k] : 0.0;
}

void check(const ConvKernel& kernel, const ConvShape& s, bool half, Kind kind) {
  const Tensors t = tensors_of(s, half);
  Conv conv{};
  conv.shape = s;
  conv.bfloat16 = half;
  conv.threads = 3;
  conv.x = t.x.data();
  float dummy = 0;
  if (kind == Kind::act) {
    conv.bias = t.bias.floats();
    conv.residual = t.residual.data();
    conv.relu = true;
  } else if (kind == Kind::stats) {
    conv.scale = t.scale.floats();
    conv.center = t.center.floats();
    conv.shift = t.shift.floats();
    conv.prologue_relu = true;
    conv.stats = &dummy;
  } else {
    conv.raw = t.raw.data();
    conv.mean = t.mean.floats();
    conv.offset = t.offset.floats();
    conv.slope = t.slope.floats();
    conv.pre = t.pre.data();
    conv.out_scale = t.out_scale.floats();
    conv.out_center = t.out_center.floats();
    conv.out_shift = t.out_shift.floats();
    conv.out_relu = true;
    conv.grad_sums = &dummy;
  }
  if (kernel.refusal(conv) != nullptr) return;
  const int64_t outputs = s.images * s.out_height * s.out_width, tasks = kernel.tasks(conv);
  const Numbers y(outputs * s.out_channels, half, NAN), rows(tasks * 4 * s.out_channels, false, 0);
  if (conv.stats != nullptr) conv.stats = rows.floats();
  if (conv.grad_sums != nullptr) conv.grad_sums = rows.floats();
  conv.y = y.data();

  Numbers wide(t.weight.size(), false, 0);
  for (int64_t i = 0; i < wide.size(); ++i) wide.set(i, t.weight[i]);
  const Block packed = block(kernel.packed_bytes(s, half));
  on_threads(kernel.pack_items(s, half), 1,
             [&](int64_t item, void*) { kernel.pack(s, half, contiguous_weights(s, wide.floats()), packed.get(), item, item + 1); });
  conv.weights = packed.get();
  on_threads(tasks, kernel.scratch_bytes(conv), [&](int64_t task, void* scratch) { kernel.run(conv, task, task + 1, scratch); });

  const double allowed = (half ? 2e-2 : 1e-5) * std::sqrt(static_cast<double>(s.in_channels / s.groups * s.kernel_h * s.kernel_w) + 4);
  for (int64_t i = 0; i < outputs; ++i) {
    const int64_t q = i % s.out_width, p = i / s.out_width % s.out_height, n = i / s.out_width / s.out_height;
    // All channels at the edges of the map and of the threads' shares would cost more than the kernels: a few of each position.
    for (int64_t k = i % 7; k < s.out_channels; k += 7) {
      const double want = expected(conv, t, kind, n, p, q, k), got = y[i * s.out_channels + k];
      if (!(std::fabs(got - want) <= allowed)) {
        fail(std::string(kernel.name) + ": output " + std::to_string(i) + ", channel " + std::to_string(k) + " is " + std::to_string(got) +
             ", expected " + std::to_string(want));
      }
    }
    for (int64_t k = 0; k < s.out_channels; ++k) {
      if (std::isnan(y[i * s.out_channels + k])) fail(std::string(kernel.name) + ": an output was not written");
    }
  }
  if (kind == Kind::stats) {
    for (int64_t k = 0; k < s.out_channels; ++k) {
      double count = 0;
      for (int64_t task = 0; task < tasks; ++task) count += rows[task * 4 * s.out_channels + k];
      if (count != static_cast<double>(outputs)) fail(std::string(kernel.name) + ": statistics of " + std::to_string(count) + " outputs");
    }
  }
}

void check_weight_gradient(const WeightGradientKernel& kernel, const ConvShape& s, bool half) {
  const Tensors t = tensors_of(s, half);
  WeightGradient problem{};
  problem.input.shape = s;
  problem.input.bfloat16 = problem.gradient.bfloat16 = half;
  problem.input.threads = 3;
  problem.input.x = t.x.data();
  problem.gradient.shape.in_channels = s.out_channels;
  problem.gradient.x = t.residual.data();
  if (kernel.refusal(problem) != nullptr) return;
  const Block partial = block(kernel.elements(problem) * kernel.groups(problem) * 4);
  on_threads(kernel.tasks(problem), kernel.scratch_bytes(problem),
             [&](int64_t task, void* scratch) { kernel.run(problem, task, scratch, static_cast<float*>(partial.get())); });
  const int64_t C = s.in_channels, taps = s.kernel_h * s.kernel_w;
  const Numbers dw(s.out_channels * C * taps, false, NAN);
  on_threads(ceil_div(s.out_channels, 32), 1, [&](int64_t item, void*) {
    kernel.finish(problem, static_cast<const float*>(partial.get()), contiguous_weights(s, dw.floats()), item, item + 1);
  });
  for (int64_t i = 0; i < dw.size(); i += i % 5 + 1) {
    const int64_t k = i / taps / C, c = i / taps % C, r = i % taps / s.kernel_w, j = i % s.kernel_w;
    double want = 0;
    for (int64_t o = 0; o < s.images * s.out_height * s.out_width; ++o) {
      const int64_t q = o % s.out_width, p = o / s.out_width % s.out_height, n = o / s.out_width / s.out_height;
      const int64_t h = p * s.stride_h + r * s.dilation_h - s.pad_h, w = q * s.stride_w + j * s.dilation_w - s.pad_w;
      if (h < 0 || h >= s.height || w < 0 || w >= s.width) continue;
      want += static_cast<double>(t.residual[o * s.out_channels + k]) * t.x[((n * s.height + h) * s.width + w) * C + c];
    }
    if (!(std::fabs(dw[i] - want) <= 1e-3)) fail("weight gradient " + std::to_string(dw[i]) + ", expected " + std::to_string(want));
  }
}

ConvShape shape(int64_t n, int64_t c, int64_t h, int64_t w, int64_t k, int64_t r, int64_t stride, int64_t pad, int64_t dilation,
                int64_t groups) {
  const auto size = [&](int64_t x) { return (x + 2 * pad - dilation * (r - 1) - 1) / stride + 1; };
  return {n, h, w, c, size(h), size(w), k, r, r, stride, stride, pad, pad, dilation, dilation, groups};
}

void check_all(const char* name, const ConvKernels& all) {
  instructions = name;
  const ConvShape shapes[] = {
      shape(2, 17, 7, 9, 35, 3, 1, 1, 1, 1),  shape(1, 64, 6, 15, 64, 3, 2, 1, 1, 1), shape(2, 3, 15, 13, 20, 7, 2, 3, 1, 1),
      shape(3, 32, 5, 7, 33, 1, 1, 0, 1, 1),  shape(1, 37, 1, 1, 10, 1, 1, 0, 1, 1),  shape(1, 600, 3, 4, 17, 3, 1, 1, 1, 1),
      shape(1, 20, 9, 8, 12, 3, 1, 2, 2, 1),  shape(4, 48, 3, 3, 48, 1, 2, 0, 1, 1),  shape(1, 64, 5, 17, 64, 3, 1, 1, 1, 16),
      shape(2, 96, 7, 6, 96, 3, 2, 1, 1, 3),  shape(1, 33, 6, 9, 33, 3, 1, 1, 1, 33), shape(1, 15, 6, 5, 35, 3, 1, 1, 1, 5),
      shape(2, 40, 4, 4, 200, 1, 1, 0, 1, 2), shape(1, 64, 2, 3, 40, 1, 1, 0, 1, 1),  shape(1, 48, 5, 6, 48, 3, 1, 1, 1, 3),
  };
  for (const ConvShape& s : shapes) {
    for (const bool half : {false, true}) {
      for (int64_t i = 0; i < all.count; ++i) {
        for (const Kind kind : {Kind::act, Kind::stats, Kind::mask}) check(*all.list[i], s, half, kind);
      }
      if (all.weight_gradient != nullptr) check_weight_gradient(*all.weight_gradient, s, half);
    }
  }
  std::printf("%s: %lld kernels on %zu shapes\n", name, static_cast<long long>(all.count), std::size(shapes));
}

}  // namespace

int main() {
#ifdef FASTRES_HAS_X86_KERNELS
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) check_all("avx2", avx2::conv_kernels);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // granted only where the CPU has tiles
  const bool tiles = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  if (tiles && __builtin_cpu_supports("avx512bf16")) check_all("amx", amx::conv_kernels);
#else
  check_all("baseline", baseline::conv_kernels);
#endif
}
