// One call of an op: rows grouped by slot, work divided among threads, kernels called. No torch here, so that the
// sanitizer build links it with the kernels alone.
#pragma once

#include <cstdint>
#include <functional>

#include "kernels.h"

namespace dts_fast::cpu {

// The bank and what each row uses of it, see the schemas in dts_fast/ops.py.
struct BankView {
  const uint8_t* pages;  // [P, page_nbytes]
  int64_t page_nbytes;
  const int32_t* slot_pages;  // [S, L]
  const float* slot_weights;  // [S, L]
  int64_t list_length;        // L
  const int32_t* slot_ids;    // [M]
};

struct Problem {
  DType dtype;
  int64_t m, n, k;  // rows, out, in; of the op, so that a transposed one has the layer's N as k
  const void* x;    // [M, x_stride], elements of a row side by side
  int64_t x_stride;
  // Or, of a transposed delta, rows that are zero but for a one at ids[m]: embeddings. x is null then.
  const int64_t* ids;  // [M]
  void* y;             // [M, y_stride], likewise
  int64_t y_stride;
  // The dense base, of `linear`; null where the delta is added to what y holds.
  const void* weight;  // [N, K], or packed in panels
  int64_t weight_stride;
  bool panels;
  const void* bias;  // [N] or null
  bool transpose;    // of the layer's delta
  BankView bank;
};

// Calls body(begin, end) for ranges that make up [0, count), on as many threads as it likes.
using ParallelFor = std::function<void(int64_t count, const std::function<void(int64_t, int64_t)>& body)>;

// Whether any row has an adapter that changes this layer.
bool touches(const Problem& problem);

// y = x W^T + bias + delta, or y += delta.
void run(const Problem& problem, const Kernels& kernels, int threads, const ParallelFor& parallel_for);

}  // namespace dts_fast::cpu
