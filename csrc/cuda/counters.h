// Counters for kernels whose blocks agree with each other: memory that is 0 before every launch, because every launch
// leaves it so.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace dts_fast::cuda {

// `count` counters of the current device. Launches on one stream follow one another and share theirs; a launch that is
// captured gets some of its own, because its graph may be replayed beside anything. Throws std::runtime_error where
// memory is short.
uint32_t* counters(cudaStream_t stream, int64_t count);

}  // namespace dts_fast::cuda
