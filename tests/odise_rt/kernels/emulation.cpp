// SPDX-License-Identifier: Apache-2.0
// C functions that run the kernel bodies on the CPU; tests/odise_rt/kernels/emulated.py calls them through ctypes.
// Each returns 0, or 1 for sizes out of range, or 2 for a broken rule (see the message on standard error).
#include "emulation.hpp"

#include <cstdio>

#include "deformable_attention.cuh"
#include "image_windows.cuh"
#include "mask_pooling.cuh"
#include "naming.cuh"
#include "panoptic_merge.cuh"

using namespace odise;

namespace {

template <class F>
int guarded(F&& body) {
  try {
    return body();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulation: %s\n", error.what());
    return 2;
  }
}

template <int kRowTiles, bool kSimt, class T>
void pool(const MaskPoolPlan& plan, const void* logits, const void* features, int64_t batch, int queries, int channels,
          int pixels, bool late, int64_t first_split, int64_t last_split, char* workspace, void* pooled,
          int32_t* areas) {
  float* partial = reinterpret_cast<float*>(workspace);
  int32_t* counts = reinterpret_cast<int32_t*>(workspace + plan.counts_offset);
  const T* a = static_cast<const T*>(logits);
  const T* b = static_cast<const T*>(features);
  const Grid grid{plan.splits, plan.grid_y, batch};
  run_grid(
      grid, kPoolThreads, plan.shared_bytes, late,
      [&](const HostBlock& block, char* shared) {
        if constexpr (kSimt) {
          mask_pool_sums_simt<kRowTiles, T>(block, shared, a, b, queries, channels, pixels, plan.splits, partial,
                                            counts);
        } else {
          mask_pool_sums<kRowTiles, T>(block, shared, a, b, queries, channels, pixels, plan.splits, plan.stages, partial,
                                       counts);
        }
      },
      first_split, last_split);
  if (pooled == nullptr) return;
  run_grid({plan.finish_grid_x, queries, batch}, kPoolThreads, kFinishBytes, late,
           [&](const HostBlock& block, char* shared) {
             mask_pool_finish<T>(block, shared, partial, counts, queries, channels, plan.splits,
                                 static_cast<T*>(pooled), areas);
           });
}

template <int kRowTiles, int kSimtRowTiles, class... Arguments>
void pool_typed(int32_t dtype, const MaskPoolPlan& plan, Arguments... arguments) {
  if (dtype == kFloat32) pool<kSimtRowTiles, true, float>(plan, arguments...);
  if (dtype == kFloat16) pool<kRowTiles, false, Half>(plan, arguments...);
  if (dtype == kBFloat16 && plan.simt) pool<kSimtRowTiles, true, BFloat16>(plan, arguments...);
  if (dtype == kBFloat16 && !plan.simt) pool<kRowTiles, false, BFloat16>(plan, arguments...);
}

template <class T>
void merge(const void* logits, const float* scores, int queries, int cell_rows, int cell_columns, AxisTable vertical,
           AxisTable horizontal, int16_t* owner, int32_t* areas) {
  const Grid grid{(horizontal.length + kMergeColumns - 1) / kMergeColumns,
                  (vertical.length + kMergeTileRows - 1) / kMergeTileRows, 1};
  run_grid(grid, kMergeThreads, merge_shared_bytes(queries), false, [&](const HostBlock& block, char* shared) {
    panoptic_merge<T>(block, shared, static_cast<const T*>(logits), scores, queries, cell_rows, cell_columns, vertical,
                      horizontal, owner, areas);
  });
}

template <class T>
void attend(int vector, const void* value, const float* references, const void* offsets, const void* logits,
            const AttentionSizes& sizes, const AttentionLevels& levels, void* out, int64_t first_block,
            int64_t last_block) {
  const int64_t work = static_cast<int64_t>(sizes.batch) * sizes.queries * sizes.heads * (sizes.channels / vector);
  const int64_t blocks = (work + kAttentionThreads - 1) / kAttentionThreads;
  constexpr int kWidest = sizeof(T) == 4 ? 4 : 8;
  run_grid(
      {blocks, 1, 1}, kAttentionThreads, 0, false,
      [&](const HostBlock& block, char*) {
        const T* v = static_cast<const T*>(value);
        const T* o = static_cast<const T*>(offsets);
        const T* w = static_cast<const T*>(logits);
        if (vector == 1) {
          deformable_attention<T, 1>(block, v, references, o, w, sizes, levels, static_cast<T*>(out));
        } else {
          deformable_attention<T, kWidest>(block, v, references, o, w, sizes, levels, static_cast<T*>(out));
        }
      },
      first_block, last_block < 0 ? blocks : last_block);
}

/// A thread for each of so many pixels.
template <class Body>
void image_grid(int64_t pixels, Body&& body, int64_t channel_groups = 1) {
  run_grid({(pixels + kImageThreads - 1) / kImageThreads, channel_groups, 1}, kImageThreads, 0, false,
           [&](const HostBlock& block, char*) { body(block); });
}

}  // namespace

extern "C" {

int emulate_pool_plan(int32_t dtype, int64_t batch, int64_t queries, int64_t channels, int64_t pixels,
                      int32_t multiprocessors, int32_t shared_limit, int32_t capability, int64_t* out) {
  const MaskPoolPlan p =
      mask_pool_plan(dtype, batch, queries, channels, pixels, multiprocessors, shared_limit, capability);
  const int64_t values[] = {p.valid,  p.row_tiles,     p.simt,            p.splits,       p.stages, p.shared_bytes,
                            p.grid_y, p.finish_grid_x, p.workspace_bytes, p.counts_offset};
  std::memcpy(out, values, sizeof values);
  return p.valid ? 0 : 1;
}

/// `pooled` null: only the splits [first_split, last_split) of the sums.
int emulate_mask_pool(int32_t dtype, const void* logits, const void* features, int64_t batch, int32_t queries,
                      int32_t channels, int32_t pixels, int32_t multiprocessors, int32_t shared_limit,
                      int32_t capability, int32_t late, int64_t first_split, int64_t last_split, char* workspace,
                      void* pooled, int32_t* areas) {
  const MaskPoolPlan plan =
      mask_pool_plan(dtype, batch, queries, channels, pixels, multiprocessors, shared_limit, capability);
  if (!plan.valid) return 1;
  return guarded([&] {
    if (plan.row_tiles == 2) {
      pool_typed<2, 2>(dtype, plan, logits, features, batch, queries, channels, pixels, late != 0, first_split, last_split,
                    workspace, pooled, areas);
    } else {
      pool_typed<8, 7>(dtype, plan, logits, features, batch, queries, channels, pixels, late != 0, first_split, last_split,
                    workspace, pooled, areas);
    }
    return 0;
  });
}

int emulate_merge_prepare(int32_t cell_rows, int32_t cell_columns, int32_t stride, int32_t test_rows,
                          int32_t test_columns, int32_t rows, int32_t columns, int32_t queries, int32_t* row_first,
                          float* row_weights, int32_t* column_first, float* column_weights, int32_t* areas) {
  int64_t most = rows > columns ? rows : columns;
  most = most > 3 * static_cast<int64_t>(queries) ? most : 3 * static_cast<int64_t>(queries);
  return guarded([&] {
    run_grid({(most + kMergeThreads - 1) / kMergeThreads, 1, 1}, kMergeThreads, 0, false,
             [&](const HostBlock& block, char*) {
               merge_prepare(block, cell_rows, cell_columns, stride, test_rows, test_columns, rows, columns, queries,
                             row_first, row_weights, column_first, column_weights, areas);
             });
    return 0;
  });
}

int emulate_panoptic_merge(int32_t dtype, const void* logits, const float* scores, int32_t queries, int32_t cell_rows,
                           int32_t cell_columns, const int32_t* row_first, const float* row_weights, int32_t rows,
                           const int32_t* column_first, const float* column_weights, int32_t columns, int16_t* owner,
                           int32_t* areas) {
  if (queries < 1 || queries > kMergeMaxQueries) return 1;
  const AxisTable vertical{row_first, row_weights, rows}, horizontal{column_first, column_weights, columns};
  return guarded([&] {
    if (dtype == kFloat32)
      merge<float>(logits, scores, queries, cell_rows, cell_columns, vertical, horizontal, owner, areas);
    if (dtype == kFloat16)
      merge<Half>(logits, scores, queries, cell_rows, cell_columns, vertical, horizontal, owner, areas);
    if (dtype == kBFloat16)
      merge<BFloat16>(logits, scores, queries, cell_rows, cell_columns, vertical, horizontal, owner, areas);
    return 0;
  });
}

int emulate_deformable_attention(int32_t dtype, const void* value, const float* references, const void* offsets,
                                 const void* logits, const AttentionSizes* sizes, const AttentionLevels* levels,
                                 void* out, int64_t first_block, int64_t last_block) {
  const int vector = attention_vector(dtype, sizes->channels, value, out);
  return guarded([&] {
    if (dtype == kFloat32)
      attend<float>(vector, value, references, offsets, logits, *sizes, *levels, out, first_block, last_block);
    if (dtype == kFloat16)
      attend<Half>(vector, value, references, offsets, logits, *sizes, *levels, out, first_block, last_block);
    if (dtype == kBFloat16)
      attend<BFloat16>(vector, value, references, offsets, logits, *sizes, *levels, out, first_block, last_block);
    return 0;
  });
}

int emulate_image_across(const uint8_t* pixels, int32_t rows, int32_t columns, const int32_t* first,
                         const int32_t* weights, int32_t taps, int32_t length, uint8_t* out) {
  return guarded([&] {
    image_grid(static_cast<int64_t>(rows) * length, [&](const HostBlock& block) {
      resize_across(block, pixels, rows, columns, ResizeTable{first, weights, taps, length}, out);
    });
    return 0;
  });
}

int emulate_image_down(const uint8_t* pixels, int32_t columns, const int32_t* first, const int32_t* weights,
                       int32_t taps, int32_t length, int32_t canvas_rows, int32_t canvas_columns, float* canvas) {
  return guarded([&] {
    image_grid(static_cast<int64_t>(canvas_rows) * canvas_columns, [&](const HostBlock& block) {
      resize_down(block, pixels, columns, ResizeTable{first, weights, taps, length}, canvas_rows, canvas_columns,
                  canvas);
    });
    return 0;
  });
}

int emulate_image_cut(const float* canvas, int32_t channels, int32_t rows, int32_t columns, int32_t side_rows,
                      int32_t side_columns, int32_t down, int32_t across, int32_t start, int32_t count,
                      float* windows) {
  const WindowLayout layout{rows, columns, side_rows, side_columns, down, across};
  return guarded([&] {
    image_grid(static_cast<int64_t>(count) * side_rows * side_columns, [&](const HostBlock& block) {
      cut_windows(block, canvas, channels, layout, start, count, windows);
    });
    return 0;
  });
}

int emulate_image_stitch(const float* windows, int32_t channels, int32_t rows, int32_t columns, int32_t side_rows,
                         int32_t side_columns, int32_t down, int32_t across, float* level) {
  const WindowLayout layout{rows, columns, side_rows, side_columns, down, across};
  return guarded([&] {
    image_grid(
        static_cast<int64_t>(rows) * columns,
        [&](const HostBlock& block) { stitch_windows(block, windows, channels, layout, level); },
        (channels + kStitchChannels - 1) / kStitchChannels);
    return 0;
  });
}

int emulate_name_cosines(const float* embeddings, const float* texts, float scale, int32_t queries, int32_t channels,
                         int32_t words, float* cosines) {
  const Grid grid{(words + kCosineTile - 1) / kCosineTile, (queries + kCosineTile - 1) / kCosineTile, 1};
  return guarded([&] {
    run_grid(grid, kNameThreads, kCosineBytes, false, [&](const HostBlock& block, char* shared) {
      text_cosines(block, shared, embeddings, texts, scale, queries, channels, words, cosines);
    });
    return 0;
  });
}

int emulate_name_classes(const float* mask_cosines, const float* clip_cosines, const int32_t* first_word,
                         const float* clip_weight, const float* object_logits, const float* thresholds,
                         int32_t queries, int32_t words, int32_t classes, int32_t best, int32_t rank_all,
                         int32_t with_unknown, float* probabilities, int32_t* labels, float* scores, int32_t* ranked, float* ranked_scores) {
  return guarded([&] {
    run_grid({queries, 1, 1}, kNameThreads, kClassBytes, false, [&](const HostBlock& block, char* shared) {
      name_classes(block, shared, mask_cosines, clip_cosines, first_word, clip_weight, object_logits, queries, words,
                   classes, NameRules{thresholds, best, rank_all != 0, with_unknown != 0},
                   NameResults{probabilities, labels, scores, ranked, ranked_scores});
    });
    return 0;
  });
}

int emulate_name_choose(const int32_t* labels, const float* scores, const int32_t* areas, const uint8_t* things,
                        const double* overlap, int32_t queries, int32_t* ids, int32_t* count, int32_t* segment_queries,
                        int32_t* segment_classes, float* segment_scores, int32_t* facts) {
  return guarded([&] {
    run_grid({1, 1, 1}, kNameThreads, choose_shared_bytes(queries), false, [&](const HostBlock& block, char* shared) {
      choose_segments(block, shared, labels, scores, areas, things, queries, overlap,
                      SegmentTable{ids, count, segment_queries, segment_classes, segment_scores, facts});
    });
    return 0;
  });
}

int emulate_name_paint(const int16_t* owner, const int32_t* ids, const int32_t* count, int32_t queries, int32_t rows,
                       int32_t columns, int32_t* facts, int32_t* segment_map) {
  const Grid grid{(columns + kPaintColumns - 1) / kPaintColumns, (rows + kPaintTileRows - 1) / kPaintTileRows, 1};
  return guarded([&] {
    run_grid(grid, kNameThreads, paint_shared_bytes(queries), false, [&](const HostBlock& block, char* shared) {
      paint_segments(block, shared, owner, ids, count, queries, rows, columns, facts, segment_map);
    });
    return 0;
  });
}

/// Elements of one type to float and back, to test the conversions themselves.
void emulate_convert(int32_t dtype, const uint16_t* from, float* widened, const float* floats, uint16_t* narrowed,
                     int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (dtype == kFloat16) {
      widened[i] = to_float(Half{from[i]});
      narrowed[i] = from_float<Half>(floats[i]).bits;
    } else {
      widened[i] = to_float(BFloat16{from[i]});
      narrowed[i] = from_float<BFloat16>(floats[i]).bits;
    }
  }
}

}  // extern "C"
