// What every CPU kernel file provides: one table of functions per instruction set, chosen at run time (isa.cpp).
// Kernel files take raw pointers and never include torch. Bodies that differ only in the width of a vector stand once,
// in
// *.inc files that each instruction set's file includes within a namespace of its own, compiled for its own target.
// They call nothing of the standard library but memcpy: a template instantiated there would be the one that all files
// share.
#pragma once

#include <cstdint>

namespace dts_fast::cpu {

// One side of a fit: rows [r, n] take the levels that minimise the quadratic form of `gram` (fit.py, fit_refined).
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

struct Kernels {
  const char* name;
  // Columns [first, last) of a descent; columns are independent of each other.
  void (*descend)(const Descent& problem, int64_t first, int64_t last, float* scratch);
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvx512;
#endif

}  // namespace dts_fast::cpu
