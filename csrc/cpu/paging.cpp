#include "paging.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace dts_fast::cpu {

namespace {

// words[r] = the 16 codes of rank `first` + r that belong to a tile; zero beyond the last element and the last rank.
void gather(const FileFactor& factor, int64_t first, int64_t ranks, int64_t tile, uint32_t* words) {
  const uint8_t* codes = factor.codes + first * factor.row_bytes + tile * 4;
  const int64_t count = std::min(kTile, ranks - first), left = factor.size - tile * kTile;
  for (int64_t r = count; r < kTile; ++r) words[r] = 0;
  if (left >= kTile) {
    for (int64_t r = 0; r < count; ++r, codes += factor.row_bytes) std::memcpy(words + r, codes, 4);
    return;
  }
  for (int64_t r = 0; r < count; ++r, codes += factor.row_bytes) {
    words[r] = 0;
    std::memcpy(words + r, codes, (left + 3) / 4);
    words[r] &= (uint32_t{1} << 2 * left) - 1;
  }
}

// Element j of word i and element i of word j change places: blocks of 8 x 8 codes, then of 4 x 4, 2 x 2 and single
// ones within each.
void transpose(uint32_t* words) {
  constexpr uint32_t kMasks[] = {0x0000ffff, 0x00ff00ff, 0x0f0f0f0f, 0x33333333};
  for (int stage = 0; stage < 4; ++stage) {
    const int half = 8 >> stage;
    for (int block = 0; block < 16; block += 2 * half) {
      for (int i = block; i < block + half; ++i) {
        const uint32_t swapped = (words[i] >> 2 * half ^ words[i + half]) & kMasks[stage];
        words[i + half] ^= swapped;
        words[i] ^= swapped << 2 * half;
      }
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
  uint32_t words[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    gather(delta.v, page * kTile, delta.rank, tile, words);
    std::memcpy(tiles + tile * kTileBytes, words, sizeof words);
  }
}

void write_u_tiles(const FileDelta& delta, int64_t page, int64_t first, int64_t last, uint8_t* tiles) {
  uint32_t words[kTile];
  for (int64_t tile = first; tile < last; ++tile) {
    gather(delta.u, page * kTile, delta.rank, tile, words);
    transpose(words);
    std::memcpy(tiles + tile * kTileBytes, words, sizeof words);
  }
}

}  // namespace dts_fast::cpu
