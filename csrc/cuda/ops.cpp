// Where CUDA kernels register: checks, and the choice between them and what else serves a GPU (dts_fast/gpu.py). The
// schemas are defined in dts_fast/ops.py. None of this is Python's, because a layer that decodes takes microseconds.
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <atomic>

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

// The tensors of a bank, and the slot of each row.
struct Bank {
  const at::Tensor &pages, &slot_pages, &slot_weights, &slot_ids;
};

// y = x W^T + bias + delta, or y += delta without a weight.
void decode(at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
            const std::optional<at::Tensor>& bias, const Bank& bank, at::IntArrayRef wanted) {
  const int64_t m = x.size(0), n = y.size(1), k = x.size(1), length = bank.slot_pages.size(1);
  expect(m <= kMostDecodeRows && k % 8 == 0 && aligned(x), "x", x, "at most ", kMostDecodeRows,
         " rows of whole 16 bytes");
  if (weight) expect(aligned(*weight), "weight", *weight, "rows of whole 16 bytes");
  expect(k > 0 && k <= kMostDecodeInputs && length > 0, "x", x, "an input, and slots that may list pages");
  expect(reinterpret_cast<uintptr_t>(bank.pages.const_data_ptr()) % 16 == 0, "pages", bank.pages,
         "an alignment of 16 bytes");
  expect(x.scalar_type() == at::kHalf || x.scalar_type() == at::kBFloat16, "x", x, "float16 or bfloat16");
  if (m == 0 || n == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream();
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, x.get_device()));
  const DecodeShape shape = choose(m, n, k, weight.has_value(), multiprocessors, wanted);
  const int splits = choose_splits(k);
  const int64_t h_size = m * 16 * length, slices = shape.slices > 1 ? shape.slices : 0;
  const int64_t slice_size = m * blocks_of(shape, n) * outputs_of(shape);
  // One allocation: another one would take as long as a launch.
  const at::Tensor floats = at::empty({(splits + 1) * h_size + slices * slice_size}, x.options().dtype(at::kFloat));
  float* const partial = floats.mutable_data_ptr<float>();
  DecodeProblem p = {};
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
  p.base = weight.has_value();
  if (weight) p.weight = weight->const_data_ptr(), p.weight_stride = weight->stride(0);
  const at::Tensor offset = bias ? bias->contiguous() : at::Tensor();
  p.bias = offset.defined() ? offset.const_data_ptr() : nullptr;
  p.y = y.mutable_data_ptr(), p.y_stride = y.stride(0);
  p.pages = static_cast<const uint32_t*>(bank.pages.const_data_ptr()), p.page_words = bank.pages.size(1) / 4;
  p.u_tiles = 32 + (k + 15) / 16 * 16;  // dts_fast/codes.py, PageLayout.u_offset
  p.slot_pages = bank.slot_pages.const_data_ptr<int32_t>(), p.slot_weights = bank.slot_weights.const_data_ptr<float>();
  p.slot_ids = bank.slot_ids.const_data_ptr<int32_t>(), p.list_length = static_cast<int>(length);
  p.m = static_cast<int>(m), p.n = static_cast<int>(n), p.k = static_cast<int>(k);
  p.splits = splits;
  p.late = sums_late(shape, m, splits);
  // Not measured yet, so only where a bench asks for it.
  p.dependent = !wanted.empty() && wanted[5] && dependent_launches();
  p.partial = partial, p.h = partial + splits * h_size;
  p.slices = shape.slices, p.slice_partial = partial + (splits + 1) * h_size;
  p.counters = counters(stream, kArrivals + m * length + blocks_of(shape, n));
  const int error = launch_decode(p, shape, x.scalar_type() == at::kBFloat16, stream);
  TORCH_CHECK(error == 0, "dts_fast: decode: ", error_text(error));
}

std::atomic<bool> decoding{true};

// Whether this device has what the kernels need, and machine code or PTX for it is here.
bool runs_on(int device) {
  constexpr int kMostDevices = 64;
  static std::atomic<signed char> known[kMostDevices];  // 0: not asked yet, 1: yes, -1: no
  if (device < 0 || device >= kMostDevices) return false;
  if (!known[device]) {
    const c10::cuda::CUDAGuard guard(static_cast<c10::DeviceIndex>(device));
    const int error = decode_runs();
    const bool never = error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
    if (error && !never) return false;  // memory is short, say: asked again
    known[device] = error ? -1 : 1;
  }
  return known[device] > 0;
}

// Whether the decode kernel is to be used, and can. No number of it has been measured yet.
bool decodes(const at::Tensor& x, const std::optional<at::Tensor>& weight, const at::Tensor& slot_pages) {
  const int64_t m = x.size(0), k = x.size(1);
  const auto dtype = x.scalar_type();
  return decoding && 0 < m && m <= kMostDecodeRows && 0 < k && k <= kMostDecodeInputs && k % 8 == 0 &&
         (dtype == at::kBFloat16 || dtype == at::kHalf) && aligned(x) && (!weight || aligned(*weight)) &&
         slot_pages.numel() > 0 && runs_on(x.get_device());
}

at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                  const at::Tensor& pages, const at::Tensor& slot_pages, const at::Tensor& slot_weights,
                  const at::Tensor& slot_ids) {
  check_linear(x, weight, bias, pages, slot_pages, slot_weights, slot_ids);
  if (!decodes(x, weight, slot_pages)) {
    static const auto others =
        c10::Dispatcher::singleton().findSchemaOrThrow("dts_fast::linear_otherwise", "").typed<decltype(linear)>();
    return others.call(x, weight, bias, pages, slot_pages, slot_weights, slot_ids);
  }
  at::Tensor y = at::empty({x.size(0), weight.size(0)}, x.options());
  decode(y, x, weight, bias, {pages, slot_pages, slot_weights, slot_ids}, {});
  return y;
}

void add_delta_(at::Tensor& y, const at::Tensor& x, const at::Tensor& pages, const at::Tensor& slot_pages,
                const at::Tensor& slot_weights, const at::Tensor& slot_ids, bool transpose) {
  check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, transpose);
  if (transpose || y.stride(1) != 1 || !decodes(x, std::nullopt, slot_pages)) {
    static const auto others = c10::Dispatcher::singleton()
                                   .findSchemaOrThrow("dts_fast::add_delta_otherwise_", "")
                                   .typed<decltype(add_delta_)>();
    return others.call(y, x, pages, slot_pages, slot_weights, slot_ids, transpose);
  }
  decode(y, x, std::nullopt, std::nullopt, {pages, slot_pages, slot_weights, slot_ids}, {});
}

// The kernel alone, for benches that try shapes.
void decode_(at::Tensor& y, const at::Tensor& x, const std::optional<at::Tensor>& weight,
             const std::optional<at::Tensor>& bias, const at::Tensor& pages, const at::Tensor& slot_pages,
             const at::Tensor& slot_weights, const at::Tensor& slot_ids, at::IntArrayRef shape) {
  if (weight) check_linear(x, *weight, bias, pages, slot_pages, slot_weights, slot_ids);
  check_add_delta(y, x, pages, slot_pages, slot_weights, slot_ids, /*transpose=*/false);
  expect(y.size(1) <= 1 || y.stride(1) == 1, "y", y, "elements of a row side by side");
  decode(y, x, weight, bias, {pages, slot_pages, slot_weights, slot_ids}, shape);
}

}  // namespace

void set_decoding(bool on) { decoding = on; }

TORCH_LIBRARY_IMPL(dts_fast, CUDA, m) {
  m.impl("linear", &linear);
  m.impl("add_delta_", &add_delta_);
  m.impl("decode_", &decode_);
}

}  // namespace dts_fast::cuda
