#include "instances.cuh"

namespace dts_fast::cuda {
template cudaError_t launch<__nv_bfloat16, true>(const DecodeProblem& p, const DecodeShape& shape, cudaStream_t stream);

cudaError_t attributes_of_an_instance(cudaFuncAttributes& attributes) {
  const cudaError_t error = cudaFuncGetAttributes(&attributes, decode_kernel<__nv_bfloat16, 1, 1, 1, 7, true>);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace dts_fast::cuda
