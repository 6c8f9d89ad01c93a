// One launch for a personalised linear of few rows: y = x W^T + bias + ((x V) * s) U^T, each row with its own slot.
//
// Decoding is bound by the bytes of W, and a second launch would cost as much as the delta. So every block streams the
// weights of a few outputs, its warps each a part of K, straight into the registers of matrix instructions (W is read
// once, so shared memory would only be a detour); the shrink is done meanwhile by one more warp of each block; and when
// a block's weights are through, h has long been published, and the expand is further steps on the same accumulators.
//
// How blocks agree, without a deadlock whatever the grid, the occupancy, and the order in which blocks run: the shrink
// is cut into claims, and a block takes claims until none is left. Only then does it wait for those that others hold,
// and who holds one is running and waits for nothing. Counters return to 0 by themselves: each is incremented the same
// number of times in every launch, and wraps around there (every block asks once in vain, and says once that it has
// seen the end).
//
// Sums do not depend on timing: partial results are added up in the order of k, by whoever comes last.
#pragma once

#include "decode.h"
#include "fragment.cuh"
#if defined(__CUDACC__)
#include "mma.cuh"
#endif

namespace dts_fast::cuda {

// Four levels over the largest, which goes into h: float16 holds them whatever their size. Returns that largest.
template <class T>
__device__ __forceinline__ float load_table(const uint32_t* page, int levels, Table& table) {
  const float4 v = __ldg(reinterpret_cast<const float4*>(page + levels));
  const float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  const float scale = largest > 0.0f ? largest : 1.0f;
  table = {pack<T>(v.x / scale, v.y / scale), pack<T>(v.z / scale, v.w / scale)};
  return scale;
}

// x V of one page for the rows of one slot, over the chunks [begin, end) of k, by one warp: sums [16 ranks, 8 rows].
template <class T, int kRowTiles>
__device__ __forceinline__ void shrink_page(const DecodeProblem& p, const uint32_t* page, const Table& table,
                                            const bool (&mine)[kRowTiles], int begin, int end,
                                            float (&sums)[kRowTiles][4]) {
  constexpr int kAhead = kRowTiles > 1 ? 2 : 4;  // chunks whose loads are under way together
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int tiles = (p.k + kTileWords - 1) / kTileWords;
  const T* const x = static_cast<const T*>(p.x);
  for (int c = begin; c < end; c += kAhead) {
    uint32_t words[kAhead][2] = {};
    uint4 xs[kAhead][kRowTiles] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = (c + i) * kChunk + 8 * t;
      if (c + i < end && 2 * (c + i) + (t >> 1) < tiles) {
        words[i][0] = __ldg(page + shrink_word(c + i, t, g));
        words[i][1] = __ldg(page + shrink_word(c + i, t, g + 8));
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (c + i < end && k < p.k && mine[j]) {
          xs[i][j] = __ldg(reinterpret_cast<const uint4*>(x + (8 * j + g) * p.x_stride + k));
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const Pairs top = decode(table, shrink_codes(words[i][0], t, step));
        const Pairs bottom = decode(table, shrink_codes(words[i][1], t, step));
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          mma<T>(sums[j], top.first, bottom.first, top.second, bottom.second, step ? xs[i][j].z : xs[i][j].x,
                 step ? xs[i][j].w : xs[i][j].y);
        }
      }
    }
  }
}

// One unit of the shrink, by one warp: a page of the slot of row `first`, and one split of k.
template <class T, int kRowTiles>
__device__ void shrink_unit(const DecodeProblem& p, int first, int place_in_list, int split) {
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int slot = __ldg(p.slot_ids + first);
  if (slot < 0) return;
  // The first of the rows with this slot stands for all.
  const int own = lane < p.m ? __ldg(p.slot_ids + lane) : -1;
  const uint32_t same = __ballot_sync(0xffffffff, own == slot);
  if (__ffs(same) - 1 != first) return;
  const int64_t entry = static_cast<int64_t>(slot) * p.list_length + place_in_list;
  const int index = __ldg(p.slot_pages + entry);
  if (index < 0) return;
  const uint32_t* const page = p.pages + index * p.page_words;
  bool mine[kRowTiles];
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) mine[j] = same >> (8 * j + g) & 1;
  Table v, u;
  float scale = __ldg(p.slot_weights + entry) * load_table<T>(page, kVLevels, v);
  scale *= load_table<T>(page, kULevels, u);
  const int chunks = (p.k + kChunk - 1) / kChunk, span = (chunks + p.splits - 1) / p.splits;
  float sums[kRowTiles][4] = {};
  shrink_page<T, kRowTiles>(p, page, v, mine, split * span, min((split + 1) * span, chunks), sums);
  const float* const s = reinterpret_cast<const float*>(page + kScales);
  const float scales[2] = {scale * __ldg(s + g), scale * __ldg(s + g + 8)};
  const int64_t width = static_cast<int64_t>(kRanks) * p.list_length;
  T* const h = static_cast<T*>(p.h);
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * j + 2 * t + (i & 1), rank = g + 8 * (i >> 1);
      if (!(same >> row & 1)) continue;
      const int64_t column = place_in_list * kRanks + rank;
      const float value = sums[j][i] * scales[i >> 1];
      if (p.splits == 1) {
        h[row * width + column] = from_float<T>(value);
      } else {
        __stcg(p.partial + (static_cast<int64_t>(split) * p.m + row) * width + column, value);
      }
    }
  }
  if (p.splits == 1) return;
  // Whoever comes last adds up all splits, in their order.
  __threadfence();
  __syncwarp();
  uint32_t arrived = 0;
  if (lane == 0)
    arrived = fetch_increment(p.counters + kArrivals + first * p.list_length + place_in_list, p.splits - 1);
  if (__shfl_sync(0xffffffff, arrived, 0) != static_cast<uint32_t>(p.splits - 1)) return;
  __threadfence();
  for (int row = lane >> 4; row < p.m; row += 2) {
    if (!(same >> row & 1)) continue;
    const int64_t column = place_in_list * kRanks + (lane & 15);
    float sum = 0.0f;
    for (int i = 0; i < p.splits; ++i) {
      sum += __ldcg(p.partial + (static_cast<int64_t>(i) * p.m + row) * width + column);
    }
    h[row * width + column] = from_float<T>(sum);
  }
}

// The warp beside those that stream weights: shrinks what no one else has claimed, and returns when h is complete.
template <class T, int kRowTiles>
__device__ void shrink_and_wait(const DecodeProblem& p, int blocks) {
  const int lane = threadIdx.x & 31;
  const int units = p.m * p.list_length * p.splits;
  const int claims = (units + p.units_of_claim - 1) / p.units_of_claim;
  const uint32_t bound = claims + blocks - 1;
  while (true) {
    uint32_t claim = 0;
    if (lane == 0) claim = fetch_increment(p.counters + kClaimed, bound);
    claim = __shfl_sync(0xffffffff, claim, 0);
    if (claim >= static_cast<uint32_t>(claims)) break;
    const int begin = claim * p.units_of_claim, end = min(begin + p.units_of_claim, units);
    // Neighbours are the splits of one page, which so end at about the same time.
    for (int unit = begin; unit < end; ++unit) {
      const int page = unit / p.splits;
      shrink_unit<T, kRowTiles>(p, page / p.list_length, page % p.list_length, unit % p.splits);
    }
    __threadfence();
    __syncwarp();
    if (lane == 0) increment_release(p.counters + kDone, bound);
  }
  if (lane == 0) {
    while (load_acquire(p.counters + kDone) < static_cast<uint32_t>(claims)) __nanosleep(64);
    increment_release(p.counters + kDone, bound);
  }
  __syncwarp();
}

// Chunks of k whose loads a thread has under way together: as many as its registers hold where 16 warps share a
// multiprocessor, which then keep some 64 to 96 KiB of weights on their way.
DTS_FAST_BOTH constexpr int ahead(int row_tiles, int output_tiles) {
  return row_tiles == 1 && output_tiles == 1 ? 6 : 3;
}

// The block's outputs begin at `first`. Sums over this warp's part of k; chunks of several warps lie side by side, so
// that together they read long pieces of each row.
template <class T, int kRowTiles, int kOutputTiles, int kWarps>
__device__ __forceinline__ void base_sums(const DecodeProblem& p, int first,
                                          float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kAhead = ahead(kRowTiles, kOutputTiles);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
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
  for (int at = warp * kAhead * kChunk; at < p.k; at += kWarps * kAhead * kChunk) {
    uint4 w[kAhead][kOutputTiles][2] = {}, xs[kAhead][kRowTiles] = {};
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int k = at + i * kChunk;
      if (k + 8 * t >= p.k) continue;
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
        w[i][o][0] = load_once(rows[o][0] + k, policy);
        w[i][o][1] = load_once(rows[o][1] + k, policy);
      }
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (8 * j + g < p.m) xs[i][j] = __ldg(reinterpret_cast<const uint4*>(x + (8 * j + g) * p.x_stride + k));
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int o = 0; o < kOutputTiles; ++o) {
          const uint4 top = w[i][o][0], bottom = w[i][o][1];
          mma<T>(sums[o][j], top.x, bottom.x, top.y, bottom.y, xs[i][j].x, xs[i][j].y);
          mma<T>(sums[o][j], top.z, bottom.z, top.w, bottom.w, xs[i][j].z, xs[i][j].w);
        }
      }
    }
  }
}

// Adds h U^T for the block's outputs: every distinct slot's pages once, dealt out to the warps.
template <class T, int kRowTiles, int kOutputTiles, int kWarps>
__device__ __forceinline__ void expand_sums(const DecodeProblem& p, int first,
                                            float (&sums)[kOutputTiles][kRowTiles][4]) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int own = lane < p.m ? __ldg(p.slot_ids + lane) : -1;
  const int64_t width = static_cast<int64_t>(kRanks) * p.list_length;
  uint32_t left = __ballot_sync(0xffffffff, own >= 0);
  for (int turn = 0; left; ++turn) {
    const int slot = __shfl_sync(0xffffffff, own, __ffs(left) - 1);
    const uint32_t same = __ballot_sync(0xffffffff, own == slot);
    left &= ~same;
    for (int l = (warp + turn) % kWarps; l < p.list_length; l += kWarps) {
      const int index = __ldg(p.slot_pages + static_cast<int64_t>(slot) * p.list_length + l);
      if (index < 0) continue;
      const uint32_t* const page = p.pages + index * p.page_words;
      uint32_t words[kOutputTiles][2];
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = first + 16 * o + 8 * half + g;
          words[o][half] = output < p.n ? __ldg(page + p.u_tiles + output) : 0;
        }
      }
      uint2 hs[kRowTiles] = {};
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (same >> (8 * j + g) & 1) {
          const T* const h = static_cast<const T*>(p.h) + (8 * j + g) * width + l * kRanks + 4 * t;
          hs[j] = __ldcg(reinterpret_cast<const uint2*>(h));  // written in this launch: not from this level's cache
        }
      }
      Table table;
      load_table<T>(page, kULevels, table);
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
        const Pairs top = decode(table, expand_codes(words[o][0], t));
        const Pairs bottom = decode(table, expand_codes(words[o][1], t));
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          mma<T>(sums[o][j], top.first, bottom.first, top.second, bottom.second, hs[j].x, hs[j].y);
        }
      }
    }
  }
}

// What one block does; `parts` is its shared memory. Grid: blocks of 16 kOutputTiles outputs. Threads: kWarps warps on
// the base, and one on the shrink: 8 or 16 together, so that each quarter of a multiprocessor has four, with 128
// registers a thread. Rows: m <= 8 kRowTiles <= 32. x, weight and h are of type T, with rows of whole 16 bytes.
template <class T, int kRowTiles, int kOutputTiles, int kWarps, bool kBase>
__device__ __forceinline__ void decode_block(const DecodeProblem& p,
                                             float (&parts)[kWarps][8 * kRowTiles][16 * kOutputTiles + 1]) {
  constexpr int kOutputs = 16 * kOutputTiles;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int first = blockIdx.x * kOutputs;
  // All blocks see the same slots, so that all or none take part in the counting.
  const bool adapted = __ballot_sync(0xffffffff, lane < p.m && __ldg(p.slot_ids + min(lane, p.m - 1)) >= 0) != 0;
  float sums[kOutputTiles][kRowTiles][4] = {};
  if (warp == kWarps) {
    if (adapted) shrink_and_wait<T, kRowTiles>(p, gridDim.x);
  } else if constexpr (kBase) {
    base_sums<T, kRowTiles, kOutputTiles, kWarps>(p, first, sums);
  }
  __syncthreads();
  if (warp < kWarps) {
    if (adapted) expand_sums<T, kRowTiles, kOutputTiles, kWarps>(p, first, sums);
#pragma unroll
    for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          parts[warp][8 * j + 2 * t + (i & 1)][16 * o + g + 8 * (i >> 1)] = sums[o][j][i];
        }
      }
    }
  }
  __syncthreads();
  T* const y = static_cast<T*>(p.y);
  for (int i = threadIdx.x; i < p.m * kOutputs; i += blockDim.x) {
    const int row = i / kOutputs, output = i % kOutputs;
    if (first + output >= p.n) continue;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += parts[w][row][output];
    T* const place_in_y = y + row * p.y_stride + first + output;
    if constexpr (kBase) {
      if (p.bias) sum += to_float(static_cast<const T*>(p.bias)[first + output]);
    } else {
      if (__ldg(p.slot_ids + row) < 0) continue;
      sum += to_float(*place_in_y);
    }
    *place_in_y = from_float<T>(sum);
  }
}

#if defined(__CUDACC__)
template <class T, int kRowTiles, int kOutputTiles, int kWarps, bool kBase>
__global__ void __launch_bounds__(32 * (kWarps + 1), kWarps < 8 && kRowTiles < 4 ? 2 : 1)
    decode_kernel(const __grid_constant__ DecodeProblem p) {
  __shared__ float parts[kWarps][8 * kRowTiles][16 * kOutputTiles + 1];
  decode_block<T, kRowTiles, kOutputTiles, kWarps, kBase>(p, parts);
}
#endif

}  // namespace dts_fast::cuda
