// What this CPU can run. No torch here: kernel files include this.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace dts_fast::cpu {

// Instruction-set extensions by name, in a fixed order, each with whether both the processor and the operating system
// support it. Empty on other architectures than x86-64.
std::vector<std::pair<std::string, bool>> features();

}  // namespace dts_fast::cpu
