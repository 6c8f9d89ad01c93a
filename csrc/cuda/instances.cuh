// Launches of the instances of one type, with a base or without. Each file that includes this compiles a quarter of
// them, so that a build has work for several processors.
#pragma once

#include <atomic>

#include "decode.cuh"

namespace dts_fast::cuda {

// Lets the current device's blocks of a kernel have more shared memory than they get unasked; asked for once.
template <class Kernel>
cudaError_t allow_shared(Kernel* kernel, std::atomic<uint64_t>& allowed, int bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || (device < 64 && (allowed.load() >> device & 1))) return error;
  const cudaError_t result = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (result == cudaSuccess && device < 64) allowed |= uint64_t{1} << device;
  return result;
}

template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
cudaError_t launch_kernel(const DecodeProblem& p, cudaStream_t stream) {
  constexpr auto kernel = decode_kernel<T, kRowTiles, kOutputTiles, kGroups, kWarps, kBase>;
  constexpr int kShared = sizeof(Shared<kRowTiles, kOutputTiles, kGroups, kWarps, kBase>);
  static_assert(kShared <= 99 * 1024, "what a block may have on every architecture");
  static std::atomic<uint64_t> allowed{0};  // devices, as bits
  if (const cudaError_t error = allow_shared(kernel, allowed, kShared)) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(blocks_of({kRowTiles, kOutputTiles, kGroups, kWarps, 1}, p.n) * p.slices));
  config.blockDim = dim3(32 * (kWarps + warps_beside(kRowTiles, kGroups)));
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = p.dependent ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, p);
}

template <class T, bool kBase>
cudaError_t launch(const DecodeProblem& p, const DecodeShape& shape, cudaStream_t stream) {
#define DTS_FAST_LAUNCH(rows, outputs, number, count)                                                               \
  if (shape.row_tiles == rows && shape.output_tiles == outputs && shape.groups == number && shape.warps == count) { \
    return launch_kernel<T, rows, outputs, number, count, kBase>(p, stream);                                        \
  }
  DTS_FAST_DECODE_SHAPES(DTS_FAST_LAUNCH)
#undef DTS_FAST_LAUNCH
  return cudaErrorInvalidConfiguration;
}

}  // namespace dts_fast::cuda
