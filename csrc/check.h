// Every native argument check, once. What is checked and how it is said is as in dts_fast/ops.py.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <array>

namespace dts_fast {

inline const char* dtype_text(at::ScalarType dtype) {
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

// A Python ValueError: what, got, expected. The parts of what was expected become a text only where it is needed: a
// small layer is done in less time than texts take.
template <class... Parts>
void expect(bool holds, const char* name, const at::Tensor& got, const Parts&... expected) {
  TORCH_CHECK_VALUE(holds, "dts_fast: ", name, ": expected ", c10::str(expected...), ", got ",
                    dtype_text(got.scalar_type()), " ", got.sizes(), got.is_contiguous() ? "" : " (not contiguous)",
                    " on ", got.device(), ".");
}

// dts_fast/codes.py, PageLayout.nbytes.
inline int64_t page_nbytes(int64_t n, int64_t k) {
  constexpr int64_t kTile = 16, kTileBytes = 64, kHead = 128, kAlign = 128;
  const int64_t tiles = (n + kTile - 1) / kTile + (k + kTile - 1) / kTile;
  return (kHead + tiles * kTileBytes + kAlign - 1) / kAlign * kAlign;
}

// The bank of a layer [n, k], for the rows of x (numbers or ids).
inline void check_bank_of(const at::Tensor& x, int64_t n, int64_t k, const at::Tensor& pages,
                          const at::Tensor& slot_pages, const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  const at::Device device = x.device();
  const int64_t nbytes = page_nbytes(n, k);
  expect(pages.scalar_type() == at::kByte && pages.dim() == 2 && pages.size(1) == nbytes && pages.is_contiguous(),
         "pages", pages, "contiguous uint8 [P, ", nbytes, "], the rank pages of a layer [", n, ", ", k, "]");
  expect(slot_pages.scalar_type() == at::kInt && slot_pages.dim() == 2 && slot_pages.is_contiguous(), "slot_pages",
         slot_pages, "contiguous int32 [S, L]");
  expect(slot_weights.scalar_type() == at::kFloat && slot_weights.sizes() == slot_pages.sizes() &&
             slot_weights.is_contiguous(),
         "slot_weights", slot_weights, "contiguous float32 ", slot_pages.sizes(), " like slot_pages");
  expect(slot_ids.scalar_type() == at::kInt && slot_ids.dim() == 1 && slot_ids.size(0) == x.size(0) &&
             slot_ids.is_contiguous(),
         "slot_ids", slot_ids, "contiguous int32 [", x.size(0), "], one slot for each row of x");
  expect(pages.device() == device, "pages", pages, "device ", device, " like x");
  expect(slot_pages.device() == device, "slot_pages", slot_pages, "device ", device, " like x");
  expect(slot_weights.device() == device, "slot_weights", slot_weights, "device ", device, " like x");
  expect(slot_ids.device() == device, "slot_ids", slot_ids, "device ", device, " like x");
}

inline void check_bank(const at::Tensor& x, int64_t n, int64_t k, const at::Tensor& pages, const at::Tensor& slot_pages,
                       const at::Tensor& slot_weights, const at::Tensor& slot_ids) {
  const auto dtype = x.scalar_type();
  expect(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16, "x", x, "float32, float16 or bfloat16");
  check_bank_of(x, n, k, pages, slot_pages, slot_weights, slot_ids);
}

inline void check_bias(const at::Tensor& x, const std::optional<at::Tensor>& bias, int64_t n) {
  if (!bias) return;
  expect(bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == x.scalar_type(), "bias", *bias, "[", n, "] ",
         dtype_text(x.scalar_type()));
  expect(bias->device() == x.device(), "bias", *bias, "device ", x.device(), " like x");
}

inline void check_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                         const at::Tensor& pages, const at::Tensor& slot_pages, const at::Tensor& slot_weights,
                         const at::Tensor& slot_ids) {
  expect(weight.dim() == 2, "weight", weight, "[N, K]");
  expect(weight.scalar_type() == x.scalar_type(), "weight", weight, "dtype of x, ", dtype_text(x.scalar_type()),
         " (or convert x)");
  expect(weight.device() == x.device(), "weight", weight, "device ", x.device(), " like x");
  const int64_t n = weight.size(0), k = weight.size(1);
  expect(x.dim() == 2 && x.size(1) == k, "x", x, "[M, ", k, "] for weight ", weight.sizes());
  check_bias(x, bias, n);
  check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids);
}

// A weight [n, K] in panels of `panel` outputs (dts_fast/packing.py).
inline void check_packed_linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                int64_t n, int64_t panel) {
  expect(x.dim() == 2, "x", x, "[M, K]");
  const int64_t pair = x.scalar_type() == at::kBFloat16 ? 2 : 1;
  const std::array<int64_t, 4> sizes = {(n + panel - 1) / panel, (x.size(1) + pair - 1) / pair, panel, pair};
  expect(weight.sizes() == sizes && weight.scalar_type() == x.scalar_type() && weight.is_contiguous(), "weight", weight,
         "contiguous ", dtype_text(x.scalar_type()), " ", at::IntArrayRef(sizes), ", packed from [", n, ", ", x.size(1),
         "]");
  check_bias(x, bias, n);
}

inline void check_add_delta(const at::Tensor& y, const at::Tensor& x, const at::Tensor& pages,
                            const at::Tensor& slot_pages, const at::Tensor& slot_weights, const at::Tensor& slot_ids,
                            bool transpose) {
  expect(x.dim() == 2, "x", x, "[M, K]");
  expect(y.dim() == 2 && y.size(0) == x.size(0), "y", y, "[", x.size(0), ", N] for x ", x.sizes());
  expect(y.scalar_type() == x.scalar_type(), "y", y, "dtype of x, ", dtype_text(x.scalar_type()), " (or convert x)");
  expect(y.device() == x.device(), "y", y, "device ", x.device(), " like x");
  const int64_t n = transpose ? x.size(1) : y.size(1), k = transpose ? y.size(1) : x.size(1);
  check_bank(x, n, k, pages, slot_pages, slot_weights, slot_ids);
}

}  // namespace dts_fast
