// Launches: the instances of the kernels, and which of them a call wants.
#include "decode.cuh"

namespace dts_fast::cuda {

namespace {

template <class T, int kRowTiles, int kOutputTiles, int kWarps>
void launch(const DecodeProblem& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(blocks_of({kRowTiles, kOutputTiles, kWarps, 1}, p.n) * p.slices);
  if (p.base) {
    decode_kernel<T, kRowTiles, kOutputTiles, kWarps, true><<<blocks, 32 * (kWarps + 1), 0, stream>>>(p);
  } else {
    decode_kernel<T, kRowTiles, kOutputTiles, kWarps, false><<<blocks, 32 * (kWarps + 1), 0, stream>>>(p);
  }
}

template <class T>
int launch_typed(const DecodeProblem& p, const DecodeShape& shape, cudaStream_t stream) {
#define DTS_FAST_LAUNCH(rows, outputs, count)                                             \
  if (shape.row_tiles == rows && shape.output_tiles == outputs && shape.warps == count) { \
    launch<T, rows, outputs, count>(p, stream);                                           \
    return cudaGetLastError();                                                            \
  }
  DTS_FAST_DECODE_SHAPES(DTS_FAST_LAUNCH)
#undef DTS_FAST_LAUNCH
  return cudaErrorInvalidConfiguration;
}

}  // namespace

int launch_decode(const DecodeProblem& p, const DecodeShape& shape, bool bfloat16, cudaStream_t stream) {
  return bfloat16 ? launch_typed<__nv_bfloat16>(p, shape, stream) : launch_typed<__half>(p, shape, stream);
}

int decode_runs() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, decode_kernel<__nv_bfloat16, 1, 1, 7, true>);
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace dts_fast::cuda
