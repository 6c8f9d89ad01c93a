// The base: weights streamed from memory into the registers of matrix instructions.
#pragma once

#include "decode.h"
#include "fragment.cuh"
#if defined(__CUDACC__)
#include "mma.cuh"
#endif

namespace dts_fast::cuda {

// Chunks of k whose weights a thread has under way together: as many as its registers hold where 16 warps share a
// multiprocessor, or fewer, which then keep some 32 to 96 KiB on their way.
DTS_FAST_BOTH constexpr int ahead(int row_tiles, int output_tiles, int warps) {
  if (row_tiles >= 4) return output_tiles == 4 ? 2 : warps == 4 && row_tiles == 4 ? 6 : 4;
  return row_tiles == 1 && output_tiles == 1 ? 6 : 3;
}
// And chunks of x, which comes from a cache: fewer where rows are many.
DTS_FAST_BOTH constexpr int ahead_of_x(int row_tiles, int output_tiles, int warps) {
  return row_tiles >= 4 ? ahead(row_tiles, output_tiles, warps) / (output_tiles == 4 ? 1 : 2)
                        : ahead(row_tiles, output_tiles, warps);
}

// The warp's outputs begin at `first`. Sums over part number `part` of `parts` of k, an even share.
template <class T, int kRowTiles, int kOutputTiles, int kWarps>
__device__ __forceinline__ void base_sums(const DecodeProblem& p, int first, int part, int parts,
                                          float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kAhead = ahead(kRowTiles, kOutputTiles, kWarps);
  constexpr int kAheadOfX = ahead_of_x(kRowTiles, kOutputTiles, kWarps);
  static_assert(kAhead % kAheadOfX == 0);
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const uint64_t policy = read_once_policy();
  const T* const x = static_cast<const T*>(p.x) + 8 * t;
  const T* rows[kOutputTiles][2];
#pragma unroll
  for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Beyond the last output some row is read again, and its sums dropped.
      const int output = min(first + 16 * o + 8 * half + g, p.n - 1);
      rows[o][half] = static_cast<const T*>(p.weight) + output * p.weight_stride + 8 * t;
    }
  }
  const int chunks = (p.k + kChunk - 1) / kChunk;
  const int begin = static_cast<int>(static_cast<int64_t>(chunks) * part / parts);
  const int end = static_cast<int>(static_cast<int64_t>(chunks) * (part + 1) / parts);
  if (p.dependent) {
    // W is no other kernel's result: it comes nearer while the one that computes x still runs.
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int k = (begin + i) * kChunk;
          if (begin + i < end && k + 8 * t < p.k) prefetch(rows[o][half] + k);
        }
      }
    }
  }
  wait_for_kernel_before();
  uint4 w[kAhead][kOutputTiles][2] = {}, xs[kAheadOfX][kRowTiles] = {};
  const auto inside = [&](int chunk) { return chunk < end && chunk * kChunk + 8 * t < p.k; };
  const auto load_weights = [&](int i, int chunk) {
    const bool there = inside(chunk);
#pragma unroll
    for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        w[i][o][half] = there ? load_once(rows[o][half] + chunk * kChunk, policy) : uint4{};
      }
    }
  };
  const auto load_inputs = [&](int i, int chunk) {
    const bool there = inside(chunk);
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      xs[i][j] = there && 8 * j + g < p.m
                     ? load_result(reinterpret_cast<const uint4*>(x + (8 * j + g) * p.x_stride + chunk * kChunk))
                     : uint4{};
    }
  };
#pragma unroll
  for (int i = 0; i < kAhead; ++i) load_weights(i, begin + i);
#pragma unroll
  for (int i = 0; i < kAheadOfX; ++i) load_inputs(i, begin + i);
  // A chunk's registers are filled again as soon as it has been multiplied, so that loads never pause.
  for (int at = begin; at < end; at += kAhead) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (at + i >= end) continue;
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int o = 0; o < kOutputTiles; ++o) {
          const uint4 top = w[i][o][0], bottom = w[i][o][1], in = xs[i % kAheadOfX][j];
          mma<T>(sums[o][j], top.x, bottom.x, top.y, bottom.y, in.x, in.y);
          mma<T>(sums[o][j], top.z, bottom.z, top.w, bottom.w, in.z, in.w);
        }
      }
      load_weights(i, at + i + kAhead);
      load_inputs(i % kAheadOfX, at + i + kAheadOfX);
    }
  }
}

}  // namespace dts_fast::cuda
