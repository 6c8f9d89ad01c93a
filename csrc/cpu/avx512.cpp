// AVX-512 F, BW, VL and DQ (Skylake-X, Zen 4, and newer).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

// After all includes: inline functions of theirs are shared with files for other processors.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace dts_fast::cpu {
namespace {

constexpr bool kFarAhead = false;
constexpr bool kPairs = false;

#include "avx512.inc"
#include "dense.inc"
#include "descend.inc"
#include "lowrank.inc"
#include "pairs.inc"
#include "panels.inc"

}  // namespace

const Kernels kAvx512 = {
    "avx512",
    // bench/results/ops.jsonl. Torch repacks the weight on each call, which pays for itself with
    // many rows of float32, and of float16 where the processor multiplies that.
    {64, 64, kAnyRows},
    1 << 20,
#include "table.inc"
};

}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
