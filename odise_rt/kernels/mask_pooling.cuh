// SPDX-License-Identifier: Apache-2.0
// Mask pooling: the mean of the features under every hard mask, and the mask's area.
//
//   pooled[b, q, c] = sum over pixels p with logit[b, q, p] > 0 of feature[b, c, p] / area[b, q]
//
// The sum is a matrix product of 0/1 masks (Q x P) with features (C x P), both contiguous along the pixels P = H * W.
// Pixels are split over blocks; a block holds all sums of its tile of 128 masks x 128 channels in registers. The blocks
// of other channels read the same logits at the same time, so that these come from memory once and else from the L2. A
// larger tile would read them less often, but leave more splits, whose sums must be written and read again. The logits
// become 0/1 in registers, between shared memory and tensor core; the area is one more product, with ones. Sums of the
// splits go to a workspace and are added in a fixed order by a second kernel: the same input gives the same bits.
//
// Sums are float. Products with 0 and 1 are exact in every type; as in any matrix product, 0 * inf is NaN, so features
// must be finite.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kPoolThreads = 256;
constexpr int kPoolWarps = kPoolThreads / kWarp;
constexpr int kPoolChannels = 128;  // of a block's tile
constexpr int kPoolHalves = 2;      // of its masks: so many warps have the same channels
constexpr int kPoolGroups = kPoolWarps / kPoolHalves;           // of channels
constexpr int kPoolWarpChannels = kPoolChannels / kPoolGroups;  // 32: four columns of 8 for the tensor cores
constexpr int kPoolPixels = 32;                                 // of a step: two products of depth 16
constexpr int kPoolRowBytes = kPoolPixels * 2;
constexpr int kPoolMaxStages = 8;
constexpr int kPoolColumns = kPoolWarpChannels / 8;
constexpr int kFinishChannels = 128;  // of a finishing block: 32 lanes of 4
constexpr int kFinishSplits = 10;     // that a warp of it reads at once: all of its own on up to 160 multiprocessors

/// Which pixels a split sums: steps of kPoolPixels, as even as they go.
struct PoolSteps {
  int64_t first;
  int64_t last;
};

ODISE_DEVICE PoolSteps pool_steps(int64_t pixels, int64_t split, int64_t splits) {
  const int64_t steps = (pixels + kPoolPixels - 1) / kPoolPixels;
  return {steps * split / splits, steps * (split + 1) / splits};
}

/// Where 16 bytes (8 pixels) of a row lie in a stage. The exclusive-or spreads the eight rows that ldmatrix reads at
/// once over all 32 banks.
ODISE_DEVICE int pool_offset(int row, int chunk) { return row * kPoolRowBytes + ((chunk ^ ((row >> 1) & 3)) << 4); }

/// Pixels of a step in shared memory: masks first, then channels.
template <int kRowTiles>
struct PoolTile {
  static constexpr int kMasks = 16 * kRowTiles;
  static constexpr int kRows = kMasks + kPoolChannels;
  static constexpr int kStageBytes = kRows * kPoolRowBytes;  // of a tensor core block
};

/// The rows that a block reads, and where.
template <class T>
struct PoolSource {
  const T* logits;    // of the block's first mask
  const T* features;  // of the block's first channel
  int masks;          // that exist from there on
  int channels;
  int64_t pixels;
  bool aligned;  // every row starts at a multiple of 16 bytes

  ODISE_DEVICE const T* row(int index, int mask_rows) const {
    if (index < mask_rows) return index < masks ? logits + index * pixels : nullptr;
    return index - mask_rows < channels ? features + (index - mask_rows) * pixels : nullptr;
  }
};

template <class T>
ODISE_DEVICE PoolSource<T> pool_source(const T* logits, const T* features, int64_t batch, int first_mask,
                                       int first_channel, int queries, int channels, int64_t pixels) {
  PoolSource<T> source;
  source.logits = logits + (batch * queries + first_mask) * pixels;
  source.features = features + (batch * channels + first_channel) * pixels;
  source.masks = queries - first_mask;
  source.channels = channels - first_channel;
  source.pixels = pixels;
  const uintptr_t bases = reinterpret_cast<uintptr_t>(logits) | reinterpret_cast<uintptr_t>(features);
  source.aligned = bases % 16 == 0 && pixels * static_cast<int64_t>(sizeof(T)) % 16 == 0;
  return source;
}

/// What a thread copies of every step: 16 bytes of each kPoolThreads / kChunks-th row, always the same chunk of them.
///
/// Only the pixels change from step to step, so all that a step costs is an addition and a copy for each row. Rows that
/// do not exist are cleared once, in every stage, and never copied to; chunks behind the last pixel become zero.
template <int kRowTiles, class T>
struct PoolCopies {
  static constexpr int kChunks = kPoolPixels / 8;
  static constexpr int kRowStep = kPoolThreads / kChunks;
  static constexpr int kCount = (PoolTile<kRowTiles>::kRows + kRowStep - 1) / kRowStep;

  const char* from[kCount];  // this thread's chunk of step 0
  uint32_t present;       // bit k: the row of copy k exists
  int32_t steps;          // that have this chunk
  int32_t to;             // where copy 0 lies in a stage; others follow by kRowStep rows
};

static_assert(PoolCopies<8, Half>::kRowStep % 8 == 0, "rows of a thread's copies have one swizzle");

template <int kRowTiles, class T>
ODISE_DEVICE PoolCopies<kRowTiles, T> pool_copies(const PoolSource<T>& source, int thread) {
  using Copies = PoolCopies<kRowTiles, T>;
  using Tile = PoolTile<kRowTiles>;
  const int first = thread / Copies::kChunks, chunk = thread % Copies::kChunks;
  Copies copies;
  copies.present = 0;
#pragma unroll
  for (int k = 0; k < Copies::kCount; ++k) {
    const int index = first + k * Copies::kRowStep;
    const T* row = index < Tile::kRows ? source.row(index, Tile::kMasks) : nullptr;
    copies.from[k] = reinterpret_cast<const char*>(row + (row != nullptr ? chunk * 8 : 0));
    copies.present |= static_cast<uint32_t>(row != nullptr) << k;
  }
  copies.steps = static_cast<int32_t>(source.pixels / kPoolPixels + (source.pixels % kPoolPixels > chunk * 8));
  copies.to = pool_offset(first, chunk);
  return copies;
}

/// Clears what copies leave out.
template <int kRowTiles, class T, class Block>
ODISE_DEVICE void pool_clear(const Block& block, char* shared, int stages, int thread,
                             const PoolCopies<kRowTiles, T>& copies) {
  using Copies = PoolCopies<kRowTiles, T>;
  using Tile = PoolTile<kRowTiles>;
  for (int k = 0; k < Copies::kCount; ++k) {
    if ((copies.present >> k & 1u) || thread / Copies::kChunks + k * Copies::kRowStep >= Tile::kRows) continue;
    for (int s = 0; s < stages; ++s) {
      block.clear16(shared + s * Tile::kStageBytes + copies.to + k * Copies::kRowStep * kPoolRowBytes);
    }
  }
}

/// Brings the pixels of one step into shared memory, where every row starts at a multiple of 16 bytes.
template <int kRowTiles, class T, class Block>
ODISE_DEVICE void pool_copy(const Block& block, typename Block::Shared stage, int step,
                            const PoolCopies<kRowTiles, T>& copies) {
  using Copies = PoolCopies<kRowTiles, T>;
  const bool inside = step < copies.steps;
  const uint32_t ahead = inside ? static_cast<uint32_t>(step) * kPoolRowBytes : 0;  // pixels are fewer than 2^31
  const typename Block::Shared to = stage + copies.to;
#pragma unroll
  for (int k = 0; k < Copies::kCount; ++k) {
    if (!(copies.present >> k & 1u)) continue;
    block.copy16(to + k * Copies::kRowStep * kPoolRowBytes, copies.from[k] + ahead, inside);
  }
}

/// The same, element by element, where rows start anywhere.
template <int kRowTiles, class T>
ODISE_DEVICE void pool_gather(char* stage, const PoolSource<T>& source, int64_t step, int thread) {
  using Tile = PoolTile<kRowTiles>;
  constexpr int kChunks = kPoolPixels / 8;
#pragma unroll 1
  for (int i = thread; i < Tile::kRows * kChunks; i += kPoolThreads) {
    const int index = i / kChunks, chunk = i % kChunks;
    const int64_t pixel = step * kPoolPixels + chunk * 8;
    const T* row = source.row(index, Tile::kMasks);
    T* elements = reinterpret_cast<T*>(stage + pool_offset(index, chunk));
    for (int e = 0; e < 8; ++e) elements[e] = row != nullptr && pixel + e < source.pixels ? row[pixel + e] : T{0};
  }
}

/// The sums of a warp: half of the tile's masks x 32 channels, and the area of one row tile.
template <class Warp, int kRowTiles>
struct PoolSums {
  static constexpr int kTiles = kRowTiles / kPoolHalves;
  typename Warp::template Lane<Floats4> sum[kTiles][kPoolColumns];
  typename Warp::template Lane<Floats4> area;  // of the first row tile

  /// Row tile of the block that is number `index` of a warp. The warps of a half begin with one each, so that each counts
  /// the first one that it has, without a branch and without reading it again.
  static ODISE_DEVICE int tile(int warp, int index) {
    return warp / kPoolGroups * kTiles + (index + warp % kPoolGroups) % kTiles;
  }
};

/// Where the rows lie that a lane names to ldmatrix, in a stage and for the first of its two depths.
///
/// Matrices of the masks: rows 0-7 and 8-15 with pixels 0-7, then both with pixels 8-15. Of the channels: rows 0-7 with
/// pixels 0-7, then 8-15; rows 8-15 likewise. Sixteen rows on, or at the other depth, the swizzle is the same.
ODISE_DEVICE int pool_mask_rows(int lane) { return pool_offset(lane % 16, lane / 16); }
ODISE_DEVICE int pool_channel_rows(int lane) { return pool_offset(lane / 16 * 8 + lane % 8, lane / 8 % 2); }

constexpr int kPoolOtherDepth = 32;                // exclusive-or of the offset
constexpr int kPoolTileBytes = 16 * kPoolRowBytes;

/// Adds one step to the sums of a warp.
template <int kRowTiles, class T, class Warp>
ODISE_DEVICE void pool_multiply(const Warp& warp, typename Warp::Shared stage, PoolSums<Warp, kRowTiles>& sums) {
  using Tile = PoolTile<kRowTiles>;
  using Words = typename Warp::template Lane<Words4>;
  using HalfWords = typename Warp::template Lane<Words2>;
  using Sums = PoolSums<Warp, kRowTiles>;
  const int first_channel = (Tile::kMasks + warp.index % kPoolGroups * kPoolWarpChannels) * kPoolRowBytes;
  HalfWords ones;
  warp.each([&](int lane) { ones[lane] = {{Pair<T>::kOnes, Pair<T>::kOnes}}; });
#pragma unroll
  for (int depth = 0; depth < kPoolPixels / 16; ++depth) {
    HalfWords right[kPoolColumns];
#pragma unroll
    for (int pair = 0; pair < kPoolColumns / 2; ++pair) {
      Words two;
      warp.load_matrices(two, [&](int lane) {
        return stage + ((pool_channel_rows(lane) ^ (depth * kPoolOtherDepth)) + first_channel + pair * kPoolTileBytes);
      });
      warp.each([&](int lane) {
        right[2 * pair][lane] = {{two[lane].word[0], two[lane].word[1]}};
        right[2 * pair + 1][lane] = {{two[lane].word[2], two[lane].word[3]}};
      });
    }
#pragma unroll
    for (int tile = 0; tile < Sums::kTiles; ++tile) {
      Words left;
      warp.load_matrices(left, [&](int lane) {
        return stage + ((pool_mask_rows(lane) ^ (depth * kPoolOtherDepth)) + Sums::tile(warp.index, tile) * kPoolTileBytes);
      });
      warp.each([&](int lane) {
#pragma unroll
        for (int w = 0; w < 4; ++w) left[lane].word[w] = inside_pair<T>(left[lane].word[w]);
      });
#pragma unroll
      for (int column = 0; column < kPoolColumns; ++column) {
        warp.template multiply<T>(sums.sum[tile][column], left, right[column]);
      }
      if (tile == 0) warp.template multiply<T>(sums.area, left, ones);  // the area is one more column, of ones
    }
  }
}

/// The sums of one split, one tile of masks and one tile of channels, on tensor cores.
///
/// Grid: (splits, mask tiles * channel tiles, B); kPoolThreads threads; `stages` * PoolTile::kStageBytes of shared
/// memory. `partial` is (B, splits, Q, C), `counts` (B, splits, Q).
template <int kRowTiles, class T, class Block>
ODISE_DEVICE void mask_pool_sums(const Block& block, char* shared, const T* logits, const T* features, int queries,
                                 int channels, int pixels, int splits, int stages, float* partial, int32_t* counts) {
  using Tile = PoolTile<kRowTiles>;
  using Warp = typename Block::Warp;
  constexpr int kTiles = PoolSums<Warp, kRowTiles>::kTiles;
  static_assert(kRowTiles % kPoolHalves == 0 && kTiles <= kPoolGroups, "every row tile needs a warp that counts it");
  const int channel_tiles = (channels + kPoolChannels - 1) / kPoolChannels;
  const int first_mask = static_cast<int>(block.y() / channel_tiles) * Tile::kMasks;
  const int first_channel = static_cast<int>(block.y() % channel_tiles) * kPoolChannels;
  const PoolSource<T> source =
      pool_source(logits, features, block.z(), first_mask, first_channel, queries, channels, pixels);
  const PoolSteps steps = pool_steps(pixels, block.x(), splits);
  const int first = static_cast<int>(steps.first), last = static_cast<int>(steps.last);

  typename Block::template PerWarp<PoolSums<Warp, kRowTiles>> sums;
  typename Block::template PerThread<PoolCopies<kRowTiles, T>> copies;
  const typename Block::Shared start = block.shared(shared);
  block.each_thread([&](int thread) {
    if (!source.aligned) return;
    copies[thread] = pool_copies<kRowTiles>(source, thread);
    pool_clear<kRowTiles>(block, shared, stages, thread, copies[thread]);
  });
  const auto load = [&](int stage, int step) {
    block.each_thread([&](int thread) {
      if (step >= last) return;
      if (source.aligned) {  // then pixels are a multiple of 8: a chunk exists or not
        pool_copy<kRowTiles>(block, start + stage * Tile::kStageBytes, step, copies[thread]);
      } else {
        pool_gather<kRowTiles>(shared + stage * Tile::kStageBytes, source, step, thread);
      }
    });
    block.commit();  // an empty group keeps the count
  };
  for (int s = 0; s < stages - 1; ++s) load(s, first + s);
  int slot = 0;
  for (int step = first; step < last; ++step) {
    block.wait(stages - 2);  // the group of this step is done
    block.sync();            // for every thread; and every warp has left the slot that is filled next
    load(slot == 0 ? stages - 1 : slot - 1, step + stages - 1);
    block.each_warp([&](const Warp& warp) {
      pool_multiply<kRowTiles, T>(warp, start + slot * Tile::kStageBytes, sums[warp.index]);
    });
    slot = slot + 1 == stages ? 0 : slot + 1;
  }

  const int64_t first_row = (block.z() * splits + block.x()) * queries + first_mask;
  block.each_warp([&](const Warp& warp) {
    PoolSums<Warp, kRowTiles>& own = sums[warp.index];
    warp.each([&](int lane) {
      const int group = warp.index % kPoolGroups;
      const int above = lane / 4, within = lane % 4;  // sums: rows above and above + 8, columns 2 * within and the next
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int below = 0; below < 2; ++below) {
          const int mask = own.tile(warp.index, tile) * 16 + below * 8 + above;
          if (mask >= source.masks) continue;
          float* row = partial + (first_row + mask) * channels + first_channel;
#pragma unroll
          for (int column = 0; column < kPoolColumns; ++column) {
            const int channel = group * kPoolWarpChannels + column * 8 + within * 2;
            const float* pair = own.sum[tile][column][lane].value + 2 * below;
            if (channels % 2 == 0) {  // then both are there, or none, and they lie at a multiple of 8 bytes
              if (channel < source.channels) *reinterpret_cast<Floats2*>(row + channel) = {{pair[0], pair[1]}};
            } else {
              if (channel < source.channels) row[channel] = pair[0];
              if (channel + 1 < source.channels) row[channel + 1] = pair[1];
            }
          }
          if (tile == 0 && group < kTiles && within == 0 && first_channel == 0) {
            counts[first_row + mask] = static_cast<int32_t>(own.area[lane].value[2 * below]);
          }
        }
      }
    });
  });
}

/// What a block that goes without tensor cores has of a step in shared memory, as floats.
template <int kRowTiles>
struct SimtTile : PoolTile<kRowTiles> {
  static constexpr int kPitch = kPoolPixels + 4;  // floats: four pixels of eight rows lie in all 32 banks
  static constexpr int kBytes = PoolTile<kRowTiles>::kRows * kPitch * 4;
  static constexpr int kFetched = PoolTile<kRowTiles>::kRows / kPoolWarps;  // rows of a warp, every kPoolWarps-th
  static constexpr int kFetchedMasks = PoolTile<kRowTiles>::kMasks / kPoolWarps;
  static constexpr int kThreadChannels = kPoolChannels / 16;
};

/// A thread's sums, of every sixteenth mask and channel, and its pixel of the rows that its warp fetches.
template <int kRowTiles, class T>
struct SimtSums {
  using Tile = SimtTile<kRowTiles>;
  float sum[kRowTiles][Tile::kThreadChannels];
  T fetched[Tile::kFetched];
  int32_t area[Tile::kFetchedMasks];
};

/// Reads a thread's pixel of the next step: all rows before any is used, so that they are under way at once.
template <int kRowTiles, class T>
ODISE_DEVICE void simt_fetch(const PoolSource<T>& source, int64_t step, int thread, SimtSums<kRowTiles, T>& own) {
  using Tile = SimtTile<kRowTiles>;
  const int64_t pixel = step * kPoolPixels + thread % kWarp, rows_on = kPoolWarps * source.pixels;
  const bool inside = pixel < source.pixels;
  const int first = thread / kWarp;  // row: those that there are below it have a number k below
  const int masks = inside ? (source.masks - first + kPoolWarps - 1) / kPoolWarps : 0;
  const int channels = inside ? (source.channels - first + kPoolWarps - 1) / kPoolWarps : 0;
  const T* from = source.logits + first * source.pixels + pixel;
#pragma unroll
  for (int k = 0; k < Tile::kFetchedMasks; ++k, from += rows_on) own.fetched[k] = k < masks ? *from : T{0};
  from = source.features + first * source.pixels + pixel;
#pragma unroll
  for (int k = 0; k < Tile::kFetched - Tile::kFetchedMasks; ++k, from += rows_on) {
    own.fetched[Tile::kFetchedMasks + k] = k < channels ? *from : T{0};
  }
}

/// Puts them into shared memory: one for a logit inside its mask, zero for others. Counts them, too.
template <int kRowTiles, class T>
ODISE_DEVICE void simt_store(float* values, int thread, SimtSums<kRowTiles, T>& own) {
  using Tile = SimtTile<kRowTiles>;
  float* to = values + thread / kWarp * Tile::kPitch + thread % kWarp;
#pragma unroll
  for (int k = 0; k < Tile::kFetched; ++k) {
    float value = to_float(own.fetched[k]);
    if (k < Tile::kFetchedMasks) {
      const bool inside = positive(own.fetched[k]);
      value = inside ? 1.0f : 0.0f;
      own.area[k] += inside;
    }
    to[k * kPoolWarps * Tile::kPitch] = value;
  }
}

/// Four pixels of a row.
ODISE_DEVICE Floats4 simt_pixels(const float* row) {
  return *reinterpret_cast<const Floats4*>(__builtin_assume_aligned(row, 16));
}

template <int kRowTiles, class T>
ODISE_DEVICE void simt_multiply(const float* values, int thread, SimtSums<kRowTiles, T>& own) {
  using Tile = SimtTile<kRowTiles>;
  const float* masks = values + thread / 16 * Tile::kPitch;
  const float* channels = values + (Tile::kMasks + thread % 16) * Tile::kPitch;
#pragma unroll 1
  for (int pixel = 0; pixel < kPoolPixels; pixel += 4) {
    Floats4 feature[Tile::kThreadChannels];
#pragma unroll
    for (int j = 0; j < Tile::kThreadChannels; ++j) feature[j] = simt_pixels(channels + j * 16 * Tile::kPitch + pixel);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const Floats4 mask = simt_pixels(masks + i * 16 * Tile::kPitch + pixel);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
#pragma unroll
        for (int j = 0; j < Tile::kThreadChannels; ++j) own.sum[i][j] += mask.value[e] * feature[j].value[e];
      }
    }
  }
}

/// The same sums by ordinary float arithmetic: for float features, whose low bits tensor cores would drop, and for
/// bfloat16 where tensor cores do not know it. SimtTile::kBytes of shared memory.
template <int kRowTiles, class T, class Block>
ODISE_DEVICE void mask_pool_sums_simt(const Block& block, char* shared, const T* logits, const T* features,
                                      int queries, int channels, int pixels, int splits, float* partial,
                                      int32_t* counts) {
  using Tile = SimtTile<kRowTiles>;
  using Warp = typename Block::Warp;
  const int channel_tiles = (channels + kPoolChannels - 1) / kPoolChannels;
  const int first_mask = static_cast<int>(block.y() / channel_tiles) * Tile::kMasks;
  const int first_channel = static_cast<int>(block.y() % channel_tiles) * kPoolChannels;
  const PoolSource<T> source =
      pool_source(logits, features, block.z(), first_mask, first_channel, queries, channels, pixels);
  const PoolSteps steps = pool_steps(pixels, block.x(), splits);
  float* values = reinterpret_cast<float*>(shared);

  typename Block::template PerThread<SimtSums<kRowTiles, T>> sums;
  block.each_thread([&](int thread) { simt_fetch(source, steps.first, thread, sums[thread]); });
  for (int64_t step = steps.first; step < steps.last; ++step) {
    block.each_thread([&](int thread) { simt_store(values, thread, sums[thread]); });
    block.sync();
    block.each_thread([&](int thread) {
      simt_fetch(source, step + 1, thread, sums[thread]);  // under way during the sums; behind the last, not used
      simt_multiply(values, thread, sums[thread]);
    });
    block.sync();
  }

  const int64_t first_row = (block.z() * splits + block.x()) * queries + first_mask;
  block.each_thread([&](int thread) {
    const SimtSums<kRowTiles, T>& own = sums[thread];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      const int mask = thread / 16 + i * 16;
      if (mask >= source.masks) continue;
      float* row = partial + (first_row + mask) * channels + first_channel;
#pragma unroll
      for (int j = 0; j < Tile::kThreadChannels; ++j) {
        const int channel = thread % 16 + j * 16;
        if (channel < source.channels) row[channel] = own.sum[i][j];
      }
    }
  });
  if (first_channel != 0) return;
  block.each_warp([&](const Warp& warp) {
#pragma unroll
    for (int k = 0; k < Tile::kFetchedMasks; ++k) {
      typename Warp::template Lane<int> area;
      warp.each([&](int lane) { area[lane] = sums[warp.index * kWarp + lane].area[k]; });
      const int total = warp.sum(area);
      const int mask = warp.index + k * kPoolWarps;
      warp.each([&](int lane) {
        if (lane == 0 && mask < source.masks) counts[first_row + mask] = total;
      });
    }
  });
}

/// Adds the splits and divides by the area; the mean over no pixel is zero.
///
/// Grid: (ceil(C / kFinishChannels), Q, B); kPoolThreads threads; kFinishBytes of shared memory.
constexpr int kFinishBytes = (kPoolWarps * kFinishChannels + 1) * 4;

template <class T, class Block>
ODISE_DEVICE void mask_pool_finish(const Block& block, char* shared, const float* partial, const int32_t* counts,
                                   int queries, int channels, int splits, T* pooled, int32_t* areas) {
  using Warp = typename Block::Warp;
  float* totals = reinterpret_cast<float*>(shared);
  int32_t* area = reinterpret_cast<int32_t*>(totals + kPoolWarps * kFinishChannels);
  const int64_t first_split = block.z() * splits;
  const int64_t query = block.y();
  const int first_channel = static_cast<int>(block.x()) * kFinishChannels;
  block.each_warp([&](const Warp& warp) {
    // Warp w adds splits w, w + 8, ...; then the eight subtotals are added, always in this order.
    warp.each([&](int lane) {
      const int channel = first_channel + lane * 4;
      const int64_t step = static_cast<int64_t>(kPoolWarps) * queries * channels;
      const float* from = partial + ((first_split + warp.index) * queries + query) * channels + channel;
      float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      if (channels % 4 == 0) {  // the workspace is aligned to 16 bytes
        const int own = channel < channels ? (splits - warp.index + kPoolWarps - 1) / kPoolWarps : 0;
        for (int first = 0; first < own; first += kFinishSplits) {
          Floats4 four[kFinishSplits];
#pragma unroll
          for (int k = 0; k < kFinishSplits; ++k) {  // no branch between them: the last one again where there are fewer
            const int64_t at = first + k < own ? first + k : own - 1;
            four[k] = *reinterpret_cast<const Floats4*>(__builtin_assume_aligned(from + at * step, 16));
          }
#pragma unroll
          for (int k = 0; k < kFinishSplits; ++k) {
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e] += first + k < own ? four[k].value[e] : 0.0f;
          }
        }
      } else {
#pragma unroll 4
        for (int split = warp.index; split < splits; split += kPoolWarps, from += step) {
#pragma unroll
          for (int e = 0; e < 4; ++e) sum[e] += channel + e < channels ? from[e] : 0.0f;
        }
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) totals[warp.index * kFinishChannels + lane * 4 + e] = sum[e];
    });
    if (warp.index == kPoolWarps - 1) {  // which has the fewest splits
      typename Warp::template Lane<int> count;
      warp.each([&](int lane) {
        int own = 0;
        for (int64_t split = lane; split < splits; split += kWarp) own += counts[(first_split + split) * queries + query];
        count[lane] = own;
      });
      const int total = warp.sum(count);
      warp.each([&](int lane) {
        if (lane != 0) return;
        *area = total;
        if (first_channel == 0) areas[block.z() * queries + query] = total;
      });
    }
  });
  block.sync();
  block.each_thread([&](int thread) {
    const int channel = first_channel + thread;
    if (thread >= kFinishChannels || channel >= channels) return;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kPoolWarps; ++w) total += totals[w * kFinishChannels + thread];
    const float mean = *area > 0 ? total / static_cast<float>(*area) : 0.0f;
    pooled[(block.z() * queries + query) * channels + channel] = from_float<T>(mean);
  });
}

// ---- how it is launched ----------------------------------------------------------------------------------------------

/// Everything a launch needs besides pointers. odise_rt/kernels/launch_plans.py computes the same; a test compares.
struct MaskPoolPlan {
  int32_t valid;      // 0: sizes out of range
  int32_t row_tiles;  // 2, 7 (simt) or 8: of 16 masks
  int32_t simt;       // 1: ordinary float arithmetic
  int32_t splits;
  int32_t stages;
  int32_t shared_bytes;
  int32_t grid_y;
  int32_t finish_grid_x;
  int64_t workspace_bytes;  // partial sums, then counts
  int64_t counts_offset;    // bytes
};

inline MaskPoolPlan mask_pool_plan(int32_t dtype, int64_t batch, int64_t queries, int64_t channels, int64_t pixels,
                                   int32_t multiprocessors, int32_t shared_limit, int32_t compute_capability) {
  MaskPoolPlan plan{};
  const int64_t most = 0x7FFFFFFF;
  if (dtype < kFloat32 || dtype > kBFloat16 || batch < 1 || queries < 1 || channels < 1 || pixels < 1 ||
      batch > 65535 || queries > 65535 || channels > (1 << 20) || pixels > most || multiprocessors < 1) {
    return plan;
  }
  plan.simt = dtype == kFloat32 || (dtype == kBFloat16 && compute_capability < 80);
  plan.row_tiles = queries <= 32 ? 2 : plan.simt ? 7 : 8;
  const int64_t masks = 16 * plan.row_tiles;
  const int64_t tiles = ((queries + masks - 1) / masks) * ((channels + kPoolChannels - 1) / kPoolChannels);
  if (tiles > 65535) return plan;
  // One block for each multiprocessor; but no split so long that a float could not count its pixels.
  const int64_t steps = (pixels + kPoolPixels - 1) / kPoolPixels;
  const int64_t least = (pixels + (1 << 23) - 1) >> 23;
  int64_t splits = multiprocessors / (tiles * batch);
  splits = splits < least ? least : splits;
  splits = splits > steps ? steps : splits;
  splits = splits < 1 ? 1 : splits;
  plan.splits = static_cast<int32_t>(splits);
  const int64_t rows = masks + kPoolChannels;
  if (plan.simt) {
    plan.shared_bytes = static_cast<int32_t>(rows * (kPoolPixels + 4) * 4);
  } else {
    const int64_t stage = rows * kPoolRowBytes;
    int64_t stages = shared_limit / stage;
    stages = stages > kPoolMaxStages ? kPoolMaxStages : stages;
    plan.stages = static_cast<int32_t>(stages < 2 ? 2 : stages);
    plan.shared_bytes = static_cast<int32_t>(plan.stages * stage);
  }
  if (plan.shared_bytes > shared_limit) return plan;
  plan.grid_y = static_cast<int32_t>(tiles);
  plan.finish_grid_x = static_cast<int32_t>((channels + kFinishChannels - 1) / kFinishChannels);
  plan.counts_offset = batch * splits * queries * channels * 4;
  plan.workspace_bytes = plan.counts_offset + batch * splits * queries * 4;
  plan.valid = 1;
  return plan;
}

}  // namespace odise
