// y^T += U h^T, on the accumulators of the base: where a block has one group of warps, by all of them behind the base.
#pragma once

#include "batch.cuh"

namespace dts_fast::cuda {

// The block's words of U, and its tables, come nearer: before the block shrinks, as who takes the last piece of that
// would be the last to ask for them.
template <class S>
__device__ __forceinline__ void prefetch_expand(const DecodeProblem& p, int first, const S& shared) {
  for (int number = threadIdx.x & 31; number < min(shared.pages, S::kNumbered); number += 32) {
    const uint32_t* const page = p.pages + shared.page[number] * p.page_words;
    prefetch(page + kULevels);
    for (int output = first; output < min(first + S::kOutputs, p.n); output += 8) prefetch(page + p.u_tiles + output);
  }
}

// They are here, of the first of the batch's pages, before h is there.
template <class S>
__device__ __forceinline__ void stage_expand(const DecodeProblem& p, int first, S& shared) {
  constexpr int kAtOnce = 4, kOutputs = S::kOutputs, kWords = (kOutputs + 31) / 32;
  const int lane = threadIdx.x & 31;
  const int staged = min(shared.pages, S::kStaged);
  for (int q = 0; q < staged; q += kAtOnce) {
    uint32_t words[kAtOnce][kWords];
    float4 levels[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const uint32_t* const page = p.pages + shared.page[min(q + i, staged - 1)] * p.page_words;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        const int output = 32 * w + lane;
        words[i][w] = output < kOutputs && first + output < p.n ? __ldg(page + p.u_tiles + first + output) : 0;
      }
      levels[i] = load_levels(page, kULevels);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (q + i >= staged) continue;
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        if (32 * w + lane < kOutputs) shared.words[q + i][32 * w + lane] = words[i][w];
      }
      if (lane == 0) shared.levels[q + i] = levels[i];
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

// The codes of a thread's neighbouring outputs.
template <int kCount>
struct Codes {
  uint32_t words[kCount];
};
template <int kCount>
__device__ __forceinline__ Codes<kCount> load_codes(const uint32_t* from, bool near) {
  Codes<kCount> to;
  if constexpr (kCount == 2) {
    const uint2* const at = reinterpret_cast<const uint2*>(from);
    const uint2 v = near ? *at : __ldg(at);
    to = {{v.x, v.y}};
  } else {
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      const uint4* const at = reinterpret_cast<const uint4*>(from) + i;
      const uint4 v = near ? *at : __ldg(at);
      to.words[4 * i] = v.x, to.words[4 * i + 1] = v.y, to.words[4 * i + 2] = v.z, to.words[4 * i + 3] = v.w;
    }
  }
  return to;
}

// A page's part of one tile of rows' sums.
template <class T, int kOutputTiles, int kRowTiles>
__device__ __forceinline__ void add_page(const Pairs (&u)[2 * kOutputTiles], const uint2& h, int j,
                                         float (&sums)[kOutputTiles][kRowTiles][4]) {
#pragma unroll
  for (int o = 0; o < kOutputTiles; ++o) {
    const Pairs &top = u[2 * o], &bottom = u[2 * o + 1];
    mma<T>(sums[o][j], top.first, bottom.first, top.second, bottom.second, h.x, h.y);
  }
}
template <int kCount>
__device__ __forceinline__ void decode_outputs(const Table& table, const Codes<kCount>& codes, int t,
                                               Pairs (&u)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) u[i] = look_up(table, expand_selectors(codes.words[i], t));
}

// Some pages' parts of the expand on their way to one warp: h, the codes of its outputs, tables.
template <int kRowTiles, int kOutputTiles, int kPages>
struct Expansion {
  uint2 h[kPages][kRowTiles];
  Codes<2 * kOutputTiles> codes[kPages];
  float4 levels[kPages];
  typename Rows<kRowTiles>::Set users[kPages];
};

// Fetches what the warp adds next; zeros where nothing is left.
template <class T, int kRowTiles, int kOutputTiles, int kPages, class S>
__device__ __forceinline__ void fetch_expansion(const DecodeProblem& p, int first, int offset, const S& shared,
                                                PagesOfWarp<kRowTiles, S>& next,
                                                Expansion<kRowTiles, kOutputTiles, kPages>& to) {
  using R = Rows<kRowTiles>;
  const int lane = here(threadIdx.x & 31), t = place(lane), g = quad(lane);
  const int64_t width = static_cast<int64_t>(kRanks) * here(p.list_length);
  to = {};
  // First all of what lies in memory, then h: what is waited for last does not keep the rest from being asked for.
  int row[kPages], at[kPages];
#pragma unroll
  for (int i = 0; i < kPages; ++i) {
    row[i] = next.done() ? -1 : next.row, at[i] = next.at;
    if (row[i] < 0) continue;
    to.users[i] = shared.same[row[i]];
    const int number = shared.begin[row[i]] + at[i];
    const bool staged = number < S::kStaged;
    const uint32_t* const page = staged ? nullptr : shared.page_at(p, number, row[i], at[i]);
    to.levels[i] = staged ? shared.levels[number] : load_levels(page, kULevels);
    const int output = offset + output_of<kOutputTiles>(0, 0, g);  // and its neighbours, in the same tile of codes
    if (staged || first + output < p.n) {
      const uint32_t* const from = staged ? &shared.words[number][output] : page + p.u_tiles + first + output;
      to.codes[i] = load_codes<2 * kOutputTiles>(from, staged);
    }
    next.advance();
  }
  if constexpr (kRowTiles == 1) {
    if (p.late) {
      float4 splits[kPages][kLateSplits];
#pragma unroll
      for (int i = 0; i < kPages; ++i) {
        const bool there = row[i] >= 0 && R::has(to.users[i], g);
        const float* const of_page = p.partial + g * width + at[i] * kRanks + 4 * t;
#pragma unroll
        for (int split = 0; split < kLateSplits; ++split) {
          const float* const part = of_page + static_cast<int64_t>(split) * p.m * width;
          splits[i][split] =
              there && split < p.splits ? __ldcg(reinterpret_cast<const float4*>(part)) : float4{0, 0, 0, 0};
        }
      }
#pragma unroll
      for (int i = 0; i < kPages; ++i) {
        float4 sum = {};
#pragma unroll
        for (int split = 0; split < kLateSplits; ++split) add(sum, splits[i][split]);
        to.h[i][0] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kPages; ++i) {
    if (row[i] < 0) continue;
#pragma unroll
    for (int j = 0; j < kRowTiles; ++j) {
      if (R::has(to.users[i], 8 * j + g)) {
        const T* const h = static_cast<const T*>(p.h) + (8 * j + g) * width + at[i] * kRanks + 4 * t;
        to.h[i][j] = __ldcg(reinterpret_cast<const uint2*>(h));  // written in this launch: not from this level's cache
      }
    }
  }
}

// Adds h U^T for the warp's outputs, `offset` of the block's: some pages while the next ones are on their way.
template <class T, int kRowTiles, int kOutputTiles, class S>
__device__ __forceinline__ void expand_sums(const DecodeProblem& p, int first, int offset, int part, int parts,
                                            const S& shared, float (&sums)[kOutputTiles][kRowTiles][4]) {
  using R = Rows<kRowTiles>;
  constexpr int kAtOnce = kRowTiles == 4 ? 3 : 2;
  const int lane = here(threadIdx.x & 31), t = place(lane);
  PagesOfWarp<kRowTiles, S> next(shared, lane, part, parts);
  if (next.done()) return;
  Expansion<kRowTiles, kOutputTiles, kAtOnce> all[2];
  fetch_expansion<T>(p, first, offset, shared, next, all[0]);
  for (bool more = true; more;) {
#pragma unroll
    for (int now = 0; now < 2; ++now) {
      more = !next.done();
      fetch_expansion<T>(p, first, offset, shared, next, all[1 - now]);
      const auto& have = all[now];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        Pairs u[2 * kOutputTiles];
        decode_outputs(table_of<T>(have.levels[i]), have.codes[i], t, u);
#pragma unroll
        for (int j = 0; j < kRowTiles; ++j) {
          if (kRowTiles < 4 || R::meets(have.users[i], j)) add_page<T>(u, have.h[i][j], j, sums);
        }
      }
    }
  }
}

}  // namespace dts_fast::cuda
