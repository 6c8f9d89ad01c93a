// Where CPU kernels register: checks, threads, and the choice of how the base is computed. The schemas are defined in
// Python (dts_fast/ops.py, descent.py); a kernel named here takes precedence over the plain-torch one for
// CPU tensors.
#include <ATen/MemoryOverlap.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>

#include "../check.h"
#include "batch.h"
#include "isa.h"
#include "paging.h"
#include "scratch.h"

namespace dts_fast::cpu {
namespace {

DType dtype_of(const at::Tensor& x) {
  return x.scalar_type() == at::kFloat ? kFloat32 : x.scalar_type() == at::kHalf ? kFloat16 : kBFloat16;
}

void check_range(const at::Tensor& slot_ids, int64_t slots) {
  const int32_t* const ids = slot_ids.const_data_ptr<int32_t>();
  if (!slot_ids.numel()) return;
  const auto [low, high] = std::minmax_element(ids, ids + slot_ids.numel());
  TORCH_CHECK_VALUE(*low >= -1 && *high < slots, "dts_fast: slot_ids: expected -1..", slots - 1, " for ", slots,
                    " slots, got ", *low, "..", *high, ".");
}

// The lists that are used; a bank may have tens of thousands (each expert of each adapter), and a call takes
// microseconds.
void check_pages(const at::Tensor& slot_ids, const at::Tensor& slot_pages, int64_t pages) {
  const int32_t* const ids = slot_ids.const_data_ptr<int32_t>();
  const int32_t* const listed = slot_pages.const_data_ptr<int32_t>();
  const int64_t length = slot_pages.size(1);
  int32_t most = -1;
  for (int64_t m = 0; m < slot_ids.numel(); ++m) {
    if (ids[m] < 0 || (m > 0 && ids[m] == ids[m - 1])) continue;
    const int32_t* const list = listed + ids[m] * length;
    for (int64_t i = 0; i < length && list[i] >= 0; ++i) most = std::max(most, list[i]);
  }
  TORCH_CHECK_VALUE(most < pages, "dts_fast: slot_pages: expected pages below ", pages, ", got ", most, ".");
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

// Whether the base is multiplied by our own loops or by torch. The choice does not look at the adapters, so that a
// row's result does not depend on its neighbours'.
bool own_base(DType dtype, int64_t m, const at::Tensor& weight) {
  if (weight.size(1) > 1 && weight.stride(1) != 1) return false;
  return m <= kernels().own_base_rows[dtype];
}

at::Tensor rows_in_order(const at::Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& pages, const at::Tensor& slot_pages, const at::Tensor& slot_weights,
                  const at::Tensor& slot_ids) {
  check_linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids);
  const int64_t m = x.size(0), n = weight.size(0), k = weight.size(1);
  check_range(slot_ids, slot_pages.size(0));
  check_pages(slot_ids, slot_pages, pages.size(0));
  // The result is of x's dtype, and its sums in float32, whatever autocast thinks of the products within.
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::Tensor rows = rows_in_order(x);
  Problem problem = {};
  problem.dtype = dtype_of(x);
  problem.m = m, problem.n = n, problem.k = k;
  problem.x = rows.const_data_ptr(), problem.x_stride = rows.stride(0);
  problem.bank = view(pages, slot_pages, slot_weights, slot_ids);
  if (!own_base(problem.dtype, m, weight)) {
    at::Tensor y = at::linear(x, weight, bias);
    problem.y = y.mutable_data_ptr(), problem.y_stride = n;
    if (touches(problem)) run_parallel(problem);
    return y;
  }
  at::Tensor y = at::empty({m, n}, x.options());
  const at::Tensor offset = bias ? bias->contiguous() : at::Tensor();
  problem.y = y.mutable_data_ptr(), problem.y_stride = n;
  problem.weight = weight.const_data_ptr(), problem.weight_stride = weight.stride(0);
  problem.bias = offset.defined() ? offset.const_data_ptr() : nullptr;
  run_parallel(problem);
  return y;
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         int64_t out_features, const at::Tensor& pages, const at::Tensor& slot_pages,
                         const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  check_packed_linear(x, weight, bias, out_features, kPanel);
  const int64_t m = x.size(0), n = out_features, k = x.size(1);
  check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids);
  check_range(slot_ids, slot_pages.size(0));
  check_pages(slot_ids, slot_pages, pages.size(0));
  at::Tensor y = at::empty({m, n}, x.options());
  const at::Tensor rows = rows_in_order(x), offset = bias ? bias->contiguous() : at::Tensor();
  Problem problem = {};
  problem.dtype = dtype_of(x);
  problem.m = m, problem.n = n, problem.k = k;
  problem.x = rows.const_data_ptr(), problem.x_stride = rows.stride(0);
  problem.bank = view(pages, slot_pages, slot_weights, slot_ids);
  problem.y = y.mutable_data_ptr(), problem.y_stride = n;
  problem.weight = weight.const_data_ptr(), problem.panels = true;
  problem.bias = offset.defined() ? offset.const_data_ptr() : nullptr;
  run_parallel(problem);
  return y;
}

void add_delta_(at::Tensor& y, const at::Tensor& x, const at::Tensor& pages, const at::Tensor& slot_pages,
                const at::Tensor& slot_weights, const at::Tensor& slot_ids, bool transpose) {
  check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, transpose);
  check_range(slot_ids, slot_pages.size(0));
  check_pages(slot_ids, slot_pages, pages.size(0));
  at::assert_no_internal_overlap(y);
  at::assert_no_overlap(y, x);
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

at::Tensor embedding_delta(const at::Tensor& ids, int64_t n, int64_t k, const at::Tensor& pages,
                           const at::Tensor& slot_pages, const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  expect(ids.dim() == 1 && (ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt), "ids", ids,
         "int64 or int32 [M]");
  check_bank_of(ids, n, k, pages, slot_pages, slot_weights, slot_ids);
  check_range(slot_ids, slot_pages.size(0));
  check_pages(slot_ids, slot_pages, pages.size(0));
  const at::Tensor rows = ids.to(at::kLong).contiguous();
  const int64_t* const first = rows.const_data_ptr<int64_t>();
  if (rows.numel()) {
    const auto [low, high] = std::minmax_element(first, first + rows.numel());
    TORCH_CHECK_VALUE(*low >= 0 && *high < n, "dts_fast: ids: expected 0..", n - 1, ", got ", *low, "..", *high, ".");
  }
  at::Tensor out = at::zeros({ids.size(0), k}, ids.options().dtype(at::kFloat));
  Problem problem = {};
  problem.dtype = kFloat32;
  problem.m = ids.size(0), problem.n = k, problem.k = n;
  problem.ids = first;
  problem.y = out.mutable_data_ptr(), problem.y_stride = k;
  problem.transpose = true;
  problem.bank = view(pages, slot_pages, slot_weights, slot_ids);
  if (touches(problem)) run_parallel(problem);
  return out;
}

void descend(at::Tensor& rows, const at::Tensor& target, const at::Tensor& gram, const at::Tensor& curvature,
             const at::Tensor& levels, int64_t sweeps) {
  const int64_t rank = rows.dim() == 2 ? rows.size(0) : -1;
  const auto fits = [](const at::Tensor& t, at::IntArrayRef sizes) {
    return t.scalar_type() == at::kFloat && t.sizes() == sizes && t.is_contiguous();
  };
  expect(rank >= 0 && fits(rows, rows.sizes()), "rows", rows, "contiguous float32 [r, n]");
  expect(fits(target, rows.sizes()), "target", target, "contiguous float32 ", rows.sizes(), " like rows");
  expect(fits(gram, {rank, rank}), "gram", gram, "contiguous float32 [", rank, ", ", rank, "]");
  expect(fits(curvature, {rank}), "curvature", curvature, "contiguous float32 [", rank, "]");
  expect(fits(levels, {4}), "levels", levels, "contiguous float32 [4], ascending");
  if (rows.numel() == 0) return;
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
    const Scratch memory(descent_scratch(problem.rank));
    run(problem, begin * kDescentColumns, std::min(end * kDescentColumns, problem.n), memory.get());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) {
  m.impl("linear", &linear);
  m.impl("packed_linear", &packed_linear);
  m.impl("add_delta_", &add_delta_);
  m.impl("embedding_delta", &embedding_delta);
  m.impl("descend_", &descend);
}

}  // namespace dts_fast::cpu
