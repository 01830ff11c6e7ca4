// SPDX-License-Identifier: Apache-2.0
// Panoptic merge: which mask owns each pixel of the image, and the areas on which the overlap test rests.
//
//   value[q, y, x] = score[q] * sigmoid(resized logits[q] at y, x)
//   owner[y, x]    = the first q with the largest value, where its resized logit is >= 0, else -1
//   areas[0, q]    = pixels where the resized logit of q is >= 0
//   areas[1, q]    = pixels where q has the largest value
//   areas[2, q]    = pixels of both
//
// A resized logit that is NaN counts as minus infinity.
//
// "Resized" is what odise_rt/postprocessing.py's MaskResizer does: fourfold enlargement to the padded canvas, crop to
// the image at test size and resize to the image's own size, all bilinear and without antialias. All three are linear
// and separable, so they are one interpolation with two or three taps an axis, from a table per axis. The masks at full
// size exist only as registers: each logit is read, each result written, nothing in between.
//
// Argmax without sigmoid: score * sigmoid(x) = 1 / (i + i * e^-x) with i = 1 / score, so the largest value has the
// smallest i + i * e^-x: one exponential instead of an exponential and a division. Scores that differ in the last bit
// can have the same reciprocal; the first query then keeps the pixel.
//
// A mask takes part in a tile of pixels only where it can matter, as in postprocessing.py: bilinear weights never leave
// the range of their inputs, so the extremes of the cells under a tile bound every value in it.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kMergeThreads = 256;
constexpr int kMergeWarps = kMergeThreads / kWarp;
constexpr int kMergeColumns = 64;  // pixels of a block's tile: two warps side by side,
constexpr int kMergeRows = 8;      // of so many rows each,
constexpr int kMergeTileRows = kMergeRows * kMergeWarps * kWarp / kMergeColumns;  // four of them below each other
constexpr int kMergeTaps = 3;
constexpr int kMergeMaxQueries = 2048;
constexpr float kMergeSafety = 1e-4f;  // slack on the bounds for rounding, in units of score
constexpr float kLog2E = 1.4426950408889634f;

/// Interpolation along one axis: pixel i is the sum over t of weights[t * length + i] * cell[first[i] + t].
struct AxisTable {
  const int32_t* first;
  const float* weights;
  int32_t length;
};

/// Bytes of shared memory for `queries` masks.
inline int64_t merge_shared_bytes(int64_t queries) { return (5 * queries + kMergeWarps + 1) * 4; }

// Each step rounded by itself, as numpy does: a fused product could move a position across a cell's edge.
ODISE_DEVICE double merge_position(int64_t target, int64_t source, int64_t index) {
#if defined(__CUDA_ARCH__)
  const double ratio = __ddiv_rn(static_cast<double>(source), static_cast<double>(target));
  const double position = __dsub_rn(__dmul_rn(static_cast<double>(index) + 0.5, ratio), 0.5);
#else
  const double ratio = static_cast<double>(source) / static_cast<double>(target);
  volatile double product = (static_cast<double>(index) + 0.5) * ratio;
  const double position = product - 0.5;
#endif
  return position > 0.0 ? position : 0.0;
}

struct LinearTaps {
  int64_t low;
  int64_t high;
  double fraction;
};

ODISE_DEVICE LinearTaps linear_taps(int64_t target, int64_t source, int64_t index) {
  const double position = merge_position(target, source, index);
  int64_t low = static_cast<int64_t>(position);
  low = low < source - 1 ? low : source - 1;
  return {low, low + 1 < source - 1 ? low + 1 : source - 1, position - static_cast<double>(low)};
}

/// One pixel of an axis table: cells to `cells * stride` pixels of the canvas, cropped to `test`, to `original` pixels.
ODISE_DEVICE void merge_axis_entry(int64_t cells, int64_t stride, int64_t test, int64_t original, int64_t pixel,
                                   int32_t* first, float* weights) {
  int64_t cell[4];
  double weight[4];
  int count = 2;
  const int64_t canvas = cells * stride;
  if (original == test) {
    const LinearTaps inner = linear_taps(canvas, cells, pixel);
    cell[0] = inner.low, cell[1] = inner.high;
    weight[0] = 1.0 - inner.fraction, weight[1] = inner.fraction;
  } else {
    const LinearTaps outer = linear_taps(original, test, pixel);
    count = 4;
    for (int side = 0; side < 2; ++side) {
      const LinearTaps inner = linear_taps(canvas, cells, side ? outer.high : outer.low);
      const double share = side ? outer.fraction : 1.0 - outer.fraction;
      cell[2 * side] = inner.low, cell[2 * side + 1] = inner.high;
      weight[2 * side] = (1.0 - inner.fraction) * share, weight[2 * side + 1] = inner.fraction * share;
    }
  }
  // Neighbouring canvas pixels are less than one cell apart: three cells in a row hold all four taps.
  int64_t lowest = cell[0];
  for (int i = 1; i < count; ++i) lowest = cell[i] < lowest ? cell[i] : lowest;
  int64_t start = lowest < cells - kMergeTaps ? lowest : cells - kMergeTaps;
  start = start < 0 ? 0 : start;
  for (int t = 0; t < kMergeTaps; ++t) {
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum += cell[i] == start + t ? weight[i] : 0.0;
    weights[t * original + pixel] = static_cast<float>(sum);
  }
  first[pixel] = static_cast<int32_t>(start);
}

/// Fills both axis tables and clears the areas. Grid: enough threads for max(rows, columns, 3 * queries).
template <class Block>
ODISE_DEVICE void merge_prepare(const Block& block, int cell_rows, int cell_columns, int stride, int test_rows,
                                int test_columns, int rows, int columns, int queries, int32_t* row_first,
                                float* row_weights, int32_t* column_first, float* column_weights, int32_t* areas) {
  block.each_thread([&](int thread) {
    const int64_t i = block.x() * block.threads() + thread;
    if (i < rows) merge_axis_entry(cell_rows, stride, test_rows, rows, i, row_first, row_weights);
    if (i < columns) merge_axis_entry(cell_columns, stride, test_columns, columns, i, column_first, column_weights);
    if (i < 3 * static_cast<int64_t>(queries)) areas[i] = 0;
  });
}

/// What a thread knows of its column of kMergeRows pixels so far.
struct MergePixels {
  float least[kMergeRows];  // i + i * e^-x of the owner
  int32_t owner[kMergeRows];
  uint32_t inside;  // bit r: the owner's logit at row r is >= 0
};

/// The taps of a thread's column and rows, in registers for the whole loop over queries.
struct MergeTaps {
  int64_t column;  // offset of the first cell within a row
  int32_t columns_there;  // taps that lie inside the row of cells; fewer than kMergeTaps only for tiny masks
  float across[kMergeTaps];
  int32_t first[kMergeRows];
  float down[kMergeRows][kMergeTaps];
  int32_t rows;  // that lie inside the image; 0 also for a column outside
};

ODISE_DEVICE MergeTaps merge_taps(const AxisTable& vertical, const AxisTable& horizontal, int64_t top, int64_t x,
                                  int cell_columns) {
  MergeTaps taps{};
  if (x >= horizontal.length) return taps;
  const int64_t left = vertical.length - top;
  taps.rows = static_cast<int32_t>(left < 0 ? 0 : left > kMergeRows ? kMergeRows : left);
  taps.column = horizontal.first[x];
  taps.columns_there = cell_columns < kMergeTaps ? cell_columns : kMergeTaps;
#pragma unroll
  for (int t = 0; t < kMergeTaps; ++t) taps.across[t] = horizontal.weights[static_cast<int64_t>(t) * horizontal.length + x];
#pragma unroll
  for (int r = 0; r < kMergeRows; ++r) {
    if (r >= taps.rows) continue;
    taps.first[r] = vertical.first[top + r];
#pragma unroll
    for (int t = 0; t < kMergeTaps; ++t) {
      taps.down[r][t] = vertical.weights[static_cast<int64_t>(t) * vertical.length + top + r];
    }
  }
  return taps;
}

/// A row of cells interpolated at the thread's column; zero below the last row, where weights are zero too.
template <class T>
ODISE_DEVICE float merge_across(const T* mask, const MergeTaps& taps, int64_t cell_row, int cell_rows,
                                int cell_columns) {
  float sum = 0.0f;
  if (cell_row < cell_rows) {
    const T* cells = mask + cell_row * cell_columns + taps.column;
#pragma unroll
    for (int t = 0; t < kMergeTaps; ++t) {
      if (t < taps.columns_there) sum += taps.across[t] * to_float(cells[t]);
    }
  }
  return sum;
}

/// Lets one mask claim the pixels of a thread. Returns how many of them have a logit >= 0.
template <class T>
ODISE_DEVICE int merge_claim(const T* mask, int query, float inverse_score, const MergeTaps& taps, int cell_rows,
                             int cell_columns, MergePixels& pixels) {
  float window[kMergeTaps];  // interpolated rows of cells from `have` on
  int64_t have = -kMergeTaps - 1;
  int count = 0;
#pragma unroll
  for (int r = 0; r < kMergeRows; ++r) {
    if (r >= taps.rows) break;
    const int64_t first = taps.first[r];
    if (first == have + 1) {
#pragma unroll
      for (int t = 0; t + 1 < kMergeTaps; ++t) window[t] = window[t + 1];
      window[kMergeTaps - 1] = merge_across(mask, taps, first + kMergeTaps - 1, cell_rows, cell_columns);
    } else if (first != have) {
#pragma unroll
      for (int t = 0; t < kMergeTaps; ++t) window[t] = merge_across(mask, taps, first + t, cell_rows, cell_columns);
    }
    have = first;
    float logit = 0.0f;
#pragma unroll
    for (int t = 0; t < kMergeTaps; ++t) logit += taps.down[r][t] * window[t];
    const float key = inverse_score + inverse_score * exp2_of(-kLog2E * logit);
    const bool own = logit >= 0.0f;
    count += own;
    if (key < pixels.least[r]) {
      pixels.least[r] = key;
      pixels.owner[r] = query;
      pixels.inside = (pixels.inside & ~(1u << r)) | (static_cast<uint32_t>(own) << r);
    }
  }
  return count;
}

/// Grid: (ceil(columns / kMergeColumns), ceil(rows / kMergeTileRows)); kMergeThreads threads; merge_shared_bytes().
///
/// `scores` below or equal to zero (or NaN) say that a mask does not take part. `areas` is (3, queries), cleared before.
template <class T, class Block>
ODISE_DEVICE void panoptic_merge(const Block& block, char* shared, const T* logits, const float* scores, int queries,
                                 int cell_rows, int cell_columns, AxisTable vertical, AxisTable horizontal,
                                 int16_t* owner, int32_t* areas) {
  using Warp = typename Block::Warp;
  float* upper = reinterpret_cast<float*>(shared);              // (queries), negative: does not take part
  int32_t* list = reinterpret_cast<int32_t*>(upper + queries);  // (queries), those that matter here, in order
  int32_t* area = list + queries;                               // (3, queries)
  float* surely = reinterpret_cast<float*>(area + 3 * queries);  // (kMergeWarps), what some mask has everywhere
  int32_t* listed = reinterpret_cast<int32_t*>(surely + kMergeWarps);
  const int64_t left = block.x() * kMergeColumns, top = block.y() * kMergeTileRows;
  const int64_t right = left + kMergeColumns < horizontal.length ? left + kMergeColumns : horizontal.length;
  const int64_t bottom = top + kMergeTileRows < vertical.length ? top + kMergeTileRows : vertical.length;
  const int64_t mask_size = static_cast<int64_t>(cell_rows) * cell_columns;

  // 1. Bounds of every mask over the cells under this tile.
  const int64_t first_row = vertical.first[top], first_column = horizontal.first[left];
  int64_t end_row = vertical.first[bottom - 1] + kMergeTaps, end_column = horizontal.first[right - 1] + kMergeTaps;
  end_row = end_row < cell_rows ? end_row : cell_rows;
  end_column = end_column < cell_columns ? end_column : cell_columns;
  block.each_warp([&](const Warp& warp) {
    float sure = 0.0f;
    for (int query = warp.index; query < queries; query += kMergeWarps) {
      const float score = scores[query];
      float bound = -1.0f;
      if (score > 0.0f) {
        typename Warp::template Lane<float> high, low;  // low: of the negated logits
        const T* mask = logits + query * mask_size;
        warp.each([&](int lane) {
          float most = -INFINITY, least = -INFINITY;
          for (int64_t row = first_row; row < end_row; ++row) {
            for (int64_t column = first_column + lane; column < end_column; column += kWarp) {
              const float logit = to_float(mask[row * cell_columns + column]);
              most = larger(most, logit);
              least = logit == logit ? larger(least, -logit) : INFINITY;  // where NaN is, nothing is sure
            }
          }
          high[lane] = most, low[lane] = least;
        });
        const float most = warp.max(high), least = -warp.max(low);
        // A mask matters where it may win, or where its own area may lie.
        bound = most >= -kMergeSafety ? INFINITY : score / (1.0f + exp2_of(-kLog2E * most));
        sure = larger(sure, score / (1.0f + exp2_of(-kLog2E * least)));
      }
      warp.each([&](int lane) {
        if (lane == 0) upper[query] = bound;
      });
    }
    warp.each([&](int lane) {
      if (lane == 0) surely[warp.index] = sure;
    });
  });
  block.each_thread([&](int thread) {
    for (int i = thread; i < 3 * queries; i += kMergeThreads) area[i] = 0;
  });
  block.sync();

  // 2. Those that matter, in order.
  block.each_warp([&](const Warp& warp) {
    if (warp.index != 0) return;
    float sure = 0.0f;
    for (int w = 0; w < kMergeWarps; ++w) sure = larger(sure, surely[w]);
    int count = 0;
    for (int base = 0; base < queries; base += kWarp) {
      typename Warp::template Lane<bool> matters;
      warp.each([&](int lane) {
        const float bound = base + lane < queries ? upper[base + lane] : -1.0f;
        matters[lane] = bound >= 0.0f && bound + kMergeSafety >= sure;
      });
      const uint32_t bits = warp.ballot(matters);
      warp.each([&](int lane) {
        if (matters[lane]) list[count + count_bits(bits & ((1u << lane) - 1u))] = base + lane;
      });
      count += count_bits(bits);
    }
    warp.each([&](int lane) {
      if (lane == 0) *listed = count;
    });
  });
  block.sync();

  // 3. Pixels. A warp has 32 columns and kMergeRows rows.
  block.each_warp([&](const Warp& warp) {
    const int64_t x0 = left + (warp.index % 2) * kWarp, y0 = top + (warp.index / 2) * kMergeRows;
    const int count = *listed;
    typename Warp::template Lane<MergeTaps> taps;
    typename Warp::template Lane<MergePixels> pixels;
    warp.each([&](int lane) {
      taps[lane] = merge_taps(vertical, horizontal, y0, x0 + lane, cell_columns);
#pragma unroll
      for (int r = 0; r < kMergeRows; ++r) {
        pixels[lane].least[r] = INFINITY;
        // Where every value rounds to zero, the first mask is as large as any.
        pixels[lane].owner[r] = count ? list[0] : -1;
      }
      pixels[lane].inside = 0;
    });
    for (int i = 0; i < count; ++i) {
      const int query = list[i];
      const float inverse = 1.0f / scores[query];
      const T* mask = logits + query * mask_size;
      typename Warp::template Lane<int> inside;
      warp.each([&](int lane) {
        inside[lane] = merge_claim(mask, query, inverse, taps[lane], cell_rows, cell_columns, pixels[lane]);
      });
      const int total = warp.sum(inside);
      warp.each([&](int lane) {
        if (lane == 0 && total) block.add(&area[query], total);
      });
    }
#pragma unroll
    for (int r = 0; r < kMergeRows; ++r) {
      typename Warp::template Lane<bool> there, kept;
      typename Warp::template Lane<int> who;
      warp.each([&](int lane) {
        who[lane] = pixels[lane].owner[r];
        there[lane] = r < taps[lane].rows;
        kept[lane] = there[lane] && who[lane] >= 0 && ((pixels[lane].inside >> r) & 1u);
        if (there[lane]) {
          owner[(y0 + r) * horizontal.length + x0 + lane] = static_cast<int16_t>(kept[lane] ? who[lane] : -1);
        }
      });
      // One addition for each owner in the row, not for each pixel.
      uint32_t left_over = count ? warp.ballot(there) : 0u;
      const uint32_t kept_bits = warp.ballot(kept);
      while (left_over) {
        const int query = warp.from(who, first_bit(left_over));
        typename Warp::template Lane<bool> same;
        warp.each([&](int lane) { same[lane] = there[lane] && who[lane] == query; });
        const uint32_t same_bits = warp.ballot(same);
        warp.each([&](int lane) {
          if (lane != 0) return;
          block.add(&area[queries + query], count_bits(same_bits));
          if (same_bits & kept_bits) block.add(&area[2 * queries + query], count_bits(same_bits & kept_bits));
        });
        left_over &= ~same_bits;
      }
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
    for (int i = thread; i < 3 * queries; i += kMergeThreads) {
      if (area[i]) block.add(&areas[i], area[i]);
    }
  });
}

}  // namespace odise
