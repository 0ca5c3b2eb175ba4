// Which steps run image by image, and where every value lies in the arena.
#include <algorithm>

#include "plan.h"

namespace fastres {
namespace {

constexpr int64_t kSlack = 256;  // kernels may read, never use, this far past the end of a value
constexpr int64_t kAlign = 64;
// Threads' parts start at different sets of the caches.
constexpr int64_t kPartStagger = 4096 + kAlign;
// Image by image is worth it only where the last turn leaves few threads without an image: images / (turns * threads) at least this.
constexpr double kLeastBalance = 0.8;

// Something that needs memory from its first to its last time, both included.
struct Interval {
  int64_t bytes, first, last;
  int64_t* offset;
};

// Greedy by size: the largest first, each at the lowest place that is free for its whole life. Returns the size of it all.
int64_t place_all(std::vector<Interval>& intervals) {
  std::stable_sort(intervals.begin(), intervals.end(), [](const Interval& a, const Interval& b) { return a.bytes > b.bytes; });
  std::vector<const Interval*> placed;  // by offset
  int64_t total = 0;
  for (Interval& i : intervals) {
    int64_t at = 0;
    for (const Interval* other : placed) {
      if (other->last < i.first || i.last < other->first) continue;
      if (at + i.bytes <= *other->offset) break;
      at = max64(at, *other->offset + other->bytes);
    }
    *i.offset = at;
    total = max64(total, at + i.bytes);
    placed.insert(std::upper_bound(placed.begin(), placed.end(), at, [](int64_t x, const Interval* p) { return x < *p->offset; }), &i);
  }
  return total;
}

int64_t padded(int64_t bytes) { return round_up(bytes + kSlack, kAlign); }

}  // namespace

int64_t Plan::bytes_of(int value, int64_t images) const { return images * map(value).elements() * (options_.bfloat16 ? 2 : 4); }

size_t Plan::by_image_steps(int threads) const {
  const int64_t turns = ceil_div(options_.images, options_.images_per_turn), rounds = ceil_div(turns, threads);
  if (options_.depth_first_bytes <= 0 || turns < threads) return 0;
  if (static_cast<double>(turns) < kLeastBalance * static_cast<double>(rounds * threads)) return 0;
  size_t n = 0;
  while (n < steps_.size() && (!steps_[n].weights || steps_[n].weights->bytes() <= options_.depth_first_bytes)) ++n;
  return n;
}

Layout Plan::lay_out(int threads, bool by_layer) const {
  Layout l{};
  l.threads = threads;
  l.by_image = by_layer ? 0 : by_image_steps(threads);
  const size_t values = maps_.size();
  l.offset.assign(values, 0);
  l.own.assign(values, false);
  const auto by_image = static_cast<int64_t>(l.by_image);

  // The lives of values, in steps. Values that share memory live in their source.
  std::vector<int64_t> first(values, -1), last(values, -1);
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& s = steps_[i];
    first[s.output] = last[s.output] = static_cast<int64_t>(i);
    for (int v : {s.input, s.residual}) {
      if (v >= 0) last[source_[v]] = static_cast<int64_t>(i);
    }
  }
  const int result = source_[output_];

  // Inside the by-image group a step is a moment; seen from outside the group is one moment, as its threads are at different steps.
  std::vector<Interval> inside, outside;
  int64_t scratch = 0;
  for (size_t v = 0; v < values; ++v) {
    const int value = static_cast<int>(v);
    if (source_[v] != value || value == result || first[v] < 0) continue;
    if (last[v] < by_image) {
      l.own[v] = true;
      inside.push_back({padded(bytes_of(value, options_.images_per_turn)), first[v], last[v], &l.offset[v]});
    } else {
      outside.push_back({padded(bytes_of(value, options_.images)), max64(first[v], by_image - 1), last[v], &l.offset[v]});
    }
  }
  for (size_t i = 0; i < steps_.size(); ++i) {
    const bool alone = i < l.by_image;
    const Work w = prepare(steps_[i], alone ? options_.images_per_turn : options_.images, alone ? 1 : threads, nullptr, nullptr, nullptr);
    if (steps_[i].weights) scratch = max64(scratch, scratch_of(w));
  }
  l.part_stride = inside.empty() ? 0 : round_up(place_all(inside), 4096) + kPartStagger;
  if (l.part_stride > 0) outside.push_back({l.part_stride * threads, 0, by_image - 1, &l.part});
  l.scratch_stride = scratch == 0 ? 0 : round_up(scratch, 4096) + kPartStagger;
  if (l.scratch_stride > 0) outside.push_back({l.scratch_stride * threads, 0, static_cast<int64_t>(steps_.size()), &l.scratch});
  l.bytes = max64(kAlign, place_all(outside));
  return l;
}

std::shared_ptr<const Layout> Plan::layout(int threads, bool by_layer) const {
  const std::lock_guard lock(mutex_);
  std::shared_ptr<const Layout>& known = layouts_[{threads, by_layer}];
  if (!known) known = std::make_shared<const Layout>(lay_out(threads, by_layer));
  return known;
}

}  // namespace fastres
