// SPDX-License-Identifier: Apache-2.0
// What a kernel body may do, as two classes it is written against: a warp and a thread block.
//
// A body is a function template over the block class. DeviceBlock below runs it on a GPU: "each thread" is this
// thread, a Lane<T> is a register. The tests have a second pair of classes that runs the same body on a CPU, warp by
// warp: there a Lane<T> is 32 values. So the tiling, the index arithmetic, the shared-memory layout and the fragment
// layout of the tensor cores are tested without a GPU. Races and the instructions themselves are tested on what nvcc
// makes of it (tests/odise_rt/kernels/ptx_machine.cpp); timing is not.
#pragma once

#include "elements.cuh"

namespace odise {

constexpr int kWarp = 32;

/// Registers of one lane, and what ldmatrix and mma exchange.
struct Words4 {
  uint32_t word[4];
};

struct Words2 {
  uint32_t word[2];
};

struct Floats4 {
  float value[4];
};

/// Two floats that are written at once.
struct alignas(8) Floats2 {
  float value[2];
};

#if defined(__CUDACC__)

struct DeviceWarp {
  /// A value of every lane; on the GPU, this lane's.
  template <class T>
  struct Lane {
    T value{};
    ODISE_DEVICE T& operator[](int) { return value; }
    ODISE_DEVICE const T& operator[](int) const { return value; }
  };

  /// An address in shared memory as instructions take it: 32 bits.
  using Shared = uint32_t;

  int index;  // within the block
  int lane;

  template <class F>
  ODISE_DEVICE void each(F&& body) const {
    body(lane);
  }

  ODISE_DEVICE uint32_t ballot(const Lane<bool>& predicate) const { return __ballot_sync(~0u, predicate.value); }

  template <class T>
  ODISE_DEVICE T from(const Lane<T>& values, int source) const {
    return __shfl_sync(~0u, values.value, source);
  }

  ODISE_DEVICE int sum(const Lane<int>& values) const {
#if __CUDA_ARCH__ >= 800
    return __reduce_add_sync(~0u, values.value);
#else
    int total = values.value;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) total += __shfl_xor_sync(~0u, total, distance);
    return total;
#endif
  }

  ODISE_DEVICE float max(const Lane<float>& values) const {
    float extreme = values.value;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      extreme = fmaxf(extreme, __shfl_xor_sync(~0u, extreme, distance));
    }
    return extreme;
  }

  /// Four 8 x 8 matrices of 16-bit elements. Lane l names row l % 8 of matrix l / 8 by its address (16 bytes,
  /// aligned); it receives elements 2 * (l % 4) and the next of row l / 4 of each.
  template <class Address>
  ODISE_DEVICE void load_matrices(Lane<Words4>& to, Address&& address) const {
    const uint32_t at = address(lane);
    uint32_t* word = to.value.word;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(at)
                 : "memory");
  }

  /// sums (16 x 8) += left (16 x 16, rows) * right (16 x 8, columns), float sums.
  template <class T>
  ODISE_DEVICE void multiply(Lane<Floats4>& sums, const Lane<Words4>& left, const Lane<Words2>& right) const {
    float* d = sums.value.value;
    const uint32_t* a = left.value.word;
    const uint32_t* b = right.value.word;
#if __CUDA_ARCH__ >= 800
    if constexpr (Pair<T>::kOnes == Pair<Half>::kOnes) {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                   "{%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                   "{%0,%1,%2,%3};"
                   : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
#else
    // sm_75 multiplies 8 columns of the left side at a time, and has no bfloat16: the launcher never asks for that.
    if constexpr (Pair<T>::kOnes == Pair<Half>::kOnes) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
      }
    } else {
      __trap();
    }
#endif
  }
};

struct DeviceBlock {
  using Warp = DeviceWarp;
  using Shared = DeviceWarp::Shared;

  /// A value of every warp or thread that lives across barriers; on the GPU, registers.
  template <class T>
  struct PerWarp {
    T value{};
    ODISE_DEVICE T& operator[](int) { return value; }
  };
  template <class T>
  using PerThread = PerWarp<T>;

  ODISE_DEVICE int64_t x() const { return blockIdx.x; }
  ODISE_DEVICE int64_t y() const { return blockIdx.y; }
  ODISE_DEVICE int64_t z() const { return blockIdx.z; }
  ODISE_DEVICE int threads() const { return blockDim.x; }

  template <class F>
  ODISE_DEVICE void each_thread(F&& body) const {
    body(static_cast<int>(threadIdx.x));
  }

  template <class F>
  ODISE_DEVICE void each_warp(F&& body) const {
    body(DeviceWarp{static_cast<int>(threadIdx.x) / kWarp, static_cast<int>(threadIdx.x) % kWarp});
  }

  ODISE_DEVICE void sync() const { __syncthreads(); }

  /// For all threads together. The shuffle changes nothing but what ptxas knows: it would work out an address anew, from
  /// a special register that takes its time, for every copy.
  ODISE_DEVICE Shared shared(const char* memory) const {
    return __shfl_sync(~0u, static_cast<Shared>(__cvta_generic_to_shared(memory)), 0);
  }

  ODISE_DEVICE void clear16(char* shared) const { *reinterpret_cast<uint4*>(shared) = make_uint4(0, 0, 0, 0); }

  /// Copies 16 aligned bytes of global memory into shared memory, or clears them there. Done after commit() and wait().
  ODISE_DEVICE void copy16(Shared to, const void* global, bool present) const {
#if __CUDA_ARCH__ >= 800
    // Whole lines of 128 bytes to the L2: who copies half of one asks for the rest soon.
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(present ? 16 : 0)
                 : "memory");
#else
    const uint4 words = present ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
                 "r"(words.w)
                 : "memory");
#endif
  }

  /// Closes a group of copies.
  ODISE_DEVICE void commit() const {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  /// Waits until at most `pending` of this thread's groups, at most 6, are not done.
  ODISE_DEVICE void wait(int pending) const {
#if __CUDA_ARCH__ >= 800
    // Most stages first, which is where time counts; as a switch, each step would look up where to go on.
    if (pending > 5) {
      asm volatile("cp.async.wait_group 6;" ::: "memory");
    } else if (pending > 4) {
      asm volatile("cp.async.wait_group 5;" ::: "memory");
    } else if (pending > 3) {
      asm volatile("cp.async.wait_group 4;" ::: "memory");
    } else if (pending > 2) {
      asm volatile("cp.async.wait_group 3;" ::: "memory");
    } else if (pending > 1) {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    } else if (pending > 0) {
      asm volatile("cp.async.wait_group 1;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#endif
  }

  ODISE_DEVICE void add(int32_t* to, int32_t value) const { atomicAdd(to, value); }
  ODISE_DEVICE void lower(int32_t* to, int32_t value) const { atomicMin(to, value); }
  ODISE_DEVICE void raise(int32_t* to, int32_t value) const { atomicMax(to, value); }
};

ODISE_DEVICE float exp2_of(float value) { return exp2f(value); }

/// Numbers below 2^-126, given and returned, are zero; else to 2^-22 of the value.
ODISE_DEVICE float fast_exp2_of(float value) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(value));
  return power;
}

ODISE_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }
ODISE_DEVICE int first_bit(uint32_t bits) { return __ffs(static_cast<int>(bits)) - 1; }
ODISE_DEVICE int last_bit(uint32_t bits) { return 31 - __clz(static_cast<int>(bits)); }

#else

inline float exp2_of(float value) { return std::exp2(value); }
inline float fast_exp2_of(float value) { return std::exp2(value); }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline int first_bit(uint32_t bits) { return __builtin_ctz(bits); }
inline int last_bit(uint32_t bits) { return 31 - __builtin_clz(bits); }

#endif

ODISE_DEVICE float larger(float a, float b) { return a < b ? b : a; }

}  // namespace odise
