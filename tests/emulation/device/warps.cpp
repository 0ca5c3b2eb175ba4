// What the lanes of a warp do together, and asynchronous copies. The last lane that arrives does the work for all: one rendezvous each.
#include <stdio.h>

#include "intrinsics.h"
#include "scheduler.h"

namespace emulation {

const char* const collective_names[] = {"__syncwarp",    "__shfl_sync", "__shfl_xor_sync", "__shfl_down_sync", "__shfl_up_sync",
                                        "__ballot_sync", "__any_sync",  "__all_sync",      "load_matrices",    "multiply"};

namespace {

constexpr int kWidth = static_cast<int>(kLanes);

bool in(uint32_t mask, int lane) { return mask >> lane & 1; }

void exchange(uint32_t mask, Thread* const (&lanes)[32]) {
  uint64_t values[kWidth] = {}, results[kWidth] = {};
  uint32_t votes = 0;
  for (int n = 0; n < kWidth; ++n) {
    if (!in(mask, n)) continue;
    values[n] = lanes[n]->arrival.value;
    votes |= static_cast<uint32_t>(values[n] != 0) << n;
  }
  for (int n = 0; n < kWidth; ++n) {
    if (!in(mask, n)) continue;
    const Arrival& a = lanes[n]->arrival;
    const int first = n / a.width * a.width, last = first + a.width - 1;
    int from = n;
    switch (a.what) {
      case Collective::index: from = first + (a.argument & (a.width - 1)); break;
      case Collective::exclusive_or: from = (n ^ a.argument) <= last ? n ^ a.argument : n; break;
      case Collective::down: from = n + a.argument <= last ? n + a.argument : n; break;
      case Collective::up: from = n - a.argument >= first ? n - a.argument : n; break;
      default: break;
    }
    if (!in(mask, from)) fail("Divergence", "a shuffle reads from lane %d, which isn't in the mask %08x", from, mask);
    results[n] = a.what == Collective::ballot ? votes
                 : a.what == Collective::any  ? votes != 0
                 : a.what == Collective::all  ? votes == mask
                                              : values[from];
  }
  for (int n = 0; n < kWidth; ++n) {
    if (in(mask, n)) lanes[n]->arrival.value = results[n];
  }
}

// Lane 4·g + q gets word q of row g of each matrix; transposed, elements 2q and 2q + 1 of column g.
void distribute(Thread* const (&lanes)[32], bool transposed) {
  uint16_t rows[32][8];
  for (int n = 0; n < kWidth; ++n) memcpy(rows[n], lanes[n]->arrival.a, 16);
  for (int n = 0; n < kWidth; ++n) {
    uint32_t* out = static_cast<uint32_t*>(lanes[n]->arrival.out);
    const int g = n / 4, q = n % 4;
    for (int m = 0; m < 4; ++m) {
      const uint16_t (*matrix)[8] = rows + 8 * m;
      const uint16_t low = transposed ? matrix[2 * q][g] : matrix[g][2 * q];
      const uint16_t high = transposed ? matrix[2 * q + 1][g] : matrix[g][2 * q + 1];
      out[m] = static_cast<uint32_t>(high) << 16 | low;
    }
  }
}

enum class Kind : int { half, bfloat, tf32 };

// The elements of a register: one or two.
template <Kind K>
void widen(uint32_t bits, double* out) {
  if constexpr (K == Kind::tf32) {
    out[0] = __uint_as_float(bits & 0xffffe000u);
  } else if constexpr (K == Kind::bfloat) {
    out[0] = __uint_as_float(bits << 16);
    out[1] = __uint_as_float(bits & 0xffff0000u);
  } else {
    out[0] = __half2float({static_cast<uint16_t>(bits)});
    out[1] = __half2float({static_cast<uint16_t>(bits >> 16)});
  }
}

template <Kind K>
void product(Thread* const (&lanes)[32]) {
  constexpr int P = K == Kind::tf32 ? 1 : 2, D = 8 * P;  // elements of a register, of the reduction
  double a[16][D], b[D][8], d[16][8];
  for (int n = 0; n < kWidth; ++n) {
    const int g = n / 4, q = n % 4;
    const uint32_t* left = static_cast<const uint32_t*>(lanes[n]->arrival.a);
    const uint32_t* right = static_cast<const uint32_t*>(lanes[n]->arrival.b);
    for (int r = 0; r < 4; ++r) widen<K>(left[r], &a[g + r % 2 * 8][(q + r / 2 * 4) * P]);
    for (int r = 0; r < 2; ++r) {
      double pair[2];
      widen<K>(right[r], pair);
      for (int e = 0; e < P; ++e) b[(q + r * 4) * P + e][g] = pair[e];
    }
  }
  for (int row = 0; row < 16; ++row) {
    double sum[8] = {};
    for (int k = 0; k < D; ++k) {
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    memcpy(d[row], sum, sizeof sum);
  }
  for (int n = 0; n < kWidth; ++n) {
    const int g = n / 4, q = n % 4;
    float* out = static_cast<float*>(lanes[n]->arrival.out);
    for (int r = 0; r < 4; ++r) out[r] = static_cast<float>(out[r] + d[g + r / 2 * 8][2 * q + r % 2]);
  }
}

void perform(uint32_t mask) {
  Thread* const(&lanes)[32] = current->warp->lanes;
  const Arrival& a = current->arrival;
  switch (a.what) {
    case Collective::sync: return;
    case Collective::matrices: return distribute(lanes, a.argument != 0);
    case Collective::product:
      switch (static_cast<Kind>(a.argument)) {
        case Kind::half: return product<Kind::half>(lanes);
        case Kind::bfloat: return product<Kind::bfloat>(lanes);
        case Kind::tf32: return product<Kind::tf32>(lanes);
      }
      return;
    default: return exchange(mask, lanes);
  }
}

// Where this lane's arrival completes the mask the work is done and the others may go on; else it waits.
void meet(const char* file, int line) {
  Thread& me = *current;
  Warp& warp = *me.warp;
  const Arrival& mine = me.arrival;
  const char* name = collective_names[static_cast<int>(mine.what)];
  const uint32_t self = 1u << me.number % kLanes, others = warp.waiting & mine.mask;
  if ((mine.mask & self) == 0) fail("Divergence", "%s (%s:%d) with a mask without %s", name, file, line, place_name(me).c_str());
  if ((mine.mask & warp.left) != 0) {
    fail("Divergence", "%s waits at %s (%s:%d) for lane %d, which has left or doesn't exist", place_name(me).c_str(), name, file, line,
         __builtin_ctz(mine.mask & warp.left));
  }
  if (others != 0) {  // they agree among themselves: one of them is enough
    const Thread& other = *warp.lanes[__builtin_ctz(others)];
    const Arrival& its = other.arrival;
    if (its.what != mine.what || its.mask != mine.mask || other.line != line || (other.file != file && strcmp(other.file, file) != 0)) {
      fail("Divergence", "lanes of a warp meet at different places: %s at %s (%s:%d), %s at %s (%s:%d)", place_name(me).c_str(), name, file,
           line, place_name(other).c_str(), collective_names[static_cast<int>(its.what)], other.file, other.line);
    }
  }
  if ((others | self) != mine.mask) {
    warp.waiting |= self;
    return wait_in(Thread::at_collective, file, line);
  }
  perform(mine.mask);
  warp.waiting &= ~mine.mask;
  for (uint32_t rest = others; rest != 0; rest &= rest - 1) set_ready(*warp.lanes[__builtin_ctz(rest)]);
}

}  // namespace

uint64_t collective(Collective what, uint32_t mask, uint64_t value, int argument, int width, const char* file, int line) {
  if (width < 1 || width > kWidth || (width & (width - 1)) != 0) fail("EmulationError", "a shuffle of width %d (%s:%d)", width, file, line);
  current->arrival = {what, mask, value, argument, width, nullptr, nullptr, nullptr};
  if (what != Collective::sync) {
    meet(file, line);
    return current->arrival.value;
  }
  void* object = &current->warp->sync[current->syncs++ & 1];  // memory is ordered by __syncwarp only
  release(object);
  meet(file, line);
  acquire(object);
  return 0;
}

void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* shape, const char* file, int line) {
  Kind kind;
  if (strcmp(shape, "m16n8k16.row.col.f32.f16.f16.f32") == 0) {
    kind = Kind::half;
  } else if (strcmp(shape, "m16n8k16.row.col.f32.bf16.bf16.f32") == 0) {
    kind = Kind::bfloat;
  } else if (strcmp(shape, "m16n8k8.row.col.f32.tf32.tf32.f32") == 0) {
    kind = Kind::tf32;
  } else {
    fail("Unsupported", "a product of shape %s (%s:%d)", shape, file, line);
  }
  current->arrival = {Collective::product, ~0u, 0, static_cast<int>(kind), kWidth, d, a, b};
  meet(file, line);
}

void exchange_rows(uint32_t (&r)[4], const Row& row, bool transposed, const char* file, int line) {
  current->arrival = {Collective::matrices, ~0u, 0, transposed, kWidth, r, &row, nullptr};
  meet(file, line);
}

void check_shared(const void* shared, int bytes, const char* what, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(shared) % static_cast<uintptr_t>(bytes) != 0) {
    fail("Misaligned", "%s: the address isn't a multiple of %d, %s (%s:%d)", what, bytes, place_name(*current).c_str(), file, line);
  }
  if (!in_shared(shared, static_cast<size_t>(bytes))) {
    fail("SharedMemoryError", "%s lies outside the block's shared memory, %s (%s:%d)", what, place_name(*current).c_str(), file, line);
  }
}

}  // namespace emulation
