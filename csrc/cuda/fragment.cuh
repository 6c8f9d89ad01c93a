// Index arithmetic of the CUDA kernels: pages, codes, and the fragments of mma.m16n8k16. No torch, and no CUDA either
// where a host compiler reads it: tests/native/decode.cpp runs all of this on a CPU.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define DTS_FAST_BOTH __host__ __device__ __forceinline__
#else
#define DTS_FAST_BOTH inline
#endif

namespace dts_fast::cuda {

// Where the parts of a rank page lie, in 4-byte words (dts_fast/codes.py, PageLayout); U's tiles follow V's.
constexpr int kScales = 0;
constexpr int kULevels = 16;
constexpr int kVLevels = 20;
constexpr int kTiles = 32;
constexpr int kTileWords = 16;  // 16 lanes of a word, 16 codes each

constexpr int kRanks = 16;  // of a page
constexpr int kChunk = 32;  // elements of k that a warp multiplies at a time: 8 of each thread of a quad, 16 bytes

// A thread's place in the fragments (PTX ISA, m16n8k16): its quad is a row of A and of the sums, and a column of B; the
// place within the quad says which elements of k it holds.
//
// The order of k within a sum is free as long as A and B agree. So thread t takes the 8 neighbours 8 t .. 8 t + 7 of a
// chunk, one 16-byte load, for two instructions: step s multiplies 8 t + 4 s .. 8 t + 4 s + 3, whose first two stand
// where the instruction has columns 2 t, 2 t + 1, and the others where it has 2 t + 8, 2 t + 9.
DTS_FAST_BOTH int quad(int lane) { return lane >> 2; }
DTS_FAST_BOTH int place(int lane) { return lane & 3; }

// Four codes, a byte, become two selectors of byte permutations, one in each half: code c of a pair takes bytes 2 c and
// 2 c + 1 of a table of four 16-bit levels.
DTS_FAST_BOTH uint32_t selectors(uint32_t codes) {
  const uint32_t pairs = (codes * 0x1001) & 0x000f000f;      // codes 0 and 1, and 16 bits further 2 and 3
  return ((pairs * 0x41) & 0x03030303) * 0x22 + 0x10101010;  // each code in a byte; then its two byte numbers
}

// Four 16-bit levels.
struct Table {
  uint32_t low, high;
};

// The bytes of `table` that the four lowest digits of `selector`, each below 8, name. (CUDA's own function allows for
// larger ones, which costs another instruction.)
DTS_FAST_BOTH uint32_t permute(const Table& table, uint32_t selector) {
#if defined(__CUDA_ARCH__)
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(out) : "r"(table.low), "r"(table.high), "r"(selector));
  return out;
#else
  const uint64_t bytes = static_cast<uint64_t>(table.high) << 32 | table.low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
#endif
}

// Two registers of a fragment of A, four elements, from the byte of their codes.
struct Pairs {
  uint32_t first, second;
};

DTS_FAST_BOTH Pairs look_up(const Table& table, uint32_t selector) {
  return {permute(table, selector), permute(table, selector >> 16)};
}
DTS_FAST_BOTH Pairs decode(const Table& table, uint32_t codes) { return look_up(table, selectors(codes)); }

// V of a page as A [16 ranks, 32 k]: where thread t's words of chunk 0 are, those of the next chunk so much further on;
// and the byte of a word that has its codes for step s. Elements 8 t .. of a chunk are in its first tile for t < 2, and
// in its second otherwise.
constexpr int kChunkWords = 2 * kTileWords;
DTS_FAST_BOTH int shrink_word(int t, int rank) { return kTiles + (t >> 1) * kTileWords + rank; }
DTS_FAST_BOTH uint32_t shrink_codes(uint32_t word, int t, int step) {
  return permute({word, 0}, 0x4440 + 2 * (t & 1) + step);
}

// U of a page as A [16 outputs, 16 ranks]: an output's word holds its codes of all ranks. Thread t takes ranks t, t +
// 4, t + 8 and t + 12, whose codes are the same two bits of the word's four bytes: selectors in three instructions. h
// is kept in an order in which those are neighbours, one 8-byte load.
DTS_FAST_BOTH uint32_t expand_selectors(uint32_t word, int t) {
  return (word >> (2 * t) & 0x03030303) * 0x22 + 0x10101010;
}
DTS_FAST_BOTH int place_in_h(int rank) { return 4 * (rank & 3) + (rank >> 2); }

// Which of a warp's 16 kOutputTiles outputs is row g + 8 half of tile o. Those of a thread are neighbours: their codes
// are one load, and their sums one store.
template <int kOutputTiles>
DTS_FAST_BOTH int output_of(int o, int half, int g) {
  return 2 * kOutputTiles * g + 2 * o + half;
}

}  // namespace dts_fast::cuda
