/* SPDX-License-Identifier: Apache-2.0
 *
 * C functions that launch the kernels. Pointers are device memory, arrays are contiguous, `dtype` is 0 for float, 1 for
 * binary16, 2 for bfloat16. Work is put on `stream` of the current device and is not waited for; nothing is allocated.
 * The result is cudaSuccess, cudaErrorInvalidValue for sizes or pointers out of range (nothing was launched then), or
 * what the launch returned.
 */
#ifndef ODISE_KERNELS_H_
#define ODISE_KERNELS_H_

#include <cuda_runtime_api.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 16, that odise_mask_pool needs on the current device. */
cudaError_t odise_mask_pool_workspace(int32_t dtype, int64_t batch, int64_t queries, int64_t channels, int64_t pixels,
                                      size_t* bytes);

/* Mask logits (B, Q, P) and features (B, C, P) to means (B, Q, C) of their type and areas (B, Q); P is H * W. */
cudaError_t odise_mask_pool(int32_t dtype, const void* logits, const void* features, int64_t batch, int64_t queries,
                            int64_t channels, int64_t pixels, void* workspace, size_t workspace_bytes, void* pooled,
                            int32_t* areas, cudaStream_t stream);

/* Tables of the resize from cells to the image, for odise_panoptic_merge; clears the areas (3, Q).
 * Tables: first (length), weights (3, length), for rows and for columns. */
cudaError_t odise_panoptic_prepare(int32_t cell_rows, int32_t cell_columns, int32_t stride, int32_t test_rows,
                                   int32_t test_columns, int32_t rows, int32_t columns, int32_t queries,
                                   int32_t* row_first, float* row_weights, int32_t* column_first,
                                   float* column_weights, int32_t* areas, cudaStream_t stream);

/* Mask logits (Q, cell rows, cell columns) and scores (Q) in (0, 1], at or below 0 for masks that take no part, to the
 * owner of each pixel (rows, columns), -1 for none, and areas (3, Q) of masks, owned pixels, and both. */
cudaError_t odise_panoptic_merge(int32_t dtype, const void* logits, const float* scores, int32_t queries,
                                 int32_t cell_rows, int32_t cell_columns, const int32_t* row_first,
                                 const float* row_weights, int32_t rows, const int32_t* column_first,
                                 const float* column_weights, int32_t columns, int16_t* owner, int32_t* areas,
                                 cudaStream_t stream);

/* Embeddings (Q, C) and L2-normalised texts (L, C) to cosines (Q, L) times `scale`. */
cudaError_t odise_text_cosines(const float* embeddings, const float* texts, float scale, int32_t queries,
                               int32_t channels, int32_t words, float* cosines, cudaStream_t stream);

/* Scaled cosines of the mask classifier and of CLIP, (Q, L) each, to class probabilities (Q, K + 1), the last column "no
 * object", labels (Q) with -1 for no object and -2 for NaN, scores (Q) for the merge, and the `best` likeliest classes
 * with three probabilities each. Words of class k are first_word[k] to first_word[k + 1], clip_weight (K) is CLIP's
 * share. "No object" comes from object_logits (Q, 2), or, where that is null, from one more word of the mask classifier,
 * whose cosines are (Q, L + 1) then. thresholds (2) are that of "unknown" and what a class must exceed for its mask to
 * take part in the merge. With `with_unknown`, probabilities are (Q, K + 2), and masks whose best class is less likely
 * than the first threshold are of class K. */
cudaError_t odise_classify_masks(const float* mask_cosines, const float* clip_cosines, const int32_t* first_word,
                                 const float* clip_weight, const float* object_logits, const float* thresholds,
                                 int32_t queries, int32_t words, int32_t classes, int32_t best, int32_t rank_all,
                                 int32_t with_unknown, float* probabilities, int32_t* labels, float* scores, int32_t* ranked,
                                 float* ranked_scores, cudaStream_t stream);

/* Labels and scores (Q) and areas (3, Q) of the merge to segments: ids (Q) from 1, 0 for none; count (2) of them, and of
 * masks with the label -2; query, class and score of each (Q); facts (5, Q) are made ready for odise_paint_segments.
 * things (classes) is 1 for a thing; stuff of one class is joined. overlap (1) is the least share of its pixels that a
 * mask must have won. */
cudaError_t odise_choose_segments(const int32_t* labels, const float* scores, const int32_t* areas,
                                  const uint8_t* things, const double* overlap, int32_t queries, int32_t* ids,
                                  int32_t* count, int32_t* segment_queries, int32_t* segment_classes,
                                  float* segment_scores, int32_t* facts, cudaStream_t stream);

/* Owners (rows, columns) and ids (Q) to the segment map, and to left, top, right, bottom (exclusive) and area of each
 * segment. */
cudaError_t odise_paint_segments(const int16_t* owner, const int32_t* ids, const int32_t* count, int32_t queries,
                                 int32_t rows, int32_t columns, int32_t* facts, int32_t* segment_map,
                                 cudaStream_t stream);

/* Values (B, N, heads, channels), references (1 or B, M, 2), offsets (B, M, heads, levels, points, 2) and weight logits
 * (B, M, heads, levels * points) to (B, M, heads, channels). `heights` and `widths` are host memory. */
cudaError_t odise_deformable_attention(int32_t dtype, const void* value, const float* references, const void* offsets,
                                       const void* weight_logits, int32_t batch, int32_t reference_batch,
                                       int32_t queries, int32_t heads, int32_t channels, int32_t levels,
                                       const int32_t* heights, const int32_t* widths, int32_t points, void* out,
                                       cudaStream_t stream);

/* Pixels (rows, columns, 3) to (rows, length, 3), one axis of Pillow's bilinear resize. Table: first (length) and
 * weights (taps, length) of 22 fractional bits. */
cudaError_t odise_resize_across(const uint8_t* pixels, int32_t rows, int32_t columns, const int32_t* first,
                                const int32_t* weights, int32_t taps, int32_t length, uint8_t* out,
                                cudaStream_t stream);

/* Pixels (source rows, columns, 3), resized to `length` rows, to a canvas (3, canvas rows, canvas columns) in [0, 1]
 * with zeros below and beside the image. */
cudaError_t odise_resize_down(const uint8_t* pixels, int32_t columns, const int32_t* first, const int32_t* weights,
                              int32_t taps, int32_t length, int32_t canvas_rows, int32_t canvas_columns, float* canvas,
                              cudaStream_t stream);

/* Canvas (channels, rows, columns) to `count` windows (count, channels, side rows, side columns) from number `start` on;
 * `down` and `across` windows cover it, the last ones moved back inside. */
cudaError_t odise_cut_windows(const float* canvas, int32_t channels, int32_t rows, int32_t columns, int32_t side_rows,
                              int32_t side_columns, int32_t down, int32_t across, int32_t start, int32_t count,
                              float* windows, cudaStream_t stream);

/* All windows (down * across, channels, side rows, side columns) to (channels, rows, columns), averaged where they
 * overlap. */
cudaError_t odise_stitch_windows(const float* windows, int32_t channels, int32_t rows, int32_t columns,
                                 int32_t side_rows, int32_t side_columns, int32_t down, int32_t across, float* level,
                                 cudaStream_t stream);

#ifdef __cplusplus
}
#endif
#endif
