// The only file that knows Python. Tensors arrive as addresses and sizes that bestrq2.ops has already validated.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of bestrq2; call them through bestrq2.ops.";
#ifdef BESTRQ2_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("isa", [] { return std::string(bestrq2::isa_name(bestrq2::best_isa())); });
  m.def("force_isa", [](const std::string& name) {
    for (auto isa : {bestrq2::Isa::portable, bestrq2::Isa::avx2, bestrq2::Isa::avx512})
      if (name == bestrq2::isa_name(isa)) return bestrq2::force_isa(isa);
    throw std::invalid_argument("unknown instruction set '" + name + "': expected portable, avx2 or avx512");
  });
}
