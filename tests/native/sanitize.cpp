// Runs every kernel of every instruction set on awkward sizes under AddressSanitizer and UndefinedBehaviorSanitizer
// (make sanitize). All buffers have exactly the size that the kernels may touch; results are compared between
// instruction sets, and with the float64 reference by tests/test_ops.py.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/batch.h"
#include "cpu/isa.h"
#include "cpu/paging.h"

using namespace dts_fast::cpu;

namespace {

std::mt19937 generator(0);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float normal() { return std::normal_distribution<float>()(generator); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Bytes = std::unique_ptr<uint8_t, Free>;

// From malloc, so that a byte beyond the end is seen.
Bytes bytes(int64_t count) { return Bytes(static_cast<uint8_t*>(std::malloc(count ? count : 1))); }

int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

void put(DType dtype, uint8_t* p, int64_t i, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (dtype == kFloat32) std::memcpy(p + 4 * i, &value, 4);
  // A float16 of the same few values as the bfloat16 would need: sign, exponent around 1, a little of the fraction.
  const uint16_t half = dtype == kBFloat16 ? bits >> 16 : (bits >> 16 & 0x8000) | 0x3800 | (bits >> 13 & 0x3ff);
  if (dtype != kFloat32) std::memcpy(p + 2 * i, &half, 2);
}

float get(DType dtype, const uint8_t* p, int64_t i) {
  if (dtype == kFloat32) {
    float value;
    std::memcpy(&value, p + 4 * i, 4);
    return value;
  }
  uint16_t half;
  std::memcpy(&half, p + 2 * i, 2);
  if (dtype == kFloat16) {
    const int exponent = half >> 10 & 31;
    const float fraction = (half & 1023) / 1024.0f;
    const float value = exponent ? std::ldexp(1 + fraction, exponent - 15) : std::ldexp(fraction, -14);
    return half & 0x8000 ? -value : value;
  }
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The tiles of AMX, emulated: what runs here is all of tiles.inc but the instructions themselves.
namespace emulated {

struct Register {
  alignas(64) uint8_t bytes[1024];
};
thread_local Register registers[8];
thread_local bool configured = false;

void load(int t, const void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(registers[t].bytes + 64 * row, static_cast<const uint8_t*>(p) + row * stride, 64);
  }
}

void store(int t, void* p, int64_t stride) {
  for (int row = 0; row < 16; ++row) {
    std::memcpy(static_cast<uint8_t*>(p) + row * stride, registers[t].bytes + 64 * row, 64);
  }
}

// Intel's definition: sums[m, n] += a[m, 2 k] b[k, 2 n] + a[m, 2 k + 1] b[k, 2 n + 1].
void dot(int sums, int a, int b) {
  if (!configured) std::abort();
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, registers[sums].bytes + 64 * m + 4 * n, 4);
      for (int k = 0; k < 32; ++k) {
        sum += get(kBFloat16, registers[a].bytes + 64 * m, k) *
               get(kBFloat16, registers[b].bytes + 64 * (k / 2), 2 * n + k % 2);
      }
      std::memcpy(registers[sums].bytes + 64 * m + 4 * n, &sum, 4);
    }
  }
}

constexpr int kLanes = 16;
constexpr bool kPairs = false;
const Kernels& kFewRows = kScalar;
#include "cpu/types.inc"
#define TILES_BEGIN(config) (configured = (config)->palette == 1)
#define TILES_END() (configured = false)
#define TILE_ZERO(t) std::memset(registers[t].bytes, 0, 1024)
#define TILE_LOAD(t, p, bytes) load(t, p, bytes)
#define TILE_STORE(t, p, bytes) store(t, p, bytes)
#define TILE_DOT(sums, a, b) dot(sums, a, b)
#include "cpu/tiles.inc"

Kernels table() {
  Kernels kernels = kScalar;
  kernels.name = "emulated amx";
  kernels.pack[kBFloat16] = pack_tiles;
  kernels.dense[kBFloat16] = dense_tiles;
  return kernels;
}

const Kernels kernels = table();

}  // namespace emulated

// Of all instruction sets that run here, and the emulated one.
std::vector<const Kernels*> tables() {
  std::vector<const Kernels*> all;
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    all.push_back(&dts_fast::cpu::kernels());
  }
  all.push_back(&emulated::kernels);
  return all;
}

struct Case {
  DType dtype;
  int64_t m, n, k;
  bool base, transpose, panels;
  bool by_id;  // rows are looked up, which the op does with float32 and the transposed delta
};

void run_case(const Case& c) {
  const int64_t pages = draw(1, 5), slots = 3, length = draw(0, 3);
  const int64_t layer_n = c.transpose ? c.k : c.n, layer_k = c.transpose ? c.n : c.k;
  const int64_t tiles = (layer_n + 15) / 16 + (layer_k + 15) / 16;
  const int64_t page_nbytes = (kVOffset + tiles * kTileBytes + 127) / 128 * 128;
  auto arena = std::unique_ptr<uint8_t, Free>(static_cast<uint8_t*>(std::aligned_alloc(128, pages * page_nbytes)));
  for (int64_t i = 0; i < pages * page_nbytes; ++i) arena.get()[i] = static_cast<uint8_t>(draw(0, 255));
  for (int64_t p = 0; p < pages; ++p) {
    auto* const head = reinterpret_cast<float*>(arena.get() + p * page_nbytes);
    for (int i = 0; i < 24; ++i) head[i] = normal();
  }
  std::vector<int32_t> slot_pages(slots * length), ids(c.m);
  std::vector<float> weights(slots * length, 0.5f);
  for (auto& page : slot_pages) page = static_cast<int32_t>(draw(-1, pages - 1));
  for (auto& id : ids) id = static_cast<int32_t>(draw(-1, slots - 1));
  std::vector<int64_t> rows(c.m);
  for (auto& row : rows) row = draw(0, c.k - 1);
  const int64_t size = element_size(c.dtype);
  const Bytes x = bytes(c.m * c.k * size), bias = bytes(c.n * size);
  const int64_t weights_count =
      c.panels ? (c.n + kPanel - 1) / kPanel * kPanel * (c.dtype == kBFloat16 ? (c.k + 1) / 2 * 2 : c.k) : c.n * c.k;
  const Bytes w = bytes(weights_count * size);
  for (int64_t i = 0; i < c.m * c.k; ++i) put(c.dtype, x.get(), i, normal());
  for (int64_t i = 0; i < weights_count; ++i) put(c.dtype, w.get(), i, normal());
  for (int64_t i = 0; i < c.n; ++i) put(c.dtype, bias.get(), i, normal());
  std::vector<float> first;
  for (const Kernels* kernels : tables()) {
    // Levels and h rounded to bfloat16: a hundredth of a sum of so many terms of size one.
    const bool rounded = kernels->row_size[c.dtype] < 4;
    const float rounding = rounded ? 0.01f * std::sqrt(static_cast<float>(c.k * 16 * length)) : 0;
    const Bytes y = bytes(c.m * c.n * size);
    for (int64_t i = 0; i < c.m * c.n; ++i) put(c.dtype, y.get(), i, c.base ? NAN : 1.0f);
    Problem p = {};
    p.dtype = c.dtype, p.m = c.m, p.n = c.n, p.k = c.k;
    p.x = c.by_id ? nullptr : x.get(), p.x_stride = c.by_id ? 0 : c.k, p.y = y.get(), p.y_stride = c.n;
    p.ids = c.by_id ? rows.data() : nullptr;
    p.weight = c.base ? w.get() : nullptr, p.weight_stride = c.k, p.bias = c.base ? bias.get() : nullptr;
    p.transpose = c.transpose, p.panels = c.panels;
    p.bank = {arena.get(), page_nbytes, slot_pages.data(), weights.data(), length, ids.data()};
    run(p, *kernels, 2, [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
      body(0, count / 2);
      body(count / 2, count);
    });
    std::vector<float> out(c.m * c.n);
    for (int64_t i = 0; i < c.m * c.n; ++i) out[i] = get(c.dtype, y.get(), i);
    if (first.empty()) first = out;
    for (size_t i = 0; i < out.size(); ++i) {
      // One rounding of the output type, and float32 sums of a few hundred terms in another order.
      const float allowed = 0.02f * (std::fabs(first[i]) + 1) + 1e-3f * static_cast<float>(c.k) + rounding;
      if (!(std::fabs(out[i] - first[i]) <= allowed)) {
        std::printf("%s: %g, %s: %g at %zu (dtype %d, %ld x %ld x %ld)\n", tables()[0]->name, first[i], kernels->name,
                    out[i], i, c.dtype, static_cast<long>(c.m), static_cast<long>(c.n), static_cast<long>(c.k));
        std::exit(1);
      }
    }
  }
}

void run_descent() {
  const int64_t rank = draw(1, 40), n = draw(1, 150);
  std::vector<float> rows(rank * n), target(rank * n), gram(rank * rank), curvature(rank, 1.0f);
  const float levels[4] = {-1.5f, -0.5f, 0.5f, 1.5f};
  for (auto& v : rows) v = levels[draw(0, 3)];
  for (auto& v : target) v = normal();
  for (auto& v : gram) v = 0.1f * normal();
  for (const std::string& isa : available_isas()) {
    set_isa(isa);
    const Descent problem = {rows.data(), target.data(), gram.data(), curvature.data(), levels, rank, n, 2};
    const auto scratch = std::unique_ptr<float, Free>(
        static_cast<float*>(std::aligned_alloc(64, (descent_scratch(rank) * 4 + 63) / 64 * 64)));
    kernels().descend(problem, 0, n, scratch.get());
  }
}

// Every code of a delta in the file's order is found in its page.
void run_paging() {
  const int64_t n = draw(1, 70), k = draw(1, 70), rank = draw(0, 50), pages = (rank + 15) / 16;
  const int64_t of_u = (n + 15) / 16, of_v = (k + 15) / 16, end = kVOffset + (of_u + of_v) * kTileBytes;
  const int64_t page_nbytes = (end + 127) / 128 * 128, u_bytes = (n + 3) / 4, v_bytes = (k + 3) / 4;
  const Bytes u = bytes(rank * u_bytes), v = bytes(rank * v_bytes), out = bytes(pages * page_nbytes);
  for (int64_t i = 0; i < rank * u_bytes; ++i) u.get()[i] = static_cast<uint8_t>(draw(0, 255));
  for (int64_t i = 0; i < rank * v_bytes; ++i) v.get()[i] = static_cast<uint8_t>(draw(0, 255));
  std::vector<float> scales(rank, 2.0f);
  const float levels[4] = {1, 2, 3, 4};
  const FileDelta delta = {{u.get(), u_bytes, n, levels}, {v.get(), v_bytes, k, levels}, scales.data(), rank};
  const auto code = [](const uint8_t* p, int64_t i) { return p[i / 4] >> 2 * (i % 4) & 3; };
  for (int64_t page = 0; page < pages; ++page) {
    uint8_t* const data = out.get() + page * page_nbytes;
    uint8_t* const u_tiles = data + kVOffset + of_v * kTileBytes;
    write_head(delta, page, data, end, page_nbytes);
    write_v_tiles(delta, page, 0, of_v, data + kVOffset);
    write_u_tiles(delta, page, 0, of_u, u_tiles);
    for (int64_t r = 0; r < 16; ++r) {
      const int64_t row = page * 16 + r;
      for (int64_t i = 0; i < 16 * of_v; ++i) {
        const int expected = row < rank && i < k ? code(v.get() + row * v_bytes, i) : 0;
        if (code(data + kVOffset + i / 16 * 64 + r * 4, i % 16) != expected) std::exit(2);
      }
      for (int64_t j = 0; j < 16 * of_u; ++j) {
        const int expected = row < rank && j < n ? code(u.get() + row * u_bytes, j) : 0;
        if (code(u_tiles + j * 4, r) != expected) std::exit(3);
      }
    }
  }
}

}  // namespace

int main() {
  // Rows that are a power of two apart, and several ranges of k.
  const int64_t large[] = {256, 512, 1024, 1600, 2049};
  for (int i = 0; i < 400; ++i) {
    const bool base = draw(0, 1);
    const int64_t k = i % 8 ? draw(1, 200) : large[draw(0, 4)];
    run_case({static_cast<DType>(draw(0, kDTypes - 1)), draw(0, 70), draw(1, 90), k, base, !base && draw(0, 1),
              base && draw(0, 1), false});
    run_case({kFloat32, draw(0, 70), draw(1, 90), draw(1, 200), false, true, false, true});
    run_descent();
    run_paging();
  }
  std::printf("no errors");
  for (const Kernels* kernels : tables()) std::printf(", %s", kernels->name);
  std::printf("\n");
}
