// AVX-512 F, BW, VL and DQ (Skylake-X, Zen 4, and newer).
#if defined(__x86_64__)
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
#include "descend.inc"
}  // namespace

const Kernels kAvx512 = {"avx512", descend};

}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
