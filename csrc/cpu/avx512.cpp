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

constexpr int kLanes = 16;
constexpr int kSums = 8;
constexpr int64_t kAnyRows = int64_t{1} << 40;
constexpr int64_t kRange = 1024;
constexpr int kPanelRows = 12;
constexpr int64_t kPanelAhead = 2048;
constexpr int kMostRows = 16;

#include "types.inc"

inline float widened(Half value) { return _cvtsh_ss(value.bits); }

template <>
inline Half narrow<Half>(float value) {
  return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)};
}

inline Vec load(const Half* p) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}

inline void store_narrow(Half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}

// The four levels four times: vpermps looks at the four lowest bits of each lane, of which two are the code.
typedef Vec Table;

inline Vec lookup(Vec table, Word codes) {
  return reinterpret_cast<Vec>(
      _mm512_permutexvar_ps(reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512>(table)));
}

inline Table table_of(const float* levels) {
  return reinterpret_cast<Table>(_mm512_broadcast_f32x4(_mm_loadu_ps(levels)));
}

inline Vec broadcast(float value) { return reinterpret_cast<Vec>(_mm512_set1_ps(value)); }

// Keeps the compiler from loading the value again for each use.
inline void in_register(Vec& value) { __asm__("" : "+v"(value)); }

#include "dense.inc"
#include "descend.inc"
#include "lowrank.inc"
#include "pairs.inc"
#include "panels.inc"

}  // namespace

const Kernels kAvx512 = {
    "avx512",
    // bench/results/ops.jsonl, ops_float16.jsonl. Torch repacks the weight on each call, which pays for itself with
    // many rows of float32, and of float16 where the processor multiplies that.
    {64, 64, kAnyRows},
#include "table.inc"
};

}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
