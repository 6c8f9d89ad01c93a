// Where CPU kernels register. The schemas are defined in dts_fast/ops.py; a kernel named here takes precedence over the
// plain-torch implementation for CPU tensors. None is written yet, so that one serves.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(dts_fast, CPU, m) { (void)m; }
