// Where CPU kernels register: checks, threads, and the choice of how the base is computed. The schemas are defined in
// Python (dts_fast/ops.py, dts_fast/descent.py); a kernel named here takes precedence over the plain-torch one for CPU
// tensors.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "../check.h"
#include "batch.h"
#include "isa.h"

namespace dts_fast::cpu {
namespace {

DType dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? kFloat32 : x.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// dts_fast/codes.py, PageLayout.nbytes.
int64_t page_nbytes(int64_t n, int64_t k) {
  constexpr int64_t kAlign = 128;
  return (kVOffset + (tiles(n) + tiles(k)) * kTileBytes + kAlign - 1) / kAlign * kAlign;
}

void check_range(const at::Tensor& slot_ids, int64_t slots) {
  const int32_t* const ids = slot_ids.const_data_ptr<int32_t>();
  if (!slot_ids.numel()) return;
  const auto [low, high] = std::minmax_element(ids, ids + slot_ids.numel());
  TORCH_CHECK_VALUE(*low >= -1 && *high < slots, "dts_fast: slot_ids: expected -1..", slots - 1, " for ", slots,
                    " slots, got ", *low, "..", *high, ".");
}

BankView view(const at::Tensor& pages, const at::Tensor& slot_pages, const at::Tensor& slot_weights,
              const at::Tensor& slot_ids) {
  return {pages.const_data_ptr<uint8_t>(),      pages.size(1),      slot_pages.const_data_ptr<int32_t>(),
          slot_weights.const_data_ptr<float>(), slot_pages.size(1), slot_ids.const_data_ptr<int32_t>()};
}

void run_parallel(const Problem& problem) {
  run(problem, kernels(), at::get_num_threads(),
      [](int64_t count, const std::function<void(int64_t, int64_t)>& body) { at::parallel_for(0, count, 1, body); });
}

// Whether the base is multiplied by our own loops or by torch (bench/results/ops.jsonl). Torch repacks the weight on each
// call, which pays for itself only with many rows of float32; it multiplies 16-bit types more slowly at any number. The
// choice does not look at the adapters, so that a row's result does not depend on its neighbours'.
bool own_base(DType dtype, int64_t m) { return dtype != kFloat32 || m <= 64; }

at::Tensor rows_in_order(const at::Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& pages, const at::Tensor& slot_pages, const at::Tensor& slot_weights,
                  const at::Tensor& slot_ids) {
  check_linear(x, weight, bias);
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  check_bank(x, n, k, page_nbytes(n, k), pages, slot_pages, slot_weights, slot_ids);
  check_range(slot_ids, slot_pages.size(0));
  // The result is of x's dtype, and its sums in float32, whatever autocast thinks of the products within.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor rows = rows_in_order(x), base = rows_in_order(weight);
  Problem problem = {};
  problem.dtype = dtype_of(x);
  problem.m = m, problem.n = n, problem.k = k;
  problem.x = rows.const_data_ptr(), problem.x_stride = rows.stride(0);
  problem.bank = view(pages, slot_pages, slot_weights, slot_ids);
  if (!own_base(problem.dtype, m)) {
    at::Tensor y = at::linear(x, weight, bias);
    problem.y = y.mutable_data_ptr(), problem.y_stride = n;
    if (touches(problem)) run_parallel(problem);
    return y;
  }
  at::Tensor y = at::empty({m, n}, x.options());
  const at::Tensor offset = bias ? bias->contiguous() : at::Tensor();
  problem.y = y.mutable_data_ptr(), problem.y_stride = n;
  problem.weight = base.const_data_ptr(), problem.weight_stride = base.stride(0);
  problem.bias = offset.defined() ? offset.const_data_ptr() : nullptr;
  run_parallel(problem);
  return y;
}

void add_delta_(at::Tensor& y, const at::Tensor& x, const at::Tensor& pages, const at::Tensor& slot_pages,
                const at::Tensor& slot_weights, const at::Tensor& slot_ids, bool transpose) {
  check_add_delta(y, x);
  const int64_t n = transpose ? x.size(1) : y.size(1), k = transpose ? y.size(1) : x.size(1);
  check_bank(x, n, k, page_nbytes(n, k), pages, slot_pages, slot_weights, slot_ids);
  check_range(slot_ids, slot_pages.size(0));
  const at::Tensor rows = rows_in_order(x);
  at::Tensor out = rows_in_order(y);
  Problem problem = {};
  problem.dtype = dtype_of(x);
  problem.m = x.size(0), problem.n = y.size(1), problem.k = x.size(1);
  problem.x = rows.const_data_ptr(), problem.x_stride = rows.stride(0);
  problem.y = out.mutable_data_ptr(), problem.y_stride = out.stride(0);
  problem.transpose = transpose;
  problem.bank = view(pages, slot_pages, slot_weights, slot_ids);
  if (!touches(problem)) return;
  run_parallel(problem);
  if (!out.is_same(y)) y.copy_(out);
}

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

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) {
  m.impl("linear", &linear);
  m.impl("add_delta_", &add_delta_);
  m.impl("descend_", &descend);
}

}  // namespace dts_fast::cpu
