// The decode kernel of csrc/cuda run block by block on a CPU (cuda_emulator.h), against sums in double: every
// instance's shape of tiles, odd sizes, mixed slots, ranks, weights, few resident blocks in any order. Built and run by
// tests/test_cuda.py.
#include <cmath>

#include "cuda_emulator.h"

namespace dts_fast::cuda {

struct Bf16 {
  uint16_t bits;
};

inline float to_float(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

template <class T>
inline T from_float(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <class T>
inline uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}

inline float half_of(uint32_t word, int which) { return to_float(Bf16{static_cast<uint16_t>(word >> (16 * which))}); }

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
template <class T>
inline void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  uint32_t all[32][8];
  emulated::exchange({a0, a1, a2, a3, b0, b1}, all);
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t a = all[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)];
      const uint32_t b = all[column * 4 + k % 8 / 2][4 + k / 8];
      sums[i] += half_of(a, k % 2) * half_of(b, k % 2);
    }
  }
}

inline uint64_t read_once_policy() { return 0; }
inline void prefetch(const void*) {}
inline void copy_once(uint4* to, const void* from, bool there, uint64_t) {
  emulated::copy(to, there ? from : nullptr, sizeof *to);
}
inline void copy_near(uint4* to, const void* from) { emulated::copy(to, from, sizeof *to); }
inline void end_group_of_copies() { emulated::end_group(); }
template <int kLeft>
inline void wait_for_copies() {
  emulated::wait_for_groups(kLeft);
}
inline float reciprocal(float v) { return 1.0f / v; }
inline void wait_for_kernel_before() {}
inline void let_next_kernel_begin() {}
inline int load_result(const int* p) { return *p; }
inline uint4 load_result(const uint4* p, bool there) { return there ? __ldg(p) : uint4{}; }
inline void wait_for(const uint32_t* p, uint32_t number) {
  while (*p < number) emulated::yield();
}
inline int here(int v) { return v; }
inline void set_flag(int* p) { *p = 1; }
inline int read_flag(int* p) { return *p; }
inline uint32_t fetch_add(uint32_t* p) {
  ++emulated::events;
  return (*p)++;
}
inline uint32_t fetch_increment(uint32_t* p, uint32_t bound) {
  const uint32_t old = *p;
  *p = old >= bound ? 0 : old + 1;
  ++emulated::events;
  return old;
}
inline bool increment_is_last(uint32_t* p, uint32_t bound) { return fetch_increment(p, bound) == bound; }
inline void increment_release(uint32_t* p, uint32_t bound) { fetch_increment(p, bound); }

}  // namespace dts_fast::cuda

#include "cuda/decode.cuh"

using namespace dts_fast::cuda;

namespace {

std::mt19937 generator(0);
int draw(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

struct Case {
  int m, n, k, slots, list_length, splits, slices, resident;
  int full = 0;  // not 0: every row its own slot, of so many pages
};

[[noreturn]] void fail(const char* what, const Case& c) {
  std::printf("%s: m %d, n %d, k %d, slots %d, list %d, splits %d, slices %d, resident %d\n", what, c.m, c.n, c.k,
              c.slots, c.list_length, c.splits, c.slices, c.resident);
  std::exit(1);
}

template <int kRowTiles, int kOutputTiles, int kGroups, int kWarps, bool kBase>
void run(const Case& c) {
  const int v_tiles = (c.k + 15) / 16, u_tiles = (c.n + 15) / 16, pages = c.slots * c.list_length + 1;
  const int64_t page_words = ((kTiles + (v_tiles + u_tiles) * kTileWords) + 31) / 32 * 32;
  std::vector<uint32_t> arena(pages * page_words + 4);
  uint32_t* const first_page = arena.data() + (4 - reinterpret_cast<uintptr_t>(arena.data()) / 4 % 4) % 4;
  for (int i = 0; i < pages; ++i) {
    uint32_t* const page = first_page + i * page_words;
    for (int64_t w = 0; w < page_words; ++w) page[w] = generator();
    for (int w = 0; w < 24; ++w) {
      const float v = normal() * (w < 16 ? 1.0f / std::sqrt(static_cast<float>(c.k)) : 1.0f);
      std::memcpy(page + w, &v, 4);
    }
  }
  std::vector<int32_t> slot_pages(c.slots * c.list_length), ids(c.m);
  std::vector<float> weights(c.slots * c.list_length);
  for (int s = 0; s < c.slots; ++s) {
    const int used = c.full ? c.full : draw(0, c.list_length);
    for (int l = 0; l < c.list_length; ++l) {
      slot_pages[s * c.list_length + l] = l < used ? draw(0, pages - 1) : -1;
      weights[s * c.list_length + l] = normal();
    }
  }
  const bool none = draw(0, 9) == 0;
  for (int m = 0; m < c.m; ++m) ids[m] = c.full ? m : none ? -1 : draw(-1, c.slots - 1);
  const int x_stride = c.k + 8 * draw(0, 2), w_stride = c.k + 8 * draw(0, 1), y_stride = c.n + draw(0, 3);
  const auto tensor = [](int rows, int stride, float scale) {
    auto t = std::vector<Bf16>(static_cast<size_t>(rows) * stride + 8);
    for (auto& v : t) v = from_float<Bf16>(scale * normal());
    return t;
  };
  const auto aligned = [](std::vector<Bf16>& t) {
    return t.data() + (8 - reinterpret_cast<uintptr_t>(t.data()) / 2 % 8) % 8;
  };
  auto x = tensor(c.m, x_stride, 1.0f), weight = tensor(c.n, w_stride, 1.0f / std::sqrt(static_cast<float>(c.k)));
  auto bias = tensor(1, c.n, 1.0f), y = tensor(c.m, y_stride, 1.0f);
  const auto before = y;
  if (kBase) std::fill(y.begin(), y.end(), Bf16{0x7fc0});
  const int64_t width = static_cast<int64_t>(kRanks) * c.list_length;
  std::vector<float> partial(c.splits * c.m * width + 1, NAN);
  std::vector<Bf16> h(c.m * width + 8, Bf16{0x7fc0});
  const DecodeShape shape = {kRowTiles, kOutputTiles, kGroups, kWarps, kBase ? c.slices : 1};
  std::vector<uint32_t> counters(kArrivals + c.m * c.list_length + blocks_of(shape, c.n) + 1, 0);
  const int64_t rounded_n = blocks_of(shape, c.n) * outputs_of(shape);
  std::vector<float> slice_partial(static_cast<size_t>(shape.slices) * c.m * rounded_n, NAN);
  DecodeProblem p = {};
  p.x = aligned(x), p.x_stride = x_stride;
  p.base = kBase;
  p.dependent = draw(0, 1);
  p.weight = aligned(weight), p.weight_stride = w_stride;
  p.bias = kBase && draw(0, 1) ? bias.data() : nullptr;
  p.y = y.data(), p.y_stride = y_stride;
  p.pages = first_page, p.page_words = page_words, p.u_tiles = kTiles + v_tiles * kTileWords;
  p.slot_pages = slot_pages.data(), p.slot_weights = weights.data(), p.slot_ids = ids.data();
  p.list_length = c.list_length, p.m = c.m, p.n = c.n, p.k = c.k, p.splits = c.splits;
  p.slices = shape.slices, p.slice_partial = slice_partial.data();
  const auto blocks = static_cast<unsigned>(blocks_of(shape, c.n) * shape.slices);
  p.partial = partial.data(), p.h = aligned(h), p.counters = counters.data();
  using Memory = Shared<kRowTiles, kOutputTiles, kGroups, kWarps, kBase>;
  const auto launch = [&] {
    return emulated::launch(blocks, 32 * (kWarps + warps_beside(kRowTiles, kGroups)), c.resident, generator(),
                            sizeof(Memory), [&](emulated::Block& block) {
                              decode_block<Bf16, kRowTiles, kOutputTiles, kGroups, kWarps, kBase>(
                                  p, *reinterpret_cast<Memory*>(block.shared.data()));
                            });
  };
  // What a launch leaves would otherwise be right for one that does not wait for it.
  const auto forget = [&] {
    std::fill(partial.begin(), partial.end(), NAN);
    std::fill(h.begin(), h.end(), Bf16{0x7fc0});
    std::fill(slice_partial.begin(), slice_partial.end(), NAN);
  };
  if (!launch()) fail("blocks wait for ever", c);
  for (uint32_t counter : counters) {
    if (counter) fail("a counter is not 0 after the launch", c);
  }
  const auto first_y = y;
  // Once more with the splits added up by who expands: all bits must stay.
  if (sums_late(shape, c.m, c.splits)) {
    p.late = true;
    y = kBase ? y : before;
    forget();
    if (!launch()) fail("blocks wait for ever", c);
    for (uint32_t counter : counters) {
      if (counter) fail("a counter is not 0 after the launch", c);
    }
    if (std::memcmp(y.data(), first_y.data(), 2 * y.size())) fail("late sums are others", c);
    p.late = draw(0, 1);
  }
  // Once more with other slots for the other rows: the row's bits must stay.
  const int kept = draw(0, c.m - 1);
  const auto first_ids = ids;
  for (int m = 0; m < c.m; ++m) ids[m] = m == kept ? ids[m] : draw(-1, c.slots - 1);
  y = kBase ? y : before;
  forget();
  if (!launch()) fail("blocks wait for ever", c);
  if (std::memcmp(&y[kept * y_stride], &first_y[kept * y_stride], 2 * c.n)) fail("a row depends on its neighbours", c);
  ids = first_ids;
  y = first_y;
  const auto code = [](const uint32_t* tiles, int lane, int step) {
    return tiles[lane] >> (2 * step) & 3;  // lane's word of a tile
  };
  const auto real = [](const uint32_t* p) {
    float v;
    std::memcpy(&v, p, 4);
    return static_cast<double>(v);
  };
  const Bf16 *xs = aligned(x), *ws = aligned(weight);
  for (int m = 0; m < c.m; ++m) {
    std::vector<double> sum(c.n, 0.0), magnitude(c.n, 0.0);
    for (int n = 0; n < c.n; ++n) {
      sum[n] = kBase ? (p.bias ? to_float(bias[n]) : 0.0) : to_float(before[m * y_stride + n]);
      magnitude[n] = std::fabs(sum[n]);
      for (int k = 0; kBase && k < c.k; ++k) {
        const double product = static_cast<double>(to_float(xs[m * x_stride + k])) * to_float(ws[n * w_stride + k]);
        sum[n] += product;
        magnitude[n] += std::fabs(product) * 1e-3;  // float32 sums
      }
    }
    for (int l = 0; ids[m] >= 0 && l < c.list_length; ++l) {
      const int index = slot_pages[ids[m] * c.list_length + l];
      if (index < 0) break;
      const uint32_t* const page = first_page + index * page_words;
      for (int r = 0; r < kRanks; ++r) {
        double hidden = 0.0, hidden_magnitude = 0.0;
        for (int k = 0; k < c.k; ++k) {
          const double level = real(page + kVLevels + code(page + kTiles + k / 16 * kTileWords, r, k % 16));
          hidden += to_float(xs[m * x_stride + k]) * level;
          hidden_magnitude += std::fabs(to_float(xs[m * x_stride + k]) * level);
        }
        const double scale = weights[ids[m] * c.list_length + l] * real(page + kScales + r);
        for (int n = 0; n < c.n; ++n) {
          const double level = real(page + kULevels + code(page + p.u_tiles + n / 16 * kTileWords, n % 16, r));
          sum[n] += scale * hidden * level;
          magnitude[n] += std::fabs(scale * hidden_magnitude * level);
        }
      }
    }
    for (int n = 0; n < c.n; ++n) {
      // Levels of both factors and h are rounded to bfloat16 once each, and the result.
      const double got = to_float(y[m * y_stride + n]);
      if (!(std::fabs(got - sum[n]) <= 1.5 / 128 * magnitude[n] + std::fabs(sum[n]) / 128 + 1e-6)) {
        std::printf("row %d output %d: expected %g, got %g\n", m, n, sum[n], got);
        fail("wrong", c);
      }
    }
    for (int n = c.n; n < y_stride; ++n) {
      const uint16_t beyond = kBase ? 0x7fc0 : before[m * y_stride + n].bits;
      if (y[m * y_stride + n].bits != beyond) fail("wrote beyond a row", c);
    }
  }
}

template <int kRowTiles, int kOutputTiles, int kGroups, int kWarps>
void run_many(int count) {
  for (int i = 0; i < count; ++i) {
    Case c = {draw(1, 8 * kRowTiles),
              draw(1, 100 * kGroups),
              8 * draw(1, 60),
              draw(0, 1) ? draw(1, 4) : draw(1, 8 * kRowTiles),
              draw(1, 4),
              draw(1, 4),
              draw(1, 3),
              draw(1, 3)};
    run<kRowTiles, kOutputTiles, kGroups, kWarps, true>(c);
    run<kRowTiles, kOutputTiles, kGroups, kWarps, false>(c);
  }
  if (kRowTiles == 1) {  // the most splits that who expands adds up
    for (int slots = 1; slots <= 6; ++slots) {
      const Case late = {2, 100, 8 * 60, (slots + 1) / 2, 3, kLateSplits, 1 + slots % 2, 3};
      run<kRowTiles, kOutputTiles, kGroups, kWarps, true>(late);
      run<kRowTiles, kOutputTiles, kGroups, kWarps, false>(late);
    }
  }
  // Every loop more than once: refilled registers, more pages than warps and than are staged, more than one split.
  const int ahead = chunks_ahead(kRowTiles, kOutputTiles, kGroups, kWarps);
  const int k = 32 * (2 * ahead * kWarps / kGroups + 3) + 8;
  const Case large = {8 * kRowTiles - 1, 16 * kOutputTiles * kGroups + 1, k, 3, 2 * kWarps + 6, choose_splits(k), 2, 2};
  run<kRowTiles, kOutputTiles, kGroups, kWarps, true>(large);
  if (kGroups == 1) return;
  // More pages than are listed at a time, and than have their numbers at hand; h where it is near (also where the table
  // has room for more) and where it is not.
  for (int slices : {1, 2}) {
    const int pages = slices == 1 ? 16 : kRowTiles > 4 ? 18 : 34;
    const Case distinct = {8 * kRowTiles, 100, 40, 8 * kRowTiles, pages + 2, 2, slices, 2, pages};
    run<kRowTiles, kOutputTiles, kGroups, kWarps, true>(distinct);
  }
}

}  // namespace

int main(int, char** arguments) {
  const int count = arguments[1] ? std::atoi(arguments[1]) : 6;
#define RUN_MANY(rows, outputs, groups, warps) run_many<rows, outputs, groups, warps>(count);
  DTS_FAST_DECODE_SHAPES(RUN_MANY)
  std::printf("no errors\n");
}
