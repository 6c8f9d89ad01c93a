// One launch for a personalised linear of few rows: y = x W^T + bias + ((x V) * s) U^T, each row with its own slot.
//
// Decoding is bound by the bytes of W, and a second launch would cost as much as the delta. So every block streams the
// weights of a few outputs, its warps each a part of K (or, where rows are many, of the outputs). Beside them one warp
// finds the batch's distinct slots, shrinks, fetches the block's part of U, and waits for h; the expand is then further
// steps on the accumulators of the base. Where rows are many there are several such warps, and the expand is theirs,
// too.
//
// How blocks agree, without a deadlock whatever the grid, the occupancy, and the order in which blocks run: the shrink
// is cut into claims (a page, a part of K), and a block takes claims until none is left. Only then does it wait for
// those that others hold, and who holds one is running and waits for nothing. Nobody resets anything before a launch:
// kDone is incremented once for every page whose h is complete (or every split, `sums_late`) and once by every block
// that has seen the end, and wraps around to 0 there; whoever wraps it around sets kClaimed to 0, which no one uses any
// more.
//
// Sums do not depend on timing: partial results are added up in the order of k, by whoever comes last. Nor on what the
// other rows use: a page is added by a warp that its slot and its place in the list choose.
#pragma once

#include "expand_many.cuh"
#include "shrink.cuh"
#include "stream.cuh"

namespace dts_fast::cuda {

// The block's barriers: all of it, what is known about the batch, and (expand_many.cuh) the warps beside.
constexpr int kKnown = 1;

// A block's sums over all of its warps, in their order: afterwards in shared.parts, which `block_sum` adds up.
template <int kRowTiles, int kOutputTiles, class S>
__device__ __forceinline__ void share_sums(S& shared, int offset, int own, float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kParts = S::kParts, kAll = S::kAll;
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  // A thread's two neighbouring outputs of a row, and those of the next tile behind them.
  const auto each = [&](int part, auto&& function) {
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int o = 0; o < kOutputTiles; ++o) {
          float* const at = &shared.parts[part][8 * j + 2 * t + i][offset + output_of<kOutputTiles>(o, 0, g)];
          function(*reinterpret_cast<float2*>(at), sums[o][j][i], sums[o][j][i + 2]);
        }
      }
    }
  };
  const auto store = [](float2& place, float& first, float& second) { place = {first, second}; };
  if constexpr (kParts < kAll) {
    if (own >= kParts && own < kAll) each(own - kParts, store);
    __syncthreads();
    if (own < kAll - kParts) {
      each(own, [](float2& place, float& first, float& second) { first += place.x, second += place.y; });
    }
    __syncthreads();
  }
  if (own < kParts) each(own, store);
}

// The sums of four neighbouring outputs of a row.
template <class S>
__device__ __forceinline__ float4 block_sum(const S& shared, int row, int output) {
  float4 sum = {};
#pragma unroll
  for (int part = 0; part < S::kParts; ++part) {
    add(sum, *reinterpret_cast<const float4*>(&shared.parts[part][row][output]));
  }
  return sum;
}

// Which outputs and which slice of k are this block's. Computed where it is asked for: registers are short in between.
struct Place {
  int in_n, slice;
};
__device__ __forceinline__ Place place_of_block(const DecodeProblem& p) {
  const int block = here(blockIdx.x);
  if (p.slices == 1) return {block, 0};  // without a division, which takes as long as a trip to a cache
  return {block / p.slices, block % p.slices};
}

// What one block does. Grid: blocks of 16 kOutputTiles kGroups outputs, each as many times as there are slices of k.
// Threads: kWarps warps on the base, as many of each group, and `warps_beside` them; 8, 12 or 16 together, so that each
// quarter of a multiprocessor has as many. Rows: m <= 8 kRowTiles. x, weight and h are of type T, with rows of
// whole 16 bytes.
template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
__device__ __forceinline__ void decode_block(const DecodeProblem& p,
                                             Shared<kRowTiles, kOutputTiles, kGroups, kWarps, kBase>& shared) {
  static_assert(kWarps % kGroups == 0);
  using S = Shared<kRowTiles, kOutputTiles, kGroups, kWarps, kBase>;
  constexpr int kOutputs = S::kOutputs, kThreads = 32 * (kWarps + S::kBeside);
  constexpr int kPartsOfBase = kWarps / kGroups;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The groups' warps of one part of k are neighbours, and read the same x at about the same time.
  const int own = warp / kGroups, offset = warp % kGroups * 16 * kOutputTiles;
  const int blocks = gridDim.x;
  float sums[kOutputTiles][kRowTiles][4] = {};
  if (warp >= kWarps) {
    wait_for_kernel_before();
    // A number is on its way while the batch is looked at: it is all that the first piece of the shrink waits for.
    const uint32_t claimed = claim(p);
    if (warp == kWarps) {
      know_batch<kRowTiles>(p, shared);
      if constexpr (kGroups > 1) list_pages<kRowTiles>(p, place_of_block(p).slice, 0, shared);
    }
    if constexpr (kGroups > 1) meet<kBesides>(32 * S::kBeside);
    arrive<kKnown>(kThreads);
    if (shared.pages) {
      if constexpr (kGroups > 1) {
        const int listed = min(shared.own_pages, S::kListed);
        copy_first_batches<kWarps>(p, place_of_block(p).in_n * kOutputs, listed, shared);
      }
      if constexpr (kGroups == 1) prefetch_expand(p, place_of_block(p).in_n * kOutputs, shared);
      shrink_claims<T, kRowTiles, false>(p, claimed, blocks, shared);
      if (warp == kWarps) {
        if (lane == 0) set_flag(&shared.exhausted);
        if constexpr (kGroups == 1) stage_expand(p, place_of_block(p).in_n * kOutputs, shared);
        if (lane == 0) wait_for(p.counters + kDone, shared.pages * counts_of_page(p));
        __syncwarp();
      }
      if constexpr (kGroups > 1) {
        meet<kBesides>(32 * S::kBeside);
        const Place at = place_of_block(p);
        expand_listed<T, kRowTiles, kOutputTiles, kWarps>(p, at.in_n * kOutputs, offset, own - kPartsOfBase, at.slice,
                                                          shared, sums);
      }
    }
  } else {
    if constexpr (kBase) {
      const Place at = place_of_block(p);
      base_sums<T, kRowTiles, kOutputTiles, S::kAhead>(p, at.in_n * kOutputs + offset, at.slice * kPartsOfBase + own,
                                                       p.slices * kPartsOfBase, shared.weights[warp], sums);
    } else {
      wait_for_kernel_before();
    }
    let_next_kernel_begin();  // all blocks of this one are running, and leave soon
    meet<kKnown>(kThreads);
    // Where rows differ there may be more to shrink than the warps beside these have done by now.
    const int exhausted = lane == 0 ? read_flag(&shared.exhausted) : 0;
    if (shared.pages && !__shfl_sync(0xffffffff, exhausted, 0)) {
      shrink_claims<T, kRowTiles, kBase>(p, claim(p), blocks, shared);
    }
  }
  __syncthreads();
  if constexpr (kGroups == 1) {
    const Place at = place_of_block(p);
    const int part = at.slice * S::kAll + own, parts = p.slices * S::kAll;
    if (own < S::kAll) {
      expand_sums<T, kRowTiles, kOutputTiles>(p, at.in_n * kOutputs, offset, part, parts, shared, sums);
    }
  }
  share_sums<kRowTiles, kOutputTiles>(shared, offset, own, sums);
  __syncthreads();
  if (warp == kWarps && lane == 0) {
    // Seen. All claims of this block were taken before the barriers above, and the last block to say so finds all
    // taken. Here, where no one waits for it.
    const uint32_t bound = shared.pages * counts_of_page(p) + blocks - 1;
    if (increment_is_last(p.counters + kDone, bound)) p.counters[kClaimed] = 0;
  }
  const auto [place_in_n, slice] = place_of_block(p);
  const int first = place_in_n * kOutputs;
  // Four outputs of a row at a time.
  constexpr int kFours = kOutputs / 4;
  const int64_t block_size = static_cast<int64_t>(p.m) * kOutputs;
  const int64_t slice_size = block_size * (blocks / p.slices);
  float* const partial = p.slice_partial + place_in_n * block_size;
  if (p.slices > 1) {
    // As the shrink's: whoever comes last adds up all slices, in their order. The barrier hands on to thread 0 what the
    // others have stored, and its count releases it; what it acquires the next barrier hands to all.
    for (int i = threadIdx.x; i < p.m * kFours; i += kThreads) {
      __stcg(reinterpret_cast<float4*>(partial + slice * slice_size + 4 * i),
             block_sum(shared, i / kFours, i % kFours * 4));
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      const uint32_t bound = p.slices - 1;
      uint32_t* const arrivals = p.counters + kArrivals + static_cast<int64_t>(p.m) * p.list_length;
      shared.last = increment_is_last(arrivals + place_in_n, bound);
    }
    __syncthreads();
    if (!shared.last) return;
  }
  T* const y = static_cast<T*>(p.y);
  for (int i = threadIdx.x; i < p.m * kFours; i += kThreads) {
    const int row = i / kFours, output = first + i % kFours * 4;
    float4 sum = {};
    if (p.slices > 1) {
#pragma unroll 4
      for (int other = 0; other < p.slices; ++other) {
        add(sum, __ldcg(reinterpret_cast<const float4*>(partial + other * slice_size + 4 * i)));
      }
    } else {
      sum = block_sum(shared, row, output - first);
    }
    if (!kBase && shared.slot[row] < 0) continue;
    const float four[4] = {sum.x, sum.y, sum.z, sum.w};
    T* const place_in_y = y + row * p.y_stride + output;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (output + j >= p.n) continue;
      float value = four[j];
      if constexpr (kBase) {
        if (p.bias) value += to_float(static_cast<const T*>(p.bias)[output + j]);
      } else {
        value += to_float(place_in_y[j]);
      }
      place_in_y[j] = from_float<T>(value);
    }
  }
}

#if defined(__CUDACC__)
template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
__global__ void __launch_bounds__(32 * (kWarps + warps_beside(kRowTiles, kGroups)),
                                  resident_blocks(kRowTiles, kOutputTiles, kWarps))
    decode_kernel(const __grid_constant__ DecodeProblem p) {
  extern __shared__ uint4 memory[];  // more than a block has unasked
  auto& shared = *reinterpret_cast<Shared<kRowTiles, kOutputTiles, kGroups, kWarps, kBase>*>(memory);
  // For older targets of a build there is nothing here; dts_fast/gpu.py does not ask for it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  decode_block<T, kRowTiles, kOutputTiles, kGroups, kWarps, kBase>(p, shared);
#endif
}
#endif

}  // namespace dts_fast::cuda
