#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dts_fast::cpu {

#if defined(__x86_64__)

namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_max(0, nullptr) >= leaf) {
    __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  }
  return r;
}

// Which register states the operating system saves on a context switch: a processor feature whose state is not saved
// must not be used, whatever cpuid says.
uint64_t saved_states(bool osxsave) {
  if (!osxsave) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

bool bit(uint64_t value, int index) { return (value >> index) & 1; }

}  // namespace

std::vector<std::pair<std::string, bool>> features() {
  const Registers one = cpuid(1, 0), seven = cpuid(7, 0), seven_one = cpuid(7, 1);
  const uint64_t saved = saved_states(bit(one.ecx, 27));
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;   // masks, upper halves, upper registers
  const bool tiles = (saved & 0x60000) == 0x60000;  // AMX configuration and data
  return {
      {"avx2", ymm && bit(seven.ebx, 5)},         {"fma", ymm && bit(one.ecx, 12)},
      {"f16c", ymm && bit(one.ecx, 29)},          {"avx512f", zmm && bit(seven.ebx, 16)},
      {"avx512dq", zmm && bit(seven.ebx, 17)},    {"avx512bw", zmm && bit(seven.ebx, 30)},
      {"avx512vl", zmm && bit(seven.ebx, 31)},    {"avx512_vbmi", zmm && bit(seven.ecx, 1)},
      {"avx512_vnni", zmm && bit(seven.ecx, 11)}, {"avx512_bf16", zmm && bit(seven_one.eax, 5)},
      {"avx512_fp16", zmm && bit(seven.edx, 23)}, {"amx_tile", tiles && bit(seven.edx, 24)},
      {"amx_bf16", tiles && bit(seven.edx, 22)},  {"amx_int8", tiles && bit(seven.edx, 25)},
  };
}

#else

std::vector<std::pair<std::string, bool>> features() { return {}; }

#endif

namespace {

// Linux gives a process the registers of AMX on request only, because they make its state on a stack 8 KiB larger;
// where it refuses (an old kernel, a small alternate signal stack), the first tile instruction would end the process.
bool tiles_permitted() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

// Whether a dot product of bfloat16 pairs is worth two fused multiply-adds. On Zen 4 one of each starts in a cycle. On
// an Emerald Rapids dot products started in every second cycle, and two multiply-adds in each.
bool pairs_are_fast() {
#if defined(__x86_64__)
  const Registers vendor = cpuid(0, 0);
  return vendor.ebx == 0x68747541 && vendor.edx == 0x69746e65 && vendor.ecx == 0x444d4163;  // AuthenticAMD
#else
  return false;
#endif
}

bool always() { return true; }

struct Entry {
  const Kernels* kernels;
  std::vector<std::string> needs;
  bool (*permitted)() = always;
  bool (*preferred)() = always;  // to the entries before it, where both run
};

// A new instruction set is one line here and one file beside this one. Better ones come later.
const std::vector<Entry>& table() {
  static const std::vector<Entry> entries = {
      {&kScalar, {}},
#if defined(__x86_64__)
      {&kAvx2, {"avx2", "fma", "f16c"}},
      {&kAvx512, {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}},
      {&kAvx512Bf16,
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
       always,
       &pairs_are_fast},
      {&kAmx,
       {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "amx_tile", "amx_bf16"},
       &tiles_permitted},
#endif
  };
  return entries;
}

bool runs(const Entry& entry) {
  const auto present = features();
  for (const std::string& need : entry.needs) {
    bool found = false;
    for (const auto& [name, has] : present) found |= has && name == need;
    if (!found) return false;
  }
  return entry.permitted();
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> out;
  for (const Entry& entry : table()) {
    if (runs(entry)) out.push_back(entry.kernels);
  }
  return out;
}

const Kernels* best() {
  const Kernels* kernels = nullptr;
  for (const Entry& entry : table()) {
    if (runs(entry) && entry.preferred()) kernels = entry.kernels;
  }
  return kernels;
}

const Kernels* find(const std::string& name) {
  // Only what is asked for: AMX's permission makes every stack larger.
  for (const Entry& entry : table()) {
    if (name == entry.kernels->name && runs(entry)) return entry.kernels;
  }
  std::string known;
  for (const Kernels* kernels : available()) known += std::string(known.empty() ? "" : ", ") + kernels->name;
  throw std::invalid_argument("dts_fast: CPU instruction set '" + name + "' is unknown or cannot run here; expected " +
                              known + ".");
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> kernels = [] {
    const char* asked = std::getenv("DTS_FAST_CPU_ISA");
    return asked && *asked ? find(asked) : best();
  }();
  return kernels;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& kernels() { return *current().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { current().store(find(name)); }

}  // namespace dts_fast::cpu
