// Where CUDA kernels register: their arguments are checked by dts_fast/ops.py, which also chooses between them and the
// other kernels for GPUs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include "../check.h"
#include "counters.h"
#include "decode.h"

namespace dts_fast::cuda {
namespace {

// Rows of whole 16 bytes, elements side by side.
bool aligned(const at::Tensor& t) {
  return t.stride(1) == 1 && t.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

// The shape of a launch: what the sizes suggest, or what a bench wants to measure.
DecodeShape choose(int64_t m, int64_t n, int64_t k, bool base, int multiprocessors, at::IntArrayRef wanted) {
  DecodeShape shape = choose_shape(m, n, k, base, multiprocessors);
  if (!wanted.empty()) {
    TORCH_CHECK_VALUE(wanted.size() == 6 && 8 * wanted[0] >= m && wanted[1] >= 1 && wanted[2] >= 1 && wanted[3] >= 1 &&
                          wanted[4] >= 1 && wanted[4] <= 64,
                      "dts_fast: shape: expected [row tiles, output tiles, groups, warps, slices, dependent] for ", m,
                      " rows, got ", wanted);
    const auto number = [&](int i) { return static_cast<int>(wanted[i]); };
    shape = {number(0), number(1), number(2), number(3), number(4)};
  }
  if (!base) shape.slices = 1;  // there is nothing to slice
  return shape;
}

void decode_(at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
             const std::optional<at::Tensor>& bias, const at::Tensor& pages, const at::Tensor& slot_pages,
             const at::Tensor& slot_weights, const at::Tensor& slot_ids, at::IntArrayRef wanted) {
  const int64_t m = x.size(0), n = y.size(1), k = x.size(1), length = slot_pages.size(1);
  expect(m <= kMostDecodeRows && k % 8 == 0 && aligned(x), "x",
         "at most " + std::to_string(kMostDecodeRows) + " rows of whole 16 bytes", x);
  if (weight) expect(aligned(*weight), "weight", "rows of whole 16 bytes", *weight);
  expect(k > 0 && k <= kMostDecodeInputs && length > 0, "x", "an input, and slots that may list pages", x);
  expect(reinterpret_cast<uintptr_t>(pages.const_data_ptr()) % 16 == 0, "pages", "an alignment of 16 bytes", pages);
  expect(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, "x", "float16 or bfloat16", x);
  if (m == 0 || n == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device()));
  const DecodeShape shape = choose(m, n, k, weight.has_value(), multiprocessors, wanted);
  const int splits = choose_splits(k);
  const at::Tensor partial = at::empty({splits, m, 16 * length}, x.options().dtype(at::kFloat));
  const at::Tensor h = at::empty({m, 16 * length}, x.options());
  DecodeProblem p = {};
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
  p.base = weight.has_value();
  if (weight) p.weight = weight->const_data_ptr(), p.weight_stride = weight->stride(0);
  const at::Tensor offset = bias ? bias->contiguous() : at::Tensor();
  p.bias = offset.defined() ? offset.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr(), p.y_stride = y.stride(0);
  p.pages = static_cast<const uint32_t*>(pages.const_data_ptr()), p.page_words = pages.size(1) / 4;
  p.u_tiles = 32 + (k + 15) / 16 * 16;  // dts_fast/codes.py, PageLayout.u_offset
  p.slot_pages = slot_pages.const_data_ptr<int32_t>(), p.slot_weights = slot_weights.const_data_ptr<float>();
  p.slot_ids = slot_ids.const_data_ptr<int32_t>(), p.list_length = static_cast<int>(length);
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.splits = splits;
  // Not measured yet, so only where a bench asks for it.
  p.dependent = !wanted.empty() && wanted[5] && dependent_launches();
  p.partial = partial.mutable_data_ptr<float>(), p.h = h.mutable_data_ptr();
  const int64_t rounded_n = blocks_of(shape, n) * outputs_of(shape);
  const at::Tensor sliced = at::empty({shape.slices > 1 ? shape.slices : 0, m, rounded_n}, partial.options());
  p.slices = shape.slices, p.slice_partial = sliced.mutable_data_ptr<float>();
  p.counters = counters(stream, kArrivals + m * length + blocks_of(shape, n));
  const int error = launch_decode(p, shape, x.scalar_type() == at::kBFloat16, stream);
  TORCH_CHECK(error == 0, "dts_fast: decode: ", error_text(error));
}

}  // namespace

TORCH_LIBRARY_IMPL(dts_fast, CUDA, m) { m.impl("decode_", &decode_); }

}  // namespace dts_fast::cuda
