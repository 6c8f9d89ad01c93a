// What a block knows about its batch and keeps in shared memory: the distinct slots, their pages, its part of U.
#pragma once

#include <type_traits>

#include "decode.h"
#include "fragment.cuh"
#if defined(__CUDACC__)
#include "mma.cuh"
#endif

namespace dts_fast::cuda {

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

// Sets of rows, as bits; a lane of a warp speaks for one row, or for two, 32 apart.
template <int kRowTiles>
struct Rows {
  static constexpr int kHalves = kRowTiles > 4 ? 2 : 1;
  using Set = std::conditional_t<kHalves == 2, uint64_t, uint32_t>;

  static __device__ __forceinline__ bool has(Set set, int row) { return set >> row & 1; }
  // Whether any of the 8 rows of a tile is in it.
  static __device__ __forceinline__ bool meets(Set set, int tile) { return (set >> (8 * tile) & 0xff) != 0; }
  static __device__ __forceinline__ int first(Set set) {
    if constexpr (kHalves == 2) {
      return __ffsll(static_cast<long long>(set)) - 1;
    } else {
      return __ffs(static_cast<int>(set)) - 1;
    }
  }
  // What a lane has.
  static __device__ __forceinline__ Set of_lane(Set set, int lane) {
    Set all = __shfl_sync(0xffffffff, static_cast<uint32_t>(set), lane);
    if constexpr (kHalves == 2) {
      all |= static_cast<Set>(__shfl_sync(0xffffffff, static_cast<uint32_t>(set >> 32), lane)) << 32;
    }
    return all;
  }
  // The rows of which `predicate`, asked by the lane that speaks for a half's, is true.
  template <class Predicate>
  static __device__ __forceinline__ Set where(Predicate&& predicate) {
    Set set = __ballot_sync(0xffffffff, predicate(0));
    if constexpr (kHalves == 2) set |= static_cast<Set>(__ballot_sync(0xffffffff, predicate(1))) << 32;
    return set;
  }
};

// What a block keeps for its expand. With one group of warps: its part of U for the first of the batch's pages, fetched
// before h is there.
template <int kRowTiles, int kOutputs>
struct ForExpand {
  static constexpr int kStaged = 32;
  static constexpr int kNumbered = 512;
  alignas(16) uint32_t words[kStaged][kOutputs];
  float4 levels[kStaged];
};

// With several groups, where rows are many and so perhaps adapters: batches of pages on their way, and h.
template <int kRowTiles, int kOutputs>
struct ForExpandOfMany {
  static constexpr int kPages = 8;  // of a batch
  static constexpr int kBatches = kRowTiles > 4 ? 3 : 4;
  static constexpr int kListed = kRowTiles > 4 ? 256 : 512;
  static constexpr int kNumbered = kListed;
  static constexpr int kNear = 16;  // pages that a slot of the batch may have for h to be brought here
  uint4 words[kBatches][kPages][kOutputs / 4];
  float4 levels[kBatches][kPages];
  alignas(16) uint2 h[8 * kRowTiles][4 * kNear + 4];  // 32 bytes more than it has: rows begin in different banks
  // The next of the block's pages: the first row of the slot with the place in its list, and the page.
  struct Listed {
    uint32_t row_and_place;
    int page;
  } listed[kListed];
  int own_pages;  // all of the block's
};

// A block's shared memory.
template <int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
struct Shared : std::conditional_t<(kGroups > 1), ForExpandOfMany<kRowTiles, 16 * kOutputTiles * kGroups>,
                                   ForExpand<kRowTiles, 16 * kOutputTiles * kGroups>> {
  using R = Rows<kRowTiles>;
  static constexpr int kOutputs = 16 * kOutputTiles * kGroups;
  static constexpr int kBeside = warps_beside(kRowTiles, kGroups);
  static constexpr int kAhead = chunks_ahead(kRowTiles, kOutputTiles, kGroups, kWarps);
  // Parts of the block's sums: each warp's of a group, or each group's of warps; in blocks of several groups the
  // expand's, too. As many are here at a time as fit where the weights were.
  static constexpr int kOfExpand = kGroups > 1 ? kBeside / kGroups : 0;
  static constexpr int kAll = kWarps / kGroups + kOfExpand;
  // (At 32 rows of several groups all do, 12672 floats.)
  static constexpr bool kLarge = kAll * 8 * kRowTiles * (kOutputs + 4) > 13000;
  static constexpr int kParts = kLarge ? (kAll + 1) / 2 : kAll;
  union {
    // Each thread's own, on their way: chunks of k, both halves of a tile of outputs.
    uint4 weights[kBase ? kWarps : 1][kAhead][2 * kOutputTiles][32];
    float parts[kParts][8 * kRowTiles][kOutputs + 4];
  };
  int page[Shared::kNumbered];  // of the first of the batch's: known without another trip to memory
  // By row; where a row is the first with its slot: its pages are number `begin` .. `begin + count` of the batch's.
  int slot[32 * R::kHalves], begin[32 * R::kHalves], count[32 * R::kHalves];
  typename R::Set same[32 * R::kHalves];  // rows with its slot
  int pages, most;                        // of all distinct slots, and of one of them
  int exhausted;                          // whether all claims have been taken
  int last;                               // whether this block is the last slice of its outputs to end

  __device__ __forceinline__ bool holds(int row, int number) const {
    return number >= begin[row] && number < begin[row] + count[row];
  }
  // Where page number `number` of the batch lies, which is number `place` of the slot of `row`.
  __device__ __forceinline__ const uint32_t* page_at(const DecodeProblem& p, int number, int row, int place) const {
    const int index = number < Shared::kNumbered
                          ? page[number]
                          : __ldg(p.slot_pages + static_cast<int64_t>(slot[row]) * p.list_length + place);
    return p.pages + index * p.page_words;
  }
};

// A page's four levels of one factor.
__device__ __forceinline__ float4 load_levels(const uint32_t* page, int levels) {
  return __ldg(reinterpret_cast<const float4*>(page + levels));
}

// Four levels over the largest, which goes into h: float16 holds them whatever their size. What is no finite number
// goes into h alone, which only the rows of its slot have; in the table it would reach all of them.
struct Scaled {
  float largest;
  float4 levels;
};
__device__ __forceinline__ Scaled scaled(const float4& v) {
  constexpr float kSmallest = 1.17549435e-38f;  // below, the reciprocal is no finite number
  const float all = fabsf(v.x) + fabsf(v.y) + fabsf(v.z) + fabsf(v.w);
  const bool finite = all <= 3.0e38f;
  const float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  const bool usable = finite && largest >= kSmallest;
  const float inverse = usable ? reciprocal(largest) : 0.0f;
  const auto over = [&](float level) { return finite ? level * inverse : 0.0f; };
  return {usable ? largest : finite ? 0.0f : all, {over(v.x), over(v.y), over(v.z), over(v.w)}};
}
template <class T>
__device__ __forceinline__ Table table_of(const float4& levels) {
  const float4 v = scaled(levels).levels;
  return {pack<T>(v.x, v.y), pack<T>(v.z, v.w)};
}

// What the batch consists of: the first row of each distinct slot, and its pages. By one warp, the same in all blocks.
template <int kRowTiles, class S>
__device__ __forceinline__ void know_batch(const DecodeProblem& p, S& shared) {
  using R = Rows<kRowTiles>;
  constexpr int kAtOnce = 16;  // a trip to memory for each 256 ranks of an adapter
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < R::kHalves; ++half) {
    const int row = lane + 32 * half;
    shared.slot[row] = row < p.m ? load_result(p.slot_ids + row) : -1;
  }
  __syncwarp();
  int before = 0, most = 0;  // pages of the rows of the half before; the most of one
#pragma unroll
  for (int half = 0; half < R::kHalves; ++half) {
    const int row = lane + 32 * half, slot = shared.slot[row];
    typename R::Set same = 0;
    if constexpr (R::kHalves == 1) {
      same = __match_any_sync(0xffffffff, slot);
    } else {
      for (int i = 0; i < 32 * R::kHalves; ++i) same |= static_cast<typename R::Set>(shared.slot[i] == slot) << i;
    }
    int count = 0;
    if (slot >= 0 && R::first(same) == row) {
      const int32_t* const list = p.slot_pages + static_cast<int64_t>(slot) * p.list_length;
      bool more = true;
      for (int l = 0; more && l < p.list_length; l += kAtOnce) {
        int index[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) index[i] = l + i < p.list_length ? __ldg(list + l + i) : -1;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          more = more && index[i] >= 0;
          count += more;
        }
      }
    }
    int end = count;  // of this row's pages, the others' before them
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int others = __shfl_sync(0xffffffff, end, max(lane - distance, 0));
      if (lane >= distance) end += others;
    }
    end += before;
    most = max(most, count);
    shared.same[row] = same;
    shared.begin[row] = end - count;
    shared.count[row] = count;
    before = __shfl_sync(0xffffffff, end, 31);
    const int32_t* const list = p.slot_pages + static_cast<int64_t>(slot) * p.list_length;
#pragma unroll 4
    for (int i = 0; i < min(count, S::kNumbered - (end - count)); ++i) shared.page[end - count + i] = __ldg(list + i);
  }
#pragma unroll
  for (int distance = 16; distance; distance /= 2) most = max(most, __shfl_sync(0xffffffff, most, lane ^ distance));
  if (lane == 31) {
    shared.pages = before;
    shared.most = most;
    shared.exhausted = 0;
  }
  __syncwarp();
}

}  // namespace dts_fast::cuda
