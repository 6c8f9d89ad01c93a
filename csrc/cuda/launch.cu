// Launches: the instances of the kernels, and which of them a call wants.
#include <atomic>

#include "decode.cuh"

namespace dts_fast::cuda {

namespace {

template <class T, int kRowTiles, int kOutputTiles, int kGroups, int kWarps>
cudaError_t launch(const DecodeProblem& p, cudaStream_t stream) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(blocks_of({kRowTiles, kOutputTiles, kGroups, kWarps, 1}, p.n) * p.slices));
  config.blockDim = dim3(32 * (kWarps + warps_beside(kGroups)));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = p.dependent ? 1 : 0;
  const cudaError_t error =
      p.base ? cudaLaunchKernelEx(&config, decode_kernel<T, kRowTiles, kOutputTiles, kGroups, kWarps, true>, p)
             : cudaLaunchKernelEx(&config, decode_kernel<T, kRowTiles, kOutputTiles, kGroups, kWarps, false>, p);
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
