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
constexpr int kMergeLoads = 12;    // rows of cells at once: at least those of a tile that is enlarged fourfold
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

/// Of some logits.
struct MergeExtremes {
  float most = -INFINITY;
  float least = -INFINITY;  // of the negated ones
  float nothing = 0.0f;     // or NaN, if one of them is no finite number

  ODISE_DEVICE void add(float logit) {
    most = fmaxf(most, logit);
    least = fmaxf(least, -logit);
    nothing += 0.0f * logit;
  }
};

/// What a thread knows of its column of kMergeRows pixels so far.
struct MergePixels {
  float least[kMergeRows];    // i + i * e^-x of the owner
  int32_t owner[kMergeRows];  // and kMergeInside where its logit is >= 0
};

constexpr int32_t kMergeInside = 1 << 16;

/// The taps of a thread's column and rows, in registers for the whole loop over queries. A pixel outside of the image has
/// those of the last one inside, so that no lane parts from the others, but with weights that are not numbers: nothing
/// is ever inside there, and nothing wins.
struct MergeTaps {
  int64_t start;                       // offset of the first cell of the first row
  float across[kMergeTaps];            // times -log2(e): sums are exponents of 2
  float down[kMergeRows][kMergeTaps];  // the same for all lanes inside the image, as the next two are for all
  uint32_t slides;                     // bit r: the taps of row r start one cell below those of the row above
  uint32_t jumps;                      // bit r: they start anywhere
  uint32_t there;                      // bit r: the pixel is inside the image
};

ODISE_DEVICE MergeTaps merge_taps(const AxisTable& vertical, const AxisTable& horizontal, int64_t top, int64_t x,
                                  int cell_columns) {
  MergeTaps taps;
  const int64_t below = vertical.length - 1, beside = horizontal.length - 1;
  const int64_t column = x < beside ? x : beside;
  int32_t above = vertical.first[top < below ? top : below];
  taps.start = static_cast<int64_t>(above) * cell_columns + horizontal.first[column];
#pragma unroll
  for (int t = 0; t < kMergeTaps; ++t) {
    taps.across[t] = -kLog2E * horizontal.weights[static_cast<int64_t>(t) * horizontal.length + column];
  }
  taps.slides = taps.jumps = taps.there = 0;
#pragma unroll
  for (int r = 0; r < kMergeRows; ++r) {
    const int64_t y = top + r < below ? top + r : below;
    const int32_t first = vertical.first[y];
    taps.slides |= static_cast<uint32_t>(first == above + 1) << r;
    taps.jumps |= static_cast<uint32_t>(first != above && first != above + 1) << r;
    const bool there = top + r <= below && x <= beside;
    taps.there |= static_cast<uint32_t>(there) << r;
    above = first;
#pragma unroll
    for (int t = 0; t < kMergeTaps; ++t) {
      taps.down[r][t] = there ? vertical.weights[static_cast<int64_t>(t) * vertical.length + y] : NAN;
    }
  }
  return taps;
}

/// How the cells of a mask lie, and whether there are enough of them for every tap.
template <bool kTiny>
struct MergeCells {
  int rows;
  int columns;

  /// A row of cells interpolated at the thread's column, times -log2(e). Taps that a tiny mask does not have weigh
  /// nothing and are left out.
  template <class T>
  ODISE_DEVICE float across(const T* cells, int row, const MergeTaps& taps) const {
    float sum = 0.0f;
    if (kTiny && row >= rows) return sum;
#pragma unroll
    for (int t = 0; t < kMergeTaps; ++t) {
      if (!kTiny || t < columns) sum += taps.across[t] * to_float(cells[t]);
    }
    return sum;
  }
};

/// Lets one mask claim the pixels of a thread. Returns how many of them have a logit >= 0.
template <class T, bool kTiny>
ODISE_DEVICE int merge_claim(const T* mask, int query, float inverse_score, const MergeTaps& taps,
                             const MergeCells<kTiny>& cells, const AxisTable& vertical, int64_t top,
                             MergePixels& pixels) {
  float window[kMergeTaps];  // the rows of cells under row r
  const T* next = mask + taps.start;
  int row = kTiny ? vertical.first[top] : 0;  // of cells, at `next`
#pragma unroll
  for (int t = 0; t < kMergeTaps; ++t, next += cells.columns, ++row) window[t] = cells.across(next, row, taps);
  int count = 0;
#pragma unroll
  for (int r = 0; r < kMergeRows; ++r) {
    if ((taps.slides | taps.jumps) >> r & 1u) {
      int kept = kMergeTaps - 1;
      if (taps.jumps >> r & 1u) {
        const int64_t last = vertical.length - 1, y = top + r < last ? top + r : last;
        const int skipped = vertical.first[y] - vertical.first[top + r - 1] - kMergeTaps;
        next += static_cast<int64_t>(skipped) * cells.columns;
        row += skipped;
        kept = 0;
      }
#pragma unroll
      for (int t = 0; t < kMergeTaps; ++t) {
        if (t < kept) {
          window[t] = window[t + 1 < kMergeTaps ? t + 1 : t];
        } else {
          window[t] = cells.across(next, row, taps);
          next += cells.columns;
          ++row;
        }
      }
    }
    float exponent = taps.down[r][0] * window[0];
#pragma unroll
    for (int t = 1; t < kMergeTaps; ++t) exponent += taps.down[r][t] * window[t];
    const float key = inverse_score + inverse_score * fast_exp2_of(exponent);
    const bool own = exponent <= 0.0f;
    const int32_t claimed = own ? query | kMergeInside : query;
    count += own;
    const bool better = key < pixels.least[r];
    pixels.least[r] = better ? key : pixels.least[r];
    pixels.owner[r] = better ? claimed : pixels.owner[r];
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
  const int rows_here = static_cast<int>(end_row - first_row);
  const int columns_here = static_cast<int>(end_column - first_column);
  const int64_t corner = first_row * cell_columns + first_column;
  block.each_warp([&](const Warp& warp) {
    float sure = 0.0f;
    const int share = (queries + kMergeWarps - 1) / kMergeWarps;
    const int end = (warp.index + 1) * share < queries ? (warp.index + 1) * share : queries;
    for (int base = warp.index * share; base < end; base += kWarp) {
      typename Warp::template Lane<float> score, high, low, best;  // a lane's mask; low: of the negated logits
      typename Warp::template Lane<bool> takes_part;
      warp.each([&](int lane) {
        score[lane] = base + lane < end ? scores[base + lane] : 0.0f;
        takes_part[lane] = score[lane] > 0.0f;
      });
      // Two masks at a time, the last one twice where their number is odd, so that the loads of both are under way.
      for (uint32_t left_over = warp.ballot(takes_part); left_over;) {
        int source[2];
        source[0] = first_bit(left_over);
        left_over &= left_over - 1;
        source[1] = left_over ? first_bit(left_over) : source[0];
        left_over &= left_over - 1;
        typename Warp::template Lane<MergeExtremes> found[2];
        warp.each([&](int lane) {
          const T* masks[2];
#pragma unroll
          for (int m = 0; m < 2; ++m) masks[m] = logits + (base + source[m]) * mask_size + corner;
          for (int column = lane; column < columns_here; column += kWarp) {
            for (int row = 0; row < rows_here; row += kMergeLoads) {
              T cells[2][kMergeLoads];
              const int64_t first = static_cast<int64_t>(row) * cell_columns + column;
#pragma unroll
              for (int r = 0; r < kMergeLoads; ++r) {  // no branch between them: the last row again where there are fewer
                const int below = (row + r < rows_here ? r : rows_here - 1 - row) * cell_columns;
#pragma unroll
                for (int m = 0; m < 2; ++m) cells[m][r] = (masks[m] + first)[below];
              }
#pragma unroll
              for (int r = 0; r < kMergeLoads; ++r) {
#pragma unroll
                for (int m = 0; m < 2; ++m) found[m][lane].add(to_float(cells[m][r]));
              }
            }
          }
        });
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          typename Warp::template Lane<float> most, least;
          warp.each([&](int lane) {
            const MergeExtremes& own = found[m][lane];
            most[lane] = own.most, least[lane] = own.nothing == 0.0f ? own.least : INFINITY;  // with NaN, nothing is sure
          });
          const float over_most = warp.max(most), over_least = warp.max(least);
          warp.each([&](int lane) {
            if (lane == source[m]) high[lane] = over_most, low[lane] = over_least;
          });
        }
      }
      warp.each([&](int lane) {
        best[lane] = 0.0f;
        float bound = -1.0f;
        if (takes_part[lane]) {  // a mask matters where it may win, or where its own area may lie
          bound = high[lane] >= -kMergeSafety ? INFINITY : score[lane] / (1.0f + exp2_of(-kLog2E * high[lane]));
          best[lane] = score[lane] / (1.0f + exp2_of(kLog2E * low[lane]));
        }
        if (base + lane < end) upper[base + lane] = bound;
      });
      sure = larger(sure, warp.max(best));
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
    if (x0 >= horizontal.length || y0 >= vertical.length) return;
    const int count = *listed;
    typename Warp::template Lane<MergeTaps> taps;
    typename Warp::template Lane<MergePixels> pixels;
    warp.each([&](int lane) {
      taps[lane] = merge_taps(vertical, horizontal, y0, x0 + lane, cell_columns);
#pragma unroll
      for (int r = 0; r < kMergeRows; ++r) {
        pixels[lane].least[r] = INFINITY;
        // Where every value rounds to zero, the first mask is as large as any.
        pixels[lane].owner[r] = count ? list[0] : 0;
      }
    });
    const auto claim = [&](const auto& cells) {  // in order, 32 masks at a time
      for (int base = 0; base < count; base += kWarp) {
        typename Warp::template Lane<int> queries_here;
        typename Warp::template Lane<float> inverses;
        warp.each([&](int lane) {
          queries_here[lane] = base + lane < count ? list[base + lane] : 0;
          inverses[lane] = 1.0f / scores[queries_here[lane]];
        });
        const int here = count - base < kWarp ? count - base : kWarp;
        for (int i = 0; i < here; ++i) {
          const int query = warp.from(queries_here, i);
          const float inverse = warp.from(inverses, i);
          typename Warp::template Lane<int> inside;
          warp.each([&](int lane) {
            inside[lane] =
                merge_claim(logits + query * mask_size, query, inverse, taps[lane], cells, vertical, y0, pixels[lane]);
          });
          const int total = warp.sum(inside);
          warp.each([&](int lane) {
            if (lane == 0 && total) block.add(&area[query], total);
          });
        }
      }
    };
    if (cell_rows >= kMergeTaps && cell_columns >= kMergeTaps) {
      claim(MergeCells<false>{cell_rows, cell_columns});
    } else {
      claim(MergeCells<true>{cell_rows, cell_columns});
    }
#pragma unroll
    for (int r = 0; r < kMergeRows; ++r) {
      typename Warp::template Lane<bool> there, kept;
      typename Warp::template Lane<int> who;
      warp.each([&](int lane) {
        who[lane] = pixels[lane].owner[r] & (kMergeInside - 1);
        there[lane] = taps[lane].there >> r & 1u;
        kept[lane] = there[lane] && (pixels[lane].owner[r] & kMergeInside);
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
