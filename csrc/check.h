// Every native argument check, once. What is checked and how it is said is as in dts_fast/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace dts_fast {

inline std::string shape_text(at::IntArrayRef sizes) {
  std::string text = "[";
  for (size_t i = 0; i < sizes.size(); ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

inline std::string dtype_text(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kDouble:
      return "torch.float64";
    case at::kByte:
      return "torch.uint8";
    case at::kChar:
      return "torch.int8";
    case at::kInt:
      return "torch.int32";
    case at::kLong:
      return "torch.int64";
    default:
      return c10::toString(dtype);
  }
}

// A Python ValueError: what, expected, got.
inline void expect(bool holds, const char* name, const std::string& expected, const at::Tensor& got) {
  TORCH_CHECK_VALUE(holds, "dts_fast: ", name, ": expected ", expected, ", got ", dtype_text(got.scalar_type()), " ",
                    shape_text(got.sizes()), got.is_contiguous() ? "" : " (not contiguous)", " on ", got.device().str(),
                    ".");
}

// The bank of a layer [n, k] whose pages take `page_nbytes`, for the rows of x (numbers or ids).
inline void check_bank_of(const at::Tensor& x, int64_t n, int64_t k, int64_t page_nbytes, const at::Tensor& pages,
                          const at::Tensor& slot_pages, const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  expect(pages.scalar_type() == at::kByte && pages.dim() == 2 && pages.size(1) == page_nbytes && pages.is_contiguous(),
         "pages",
         "contiguous uint8 [P, " + std::to_string(page_nbytes) + "], the rank pages of a layer " + shape_text({n, k}),
         pages);
  expect(slot_pages.scalar_type() == at::kInt && slot_pages.dim() == 2 && slot_pages.is_contiguous(), "slot_pages",
         "contiguous int32 [S, L]", slot_pages);
  expect(slot_weights.scalar_type() == at::kFloat && slot_weights.sizes() == slot_pages.sizes() &&
             slot_weights.is_contiguous(),
         "slot_weights", "contiguous float32 " + shape_text(slot_pages.sizes()) + " like slot_pages", slot_weights);
  expect(slot_ids.scalar_type() == at::kInt && slot_ids.dim() == 1 && slot_ids.size(0) == x.size(0) &&
             slot_ids.is_contiguous(),
         "slot_ids", "contiguous int32 [" + std::to_string(x.size(0)) + "], one slot for each row of x", slot_ids);
  const std::string device = "device " + x.device().str() + " like x";
  expect(pages.device() == x.device(), "pages", device, pages);
  expect(slot_pages.device() == x.device(), "slot_pages", device, slot_pages);
  expect(slot_ids.device() == x.device(), "slot_ids", device, slot_ids);
}

inline void check_bank(const at::Tensor& x, int64_t n, int64_t k, int64_t page_nbytes, const at::Tensor& pages,
                       const at::Tensor& slot_pages, const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  const auto dtype = x.scalar_type();
  expect(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "x", "float32, float16 or bfloat16", x);
  check_bank_of(x, n, k, page_nbytes, pages, slot_pages, slot_weights, slot_ids);
}

inline void check_bias(const at::Tensor& x, const std::optional<at::Tensor>& bias, int64_t n) {
  if (!bias) return;
  expect(bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type(), "bias",
         "[" + std::to_string(n) + "] " + dtype_text(x.scalar_type()), *bias);
  expect(bias->device() == x.device(), "bias", "device " + x.device().str() + " like x", *bias);
}

inline void check_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  expect(weight.dim() == 2, "weight", "[N, K]", weight);
  expect(weight.scalar_type() == x.scalar_type(), "weight",
         "dtype of x, " + dtype_text(x.scalar_type()) + " (or convert x)", weight);
  const int64_t n = weight.size(0), k = weight.size(1);
  expect(x.dim() == 2 && x.size(1) == k, "x", "[M, " + std::to_string(k) + "] for weight " + shape_text(weight.sizes()),
         x);
  check_bias(x, bias, n);
}

// A weight [n, K] in panels of `panel` outputs (dts_fast/packing.py).
inline void check_packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                int64_t n, int64_t panel) {
  expect(x.dim() == 2, "x", "[M, K]", x);
  const int64_t pair = x.scalar_type() == at::kBFloat16 ? 2 : 1;
  const at::DimVector sizes = {(n + panel - 1) / panel, (x.size(1) + pair - 1) / pair, panel, pair};
  expect(weight.sizes() == sizes && weight.scalar_type() == x.scalar_type() && weight.is_contiguous(), "weight",
         "contiguous " + dtype_text(x.scalar_type()) + " " + shape_text(sizes) + ", packed from " +
             shape_text({n, x.size(1)}),
         weight);
  check_bias(x, bias, n);
}

inline void check_add_delta(const at::Tensor& y, const at::Tensor& x) {
  expect(x.dim() == 2, "x", "[M, K]", x);
  expect(y.dim() == 2 && y.size(0) == x.size(0), "y",
         "[" + std::to_string(x.size(0)) + ", N] for x " + shape_text(x.sizes()), y);
  expect(y.scalar_type() == x.scalar_type(), "y", "dtype of x, " + dtype_text(x.scalar_type()) + " (or convert x)", y);
  expect(y.device() == x.device(), "y", "device " + x.device().str() + " like x", y);
}

}  // namespace dts_fast
