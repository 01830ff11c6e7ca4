// SPDX-License-Identifier: Apache-2.0
// Kernels by name, which the fatbin is asked for, and the C launchers of naming.
#include "naming.cuh"

#include "odise_kernels.h"

using namespace odise;

extern __shared__ __align__(16) char shared_memory[];

extern "C" __global__ void __launch_bounds__(kNameThreads, 4)  // registers enough for loads that are under way
    odise_name_cosines(const float* __restrict__ embeddings, const float* __restrict__ texts, float scale, int queries,
                       int channels, int words, float* __restrict__ cosines) {
  text_cosines(DeviceBlock(), shared_memory, embeddings, texts, scale, queries, channels, words, cosines);
}

extern "C" __global__ void __launch_bounds__(kNameThreads, 4)  // with more blocks it would spill on sm_80 and sm_90
    odise_name_classes(const float* __restrict__ mask_cosines, const float* __restrict__ clip_cosines,
                       const int32_t* __restrict__ first_word, const float* __restrict__ clip_weight,
                       const float* __restrict__ object_logits, const float* __restrict__ thresholds, int queries,
                       int words, int classes, int best, int rank_all, int with_unknown,
                       float* __restrict__ probabilities, int32_t* __restrict__ labels, float* __restrict__ scores,
                       int32_t* __restrict__ ranked, float* __restrict__ ranked_scores) {
  name_classes(DeviceBlock(), shared_memory, mask_cosines, clip_cosines, first_word, clip_weight, object_logits,
               queries, words, classes, NameRules{thresholds, best, rank_all != 0, with_unknown != 0},
               NameResults{probabilities, labels, scores, ranked, ranked_scores});
}

extern "C" __global__ void __launch_bounds__(kNameThreads)
    odise_name_choose(const int32_t* __restrict__ labels, const float* __restrict__ scores,
                      const int32_t* __restrict__ areas, const uint8_t* __restrict__ things,
                      const double* __restrict__ overlap, int queries, int32_t* ids, int32_t* count, int32_t* segment_queries, int32_t* segment_classes,
                      float* segment_scores, int32_t* facts) {
  choose_segments(DeviceBlock(), shared_memory, labels, scores, areas, things, queries, overlap,
                  SegmentTable{ids, count, segment_queries, segment_classes, segment_scores, facts});
}

extern "C" __global__ void __launch_bounds__(kNameThreads, 4)
    odise_name_paint(const int16_t* __restrict__ owner, const int32_t* __restrict__ ids,
                     const int32_t* __restrict__ count, int queries, int rows, int columns, int32_t* facts,
                     int32_t* __restrict__ segment_map) {
  paint_segments(DeviceBlock(), shared_memory, owner, ids, count, queries, rows, columns, facts, segment_map);
}

namespace {

constexpr int64_t kMostQueries = 2048;

bool between(int64_t low, int64_t value, int64_t high) { return low <= value && value <= high; }

int tiles(int64_t count, int64_t size) { return static_cast<int>((count + size - 1) / size); }

}  // namespace

extern "C" cudaError_t odise_text_cosines(const float* embeddings, const float* texts, float scale, int32_t queries,
                                          int32_t channels, int32_t words, float* cosines, cudaStream_t stream) {
  if (!embeddings || !texts || !cosines || !between(1, queries, kMostQueries) || !between(1, channels, 1 << 20) ||
      !between(1, words, 1 << 24)) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(tiles(words, kCosineTile), tiles(queries, kCosineTile));
  odise_name_cosines<<<grid, kNameThreads, kCosineBytes, stream>>>(embeddings, texts, scale, queries, channels, words,
                                                                   cosines);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_classify_masks(const float* mask_cosines, const float* clip_cosines,
                                            const int32_t* first_word, const float* clip_weight,
                                            const float* object_logits, const float* thresholds, int32_t queries,
                                            int32_t words, int32_t classes, int32_t best, int32_t rank_all,
                                            int32_t with_unknown, float* probabilities, int32_t* labels, float* scores,
                                            int32_t* ranked, float* ranked_scores, cudaStream_t stream) {
  if (!mask_cosines || !clip_cosines || !first_word || !clip_weight || !thresholds || !probabilities || !labels || !scores ||
      (best > 0 && (!ranked || !ranked_scores)) || !between(1, queries, kMostQueries) || !between(1, words, 1 << 24) ||
      !between(1, classes, words) || !between(0, best, classes)) {
    return cudaErrorInvalidValue;
  }
  odise_name_classes<<<queries, kNameThreads, kClassBytes, stream>>>(
      mask_cosines, clip_cosines, first_word, clip_weight, object_logits, thresholds, queries, words, classes,
      best, rank_all, with_unknown, probabilities, labels, scores, ranked, ranked_scores);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_choose_segments(const int32_t* labels, const float* scores, const int32_t* areas,
                                             const uint8_t* things, const double* overlap, int32_t queries,
                                             int32_t* ids, int32_t* count, int32_t* segment_queries, int32_t* segment_classes,
                                             float* segment_scores, int32_t* facts, cudaStream_t stream) {
  if (!labels || !scores || !areas || !things || !overlap || !ids || !count || !segment_queries || !segment_classes ||
      !segment_scores || !facts || !between(1, queries, kMostQueries)) {
    return cudaErrorInvalidValue;
  }
  odise_name_choose<<<1, kNameThreads, choose_shared_bytes(queries), stream>>>(
      labels, scores, areas, things, overlap, queries, ids, count, segment_queries, segment_classes, segment_scores, facts);
  return cudaGetLastError();
}

extern "C" cudaError_t odise_paint_segments(const int16_t* owner, const int32_t* ids, const int32_t* count,
                                            int32_t queries, int32_t rows, int32_t columns, int32_t* facts,
                                            int32_t* segment_map, cudaStream_t stream) {
  if (!owner || !ids || !count || !facts || !segment_map || !between(1, queries, kMostQueries) ||
      !between(1, rows, 1 << 20) || !between(1, columns, 1 << 20) ||
      !between(1, static_cast<int64_t>(rows) * columns, 0x7FFFFFFF)) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(tiles(columns, kPaintColumns), tiles(rows, kPaintTileRows));
  odise_name_paint<<<grid, kNameThreads, paint_shared_bytes(queries), stream>>>(owner, ids, count, queries, rows,
                                                                                columns, facts, segment_map);
  return cudaGetLastError();
}
