// AVX2 with fused multiply-add and half-precision conversion (Haswell, Zen, and newer).
#if defined(__x86_64__)
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
#include "descend.inc"
}  // namespace

const Kernels kAvx2 = {"avx2", descend};

}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
