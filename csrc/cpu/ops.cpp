// Where CPU kernels register. The schemas are defined in Python; a kernel named here takes precedence over the
// plain-torch implementation for CPU tensors.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <memory>

#include "isa.h"

namespace dts_fast::cpu {
namespace {

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<float[], AlignedFree> scratch(int64_t floats) {
  const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
  return std::unique_ptr<float[], AlignedFree>(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

// Arguments are checked by dts_fast/descent.py, the only caller.
void descend(at::Tensor& rows, const at::Tensor& target, const at::Tensor& gram, const at::Tensor& curvature,
             const at::Tensor& levels, int64_t sweeps) {
  const Descent problem = {rows.data_ptr<float>(),
                           target.const_data_ptr<float>(),
                           gram.const_data_ptr<float>(),
                           curvature.const_data_ptr<float>(),
                           levels.const_data_ptr<float>(),
                           rows.size(0),
                           rows.size(1),
                           static_cast<int>(sweeps)};
  const auto run = kernels().descend;
  const int64_t chunks = (problem.n + kDescentColumns - 1) / kDescentColumns;
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    const auto memory = scratch(descent_scratch(problem.rank));
    run(problem, begin * kDescentColumns, std::min(end * kDescentColumns, problem.n), memory.get());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) { m.impl("descend_", &descend); }

}  // namespace dts_fast::cpu
