// SPDX-License-Identifier: Apache-2.0
// Kernels by name, which the fatbin is asked for, and the C launcher of deformable attention.
#include "deformable_attention.cuh"

#include "odise_kernels.h"

using namespace odise;

// Numbers only, no structures: that is what every way of launching a kernel by name can pass.
#define ODISE_ATTENTION(NAME, TYPE, VECTOR)                                                                          \
  extern "C" __global__ void __launch_bounds__(kAttentionThreads, 4)                                                   \
      NAME(const TYPE* __restrict__ value, const float* __restrict__ references, const TYPE* __restrict__ offsets,    \
           const TYPE* __restrict__ weight_logits, int batch, int queries, int memory, int heads, int channels,       \
           int points, int reference_batch, int levels, int64_t shape0, int64_t shape1, int64_t shape2,               \
           int64_t shape3, int64_t shape4, int64_t shape5, int64_t shape6, int64_t shape7, TYPE* __restrict__ out) {  \
    deformable_attention<TYPE, VECTOR>(                                                                               \
        DeviceBlock(), value, references, offsets, weight_logits,                                                     \
        AttentionSizes{batch, queries, memory, heads, channels, points, reference_batch},                             \
        AttentionLevels{levels, {shape0, shape1, shape2, shape3, shape4, shape5, shape6, shape7}}, out);              \
  }

ODISE_ATTENTION(odise_attention_f32_4, float, 4)
ODISE_ATTENTION(odise_attention_f32_1, float, 1)
ODISE_ATTENTION(odise_attention_f16_8, Half, 8)
ODISE_ATTENTION(odise_attention_f16_1, Half, 1)
ODISE_ATTENTION(odise_attention_bf16_8, BFloat16, 8)
ODISE_ATTENTION(odise_attention_bf16_1, BFloat16, 1)

namespace {

template <class T, class Kernel>
cudaError_t launch(Kernel kernel, int64_t blocks, const void* value, const float* references, const void* offsets,
                   const void* weight_logits, const AttentionSizes& sizes, const AttentionLevels& levels, void* out,
                   cudaStream_t stream) {
  kernel<<<static_cast<unsigned>(blocks), kAttentionThreads, 0, stream>>>(
      static_cast<const T*>(value), references, static_cast<const T*>(offsets), static_cast<const T*>(weight_logits),
      sizes.batch, sizes.queries, sizes.memory, sizes.heads, sizes.channels, sizes.points, sizes.reference_batch,
      static_cast<int>(levels.count), levels.shape[0], levels.shape[1], levels.shape[2], levels.shape[3],
      levels.shape[4], levels.shape[5], levels.shape[6], levels.shape[7], static_cast<T*>(out));
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t odise_deformable_attention(int32_t dtype, const void* value, const float* references,
                                                  const void* offsets, const void* weight_logits, int32_t batch,
                                                  int32_t reference_batch, int32_t queries, int32_t heads,
                                                  int32_t channels, int32_t levels, const int32_t* heights,
                                                  const int32_t* widths, int32_t points, void* out,
                                                  cudaStream_t stream) {
  if (!value || !references || !offsets || !weight_logits || !heights || !widths || !out) return cudaErrorInvalidValue;
  if (dtype < kFloat32 || dtype > kBFloat16 || batch < 1 || queries < 1 || heads < 1 || channels < 1 || points < 1 ||
      levels < 1 || levels > kAttentionMaxLevels || (reference_batch != 1 && reference_batch != batch)) {
    return cudaErrorInvalidValue;
  }
  AttentionLevels shapes{};
  shapes.count = levels;
  int64_t memory = 0;
  for (int l = 0; l < levels; ++l) {
    if (heights[l] < 1 || widths[l] < 1) return cudaErrorInvalidValue;
    shapes.shape[l] = static_cast<int64_t>(heights[l]) << 32 | widths[l];
    memory += static_cast<int64_t>(heights[l]) * widths[l];
  }
  if (memory > 0x7FFFFFFF) return cudaErrorInvalidValue;
  const AttentionSizes sizes{batch, queries, static_cast<int32_t>(memory), heads, channels, points, reference_batch};
  const int vector = attention_vector(dtype, channels, value, out);
  const int64_t work = static_cast<int64_t>(batch) * queries * heads * (channels / vector);
  const int64_t blocks = (work + kAttentionThreads - 1) / kAttentionThreads;
  if (blocks > 0x7FFFFFFF) return cudaErrorInvalidValue;
  if (dtype == kFloat32) {
    return launch<float>(vector == 4 ? odise_attention_f32_4 : odise_attention_f32_1, blocks, value, references,
                         offsets, weight_logits, sizes, shapes, out, stream);
  }
  if (dtype == kFloat16) {
    return launch<Half>(vector == 8 ? odise_attention_f16_8 : odise_attention_f16_1, blocks, value, references, offsets,
                        weight_logits, sizes, shapes, out, stream);
  }
  return launch<BFloat16>(vector == 8 ? odise_attention_bf16_8 : odise_attention_bf16_1, blocks, value, references,
                          offsets, weight_logits, sizes, shapes, out, stream);
}
