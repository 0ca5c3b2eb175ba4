// What all CUDA kernels are written in: storage types, vector accesses, asynchronous copies and the tensor cores' instructions.
// Compiled by nvcc these are single instructions; compiled by g++, after tests/emulation/cuda_emulation.h, they are its functions.
// No torch header, and nothing here is a kernel.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_fp16.h>
#define FASTRES_DEVICE __device__ __forceinline__
// `name`: the block's dynamic shared memory, aligned to 128 bytes.
#define FASTRES_DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define FASTRES_DEVICE __device__ inline
#define FASTRES_DYNAMIC_SHARED(name) unsigned char* const name = emulation::dynamic_shared()
#endif

namespace fastres::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

FASTRES_DEVICE float to_float(float x) { return x; }
FASTRES_DEVICE float to_float(BFloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTRES_DEVICE float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }
FASTRES_DEVICE void from_float(float x, float* out) { *out = x; }
FASTRES_DEVICE void from_float(float x, Half* out) { out->bits = __half_as_ushort(__float2half_rn(x)); }
FASTRES_DEVICE void from_float(float x, BFloat* out) {  // to nearest even; NaN stays NaN
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  out->bits = static_cast<uint16_t>((x != x ? (bits | 0x400000u) : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// x as it is after a store and a load.
template <class T>
FASTRES_DEVICE float rounded(float x) {
  T stored;
  from_float(x, &stored);
  return to_float(stored);
}

// The larger of two; a NaN stays one (fmaxf drops it).
FASTRES_DEVICE float larger(float a, float b) {
#ifdef __CUDACC__
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return a != a ? a : b != b ? b : a > b ? a : b;
#endif
}

// V neighbours in memory, moved as one access of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T x[V];
};
template <int V, class T>
FASTRES_DEVICE void load(const T* p, float (&out)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(p);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = to_float(pack.x[v]);
}

// ---- A register of a tensor core's operand: two 16-bit elements, or one float -----------------------------------------------------
template <class T>
constexpr int kPerRegister = 4 / static_cast<int>(sizeof(T));

template <class T>
FASTRES_DEVICE void unpack(uint32_t r, float (&x)[kPerRegister<T>]) {
  if constexpr (sizeof(T) == 4) {
    x[0] = __uint_as_float(r);
  } else {
    x[0] = to_float(T{static_cast<uint16_t>(r)});
    x[1] = to_float(T{static_cast<uint16_t>(r >> 16)});
  }
}
template <class T>
FASTRES_DEVICE uint32_t pack(const float (&x)[kPerRegister<T>]) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(x[0]);
  } else {
    T low, high;
    from_float(x[0], &low);
    from_float(x[1], &high);
    return static_cast<uint32_t>(high.bits) << 16 | low.bits;
  }
}

// To global memory. Of an assigned Pack the compiler would make one store for each element: it takes it apart before it looks for
// neighbours. Loads it leaves whole.
template <int V, class T>
FASTRES_DEVICE void store(T* p, const float (&x)[V]) {
#ifdef __CUDACC__
  if constexpr (sizeof(Pack<T, V>) == 16) {
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float part[kPerRegister<T>];
#pragma unroll
      for (int i = 0; i < kPerRegister<T>; ++i) part[i] = x[w * kPerRegister<T> + i];
      words[w] = pack<T>(part);
    }
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  } else
#endif
  {
    Pack<T, V> pack;
#pragma unroll
    for (int v = 0; v < V; ++v) from_float(x[v], &pack.x[v]);
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
  }
}

// ---- Asynchronous copies from global to shared memory -----------------------------------------------------------------------------
// Copies `Bytes` (4, 8 or 16; both addresses are multiples of it), or writes zeros if `valid` is false (the source is not read then).
// 16-byte copies go past the first cache. They land some time between here and the wait for their group.
template <int Bytes>
FASTRES_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16);
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared)), size = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(size) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(at), "l"(global), "n"(Bytes), "r"(size) : "memory");
  }
#else
  emulation::copy_async(shared, global, Bytes, valid);
#endif
}

// Closes this thread's group of copies (it may be empty).
FASTRES_DEVICE void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits until at most `Groups` of this thread's groups are under way. Other threads' copies are visible after a barrier only.
template <int Groups>
FASTRES_DEVICE void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Groups) : "memory");
#else
  emulation::wait_copies(Groups);
#endif
}

// ---- Tensor cores -----------------------------------------------------------------------------------------------------------------
// Four 8 x 16-byte matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8, a multiple of 16, and gets bytes
// 4·(l % 4) to 4·(l % 4) + 3 of row l / 4 of each. Transposed (16-bit elements only): it gets elements 2·(l % 4) and 2·(l % 4) + 1 of
// column l / 4 of each.
template <bool Transposed>
FASTRES_DEVICE void load_matrices(uint32_t (&r)[4], const void* shared) {
#ifdef __CUDACC__
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  }
#else
  emulation::load_matrices(r, shared, Transposed);
#endif
}

// d += a·b of a warp, 16 x 8 with a reduction over 32 bytes of elements (16 of 16 bits, 8 of float, of which the hardware reads the
// first 19 bits: TF32). With g = lane / 4, t = lane % 4 and pairs of 16-bit elements where floats are single:
//   a[0]: row g, element t;  a[1]: row g + 8, element t;  a[2]: row g, element t + 4;  a[3]: row g + 8, element t + 4 (of 8 registers a
//   row) b[0]: column g, element t;  b[1]: column g, element t + 4 d[0], d[1]: row g, columns 2t, 2t + 1;  d[2], d[3]: row g + 8
template <class T>
FASTRES_DEVICE void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

#ifdef __CUDACC__
#define FASTRES_MULTIPLY(T, shape)                                                                            \
  template <>                                                                                                 \
  FASTRES_DEVICE void multiply<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {            \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));                         \
  }
#else
#define FASTRES_MULTIPLY(T, shape)                                                                 \
  template <>                                                                                      \
  FASTRES_DEVICE void multiply<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { \
    emulation::multiply(d, a, b, shape);                                                           \
  }
#endif
FASTRES_MULTIPLY(Half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTRES_MULTIPLY(BFloat, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTRES_MULTIPLY(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTRES_MULTIPLY

}  // namespace fastres::cuda
