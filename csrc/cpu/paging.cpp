#include "paging.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace dts_fast::cpu {

namespace {

// Tiles that are taken together, each an element of the same vectors.
constexpr int kTogether = 4;
typedef uint32_t Words __attribute__((vector_size(4 * kTogether)));

// words[r] = the 16 codes of rank `first` + r that belong to each of `count` tiles; zero beyond the last element and
// the last rank.
void gather(const FileFactor& factor, int64_t first, int64_t ranks, int64_t tile, int64_t count, Words* words) {
  const uint8_t* codes = factor.codes + first * factor.row_bytes + tile * 4;
  const int64_t rows = std::min(kTile, ranks - first), left = factor.size - tile * kTile;
  for (int64_t r = rows; r < kTile; ++r) words[r] = Words{};
  if (left >= kTogether * kTile && count == kTogether) {
    for (int64_t r = 0; r < rows; ++r, codes += factor.row_bytes) std::memcpy(words + r, codes, sizeof(Words));
    return;
  }
  const int64_t whole = std::min(count, left / kTile), rest = whole < count ? left % kTile : 0;
  for (int64_t r = 0; r < rows; ++r, codes += factor.row_bytes) {
    words[r] = Words{};
    std::memcpy(words + r, codes, 4 * whole + (rest + 3) / 4);
    if (rest) words[r][whole] &= (uint32_t{1} << 2 * rest) - 1;
  }
}

// In each tile, element j of word i and element i of word j change places: blocks of 8 x 8 codes, then of 4 x 4, 2 x 2
// and single ones within each.
void transpose(Words* words) {
  constexpr uint32_t kMasks[] = {0x0000ffff, 0x00ff00ff, 0x0f0f0f0f, 0x33333333};
  for (int stage = 0; stage < 4; ++stage) {
    const int half = 8 >> stage;
    for (int block = 0; block < 16; block += 2 * half) {
      for (int i = block; i < block + half; ++i) {
        const Words swapped = (words[i] >> 2 * half ^ words[i + half]) & kMasks[stage];
        words[i + half] ^= swapped;
        words[i] ^= swapped << 2 * half;
      }
    }
  }
}

template <bool kTransposed>
void write_tiles(const FileFactor& factor, int64_t rank, int64_t page, int64_t first, int64_t last, uint8_t* tiles) {
  Words words[kTile];
  for (int64_t tile = first; tile < last; tile += kTogether) {
    const int64_t count = std::min<int64_t>(kTogether, last - tile);
    gather(factor, page * kTile, rank, tile, count, words);
    if constexpr (kTransposed) transpose(words);
    for (int64_t t = 0; t < count; ++t) {
      uint32_t lanes[kTile];
      for (int64_t r = 0; r < kTile; ++r) lanes[r] = words[r][t];
      std::memcpy(tiles + (tile + t) * kTileBytes, lanes, sizeof lanes);
    }
  }
}

}  // namespace

void write_head(const FileDelta& delta, int64_t page, uint8_t* out, int64_t end, int64_t page_nbytes) {
  float scales[kTile] = {};
  const int64_t first = page * kTile;
  std::copy_n(delta.scales + first, std::min(kTile, delta.rank - first), scales);
  std::memset(out, 0, kVOffset);
  std::memcpy(out + kScalesOffset, scales, sizeof scales);
  std::memcpy(out + kULevelsOffset, delta.u.levels, 4 * sizeof(float));
  std::memcpy(out + kVLevelsOffset, delta.v.levels, 4 * sizeof(float));
  std::memset(out + end, 0, page_nbytes - end);
}

void write_v_tiles(const FileDelta& delta, int64_t page, int64_t first, int64_t last, uint8_t* tiles) {
  write_tiles<false>(delta.v, delta.rank, page, first, last, tiles);
}

void write_u_tiles(const FileDelta& delta, int64_t page, int64_t first, int64_t last, uint8_t* tiles) {
  write_tiles<true>(delta.u, delta.rank, page, first, last, tiles);
}

}  // namespace dts_fast::cpu
