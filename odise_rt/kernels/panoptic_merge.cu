// SPDX-License-Identifier: Apache-2.0
// Kernels by name, which the fatbin is asked for, and the C launchers of the panoptic merge.
#include "panoptic_merge.cuh"

#include "odise_kernels.h"

using namespace odise;

extern __shared__ __align__(16) char shared_memory[];

extern "C" __global__ void __launch_bounds__(kMergeThreads)
    odise_merge_prepare(int cell_rows, int cell_columns, int stride, int test_rows, int test_columns, int rows,
                        int columns, int queries, int32_t* __restrict__ row_first, float* __restrict__ row_weights,
                        int32_t* __restrict__ column_first, float* __restrict__ column_weights,
                        int32_t* __restrict__ areas) {
  merge_prepare(DeviceBlock(), cell_rows, cell_columns, stride, test_rows, test_columns, rows, columns, queries,
                row_first, row_weights, column_first, column_weights, areas);
}

#define ODISE_MERGE(NAME, TYPE)                                                                                     \
  extern "C" __global__ void __launch_bounds__(kMergeThreads, 2)                                                     \
      NAME(const TYPE* __restrict__ logits, const float* __restrict__ scores, int queries, int cell_rows,            \
           int cell_columns, const int32_t* __restrict__ row_first, const float* __restrict__ row_weights, int rows, \
           const int32_t* __restrict__ column_first, const float* __restrict__ column_weights, int columns,          \
           int16_t* __restrict__ owner, int32_t* __restrict__ areas) {                                               \
    panoptic_merge<TYPE>(DeviceBlock(), shared_memory, logits, scores, queries, cell_rows, cell_columns,             \
                         AxisTable{row_first, row_weights, rows}, AxisTable{column_first, column_weights, columns},  \
                         owner, areas);                                                                              \
  }

ODISE_MERGE(odise_merge_f32, float)
ODISE_MERGE(odise_merge_f16, Half)
ODISE_MERGE(odise_merge_bf16, BFloat16)

namespace {

bool between(int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; }

template <class T, class Kernel>
cudaError_t launch(Kernel kernel, const void* logits, const float* scores, int queries, int cell_rows, int cell_columns,
                   const int32_t* row_first, const float* row_weights, int rows, const int32_t* column_first,
                   const float* column_weights, int columns, int16_t* owner, int32_t* areas, cudaStream_t stream) {
  const dim3 grid((columns + kMergeColumns - 1) / kMergeColumns, (rows + kMergeTileRows - 1) / kMergeTileRows);
  kernel<<<grid, kMergeThreads, merge_shared_bytes(queries), stream>>>(
      static_cast<const T*>(logits), scores, queries, cell_rows, cell_columns, row_first, row_weights, rows,
      column_first, column_weights, columns, owner, areas);
  return cudaGetLastError();
}

}  // namespace

extern "C" cudaError_t odise_panoptic_prepare(int32_t cell_rows, int32_t cell_columns, int32_t stride,
                                              int32_t test_rows, int32_t test_columns, int32_t rows, int32_t columns,
                                              int32_t queries, int32_t* row_first, float* row_weights,
                                              int32_t* column_first, float* column_weights, int32_t* areas,
                                              cudaStream_t stream) {
  if (!row_first || !row_weights || !column_first || !column_weights || !areas) return cudaErrorInvalidValue;
  if (!between(1, cell_rows, 1 << 20) || !between(1, cell_columns, 1 << 20) || !between(1, stride, 64) ||
      !between(1, test_rows, static_cast<int64_t>(cell_rows) * stride) ||
      !between(1, test_columns, static_cast<int64_t>(cell_columns) * stride) || !between(1, rows, 1 << 20) ||
      !between(1, columns, 1 << 20) || !between(1, queries, kMergeMaxQueries)) {
    return cudaErrorInvalidValue;
  }
  int most = rows > columns ? rows : columns;
  most = most > 3 * queries ? most : 3 * queries;
  odise_merge_prepare<<<(most + kMergeThreads - 1) / kMergeThreads, kMergeThreads, 0, stream>>>(
      cell_rows, cell_columns, stride, test_rows, test_columns, rows, columns, queries, row_first, row_weights,
      column_first, column_weights, areas);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_panoptic_merge(int32_t dtype, const void* logits, const float* scores, int32_t queries,
                                            int32_t cell_rows, int32_t cell_columns, const int32_t* row_first,
                                            const float* row_weights, int32_t rows, const int32_t* column_first,
                                            const float* column_weights, int32_t columns, int16_t* owner,
                                            int32_t* areas, cudaStream_t stream) {
  if (!logits || !scores || !row_first || !row_weights || !column_first || !column_weights || !owner || !areas) {
    return cudaErrorInvalidValue;
  }
  if (!between(1, queries, kMergeMaxQueries) || !between(1, cell_rows, 1 << 20) || !between(1, cell_columns, 1 << 20) ||
      !between(1, rows, 1 << 20) || !between(1, columns, 1 << 20) ||
      !between(1, static_cast<int64_t>(rows) * columns, 0x7FFFFFFF)) {  // areas are 32-bit
    return cudaErrorInvalidValue;
  }
  switch (dtype) {
    case kFloat32:
      return launch<float>(odise_merge_f32, logits, scores, queries, cell_rows, cell_columns, row_first, row_weights,
                           rows, column_first, column_weights, columns, owner, areas, stream);
    case kFloat16:
      return launch<Half>(odise_merge_f16, logits, scores, queries, cell_rows, cell_columns, row_first, row_weights,
                          rows, column_first, column_weights, columns, owner, areas, stream);
    case kBFloat16:
      return launch<BFloat16>(odise_merge_bf16, logits, scores, queries, cell_rows, cell_columns, row_first,
                              row_weights, rows, column_first, column_weights, columns, owner, areas, stream);
    default: return cudaErrorInvalidValue;
  }
}
