// AVX-512 with dot products of bfloat16 pairs (Zen 4, Cooper Lake, and newer) for bfloat16; everything else is AVX-512.
//
// x and the weights are bfloat16 already, and products of two are exact in float32: the base loses nothing. Of the
// delta, levels and h are rounded to bfloat16, as they are for a GPU's matrix units: each term of its sums by up to one
// and a half units in its last place. Denormal numbers count as zero, also where 16 results are narrowed at a time.
//
// Weights are asked for far ahead (dense.inc), as it is good for the processors that this file is preferred on
// (isa.cpp).
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

// After all includes: inline functions of theirs are shared with files for other processors.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace dts_fast::cpu {
namespace {

constexpr bool kFarAhead = true;
constexpr bool kPairs = true;

#include "avx512.inc"

inline Word spread(const BFloat16* p) {
  uint32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return reinterpret_cast<Word>(_mm512_set1_epi32(static_cast<int>(pair)));
}

inline __attribute__((always_inline)) void multiply_add(Vec& sum, Word a, Word b) {
  sum = reinterpret_cast<Vec>(
      _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
}

inline void store_narrow(BFloat16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v))));
}

// Two codes are one of 16 pairs of levels, and a register holds 16 pairs.
template <>
struct Levels<BFloat16> {
  Word pairs;

  Levels() = default;
  explicit Levels(const float* levels) {
    const __m128i four = reinterpret_cast<__m128i>(_mm_cvtneps_pbh(_mm_loadu_ps(levels)));
    Word places;
    for (int i = 0; i < kLanes; ++i) places[i] = i % 4 | i / 4 << 16;
    pairs = reinterpret_cast<Word>(
        _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(places), _mm512_broadcastq_epi64(four)));
  }
  inline __attribute__((always_inline)) Word look_up(Word codes) const {
    return reinterpret_cast<Word>(
        _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(codes), reinterpret_cast<__m512i>(pairs)));
  }
};

#include "dense.inc"
#include "descend.inc"
#include "lowrank.inc"
#include "pairs.inc"
#include "panels.inc"

}  // namespace

const Kernels kAvx512Bf16 = {
    "avx512_bf16",
    // bench/results/ops_zen4.jsonl. Torch multiplies many rows of bfloat16 at the processor's peak, and those of the
    // others at half of it and less.
    {kAnyRows, kAnyRows, 64},
    1 << 22,
#include "table.inc"
};

}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
