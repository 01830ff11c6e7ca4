// SPDX-License-Identifier: Apache-2.0
// Kernels by name, which the fatbin is asked for, and the C launcher of mask pooling.
#include "mask_pooling.cuh"

#include "odise_kernels.h"

using namespace odise;

extern __shared__ __align__(16) char shared_memory[];

#define ODISE_POOL_SUMS(NAME, TYPE, ROW_TILES)                                                                        \
  extern "C" __global__ void __launch_bounds__(kPoolThreads, 1)                                                       \
      NAME(const TYPE* __restrict__ logits, const TYPE* __restrict__ features, int queries, int channels, int pixels, \
           int splits, int stages, float* __restrict__ partial, int32_t* __restrict__ counts) {                       \
    mask_pool_sums<ROW_TILES, TYPE>(DeviceBlock(), shared_memory, logits, features, queries, channels, pixels,        \
                                    splits, stages, partial, counts);                                                 \
  }

// The same signature, so that a launcher only chooses a name; `stages` is not used.
#define ODISE_POOL_SUMS_SIMT(NAME, TYPE, ROW_TILES)                                                                   \
  extern "C" __global__ void __launch_bounds__(kPoolThreads, 1)                                                       \
      NAME(const TYPE* __restrict__ logits, const TYPE* __restrict__ features, int queries, int channels, int pixels, \
           int splits, int, float* __restrict__ partial, int32_t* __restrict__ counts) {                              \
    mask_pool_sums_simt<ROW_TILES, TYPE>(DeviceBlock(), shared_memory, logits, features, queries, channels, pixels,   \
                                         splits, partial, counts);                                                    \
  }

// With more than one block a multiprocessor in view, ptxas would spare the registers that loads under way need.
#define ODISE_POOL_FINISH(NAME, TYPE)                                                                                \
  extern "C" __global__ void __launch_bounds__(kPoolThreads, 1)                                                          \
      NAME(const float* __restrict__ partial, const int32_t* __restrict__ counts, int queries, int channels,          \
           int splits, TYPE* __restrict__ pooled, int32_t* __restrict__ areas) {                                      \
    mask_pool_finish<TYPE>(DeviceBlock(), shared_memory, partial, counts, queries, channels, splits, pooled, areas);  \
  }

ODISE_POOL_SUMS(odise_pool_sums_f16_2, Half, 2)
ODISE_POOL_SUMS(odise_pool_sums_f16_8, Half, 8)
ODISE_POOL_SUMS(odise_pool_sums_bf16_2, BFloat16, 2)
ODISE_POOL_SUMS(odise_pool_sums_bf16_8, BFloat16, 8)
ODISE_POOL_SUMS_SIMT(odise_pool_simt_f32_2, float, 2)
ODISE_POOL_SUMS_SIMT(odise_pool_simt_f32_7, float, 7)
ODISE_POOL_SUMS_SIMT(odise_pool_simt_bf16_2, BFloat16, 2)
ODISE_POOL_SUMS_SIMT(odise_pool_simt_bf16_7, BFloat16, 7)
ODISE_POOL_FINISH(odise_pool_finish_f32, float)
ODISE_POOL_FINISH(odise_pool_finish_f16, Half)
ODISE_POOL_FINISH(odise_pool_finish_bf16, BFloat16)

// A TensorRT plugin passes inputs, numbers, outputs in this order; the features are an input only for their type.
#define ODISE_POOL_FINISH_AFTER(NAME, TYPE)                                                                           \
  extern "C" __global__ void __launch_bounds__(kPoolThreads, 1)                                                          \
      NAME(const float* __restrict__ partial, const int32_t* __restrict__ counts, const TYPE*, int queries,           \
           int channels, int splits, TYPE* __restrict__ pooled, int32_t* __restrict__ areas) {                        \
    mask_pool_finish<TYPE>(DeviceBlock(), shared_memory, partial, counts, queries, channels, splits, pooled, areas);  \
  }

ODISE_POOL_FINISH_AFTER(odise_pool_finish_after_f16, Half)
ODISE_POOL_FINISH_AFTER(odise_pool_finish_after_bf16, BFloat16)

namespace {

cudaError_t plan_here(int32_t dtype, int64_t batch, int64_t queries, int64_t channels, int64_t pixels,
                      MaskPoolPlan* plan) {
  int device = 0, multiprocessors = 0, shared_limit = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (!error) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (!error) error = cudaDeviceGetAttribute(&shared_limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (!error) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error) return error;
  *plan = mask_pool_plan(dtype, batch, queries, channels, pixels, multiprocessors, shared_limit, major * 10 + minor);
  return plan->valid ? cudaSuccess : cudaErrorInvalidValue;
}

template <class T>
using SumsKernel = void (*)(const T*, const T*, int, int, int, int, int, float*, int32_t*);
template <class T>
using FinishKernel = void (*)(const float*, const int32_t*, int, int, int, T*, int32_t*);

template <class T>
cudaError_t launch(const MaskPoolPlan& plan, SumsKernel<T> sums, FinishKernel<T> finish, const void* logits,
                   const void* features, int batch, int queries, int channels, int pixels, void* workspace,
                   void* pooled, int32_t* areas, cudaStream_t stream) {
  float* partial = static_cast<float*>(workspace);
  int32_t* counts = reinterpret_cast<int32_t*>(static_cast<char*>(workspace) + plan.counts_offset);
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(sums),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error) return error;
  sums<<<dim3(plan.splits, plan.grid_y, batch), kPoolThreads, plan.shared_bytes, stream>>>(
      static_cast<const T*>(logits), static_cast<const T*>(features), queries, channels, pixels, plan.splits,
      plan.stages, partial, counts);
  const cudaError_t launched = cudaGetLastError();
  if (launched) return launched;
  finish<<<dim3(plan.finish_grid_x, queries, batch), kPoolThreads, kFinishBytes, stream>>>(
      partial, counts, queries, channels, plan.splits, static_cast<T*>(pooled), areas);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t odise_mask_pool_workspace(int32_t dtype, int64_t batch, int64_t queries, int64_t channels,
                                                 int64_t pixels, size_t* bytes) {
  MaskPoolPlan plan;
  const cudaError_t error = plan_here(dtype, batch, queries, channels, pixels, &plan);
  if (!error) *bytes = static_cast<size_t>(plan.workspace_bytes);
  return error;
}

extern "C" cudaError_t odise_mask_pool(int32_t dtype, const void* logits, const void* features, int64_t batch,
                                       int64_t queries, int64_t channels, int64_t pixels, void* workspace,
                                       size_t workspace_bytes, void* pooled, int32_t* areas, cudaStream_t stream) {
  if (!logits || !features || !workspace || !pooled || !areas) return cudaErrorInvalidValue;
  if (reinterpret_cast<uintptr_t>(workspace) % 16) return cudaErrorMisalignedAddress;
  MaskPoolPlan plan;
  const cudaError_t error = plan_here(dtype, batch, queries, channels, pixels, &plan);
  if (error) return error;
  if (workspace_bytes < static_cast<size_t>(plan.workspace_bytes)) return cudaErrorInvalidValue;
  const bool small = plan.row_tiles == 2;
  const int b = static_cast<int>(batch), q = static_cast<int>(queries), c = static_cast<int>(channels),
            p = static_cast<int>(pixels);
  if (dtype == kFloat32) {
    return launch<float>(plan, small ? odise_pool_simt_f32_2 : odise_pool_simt_f32_7, odise_pool_finish_f32, logits,
                         features, b, q, c, p, workspace, pooled, areas, stream);
  }
  if (dtype == kFloat16) {
    return launch<Half>(plan, small ? odise_pool_sums_f16_2 : odise_pool_sums_f16_8, odise_pool_finish_f16, logits,
                        features, b, q, c, p, workspace, pooled, areas, stream);
  }
  const SumsKernel<BFloat16> sums = plan.simt ? (small ? odise_pool_simt_bf16_2 : odise_pool_simt_bf16_7)
                                              : (small ? odise_pool_sums_bf16_2 : odise_pool_sums_bf16_8);
  return launch<BFloat16>(plan, sums, odise_pool_finish_bf16, logits, features, b, q, c, p, workspace, pooled, areas,
                          stream);
}
