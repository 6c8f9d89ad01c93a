// From the adapter file's order of codes to a bank's rank pages (dts_fast/codes.py, PageLayout). No torch here.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dts_fast::cpu {

inline int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// One factor as the file has it: a row of `row_bytes` for each rank, the code of element i in bits 2 * (i % 4) of byte
// i / 4.
struct FileFactor {
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t size;         // elements of a row
  const float* levels;  // [4]
};

struct FileDelta {
  FileFactor u, v;
  const float* scales;  // [rank]
  int64_t rank;
};

// The part of page `page` before its tiles, and what pads its end, from `end` on.
void write_head(const FileDelta& delta, int64_t page, uint8_t* out, int64_t end, int64_t page_nbytes);

// Tiles [first, last) of V of page `page`: 16 ranks as lanes, 16 codes of a rank in each word.
void write_v_tiles(const FileDelta& delta, int64_t page, int64_t first, int64_t last, uint8_t* tiles);

// The same of U: 16 outputs as lanes, the codes of 16 ranks in each word.
void write_u_tiles(const FileDelta& delta, int64_t page, int64_t first, int64_t last, uint8_t* tiles);

}  // namespace dts_fast::cpu
