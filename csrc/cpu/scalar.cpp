// Any processor: what the compiler makes of vectors of four floats (SSE2, NEON).
#include <cstring>

#include "kernels.h"

namespace dts_fast::cpu {
namespace {

constexpr int kLanes = 4;
constexpr int kSums = 8;
constexpr int64_t kRange = 1024;
constexpr int kPanelRows = 1;
constexpr bool kFarAhead = false;
constexpr bool kPairs = false;
constexpr int kMostRows = 4;

#include "types.inc"

// Conversions of half precision by hand, where the processor has none.
inline float widened(Half value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16, exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  if (exponent == 31) return as_float(sign | 0x7f800000 | fraction << 13);
  if (exponent) return as_float(sign | (exponent + 112) << 23 | fraction << 13);
  return as_float(sign | as_bits(static_cast<float>(fraction) * 0x1p-24f));
}

template <>
inline Half narrow<Half>(float value) {
  const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // rounds beyond the largest
  } else if (magnitude >= 0x38800000) {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  } else {
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;  // the addition rounds to half's smallest step
  }
  return {static_cast<uint16_t>(sign | half)};
}

inline Vec load(const Half* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) v[i] = widened(p[i]);
  return v;
}

inline void store_narrow(Half* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = narrow<Half>(v[i]);
}

template <>
struct Levels<float> {
  float values[4];

  Levels() = default;
  explicit Levels(const float* levels) { std::memcpy(values, levels, sizeof values); }
  inline Vec look_up(Word codes) const {
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = values[codes[i] & 3];
    return v;
  }
};

inline Vec spread(const float* p) { return Vec{*p, *p, *p, *p}; }

inline void in_register(Vec&) {}

#include "dense.inc"
#include "descend.inc"
#include "lowrank.inc"
#include "panels.inc"

// Tables of pairs need registers of 16 floats.
constexpr decltype(nullptr) shrink_one = nullptr, expand_one = nullptr;

}  // namespace

const Kernels kScalar = {
    "scalar",
    // Torch may have vectors where this file has none.
    {0, 0, 0},
    1 << 20,
#include "table.inc"
};

}  // namespace dts_fast::cpu
