// The Python module dts_fast._C: what is not a tensor op. Importing it also loads the kernels of this library, which
// register themselves against the schemas that dts_fast/ops.py defines (TORCH_LIBRARY_IMPL, one file per device).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include "cpu/isa.h"
#if defined(DTS_FAST_WITH_CUDA)
#include "cuda/decode.h"
#endif

namespace py = pybind11;

namespace {

py::dict cpu_features() {
  py::dict out;
  for (const auto& [name, present] : dts_fast::cpu::features()) out[py::str(name)] = present;
  return out;
}

py::dict build_info() {
  py::dict out;
  out["torch"] = TORCH_VERSION;
#if defined(__VERSION__)
  out["compiler"] = __VERSION__;
#endif
  out["cplusplus"] = static_cast<long>(__cplusplus);
#if defined(DTS_FAST_WITH_CUDA)
  out["cuda"] = true;
#else
  out["cuda"] = false;
#endif
  return out;
}

// Why the CUDA kernels do not run on the current device; None where they do.
py::object why_not_cuda() {
#if defined(DTS_FAST_WITH_CUDA)
  const int error = dts_fast::cuda::decode_runs();
  return error ? py::object(py::str(dts_fast::cuda::error_text(error))) : py::none();
#else
  return py::str("the extension was built without CUDA");
#endif
}

void use_cuda([[maybe_unused]] bool on) {
#if defined(DTS_FAST_WITH_CUDA)
  dts_fast::cuda::set_decoding(on);
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native part of dts_fast: CPU features, build information, and the kernels' registration.";
  m.def("cpu_features", &cpu_features,
        "Instruction-set extension to whether processor and operating system support it; empty off x86-64.");
  m.def("cpu_isas", &dts_fast::cpu::available_isas, "Instruction sets with kernels that can run here.");
  m.def("cpu_isa", [] { return std::string(dts_fast::cpu::kernels().name); }, "The instruction set in use.");
  m.def("_set_cpu_isa", &dts_fast::cpu::set_isa, "Use the kernels of another instruction set; for tests.");
  m.def("why_not_cuda", &why_not_cuda, "Why the CUDA kernels do not run on the current device; None where they do.");
  m.def("_use_cuda", &use_cuda, "Whether ops on GPUs may use the CUDA kernels.");
  m.def("build_info", &build_info, "What the extension was built with: torch, compiler, C++ standard, CUDA.");
}
