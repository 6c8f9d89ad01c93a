// Any processor: what the compiler makes of vectors of four floats (SSE2, NEON).
#include <cstring>

#include "kernels.h"

namespace dts_fast::cpu {
namespace {
constexpr int kLanes = 4;
#include "descend.inc"
}  // namespace

const Kernels kScalar = {"scalar", descend};

}  // namespace dts_fast::cpu
