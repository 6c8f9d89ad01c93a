// One launch for a personalised linear of few rows: y = x W^T + bias + ((x V) * s) U^T, each row with its own slot.
//
// Decoding is bound by the bytes of W, and a second launch would cost as much as the delta. So every block streams the
// weights of a few outputs, its warps each a part of K, straight into the registers of matrix instructions (W is read
// once, so shared memory would only be a detour). Beside them one more warp finds the batch's distinct slots, shrinks,
// fetches the block's part of U, and waits for h; the expand is then further steps on the accumulators of the base.
//
// How blocks agree, without a deadlock whatever the grid, the occupancy, and the order in which blocks run: the shrink
// is cut into claims (a page, a part of K), and a block takes claims until none is left. Only then does it wait for
// those that others hold, and who holds one is running and waits for nothing. Nobody resets anything before a launch:
// kDone is incremented once for every claim and once by every block that has seen the end, and wraps around to 0 there;
// whoever wraps it around sets kClaimed to 0, which no one uses any more.
//
// Sums do not depend on timing: partial results are added up in the order of k, by whoever comes last. Nor on what the
// other rows use: a page is added by a warp that its slot and its place in the list choose.
#pragma once

#include <type_traits>

#include "decode.h"
#include "fragment.cuh"
#if defined(__CUDACC__)
#include "mma.cuh"
#endif

namespace dts_fast::cuda {

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
  // The rows of which `predicate`, asked by the lane that speaks for a half's, is true.
  template <class Predicate>
  static __device__ __forceinline__ Set where(Predicate&& predicate) {
    Set set = __ballot_sync(0xffffffff, predicate(0));
    if constexpr (kHalves == 2) set |= static_cast<Set>(__ballot_sync(0xffffffff, predicate(1))) << 32;
    return set;
  }
};

// A block's shared memory.
template <int kRowTiles, int kOutputTiles, int kGroups, int kWarps>
struct Shared {
  using R = Rows<kRowTiles>;
  static constexpr int kOutputs = 16 * kOutputTiles * kGroups;
  static constexpr int kStaged = kGroups > 1 ? 16 : 32;  // pages whose part of U is fetched before h is there
  // Parts of k whose sums are here at a time: all, or half of them where that would be more than a block may have.
  static constexpr int kAll = kWarps / kGroups;
  static constexpr bool kLarge = kAll * 8 * kRowTiles * (kOutputs + 4) > 10000;
  static constexpr int kParts = kLarge ? (kAll + 1) / 2 : kAll;
  alignas(16) float parts[kParts][8 * kRowTiles][kOutputs + 4];
  uint32_t words[kStaged][kOutputs];
  Table tables[kStaged];
  // By row; where a row is the first with its slot: its pages are number `begin` .. `begin + count` of the batch's.
  int slot[32 * R::kHalves], begin[32 * R::kHalves], count[32 * R::kHalves];
  typename R::Set same[32 * R::kHalves];  // rows with its slot
  int pages;                              // of all distinct slots
  int exhausted;                          // whether all claims have been taken
  int last;                               // whether this block is the last slice of its outputs to end

  __device__ __forceinline__ bool holds(int row, int number) const {
    return number >= begin[row] && number < begin[row] + count[row];
  }
};

// The block's barriers: all of it, and what is known about the batch.
constexpr int kKnown = 1;

__device__ __forceinline__ void add(float4& sum, const float4& part) {
  sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
}

// Four levels over the largest, which goes into h: float16 holds them whatever their size. Returns that largest. What
// is no finite number goes into h alone, which only the rows of its slot have; in the table it would reach all of them.
template <class T>
__device__ __forceinline__ float load_table(const uint32_t* page, int levels, Table& table) {
  constexpr float kSmallest = 1.17549435e-38f;  // below, the reciprocal is no finite number
  const float4 v = __ldg(reinterpret_cast<const float4*>(page + levels));
  const float all = fabsf(v.x) + fabsf(v.y) + fabsf(v.z) + fabsf(v.w);
  const bool finite = all <= 3.0e38f;
  const float largest = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  const bool usable = finite && largest >= kSmallest;
  const float inverse = usable ? 1.0f / largest : 0.0f;
  const float x = finite ? v.x : 0.0f, y = finite ? v.y : 0.0f, z = finite ? v.z : 0.0f, w = finite ? v.w : 0.0f;
  table = {pack<T>(x * inverse, y * inverse), pack<T>(z * inverse, w * inverse)};
  return usable ? largest : finite ? 0.0f : all;
}

// x V of one page for the rows of one slot, over the chunks [begin, end) of k, by one warp: sums [16 ranks, 8 rows].
template <class T, int kRowTiles>
__device__ __forceinline__ void shrink_page(const DecodeProblem& p, const uint32_t* page, const Table& table,
                                            typename Rows<kRowTiles>::Set same, int begin, int end,
                                            float (&sums)[kRowTiles][4]) {
  using R = Rows<kRowTiles>;
  // Codes come from memory: as many as registers hold are on their way at once, for one tile of rows a whole split's. x
  // comes from a cache, in smaller parts.
  constexpr int kCodes = kSplit / kChunk / kRowTiles, kInputs = kRowTiles < 4 ? 4 / kRowTiles : 1;
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int tiles = (p.k + kTileWords - 1) / kTileWords;
  bool mine[kRowTiles];
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) mine[j] = R::has(same, 8 * j + g);
  const T* const x = static_cast<const T*>(p.x);
  for (int first = begin; first < end; first += kCodes) {
    uint32_t words[kCodes][2] = {};
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (first + i < end && 2 * (first + i) + (t >> 1) < tiles) {
        words[i][0] = __ldg(page + shrink_word(first + i, t, g));
        words[i][1] = __ldg(page + shrink_word(first + i, t, g + 8));
      }
    }
#pragma unroll
    for (int part = 0; part < kCodes; part += kInputs) {
      uint4 xs[kInputs][kRowTiles] = {};
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
        const int chunk = first + part + i, k = chunk * kChunk + 8 * t;
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          if (chunk < end && k < p.k && mine[j]) {
            xs[i][j] = load_result(reinterpret_cast<const uint4*>(x + (8 * j + g) * p.x_stride + k));
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const Pairs top = decode(table, shrink_codes(words[part + i][0], t, step));
          const Pairs bottom = decode(table, shrink_codes(words[part + i][1], t, step));
#pragma unroll
          for (int j = 0; j < kRowTiles; ++j) {
            if (kRowTiles >= 4 && !R::meets(same, j)) continue;
            mma<T>(sums[j], top.first, bottom.first, top.second, bottom.second, step ? xs[i][j].z : xs[i][j].x,
                   step ? xs[i][j].w : xs[i][j].y);
          }
        }
      }
    }
  }
}

// One split of one page of the slot of row `first`, by one warp.
template <class T, int kRowTiles>
__device__ __forceinline__ void shrink_split(const DecodeProblem& p, int slot, typename Rows<kRowTiles>::Set same,
                                             int first, int place_in_list, int split) {
  using R = Rows<kRowTiles>;
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int64_t entry = static_cast<int64_t>(slot) * p.list_length + place_in_list;
  const uint32_t* const page = p.pages + __ldg(p.slot_pages + entry) * p.page_words;
  const float* const s = reinterpret_cast<const float*>(page + kScales);
  const float weight = __ldg(p.slot_weights + entry), s0 = __ldg(s + g), s1 = __ldg(s + g + 8);
  Table v, u;
  const float scale = weight * load_table<T>(page, kULevels, u) * load_table<T>(page, kVLevels, v);
  const int chunks = (p.k + kChunk - 1) / kChunk, span = (chunks + p.splits - 1) / p.splits;
  float sums[kRowTiles][4] = {};
  shrink_page<T, kRowTiles>(p, page, v, same, split * span, min((split + 1) * span, chunks), sums);
  const float scales[2] = {scale * s0, scale * s1};
  const int64_t width = static_cast<int64_t>(kRanks) * p.list_length;
  T* const h = static_cast<T*>(p.h);
#pragma unroll
  for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 8 * j + 2 * t + (i & 1), rank = g + 8 * (i >> 1);
      if (!R::has(same, row)) continue;
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
  // Whoever comes last adds up all splits, in their order. What the warp has stored is released with lane 0's count,
  // and what others have is acquired with it.
  __syncwarp();
  uint32_t arrived = 0;
  if (lane == 0)
    arrived = fetch_increment(p.counters + kArrivals + first * p.list_length + place_in_list, p.splits - 1);
  if (__shfl_sync(0xffffffff, arrived, 0) != static_cast<uint32_t>(p.splits - 1)) return;
  __syncwarp();
  // Four columns a lane, eight rows at a time: few trips to memory, as all blocks may be waiting for this.
  for (int row = lane >> 2; row < p.m; row += 8) {
    if (!R::has(same, row)) continue;
    const int64_t at = row * width + place_in_list * kRanks + 4 * (lane & 3);
    float4 sum = {};
#pragma unroll 4
    for (int i = 0; i < p.splits; ++i) {
      const float4 part =
          __ldcg(reinterpret_cast<const float4*>(p.partial + static_cast<int64_t>(i) * p.m * width + at));
      add(sum, part);
    }
    *reinterpret_cast<uint2*>(h + at) = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
  }
}

// Shrinks what no one else has claimed, by one warp, until nothing is left.
template <class T, int kRowTiles, class S>
__device__ __forceinline__ void shrink_claims(const DecodeProblem& p, int blocks, S& shared) {
  using R = Rows<kRowTiles>;
  const int lane = threadIdx.x & 31;
  const uint32_t claims = shared.pages * p.splits;
  while (true) {
    uint32_t claim = 0;
    if (lane == 0) claim = fetch_add(p.counters + kClaimed);
    claim = __shfl_sync(0xffffffff, claim, 0);
    if (claim >= claims) break;
    // Neighbours are the splits of one page, which so end at about the same time.
    const int number = static_cast<int>(claim) / p.splits, split = static_cast<int>(claim) % p.splits;
    const int first = R::first(R::where([&](int half) { return shared.holds(lane + 32 * half, number); }));
    shrink_split<T, kRowTiles>(p, shared.slot[first], shared.same[first], first, number - shared.begin[first], split);
    __syncwarp();
    if (lane == 0) increment_release(p.counters + kDone, claims + blocks - 1);
  }
}

// What the batch consists of: the first row of each distinct slot, and its pages. By one warp, the same in all blocks.
template <int kRowTiles, class S>
__device__ __forceinline__ void know_batch(const DecodeProblem& p, S& shared) {
  using R = Rows<kRowTiles>;
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < R::kHalves; ++half) {
    const int row = lane + 32 * half;
    shared.slot[row] = row < p.m ? load_result(p.slot_ids + row) : -1;
  }
  __syncwarp();
  int before = 0;  // pages of the rows of the half before
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
    shared.same[row] = same;
    shared.begin[row] = end - count;
    shared.count[row] = count;
    before = __shfl_sync(0xffffffff, end, 31);
  }
  if (lane == 31) {
    shared.pages = before;
    shared.exhausted = 0;
  }
  __syncwarp();
}

// The block's words of U, and its tables, for the first of the batch's pages: from memory before h is there.
template <class T, int kRowTiles, class S>
__device__ __forceinline__ void stage_expand(const DecodeProblem& p, int first, S& shared) {
  using R = Rows<kRowTiles>;
  constexpr int kAtOnce = 4, kOutputs = S::kOutputs, kWords = (kOutputs + 31) / 32;
  const int lane = threadIdx.x & 31;
  const int staged = min(shared.pages, S::kStaged);
  for (int q = 0; q < staged; q += kAtOnce) {
    const uint32_t* page[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int number = min(q + i, staged - 1);
      const int row = R::first(R::where([&](int half) { return shared.holds(lane + 32 * half, number); }));
      const int64_t entry = static_cast<int64_t>(shared.slot[row]) * p.list_length + number - shared.begin[row];
      page[i] = p.pages + __ldg(p.slot_pages + entry) * p.page_words;
    }
    uint32_t words[kAtOnce][kWords];
    Table tables[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int output = 32 * w + lane;
        words[i][w] = output < kOutputs && first + output < p.n ? __ldg(page[i] + p.u_tiles + first + output) : 0;
      }
      load_table<T>(page[i], kULevels, tables[i]);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (q + i >= staged) continue;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (32 * w + lane < kOutputs) shared.words[q + i][32 * w + lane] = words[i][w];
      }
      if (lane == 0) shared.tables[q + i] = tables[i];
    }
  }
}

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

// Which pages of the batch a warp adds: those of every distinct slot once, dealt out to the warps of all slices by slot
// and place, so that a row's sums are added in the same order whatever the other rows use.
template <int kRowTiles, class S>
struct PagesOfWarp {
  using R = Rows<kRowTiles>;
  const S& shared;
  typename R::Set left;  // rows that are the first with their slots, and not done
  int part, parts;
  int row = 0, at = 0, count = 0;  // the next page is number `at` of the slot of row `row`

  __device__ __forceinline__ PagesOfWarp(const S& all, int lane, int own, int of)
      : shared(all), left(R::where([&](int half) { return all.count[lane + 32 * half] > 0; })), part(own), parts(of) {
    begin();
  }
  __device__ __forceinline__ bool done() const { return !left; }
  __device__ __forceinline__ void advance() {
    at += parts;
    if (at < count) return;
    left &= left - 1;
    begin();
  }

 private:
  __device__ __forceinline__ void begin() {
    for (; left; left &= left - 1) {
      row = R::first(left);
      count = shared.count[row];
      at = (part + parts - shared.slot[row] % parts) % parts;
      if (at < count) return;
    }
  }
};

// Adds h U^T for the warp's outputs, `offset` of the block's. Several pages are on their way at once: beyond those that are staged each is a
// chain of trips to memory (its number, its codes).
template <class T, int kRowTiles, int kOutputTiles, class S>
__device__ __forceinline__ void expand_sums(const DecodeProblem& p, int first, int offset, int part, int parts,
                                            const S& shared, float (&sums)[kOutputTiles][kRowTiles][4]) {
  using R = Rows<kRowTiles>;
  constexpr int kAtOnce = kRowTiles >= 4 ? 2 : 4;
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const int64_t width = static_cast<int64_t>(kRanks) * p.list_length;
  PagesOfWarp<kRowTiles, S> next(shared, lane, part, parts);
  while (!next.done()) {
    uint2 hs[kAtOnce][kRowTiles] = {};
    uint32_t words[kAtOnce][kOutputTiles][2] = {};
    Table tables[kAtOnce] = {};
    typename R::Set users[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (next.done()) continue;  // the rest adds zeros
      const typename R::Set same = users[i] = shared.same[next.row];
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (R::has(same, 8 * j + g)) {
          const T* const h = static_cast<const T*>(p.h) + (8 * j + g) * width + next.at * kRanks + 4 * t;
          hs[i][j] = __ldcg(reinterpret_cast<const uint2*>(h));  // written in this launch: not from this level's cache
        }
      }
      const int number = shared.begin[next.row] + next.at;
      const bool staged = number < S::kStaged;
      const uint32_t* page = nullptr;
      if (staged) {
        tables[i] = shared.tables[number];
      } else {
        const int64_t entry = static_cast<int64_t>(shared.slot[next.row]) * p.list_length + next.at;
        page = p.pages + __ldg(p.slot_pages + entry) * p.page_words;
        load_table<T>(page, kULevels, tables[i]);
      }
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int output = offset + 16 * o + 8 * half + g;
          words[i][o][half] = staged                 ? shared.words[number][output]
                              : first + output < p.n ? __ldg(page + p.u_tiles + first + output)
                                                     : 0;
        }
      }
      next.advance();
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int o = 0; o < kOutputTiles; ++o) {
        const Pairs top = decode(tables[i], expand_codes(words[i][o][0], t));
        const Pairs bottom = decode(tables[i], expand_codes(words[i][o][1], t));
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          if (kRowTiles >= 4 && !R::meets(users[i], j)) continue;
          mma<T>(sums[o][j], top.first, bottom.first, top.second, bottom.second, hs[i][j].x, hs[i][j].y);
        }
      }
    }
  }
}

// A block's sums over all of its warps, in their order: afterwards in shared.parts, which `block_sum` adds up.
template <int kRowTiles, int kOutputTiles, class S>
__device__ __forceinline__ void share_sums(S& shared, int offset, int own,
                                           float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kParts = S::kParts, kAll = S::kAll;
  const int lane = threadIdx.x & 31, t = place(lane), g = quad(lane);
  const auto each = [&](int part, auto&& function) {
#pragma unroll
    for (int o = 0; o < kOutputTiles; ++o) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          function(shared.parts[part][8 * j + 2 * t + (i & 1)][offset + 16 * o + g + 8 * (i >> 1)], sums[o][j][i]);
        }
      }
    }
  };
  const auto store = [](float& place, float& sum) { place = sum; };
  if constexpr (kParts < kAll) {
    if (own >= kParts && own < kAll) each(own - kParts, store);
    __syncthreads();
    if (own < kAll - kParts) each(own, [](float& place, float& sum) { sum += place; });
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

// What one block does. Grid: blocks of 16 kOutputTiles kGroups outputs, each as many times as there are slices of k.
// Threads: kWarps warps on the base, as many of each group, and one beside them. In one group 8 or 16 together, so that
// each quarter of a multiprocessor has two or four. Rows: m <= 8 kRowTiles. x, weight and h are of type T, with rows of
// whole 16 bytes.
template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
__device__ __forceinline__ void decode_block(const DecodeProblem& p,
                                             Shared<kRowTiles, kOutputTiles, kGroups, kWarps>& shared) {
  static_assert(kWarps % kGroups == 0);
  constexpr int kOutputs = 16 * kOutputTiles * kGroups, kThreads = 32 * (kWarps + 1), kParts = kWarps / kGroups;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  // The groups' warps of one part of k are neighbours, and read the same x at about the same time. (The warp beside
  // them has a part that there is not.)
  const int own = warp / kGroups, offset = warp % kGroups * 16 * kOutputTiles;
  const int place_in_n = blockIdx.x / p.slices, slice = blockIdx.x % p.slices;
  const int first = place_in_n * kOutputs, blocks = gridDim.x;
  float sums[kOutputTiles][kRowTiles][4] = {};
  if (warp == kWarps || !kBase) wait_for_kernel_before();
  if (warp == kWarps) {
    know_batch<kRowTiles>(p, shared);
    arrive<kKnown>(kThreads);
    if (shared.pages) {
      shrink_claims<T, kRowTiles>(p, blocks, shared);
      if (lane == 0) set_flag(&shared.exhausted);
      stage_expand<T, kRowTiles>(p, first, shared);
      const uint32_t claims = shared.pages * p.splits;
      if (lane == 0) wait_for(p.counters + kDone, claims);
    }
  } else {
    if constexpr (kBase) {
      base_sums<T, kRowTiles, kOutputTiles, kWarps>(p, first + offset, slice * kParts + own, p.slices * kParts, sums);
    }
    let_next_kernel_begin();  // all blocks of this one are running, and leave soon
    meet<kKnown>(kThreads);
    // Where rows differ there may be more to shrink than one warp of each block has done by now.
    const int exhausted = lane == 0 ? read_flag(&shared.exhausted) : 0;
    if (shared.pages && !__shfl_sync(0xffffffff, exhausted, 0)) shrink_claims<T, kRowTiles>(p, blocks, shared);
  }
  __syncthreads();
  if (warp < kWarps) {
    expand_sums<T, kRowTiles, kOutputTiles>(p, first, offset, slice * kParts + own, p.slices * kParts, shared, sums);
  }
  share_sums<kRowTiles, kOutputTiles>(shared, offset, own, sums);
  __syncthreads();
  if (warp == kWarps && shared.pages && lane == 0) {
    // Seen. All claims of this block were taken before the barriers above, and the last block to say so finds all
    // taken. Here, where no one waits for it.
    const uint32_t bound = shared.pages * p.splits + blocks - 1;
    if (fetch_increment(p.counters + kDone, bound) == bound) p.counters[kClaimed] = 0;
  }
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
      shared.last = fetch_increment(arrivals + place_in_n, bound) == bound;
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
__global__ void __launch_bounds__(32 * (kWarps + 1), resident_blocks(kRowTiles, kOutputTiles, kWarps))
    decode_kernel(const __grid_constant__ DecodeProblem p) {
  __shared__ Shared<kRowTiles, kOutputTiles, kGroups, kWarps> shared;
  // For older targets of a build there is nothing here; dts_fast/gpu.py does not ask for it.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  decode_block<T, kRowTiles, kOutputTiles, kGroups, kWarps, kBase>(p, shared);
#endif
}
#endif

}  // namespace dts_fast::cuda
