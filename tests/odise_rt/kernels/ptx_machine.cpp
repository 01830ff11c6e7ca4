// SPDX-License-Identifier: Apache-2.0
// Runs PTX, the assembly that nvcc makes of the kernels, on a CPU: 32 lanes to a warp, warps of a block in turns.
//
// Instructions do what the PTX ISA (9.0) says. ptx.py reads the text and gives the instructions as numbers; one that is
// not written here is an error there. Lanes of a warp that went different ways run one group at a time, the one that is
// furthest behind first, until they meet. What a GPU would leave to chance is an error here:
//
// - two threads touch the same bytes, one of them writes, and neither a barrier nor atomics order them (within a warp,
//   too: its lanes do not run in step since sm_70). That is so between blocks as well, which nothing orders;
// - a byte of shared memory is read that nobody wrote, or that a copy still writes to: cp.async arrives as late as the
//   waits allow;
// - an access is not aligned, or outside of the arrays and of the shared memory of the launch;
// - ld.global.nc reads what the launch writes;
// - lanes wait for each other at different places, or a barrier waits for warps that have ended.
//
// It counts what costs time: instructions of warps by name, sectors of global memory, conflicts of banks.
#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <set>
#include <vector>

namespace {

constexpr int kLanes = 32, kOperands = 16, kSector = 32, kBanks = 32;
constexpr uint64_t kSharedBase = 1024;  // what a system keeps for itself, on Hopper

enum Op {
  kNop, kMov, kPack, kUnpack, kSpecial, kAdd, kSub, kMul, kMulWide, kMad, kFma, kDiv, kRem, kMin, kMax, kAnd, kOr, kXor, kNot,
  kNeg, kAbs, kShl, kShr, kSet, kSetp, kSelp, kCvt, kLdParam, kLdGlobal, kLdGlobalNc, kLdShared, kStGlobal, kStShared,
  kAtomGlobal, kAtomShared, kBra, kRet, kTrap, kBar, kShfl, kVote, kRedux, kLdmatrix, kMma, kCpAsync, kCpCommit, kCpWait,
  kPopc, kBrev, kClz, kBfind, kBfi, kEx2, kRcp, kSqrt, kOps
};

const char* const kOpNames[kOps] = {
  "nop", "mov", "pack", "unpack", "special", "add", "sub", "mul.lo", "mul.wide", "mad.lo", "fma", "div", "rem", "min", "max",
  "and", "or", "xor", "not", "neg", "abs", "shl", "shr", "set", "setp", "selp", "cvt", "ld.param", "ld.global",
  "ld.global.nc", "ld.shared", "st.global", "st.shared", "atom.global", "atom.shared", "bra", "ret", "trap", "bar.sync",
  "shfl.sync", "vote.sync.ballot", "redux.sync", "ldmatrix", "mma", "cp.async", "cp.async.commit_group",
  "cp.async.wait_group", "popc", "brev", "clz", "bfind.shiftamt", "bfi", "ex2.approx", "rcp", "sqrt",
};

enum Type { kPred, kU8, kS8, kU16, kS16, kU32, kS32, kU64, kS64, kF16, kBF16, kF16x2, kBF16x2, kF32, kF64, kTypes };

const char* const kTypeNames[kTypes] = {"pred", "u8", "s8", "u16", "s16", "u32", "s32", "u64",
                                        "s64", "f16", "bf16", "f16x2", "bf16x2", "f32", "f64"};

enum Mode {
  kNone, kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan,  // comparisons
  kRn, kRni, kRzi, kRmi, kRpi, kRm, kSat, kFtz,                                         // rounding
  kModeAdd, kModeMin, kModeMax,                                                         // atomics
  kBfly, kIdx, kUp, kDown,                                                              // shuffles
  kK16, kK8,                                                                            // depth of mma
  kModes
};

const char* const kModeNames[kModes] = {"",    "eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",  "neu", "ltu", "leu",
                                        "gtu", "geu", "num", "nan", "rn",  "rni", "rzi", "rmi",  "rpi", "rm",  "sat",
                                        "ftz", "add", "min", "max", "bfly", "idx", "up", "down", "k16", "k8"};

/// As ptx.py packs it.
struct Instruction {
  int32_t op, type, from, mode;
  int32_t guard, guard_negated;  // register or -1
  int32_t target;                // of a branch
  int32_t count;                 // of operands
  int32_t registers, negated;    // bit i: operand i is a register, is a predicate that is negated
  int32_t line, vector;          // of the text; elements of a load or store
  int64_t operand[kOperands];
};

struct Array {
  uint64_t start, size;
};

struct Options {
  int64_t grid[3];
  int64_t first_block, last_block;  // to run, of the grid in the order x, y, z
  int32_t threads, shared_bytes, reversed, watch, approximate;
};

int width_of(int type) {
  switch (type) {
    case kPred: case kU8: case kS8: return 1;
    case kU16: case kS16: case kF16: case kBF16: return 2;
    case kU64: case kS64: case kF64: return 8;
    default: return 4;
  }
}

template <class T>
T from_raw(uint64_t raw) {
  T value;
  std::memcpy(&value, &raw, sizeof value);
  return value;
}

/// Integers keep their sign to the top, so that a wider register may take them.
template <class T>
uint64_t to_raw(T value) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<uint64_t>(static_cast<int64_t>(value));
  } else {
    uint64_t raw = 0;
    std::memcpy(&raw, &value, sizeof value);
    return raw;
  }
}

template <>
uint64_t to_raw(uint64_t value) { return value; }
template <>
uint64_t to_raw(uint32_t value) { return value; }

float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, fraction = bits & 1023;
  float value;
  if (exponent == 31) {
    value = fraction ? std::numeric_limits<float>::quiet_NaN() : std::numeric_limits<float>::infinity();
  } else {
    value = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(float(fraction), -24);
  }
  return bits & 0x8000 ? -value : value;
}

uint16_t float_to_half(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return 0x7FFF;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7C00;
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // [0.5, 1); a carry to 2048 is the next exponent's 1024
  const int rounded = static_cast<int>(std::nearbyint(fraction * 2048.0f));
  return sign | static_cast<uint16_t>(((exponent + 13) << 10) + rounded);
}

float bfloat_to_float(uint16_t bits) { return from_raw<float>(uint64_t(bits) << 16); }

float flushed(float value) { return std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value; }

/// Who touched a byte last in this launch. Thread numbers count over the grid, from 1.
struct Cell {
  uint32_t writer = 0, writer_epoch = 0, reader = 0, reader_epoch = 0, reader_block = 0;
  bool atomic = false, written = false, pending = false, constant = false;
};

constexpr uint32_t kSeveral = 0xFFFFFFFF;

struct Watched {
  uint64_t start = 0, size = 0;
  std::unique_ptr<Cell[], void (*)(void*)> cells{nullptr, std::free};
};

struct Copy {
  uint64_t to, from;
  int size;
};

struct Warp {
  std::vector<uint64_t> registers;
  int pc[kLanes];
  uint32_t live, waiting;  // lanes that have not ended; that wait for others of the warp
  bool at_barrier;
  std::vector<Copy> open[kLanes];
  std::deque<std::vector<Copy>> groups[kLanes];
};

class Machine {
 public:
  Machine(const Instruction* program, int length, int registers, const char* parameters, const Array* arrays, int count,
          const Options& options, int64_t* counts, int64_t* executed, char* report, int report_size)
      : program_(program), length_(length), registers_(registers), parameters_(parameters), options_(options),
        counts_(counts), executed_(executed), report_(report), report_size_(report_size) {
    for (int i = 0; i < count; ++i) {
      Watched& array = arrays_.emplace_back();
      array.start = arrays[i].start;
      array.size = arrays[i].size;
    }
    std::sort(arrays_.begin(), arrays_.end(), [](const Watched& a, const Watched& b) { return a.start < b.start; });
    shared_.resize(options.shared_bytes);
    report_[0] = 0;
  }

  int run() {
    const int64_t all = options_.grid[0] * options_.grid[1] * options_.grid[2];
    const int64_t last = options_.last_block < 0 ? all : options_.last_block;
    for (int64_t i = options_.first_block; i < last && problems_ == 0; ++i) {
      run_block(options_.reversed ? last - 1 - (i - options_.first_block) : i);
    }
    return problems_;
  }

 private:
  // ---- blocks and warps ----------------------------------------------------------------------------------------------

  void run_block(int64_t number) {
    block_ = static_cast<uint32_t>(number);
    position_[0] = number % options_.grid[0];
    position_[1] = number / options_.grid[0] % options_.grid[1];
    position_[2] = number / options_.grid[0] / options_.grid[1];
    epoch_ = 1;
    std::fill(shared_.begin(), shared_.end(), 0xFF);
    shared_cells_.assign(options_.shared_bytes, Cell{});
    const int warps = (options_.threads + kLanes - 1) / kLanes;
    std::vector<Warp> block(warps);
    for (int w = 0; w < warps; ++w) {
      const int lanes = std::min(kLanes, options_.threads - w * kLanes);
      block[w].registers.assign(static_cast<size_t>(registers_) * kLanes, 0xABABABABABABABABull);
      block[w].live = lanes == kLanes ? ~0u : (1u << lanes) - 1;
      block[w].waiting = 0;
      block[w].at_barrier = false;
      std::fill(block[w].pc, block[w].pc + kLanes, 0);
    }
    for (bool going = true; going && problems_ == 0;) {
      int ended = 0, waiting = 0;
      for (int i = 0; i < warps && problems_ == 0; ++i) {
        const int w = options_.reversed ? warps - 1 - i : i;
        if (block[w].live) run_warp(block[w], w);
        (block[w].live ? waiting : ended) += 1;
      }
      going = waiting > 0;
      if (going && ended) problem(0, 0, "a barrier waits for a warp that has ended");
      ++epoch_;
      for (Warp& warp : block) warp.at_barrier = false;
    }
  }

  /// Up to the next barrier or the end.
  void run_warp(Warp& warp, int index) {
    warp_ = &warp;
    warp_index_ = index;
    while (warp.live && !warp.at_barrier && problems_ == 0) {
      int pc = length_;
      uint32_t active = 0;
      for (int l = 0; l < kLanes; ++l) {
        if (!((warp.live & ~warp.waiting) >> l & 1)) continue;
        if (warp.pc[l] < pc) {
          pc = warp.pc[l];
          active = 0;
        }
        if (warp.pc[l] == pc) active |= 1u << l;
      }
      if (!active) {
        problem(0, 0, "lanes of a warp wait for each other at different places");
        return;
      }
      run_group(warp, pc, active);
    }
  }

  /// Lanes at one place, until they part, meet others, or wait.
  void run_group(Warp& warp, int pc, uint32_t active) {
    const bool all = active == warp.live;
    int next_stop = length_;  // where others are
    if (!all) {
      for (int l = 0; l < kLanes; ++l) {
        if ((warp.live & ~active & ~warp.waiting) >> l & 1) next_stop = std::min(next_stop, warp.pc[l]);
      }
    }
    auto stay = [&] {
      for (int l = 0; l < kLanes; ++l) {
        if (active >> l & 1) warp.pc[l] = pc;
      }
    };
    while (pc < length_ && problems_ == 0) {
      if (!all && pc >= next_stop) return stay();
      const Instruction& i = program_[pc];
      at_ = &i;
      uint32_t doing = active;
      if (i.guard >= 0) {
        uint32_t set = 0;
        const uint64_t* guard = lane_values(i.guard);
        for (int l = 0; l < kLanes; ++l) set |= static_cast<uint32_t>(guard[l] & 1) << l;
        doing = active & (i.guard_negated ? ~set : set);
      }
      counts_[i.op] += 1;
      executed_[pc] += 1;
      lanes_counted() += __builtin_popcount(doing);
      if (i.op == kBra) {
        if (doing == active) {
          pc = i.target;
        } else if (doing == 0) {
          ++pc;
        } else {
          for (int l = 0; l < kLanes; ++l) {
            if (active >> l & 1) warp.pc[l] = doing >> l & 1 ? i.target : pc + 1;
          }
          return;
        }
        continue;
      }
      if (i.op == kRet) {
        warp.live &= ~doing;
        active &= ~doing;
        ++pc;
        if (!active) return;
        return stay();
      }
      if (meets(i.op)) {
        if (i.op == kShfl || i.op == kVote || i.op == kRedux) {
          const auto named = value<uint32_t>(i, i.count - 1, __builtin_ctz(active));
          if (warp.live & ~named) return problem(0, 0, "lanes are not named that take part");
        }
        if (doing != active) return problem(0, 0, "lanes that must act together are told apart by a guard");
        uint32_t here = active;
        for (int l = 0; l < kLanes; ++l) {
          if (warp.waiting >> l & 1 && warp.pc[l] == pc) here |= 1u << l;
        }
        if (here != warp.live) {
          warp.waiting |= active;
          return stay();
        }
        warp.waiting &= ~here;
        active = here;
        together(i, active);
        ++pc;
        if (i.op == kBar) warp.at_barrier = true;
        return stay();
      }
      if (doing) execute(i, doing);
      ++pc;
    }
    if (problems_ == 0) problem(0, 0, "the program has no end");
  }

  static bool meets(int op) {
    return op == kBar || op == kShfl || op == kVote || op == kRedux || op == kLdmatrix || op == kMma;
  }

  uint64_t* lane_values(int64_t reg) { return warp_->registers.data() + reg * kLanes; }

  int64_t& lanes_counted() { return counts_[kOps]; }
  int64_t& requests() { return counts_[kOps + 1]; }
  int64_t& sectors() { return counts_[kOps + 2]; }
  int64_t& wavefronts() { return counts_[kOps + 3]; }
  int64_t& conflicts() { return counts_[kOps + 4]; }

  uint64_t raw(const Instruction& i, int operand, int lane) {
    if (!(i.registers >> operand & 1)) return static_cast<uint64_t>(i.operand[operand]);
    const uint64_t value = lane_values(i.operand[operand])[lane];
    return i.negated >> operand & 1 ? !(value & 1) : value;
  }

  template <class T>
  T value(const Instruction& i, int operand, int lane) { return from_raw<T>(raw(i, operand, lane)); }

  void set(const Instruction& i, int operand, int lane, uint64_t bits) {
    if (i.operand[operand] >= 0) lane_values(i.operand[operand])[lane] = bits;  // "_" takes nothing
  }

  void problem(int lane, uint64_t address, const char* format, ...) {
    char text[256];
    va_list rest;
    va_start(rest, format);
    std::vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    if (problems_++ > 0) return;
    std::snprintf(report_, report_size_, "line %d: %s (address %#llx, thread %d of block %lld, %lld, %lld)",
                  at_ ? at_->line : 0, text, static_cast<unsigned long long>(address), warp_index_ * kLanes + lane,
                  static_cast<long long>(position_[0]), static_cast<long long>(position_[1]),
                  static_cast<long long>(position_[2]));
  }

  // ---- arithmetic ----------------------------------------------------------------------------------------------------

  template <class F>
  void lanes(uint32_t doing, F&& body) {
    for (int l = 0; l < kLanes; ++l) {
      if (doing >> l & 1) body(l);
    }
  }

  template <class F>
  void by_type(int type, F&& body) {
    switch (type) {
      case kPred: case kU8: return body(uint8_t{});
      case kS8: return body(int8_t{});
      case kU16: return body(uint16_t{});
      case kS16: return body(int16_t{});
      case kU32: return body(uint32_t{});
      case kS32: return body(int32_t{});
      case kU64: return body(uint64_t{});
      case kS64: return body(int64_t{});
      case kF32: return body(float{});
      case kF64: return body(double{});
      default: return problem(0, 0, "%s of %s is not written here", kOpNames[at_->op], kTypeNames[type]);
    }
  }

  template <class F>
  void by_integer(int type, F&& body) {
    by_type(type, [&](auto zero) {
      using T = decltype(zero);
      if constexpr (std::is_integral_v<T>) {
        body(zero);
      } else {
        problem(0, 0, "%s of %s does not exist", kOpNames[at_->op], kTypeNames[type]);
      }
    });
  }

  template <class F>
  void arithmetic(const Instruction& i, uint32_t doing, int sources, F&& body) {
    by_type(i.type, [&](auto zero) {
      using T = decltype(zero);
      lanes(doing, [&](int l) {
        const T a = value<T>(i, 1, l), b = sources > 1 ? value<T>(i, 2, l) : T{}, c = sources > 2 ? value<T>(i, 3, l) : T{};
        set(i, 0, l, to_raw<T>(static_cast<T>(body(a, b, c))));
      });
    });
  }

  template <class F>
  void bits(const Instruction& i, uint32_t doing, F&& body) {
    by_integer(i.type, [&](auto zero) {
      using T = decltype(zero);
      lanes(doing, [&](int l) {
        const T b = i.count > 2 ? value<T>(i, 2, l) : T{};
        set(i, 0, l, to_raw<T>(static_cast<T>(body(value<T>(i, 1, l), b))));
      });
    });
  }

  template <class T>
  static T least(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a == b) return std::signbit(a) ? a : b;
      return std::fmin(a, b);
    }
    return a < b ? a : b;
  }

  template <class T>
  static T greatest(T a, T b) {
    if constexpr (std::is_floating_point_v<T>) {
      if (a == b) return std::signbit(a) ? b : a;
      return std::fmax(a, b);
    }
    return a < b ? b : a;
  }

  template <class T>
  static bool compare(int how, T a, T b) {
    bool unordered = false;
    if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(a) || std::isnan(b);
    switch (how) {
      case kEq: return a == b;
      case kNe: return !unordered && a != b;
      case kLt: return a < b;
      case kLe: return a <= b;
      case kGt: return a > b;
      case kGe: return a >= b;
      case kEqu: return unordered || a == b;
      case kNeu: return unordered || a != b;
      case kLtu: return unordered || a < b;
      case kLeu: return unordered || a <= b;
      case kGtu: return unordered || a > b;
      case kGeu: return unordered || a >= b;
      case kNum: return !unordered;
      default: return unordered;
    }
  }

  /// What "approx" instructions may be off by (ex2: 2^-22 relative), up or down by the bits of the argument.
  float approximate(float exact, float argument) const {
    if (!options_.approximate || !std::isfinite(exact) || exact == 0) return exact;
    const uint32_t mixed = static_cast<uint32_t>(to_raw(argument)) * 2654435761u >> 30;
    float off = exact;
    for (uint32_t step = 0; step < (mixed >> 1) + 1; ++step) off = std::nextafter(off, mixed & 1 ? INFINITY : 0.0f);
    return off;
  }

  template <class To, class From>
  static To converted(From value, int mode) {
    if constexpr (std::is_floating_point_v<From> && std::is_integral_v<To>) {
      double whole = value;
      whole = mode == kRzi ? std::trunc(whole) : mode == kRmi ? std::floor(whole) : mode == kRpi ? std::ceil(whole) : std::nearbyint(whole);
      if (std::isnan(whole)) return sizeof(To) == 8 ? std::numeric_limits<To>::min() : To{0};
      if (whole >= std::ldexp(1.0, std::numeric_limits<To>::digits)) return std::numeric_limits<To>::max();
      if (whole <= static_cast<double>(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
      return static_cast<To>(whole);
    } else if constexpr (std::is_floating_point_v<From>) {
      From result = value;
      if (mode == kRzi) result = std::trunc(value);
      if (mode == kRmi) result = std::floor(value);
      if (mode == kRpi) result = std::ceil(value);
      if (mode == kRni) result = std::nearbyint(value);
      if (mode == kSat) result = std::isnan(value) ? From{0} : std::min(std::max(value, From{0}), From{1});
      return static_cast<To>(result);
    } else {
      return static_cast<To>(value);
    }
  }

  void convert(const Instruction& i, uint32_t doing) {
    if (i.type == kF16 && i.from == kF32) {
      lanes(doing, [&](int l) { set(i, 0, l, float_to_half(value<float>(i, 1, l))); });
    } else if (i.type == kF32 && (i.from == kF16 || i.from == kBF16)) {
      lanes(doing, [&](int l) {
        const auto half = value<uint16_t>(i, 1, l);
        set(i, 0, l, to_raw(i.from == kF16 ? half_to_float(half) : bfloat_to_float(half)));
      });
    } else {
      by_type(i.from, [&](auto from) {
        by_type(i.type, [&](auto to) {
          using From = decltype(from);
          using To = decltype(to);
          lanes(doing, [&](int l) { set(i, 0, l, to_raw<To>(converted<To, From>(value<From>(i, 1, l), i.mode))); });
        });
      });
    }
  }

  void execute(const Instruction& i, uint32_t doing) {
    switch (i.op) {
      case kNop: return;
      case kMov: return lanes(doing, [&](int l) { set(i, 0, l, raw(i, 1, l)); });
      case kPack:  // two halves to a whole
        return lanes(doing, [&](int l) { set(i, 0, l, half(i, raw(i, 1, l)) | half(i, raw(i, 2, l)) << half_width(i)); });
      case kUnpack:
        return lanes(doing, [&](int l) {
          const uint64_t whole = raw(i, 2, l);
          set(i, 0, l, half(i, whole));
          set(i, 1, l, half(i, whole >> half_width(i)));
        });
      case kSpecial: {
        const int64_t which = i.operand[1];
        return lanes(doing, [&](int l) {
          const int64_t values[] = {warp_index_ * kLanes + l, 0, 0, options_.threads, 1, 1, position_[0], position_[1],
                                    position_[2], options_.grid[0], options_.grid[1], options_.grid[2]};
          set(i, 0, l, static_cast<uint64_t>(values[which]));
        });
      }
      case kAdd: return arithmetic(i, doing, 2, [](auto a, auto b, auto) { return a + b; });
      case kSub: return arithmetic(i, doing, 2, [](auto a, auto b, auto) { return a - b; });
      case kMul: return arithmetic(i, doing, 2, [](auto a, auto b, auto) { return times(a, b); });
      case kMad: return arithmetic(i, doing, 3, [](auto a, auto b, auto c) { return times(a, b) + c; });
      case kMulWide:
        return by_integer(i.type, [&](auto zero) {
          using T = decltype(zero);
          lanes(doing, [&](int l) {
            const auto product = static_cast<__int128>(value<T>(i, 1, l)) * value<T>(i, 2, l);
            const auto wide = static_cast<uint64_t>(product);
            set(i, 0, l, sizeof(T) == 2 ? static_cast<uint32_t>(wide) : wide);
          });
        });
      case kFma:
        if (i.mode == kRm) std::fesetround(FE_DOWNWARD);
        arithmetic(i, doing, 3, [](auto a, auto b, auto c) {
          if constexpr (std::is_floating_point_v<decltype(a)>) return std::fma(a, b, c);
          return a;
        });
        std::fesetround(FE_TONEAREST);
        return;
      case kDiv:
      case kRem:
        return by_type(i.type, [&](auto zero) {
          using T = decltype(zero);
          lanes(doing, [&](int l) {
            const T a = value<T>(i, 1, l), b = value<T>(i, 2, l);
            if constexpr (std::is_integral_v<T>) {
              if (b == 0) return problem(l, 0, "a division by zero");
              set(i, 0, l, to_raw<T>(static_cast<T>(i.op == kDiv ? a / b : a % b)));
            } else {
              set(i, 0, l, to_raw<T>(a / b));
            }
          });
        });
      case kMin: return arithmetic(i, doing, 2, [](auto a, auto b, auto) { return least(a, b); });
      case kMax: return arithmetic(i, doing, 2, [](auto a, auto b, auto) { return greatest(a, b); });
      case kNeg: return arithmetic(i, doing, 1, [](auto a, auto, auto) { return -a; });
      case kAbs: return arithmetic(i, doing, 1, [](auto a, auto, auto) { return a < 0 ? -a : a; });
      case kAnd: return bits(i, doing, [](auto a, auto b) { return a & b; });
      case kOr: return bits(i, doing, [](auto a, auto b) { return a | b; });
      case kXor: return bits(i, doing, [](auto a, auto b) { return a ^ b; });
      case kNot:
        if (i.type == kPred) return lanes(doing, [&](int l) { set(i, 0, l, !(raw(i, 1, l) & 1)); });
        return bits(i, doing, [](auto a, auto) { return ~a; });
      case kShl:
      case kShr:
        return by_integer(i.type, [&](auto zero) {
          using T = decltype(zero);
          lanes(doing, [&](int l) {
            const auto a = value<T>(i, 1, l);
            const uint32_t by = value<uint32_t>(i, 2, l), width = 8 * sizeof(T);
            T result;
            if (by >= width) {
              result = i.op == kShr && a < 0 ? T(-1) : T(0);
            } else {
              result = i.op == kShr ? static_cast<T>(a >> by) : static_cast<T>(static_cast<uint64_t>(a) << by);
            }
            set(i, 0, l, to_raw<T>(result));
          });
        });
      case kSet:  // of two halves: 1.0 where it is so
        return lanes(doing, [&](int l) {
          uint64_t word = 0;
          for (int e = 0; e < 2; ++e) {
            const auto a = static_cast<uint16_t>(raw(i, 1, l) >> 16 * e), b = static_cast<uint16_t>(raw(i, 2, l) >> 16 * e);
            const bool half = i.type == kF16x2;
            const bool yes = half ? compare(i.mode, half_to_float(a), half_to_float(b))
                                  : compare(i.mode, bfloat_to_float(a), bfloat_to_float(b));
            word |= static_cast<uint64_t>(yes ? (half ? 0x3C00 : 0x3F80) : 0) << 16 * e;
          }
          set(i, 0, l, word);
        });
      case kSetp:
        return by_type(i.type, [&](auto zero) {
          using T = decltype(zero);
          lanes(doing, [&](int l) { set(i, 0, l, compare(i.mode, value<T>(i, 1, l), value<T>(i, 2, l))); });
        });
      case kSelp: return lanes(doing, [&](int l) { set(i, 0, l, raw(i, 3, l) & 1 ? raw(i, 1, l) : raw(i, 2, l)); });
      case kCvt: return convert(i, doing);
      case kPopc:
        return lanes(doing, [&](int l) { set(i, 0, l, __builtin_popcount(value<uint32_t>(i, 1, l))); });
      case kBrev:
        return lanes(doing, [&](int l) {
          uint32_t turned = 0;
          for (int bit = 0; bit < 32; ++bit) turned |= (value<uint32_t>(i, 1, l) >> bit & 1) << (31 - bit);
          set(i, 0, l, turned);
        });
      case kClz:
      case kBfind:  // .shiftamt: how far left the highest one can go
        return lanes(doing, [&](int l) {
          const auto a = value<uint32_t>(i, 1, l);
          set(i, 0, l, a ? __builtin_clz(a) : i.op == kClz ? 32u : 0xFFFFFFFFu);
        });
      case kBfi:  // a into b, from a bit on, so many
        return lanes(doing, [&](int l) {
          const auto position = value<uint32_t>(i, 3, l) & 255, length = value<uint32_t>(i, 4, l) & 255;
          const auto field = static_cast<uint32_t>(((uint64_t{1} << std::min(length, 32u)) - 1) << std::min(position, 32u));
          const auto moved = static_cast<uint32_t>(uint64_t{value<uint32_t>(i, 1, l)} << std::min(position, 32u));
          set(i, 0, l, (value<uint32_t>(i, 2, l) & ~field) | (moved & field));
        });
      case kEx2:
        return lanes(doing, [&](int l) {
          const auto a = value<float>(i, 1, l);
          const float result = approximate(std::exp2(i.mode == kFtz ? flushed(a) : a), a);
          set(i, 0, l, to_raw(i.mode == kFtz ? flushed(result) : result));
        });
      case kRcp: return lanes(doing, [&](int l) { set(i, 0, l, to_raw(1.0f / value<float>(i, 1, l))); });
      case kSqrt: return lanes(doing, [&](int l) { set(i, 0, l, to_raw(std::sqrt(value<float>(i, 1, l)))); });
      case kLdParam:
        return lanes(doing, [&](int l) { set(i, 0, l, loaded(i.type, reinterpret_cast<uint64_t>(parameters_) + i.operand[1])); });
      case kLdGlobal: case kLdGlobalNc: case kLdShared: return load(i, doing);
      case kStGlobal: case kStShared: return store(i, doing);
      case kAtomGlobal: case kAtomShared: return atomic(i, doing);
      case kCpAsync: return copy(i, doing);
      case kCpCommit:
        return lanes(doing, [&](int l) {
          warp_->groups[l].push_back(std::move(warp_->open[l]));
          warp_->open[l].clear();
        });
      case kCpWait:
        return lanes(doing, [&](int l) {
          while (static_cast<int64_t>(warp_->groups[l].size()) > i.operand[0]) {
            for (const Copy& one : warp_->groups[l].front()) arrive(one, l);
            warp_->groups[l].pop_front();
          }
        });
      default: return problem(0, 0, "%s is not written here", kOpNames[i.op]);
    }
  }

  static int half_width(const Instruction& i) { return 4 * width_of(i.type); }
  static uint64_t half(const Instruction& i, uint64_t bits) { return bits & ((uint64_t{1} << half_width(i)) - 1); }

  template <class T>
  static T times(T a, T b) {
    if constexpr (std::is_integral_v<T>) {
      return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
    } else {
      return a * b;
    }
  }

  // ---- memory --------------------------------------------------------------------------------------------------------

  static uint64_t loaded(int type, uint64_t address) {
    uint64_t bits = 0;
    const int width = width_of(type);
    std::memcpy(&bits, reinterpret_cast<const void*>(address), width);
    if (type == kS8) return to_raw(from_raw<int8_t>(bits));
    if (type == kS16) return to_raw(from_raw<int16_t>(bits));
    if (type == kS32) return to_raw(from_raw<int32_t>(bits));
    return bits;
  }

  uint32_t thread(int lane) const {
    return block_ * static_cast<uint32_t>(options_.threads) + warp_index_ * kLanes + lane + 1;
  }

  enum Access { kRead, kReadConstant, kWrite, kAtomic };

  /// Whether the order of two accesses to a byte is left to chance; the byte then remembers this one.
  bool races(Cell& cell, uint32_t me, Access access, bool shared) const {
    const uint32_t threads = options_.threads;
    auto ordered = [&](uint32_t other, uint32_t epoch) {
      if (other == me) return true;
      const bool same_block = shared || (other - 1) / threads == block_;
      return same_block && epoch != epoch_;
    };
    bool bad = cell.pending;
    if (cell.writer && !ordered(cell.writer, cell.writer_epoch)) bad |= access != kAtomic || !cell.atomic;
    if (cell.written && access == kReadConstant && !shared) bad = true;
    if (access == kWrite || access == kAtomic) {
      if (cell.reader) {
        const bool other_block = !shared && cell.reader_block != block_;
        bad |= other_block || (cell.reader_epoch == epoch_ && cell.reader != me);
      }
      bad |= cell.constant;
      cell.writer = me;
      cell.writer_epoch = epoch_;
      cell.atomic = access == kAtomic;
      cell.written = true;
    } else {
      const bool same_time = cell.reader && cell.reader_epoch == epoch_ && cell.reader_block == block_;
      if (cell.reader && !shared && cell.reader_block != block_) {
        cell.reader_block = kSeveral;
      } else {
        cell.reader_block = block_;
      }
      cell.reader = same_time && cell.reader != me ? kSeveral : me;
      cell.reader_epoch = epoch_;
      cell.constant |= access == kReadConstant;
    }
    return bad;
  }

  Watched* array_of(uint64_t address, int size) {
    if (last_ && address >= last_->start && address + size <= last_->start + last_->size) return last_;
    for (Watched& array : arrays_) {
      if (address >= array.start && address + size <= array.start + array.size) return last_ = &array;
    }
    return nullptr;
  }

  bool allowed_global(int lane, uint64_t address, int size, Access access) {
    Watched* array = array_of(address, size);
    if (!array) {
      problem(lane, address, "%d bytes of global memory outside of every array", size);
      return false;
    }
    if (address % size) {
      problem(lane, address, "%d bytes of global memory that are not aligned", size);
      return false;
    }
    if (!options_.watch) return true;
    if (!array->cells) {
      array->cells.reset(static_cast<Cell*>(std::calloc(array->size, sizeof(Cell))));
      if (!array->cells) {
        problem(lane, address, "no memory to watch an array of %llu bytes", static_cast<unsigned long long>(array->size));
        return false;
      }
    }
    for (int b = 0; b < size; ++b) {
      if (races(array->cells[address - array->start + b], thread(lane), access, false)) {
        problem(lane, address, "a race in global memory");
        return false;
      }
    }
    return true;
  }

  bool allowed_shared(int lane, uint64_t address, int size, Access access) {
    const uint64_t start = address - kSharedBase;
    if (address < kSharedBase || start + size > shared_.size()) {
      problem(lane, address, "%d bytes outside of the %zu bytes of shared memory", size, shared_.size());
      return false;
    }
    if (address % size) {
      problem(lane, address, "%d bytes of shared memory that are not aligned", size);
      return false;
    }
    if (!options_.watch) return true;
    for (int b = 0; b < size; ++b) {
      Cell& cell = shared_cells_[start + b];
      if (access == kRead && !cell.written) {
        problem(lane, address, "shared memory is read that nobody wrote");
        return false;
      }
      if (races(cell, thread(lane), access, true)) {
        problem(lane, address, cell.pending ? "shared memory is touched while a copy is under way" : "a race in shared memory");
        return false;
      }
    }
    return true;
  }

  char* host(bool shared, uint64_t address) {
    return shared ? reinterpret_cast<char*>(shared_.data()) + (address - kSharedBase) : reinterpret_cast<char*>(address);
  }

  uint64_t address_of(const Instruction& i, int operand, int lane) { return raw(i, operand, lane) + i.operand[operand + 1]; }

  /// Sectors of 32 bytes, or times that banks of shared memory are asked.
  void count_access(bool shared, const uint64_t* addresses, uint32_t doing, int size) {
    if (!shared) {
      uint64_t seen[kLanes];
      int distinct = 0;
      for (int l = 0; l < kLanes; ++l) {
        if (doing >> l & 1) seen[distinct++] = addresses[l] / kSector;
      }
      std::sort(seen, seen + distinct);
      requests() += 1;
      sectors() += std::unique(seen, seen + distinct) - seen;
      return;
    }
    const int together = size == 16 ? 8 : size == 8 ? 16 : 32;
    for (int first = 0; first < kLanes; first += together) {
      std::set<uint64_t> words[kBanks];
      bool any = false;
      for (int l = first; l < first + together; ++l) {
        if (!(doing >> l & 1)) continue;
        any = true;
        for (int b = 0; b < std::max(size, 4); b += 4) words[(addresses[l] + b) / 4 % kBanks].insert((addresses[l] + b) / 4);
      }
      if (!any) continue;
      size_t most = 1;
      for (const auto& bank : words) most = std::max(most, bank.size());
      wavefronts() += most;
      conflicts() += most - 1;
    }
  }

  void load(const Instruction& i, uint32_t doing) {
    const bool shared = i.op == kLdShared;
    const int width = width_of(i.type), size = width * i.vector;
    uint64_t addresses[kLanes];
    lanes(doing, [&](int l) {
      addresses[l] = address_of(i, i.vector, l);
      const Access access = i.op == kLdGlobalNc ? kReadConstant : kRead;
      if (shared ? !allowed_shared(l, addresses[l], size, access) : !allowed_global(l, addresses[l], size, access)) return;
      const auto at = reinterpret_cast<uint64_t>(host(shared, addresses[l]));
      for (int v = 0; v < i.vector; ++v) set(i, v, l, loaded(i.type, at + v * width));
    });
    if (problems_ == 0) count_access(shared, addresses, doing, size);
  }

  void store(const Instruction& i, uint32_t doing) {
    const bool shared = i.op == kStShared;
    const int width = width_of(i.type), size = width * i.vector;
    uint64_t addresses[kLanes];
    lanes(doing, [&](int l) {
      addresses[l] = address_of(i, 0, l);
      if (shared ? !allowed_shared(l, addresses[l], size, kWrite) : !allowed_global(l, addresses[l], size, kWrite)) return;
      for (int v = 0; v < i.vector; ++v) {
        const uint64_t bits = raw(i, 2 + v, l);
        std::memcpy(host(shared, addresses[l]) + v * width, &bits, width);
      }
    });
    if (problems_ == 0) count_access(shared, addresses, doing, size);
  }

  void atomic(const Instruction& i, uint32_t doing) {
    const bool shared = i.op == kAtomShared;
    uint64_t addresses[kLanes];
    by_integer(i.type, [&](auto zero) {
      using T = decltype(zero);
      lanes(doing, [&](int l) {
        addresses[l] = address_of(i, 1, l);
        const int size = sizeof(T);
        if (shared ? !allowed_shared(l, addresses[l], size, kAtomic) : !allowed_global(l, addresses[l], size, kAtomic)) return;
        T old;
        const T by = value<T>(i, 3, l);
        char* at = host(shared, addresses[l]);
        std::memcpy(&old, at, sizeof old);
        const T fresh = i.mode == kModeAdd ? static_cast<T>(old + by) : i.mode == kModeMin ? std::min(old, by) : std::max(old, by);
        std::memcpy(at, &fresh, sizeof fresh);
        set(i, 0, l, to_raw<T>(old));
      });
    });
    if (problems_ == 0) count_access(shared, addresses, doing, width_of(i.type));
  }

  /// cp.async: [to], [from], bytes, bytes that are there. The rest is cleared. When it reads is left open, so nothing may
  /// write there in the whole launch.
  void copy(const Instruction& i, uint32_t doing) {
    uint64_t addresses[kLanes];
    lanes(doing, [&](int l) {
      const uint64_t to = address_of(i, 0, l), from = addresses[l] = address_of(i, 2, l);
      const int size = static_cast<int>(i.operand[4]), present = i.count > 5 ? value<int32_t>(i, 5, l) : size;
      if (present && !allowed_global(l, from, size, kReadConstant)) return;
      if (!allowed_shared(l, to, size, kWrite)) return;
      for (int b = 0; b < size; ++b) {
        shared_cells_[to - kSharedBase + b].pending = true;
        shared_[to - kSharedBase + b] = 0xFF;
      }
      warp_->open[l].push_back({to, present ? from : 0, size});
    });
    if (problems_ == 0) count_access(false, addresses, doing, static_cast<int>(i.operand[4]));
  }

  void arrive(const Copy& one, int lane) {
    char* to = host(true, one.to);
    if (one.from) {
      std::memcpy(to, reinterpret_cast<const void*>(one.from), one.size);
    } else {
      std::memset(to, 0, one.size);
    }
    for (int b = 0; b < one.size; ++b) {
      Cell& cell = shared_cells_[one.to - kSharedBase + b];
      cell.pending = false;
      cell.writer = thread(lane);
      cell.writer_epoch = epoch_;
    }
  }

  // ---- what a warp does together -------------------------------------------------------------------------------------

  void together(const Instruction& i, uint32_t active) {
    switch (i.op) {
      case kShfl: return shuffle(i, active);
      case kVote: {
        uint64_t ballot = 0;
        lanes(active, [&](int l) { ballot |= (raw(i, 1, l) & 1) << l; });
        return lanes(active, [&](int l) { set(i, 0, l, ballot); });
      }
      case kRedux: {
        if (i.mode != kModeAdd) return problem(0, 0, "only redux.sync.add is written here");
        uint32_t total = 0;
        lanes(active, [&](int l) { total += value<uint32_t>(i, 1, l); });
        return lanes(active, [&](int l) { set(i, 0, l, total); });
      }
      case kLdmatrix: return load_matrices(i);
      case kMma: return multiply(i);
      default: return;  // a barrier
    }
  }

  void shuffle(const Instruction& i, uint32_t active) {
    uint64_t before[kLanes];
    lanes(active, [&](int l) { before[l] = raw(i, 2, l); });
    lanes(active, [&](int l) {
      const auto b = value<uint32_t>(i, 3, l) & 31, c = value<uint32_t>(i, 4, l);
      const int segment = c >> 8 & 31, clamp = c & 31;
      const int last = (l & segment) | (clamp & ~segment), first = l & segment;
      int source = 0;
      bool inside = false;
      switch (i.mode) {
        case kUp: source = l - b; inside = source >= last; break;
        case kDown: source = l + b; inside = source <= last; break;
        case kBfly: source = l ^ b; inside = source <= last; break;
        default: source = first | (b & ~segment); inside = source <= last; break;
      }
      if (!inside) source = l;
      if (!(active >> source & 1)) return problem(l, 0, "a value of lane %d, which has ended, is asked for", source);
      set(i, 0, l, before[source]);
      set(i, 1, l, inside);
    });
  }

  void load_matrices(const Instruction& i) {
    uint64_t addresses[kLanes];
    for (int l = 0; l < kLanes; ++l) addresses[l] = address_of(i, 4, l);
    for (int l = 0; l < kLanes; ++l) {
      // Whose row it is does not matter for a race: all lanes act at once.
      if (!allowed_shared(l, addresses[l], 16, kRead)) return;
    }
    for (int l = 0; l < kLanes; ++l) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        uint32_t word;
        std::memcpy(&word, host(true, addresses[8 * matrix + l / 4]) + 4 * (l % 4), 4);
        set(i, matrix, l, word);
      }
    }
    count_access(true, addresses, ~0u, 16);
  }

  /// D (16 x 8) = A (16 x 16 or 16 x 8, rows) * B (columns) + C. Lane l has rows l / 4 and l / 4 + 8 of A, C and D, and
  /// column l / 4 of B; of their pairs, number l % 4. Products are exact; so, nearly, is their sum here.
  void multiply(const Instruction& i) {
    const int words = i.mode == kK16 ? 4 : 2, depth = 4 * words;
    auto element = [&](int operand, int lane, int which) {
      const auto bits = static_cast<uint16_t>(raw(i, operand, lane) >> 16 * which);
      return static_cast<double>(i.from == kF16 ? half_to_float(bits) : bfloat_to_float(bits));
    };
    double a[16][16], b[16][8];
    for (int l = 0; l < kLanes; ++l) {
      for (int e = 0; e < 2; ++e) {
        for (int w = 0; w < words; ++w) a[l / 4 + w % 2 * 8][2 * (l % 4) + e + w / 2 * 8] = element(4 + w, l, e);
        for (int w = 0; w < words / 2; ++w) b[2 * (l % 4) + e + 8 * w][l / 4] = element(4 + words + w, l, e);
      }
    }
    const int sums = 4 + words + words / 2;
    for (int l = 0; l < kLanes; ++l) {
      for (int d = 0; d < 4; ++d) {
        double total = value<float>(i, sums + d, l);
        for (int k = 0; k < depth; ++k) total += a[l / 4 + d / 2 * 8][k] * b[k][2 * (l % 4) + d % 2];
        set(i, d, l, to_raw(static_cast<float>(total)));
      }
    }
  }

  const Instruction* program_;
  int length_, registers_;
  const char* parameters_;
  Options options_;
  int64_t* counts_;
  int64_t* executed_;
  char* report_;
  int report_size_;
  std::vector<Watched> arrays_;
  Watched* last_ = nullptr;
  std::vector<unsigned char> shared_;
  std::vector<Cell> shared_cells_;
  const Instruction* at_ = nullptr;
  Warp* warp_ = nullptr;
  int warp_index_ = 0;
  uint32_t block_ = 0, epoch_ = 1;
  int64_t position_[3] = {};
  int problems_ = 0;
};

int find(const char* const* names, int count, const char* name) {
  for (int i = 0; i < count; ++i) {
    if (!std::strcmp(names[i], name)) return i;
  }
  return -1;
}

}  // namespace

extern "C" {

int ptx_op(const char* name) { return find(kOpNames, kOps, name); }
int ptx_type(const char* name) { return find(kTypeNames, kTypes, name); }
int ptx_mode(const char* name) { return find(kModeNames, kModes, name); }
const char* ptx_op_name(int op) { return op < kOps ? kOpNames[op] : nullptr; }
uint64_t ptx_shared_base() { return kSharedBase; }

/// Problems: 0, or how many; the first is put into the report. Counts: executed instructions of each op, then lanes that
/// did them, requests and sectors of global memory, wavefronts of shared memory and how many of those are conflicts.
/// Executed: how often each instruction of the program was.
int ptx_run(const Instruction* program, int length, int registers, const char* parameters, const Array* arrays, int count,
            const Options* options, int64_t* counts, int64_t* executed, char* report, int report_size) {
  return Machine(program, length, registers, parameters, arrays, count, *options, counts, executed, report, report_size)
      .run();
}
}
