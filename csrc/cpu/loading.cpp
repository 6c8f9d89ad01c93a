// What loads an adapter: codes in the file's order, written where the model reads them. The schemas are defined in
// dts_fast/paging.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "../check.h"
#include "paging.h"

namespace dts_fast::cpu {
namespace {

bool fits(const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
  return t.scalar_type() == dtype && t.sizes() == sizes && t.is_contiguous() && t.is_cpu();
}

void check(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef sizes) {
  expect(fits(t, dtype, sizes), name, "contiguous " + dtype_text(dtype) + " " + shape_text(sizes), t);
}

void write_pages(at::Tensor& pages, const at::Tensor& u_codes, const at::Tensor& u_levels, const at::Tensor& s,
                 const at::Tensor& v_codes, const at::Tensor& v_levels, int64_t n, int64_t k) {
  const int64_t rank = s.dim() == 1 ? s.size(0) : -1, nbytes = page_nbytes(n, k);
  expect(rank >= 0 && fits(s, at::kFloat, {rank}), "s", "contiguous float32 [r]", s);
  check(u_codes, "u_codes", at::kByte, {rank, (n + 3) / 4});
  check(v_codes, "v_codes", at::kByte, {rank, (k + 3) / 4});
  check(u_levels, "u_levels", at::kFloat, {4});
  check(v_levels, "v_levels", at::kFloat, {4});
  check(pages, "pages", at::kByte, {tiles(rank), nbytes});
  const FileDelta delta = {
      {u_codes.const_data_ptr<uint8_t>(), (n + 3) / 4, n, u_levels.const_data_ptr<float>()},
      {v_codes.const_data_ptr<uint8_t>(), (k + 3) / 4, k, v_levels.const_data_ptr<float>()},
      s.const_data_ptr<float>(),
      rank,
  };
  uint8_t* const out = pages.mutable_data_ptr<uint8_t>();
  const int64_t of_v = tiles(k), of_page = of_v + tiles(n);
  // Tiles that are worth waking a thread for: some 80 microseconds, as calls that run beside a load have threads, too.
  constexpr int64_t kGrain = 1 << 12;
  at::parallel_for(0, pages.size(0) * of_page, kGrain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t page = begin / of_page, first = begin % of_page, last = std::min(of_page, end - page * of_page);
      uint8_t* const data = out + page * nbytes;
      uint8_t* const u_tiles = data + kVOffset + of_v * kTileBytes;
      if (first == 0) write_head(delta, page, data, kVOffset + of_page * kTileBytes, nbytes);
      write_v_tiles(delta, page, first, std::min(last, of_v), data + kVOffset);
      write_u_tiles(delta, page, std::max(first, of_v) - of_v, last - of_v, u_tiles);
      begin = page * of_page + last;
    }
  });
}

template <class T>
void add_levels(T* out, const T* base, const uint8_t* codes, const float* levels, int64_t n) {
  using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
  for (int64_t i = 0; i < n; ++i) {
    const int code = codes[i / 4] >> (2 * (i % 4)) & 3;
    out[i] = static_cast<T>(static_cast<Wide>(base[i]) + static_cast<Wide>(levels[code]));
  }
}

void write_vector(at::Tensor& out, const at::Tensor& base, const at::Tensor& codes, const at::Tensor& levels) {
  const int64_t n = base.dim() == 1 ? base.size(0) : -1;
  const auto dtype = base.scalar_type();
  expect(n >= 0 && base.is_contiguous(), "base", "contiguous [n]", base);
  check(out, "out", dtype, {n});
  check(codes, "codes", at::kByte, {(n + 3) / 4});
  check(levels, "levels", at::kFloat, {4});
  const auto run = [&]<class T>(T*) {
    add_levels(out.mutable_data_ptr<T>(), base.const_data_ptr<T>(), codes.const_data_ptr<uint8_t>(),
               levels.const_data_ptr<float>(), n);
  };
  switch (dtype) {
    case at::kFloat:
      return run(static_cast<float*>(nullptr));
    case at::kDouble:
      return run(static_cast<double*>(nullptr));
    case at::kHalf:
      return run(static_cast<at::Half*>(nullptr));
    case at::kBFloat16:
      return run(static_cast<at::BFloat16*>(nullptr));
    default:
      expect(false, "base", "float32, float64, float16 or bfloat16", base);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) {
  m.impl("write_pages_", &write_pages);
  m.impl("write_vector_", &write_vector);
}

}  // namespace dts_fast::cpu
