// SPDX-License-Identifier: Apache-2.0
// Names for masks and the segments that come of them: what odise_rt/classification.py and merge_panoptic of
// odise_rt/postprocessing.py do, on the GPU.
//
//   text_cosines     embeddings (Q, C) and texts (L, C) to scaled cosines (Q, L)
//   name_classes     both classifiers' cosines to class probabilities, the best class and the best few, for each mask
//   choose_segments  labels and areas of the panoptic merge to segments: overlap test, joined stuff
//   paint_segments   the owner of each pixel to the segment map, with boxes and areas
//
// Between name_classes and choose_segments lies panoptic_merge.cuh, which reads the scores and writes owners and areas.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kNameThreads = 256;
constexpr int kNameWarps = kNameThreads / kWarp;
constexpr int kCosineTile = 64;   // masks, and words, of a block's tile
constexpr int kCosineDepth = 16;  // channels at a time
constexpr int kCosinePitch = kCosineTile + 4;
constexpr int kCosineOf = 4;      // a thread has 4 x 4 cosines
constexpr int kPaintColumns = 64;
constexpr int kPaintRows = 8;  // of a warp
constexpr int kPaintTileRows = kPaintRows * kNameWarps * kWarp / kPaintColumns;
constexpr int kPaintFacts = 5;  // of a segment: left, top, right, bottom, area
constexpr float kNameEpsilon = 1e-8f;  // EPSILON of classification.py
constexpr float kLeastNorm = 1e-12f;   // as in normalise() of text_embeddings.py
constexpr int32_t kNoPixel = 0x7FFFFFFF;

constexpr int64_t kCosineBytes = (2 * kCosineDepth * kCosinePitch + kNameThreads) * 4;
constexpr int64_t kClassBytes = 2 * kNameThreads * 4;

/// Bytes of shared memory of choose_segments.
inline int64_t choose_shared_bytes(int64_t queries) { return 3 * queries * 4; }

/// Bytes of shared memory of paint_segments.
inline int64_t paint_shared_bytes(int64_t queries) { return kPaintFacts * queries * 4; }

/// What a thread of text_cosines keeps in registers.
struct CosineSums {
  float product[kCosineOf][kCosineOf];
  float square;                // of its share of one embedding
  float fetched[2][kCosineOf];  // channels of one embedding and one text
};

/// Reads four channels of one row, from `channel` on.
ODISE_DEVICE void cosine_fetch(const float* rows, int row, int count, int channel, int channels,
                               float (&fetched)[kCosineOf]) {
#pragma unroll
  for (int i = 0; i < kCosineOf; ++i) {
    const bool there = row < count && channel + i < channels;
    fetched[i] = there ? rows[static_cast<int64_t>(row) * channels + channel + i] : 0.0f;
  }
}

/// Puts them into a transposed tile. Returns the sum of their squares.
ODISE_DEVICE float cosine_store(const float (&fetched)[kCosineOf], float* tile, int row, int channel) {
  float square = 0.0f;
#pragma unroll
  for (int i = 0; i < kCosineOf; ++i) {
    tile[(channel + i) * kCosinePitch + row] = fetched[i];
    square += fetched[i] * fetched[i];
  }
  return square;
}

/// Grid: (ceil(words / kCosineTile), ceil(queries / kCosineTile)); kNameThreads threads; kCosineBytes.
///
/// Texts are normalised already, embeddings are not: their norms are summed on the way.
template <class Block>
ODISE_DEVICE void text_cosines(const Block& block, char* shared, const float* embeddings, const float* texts,
                               float scale, int queries, int channels, int words, float* cosines) {
  float* left = reinterpret_cast<float*>(shared);
  float* right = left + kCosineDepth * kCosinePitch;
  float* squares = right + kCosineDepth * kCosinePitch;  // (kCosineTile, 4)
  const int first_query = static_cast<int>(block.y()) * kCosineTile;
  const int first_word = static_cast<int>(block.x()) * kCosineTile;
  typename Block::template PerThread<CosineSums> sums;
  const auto fetch = [&](int thread, int channel) {
    const int row = thread / kCosineOf, offset = channel + thread % kCosineOf * kCosineOf;
    cosine_fetch(embeddings, first_query + row, queries, offset, channels, sums[thread].fetched[0]);
    cosine_fetch(texts, first_word + row, words, offset, channels, sums[thread].fetched[1]);
  };
  block.each_thread([&](int thread) { fetch(thread, 0); });
  for (int channel = 0; channel < channels; channel += kCosineDepth) {
    block.each_thread([&](int thread) {
      const int row = thread / kCosineOf, offset = thread % kCosineOf * kCosineOf;
      sums[thread].square += cosine_store(sums[thread].fetched[0], left, row, offset);
      cosine_store(sums[thread].fetched[1], right, row, offset);
    });
    block.sync();
    block.each_thread([&](int thread) {
      fetch(thread, channel + kCosineDepth);  // under way during the products; zeros behind the last
      const int top = thread / 16 * kCosineOf, column = thread % 16 * kCosineOf;
      float(&product)[kCosineOf][kCosineOf] = sums[thread].product;
#pragma unroll
      for (int k = 0; k < kCosineDepth; ++k) {
        const float* a = left + k * kCosinePitch + top;
        const float* b = right + k * kCosinePitch + column;
#pragma unroll
        for (int i = 0; i < kCosineOf; ++i) {
#pragma unroll
          for (int j = 0; j < kCosineOf; ++j) product[i][j] += a[i] * b[j];
        }
      }
    });
    block.sync();
  }
  block.each_thread([&](int thread) { squares[thread] = sums[thread].square; });
  block.sync();
  block.each_thread([&](int thread) {
    const int top = thread / 16 * kCosineOf, column = thread % 16 * kCosineOf;
#pragma unroll
    for (int i = 0; i < kCosineOf; ++i) {
      const float* parts = squares + (top + i) * kCosineOf;
      const float factor = scale / larger(sqrtf((parts[0] + parts[1]) + (parts[2] + parts[3])), kLeastNorm);
      const int query = first_query + top + i;
#pragma unroll
      for (int j = 0; j < kCosineOf; ++j) {
        const int word = first_word + column + j;
        if (query < queries && word < words) {
          cosines[static_cast<int64_t>(query) * words + word] = factor * sums[thread].product[i][j];
        }
      }
    }
  });
}

/// A value and where it is; of equal values the one further left is better.
struct Ranked {
  float value;
  int32_t index;
};

ODISE_DEVICE bool better(Ranked a, Ranked b) { return a.value > b.value || (a.value == b.value && a.index < b.index); }

/// Combines a value of every thread, always in the same order. Every thread gets the result.
template <class Block, class Values, class Combine>
ODISE_DEVICE float combined(const Block& block, float* shared, Values& values, Combine&& combine) {
  block.each_thread([&](int thread) { shared[thread] = values[thread]; });
  block.sync();
  for (int half = kNameThreads / 2; half; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread < half) shared[thread] = combine(shared[thread], shared[thread + half]);
    });
    block.sync();
  }
  const float result = shared[0];
  block.sync();
  return result;
}

template <class Block, class Values>
ODISE_DEVICE Ranked best_of(const Block& block, char* shared, Values& values) {
  float* value = reinterpret_cast<float*>(shared);
  int32_t* index = reinterpret_cast<int32_t*>(value + kNameThreads);
  block.each_thread([&](int thread) { value[thread] = values[thread].value, index[thread] = values[thread].index; });
  block.sync();
  for (int half = kNameThreads / 2; half; half /= 2) {
    block.each_thread([&](int thread) {
      if (thread >= half) return;
      const Ranked other{value[thread + half], index[thread + half]};
      if (better(other, Ranked{value[thread], index[thread]})) value[thread] = other.value, index[thread] = other.index;
    });
    block.sync();
  }
  const Ranked result{value[0], index[0]};
  block.sync();
  return result;
}

/// A vocabulary of K classes with L words, and one mask's row of cosines from each classifier.
struct ClassRows {
  const float* mask;            // (L), or (L + 1) with "no object" at the end
  const float* clip;            // (L)
  const int32_t* first_word;    // (K + 1), the last one L
  const float* clip_weight;     // (K)
  int classes;

  /// The best synonym's cosine.
  ODISE_DEVICE float logit(const float* cosines, int k) const {
    float best = cosines[first_word[k]];
    for (int word = first_word[k] + 1; word < first_word[k + 1]; ++word) best = larger(best, cosines[word]);
    return best;
  }
};

/// How masks are named; see name_queries() of classification.py.
struct NameRules {
  const float* thresholds;  // (2): probability below which a mask is "unknown"; and what a class must exceed for its mask
                            // to take part in the merge. In memory, so that a captured graph obeys new ones.
  int best;                 // classes to rank
  bool rank_all;            // those of masks that are likeliest no object, too
  bool with_unknown;        // whether there is "unknown"
};

/// What is found for the masks.
struct NameResults {
  float* probabilities;   // (Q, K + 1), or (Q, K + 2) with unknown
  int32_t* labels;        // (Q): class; K: unknown; -1: no object; -2: some probability is not a number
  float* scores;          // (Q): probability of the label, 0 for masks that take no part in the merge
  int32_t* ranked;        // (Q, best)
  float* ranked_scores;   // (Q, best, 3): both classifiers, the mask classifier alone, CLIP alone
};

/// Grid: (queries); kNameThreads threads; kClassBytes. `object_logits` (Q, 2) is null where "no object" is a word.
template <class Block>
ODISE_DEVICE void name_classes(const Block& block, char* shared, const float* mask_cosines, const float* clip_cosines,
                               const int32_t* first_word, const float* clip_weight, const float* object_logits,
                               int queries, int words, int classes, NameRules rules, NameResults out) {
  const int64_t query = block.x();
  if (query >= queries) return;
  const int mask_words = words + (object_logits == nullptr);
  const ClassRows rows{mask_cosines + query * mask_words, clip_cosines + query * words, first_word, clip_weight,
                       classes};
  float* row = out.probabilities + query * (classes + 1 + rules.with_unknown);
  float* floats = reinterpret_cast<float*>(shared);
  const auto most = [](float a, float b) { return larger(a, b); };
  const auto plus = [](float a, float b) { return a + b; };
  typename Block::template PerThread<float> a, b;

  // 1. Log-softmax of both classifiers over the classes.
  block.each_thread([&](int thread) {
    a[thread] = b[thread] = -INFINITY;
    for (int k = thread; k < classes; k += kNameThreads) {
      a[thread] = larger(a[thread], rows.logit(rows.mask, k));
      b[thread] = larger(b[thread], rows.logit(rows.clip, k));
    }
  });
  const float mask_most = combined(block, floats, a, most), clip_most = combined(block, floats, b, most);
  block.each_thread([&](int thread) {
    a[thread] = b[thread] = 0.0f;
    for (int k = thread; k < classes; k += kNameThreads) {
      a[thread] += expf(rows.logit(rows.mask, k) - mask_most);
      b[thread] += expf(rows.logit(rows.clip, k) - clip_most);
    }
  });
  const float mask_sum = combined(block, floats, a, plus), clip_sum = combined(block, floats, b, plus);
  const float mask_log = mask_most + logf(mask_sum), clip_log = clip_most + logf(clip_sum);
  float none;  // probability of "no object"
  if (object_logits != nullptr) {
    none = 1.0f / (1.0f + expf(object_logits[2 * query] - object_logits[2 * query + 1]));
  } else {
    const float logit = rows.mask[words], top = larger(mask_most, logit);
    const float share = expf(logit - top);
    none = share / (mask_sum * expf(mask_most - top) + share);
  }

  // 2. Geometric mean of the two, softmax again.
  const auto ensemble = [&](int k) {
    const float weight = rows.clip_weight[k];
    return (1.0f - weight) * (rows.logit(rows.mask, k) - mask_log) + weight * (rows.logit(rows.clip, k) - clip_log);
  };
  block.each_thread([&](int thread) {
    a[thread] = -INFINITY;
    for (int k = thread; k < classes; k += kNameThreads) a[thread] = larger(a[thread], ensemble(k));
  });
  const float both_most = combined(block, floats, a, most);
  block.each_thread([&](int thread) {
    a[thread] = 0.0f;
    for (int k = thread; k < classes; k += kNameThreads) a[thread] += expf(ensemble(k) - both_most);
  });
  const float factor = (1.0f - none) / combined(block, floats, a, plus);
  const float total = 1.0f + kNameEpsilon * static_cast<float>(classes + 1);
  none = (none + kNameEpsilon) / total;
  typename Block::template PerThread<Ranked> found;
  block.each_thread([&](int thread) {
    found[thread] = Ranked{-1.0f, kNoPixel};
    for (int k = thread; k < classes; k += kNameThreads) {
      const float probability = (factor * expf(ensemble(k) - both_most) + kNameEpsilon) / total;
      row[k] = probability;
      const Ranked here{probability, k};
      if (better(here, found[thread])) found[thread] = here;
    }
  });
  Ranked best = best_of(block, shared, found);
  const bool is_object = best.value >= none;  // of equal ones the first, and "no object" is last

  // 3. The best few. Each thread reads back what it wrote itself.
  const Ranked likeliest = best;
  for (int rank = 0; rank < rules.best; ++rank) {
    // There is no best class where probabilities are NaN: one NaN in an embedding makes all of them so.
    const bool wanted = (is_object || rules.rank_all) && best.index < classes;
    block.each_thread([&](int thread) {
      if (thread != 0) return;
      const int64_t at = query * rules.best + rank;
      out.ranked[at] = wanted ? best.index : 0;
      out.ranked_scores[3 * at] = wanted ? best.value : 0.0f;
      out.ranked_scores[3 * at + 1] = wanted ? expf(rows.logit(rows.mask, best.index) - mask_log) : 0.0f;
      out.ranked_scores[3 * at + 2] = wanted ? expf(rows.logit(rows.clip, best.index) - clip_log) : 0.0f;
    });
    if (!wanted || rank + 1 == rules.best) continue;
    block.each_thread([&](int thread) {
      found[thread] = Ranked{-1.0f, kNoPixel};
      for (int k = thread; k < classes; k += kNameThreads) {
        const Ranked here{row[k], k};
        if (better(best, here) && better(here, found[thread])) found[thread] = here;
      }
    });
    best = best_of(block, shared, found);
  }

  // 4. What the merge needs, and the last columns.
  const bool unnamed = rules.with_unknown && likeliest.value < rules.thresholds[0];
  block.each_thread([&](int thread) {
    if (unnamed) {
      for (int k = thread; k < classes; k += kNameThreads) row[k] = 0.0f;
    }
    if (thread != 0) return;
    if (rules.with_unknown) row[classes] = unnamed ? likeliest.value : 0.0f;
    row[classes + rules.with_unknown] = none;
    out.labels[query] = likeliest.index >= classes ? -2 : !is_object ? -1 : unnamed ? classes : likeliest.index;
    out.scores[query] = is_object && likeliest.value > rules.thresholds[1] ? likeliest.value : 0.0f;
  });
}

/// The segments of an image, at most one for each mask.
struct SegmentTable {
  int32_t* ids;      // (Q): id of the segment that a mask's pixels belong to, from 1; 0: none
  int32_t* count;    // (2): segments; masks whose probabilities are not numbers
  int32_t* queries;  // (Q): of each segment, the mask with the best score
  int32_t* classes;  // (Q)
  float* scores;     // (Q)
  int32_t* facts;    // (5, Q): left, top, right, bottom, area; filled by paint_segments
};

/// One block of kNameThreads threads; choose_shared_bytes(). `things` is (classes), 1 for a thing; `areas` is (3, Q) of
/// panoptic_merge.
///
/// As if the masks came one after the other: ids count up as masks pass, and stuff joins the first of its class. But each
/// mask finds its own segment, all at once, and the loads of none wait for another's.
template <class Block>
ODISE_DEVICE void choose_segments(const Block& block, char* shared, const int32_t* labels, const float* scores,
                                  const int32_t* areas, const uint8_t* things, int queries, const double* overlap,
                                  SegmentTable out) {
  int32_t* kinds = reinterpret_cast<int32_t*>(shared);     // (Q): class of a mask that passes, else one of those below
  int32_t* firsts = kinds + queries;                       // (Q): the first mask of its segment, itself perhaps
  float* passing = reinterpret_cast<float*>(firsts + queries);  // (Q): its score
  constexpr int32_t kNothing = -1, kBroken = -2;
  block.each_thread([&](int thread) {
    for (int i = thread; i < kPaintFacts * queries; i += kNameThreads) out.facts[i] = i < 2 * queries ? kNoPixel : 0;
    const double least = *overlap;
#pragma unroll 1
    for (int query = thread; query < queries; query += kNameThreads) {
      const int32_t label = labels[query], mask = areas[query], owned = areas[queries + query];
      const int32_t kept = areas[2 * queries + query];
      const float score = scores[query];
      const bool passes = label >= 0 && score > 0.0f && mask > 0 && owned > 0 && kept > 0 &&
                          !(static_cast<double>(owned) / static_cast<double>(mask) < least);
      kinds[query] = passes ? label : label < -1 ? kBroken : kNothing;
      firsts[query] = passes && things[label] ? query : kNothing;
      passing[query] = score;
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
#pragma unroll 1
    for (int query = thread; query < queries; query += kNameThreads) {
      if (kinds[query] < 0 || firsts[query] == query) continue;
      const int32_t kind = kinds[query];  // no mask of a thing is of this class
      int first = query;
#pragma unroll 4
      for (int other = 0; other < queries; ++other) first = kinds[other] == kind && other < first ? other : first;
      firsts[query] = first;
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
#pragma unroll 1
    for (int query = thread; query < queries; query += kNameThreads) {
      const int first = firsts[query];
      int before = 0, best = first;
      float score = first < 0 ? 0.0f : passing[first];
#pragma unroll 4
      for (int other = 0; other < queries; ++other) {
        const int theirs = firsts[other];
        before += theirs == other && other < first;
        const float value = passing[other];
        const bool better = theirs == first && value > score;
        best = better ? other : best;
        score = better ? value : score;
      }
      out.ids[query] = first < 0 ? 0 : before + 1;
      if (first != query) continue;
      out.queries[before] = best;
      out.classes[before] = kinds[first];
      out.scores[before] = score;
    }
    if (thread != kNameThreads - 1) return;  // the last one seldom has a mask
    int count = 0, broken = 0;
#pragma unroll 4
    for (int query = 0; query < queries; ++query) count += firsts[query] == query, broken += kinds[query] == kBroken;
    out.count[0] = count;
    out.count[1] = broken;
  });
}

/// Grid: (ceil(columns / kPaintColumns), ceil(rows / kPaintTileRows)); kNameThreads threads; paint_shared_bytes().
template <class Block>
ODISE_DEVICE void paint_segments(const Block& block, char* shared, const int16_t* owner, const int32_t* ids,
                                 const int32_t* segments, int queries, int rows, int columns, int32_t* facts,
                                 int32_t* segment_map) {
  using Warp = typename Block::Warp;
  int32_t* here = reinterpret_cast<int32_t*>(shared);  // (5, count)
  const int count = *segments;
  block.each_thread([&](int thread) {
    for (int i = thread; i < kPaintFacts * count; i += kNameThreads) here[i] = i < 2 * count ? kNoPixel : 0;
  });
  block.sync();
  block.each_warp([&](const Warp& warp) {
    const int x0 = static_cast<int>(block.x()) * kPaintColumns + warp.index % 2 * kWarp;
    const int y0 = static_cast<int>(block.y()) * kPaintTileRows + warp.index / 2 * kPaintRows;
    typename Warp::template Lane<int> mask[kPaintRows], found[kPaintRows];
    // All rows' owners, then all their ids, so that the loads of each are under way at once.
    warp.each([&](int lane) {
#pragma unroll
      for (int r = 0; r < kPaintRows; ++r) {
        const bool there = y0 + r < rows && x0 + lane < columns;
        mask[r][lane] = there ? owner[static_cast<int64_t>(y0 + r) * columns + x0 + lane] : -1;
      }
#pragma unroll
      for (int r = 0; r < kPaintRows; ++r) found[r][lane] = mask[r][lane] < 0 ? 0 : ids[mask[r][lane]];
#pragma unroll
      for (int r = 0; r < kPaintRows; ++r) {
        if (y0 + r < rows && x0 + lane < columns) {
          segment_map[static_cast<int64_t>(y0 + r) * columns + x0 + lane] = found[r][lane];
        }
      }
    });
#pragma unroll
    for (int r = 0; r < kPaintRows; ++r) {
      const int y = y0 + r;
      const typename Warp::template Lane<int>& id = found[r];
      typename Warp::template Lane<bool> taken;
      warp.each([&](int lane) { taken[lane] = id[lane] > 0; });
      // One set of updates for each segment in the row, not for each pixel.
      for (uint32_t left_over = warp.ballot(taken); left_over;) {
        const int segment = warp.from(id, first_bit(left_over));
        typename Warp::template Lane<bool> same;
        warp.each([&](int lane) { same[lane] = id[lane] == segment; });
        const uint32_t bits = warp.ballot(same);
        warp.each([&](int lane) {
          if (lane != 0) return;
          int32_t* at = here + segment - 1;
          block.lower(&at[0], x0 + first_bit(bits));
          block.lower(&at[count], y);
          block.raise(&at[2 * count], x0 + last_bit(bits) + 1);
          block.raise(&at[3 * count], y + 1);
          block.add(&at[4 * count], count_bits(bits));
        });
        left_over &= ~bits;
      }
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
    for (int segment = thread; segment < count; segment += kNameThreads) {
      if (here[4 * count + segment] == 0) continue;
      block.lower(&facts[segment], here[segment]);
      block.lower(&facts[queries + segment], here[count + segment]);
      block.raise(&facts[2 * queries + segment], here[2 * count + segment]);
      block.raise(&facts[3 * queries + segment], here[3 * count + segment]);
      block.add(&facts[4 * queries + segment], here[4 * count + segment]);
    }
  });
}

}  // namespace odise
