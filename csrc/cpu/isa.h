// What this CPU can run. No torch here: kernel files include this.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace dts_fast::cpu {

// Instruction-set extensions by name, in a fixed order, each with whether both the processor and the operating system
// support it. Empty on other architectures than x86-64.
std::vector<std::pair<std::string, bool>> features();

// Names of the kernel tables that this processor can run.
std::vector<std::string> available_isas();

// The table in use: the best one, or the one that the environment variable DTS_FAST_CPU_ISA or set_isa names.
const Kernels& kernels();

// Use a table from now on; for tests. Throws std::invalid_argument where it is unknown or cannot run here.
void set_isa(const std::string& name);

}  // namespace dts_fast::cpu
