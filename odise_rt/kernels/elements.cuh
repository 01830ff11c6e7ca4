// SPDX-License-Identifier: Apache-2.0
// Element types of the kernels: float, Half and BFloat16 as stored, float in every sum.
//
// A C++ compiler without CUDA can include this and every other .cuh file here: the tests compile the kernels' bodies
// for the CPU that way (tests/odise_rt/kernels/emulation.hpp).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define ODISE_DEVICE __device__ __forceinline__
#else
#define ODISE_DEVICE inline
#endif

namespace odise {

/// Values of the `dtype` argument of the C functions.
enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

/// IEEE binary16 as it lies in memory.
struct Half {
  uint16_t bits;
};

/// The upper half of an IEEE binary32.
struct BFloat16 {
  uint16_t bits;
};

ODISE_DEVICE float float_of_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

ODISE_DEVICE uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

ODISE_DEVICE float to_float(float value) { return value; }

ODISE_DEVICE float to_float(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

ODISE_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t exponent = (value.bits >> 10) & 0x1Fu;
  const uint32_t fraction = value.bits & 0x3FFu;
  if (exponent == 0) {  // zero and subnormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  const uint32_t wide = exponent == 31 ? 0xFFu : exponent + 112u;
  return float_of_bits(sign | (wide << 23) | (fraction << 13));
#endif
}

/// Rounds to the nearest value, ties to even.
template <class T>
ODISE_DEVICE T from_float(float value);

template <>
ODISE_DEVICE float from_float<float>(float value) {
  return value;
}

template <>
ODISE_DEVICE BFloat16 from_float<BFloat16>(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return BFloat16{0x7FFF};
  return BFloat16{static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

template <>
ODISE_DEVICE Half from_float<Half>(float value) {
#if defined(__CUDA_ARCH__)
  return Half{__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_of_float(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return Half{static_cast<uint16_t>(sign | 0x7FFFu)};
  if (magnitude >= 0x477FF000u) return Half{static_cast<uint16_t>(sign | 0x7C00u)};  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {  // below 2^-14: a multiple of 2^-24, which the sum with 0.5 leaves in the low bits
    const float shifted = float_of_bits(magnitude) + 0.5f;
    return Half{static_cast<uint16_t>(sign | (bits_of_float(shifted) - 0x3F000000u))};
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return Half{static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13))};
#endif
}

/// Whether a mask logit is inside its mask: above zero, as sigmoid > 0.5 is. NaN is outside.
ODISE_DEVICE bool positive(float value) { return value > 0.0f; }
ODISE_DEVICE bool positive(Half value) { return static_cast<uint32_t>(value.bits) - 1u < 0x7C00u; }
ODISE_DEVICE bool positive(BFloat16 value) { return static_cast<uint32_t>(value.bits) - 1u < 0x7F80u; }

/// Two adjacent 16-bit elements in a register, the first in the low half, and what tensor cores multiply them with.
template <class T>
struct Pair;

template <>
struct Pair<Half> {
  static constexpr uint32_t kOnes = 0x3C003C00u;
};

template <>
struct Pair<BFloat16> {
  static constexpr uint32_t kOnes = 0x3F803F80u;
};

/// One where the logit is inside its mask, else zero, for both elements of a pair.
template <class T>
ODISE_DEVICE uint32_t inside_pair(uint32_t pair) {
#if defined(__CUDA_ARCH__)
  if constexpr (Pair<T>::kOnes == Pair<Half>::kOnes) {
    __half2 logits;
    memcpy(&logits, &pair, sizeof logits);
    const __half2 inside = __hgt2(logits, __half2half2(__ushort_as_half(0)));
    uint32_t bits;
    memcpy(&bits, &inside, sizeof bits);
    return bits;
  }
#endif
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (Pair<T>::kOnes == Pair<BFloat16>::kOnes) {
    __nv_bfloat162 logits;
    memcpy(&logits, &pair, sizeof logits);
    const __nv_bfloat162 inside = __hgt2(logits, __bfloat162bfloat162(__ushort_as_bfloat16(0)));
    uint32_t bits;
    memcpy(&bits, &inside, sizeof bits);
    return bits;
  }
#endif
  const uint32_t low = positive(T{static_cast<uint16_t>(pair & 0xFFFFu)}) ? 0xFFFFu : 0u;
  const uint32_t high = positive(T{static_cast<uint16_t>(pair >> 16)}) ? 0xFFFF0000u : 0u;
  return Pair<T>::kOnes & (low | high);
}

}  // namespace odise
