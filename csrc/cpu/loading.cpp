// What loads an adapter: codes in the file's order, written where the model reads them. The schemas are defined in
// dts_fast/paging.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_copy.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "../check.h"
#include "paging.h"

namespace dts_fast::cpu {
namespace {

bool fits(const at::Tensor& t, at::ScalarType dtype, at::IntArrayRef sizes) {
  return t.scalar_type() == dtype && t.sizes() == sizes && t.is_contiguous() && t.is_cpu();
}

void check(const at::Tensor& t, const char* name, at::ScalarType dtype, at::IntArrayRef sizes) {
  expect(fits(t, dtype, sizes), name, t, "contiguous ", dtype_text(dtype), " ", sizes);
}

// One delta and where its pages lie.
struct Job {
  FileDelta delta;
  uint8_t* pages;
  int64_t page_nbytes;
  const int64_t* numbers;  // of its pages
  int64_t of_v, of_page;   // tiles of a page: of V, and of V and U
  int64_t first;           // of its tiles among those of all jobs
};

// Tiles [begin, end) of a job's pages.
void write(const Job& job, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t page = begin / job.of_page, first = begin % job.of_page;
    const int64_t last = std::min(job.of_page, end - page * job.of_page);
    uint8_t* const data = job.pages + job.numbers[page] * job.page_nbytes;
    uint8_t* const u_tiles = data + kVOffset + job.of_v * kTileBytes;
    if (first == 0) write_head(job.delta, page, data, kVOffset + job.of_page * kTileBytes, job.page_nbytes);
    write_v_tiles(job.delta, page, first, std::min(last, job.of_v), data + kVOffset);
    write_u_tiles(job.delta, page, std::max(first, job.of_v) - job.of_v, last - job.of_v, u_tiles);
    begin = page * job.of_page + last;
  }
}

void write_pages(at::TensorList pages, at::TensorList u_codes, at::TensorList u_levels, at::TensorList s,
                 at::TensorList v_codes, at::TensorList v_levels, at::IntArrayRef n, at::IntArrayRef k,
                 at::IntArrayRef numbers) {
  const size_t count = pages.size();
  TORCH_CHECK_VALUE(u_codes.size() == count && u_levels.size() == count && s.size() == count &&
                        v_codes.size() == count && v_levels.size() == count && n.size() == count && k.size() == count,
                    "dts_fast: write_pages_: expected lists of one length, that of pages: ", count, ".");
  std::vector<Job> jobs;
  jobs.reserve(count);
  int64_t total = 0;
  size_t listed = 0;
  for (size_t i = 0; i < count; ++i) {
    const int64_t rank = s[i].dim() == 1 ? s[i].size(0) : -1, nbytes = page_nbytes(n[i], k[i]);
    expect(rank >= 0 && fits(s[i], at::kFloat, {rank}), "s", s[i], "contiguous float32 [r]");
    check(u_codes[i], "u_codes", at::kByte, {rank, (n[i] + 3) / 4});
    check(v_codes[i], "v_codes", at::kByte, {rank, (k[i] + 3) / 4});
    check(u_levels[i], "u_levels", at::kFloat, {4});
    check(v_levels[i], "v_levels", at::kFloat, {4});
    const int64_t held = pages[i].dim() == 2 ? pages[i].size(0) : -1, own = tiles(rank);
    check(pages[i], "pages", at::kByte, {held, nbytes});
    TORCH_CHECK_VALUE(listed + own <= numbers.size(),
                      "dts_fast: numbers: expected one for each page of each delta, got ", numbers.size(), ".");
    for (int64_t page = 0; page < own; ++page) {
      const int64_t number = numbers[listed + page];
      TORCH_CHECK_VALUE(number >= 0 && number < held, "dts_fast: numbers: expected pages below ", held, ", got ",
                        number, ".");
    }
    jobs.push_back({{{u_codes[i].const_data_ptr<uint8_t>(), (n[i] + 3) / 4, n[i], u_levels[i].const_data_ptr<float>()},
                     {v_codes[i].const_data_ptr<uint8_t>(), (k[i] + 3) / 4, k[i], v_levels[i].const_data_ptr<float>()},
                     s[i].const_data_ptr<float>(),
                     rank},
                    pages[i].mutable_data_ptr<uint8_t>(),
                    nbytes,
                    numbers.data() + listed,
                    tiles(k[i]),
                    tiles(k[i]) + tiles(n[i]),
                    total});
    total += own * jobs.back().of_page;
    listed += own;
  }
  TORCH_CHECK_VALUE(listed == numbers.size(), "dts_fast: numbers: expected ", listed, ", one for each page, got ",
                    numbers.size(), ".");
  // Tiles that are worth waking a thread for: some 80 microseconds, as calls that run beside a load have threads, too.
  constexpr int64_t kGrain = 1 << 12;
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    auto after =
        std::upper_bound(jobs.begin(), jobs.end(), begin, [](int64_t at, const Job& j) { return at < j.first; });
    for (auto job = after - 1; begin < end; ++job) {
      const int64_t last = job + 1 == jobs.end() ? end : std::min(end, job[1].first);
      write(*job, begin - job->first, last - job->first);
      begin = last;
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

void write_vector(const at::Tensor& out, const at::Tensor& base, const at::Tensor& codes, const at::Tensor& levels) {
  const int64_t n = base.dim() == 1 ? base.size(0) : -1;
  const auto dtype = base.scalar_type();
  expect(n >= 0 && base.is_contiguous(), "base", base, "contiguous [n]");
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
      expect(false, "base", base, "float32, float64, float16 or bfloat16");
  }
}

void write_vectors(at::TensorList out, at::TensorList base, at::TensorList codes, at::TensorList levels) {
  TORCH_CHECK_VALUE(base.size() == out.size() && codes.size() == out.size() && levels.size() == out.size(),
                    "dts_fast: write_vectors_: expected lists of one length, that of out: ", out.size(), ".");
  for (size_t i = 0; i < out.size(); ++i) write_vector(out[i], base[i], codes[i], levels[i]);
}

// Calls f(arena, first page there, source, first page there, how many) for pages that lie side by side in both.
template <class F>
void for_each_run(at::TensorList pages, at::TensorList sources, at::IntArrayRef numbers, const F& f) {
  TORCH_CHECK_VALUE(sources.size() == pages.size(),
                    "dts_fast: copy_pages_: expected lists of one length, that of pages: ", pages.size(), ".");
  size_t listed = 0;
  for (size_t i = 0; i < pages.size(); ++i) {
    const at::Tensor &arena = pages[i], &source = sources[i];
    expect(arena.scalar_type() == at::kByte && arena.dim() == 2 && arena.is_contiguous(), "pages", arena,
           "contiguous torch.uint8 [P, nbytes]");
    const int64_t held = arena.size(0), count = source.dim() == 2 ? source.size(0) : -1;
    expect(source.scalar_type() == at::kByte && count >= 0 && source.size(1) == arena.size(1) && source.is_contiguous(),
           "sources", source, "contiguous torch.uint8 [n, ", arena.size(1), "] like pages");
    TORCH_CHECK_VALUE(listed + count <= numbers.size(),
                      "dts_fast: numbers: expected one for each page of each source, got ", numbers.size(), ".");
    const int64_t* const own = numbers.data() + listed;
    for (int64_t page = 0; page < count; ++page) {
      TORCH_CHECK_VALUE(own[page] >= 0 && own[page] < held, "dts_fast: numbers: expected pages below ", held, ", got ",
                        own[page], ".");
    }
    for (int64_t page = 0, end; page < count; page = end) {
      for (end = page + 1; end < count && own[end] == own[end - 1] + 1;) ++end;
      f(arena, own[page], source, page, end - page);
    }
    listed += count;
  }
  TORCH_CHECK_VALUE(listed == numbers.size(), "dts_fast: numbers: expected ", listed, ", one for each page, got ",
                    numbers.size(), ".");
}

void copy_pages(at::TensorList pages, at::TensorList sources, at::IntArrayRef numbers) {
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
    int64_t nbytes;
  };
  std::vector<Copy> copies;
  int64_t total = 0;
  for_each_run(pages, sources, numbers,
               [&](const at::Tensor& arena, int64_t to, const at::Tensor& source, int64_t from, int64_t count) {
                 expect(arena.is_cpu() && source.is_cpu(), "sources", source, "on the CPU");
                 const int64_t nbytes = arena.size(1);
                 copies.push_back({arena.mutable_data_ptr<uint8_t>() + to * nbytes,
                                   source.const_data_ptr<uint8_t>() + from * nbytes, count * nbytes});
                 total += count * nbytes;
               });
  if (total == 0) return;
  // What is worth waking a thread for: about 1 MiB, some 80 microseconds.
  const int64_t count = static_cast<int64_t>(copies.size()), grain = std::max<int64_t>(1, (1 << 20) * count / total);
  at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) std::memcpy(copies[i].to, copies[i].from, copies[i].nbytes);
  });
}

// To another device: torch's own copies, which know how long pinned memory is in use; from here, because an adapter has
// hundreds.
void send_pages(at::TensorList pages, at::TensorList sources, at::IntArrayRef numbers) {
  for_each_run(pages, sources, numbers,
               [](const at::Tensor& arena, int64_t to, const at::Tensor& source, int64_t from, int64_t count) {
                 arena.narrow(0, to, count).copy_(source.narrow(0, from, count), /*non_blocking=*/true);
               });
}

// Calls f(which list, its row's place among all of the table, its numbers, how many) for lists that fit.
template <class F>
void for_each_list(at::TensorList slot_pages, at::TensorList slot_weights, at::IntArrayRef rows, at::IntArrayRef counts,
                   at::IntArrayRef numbers, at::ArrayRef<double> weights, const F& f) {
  const size_t lists = slot_pages.size();
  TORCH_CHECK_VALUE(
      slot_weights.size() == lists && rows.size() == lists && counts.size() == lists && weights.size() == lists,
      "dts_fast: write_lists_: expected lists of one length, that of slot_pages: ", lists, ".");
  int64_t listed = 0;
  for (size_t i = 0; i < lists; ++i) {
    const at::Tensor &pages = slot_pages[i], &table = slot_weights[i];
    expect(pages.scalar_type() == at::kInt && pages.dim() == 2 && pages.is_contiguous(), "slot_pages", pages,
           "contiguous int32 [S, L]");
    expect(table.scalar_type() == at::kFloat && table.sizes() == pages.sizes() && table.is_contiguous() &&
               table.device() == pages.device(),
           "slot_weights", table, "contiguous float32 ", pages.sizes(), " like slot_pages");
    const int64_t length = pages.size(1);
    TORCH_CHECK_VALUE(rows[i] >= 0 && rows[i] < pages.size(0) && counts[i] >= 0 && counts[i] <= length &&
                          listed + counts[i] <= static_cast<int64_t>(numbers.size()),
                      "dts_fast: write_lists_: expected rows below ", pages.size(0), " and at most ", length,
                      " pages in each, got row ", rows[i], " and ", counts[i], ".");
    const int64_t* const own = numbers.data() + listed;
    for (int64_t page = 0; page < counts[i]; ++page) {
      TORCH_CHECK_VALUE(own[page] >= 0 && own[page] <= std::numeric_limits<int32_t>::max(),
                        "dts_fast: numbers: expected pages from 0 on, in 32 bits, got ", own[page], ".");
    }
    f(i, length, own);
    listed += counts[i];
  }
  TORCH_CHECK_VALUE(listed == static_cast<int64_t>(numbers.size()), "dts_fast: numbers: expected ", listed,
                    ", one for each page, got ", numbers.size(), ".");
}

void write_lists(at::TensorList slot_pages, at::TensorList slot_weights, at::IntArrayRef rows, at::IntArrayRef counts,
                 at::IntArrayRef numbers, at::ArrayRef<double> weights) {
  // All are checked before any is written.
  for_each_list(slot_pages, slot_weights, rows, counts, numbers, weights, [&](size_t i, int64_t, const int64_t*) {
    expect(slot_pages[i].is_cpu(), "slot_pages", slot_pages[i], "on the CPU");
  });
  for_each_list(slot_pages, slot_weights, rows, counts, numbers, weights,
                [&](size_t i, int64_t length, const int64_t* own) {
                  float* const weight = slot_weights[i].mutable_data_ptr<float>() + rows[i] * length;
                  int32_t* const page = slot_pages[i].mutable_data_ptr<int32_t>() + rows[i] * length;
                  std::fill(weight, weight + counts[i], static_cast<float>(weights[i]));
                  std::copy(own, own + counts[i], page);
                  std::fill(page + counts[i], page + length, -1);
                });
}

// The same to another device: all numbers in one copy, and what is left is the device's own.
void send_lists(at::TensorList slot_pages, at::TensorList slot_weights, at::IntArrayRef rows, at::IntArrayRef counts,
                at::IntArrayRef numbers, at::ArrayRef<double> weights) {
  if (slot_pages.empty()) return;
  const at::Device device = slot_pages[0].device();
  int64_t total = 0;
  for_each_list(slot_pages, slot_weights, rows, counts, numbers, weights,
                [&](size_t i, int64_t length, const int64_t*) {
                  expect(slot_pages[i].device() == device, "slot_pages", slot_pages[i], "device ", device);
                  total += length;
                });
  // Rows of pages, and behind them their weights.
  const auto options = at::TensorOptions(at::kInt).pinned_memory(device.is_cuda());
  const at::Tensor host = at::empty({2 * total}, options);
  int32_t* page = host.mutable_data_ptr<int32_t>();
  float* weight = reinterpret_cast<float*>(page + total);
  for_each_list(slot_pages, slot_weights, rows, counts, numbers, weights,
                [&](size_t i, int64_t length, const int64_t* own) {
                  std::copy(own, own + counts[i], page);
                  std::fill(page + counts[i], page + length, -1);
                  std::fill(weight, weight + length, static_cast<float>(weights[i]));
                  page += length, weight += length;
                });
  const at::Tensor sent = host.to(device, /*non_blocking=*/true);
  std::vector<at::Tensor> to_pages, to_weights, from_pages, from_weights;
  int64_t at = 0;
  for (size_t i = 0; i < slot_pages.size(); ++i) {
    const int64_t length = slot_pages[i].size(1);
    to_pages.push_back(slot_pages[i].select(0, rows[i]));
    to_weights.push_back(slot_weights[i].select(0, rows[i]));
    from_pages.push_back(sent.narrow(0, at, length));
    from_weights.push_back(sent.narrow(0, total + at, length).view(at::kFloat));
    at += length;
  }
  at::_foreach_copy_(to_weights, from_weights);
  at::_foreach_copy_(to_pages, from_pages);  // last: until they stand, the rows are empty for whoever reads them
}

}  // namespace

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) {
  m.impl("write_pages_", &write_pages);
  m.impl("copy_pages_", &copy_pages);
  m.impl("write_vectors_", &write_vectors);
  m.impl("write_lists_", &write_lists);
}

TORCH_LIBRARY_IMPL(dts_fast, CompositeExplicitAutograd, m) {
  m.impl("send_pages_", &send_pages);
  m.impl("send_lists_", &send_lists);
}

}  // namespace dts_fast::cpu
