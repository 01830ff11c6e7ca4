// SPDX-License-Identifier: Apache-2.0
// Multi-scale deformable attention, forward (Deformable DETR, arXiv 2010.04159, eq. 3).
//
//   out[b, m, h] = sum over levels l and points p of
//                  softmax(weight_logits[b, m, h])[l, p] * value of level l at (reference[m] * size_l + offset), bilinear
//
// with zeros outside the level, as training/models/deformable_attention.py has it. The softmax and the location
// arithmetic are part of the kernel: offsets and weight logits are read as the two linear layers leave them, and the
// samples (B, heads, C, M, levels, points), which grid_sample would write, exist only as registers.
//
// A thread has kVector channels of one head of one query; threads side by side have the channels of the same head, so
// that each corner of a sample is one contiguous read. Sums are float.
#pragma once

#include "block.cuh"

namespace odise {

constexpr int kAttentionThreads = 256;
constexpr int kAttentionMaxLevels = 8;

struct AttentionLevels {
  int64_t count;
  int64_t shape[kAttentionMaxLevels];  // height in the upper half, width in the lower
};

/// Only constant indices, so that the array stays in the kernel's parameters instead of being copied to local memory.
ODISE_DEVICE int64_t attention_shape(const AttentionLevels& levels, int level) {
  int64_t shape = levels.shape[0];
#pragma unroll
  for (int i = 1; i < kAttentionMaxLevels; ++i) shape = i == level ? levels.shape[i] : shape;
  return shape;
}

struct AttentionSizes {
  int32_t batch;
  int32_t queries;   // M
  int32_t memory;    // N, the sum of height * width
  int32_t heads;
  int32_t channels;  // of a head
  int32_t points;
  int32_t reference_batch;  // 1 or B
};

/// Several channels that are read or written at once.
template <class T, int kVector>
struct alignas(sizeof(T) * kVector) Channels {
  T element[kVector];
};

/// The same in registers, of which 16 bits alone would cost instructions to clear.
template <int kBytes>
struct alignas(kBytes) ChannelWords {
  uint32_t word[kBytes / 4];
};

template <>
struct alignas(2) ChannelWords<2> {
  uint16_t word[1];
};

/// The channels of a corner of a sample; zeros outside. Without a branch around what is done with them, so that the loads
/// of all four corners are under way at once.
template <class T, int kVector>
ODISE_DEVICE Channels<T, kVector> attention_corner(const T* at, bool inside) {
  ChannelWords<sizeof(T) * kVector> words{};
  if (inside) words = *reinterpret_cast<const ChannelWords<sizeof(T) * kVector>*>(at);
  Channels<T, kVector> channels;
  memcpy(&channels, &words, sizeof channels);
  return channels;
}

template <class T, int kVector>
ODISE_DEVICE void attention_add(const Channels<T, kVector>& channels, float weight, float (&sum)[kVector]) {
#pragma unroll
  for (int c = 0; c < kVector; ++c) sum[c] += weight * to_float(channels.element[c]);
}

/// Grid: enough threads for B * M * heads * channels / kVector.
///
/// value (B, N, heads, channels), references (1 or B, M, 2) float x then y in [0, 1], offsets (B, M, heads, levels,
/// points, 2) in pixels of the level, weight_logits (B, M, heads, levels * points), out (B, M, heads, channels).
template <class T, int kVector, class Block>
ODISE_DEVICE void deformable_attention(const Block& block, const T* value, const float* references, const T* offsets,
                                       const T* weight_logits, const AttentionSizes& sizes,
                                       const AttentionLevels& levels, T* out) {
  block.each_thread([&](int thread) {
    const int groups = sizes.channels / kVector;
    const int64_t index = block.x() * block.threads() + thread;
    if (index >= static_cast<int64_t>(sizes.batch) * sizes.queries * sizes.heads * groups) return;
    const int group = static_cast<int>(index % groups);
    const int64_t pair = index / groups;  // (b, m, head)
    const int head = static_cast<int>(pair % sizes.heads);
    const int64_t token = pair / sizes.heads;  // (b, m)
    const int64_t batch = token / sizes.queries, query = token % sizes.queries;

    const int level_count = static_cast<int>(levels.count);
    const int samples = level_count * sizes.points;
    const T* logit = weight_logits + pair * samples;
    float largest = to_float(logit[0]);
    for (int s = 1; s < samples; ++s) largest = larger(largest, to_float(logit[s]));

    const float* reference = references + ((sizes.reference_batch == 1 ? 0 : batch) * sizes.queries + query) * 2;
    const float reference_x = reference[0], reference_y = reference[1];
    const int64_t pitch = static_cast<int64_t>(sizes.heads) * sizes.channels;
    const T* level = value + batch * sizes.memory * pitch + head * sizes.channels + group * kVector;
    const T* offset = offsets + pair * samples * 2;
    float sum[kVector] = {};
    float weights = 0.0f;
    for (int l = 0; l < level_count; ++l) {
      const int64_t shape = attention_shape(levels, l);
      const int height = static_cast<int>(shape >> 32), width = static_cast<int>(shape & 0x7FFFFFFF);
      const int64_t down = width * pitch;  // to the next row
      for (int p = 0; p < sizes.points; ++p, ++logit, offset += 2) {
        const float weight = exp2_of((to_float(*logit) - largest) * 1.4426950408889634f);
        weights += weight;
        const float x = reference_x * static_cast<float>(width) + to_float(offset[0]) - 0.5f;
        const float y = reference_y * static_cast<float>(height) + to_float(offset[1]) - 0.5f;
        // Outside by a pixel or more, or not a number: nothing to add. Also keeps the conversions below in range.
        if (!(x > -1.0f && y > -1.0f && x < static_cast<float>(width) && y < static_cast<float>(height))) continue;
        const float floor_x = floorf(x), floor_y = floorf(y);
        const int column = static_cast<int>(floor_x), row = static_cast<int>(floor_y);
        const float right = x - floor_x, below = y - floor_y;
        const bool left_in = column >= 0, right_in = column + 1 < width;
        const bool above_in = row >= 0, below_in = row + 1 < height;
        const T* at = level + (static_cast<int64_t>(row) * width + column) * pitch;  // not read where it is outside
        const auto above_left = attention_corner<T, kVector>(at, above_in && left_in);
        const auto above_right = attention_corner<T, kVector>(at + pitch, above_in && right_in);
        const auto below_left = attention_corner<T, kVector>(at + down, below_in && left_in);
        const auto below_right = attention_corner<T, kVector>(at + down + pitch, below_in && right_in);
        const float upper = weight * (1 - below), lower = weight * below;
        attention_add(above_left, upper * (1 - right), sum);
        attention_add(above_right, upper * right, sum);
        attention_add(below_left, lower * (1 - right), sum);
        attention_add(below_right, lower * right, sum);
      }
      level += static_cast<int64_t>(height) * width * pitch;
    }
    const float scale = 1.0f / weights;
    Channels<T, kVector> result;
#pragma unroll
    for (int c = 0; c < kVector; ++c) result.element[c] = from_float<T>(sum[c] * scale);
    *reinterpret_cast<Channels<T, kVector>*>(out + pair * sizes.channels + group * kVector) = result;
  });
}

/// Channels that a thread takes at once: 16 bytes if everything is aligned to them, else one.
inline int attention_vector(int32_t dtype, int32_t channels, const void* value, const void* out) {
  const int widest = dtype == kFloat32 ? 4 : 8;
  const uintptr_t bases = reinterpret_cast<uintptr_t>(value) | reinterpret_cast<uintptr_t>(out);
  return channels % widest == 0 && bases % 16 == 0 ? widest : 1;
}

}  // namespace odise
