// AMX (Sapphire Rapids and newer) for the bfloat16 base of batches; everything else is AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstring>

#include "kernels.h"

// After all includes: inline functions of theirs are shared with files for other processors.
#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

namespace dts_fast::cpu {
namespace {

constexpr int kLanes = 16;
constexpr bool kPairs = false;
const Kernels& kFewRows = kAvx512;

#include "types.inc"

// GCC's intrinsics do not say that they read memory: without this, what they are to read may never be written.
#define TILES_READ(p) __asm__ volatile("" : : "r"(p) : "memory")
#define TILES_BEGIN(config)   \
  do {                        \
    TILES_READ(config);       \
    _tile_loadconfig(config); \
  } while (0)
#define TILES_END() _tile_release()
#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, p, bytes) \
  do {                         \
    TILES_READ(p);             \
    _tile_loadd(t, p, bytes);  \
  } while (0)
#define TILE_STORE(t, p, bytes) _tile_stored(t, p, bytes)
#define TILE_DOT(sum, a, b) _tile_dpbf16ps(sum, a, b)

#include "tiles.inc"

}  // namespace
}  // namespace dts_fast::cpu

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace dts_fast::cpu {
namespace {

// Compiled for any processor, for it runs on any when the library is loaded.
Kernels table() {
  Kernels kernels = kAvx512;
  kernels.name = "amx";
  kernels.pack[kBFloat16] = pack_tiles;
  kernels.dense[kBFloat16] = dense_tiles;
  // Not measured: decoding batches, which memory bounds. Torch multiplies larger ones on the same units.
  kernels.own_base_rows[kBFloat16] = 32;
  return kernels;
}

}  // namespace

const Kernels kAmx = table();

}  // namespace dts_fast::cpu
#endif
