// The instructions that C++ has no words for: matrix products, loads with a cache policy, release and acquire.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace dts_fast::cuda {

// sums [16, 8] += a [16, 16] b [16, 8], in float32.
template <class T>
__device__ __forceinline__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1);

template <>
__device__ __forceinline__ void mma<__nv_bfloat16>(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                   uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<__half>(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                            uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// What is read once must not push out of the second-level cache what is read again (x, h, the next layer's codes).
__device__ __forceinline__ uint64_t read_once_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies of 16 bytes to shared memory (zeros where they are not `there`), past the first-level cache. They are counted
// in groups, which end in their order: a wait for the oldest leaves the others under way. (Loads to registers are not:
// what a compiler waits for is that all have come that it has given one of six numbers.) Four lanes ask for 64 bytes of
// a row, and the memory is asked for the 64 behind them as well, which come next.
__device__ __forceinline__ void copy_once(uint4* to, const void* from, bool there, uint64_t policy) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to)), bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;"
               :
               : "r"(at), "l"(from), "r"(bytes), "l"(policy)
               : "memory");
}
// What other blocks want as well.
__device__ __forceinline__ void copy_near(uint4* to, const void* from) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(at), "l"(from) : "memory");
}
__device__ __forceinline__ void end_group_of_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
// Returns when all groups but the last kLeft have come, for what this thread has copied.
template <int kLeft>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

// What the kernel before this one may have written: a load that stays behind the wait for it (`__ldg` need not), and
// goes through the first-level cache, where a block's warps share x.
// Zeros where it is not `there`: without a branch, which would keep what comes behind it from being loaded meanwhile.
__device__ __forceinline__ uint4 load_result(const uint4* p, bool there) {
  uint4 v = {};
  asm volatile(
      "{\n\t.reg .pred p;\n\tsetp.ne.u32 p, %5, 0;\n\t"
      "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n\t}"
      : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
      : "l"(p), "r"(static_cast<uint32_t>(there))
      : "memory");
  return v;
}
__device__ __forceinline__ int load_result(const int* p) {
  int v;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

// Into the second-level cache, which sees what other kernels write: no one can be misled by what it holds.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" : : "l"(p)); }

// Dependent launches (Hopper and newer): a kernel may begin before the one in front of it has ended, and waits here for
// its results; at once where it was launched as usual. Others say when the next one may begin.
__device__ __forceinline__ void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}
__device__ __forceinline__ void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Returns when a counter has reached a number, with everything that was released by those who counted. Polling itself
// acquires nothing: that would empty the first-level cache each time, through which x is shared.
__device__ __forceinline__ void wait_for(const uint32_t* p, uint32_t number) {
  uint32_t v;
  while (true) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    if (v >= number) break;
    __nanosleep(64);
  }
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
}

// A value as if it were known only here: what is computed from it stays where it is used, and occupies no registers
// before.
__device__ __forceinline__ int here(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// A flag in shared memory that others may read at any time.
__device__ __forceinline__ void set_flag(int* p) { atomicExch(p, 1); }
__device__ __forceinline__ int read_flag(int* p) { return atomicOr(p, 0); }

__device__ __forceinline__ uint32_t fetch_add(uint32_t* p) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(old) : "l"(p) : "memory");
  return old;
}

// A barrier of its own number: who arrives does not wait, who meets waits for all.
template <int kNumber>
__device__ __forceinline__ void arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" : : "n"(kNumber), "r"(threads) : "memory");
}
template <int kNumber>
__device__ __forceinline__ void meet(int threads) {
  asm volatile("bar.sync %0, %1;" : : "n"(kNumber), "r"(threads) : "memory");
}

// Counts from 0 to `bound` and then starts again: a counter that is incremented bound + 1 times in a launch is 0 after
// it, and needs no one to reset it.
__device__ __forceinline__ void increment_release(uint32_t* p, uint32_t bound) {
  asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" : : "l"(p), "r"(bound) : "memory");
}

// The same, and whether that was the last one, which then has what was released by those before it. Only the last one
// acquires: that empties the first-level cache, in which others have x.
__device__ __forceinline__ bool increment_is_last(uint32_t* p, uint32_t bound) {
  uint32_t old;
  asm volatile("atom.release.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(bound) : "memory");
  if (old != bound) return false;
  asm volatile("fence.acq_rel.gpu;" : : : "memory");
  return true;
}

// 1 / v for a v that is no denormal number, without the branch that a division has.
__device__ __forceinline__ float reciprocal(float v) {
  float out;
  asm("rcp.approx.f32 %0, %1;" : "=f"(out) : "f"(v));
  return out;
}

__device__ __forceinline__ uint32_t fetch_increment(uint32_t* p, uint32_t bound) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(bound) : "memory");
  return old;
}

template <class T>
__device__ __forceinline__ uint32_t pack(float first, float second);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);

template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

}  // namespace dts_fast::cuda
