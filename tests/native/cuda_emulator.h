// Enough of CUDA to run a kernel's blocks on a CPU: every thread is a fiber, warps meet in their collectives and blocks
// at their barriers, several blocks are resident at a time and start in any order. Slow, and true to what the kernels
// rely on: who waits for a block that is not running waits for ever, and that is reported.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct Index {
  unsigned x = 0;
};

using std::max;
using std::min;

namespace emulated {

struct Warp {
  int arrived = 0, turn = 0;
  uint32_t words[32][8];
};

struct Block {
  unsigned index = 0;
  int arrived = 0, turn = 0, left = 0;
  struct {
    int arrived = 0, turn = 0;
  } named[16];  // barriers with a number
  std::vector<Warp> warps;
  std::vector<char> shared;
};

// A copy that is under way: it happens when it is waited for, and not before.
struct Copy {
  void* to;
  const void* from;  // null for zeros
  size_t bytes;
};

struct Fiber {
  std::vector<std::vector<Copy>> groups{{}};  // of copies, the last one open
  ucontext_t context;                         // where it begins
  jmp_buf place;                              // where it goes on
  std::vector<char> stack;
  Block* block;
  unsigned thread;
  bool begun = false, done = false;
};

inline jmp_buf scheduler;
inline Fiber* running = nullptr;
inline uint64_t events = 0;  // whatever shows that something goes on
inline const std::function<void(Block&)>* body = nullptr;

// Jumps, not swapcontext: that asks the system for the signal mask each time, which takes as long as everything else.
inline void yield() {
  if (!_setjmp(running->place)) _longjmp(scheduler, 1);
}
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

inline void meet(int& arrived, int& turn, int count) {
  const int mine = turn;
  ++events;
  if (++arrived == count) {
    arrived = 0;
    ++turn;
    return;
  }
  while (turn == mine) yield();
}

}  // namespace emulated

inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

inline Warp& warp() { return running->block->warps[running->thread / 32]; }

// What every lane of the warp says, to every lane.
template <int kWords>
inline void exchange(const uint32_t (&mine)[kWords], uint32_t (&all)[32][8]) {
  Warp& w = warp();
  for (int i = 0; i < kWords; ++i) w.words[running->thread % 32][i] = mine[i];
  meet(w.arrived, w.turn, 32);
  std::memcpy(all, w.words, sizeof all);
  meet(w.arrived, w.turn, 32);
}

[[noreturn]] inline void fail(const char* what) {
  std::printf("%s\n", what);
  std::exit(1);
}

inline void copy(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) fail("a copy is not aligned");
  std::memset(to, 0xff, bytes);  // whoever reads it too early gets NaN
  running->groups.back().push_back({to, from, bytes});
}
inline void end_group() { running->groups.emplace_back(); }
inline void wait_for_groups(size_t left) {
  auto& groups = running->groups;
  while (groups.size() > left + 1) {
    for (const Copy& each : groups.front()) {
      each.from ? std::memcpy(each.to, each.from, each.bytes) : std::memset(each.to, 0, each.bytes);
    }
    groups.erase(groups.begin());
  }
}

inline void entry() {
  (*body)(*running->block);
  for (const auto& group : running->groups) {
    if (!group.empty()) fail("a thread ends before its copies");
  }
  running->done = true;
  --running->block->left;
  ++events;
  yield();
}

// Runs `blocks` blocks of `threads` threads, `resident` at a time, in an order drawn from `seed`. False if all that are
// resident wait for ever.
inline bool launch(unsigned blocks, unsigned threads, unsigned resident, unsigned seed, size_t shared,
                   const std::function<void(Block&)>& kernel) {
  body = &kernel;
  gridDim.x = blocks;
  blockDim.x = threads;
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  std::mt19937 generator(seed);
  std::shuffle(order.begin(), order.end(), generator);
  std::vector<std::unique_ptr<Block>> live;
  std::vector<std::unique_ptr<Fiber>> fibers;
  unsigned next = 0;
  uint64_t last_events = 0;
  int idle = 0;
  while (next < blocks || !fibers.empty()) {
    while (next < blocks && live.size() < resident) {
      auto block = std::make_unique<Block>();
      block->index = order[next++];
      block->left = threads;
      block->warps.resize((threads + 31) / 32);
      block->shared.assign(shared, static_cast<char>(0xff));  // NaN
      for (unsigned t = 0; t < threads; ++t) {
        auto fiber = std::make_unique<Fiber>();
        getcontext(&fiber->context);
        fiber->stack.resize(1 << 15);
        fiber->context.uc_stack.ss_sp = fiber->stack.data();
        fiber->context.uc_stack.ss_size = fiber->stack.size();
        fiber->context.uc_link = nullptr;
        fiber->block = block.get();
        fiber->thread = t;
        makecontext(&fiber->context, entry, 0);
        fibers.push_back(std::move(fiber));
      }
      live.push_back(std::move(block));
    }
    for (auto& fiber : fibers) {
      if (fiber->done) continue;
      running = fiber.get();
      threadIdx.x = fiber->thread;
      blockIdx.x = fiber->block->index;
      resume(*fiber);
    }
    const auto finished = [](const auto& block) { return block->left == 0; };
    fibers.erase(std::remove_if(fibers.begin(), fibers.end(), [](const auto& f) { return f->block->left == 0; }),
                 fibers.end());
    live.erase(std::remove_if(live.begin(), live.end(), finished), live.end());
    idle = events == last_events ? idle + 1 : 0;
    last_events = events;
    if (idle > 1000) return false;
  }
  return true;
}

}  // namespace emulated

inline void __syncthreads() {
  emulated::Block& b = *emulated::running->block;
  emulated::meet(b.arrived, b.turn, static_cast<int>(blockDim.x));
}
inline void __syncwarp() { emulated::meet(emulated::warp().arrived, emulated::warp().turn, 32); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { emulated::yield(); }

inline uint32_t __ballot_sync(uint32_t, bool value) {
  uint32_t all[32][8], out = 0;
  emulated::exchange({static_cast<uint32_t>(value)}, all);
  for (int lane = 0; lane < 32; ++lane) out |= all[lane][0] << lane;
  return out;
}

template <class V>
inline V __shfl_sync(uint32_t, V value, int lane) {
  static_assert(sizeof(V) == 4);
  uint32_t all[32][8], bits;
  std::memcpy(&bits, &value, 4);
  emulated::exchange({bits}, all);
  std::memcpy(&value, &all[lane][0], 4);
  return value;
}

template <int kNumber>
inline void arrive(int threads) {
  auto& barrier = emulated::running->block->named[kNumber];
  ++emulated::events;
  if (++barrier.arrived < threads) return;
  barrier.arrived = 0;
  ++barrier.turn;
}
template <int kNumber>
inline void meet(int threads) {
  auto& barrier = emulated::running->block->named[kNumber];
  emulated::meet(barrier.arrived, barrier.turn, threads);
}

inline uint32_t __match_any_sync(uint32_t, int value) {
  uint32_t all[32][8], out = 0;
  emulated::exchange({static_cast<uint32_t>(value)}, all);
  for (int lane = 0; lane < 32; ++lane)
    out |= static_cast<uint32_t>(all[lane][0] == static_cast<uint32_t>(value)) << lane;
  return out;
}

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }

template <class V>
inline V __ldg(const V* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline V __ldcg(const V* p) {
  return __ldg(p);
}
template <class V>
inline void __stcg(V* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
