// What the decode kernel is given, and how it is launched. Plain C++: neither torch nor CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

struct CUstream_st;

namespace dts_fast::cuda {

// Counters in global memory, 0 before and after every launch; one launch at a time may use them. Claims are not to wait
// for those who look again and again at what is done: each has a cache line of its own.
constexpr int kClaimed = 0;
constexpr int kDone = 32;
constexpr int kArrivals = 64;  // one for each row and each page that a slot may list, then one for each slice's outputs

constexpr int kMostDecodeRows = 64;
constexpr int kMostDecodeInputs = 1 << 24;  // parts of them are computed in 32 bits

struct DecodeProblem {
  const void* x;  // [m, x_stride]
  int64_t x_stride;
  bool base;           // whether y is computed, or has the delta added
  const void* weight;  // [n, weight_stride]
  int64_t weight_stride;
  const void* bias;  // [n] or null
  void* y;           // [m, y_stride]
  int64_t y_stride;
  const uint32_t* pages;  // [P, page_words]
  int64_t page_words;
  int64_t u_tiles;            // where U's tiles begin in a page, in words
  const int32_t* slot_pages;  // [S, list_length]
  const float* slot_weights;  // [S, list_length]
  const int32_t* slot_ids;    // [m]
  int list_length;
  int m, n, k;
  int splits;            // of the shrink's sums over k
  bool late;             // whether who expands adds up the splits (sums_late), and h is not read
  float* partial;        // [splits, m, 16 list_length], a page's ranks in the order of `place_in_h`
  void* h;               // [m, 16 list_length] in the type of x, in the same order
  int slices;            // of the base's sums over k, each in blocks of its own
  float* slice_partial;  // [slices, blocks of n, m, outputs of a block]; not read for one slice
  bool dependent;        // launched so that it may begin before the kernel in front of it has ended
  uint32_t* counters;    // [kArrivals + m list_length + blocks_of]
};

// The shape of a launch: tiles of 8 rows; tiles of 16 outputs of a warp, and groups of warps with outputs of their own;
// warps that stream weights, of all groups together; slices of k.
struct DecodeShape {
  int row_tiles, output_tiles, groups, warps, slices;
};

inline int64_t outputs_of(const DecodeShape& shape) { return int64_t{16} * shape.output_tiles * shape.groups; }

inline int64_t blocks_of(const DecodeShape& shape, int64_t n) {
  return (n + outputs_of(shape) - 1) / outputs_of(shape);
}

// A block for every multiprocessor where there are few outputs, with twice the warps; otherwise smaller blocks, two of
// which share one, so that one streams while the other ends. Every block reads all of x from the second-level cache, so
// more rows want more outputs of a block: in groups, whose warps find x in the first-level cache. Where that leaves
// multiprocessors idle there are slices of k. A slice costs a round trip to memory at the end: up to 16 rows, half of
// the multiprocessors are enough for all of the memory's bandwidth. From bytes in flight, not measured yet.
inline DecodeShape choose_shape(int64_t m, int64_t n, int64_t k, bool base, int multiprocessors) {
  const int row_tiles = m <= 8 ? 1 : m <= 16 ? 2 : m <= 32 ? 4 : 8;
  const bool many = row_tiles >= 4;
  DecodeShape shape = {row_tiles, 1, 1, 15, 1};
  if (many) {
    shape = {row_tiles, 2, 4, 4, 1};
    // Without a base more blocks, that share the shrink.
    if (!base) shape = row_tiles == 4 ? DecodeShape{4, 2, 1, 7, 1} : DecodeShape{8, 1, 1, 7, 1};
    // A few long slices are better than many short ones.
    if (base && row_tiles == 4 && 16 * blocks_of(shape, n) <= multiprocessors) shape = {4, 4, 1, 7, 1};
  } else if (blocks_of(shape, n) > multiprocessors) {
    // Twice the outputs for as much of x, of which up to 4 rows are not much.
    shape = row_tiles == 1 ? DecodeShape{1, m > 4 ? 2 : 1, 1, 7, 1} : DecodeShape{2, 2, 1, 15, 1};
    if (row_tiles == 2 && blocks_of(shape, n) > multiprocessors) shape.warps = 7;
  }
  const int64_t blocks = blocks_of(shape, n), idle = many ? 2 : 3;
  if (base && idle * blocks <= multiprocessors) {
    constexpr int kLeast = 64, kMost = 8;  // elements of k for each warp; slices for the last one to add up
    const int64_t most = std::min<int64_t>(multiprocessors / blocks, k * shape.groups / (kLeast * shape.warps));
    shape.slices = static_cast<int>(std::clamp<int64_t>(most, 1, kMost));
  }
  return shape;
}

// Blocks that share a multiprocessor; with more sums in registers than that leaves, one.
constexpr int resident_blocks(int row_tiles, int output_tiles, int warps) {
  return warps < 8 && row_tiles * output_tiles <= 4 ? 2 : 1;
}

// Warps of a block beside those that stream weights: they know the batch, shrink, and fetch codes; in blocks of several
// groups (many rows, so perhaps many adapters) they expand, too, and are two for each where registers allow.
constexpr int warps_beside(int row_tiles, int groups) { return groups == 1 ? 1 : row_tiles > 4 ? groups : 2 * groups; }

// Chunks of k whose weights a warp has under way: with two blocks or 16 warps on a multiprocessor some 64 to 100 KiB,
// in the 99 KiB that a block may have on every architecture; 48 KiB or more where the expand needs memory, too.
constexpr int chunks_ahead(int row_tiles, int output_tiles, int groups, int warps) {
  if (groups > 1) return row_tiles > 4 ? 6 : 7;
  return output_tiles == 1 ? 6 : output_tiles == 2 && warps == 7 ? 4 : 3;
}

// Parts of k that the shrink of a page is cut into. A function of k alone, so that h does not depend on the batch.
constexpr int kSplit = 512;
inline int choose_splits(int64_t k) { return static_cast<int>(k < 64 * kSplit ? (k + kSplit - 1) / kSplit : 64); }

// Whether h is left in its splits, for every block that expands to add up. A split is then done when it is stored: two
// fences, a count and a trip to memory fewer in the chain that all blocks wait for. But each block reads `splits` times
// as much, in float32: where rows or splits are many, that would be a good part of what it reads of W.
constexpr int kLateSplits = 8;
inline bool sums_late(const DecodeShape& shape, int64_t m, int splits) {
  return shape.row_tiles == 1 && 1 < splits && splits <= kLateSplits && m * splits <= 16;
}

// The instances that are compiled: (row tiles, output tiles, groups, warps).
#define DTS_FAST_DECODE_SHAPES(X) \
  X(1, 1, 1, 7)                   \
  X(1, 1, 1, 15)                  \
  X(1, 2, 1, 7)                   \
  X(2, 1, 1, 15) X(2, 2, 1, 7) X(2, 2, 1, 15) X(4, 2, 1, 7) X(4, 4, 1, 7) X(4, 2, 4, 4) X(8, 1, 1, 7) X(8, 2, 4, 4)

// Launches on a stream of the current device; the error code of the launch, 0 for none (cudaError_t).
int launch_decode(const DecodeProblem& problem, const DecodeShape& shape, bool bfloat16, CUstream_st* stream);

// Whether the current device, and the machine code for it, know dependent launches.
bool dependent_launches();

// 0 if there is machine code, or PTX, for the current device; otherwise why not.
int decode_runs();

// Whether calls of the ops may use it (ops.cpp).
void set_decoding(bool on);

// The message of an error code.
const char* error_text(int error);

}  // namespace dts_fast::cuda
