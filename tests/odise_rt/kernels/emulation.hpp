// SPDX-License-Identifier: Apache-2.0
// A warp and a thread block on the CPU, for the kernel bodies of odise_rt/kernels/*.cuh.
//
// This is emulation, not a GPU: it runs the same source for tiling, indices, shared-memory layout and the fragment
// layouts of ldmatrix and mma.m16n8k16 (from the PTX ISA), one warp after the other. It cannot see data races or what
// the compiler makes of it, which ptx_machine.cpp sees, nor timing, nor an instruction that does something else than the
// manual says. Shared memory starts as NaN, and asynchronous copies can be done as late as a correct program allows, so
// that a missing wait reads NaN.
#pragma once

#include <cstdlib>
#include <deque>
#include <stdexcept>
#include <vector>

#include "block.cuh"

namespace odise {

struct HostWarp {
  template <class T>
  struct Lane {
    T value[kWarp]{};
    T& operator[](int lane) { return value[lane]; }
    const T& operator[](int lane) const { return value[lane]; }
  };

  using Shared = char*;

  int index;

  template <class F>
  void each(F&& body) const {
    for (int lane = 0; lane < kWarp; ++lane) body(lane);
  }

  uint32_t ballot(const Lane<bool>& predicate) const {
    uint32_t bits = 0;
    for (int lane = 0; lane < kWarp; ++lane) bits |= static_cast<uint32_t>(predicate[lane]) << lane;
    return bits;
  }

  template <class T>
  T from(const Lane<T>& values, int source) const {
    return values[source];
  }

  int sum(const Lane<int>& values) const {
    int total = 0;
    for (int value : values.value) total += value;
    return total;
  }

  float max(const Lane<float>& values) const {
    float extreme = values[0];
    for (float value : values.value) extreme = std::fmax(extreme, value);
    return extreme;
  }

  template <class Address>
  void load_matrices(Lane<Words4>& to, Address&& address) const {
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const char* row = address(8 * matrix + lane / 4);
        if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix row is not aligned to 16 bytes");
        std::memcpy(&to[lane].word[matrix], row + 4 * (lane % 4), 4);
      }
    }
  }

  template <class T>
  static float half_of(uint32_t word, int which) {
    return to_float(T{static_cast<uint16_t>(word >> (16 * which))});
  }

  template <class T>
  void multiply(Lane<Floats4>& sums, const Lane<Words4>& left, const Lane<Words2>& right) const {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int group = lane / 4, within = lane % 4;
      for (int e = 0; e < 2; ++e) {
        for (int w = 0; w < 4; ++w) {
          a[group + 8 * (w % 2)][2 * within + e + 8 * (w / 2)] = half_of<T>(left[lane].word[w], e);
        }
        for (int w = 0; w < 2; ++w) b[2 * within + e + 8 * w][group] = half_of<T>(right[lane].word[w], e);
      }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = sums[lane].value[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        sums[lane].value[i] = sum;
      }
    }
  }
};

class HostBlock {
 public:
  using Warp = HostWarp;
  using Shared = char*;

  template <class T, int kCount>
  class Values {
   public:
    Values() : values_(kCount) {}
    T& operator[](int i) { return values_.at(i); }

   private:
    std::vector<T> values_;
  };
  template <class T>
  using PerWarp = Values<T, 8>;
  template <class T>
  using PerThread = Values<T, 256>;

  HostBlock(int64_t x, int64_t y, int64_t z, int threads, bool late) : x_(x), y_(y), z_(z), threads_(threads), late_(late) {}

  int64_t x() const { return x_; }
  int64_t y() const { return y_; }
  int64_t z() const { return z_; }
  int threads() const { return threads_; }

  template <class F>
  void each_thread(F&& body) const {
    for (int thread = 0; thread < threads_; ++thread) body(thread);
  }

  template <class F>
  void each_warp(F&& body) const {
    for (int warp = 0; warp < threads_ / kWarp; ++warp) body(HostWarp{warp});
  }

  void sync() const {}

  Shared shared(char* memory) const { return memory; }

  void clear16(char* shared) const { Copy{shared, nullptr, false}.run(); }

  void copy16(Shared shared, const void* global, bool present) const {
    const Copy copy{shared, global, present};
    if (late_) {
      open_.push_back(copy);
    } else {
      copy.run();
    }
  }

  void commit() const {
    groups_.push_back(std::move(open_));
    open_.clear();
  }

  void wait(int pending) const {
    while (static_cast<int>(groups_.size()) > pending) {
      for (const Copy& copy : groups_.front()) copy.run();
      groups_.pop_front();
    }
  }

  void add(int32_t* to, int32_t value) const { *to += value; }
  void lower(int32_t* to, int32_t value) const { *to = value < *to ? value : *to; }
  void raise(int32_t* to, int32_t value) const { *to = value > *to ? value : *to; }

 private:
  struct Copy {
    char* to;
    const void* from;
    bool present;
    void run() const {
      if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) {
        throw std::runtime_error("16-byte copy is not aligned");
      }
      if (present) {
        std::memcpy(to, from, 16);
      } else {
        std::memset(to, 0, 16);
      }
    }
  };

  int64_t x_, y_, z_;
  int threads_;
  bool late_;
  mutable std::vector<Copy> open_;
  mutable std::deque<std::vector<Copy>> groups_;
};

/// Shared memory of exactly the bytes that the launcher asks for, filled with NaN, with a guard behind it.
class SharedMemory {
 public:
  explicit SharedMemory(int64_t bytes) : bytes_(bytes) {
    memory_ = static_cast<unsigned char*>(std::aligned_alloc(128, (bytes + kGuard + 127) / 128 * 128));
  }
  SharedMemory(const SharedMemory&) = delete;
  ~SharedMemory() { std::free(memory_); }

  char* fresh() {
    std::memset(memory_, 0xFF, bytes_);
    std::memset(memory_ + bytes_, 0xA5, kGuard);
    return reinterpret_cast<char*>(memory_);
  }

  void check() const {
    for (int64_t i = 0; i < kGuard; ++i) {
      if (memory_[bytes_ + i] != 0xA5) throw std::runtime_error("a body wrote behind its shared memory");
    }
  }

 private:
  static constexpr int64_t kGuard = 64;
  int64_t bytes_;
  unsigned char* memory_;
};

struct Grid {
  int64_t x, y, z;
};

/// Runs a body for every block of a grid, or only for those with an x in [first_x, last_x).
template <class Body>
void run_grid(Grid grid, int threads, int64_t shared_bytes, bool late, Body&& body, int64_t first_x = 0,
              int64_t last_x = -1) {
  SharedMemory shared(shared_bytes);
  for (int64_t z = 0; z < grid.z; ++z) {
    for (int64_t y = 0; y < grid.y; ++y) {
      for (int64_t x = first_x; x < (last_x < 0 ? grid.x : last_x); ++x) {
        const HostBlock block(x, y, z, threads, late);
        body(block, shared.fresh());
        shared.check();
      }
    }
  }
}

}  // namespace odise
