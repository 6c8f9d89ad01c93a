// y^T += U h^T where rows are many, and so perhaps adapters: by the warps beside those that stream weights, at the same
// time. Every row its own adapter means hundreds of pages a block, whose codes are as much as a quarter of its weights
// and take more instructions to decode than the base: behind it they would take as long again.
#pragma once

#include "expand.cuh"

namespace dts_fast::cuda {

// The barrier of the warps beside.
constexpr int kBesides = 2;

// Lists pages `begin` .. of those that this block adds, those of every distinct slot once, by one warp. Slices of k
// share them by slot and place, so that a row's sums are added in the same order whatever the other rows use.
template <int kRowTiles, class S>
__device__ __forceinline__ void list_pages(const DecodeProblem& p, int slice, int begin, S& shared) {
  const int lane = threadIdx.x & 31, slices = here(p.slices);
  int before = 0;  // pages of the rows of the half before
#pragma unroll
  for (int half = 0; half < Rows<kRowTiles>::kHalves; ++half) {
    const int row = lane + 32 * half, slot = max(shared.slot[row], 0), count = shared.count[row];
    // The first place whose sum with the slot is this slice's.
    const int place = slices == 1 ? 0 : (slice + slices - slot % slices) % slices;
    const int own = place < count ? (count - place + slices - 1) / slices : 0;
    int end = own;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int others = __shfl_sync(0xffffffff, end, max(lane - distance, 0));
      if (lane >= distance) end += others;
    }
    const int first = before + end - own - begin;
    for (int i = max(0, -first); i < min(own, S::kListed - first); ++i) {
      const int at = place + i * slices, number = shared.begin[row] + at;
      const int32_t* const page = p.slot_pages + static_cast<int64_t>(slot) * p.list_length + at;
      shared.listed[first + i] = {static_cast<uint32_t>(row | at << 6),
                                  number < S::kNumbered ? shared.page[number] : __ldg(page)};
    }
    before += __shfl_sync(0xffffffff, end, 31);
  }
  if (lane == 0) shared.own_pages = before;
  __syncwarp();
}

// Begins to copy a batch of the listed pages' codes and levels for the block's outputs, by the warps beside; a group of
// copies.
template <int kWarps, class S>
__device__ __forceinline__ void copy_batch(const DecodeProblem& p, int first, int batch, int listed, S& shared) {
  static_assert(S::kOutputs == 128, "16 bytes of each lane");
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - kWarps, buffer = batch % S::kBatches;
  const uint64_t policy = read_once_policy();
  const int output = first + 4 * lane;
  if (batch * S::kPages < listed) {
    const auto page_of = [&](int in_batch) {  // of what is not there, the last one
      return p.pages + shared.listed[min(batch * S::kPages + in_batch, listed - 1)].page * p.page_words;
    };
#pragma unroll
    for (int i = 0; i < S::kPages / S::kBeside; ++i) {
      const int in_batch = i * S::kBeside + warp;
      const bool there = output < p.n && batch * S::kPages + in_batch < listed;
      copy_once(&shared.words[buffer][in_batch][lane], page_of(in_batch) + (there ? p.u_tiles + output : 0), there,
                policy);
    }
    if (warp == 0 && lane < S::kPages) {
      copy_near(reinterpret_cast<uint4*>(&shared.levels[buffer][lane]), page_of(lane) + kULevels);
    }
  }
  end_group_of_copies();
}

// The first batches of a list: before h is there.
template <int kWarps, class S>
__device__ __forceinline__ void copy_first_batches(const DecodeProblem& p, int first, int listed, S& shared) {
#pragma unroll
  for (int batch = 0; batch < S::kBatches - 1; ++batch) copy_batch<kWarps>(p, first, batch, listed, shared);
}

// Copies all of h that the batch's rows have, by the warps beside.
template <class T, int kWarps, class S>
__device__ __forceinline__ void copy_hidden(const DecodeProblem& p, S& shared) {
  const int lane = threadIdx.x & 31;
  for (int row = (threadIdx.x >> 5) - kWarps; row < p.m; row += S::kBeside) {
    if (shared.slot[row] < 0) continue;
    const int count = shared.count[S::R::first(shared.same[row])];
    const T* const h = static_cast<const T*>(p.h) + static_cast<int64_t>(row) * kRanks * p.list_length;
    uint4* const to = reinterpret_cast<uint4*>(shared.h[row]);
    for (int i = lane; i < 2 * count; i += 32) copy_near(to + i, h + 8 * i);
  }
}

// Adds the warp's pages of a batch that has come, for the outputs of its group, `offset` of the block's. Where two
// warps share a group, they do so by slot and place, as slices do. A page's codes are decoded while the one's before it
// wait for h: a warp has little else to do meanwhile.
template <class T, int kRowTiles, int kOutputTiles, bool kNear, class S>
__device__ __forceinline__ void add_batch(const DecodeProblem& p, int offset, int part, int batch, int listed,
                                          const S& shared, float (&sums)[kOutputTiles][kRowTiles][4]) {
  using R = Rows<kRowTiles>;
  const int lane = here(threadIdx.x & 31), t = place(lane), g = quad(lane), buffer = batch % S::kBatches;
  const int pages = min(listed - batch * S::kPages, S::kPages);
  const int64_t width = static_cast<int64_t>(kRanks) * here(p.list_length);
  // A lane knows about one page, and tells the others: its place; the tile of rows that use it, where it is only one
  // (as most often where rows differ); which rows of that.
  const int mine = min(lane % S::kPages, pages - 1);
  const uint32_t row_and_place = shared.listed[batch * S::kPages + mine].row_and_place;
  const int row_of_mine = row_and_place & 63, place_of_mine = static_cast<int>(row_and_place >> 6);
  const typename R::Set same = shared.same[row_of_mine];
  const int first_tile = R::first(same) / 8;
  const uint32_t of_tile = static_cast<uint32_t>(same >> (8 * first_tile)) & 0xff;
  const bool alone = same == static_cast<typename R::Set>(of_tile) << (8 * first_tile);
  const uint32_t about_mine = of_tile | (alone ? first_tile : kRowTiles) << 8 | row_and_place >> 6 << 12;
  const Table of_mine = table_of<T>(shared.levels[buffer][mine]);
  bool own = lane < pages;
  if (S::kOfExpand > 1) {
    own = own && (shared.slot[row_of_mine] + place_of_mine) / here(p.slices) % S::kOfExpand == part;
  }
  uint32_t left = __ballot_sync(0xffffffff, own);
  if (!left) return;
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(shared.words[buffer][0]) + offset;
  const auto decode_page = [&](int i, Pairs(&u)[2 * kOutputTiles]) {
    const Table table = {__shfl_sync(0xffffffff, of_mine.low, i), __shfl_sync(0xffffffff, of_mine.high, i)};
    const uint32_t* const from = words + i * S::kOutputs + output_of<kOutputTiles>(0, 0, g);
    decode_outputs(table, load_codes<2 * kOutputTiles>(from, true), t, u);
  };
  // h of a tile's rows: zeros for those that do not use the page, whatever there is.
  const auto load_hidden = [&](int j, int at, bool uses) -> uint2 {
    if constexpr (kNear) {
      const uint2 h = shared.h[8 * j + g][4 * at + t];
      return uses ? h : uint2{};
    } else {
      const T* const h = static_cast<const T*>(p.h) + (8 * j + g) * width + at * kRanks;
      return uses ? __ldcg(reinterpret_cast<const uint2*>(h) + t) : uint2{};
    }
  };
  // Adds a page that is decoded, and decodes the one behind it.
  const auto step = [&](const Pairs(&now)[2 * kOutputTiles], Pairs(&next)[2 * kOutputTiles]) {
    const int i = __ffs(static_cast<int>(left)) - 1;
    left &= left - 1;
    const uint32_t about = __shfl_sync(0xffffffff, about_mine, i);
    const int tile = about >> 8 & 15, at = static_cast<int>(about >> 12);
    const uint2 h = tile < kRowTiles ? load_hidden(tile, at, about >> g & 1) : uint2{};
    decode_page(left ? __ffs(static_cast<int>(left)) - 1 : i, next);
    if (tile < kRowTiles) {
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (j == tile) add_page<T>(now, h, j, sums);
      }
    } else {
      const typename R::Set users = R::of_lane(same, i);
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (R::meets(users, j)) add_page<T>(now, load_hidden(j, at, R::has(users, 8 * j + g)), j, sums);
      }
    }
  };
  Pairs even[2 * kOutputTiles], odd[2 * kOutputTiles];
  decode_page(__ffs(static_cast<int>(left)) - 1, even);
  while (true) {
    step(even, odd);
    if (!left) return;
    step(odd, even);
    if (!left) return;
  }
}

// The block's part of the expand, by the warps beside, each the outputs of one group, and where two share it a part of
// its pages. The first batches are on their way, and h is complete.
template <class T, int kRowTiles, int kOutputTiles, int kWarps, class S>
__device__ __forceinline__ void expand_listed(const DecodeProblem& p, int first, int offset, int part, int slice,
                                              S& shared, float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kThreads = 32 * S::kBeside;
  const bool near = shared.most <= S::kNear;
  if (near) copy_hidden<T, kWarps>(p, shared);
  end_group_of_copies();
  for (int begin = 0;;) {
    const int listed = min(shared.own_pages - begin, S::kListed);
    for (int batch = 0; batch * S::kPages < listed; ++batch) {
      if (batch == 0) {
        wait_for_copies<0>();
      } else {
        wait_for_copies<S::kBatches - 2>();
      }
      meet<kBesides>(kThreads);  // everyone's copies are here, and nobody reads the batch before any more
      copy_batch<kWarps>(p, first, batch + S::kBatches - 1, listed, shared);
      if (near) {
        add_batch<T, kRowTiles, kOutputTiles, true>(p, offset, part, batch, listed, shared, sums);
      } else {
        add_batch<T, kRowTiles, kOutputTiles, false>(p, offset, part, batch, listed, shared, sums);
      }
    }
    begin += S::kListed;
    if (begin >= shared.own_pages) break;
    meet<kBesides>(kThreads);
    if (threadIdx.x >> 5 == kWarps) list_pages<kRowTiles>(p, slice, begin, shared);
    meet<kBesides>(kThreads);
    copy_first_batches<kWarps>(p, first, min(shared.own_pages - begin, S::kListed), shared);
  }
  wait_for_copies<0>();  // of h, where the block adds nothing
}

}  // namespace dts_fast::cuda
