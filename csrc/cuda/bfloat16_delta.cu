#include "instances.cuh"

namespace dts_fast::cuda {
template cudaError_t launch<__nv_bfloat16, false>(const DecodeProblem& p, const DecodeShape& shape,
                                                  cudaStream_t stream);
}  // namespace dts_fast::cuda
