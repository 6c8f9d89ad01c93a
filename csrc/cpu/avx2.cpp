// AVX2 with fused multiply-add and half-precision conversion (Haswell, Zen, and newer).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

// After all includes: inline functions of theirs are shared with files for other processors.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace dts_fast::cpu {
namespace {

constexpr int kLanes = 8;
constexpr int kSums = 8;
constexpr int64_t kRange = 1024;
constexpr int kPanelRows = 2;
constexpr bool kFarAhead = false;
constexpr bool kPairs = false;
constexpr int kMostRows = 4;

#include "types.inc"

inline float widened(Half value) { return _cvtsh_ss(value.bits); }

template <>
inline Half narrow<Half>(float value) {
  return {_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT)};
}

inline Vec load(const Half* p) {
  return reinterpret_cast<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

inline void store_narrow(Half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}

// The four levels in each half: vpermilps looks up within halves, by the two lowest bits of each lane.
template <>
struct Levels<float> {
  __m256 table;

  Levels() = default;
  explicit Levels(const float* levels) : table(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels))) {}
  inline __attribute__((always_inline)) Vec look_up(Word codes) const {
    return reinterpret_cast<Vec>(_mm256_permutevar_ps(table, reinterpret_cast<__m256i>(codes)));
  }
};

inline Vec spread(const float* p) { return reinterpret_cast<Vec>(_mm256_set1_ps(*p)); }

// Keeps the compiler from loading the value again for each use.
inline void in_register(Vec& value) { __asm__("" : "+x"(value)); }

#include "dense.inc"
#include "descend.inc"
#include "lowrank.inc"
#include "panels.inc"

// Tables of pairs need registers of 16 floats.
constexpr decltype(nullptr) shrink_one = nullptr, expand_one = nullptr;

}  // namespace

const Kernels kAvx2 = {
    "avx2",
    // Few rows are bound by memory, whoever multiplies; more have not been measured on such a processor.
    {4, 4, 4},
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
