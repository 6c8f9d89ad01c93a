// What every CPU kernel file provides: one table of functions per instruction set, chosen at run time (isa.cpp).
// Kernel files take raw pointers and never include torch. Bodies that differ only in the width of a vector stand once,
// in
// *.inc files that each instruction set's file includes within a namespace of its own, compiled for its own target.
// They call nothing of the standard library but memcpy: a template instantiated there would be the one that all files
// share.
//
// Shapes: M rows, N out, K in. A tile of codes is 64 bytes, 16 lanes of 16 codes each (dts_fast/codes.py, PageLayout).
#pragma once

#include <cstdint>

namespace dts_fast::cpu {

constexpr int64_t kTile = 16;  // lanes of a tile, codes of a lane, ranks of a page
constexpr int64_t kTileBytes = 64;

// Where the parts of a rank page lie (dts_fast/codes.py, PageLayout).
constexpr int64_t kScalesOffset = 0;
constexpr int64_t kULevelsOffset = 64;
constexpr int64_t kVLevelsOffset = 80;
constexpr int64_t kVOffset = 128;

// Outputs of a panel of packed weights (dts_fast/packing.py).
constexpr int64_t kPanel = 32;

enum DType { kFloat32, kFloat16, kBFloat16, kDTypes };

// Rows of input are zero from K to the next multiple of kPad.
constexpr int64_t kPad = 32;

// A page of an adapter and what its delta is multiplied with.
struct Page {
  const uint8_t* data;
  float weight;
};

// Where a factor lies in a page. Along the sum (V in a shrink, U in an expand) the codes of a lane's word are steps of
// the sum; across it (the transposed op) they are results.
struct Factor {
  int64_t tiles;   // offset of its tiles
  int64_t levels;  // offset of its levels
  bool across;
};

// One side of a fit: rows [r, n] take the levels that minimise the quadratic form of `gram` (fit.py, refine).
struct Descent {
  float* rows;             // [r, n] in and out
  const float* target;     // [r, n] gram @ optimum
  const float* gram;       // [r, r]
  const float* curvature;  // [r] the diagonal of gram, above 0
  const float* levels;     // [4] ascending
  int64_t rank;
  int64_t n;
  int sweeps;
};

constexpr int64_t kDescentColumns = 64;

// Floats of scratch, aligned to 64 bytes, that one call of Kernels::descend uses.
constexpr int64_t descent_scratch(int64_t rank) { return (2 * rank + 1) * kDescentColumns + rank * (rank + 1); }

// All sums are taken in float32, and in the same order for a row whatever the other rows are.
//
// What is multiplied, rows of x and of h, is float32, or bfloat16 where `row_size` says so: `void*` below points at
// either.
struct Kernels {
  const char* name;

  // Rows up to which `dense` is used for the base and not torch's own product.
  int64_t own_base_rows[kDTypes];

  // Bytes of rows that are in flight together, see batch.cpp.
  int64_t bytes_in_flight;

  // Bytes of an element of the rows that are multiplied: 4, or 2 for those of bfloat16 as they are.
  int64_t row_size[kDTypes];

  // out[i] = in[i], as it is multiplied.
  void (*read_row[kDTypes])(const void* in, void* out, int64_t count);

  // Rows `stride` elements apart (a multiple of kPad) in the order in which `dense` takes them, out [rows, stride].
  // Only those of the groups that start at rows first <= m < last; several calls may share the work.
  void (*pack[kDTypes])(const void* x, int64_t stride, int64_t rows, int64_t first, int64_t last, void* out);

  // tile[m, j] = sum over k of x[m, k] weight[first + j, k], for the outputs first <= first + j < last of `weight`
  // [N, K] with rows `stride` elements apart; x is packed. tile [rows, tile_stride] is written.
  void (*dense[kDTypes])(const void* packed, int64_t row_stride, int64_t rows, const void* weight, int64_t stride,
                         int64_t k, int64_t first, int64_t last, float* tile, int64_t tile_stride);

  // The same for packed weights, straight from rows: `first` is a multiple of kPanel, and the rows of tile are
  // padded to one.
  void (*dense_panels[kDTypes])(const void* x, int64_t x_stride, int64_t rows, const void* weight, int64_t k,
                                int64_t first, int64_t last, float* tile, int64_t tile_stride);

  // h[m, 16 p + r] = weight_p s_p[r] times the sum over i < size of x[m, i] F_p[i, r], for pages p of `count`. Rows of
  // x are zero from `size` to the next multiple of 16.
  void (*shrink[kDTypes])(const Factor& factor, const void* x, int64_t x_stride, int64_t rows, int64_t size,
                          const Page* pages, int64_t count, void* h, int64_t h_stride);

  // tile[m, j] += sum over p, r of h[m, 16 p + r] F_p[first + j, r] for first <= first + j < last; first is a multiple
  // of 16, and the rows of tile are padded to one.
  void (*expand[kDTypes])(const Factor& factor, const void* h, int64_t h_stride, int64_t rows, const Page* pages,
                          int64_t count, int64_t first, int64_t last, float* tile, int64_t tile_stride);

  // The same for a batch of one row, and factors along the sum; null where the others are as good.
  void (*shrink_one[kDTypes])(const Factor& factor, const void* x, int64_t size, const Page* pages, int64_t count,
                              void* h);
  void (*expand_one[kDTypes])(const Factor& factor, const void* h, const Page* pages, int64_t count, int64_t first,
                              int64_t last, float* tile);

  // y[m][first + j] = tile[m, j] + bias[first + j] (bias may be null), and y[m][first + j] += tile[m, j].
  void (*store[kDTypes])(const float* tile, int64_t tile_stride, int64_t rows, const void* bias, void* const* y,
                         int64_t first, int64_t last);
  void (*add[kDTypes])(const float* tile, int64_t tile_stride, int64_t rows, void* const* y, int64_t first,
                       int64_t last);

  // Columns [first, last) of a descent; columns are independent of each other.
  void (*descend)(const Descent& problem, int64_t first, int64_t last, float* scratch);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAmx;
#endif

}  // namespace dts_fast::cpu
