// Launches: the instances of the kernels, and which of them a call wants.
#include <atomic>

#include "decode.cuh"

namespace dts_fast::cuda {

namespace {

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

template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps>
cudaError_t launch(const DecodeProblem& p, cudaStream_t stream) {
  const cudaError_t error = p.base ? launch_kernel<T, kRowTiles, kOutputTiles, kGroups, kWarps, true>(p, stream)
                                   : launch_kernel<T, kRowTiles, kOutputTiles, kGroups, kWarps, false>(p, stream);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: not to be found by whoever asks next
  return error;
}

template <class T>
int launch_typed(const DecodeProblem& p, const DecodeShape& shape, cudaStream_t stream) {
#define DTS_FAST_LAUNCH(rows, outputs, number, count)                                                               \
  if (shape.row_tiles == rows && shape.output_tiles == outputs && shape.groups == number && shape.warps == count) { \
    return launch<T, rows, outputs, number, count>(p, stream);                                                      \
  }
  DTS_FAST_DECODE_SHAPES(DTS_FAST_LAUNCH)
#undef DTS_FAST_LAUNCH
  return cudaErrorInvalidConfiguration;
}

}  // namespace

int launch_decode(const DecodeProblem& p, const DecodeShape& shape, bool bfloat16, cudaStream_t stream) {
  return bfloat16 ? launch_typed<__nv_bfloat16>(p, shape, stream) : launch_typed<__half>(p, shape, stream);
}

bool dependent_launches() {
  constexpr int kMostDevices = 64;
  static std::atomic<signed char> known[kMostDevices];  // 0: not asked yet, 1: yes, -1: no
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return false;
  if (known[device]) return known[device] > 0;
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, decode_kernel<__nv_bfloat16, 1, 1, 1, 7, true>);
  // Machine code for an older one, or its PTX, does not wait for the kernel before it.
  known[device] = error == cudaSuccess && attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90 ? 1 : -1;
  return known[device] > 0;
}

int decode_runs() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, decode_kernel<__nv_bfloat16, 1, 1, 1, 7, true>);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dts_fast::cuda
