// SPDX-License-Identifier: Apache-2.0
// What lies around the networks, so that an image never leaves the GPU between pixels and masks:
//
//   resize_across, resize_down   uint8 pixels to the padded canvas, as Pillow's bilinear filter gives them, bit for bit
//   cut_windows                  the canvas to a batch of windows
//   stitch_windows               features of windows to features of the canvas, averaged where windows overlap
//
// Pillow resizes one axis after the other and rounds to uint8 in between: a weighted sum of a few source pixels in
// integers of kResizeBits fractional bits. The weights come from odise_rt/kernels/resize_tables.py. Everything here is
// bound by memory. A thread makes one pixel in all its channels, or a cell in kStitchChannels of them, so that where it
// lies is worked out once; neighbouring threads make neighbouring pixels.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kImageThreads = 256;
constexpr int kImageChannels = 3;
constexpr int kResizeBits = 22;
constexpr int kStitchChannels = 16;

/// Taps of one axis: value i is the rounded sum over t of weights[t * length + i] * source[first[i] + t]. A tap whose
/// weight is zero may lie behind the last source pixel and is not read.
struct ResizeTable {
  const int32_t* first;
  const int32_t* weights;
  int32_t taps;
  int32_t length;
};

/// How windows lie on a canvas (odise_rt/windows.py): side by side, the last row and column moved back inside.
struct WindowLayout {
  int32_t rows;     // of the canvas
  int32_t columns;
  int32_t side_rows;  // of a window, at most those of the canvas
  int32_t side_columns;
  int32_t down;  // windows below each other
  int32_t across;
};

ODISE_DEVICE int64_t global_thread(int64_t block, int threads, int thread) { return block * threads + thread; }

/// Where window `index` along an axis starts.
ODISE_DEVICE int64_t window_start(int64_t index, int64_t side, int64_t length) {
  const int64_t start = index * side, last = length - side;
  return start < last ? start : last;
}

/// One pixel of a resized axis: three sums over the taps. `step` is the distance of neighbouring source pixels in bytes.
struct ResizedPixel {
  int32_t channel[kImageChannels];
};

ODISE_DEVICE ResizedPixel resized_pixel(const uint8_t* source, int64_t step, const ResizeTable& table, int64_t at) {
  ResizedPixel sum;
#pragma unroll
  for (int c = 0; c < kImageChannels; ++c) sum.channel[c] = 1 << (kResizeBits - 1);
  const uint8_t* pixel = source + table.first[at] * step;
  for (int t = 0; t < table.taps; ++t, pixel += step) {
    const int32_t weight = table.weights[static_cast<int64_t>(t) * table.length + at];
    if (weight == 0) continue;  // perhaps behind the last pixel
#pragma unroll
    for (int c = 0; c < kImageChannels; ++c) sum.channel[c] += weight * static_cast<int32_t>(pixel[c]);
  }
#pragma unroll
  for (int c = 0; c < kImageChannels; ++c) {
    const int value = sum.channel[c] >> kResizeBits;
    sum.channel[c] = value < 0 ? 0 : value > 255 ? 255 : value;
  }
  return sum;
}

/// Pixels (rows, columns of the source, 3) to (rows, table.length, 3). Grid: a thread for each pixel.
template <class Block>
ODISE_DEVICE void resize_across(const Block& block, const uint8_t* pixels, int rows, int columns, ResizeTable table,
                                uint8_t* out) {
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= static_cast<int64_t>(rows) * table.length) return;
    const int64_t row = i / table.length, column = i - row * table.length;
    const ResizedPixel made =
        resized_pixel(pixels + row * columns * kImageChannels, kImageChannels, table, column);
#pragma unroll
    for (int c = 0; c < kImageChannels; ++c) out[i * kImageChannels + c] = static_cast<uint8_t>(made.channel[c]);
  });
}

/// Pixels (rows of the source, columns, 3) to a float canvas (3, canvas rows, canvas columns) in [0, 1], zero below
/// and beside the image of (table.length, columns) pixels. Grid: a thread for each pixel of the canvas.
template <class Block>
ODISE_DEVICE void resize_down(const Block& block, const uint8_t* pixels, int columns, ResizeTable table,
                              int canvas_rows, int canvas_columns, float* canvas) {
  const int64_t plane = static_cast<int64_t>(canvas_rows) * canvas_columns;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= plane) return;
    const int64_t row = i / canvas_columns, column = i - row * canvas_columns;
    ResizedPixel made{};
    if (row < table.length && column < columns) {
      const int64_t step = static_cast<int64_t>(columns) * kImageChannels;
      made = resized_pixel(pixels + column * kImageChannels, step, table, row);
    }
#pragma unroll
    for (int c = 0; c < kImageChannels; ++c) {
#if defined(__CUDA_ARCH__)
      canvas[c * plane + i] = __fdiv_rn(static_cast<float>(made.channel[c]), 255.0f);
#else
      canvas[c * plane + i] = static_cast<float>(made.channel[c]) / 255.0f;
#endif
    }
  });
}

/// Canvas (channels, rows, columns) to windows (count, channels, side rows, side columns), the first of them number
/// `start` row by row. Grid: a thread for each pixel of the windows.
template <class Block>
ODISE_DEVICE void cut_windows(const Block& block, const float* canvas, int channels, WindowLayout layout, int start,
                              int count, float* windows) {
  const int64_t side_plane = static_cast<int64_t>(layout.side_rows) * layout.side_columns;
  const int64_t plane = static_cast<int64_t>(layout.rows) * layout.columns;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= count * side_plane) return;
    const int64_t local = i / side_plane, within = i - local * side_plane, number = start + local;
    const int64_t row = window_start(number / layout.across, layout.side_rows, layout.rows) +
                        within / layout.side_columns;
    const int64_t column = window_start(number % layout.across, layout.side_columns, layout.columns) +
                           within % layout.side_columns;
    const float* from = canvas + row * layout.columns + column;
    float* to = windows + local * channels * side_plane + within;
#pragma unroll 1
    for (int first = 0; first < channels; first += kImageChannels) {
      float value[kImageChannels];
#pragma unroll
      for (int c = 0; c < kImageChannels; ++c) {  // no branch between the loads: the last one again where there are fewer
        value[c] = *from;
        if (first + c < channels - 1) from += plane;
      }
#pragma unroll
      for (int c = 0; c < kImageChannels; ++c, to += side_plane) {
        if (first + c < channels) *to = value[c];
      }
    }
  });
}

/// Windows along an axis that cover a cell, in order: one, or the last two where the last was moved back.
struct Covering {
  int64_t first;
  int64_t last;
  int count;
};

ODISE_DEVICE Covering covering_windows(int64_t cell, int64_t side, int64_t length, int64_t windows) {
  const int64_t regular = cell / side, last = windows - 1;
  const bool in_regular = regular < last, in_last = cell >= length - side;
  return {in_regular ? regular : last, last, in_regular && in_last ? 2 : 1};
}

/// Windows (down * across, channels, side rows, side columns) to (channels, rows, columns). Sums are taken in the order
/// of the windows, as odise_rt/windows.py takes them. Grid: x a thread for each cell, y kStitchChannels channels.
template <class Block>
ODISE_DEVICE void stitch_windows(const Block& block, const float* windows, int channels, WindowLayout layout,
                                 float* level) {
  const int64_t plane = static_cast<int64_t>(layout.rows) * layout.columns;
  const int64_t side_plane = static_cast<int64_t>(layout.side_rows) * layout.side_columns;
  const int first_channel = static_cast<int>(block.y()) * kStitchChannels;
  const int last = (first_channel + kStitchChannels < channels ? kStitchChannels : channels - first_channel) - 1;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= plane) return;
    const int64_t row = i / layout.columns, column = i - row * layout.columns;
    const Covering vertical = covering_windows(row, layout.side_rows, layout.rows, layout.down);
    const Covering horizontal = covering_windows(column, layout.side_columns, layout.columns, layout.across);
    const float share = 1.0f / static_cast<float>(vertical.count * horizontal.count);  // 1, 1/2 or 1/4: exact
    float sum[kStitchChannels] = {};
    for (int v = 0; v < vertical.count; ++v) {
      const int64_t down = v == 0 ? vertical.first : vertical.last;
      const int64_t y = row - window_start(down, layout.side_rows, layout.rows);
      for (int h = 0; h < horizontal.count; ++h) {
        const int64_t across = h == 0 ? horizontal.first : horizontal.last;
        const int64_t x = column - window_start(across, layout.side_columns, layout.columns);
        const int64_t window = (down * layout.across + across) * channels + first_channel;
        const float* from = windows + window * side_plane + y * layout.side_columns + x;
        float value[kStitchChannels];
#pragma unroll
        for (int c = 0; c < kStitchChannels; ++c) {  // no branch between the loads: the last one again where there are fewer
          value[c] = *from;
          if (c < last) from += side_plane;
        }
#pragma unroll
        for (int c = 0; c < kStitchChannels; ++c) sum[c] += value[c];
      }
    }
    float* to = level + first_channel * plane + i;
#pragma unroll
    for (int c = 0; c < kStitchChannels; ++c, to += plane) {
      if (c <= last) *to = sum[c] * share;
    }
  });
}

}  // namespace odise
