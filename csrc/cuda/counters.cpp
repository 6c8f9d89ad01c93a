#include "counters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>

namespace dts_fast::cuda {

namespace {

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("dts_fast: counters: ") + cudaGetErrorString(error));
}

struct Span {
  uint32_t* data = nullptr;
  int64_t count = 0;
};

// Zeros that are handed out once and never taken back: a graph may live as long as the process.
class Slab {
 public:
  uint32_t* take(int64_t count) {
    count = (count + 31) / 32 * 32;  // no two in a cache line
    if (count > left_.count) grow(std::max<int64_t>(count, 1 << 20));
    uint32_t* const out = left_.data;
    left_.data += count;
    left_.count -= count;
    return out;
  }

 private:
  void grow(int64_t count) {
    // While a stream of this thread captures, memory can be had in this mode alone, and set on a stream of its own.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    void* memory = nullptr;
    cudaStream_t stream = nullptr;
    cudaError_t error = cudaMalloc(&memory, count * sizeof(uint32_t));
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, count * sizeof(uint32_t), stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream) cudaStreamDestroy(stream);
    check(cudaThreadExchangeStreamCaptureMode(&mode));
    check(error);
    left_ = {static_cast<uint32_t*>(memory), count};
  }

  Span left_;
};

}  // namespace

uint32_t* counters(cudaStream_t stream, int64_t count) {
  static std::mutex mutex;
  static std::map<int, Slab> slabs;
  static std::map<std::pair<int, unsigned long long>, Span> of_stream;  // by id: handles are used again
  int device = 0;
  check(cudaGetDevice(&device));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(stream, &status));
  const std::lock_guard<std::mutex> lock(mutex);
  if (status != cudaStreamCaptureStatusNone) return slabs[device].take(count);
  unsigned long long id = 0;
  check(cudaStreamGetId(stream, &id));
  Span& span = of_stream[{device, id}];
  if (span.count < count) {
    count = std::max<int64_t>(count, 2 * span.count);
    span = {slabs[device].take(count), count};
  }
  return span.data;
}

}  // namespace dts_fast::cuda
