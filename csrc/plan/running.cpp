// Running a plan: one parallel region for the by-image group, one for each step after it.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <stdexcept>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <torch/csrc/stable/ops.h>

#include "plan.h"

namespace fastres {
namespace {

// Denormals count as zero while this lives: networks don't need them, and arithmetic on them is many times slower.
class DenormalsAreZero {
 public:
#if defined(__x86_64__)
  DenormalsAreZero() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~DenormalsAreZero() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__)
  DenormalsAreZero() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (1ull << 24)));
  }
  ~DenormalsAreZero() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#endif
};

constexpr int64_t kTaskElements = 16384;  // of the pointwise steps: what a thread takes at a time

void execute(const Work& w, int64_t begin, int64_t end, void* scratch) {
  const KernelTable& table = kernels();
  switch (w.step->kind) {
    case StepKind::input: return table.map_input(w.input, begin, end);
    case StepKind::convolution:
      return w.step->pooled ? run_pooled(w, begin, end, scratch) : w.step->weights->kernel().run(w.conv, begin, end, scratch);
    case StepKind::max_pool: return table.map_max_pool(w.pool, begin, end);
    case StepKind::mean_pool: return table.map_mean_pool(w.pool, begin, end);
    case StepKind::scale_shift: return table.scale_shift_act(w.scale_shift, begin, end);
    case StepKind::place: return table.map_place(w.place, begin, end);
  }
}

const char* op_of(const Step& s) {
  switch (s.kind) {
    case StepKind::input: return "input";
    case StepKind::convolution: return s.linear ? "linear" : "conv";
    case StepKind::max_pool: return "max_pool";
    case StepKind::mean_pool: return "mean_pool";
    case StepKind::scale_shift: return "scale_shift";
    case StepKind::place: return "place";
  }
  return "";
}

int torch_threads() { return std::max(1, static_cast<int>(torch::stable::get_num_threads())); }

// Calls f(thread) on up to `threads` threads, each with its own number; all of them on one thread where torch doesn't go parallel.
template <class F>
void on_threads(int threads, const F& f) {
  if (threads == 1) return f(0);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) f(t);
  });
}

}  // namespace

Work Plan::prepare(const Step& s, int64_t images, int threads, const void* x, const void* residual, void* y) const {
  Work w{};
  w.step = &s;
  int64_t item_elements = 1;
  const Map& out = map(s.output);
  switch (s.kind) {
    case StepKind::input: break;  // the other prepare() knows the input's strides
    case StepKind::convolution: {
      static const float absent = 0.0f;  // where only the presence of a residual counts
      w.conv.shape = s.conv;
      (s.linear ? w.conv.shape.width : w.conv.shape.images) = images;
      if (s.linear) w.conv.shape.out_width = images;
      w.conv.bfloat16 = options_.bfloat16;
      w.conv.relu = s.relu;
      w.conv.threads = threads;
      w.conv.x = x;
      w.conv.weights = s.weights->data();
      w.conv.bias = s.bias.data();
      w.conv.residual = s.residual >= 0 ? (residual != nullptr ? residual : &absent) : nullptr;
      w.conv.y = y;
      w.grain = 1;
      if (s.pooled) {
        w.pool = s.pool;
        w.pool.y = y;
        w.chunks = pool_pieces(s, images, threads, options_.bfloat16 ? 2 : 4);
        w.tasks = images * w.chunks;
      } else {
        w.tasks = s.weights->kernel().tasks(w.conv);
      }
      return w;
    }
    case StepKind::max_pool:
    case StepKind::mean_pool:
      w.pool = s.pool;
      w.pool.x = x;
      w.pool.y = y;
      w.tasks = items_of(w.pool, images);
      item_elements = out.width * min64(out.channels, kPoolChannels) * 4;
      break;
    case StepKind::scale_shift:
      w.scale_shift.shape = {images, out.channels, out.height, out.width, false};
      w.scale_shift.bfloat16 = options_.bfloat16;
      w.scale_shift.relu = s.relu;
      w.scale_shift.residual_kind = s.residual >= 0 ? Residual::plain : Residual::none;
      w.scale_shift.main = {s.scale.data(), s.center.data(), s.shift.data()};
      w.scale_shift.y = x;
      w.scale_shift.residual = residual;
      w.scale_shift.out = y;
      w.tasks = items_of(w.scale_shift.shape);
      item_elements = elements_of_item(w.scale_shift.shape);
      break;
    case StepKind::place:
      w.place = s.place;
      w.place.x = x;
      w.place.y = y;
      w.tasks = items_of(w.place, images);
      item_elements = out.width * out.channels;
      break;
  }
  w.grain = max64(1, kTaskElements / item_elements);
  return w;
}

// A step of the by-layer part, with the memory of all images.
Work Plan::prepare(const Step& s, const Layout& l, char* arena, const InputMemory& input, void* output) const {
  const auto at = [&](int v) -> char* {
    if (v < 0) return nullptr;
    const int source = source_[v];
    return source == source_[output_] ? static_cast<char*>(output) : arena + l.offset[source];
  };
  Work w = prepare(s, options_.images, l.threads, at(s.input), at(s.residual), at(s.output));
  if (s.kind == StepKind::input) {
    const Map& m = map(s.output);
    w.input = {m.height,       m.width,        m.channels,        input.stride_n, input.stride_c,
               input.stride_h, input.stride_w, options_.bfloat16, input.data,     at(s.output)};
    w.tasks = items_of(w.input, options_.images);
    w.grain = max64(1, kTaskElements / (m.width * m.channels));
  }
  return w;
}

void Plan::run_by_layer(const Layout& l, size_t step, char* arena, const InputMemory& input, void* output) const {
  const Work w = prepare(steps_[step], l, arena, input, output);
  std::atomic<int64_t> next{0};
  on_threads(static_cast<int>(min64(l.threads, ceil_div(w.tasks, w.grain))), [&](int64_t thread) {
    const DenormalsAreZero denormals;
    char* scratch = arena + l.scratch + thread * l.scratch_stride;
    for (int64_t begin; (begin = next.fetch_add(w.grain, std::memory_order_relaxed)) < w.tasks;) {
      execute(w, begin, min64(w.tasks, begin + w.grain), scratch);
    }
  });
}

void Plan::run_by_image(const Layout& l, char* arena, const InputMemory& input, void* output) const {
  const int64_t element = options_.bfloat16 ? 2 : 4;
  std::atomic<int64_t> next{0};
  on_threads(l.threads, [&](int64_t thread) {
    const DenormalsAreZero denormals;
    char* scratch = arena + l.scratch + thread * l.scratch_stride;
    char* part = arena + l.part + thread * l.part_stride;
    for (int64_t image; (image = next.fetch_add(options_.images_per_turn, std::memory_order_relaxed)) < options_.images;) {
      const int64_t images = min64(options_.images_per_turn, options_.images - image);
      const auto at = [&](int v) -> char* {
        if (v < 0) return nullptr;
        const int source = source_[v];
        if (l.own[source]) return part + l.offset[source];
        char* start = source == source_[output_] ? static_cast<char*>(output) : arena + l.offset[source];
        return start + bytes_of(source, image);
      };
      for (size_t i = 0; i < l.by_image; ++i) {
        const Step& s = steps_[i];
        Work w = prepare(s, images, 1, at(s.input), at(s.residual), at(s.output));
        if (s.kind == StepKind::input) {
          const Map& m = map(s.output);
          const char* data = static_cast<const char*>(input.data) + image * input.stride_n * element;
          w.input = {m.height,       m.width,        m.channels,        input.stride_n, input.stride_c,
                     input.stride_h, input.stride_w, options_.bfloat16, data,           at(s.output)};
          w.tasks = items_of(w.input, images);
        }
        execute(w, 0, w.tasks, scratch);
      }
    }
  });
}

void Plan::run(const InputMemory& input, void* output) const {
  if (output_ < 0) throw std::invalid_argument("this plan is not finished");
  const std::shared_ptr<const Layout> l = layout(torch_threads(), false);
  const ArenaPool::Lease arena(arenas_, l->bytes);
  if (l->by_image > 0) run_by_image(*l, arena.get(), input, output);
  for (size_t i = l->by_image; i < steps_.size(); ++i) run_by_layer(*l, i, arena.get(), input, output);
}

int64_t Plan::arena_bytes() const { return layout(torch_threads(), false)->bytes; }

std::vector<StepFacts> Plan::facts() const {
  const std::shared_ptr<const Layout> l = layout(torch_threads(), false);
  std::vector<StepFacts> all;
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    StepFacts f{};
    f.name = s.name;
    f.op = op_of(s);
    f.in = s.kind == StepKind::input ? map(s.output) : map(s.input);
    f.out = map(s.output);
    f.relu = s.relu;
    f.residual = s.residual >= 0;
    f.by_image = i < l->by_image;
    f.activation_bytes = bytes_of(s.output, options_.images) * (f.residual ? 2 : 1) +
                         (s.kind == StepKind::input ? bytes_of(s.output, options_.images) : bytes_of(s.input, options_.images));
    if (s.weights) {
      f.kernel = s.weights->kernel().name;
      f.weight_bytes = s.weights->bytes();
      f.flops = 2.0 * static_cast<double>(options_.images * s.conv.out_height * s.conv.out_width * s.conv.out_channels) *
                static_cast<double>(s.conv.in_channels / s.conv.groups * s.conv.kernel_h * s.conv.kernel_w);
    }
    all.push_back(std::move(f));
  }
  return all;
}

std::vector<StepFacts> Plan::profile(const InputMemory& input, void* output, int repeats) const {
  using Clock = std::chrono::steady_clock;
  std::vector<StepFacts> all = facts();
  const std::shared_ptr<const Layout> l = layout(torch_threads(), true);
  const ArenaPool::Lease arena(arenas_, l->bytes);
  std::vector<std::vector<double>> seconds(steps_.size());
  for (int r = 0; r < std::max(1, repeats); ++r) {
    for (size_t i = 0; i < steps_.size(); ++i) {
      const auto start = Clock::now();
      run_by_layer(*l, i, arena.get(), input, output);
      seconds[i].push_back(std::chrono::duration<double>(Clock::now() - start).count());
    }
  }
  for (size_t i = 0; i < steps_.size(); ++i) {
    std::vector<double>& s = seconds[i];
    std::nth_element(s.begin(), s.begin() + static_cast<std::ptrdiff_t>(s.size() / 2), s.end());
    all[i].seconds = s[s.size() / 2];
  }
  return all;
}

}  // namespace fastres
