// An inference plan: the steps of one network for one input shape, with everything decided before the first call.
//
// A plan is built once (add_*, then finish) and never changes afterwards; any number of threads may run it at once. Maps are channels_last,
// float or bf16. Values are numbered: what an add_* returns is what later steps name as their input.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "memory.h"

namespace fastres {

// A value: a map of one image.
struct Map {
  int64_t height, width, channels;
  int64_t elements() const { return height * width * channels; }
};

enum class StepKind { input, convolution, max_pool, mean_pool, scale_shift, place };

struct Step {
  StepKind kind;
  std::string name;
  int input = -1, residual = -1, output = -1;
  bool relu = false;
  bool linear = false;  // convolution: a matrix product, whose images are positions
  ConvShape conv{};     // convolution: of one image
  bool pooled = false;  // convolution: its max-pool goes with it, some rows at a time, and its own map is never in memory
  std::shared_ptr<const PackedWeights> weights;
  std::vector<float> bias;                  // convolution
  std::vector<float> scale, center, shift;  // scale_shift
  MapPool pool{};
  MapPlace place{};
};

// A step with its memory, ready to run: tasks that any thread may take.
struct Work {
  const Step* step;
  int64_t tasks, grain;  // a thread takes `grain` tasks at a time
  int64_t chunks;        // pooled convolution: tasks of an image, each of so many rows of the pool
  Conv conv;
  ScaleShiftAct scale_shift;
  MapPool pool;
  MapInput input;
  MapPlace place;
};

// Where everything lies for one number of threads. Offsets are from the start of the arena, or, for values inside the by-image group, from
// the start of a thread's own part.
struct Layout {
  int threads;
  size_t by_image;  // the first so many steps are run image by image
  std::vector<int64_t> offset;
  std::vector<bool> own;  // values that live in a thread's own part
  int64_t scratch, scratch_stride;
  int64_t part, part_stride;
  int64_t bytes;
};

struct PlanOptions {
  bool bfloat16 = false;
  int64_t images = 1;
  // Steps are run image by image, so that their activations stay in the second cache, while packed weights are at most this large: all
  // images read them again. 0 runs everything layer by layer.
  int64_t depth_first_bytes = 1 << 20;
  int64_t images_per_turn = 1;
  int64_t arena_limit = 0;
};

struct InputMemory {
  const void* data;
  int64_t stride_n, stride_c, stride_h, stride_w;  // in elements
};

struct StepFacts {
  std::string name, op, kernel;
  Map in, out;
  double flops;                            // of all images
  int64_t activation_bytes, weight_bytes;  // read and written
  bool by_image;                           // with all of torch's threads
  bool relu, residual;
  double seconds;  // median, where it was profiled
};

class Plan {
 public:
  Plan(const PlanOptions& options, const Map& input);

  // ---- building: each returns the value that the step makes ----
  int add_conv(const std::string& name, int input, ConvShape shape, bool linear, bool relu, int residual,
               std::shared_ptr<const PackedWeights> weights, std::vector<float> bias);
  int add_pool(const std::string& name, int input, bool mean, MapPool pool);
  // relu(scale*(x - center) + shift + residual); empty vectors: x itself
  int add_scale_shift(const std::string& name, int input, int residual, bool relu, std::vector<float> scale, std::vector<float> center,
                      std::vector<float> shift);
  int add_place(const std::string& name, int input, MapPlace place);
  // The same elements as one position.
  int add_flat(int input);
  void finish(int output);
  // The kernel that would be taken. Throws std::runtime_error with the reasons if none serves.
  const ConvKernel& kernel_for(const ConvShape& shape, bool linear, bool relu, bool residual, const std::string& name) const;

  // ---- running ----
  void run(const InputMemory& input, void* output) const;
  std::vector<StepFacts> facts() const;
  std::vector<StepFacts> profile(const InputMemory& input, void* output, int repeats) const;
  int64_t arena_bytes() const;  // of one call with torch's present number of threads
  int64_t weight_bytes() const;
  const ArenaPool& arenas() const { return arenas_; }
  const Map& map(int value) const { return maps_.at(static_cast<size_t>(value)); }
  int output() const { return output_; }
  const PlanOptions& options() const { return options_; }

 private:
  void merge_pools();
  int add(Step step, const Map& out);
  void check_value(int value) const;
  void check_residual(const std::string& name, int residual, const Map& out) const;
  int64_t bytes_of(int value, int64_t images) const;

  std::shared_ptr<const Layout> layout(int threads, bool by_layer) const;
  Layout lay_out(int threads, bool by_layer) const;
  size_t by_image_steps(int threads) const;

  Work prepare(const Step& step, int64_t images, int threads, const void* x, const void* residual, void* y) const;
  Work prepare(const Step& step, const Layout& l, char* arena, const InputMemory& input, void* output) const;
  void run_by_image(const Layout& l, char* arena, const InputMemory& input, void* output) const;
  void run_by_layer(const Layout& l, size_t step, char* arena, const InputMemory& input, void* output) const;

  const PlanOptions options_;
  std::vector<Map> maps_;
  std::vector<int> source_;  // of each value: itself, or the value whose memory it shares
  std::vector<Step> steps_;
  int output_ = -1;
  mutable ArenaPool arenas_;
  mutable std::mutex mutex_;
  mutable std::map<std::pair<int, bool>, std::shared_ptr<const Layout>> layouts_;
};

// The kernel's scratch for a piece of work, behind which a pooled convolution has its rows.
int64_t scratch_of(const Work& work);
void run_pooled(const Work& work, int64_t begin, int64_t end, void* scratch);
// How many pieces an image's pool is cut into.
int64_t pool_pieces(const Step& step, int64_t images, int threads, int64_t element);

}  // namespace fastres
