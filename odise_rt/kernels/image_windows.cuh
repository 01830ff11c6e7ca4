// SPDX-License-Identifier: Apache-2.0
// What lies around the networks, so that an image never leaves the GPU between pixels and masks:
//
//   resize_across, resize_down   uint8 pixels to the padded canvas, as Pillow's bilinear filter gives them, bit for bit
//   cut_windows                  the canvas to a batch of windows
//   stitch_windows               features of windows to features of the canvas, averaged where windows overlap
//
// Pillow resizes one axis after the other and rounds to uint8 in between: a weighted sum of a few source pixels in
// integers of kResizeBits fractional bits. The weights come from odise_rt/kernels/resize_tables.py. Everything here is
// bound by memory; one thread makes one value, and neighbouring threads make neighbouring ones.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kImageThreads = 256;
constexpr int kImageChannels = 3;
constexpr int kResizeBits = 22;

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

/// One value of a resized axis; `step` is the distance of neighbouring source values.
ODISE_DEVICE int resized_value(const uint8_t* source, int64_t step, const ResizeTable& table, int64_t at) {
  const int64_t first = table.first[at];
  int32_t sum = 1 << (kResizeBits - 1);
  for (int t = 0; t < table.taps; ++t) {
    const int32_t weight = table.weights[static_cast<int64_t>(t) * table.length + at];
    if (weight) sum += weight * static_cast<int32_t>(source[(first + t) * step]);
  }
  const int value = sum >> kResizeBits;
  return value < 0 ? 0 : value > 255 ? 255 : value;
}

/// Pixels (rows, columns of the source, 3) to (rows, table.length, 3). Grid: a thread for each value.
template <class Block>
ODISE_DEVICE void resize_across(const Block& block, const uint8_t* pixels, int rows, int columns, ResizeTable table,
                                uint8_t* out) {
  const int64_t width = static_cast<int64_t>(table.length) * kImageChannels;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= rows * width) return;
    const int64_t row = i / width, within = i % width, channel = within % kImageChannels;
    const uint8_t* line = pixels + row * columns * kImageChannels + channel;
    out[i] = static_cast<uint8_t>(resized_value(line, kImageChannels, table, within / kImageChannels));
  });
}

/// Pixels (rows of the source, columns, 3) to a float canvas (3, canvas rows, canvas columns) in [0, 1], zero below
/// and beside the image of (table.length, columns) pixels. Grid: a thread for each value of the canvas.
template <class Block>
ODISE_DEVICE void resize_down(const Block& block, const uint8_t* pixels, int columns, ResizeTable table,
                              int canvas_rows, int canvas_columns, float* canvas) {
  const int64_t plane = static_cast<int64_t>(canvas_rows) * canvas_columns;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= kImageChannels * plane) return;
    const int64_t channel = i / plane, row = i % plane / canvas_columns, column = i % canvas_columns;
    float value = 0.0f;
    if (row < table.length && column < columns) {
      const int64_t step = static_cast<int64_t>(columns) * kImageChannels;
      const int whole = resized_value(pixels + column * kImageChannels + channel, step, table, row);
#if defined(__CUDA_ARCH__)
      value = __fdiv_rn(static_cast<float>(whole), 255.0f);
#else
      value = static_cast<float>(whole) / 255.0f;
#endif
    }
    canvas[i] = value;
  });
}

/// Canvas (channels, rows, columns) to windows (count, channels, side rows, side columns), the first of them number
/// `start` row by row. Grid: a thread for each value.
template <class Block>
ODISE_DEVICE void cut_windows(const Block& block, const float* canvas, int channels, WindowLayout layout, int start,
                              int count, float* windows) {
  const int64_t plane = static_cast<int64_t>(layout.side_rows) * layout.side_columns, window = plane * channels;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= count * window) return;
    const int64_t number = start + i / window, channel = i % window / plane;
    const int64_t row = window_start(number / layout.across, layout.side_rows, layout.rows) +
                        i % plane / layout.side_columns;
    const int64_t column = window_start(number % layout.across, layout.side_columns, layout.columns) +
                           i % layout.side_columns;
    windows[i] = canvas[(channel * layout.rows + row) * layout.columns + column];
  });
}

/// Windows along an axis that cover a cell, in order: one, or the last two where the last was moved back.
struct Covering {
  int64_t index[2];
  int count;
};

ODISE_DEVICE Covering covering_windows(int64_t cell, int64_t side, int64_t length, int64_t windows) {
  Covering found{};
  const int64_t regular = cell / side;
  if (regular < windows - 1) found.index[found.count++] = regular;
  if (cell >= length - side) found.index[found.count++] = windows - 1;
  return found;
}

/// Windows (down * across, channels, side rows, side columns) to (channels, rows, columns). Sums are taken in the order
/// of the windows, as odise_rt/windows.py takes them. Grid: a thread for each value.
template <class Block>
ODISE_DEVICE void stitch_windows(const Block& block, const float* windows, int channels, WindowLayout layout,
                                 float* level) {
  const int64_t plane = static_cast<int64_t>(layout.rows) * layout.columns;
  const int64_t window_plane = static_cast<int64_t>(layout.side_rows) * layout.side_columns;
  block.each_thread([&](int thread) {
    const int64_t i = global_thread(block.x(), block.threads(), thread);
    if (i >= channels * plane) return;
    const int64_t channel = i / plane, row = i % plane / layout.columns, column = i % layout.columns;
    const Covering vertical = covering_windows(row, layout.side_rows, layout.rows, layout.down);
    const Covering horizontal = covering_windows(column, layout.side_columns, layout.columns, layout.across);
    float sum = 0.0f;
    for (int v = 0; v < vertical.count; ++v) {
      for (int h = 0; h < horizontal.count; ++h) {
        const int64_t number = vertical.index[v] * layout.across + horizontal.index[h];
        const int64_t y = row - window_start(vertical.index[v], layout.side_rows, layout.rows);
        const int64_t x = column - window_start(horizontal.index[h], layout.side_columns, layout.columns);
        sum += windows[(number * channels + channel) * window_plane + y * layout.side_columns + x];
      }
    }
    level[i] = sum / static_cast<float>(vertical.count * horizontal.count);  // by 1, 2 or 4: exact
  });
}

}  // namespace odise
