#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>

#include <cstdint>
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
      {"avx2", ymm && bit(seven.ebx, 5)},
      {"fma", ymm && bit(one.ecx, 12)},
      {"f16c", ymm && bit(one.ecx, 29)},
      {"avx512f", zmm && bit(seven.ebx, 16)},
      {"avx512bw", zmm && bit(seven.ebx, 30)},
      {"avx512vl", zmm && bit(seven.ebx, 31)},
      {"avx512_vbmi", zmm && bit(seven.ecx, 1)},
      {"avx512_vnni", zmm && bit(seven.ecx, 11)},
      {"avx512_bf16", zmm && bit(seven_one.eax, 5)},
      {"avx512_fp16", zmm && bit(seven.edx, 23)},
      {"amx_tile", tiles && bit(seven.edx, 24)},
      {"amx_bf16", tiles && bit(seven.edx, 22)},
      {"amx_int8", tiles && bit(seven.edx, 25)},
  };
}

#else

std::vector<std::pair<std::string, bool>> features() { return {}; }

#endif

}  // namespace dts_fast::cpu
