// h^T = V^T x^T, cut into claims that warps of all blocks take: a page, a part of k.
#pragma once

#include "batch.cuh"

namespace dts_fast::cuda {

// x V of one page for some of 8 kTiles rows, the first of them at `x`, over the chunks [begin, end) of k, by one warp:
// sums [16 ranks, 8 rows].
template <class T, int kTiles>
__device__ __forceinline__ void shrink_page(const DecodeProblem& p, const uint32_t* page, const float4& levels,
                                            const T* x, uint32_t rows, int begin, int end, float (&sums)[kTiles][4]) {
  // Codes come from memory, as many at once as registers hold. x comes from a cache, some of it while others are
  // multiplied where registers allow that.
  constexpr int kCodes = kSplit / kChunk / kTiles, kInputs = kTiles < 4 ? 4 : 1;
  constexpr int kStages = kCodes / kInputs, kBuffers = kTiles == 2 ? 1 : 2;
  const int lane = here(threadIdx.x & 31), t = place(lane), g = quad(lane);
  const int tiles = (here(p.k) + kTileWords - 1) / kTileWords;
  // How many chunks from `begin` on the thread has codes of, and elements of x in each of its rows: beyond, zeros.
  const int chunks_of_codes = min(end, (tiles - (t >> 1) + 1) / 2) - begin;
  const int chunks_of_x = min(end, (here(p.k) - 8 * t + kChunk - 1) / kChunk) - begin;
  const uint32_t* codes = page + shrink_word(t, g) + static_cast<int64_t>(begin) * kChunkWords;
  const uint32_t mine = rows >> g;  // every eighth
  const T* inputs[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) inputs[j] = x + (8 * j + g) * p.x_stride + begin * kChunk + 8 * t;
  uint4 xs[kBuffers][kInputs][kTiles];
  // Products that wait for each other take longer than anything else here: with one tile there are two chains of them.
  float others[kTiles][4] = {};
  const auto load_inputs = [&](int done, int stage) {
#pragma unroll
    for (int i = 0; i < kInputs; ++i) {
      const int ahead = stage * kInputs + i;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        const bool there = done + ahead < chunks_of_x && (mine >> (8 * j) & 1);
        xs[stage % kBuffers][i][j] = load_result(reinterpret_cast<const uint4*>(inputs[j] + ahead * kChunk), there);
      }
    }
  };
  for (int done = 0; begin + done < end; done += kCodes) {
    uint32_t words[kCodes][2] = {};
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
      if (done + i < chunks_of_codes) {
        words[i][0] = __ldg(codes + i * kChunkWords);
        words[i][1] = __ldg(codes + i * kChunkWords + 8);
      }
    }
    codes += kCodes * kChunkWords;
    if (kBuffers > 1) load_inputs(done, 0);
    const Table table = table_of<T>(levels);  // behind the loads of codes, whose way is as long
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage + kBuffers - 1 < kStages) load_inputs(done, stage + kBuffers - 1);
#pragma unroll
      for (int i = 0; i < kInputs; ++i) {
#pragma unroll
        for (int step = 0; step < 2; ++step) {
          const Pairs top = decode(table, shrink_codes(words[stage * kInputs + i][0], t, step));
          const Pairs bottom = decode(table, shrink_codes(words[stage * kInputs + i][1], t, step));
#pragma unroll
          for (int j = 0; j < kTiles; ++j) {
            const uint4 in = xs[stage % kBuffers][i][j];
            mma<T>(kTiles == 1 && step ? others[j] : sums[j], top.first, bottom.first, top.second, bottom.second,
                   step ? in.z : in.x, step ? in.w : in.y);
          }
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kTiles; ++j) inputs[j] += kCodes * kChunk;
  }
  if constexpr (kTiles == 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[0][i] += others[0][i];
  }
}

// How often a page is counted until its h can be used.
__device__ __forceinline__ uint32_t counts_of_page(const DecodeProblem& p) { return p.late ? p.splits : 1; }

// One split of page number `number` of the batch, which is of the slot of row `first`, by one warp. Returns whether it
// is to be counted: when it completes the page's h, or always (`counts_of_page`).
template <class T, int kRowTiles, bool kOtherSums, class S>
__device__ __forceinline__ bool shrink_split(const DecodeProblem& p, const S& shared, int number, int first,
                                             int split) {
  using R = Rows<kRowTiles>;
  const typename R::Set same = shared.same[first];
  const int place_in_list = number - shared.begin[first];
  const int lane = here(threadIdx.x & 31), t = place(lane), g = quad(lane);
  const uint32_t* const page = shared.page_at(p, number, first, place_in_list);
  const int64_t entry = static_cast<int64_t>(shared.slot[first]) * p.list_length + place_in_list;
  const float* const s = reinterpret_cast<const float*>(page + kScales);
  const float weight = __ldg(p.slot_weights + entry), s0 = __ldg(s + g), s1 = __ldg(s + g + 8);
  const float4 u = load_levels(page, kULevels), v = load_levels(page, kVLevels);
  const int chunks = (here(p.k) + kChunk - 1) / kChunk, span = (chunks + p.splits - 1) / p.splits;
  // Registers do not hold all of a split's codes, or a compiler does not use them so: those that are loaded later come
  // nearer meanwhile, 2 KiB.
  const uint32_t* const codes = page + kTiles + (split * span + lane / 2) * kChunkWords + lane % 2 * kTileWords;
  if (lane / 2 < min(span, chunks - split * span)) prefetch(codes), prefetch(codes + kTileWords / 2);
  const int64_t width = static_cast<int64_t>(kRanks) * here(p.list_length);
  T* const h = static_cast<T*>(p.h);
  // `rows` of so many tiles, the first of which begins at row `before`.
  const auto shrink_tiles = [&](auto tiles, uint32_t rows, int before) {
    constexpr int kOfThem = decltype(tiles)::value;
    float sums[kOfThem][4] = {};
    shrink_page<T, kOfThem>(p, page, v, static_cast<const T*>(p.x) + before * p.x_stride, rows, split * span,
                            min((split + 1) * span, chunks), sums);
    const float scale = weight * scaled(u).largest * scaled(v).largest;
    const float scales[2] = {scale * s0, scale * s1};
#pragma unroll
    for (int j = 0; j < kOfThem; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 8 * j + 2 * t + (i & 1), rank = g + 8 * (i >> 1);
        if (!(rows >> row & 1)) continue;
        const int64_t column = place_in_list * kRanks + place_in_h(rank), at = (before + row) * width + column;
        const float value = sums[j][i] * scales[i >> 1];
        if (p.splits == 1) {
          h[at] = from_float<T>(value);
        } else {
          __stcg(p.partial + static_cast<int64_t>(split) * p.m * width + at, value);
        }
      }
    }
  };
  constexpr int kAtOnce = kRowTiles < 4 ? kRowTiles : 4;
  const auto shrink_rows = [&](uint32_t rows, int before) {
    // Where rows differ an adapter often has one: then the other tiles' share of the work is left out. Who has other
    // sums in registers takes one tile at a time.
    const int tile = kAtOnce > 2 ? (__ffs(static_cast<int>(rows)) - 1) / 8 : 0;
    if (kAtOnce > 2 && (kOtherSums || !(rows & ~(0xffu << (8 * tile))))) {
#pragma unroll 1
      for (int i = tile; rows >> (8 * i); ++i) {
        const uint32_t of_tile = rows >> (8 * i) & 0xff;
        if (of_tile) shrink_tiles(std::integral_constant<int, 1>(), of_tile, before + 8 * i);
        if (i == 3) break;  // a shift by 32 is none
      }
    } else {
      shrink_tiles(std::integral_constant<int, kAtOnce>(), rows, before);
    }
  };
  if constexpr (R::kHalves == 1) {
    shrink_rows(same, 0);
  } else {
#pragma unroll 1
    for (int half = 0; half < R::kHalves; ++half) {
      const uint32_t rows = static_cast<uint32_t>(same >> (32 * half));
      if (rows) shrink_rows(rows, 32 * half);
    }
  }
  if (p.splits == 1 || p.late) return true;
  // Whoever comes last adds up all splits, in their order. What the warp has stored is released with lane 0's count,
  // and what others have is acquired with it.
  __syncwarp();
  uint32_t* const arrivals = p.counters + kArrivals + first * p.list_length + place_in_list;
  const int last = lane == 0 && increment_is_last(arrivals, p.splits - 1);
  if (!__shfl_sync(0xffffffff, last, 0)) return false;
  __syncwarp();
  // Four columns a lane, eight rows at a time: few trips to memory, as all blocks may be waiting for this.
  const int splits = here(p.splits);
  for (int row = lane >> 2; row < p.m; row += 8) {
    if (!R::has(same, row)) continue;
    const int64_t at = row * width + place_in_list * kRanks + 4 * (lane & 3);
    float4 sum = {};
#pragma unroll 8
    for (int i = 0; i < splits; ++i) {
      const float4 part =
          __ldcg(reinterpret_cast<const float4*>(p.partial + static_cast<int64_t>(i) * p.m * width + at));
      add(sum, part);
    }
    *reinterpret_cast<uint2*>(h + at) = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
  }
  return true;
}

// The number of a piece that no one else has, in lane 0.
__device__ __forceinline__ uint32_t claim(const DecodeProblem& p) {
  return (threadIdx.x & 31) == 0 ? fetch_add(p.counters + kClaimed) : 0;
}

// Shrinks piece number `next` and then what no one else has claimed, by one warp, until nothing is left; one that has
// other sums in its registers, or has not.
template <class T, int kRowTiles, bool kOtherSums, class S>
__device__ __forceinline__ void shrink_claims(const DecodeProblem& p, uint32_t next, int blocks, S& shared) {
  using R = Rows<kRowTiles>;
  const int lane = threadIdx.x & 31;
  while (true) {
    const uint32_t claims = shared.pages * here(p.splits), number_of_claim = __shfl_sync(0xffffffff, next, 0);
    if (number_of_claim >= claims) break;
    // Where there are many for each warp, the next one's number is on its way meanwhile; not that of the last ones, for
    // which others would wait.
    const uint32_t warps = S::kBeside * blocks;
    const bool ahead = kRowTiles > 2 && claims > 4 * warps && number_of_claim + warps < claims;
    if (ahead) next = claim(p);
    // Neighbours are the splits of one page, which so end at about the same time.
    const int number = static_cast<int>(number_of_claim) / p.splits,
              split = static_cast<int>(number_of_claim) % p.splits;
    const int first = R::first(R::where([&](int half) { return shared.holds(lane + 32 * half, number); }));
    const bool complete = shrink_split<T, kRowTiles, kOtherSums>(p, shared, number, first, split);
    __syncwarp();
    if (complete && lane == 0) {
      increment_release(p.counters + kDone, shared.pages * counts_of_page(p) + blocks - 1);
    }
    if (!ahead) next = claim(p);
  }
}

}  // namespace dts_fast::cuda
