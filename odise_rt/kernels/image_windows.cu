// SPDX-License-Identifier: Apache-2.0
// Kernels by name, which the fatbin is asked for, and the C launchers of what lies around the networks.
#include "image_windows.cuh"

#include "odise_kernels.h"

using namespace odise;

extern "C" __global__ void __launch_bounds__(kImageThreads, 4)
    odise_image_across(const uint8_t* __restrict__ pixels, int rows, int columns, const int32_t* __restrict__ first,
                       const int32_t* __restrict__ weights, int taps, int length, uint8_t* __restrict__ out) {
  resize_across(DeviceBlock(), pixels, rows, columns, ResizeTable{first, weights, taps, length}, out);
}

extern "C" __global__ void __launch_bounds__(kImageThreads, 4)
    odise_image_down(const uint8_t* __restrict__ pixels, int columns, const int32_t* __restrict__ first,
                     const int32_t* __restrict__ weights, int taps, int length, int canvas_rows, int canvas_columns,
                     float* __restrict__ canvas) {
  resize_down(DeviceBlock(), pixels, columns, ResizeTable{first, weights, taps, length}, canvas_rows, canvas_columns,
              canvas);
}

extern "C" __global__ void __launch_bounds__(kImageThreads, 4)
    odise_image_cut(const float* __restrict__ canvas, int channels, int rows, int columns, int side_rows,
                    int side_columns, int down, int across, int start, int count, float* __restrict__ windows) {
  cut_windows(DeviceBlock(), canvas, channels, WindowLayout{rows, columns, side_rows, side_columns, down, across}, start,
              count, windows);
}

extern "C" __global__ void __launch_bounds__(kImageThreads, 3)  // with more blocks it would spill
    odise_image_stitch(const float* __restrict__ windows, int channels, int rows, int columns, int side_rows,
                       int side_columns, int down, int across, float* __restrict__ level) {
  stitch_windows(DeviceBlock(), windows, channels, WindowLayout{rows, columns, side_rows, side_columns, down, across},
                 level);
}

namespace {

constexpr int64_t kMost = 0x7FFFFFFF;

bool between(int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; }

/// Blocks for so many threads; 0 if they are too many for one launch.
unsigned blocks_of(int64_t threads) {
  const int64_t blocks = (threads + kImageThreads - 1) / kImageThreads;
  return between(1, blocks, kMost) ? static_cast<unsigned>(blocks) : 0u;
}

bool fits(int channels, int rows, int columns, int side_rows, int side_columns, int down, int across) {
  return between(1, channels, 1 << 16) && between(1, side_rows, rows) && between(1, side_columns, columns) &&
         between(1, rows, 1 << 20) && between(1, columns, 1 << 20) &&
         down == (rows + side_rows - 1) / side_rows && across == (columns + side_columns - 1) / side_columns;
}

}  // namespace

extern "C" cudaError_t odise_resize_across(const uint8_t* pixels, int32_t rows, int32_t columns, const int32_t* first,
                                           const int32_t* weights, int32_t taps, int32_t length, uint8_t* out,
                                           cudaStream_t stream) {
  if (!pixels || !first || !weights || !out) return cudaErrorInvalidValue;
  if (!between(1, rows, 1 << 20) || !between(1, columns, 1 << 20) || taps < 1 || !between(1, length, 1 << 20)) {
    return cudaErrorInvalidValue;
  }
  const unsigned blocks = blocks_of(static_cast<int64_t>(rows) * length);
  if (!blocks) return cudaErrorInvalidValue;
  odise_image_across<<<blocks, kImageThreads, 0, stream>>>(pixels, rows, columns, first, weights, taps, length, out);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_resize_down(const uint8_t* pixels, int32_t columns, const int32_t* first,
                                         const int32_t* weights, int32_t taps, int32_t length, int32_t canvas_rows,
                                         int32_t canvas_columns, float* canvas, cudaStream_t stream) {
  if (!pixels || !first || !weights || !canvas) return cudaErrorInvalidValue;
  if (taps < 1 || !between(1, length, canvas_rows) || !between(1, columns, canvas_columns) ||
      !between(1, canvas_rows, 1 << 20) || !between(1, canvas_columns, 1 << 20)) {
    return cudaErrorInvalidValue;
  }
  const unsigned blocks = blocks_of(static_cast<int64_t>(canvas_rows) * canvas_columns);
  if (!blocks) return cudaErrorInvalidValue;
  odise_image_down<<<blocks, kImageThreads, 0, stream>>>(pixels, columns, first, weights, taps, length, canvas_rows,
                                                         canvas_columns, canvas);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_cut_windows(const float* canvas, int32_t channels, int32_t rows, int32_t columns,
                                         int32_t side_rows, int32_t side_columns, int32_t down, int32_t across,
                                         int32_t start, int32_t count, float* windows, cudaStream_t stream) {
  if (!canvas || !windows) return cudaErrorInvalidValue;
  if (!fits(channels, rows, columns, side_rows, side_columns, down, across) || start < 0 || count < 1 ||
      static_cast<int64_t>(start) + count > static_cast<int64_t>(down) * across) {
    return cudaErrorInvalidValue;
  }
  const unsigned blocks = blocks_of(static_cast<int64_t>(count) * side_rows * side_columns);
  if (!blocks) return cudaErrorInvalidValue;
  odise_image_cut<<<blocks, kImageThreads, 0, stream>>>(canvas, channels, rows, columns, side_rows, side_columns, down,
                                                        across, start, count, windows);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_stitch_windows(const float* windows, int32_t channels, int32_t rows, int32_t columns,
                                            int32_t side_rows, int32_t side_columns, int32_t down, int32_t across,
                                            float* level, cudaStream_t stream) {
  if (!windows || !level) return cudaErrorInvalidValue;
  if (!fits(channels, rows, columns, side_rows, side_columns, down, across)) return cudaErrorInvalidValue;
  const unsigned blocks = blocks_of(static_cast<int64_t>(rows) * columns);
  if (!blocks) return cudaErrorInvalidValue;
  const dim3 grid(blocks, static_cast<unsigned>((channels + kStitchChannels - 1) / kStitchChannels));
  odise_image_stitch<<<grid, kImageThreads, 0, stream>>>(windows, channels, rows, columns, side_rows, side_columns,
                                                           down, across, level);
  return cudaGetLastError();
}
