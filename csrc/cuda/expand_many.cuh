// y^T += U h^T where rows are many, and so perhaps adapters: by the warps beside those that stream weights, at the same
// time. Every row its own adapter means hundreds of pages a block, whose codes are as much as a quarter of its weights
// and take as many instructions to decode as all the rest: behind the base they would take as long as the base itself.
#pragma once

#include "expand.cuh"

namespace dts_fast::cuda {

// The barrier of the warps beside.
constexpr int kBesides = 2;

// Lists the next of the pages that this block adds, those of every distinct slot once, by one warp. Slices of k share
// them by slot and place, so that a row's sums are added in the same order whatever the other rows use.
template <int kRowTiles, class S>
__device__ __forceinline__ void list_pages(int slices, int slice, S& shared) {
  using R = Rows<kRowTiles>;
  const int lane = threadIdx.x & 31;
  const int first_row = shared.next_row;
  int place = shared.next_place, listed = 0;
  __syncwarp();
  typename R::Set left = R::where([&](int half) {
    const int row = lane + 32 * half;
    return row >= first_row && shared.count[row] > 0;
  });
  for (; left; left &= left - 1, place = 0) {
    const int row = R::first(left), count = shared.count[row];
    for (; place < count && listed + 32 <= S::kListed; place += 32) {
      const int mine = place + lane;
      const bool own = mine < count && (shared.slot[row] + mine) % slices == slice;
      const uint32_t owned = __ballot_sync(0xffffffff, own);
      if (own) shared.listed[listed + __popc(owned & ((1u << lane) - 1))] = row | mine << 6;
      listed += __popc(owned);
    }
    if (place < count) break;
  }
  if (lane == 0) {
    shared.listed_pages = listed;
    shared.next_row = left ? R::first(left) : 8 * kRowTiles;
    shared.next_place = place;
  }
  __syncwarp();
}

// Begins to copy a batch of pages' codes and levels for the block's outputs, by the warps beside; a group of copies.
template <int kRowTiles, int kWarps, class S>
__device__ __forceinline__ void copy_batch(const DecodeProblem& p, int first, int batch, S& shared) {
  static_assert(S::kOutputs == 128, "16 bytes of each lane");
  const int lane = threadIdx.x & 31, warp = (threadIdx.x >> 5) - kWarps, buffer = batch % S::kBatches;
  const uint64_t policy = read_once_policy();
#pragma unroll
  for (int i = 0; i < S::kPages / S::kBeside; ++i) {
    const int in_batch = i * S::kBeside + warp, number = batch * S::kPages + in_batch;
    if (number >= shared.listed_pages) continue;
    const int row = shared.listed[number] & 63, place = static_cast<int>(shared.listed[number] >> 6);
    const uint32_t* const page = shared.page_at(p, shared.begin[row] + place, row, place);
    const int output = first + 4 * lane;
    const bool there = output < p.n;
    copy_once(&shared.words[buffer][in_batch][lane], page + (there ? p.u_tiles + output : 0), there, policy);
    if (lane == 0) {
      copy_once(reinterpret_cast<uint4*>(&shared.levels[buffer][in_batch]), page + kULevels, true, policy);
    }
  }
  end_group_of_copies();
}

// The first batches of what is listed: before h is there.
template <int kRowTiles, int kWarps, class S>
__device__ __forceinline__ void copy_first_batches(const DecodeProblem& p, int first, S& shared) {
#pragma unroll
  for (int batch = 0; batch < S::kBatches - 1; ++batch) copy_batch<kRowTiles, kWarps>(p, first, batch, shared);
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

// Adds a batch that has come, for the outputs of the warp's group, `offset` of the block's. A page's codes are decoded
// while the one's before it wait for h: a warp has little else to do meanwhile.
template <class T, int kRowTiles, int kOutputTiles, bool kNear, class S>
__device__ __forceinline__ void add_batch(const DecodeProblem& p, int offset, int batch, const S& shared,
                                          float (&sums)[kOutputTiles][kRowTiles][4]) {
  using R = Rows<kRowTiles>;
  const int lane = here(threadIdx.x & 31), t = place(lane), g = quad(lane), buffer = batch % S::kBatches;
  const int pages = min(shared.listed_pages - batch * S::kPages, S::kPages);
  const int64_t width = static_cast<int64_t>(kRanks) * here(p.list_length);
  // A lane knows about one page, and tells the others.
  const int mine = min(lane % S::kPages, pages - 1);
  const uint32_t listed = shared.listed[batch * S::kPages + mine];
  const typename R::Set same = shared.same[listed & 63];
  const Table of_mine = table_of<T>(shared.levels[buffer][mine]);
  const uint32_t* const words = reinterpret_cast<const uint32_t*>(shared.words[buffer][0]) + offset;
  const auto decode_page = [&](int i, Pairs(&u)[2 * kOutputTiles]) {
    const Table table = {__shfl_sync(0xffffffff, of_mine.low, i), __shfl_sync(0xffffffff, of_mine.high, i)};
    const uint32_t* const from = words + i * S::kOutputs + output_of<kOutputTiles>(0, 0, g);
    decode_outputs(table, load_codes<2 * kOutputTiles>(from, true), t, u);
  };
  Pairs u[2][2 * kOutputTiles];
  decode_page(0, u[0]);
  for (int first = 0; first < pages; first += 2) {
#pragma unroll
    for (int now = 0; now < 2; ++now) {
      const int i = first + now;  // of an odd number the last one twice, for no rows
      const int place_in_list = static_cast<int>(__shfl_sync(0xffffffff, listed, i) >> 6);
      const typename R::Set all = R::of_lane(same, i), users = i < pages ? all : 0;
      const T* const far = static_cast<const T*>(p.h) + g * width + place_in_list * kRanks;
      const uint2* const from = kNear ? &shared.h[g][4 * place_in_list + t] : reinterpret_cast<const uint2*>(far) + t;
      const int64_t stride = kNear ? sizeof shared.h[0] / sizeof(uint2) : width / 4;
      uint2 h[kRowTiles];
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        // Zeros for rows that do not use the page, whatever there is.
        const bool uses = R::has(users, 8 * j + g);
        if (kNear) {
          h[j] = from[8 * j * stride];
          h[j] = uses ? h[j] : uint2{};
        } else {
          h[j] = uses ? __ldcg(from + 8 * j * stride) : uint2{};
        }
      }
      decode_page(min(i + 1, pages - 1), u[1 - now]);
#pragma unroll
      for (int j = 0; j < kRowTiles; ++j) {
        if (R::meets(users, j)) add_page<T>(u[now], h[j], j, sums);
      }
    }
  }
}

// The block's part of the expand, by the warps beside, each the outputs of one group. The first batches are on their
// way, and h is complete.
template <class T, int kRowTiles, int kOutputTiles, int kWarps, class S>
__device__ __forceinline__ void expand_listed(const DecodeProblem& p, int first, int offset, int slice, S& shared,
                                              float (&sums)[kOutputTiles][kRowTiles][4]) {
  constexpr int kThreads = 32 * S::kBeside;
  const bool near = p.list_length <= S::kNear;
  if (near) copy_hidden<T, kWarps>(p, shared);
  end_group_of_copies();
  while (true) {
    for (int batch = 0; batch * S::kPages < shared.listed_pages; ++batch) {
      if (batch == 0) {
        wait_for_copies<0>();
      } else {
        wait_for_copies<S::kBatches - 2>();
      }
      meet<kBesides>(kThreads);  // everyone's copies are here, and nobody reads the batch before any more
      copy_batch<kRowTiles, kWarps>(p, first, batch + S::kBatches - 1, shared);
      if (near) {
        add_batch<T, kRowTiles, kOutputTiles, true>(p, offset, batch, shared, sums);
      } else {
        add_batch<T, kRowTiles, kOutputTiles, false>(p, offset, batch, shared, sums);
      }
    }
    if (shared.next_row >= 8 * kRowTiles) break;
    meet<kBesides>(kThreads);
    if (threadIdx.x >> 5 == kWarps) list_pages<kRowTiles>(p.slices, slice, shared);
    meet<kBesides>(kThreads);
    copy_first_batches<kRowTiles, kWarps>(p, first, shared);
  }
}

}  // namespace dts_fast::cuda
