// Which of the kernels' instances a call wants, and whether this device can run them.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>

#include "decode.h"

namespace dts_fast::cuda {

// One in each of the files beside this one (instances.cuh).
template <class T, bool kBase>
cudaError_t launch(const DecodeProblem& p, const DecodeShape& shape, cudaStream_t stream);

// Of any instance, without an error that whoever asks next would find.
cudaError_t attributes_of_an_instance(cudaFuncAttributes& attributes);

int launch_decode(const DecodeProblem& p, const DecodeShape& shape, bool bfloat16, cudaStream_t stream) {
  auto* run = bfloat16 ? launch<__nv_bfloat16, false> : launch<__half, false>;
  if (p.base) run = bfloat16 ? launch<__nv_bfloat16, true> : launch<__half, true>;
  const cudaError_t error = run(p, shape, stream);
  if (error != cudaSuccess) cudaGetLastError();  // reported here: not to be found by whoever asks next
  return error;
}

bool dependent_launches() {
  constexpr int kMostDevices = 64;
  static std::atomic<signed char> known[kMostDevices];  // 0: not asked yet, 1: yes, -1: no
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kMostDevices) return false;
  if (known[device]) return known[device] > 0;
  cudaFuncAttributes attributes;
  const cudaError_t error = attributes_of_an_instance(attributes);
  // Machine code for an older one, or its PTX, does not wait for the kernel before it.
  known[device] = error == cudaSuccess && attributes.binaryVersion >= 90 && attributes.ptxVersion >= 90 ? 1 : -1;
  return known[device] > 0;
}

int decode_runs() {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  if (major < 8) return cudaErrorNoKernelImageForDevice;  // no matrix instructions for bfloat16, whatever was built
  cudaFuncAttributes attributes;
  return attributes_of_an_instance(attributes);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dts_fast::cuda
