// The tensor side of the CUDA convolutions (csrc/cuda/conv_*.cpp) as operators on CPU tensors, over plain loops in the kernels' place:
// whether problems are filled in right, layouts and all, shows without a device and whatever the kernels do.
#define FASTRES_EMULATED
#include "../../csrc/cuda/conv_backward.cpp"
#include "../../csrc/cuda/conv_forward.cpp"

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

namespace fastres::cuda {
namespace {

const char* failure = nullptr;  // what the next launches report
int launches = 0;

double load(Type type, const void* p, int64_t i) {
  if (type == Type::float32) return static_cast<const float*>(p)[i];
  if (type == Type::float16) return static_cast<double>(static_cast<const _Float16*>(p)[i]);
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(p)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void store(Type type, void* p, int64_t i, double value) {
  if (type == Type::float32) {
    static_cast<float*>(p)[i] = static_cast<float>(value);
  } else if (type == Type::float16) {
    static_cast<_Float16*>(p)[i] = static_cast<_Float16>(value);
  } else {  // round to nearest even
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
}

double pre(const Affine& a, double x, int64_t c) { return a.scale == nullptr ? x : a.scale[c] * (x - a.center[c]) + a.shift[c]; }

// Calls f(output pixel, input pixel, tap) for every product of a convolution's geometry.
template <class F>
void each_tap(const Geometry& g, F f) {
  for (int64_t n = 0; n < g.images; ++n)
    for (int64_t p = 0; p < g.out_height; ++p)
      for (int64_t q = 0; q < g.out_width; ++q)
        for (int64_t r = 0; r < g.filter_height; ++r)
          for (int64_t s = 0; s < g.filter_width; ++s) {
            const int64_t h = p * g.stride_h - g.pad_h + r * g.dilation_h, w = q * g.stride_w - g.pad_w + s * g.dilation_w;
            if (h < 0 || h >= g.height || w < 0 || w >= g.width) continue;
            f((n * g.out_height + p) * g.out_width + q, (n * g.height + h) * g.width + w, r * g.filter_width + s);
          }
}

// The gradient of y with its share of the statistics, [N*P*Q, K].
std::vector<double> total(const ConvBackward& b) {
  const Geometry& g = b.shape;
  const double n = static_cast<double>(rows_out(g));
  std::vector<double> out(rows_out(g) * g.filters);
  for (int64_t i = 0; i < static_cast<int64_t>(out.size()); ++i) {
    const int64_t k = i % g.filters;
    if (b.grad_y != nullptr) out[i] = load(b.type, b.grad_y, i) * (b.factor == nullptr ? 1.0 : b.factor[k]);
    if (b.grad_mean != nullptr) out[i] += b.grad_mean[k] / n;
    if (b.grad_var != nullptr) out[i] += 2 * b.grad_var[k] / n * (load(b.type, b.y, i) - b.mean[k]);
  }
  return out;
}

// A workspace must be all there, also its last element.
void use(float* workspace, int64_t floats) {
  for (int64_t i = 0; i < floats; ++i) workspace[i] = std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

const char* conv_forward(const ConvForward& f, int, void*) {
  ++launches;
  if (failure != nullptr) return failure;
  const Geometry& g = f.shape;
  const int64_t K = g.filters, C = g.channels, taps = g.filter_height * g.filter_width, rows = rows_out(g);
  std::vector<double> sums(rows * K);
  each_tap(g, [&](int64_t out, int64_t in, int64_t tap) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) {
        double z = pre(f.prologue, load(f.type, f.x, in * C + c), c);
        if (f.prologue_relu && z <= 0) z = 0;
        sums[out * K + k] += z * load(f.type, f.weight, (k * taps + tap) * C + c);
      }
  });
  for (int64_t i = 0; i < rows * K; ++i) {
    double z = sums[i];
    if (f.bias != nullptr) z += load(f.bias_type, f.bias, i % K);
    if (f.residual != nullptr) z += load(f.type, f.residual, i);
    store(f.type, f.y, i, f.relu && z <= 0 ? 0 : z);
  }
  if (f.partial == nullptr) return nullptr;
  use(f.partial, forward_workspace(f));
  for (int64_t k = 0; k < K; ++k) {
    double mean = 0, m2 = 0;
    for (int64_t row = 0; row < rows; ++row) mean += load(f.type, f.y, row * K + k) / static_cast<double>(rows);
    for (int64_t row = 0; row < rows; ++row) m2 += std::pow(load(f.type, f.y, row * K + k) - mean, 2);
    f.mean[k] = static_cast<float>(mean);
    f.var[k] = static_cast<float>(m2 / static_cast<double>(rows));
  }
  return nullptr;
}

const char* conv_input_gradient(const ConvBackward& b, int, void*) {
  ++launches;
  if (failure != nullptr) return failure;
  const Geometry& g = b.shape;
  const int64_t K = g.filters, C = g.channels, taps = g.filter_height * g.filter_width;
  use(b.workspace, input_gradient_workspace(b));
  const std::vector<double> grad = total(b);
  std::vector<double> dz(rows_in(g) * C), on_scale(C), on_shift(C);
  each_tap(g, [&](int64_t out, int64_t in, int64_t tap) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) dz[in * C + c] += grad[out * K + k] * load(b.type, b.weight, (k * taps + tap) * C + c);
  });
  for (int64_t i = 0; i < rows_in(g) * C; ++i) {
    const int64_t c = i % C;
    const double x = load(b.type, b.x, i);
    if (b.prologue_relu && pre(b.prologue, x, c) <= 0) dz[i] = 0;
    double dx = dz[i];
    if (b.prologue.scale != nullptr) {
      on_scale[c] += dx * (x - b.prologue.center[c]);
      on_shift[c] += dx;
      dx *= b.prologue.scale[c];
    }
    if (b.addend != nullptr) dx += load(b.type, b.addend, i);
    store(b.type, b.grad_x, i, dx);
  }
  for (int64_t c = 0; b.grad_scale != nullptr && c < C; ++c) {
    b.grad_scale[c] = static_cast<float>(on_scale[c]);
    b.grad_shift[c] = static_cast<float>(on_shift[c]);
  }
  return nullptr;
}

const char* conv_weight_gradient(const ConvBackward& b, int, void*) {
  ++launches;
  if (failure != nullptr) return failure;
  const Geometry& g = b.shape;
  const int64_t K = g.filters, C = g.channels, taps = g.filter_height * g.filter_width;
  use(b.workspace, weight_gradient_workspace(b));
  const std::vector<double> grad = total(b);
  std::vector<double> dw(K * taps * C);
  each_tap(g, [&](int64_t out, int64_t in, int64_t tap) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t c = 0; c < C; ++c) {
        double z = pre(b.prologue, load(b.type, b.x, in * C + c), c);
        if (b.prologue_relu && z <= 0) z = 0;
        dw[(k * taps + tap) * C + c] += grad[out * K + k] * z;
      }
  });
  for (int64_t i = 0; i < static_cast<int64_t>(dw.size()); ++i) store(b.type, b.grad_weight, i, dw[i]);
  return nullptr;
}

}  // namespace fastres::cuda

extern "C" {
__attribute__((visibility("default"))) void fail_with(const char* words) { fastres::cuda::failure = words; }
__attribute__((visibility("default"))) int launches() { return fastres::cuda::launches; }
}

STABLE_TORCH_LIBRARY_IMPL(fastres, CPU, m) {
  m.impl("conv_refusal_cuda", TORCH_BOX(&fastres::conv_refusal));
  m.impl("conv_forward_cuda", TORCH_BOX(&fastres::conv_forward));
  m.impl("conv_backward_cuda", TORCH_BOX(&fastres::conv_backward));
}
