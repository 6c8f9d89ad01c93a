// Memory for one call: aligned to a cache line, not initialised.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace dts_fast::cpu {

class Scratch {
 public:
  explicit Scratch(int64_t floats) {
    const int64_t bytes = (std::max<int64_t>(floats, 1) * 4 + 63) / 64 * 64;
    memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    if (!memory_) throw std::bad_alloc();
#if defined(DTS_FAST_POISON)
    std::fill_n(memory_.get(), bytes / 4, NAN);  // what is read before it is written shows in the result
#endif
  }
  float* get() const { return memory_.get(); }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> memory_;
};

}  // namespace dts_fast::cpu
