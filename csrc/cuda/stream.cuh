// The base: weights streamed from memory to matrix instructions, chunk behind chunk. Asynchronous copies keep the
// memory busy whatever a compiler makes of the loop: it waits for the oldest chunk by number, and the others stay under
// way.
#pragma once

#include "decode.h"
#include "fragment.cuh"
#if defined(__CUDACC__)
#include "mma.cuh"
#endif

namespace dts_fast::cuda {

// The warp's outputs begin at `first`. Sums over part number `part` of `parts` of k, an even share. Weights come
// through shared memory, `ring` [chunk][half of a tile of outputs][lane], of which every thread reads what it has
// copied itself: no one else waits for it.
template <class T, int kRowTiles, int kOutputTiles, int kAhead>
__device__ __forceinline__ void base_sums(const DecodeProblem& p, int first, int part, int parts,
                                          uint4 (*ring)[2 * kOutputTiles][32],
                                          float (&sums)[kOutputTiles][kRowTiles][4]) {
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const uint64_t policy = read_once_policy();
  const T* const x = static_cast<const T*>(p.x) + g * p.x_stride + 8 * t;
  const T* rows[kOutputTiles][2];
#pragma unroll
  for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Beyond the last output some row is read again, and its sums dropped.
      const int output = min(first + output_of<kOutputTiles>(o, half, g), p.n - 1);
      rows[o][half] = static_cast<const T*>(p.weight) + output * p.weight_stride + 8 * t;
    }
  }
  const int chunks = (p.k + kChunk - 1) / kChunk;
  // In 32 bits (kMostDecodeInputs): a longer division is some hundred instructions before the first copy.
  const int begin = static_cast<unsigned>(chunks * part) / static_cast<unsigned>(parts);
  const int end = static_cast<unsigned>(chunks * (part + 1)) / static_cast<unsigned>(parts);
  const auto inside = [&](int chunk) { return chunk < end && chunk * kChunk + 8 * t < p.k; };
  const auto copy_weights = [&](int slot, int chunk) {
    const bool there = inside(chunk);
#pragma unroll
    for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // What is not there is not read, wherever its address would be.
        copy_once(&ring[slot][2 * o + half][lane], rows[o][half] + chunk * kChunk, there, policy);
      }
    }
    end_group_of_copies();
  };
  if (p.dependent) {
    // W is hardly another kernel's result: it comes nearer while the one that computes x still runs.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          if (inside(begin + i)) prefetch(rows[o][half] + (begin + i) * kChunk);
        }
      }
    }
  }
  wait_for_kernel_before();
#pragma unroll
  for (int i = 0; i < kAhead; ++i) copy_weights(i, begin + i);
  uint4 xs[2][kRowTiles];
  const auto load_inputs = [&](int which, int chunk) {
    const bool there = inside(chunk);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      const T* const at = x + 8 * j * p.x_stride + chunk * kChunk;
      xs[which][j] = load_result(reinterpret_cast<const uint4*>(at), there && 8 * j + g < p.m);
    }
  };
  load_inputs(0, begin);
  load_inputs(1, begin + 1);
  // Two chunks at a time, the second of which may be zeros: no branch, so that x of the next two is on its way.
  int slot = 0;
  for (int at = begin; at < end; at += 2) {
    wait_for_copies<kAhead - 2>();
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      uint4 w[kOutputTiles][2];
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) w[o][half] = ring[slot][2 * o + half][lane];
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        const uint4 in = xs[which][j];
#pragma unroll
        for (int o = 0; o < kOutputTiles; ++o) {
          mma<T>(sums[o][j], w[o][0].x, w[o][1].x, w[o][0].y, w[o][1].y, in.x, in.y);
          mma<T>(sums[o][j], w[o][0].z, w[o][1].z, w[o][0].w, w[o][1].w, in.z, in.w);
        }
      }
      load_inputs(which, at + which + 2);
      copy_weights(slot, at + which + kAhead);
      slot = slot + 1 < kAhead ? slot + 1 : 0;
    }
  }
  wait_for_copies<0>();  // the memory is used for something else
}

}  // namespace dts_fast::cuda
