// The only file that knows Python. Tensors arrive as addresses and sizes that bestrq2.ops has already validated.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "isa.h"
#include "masked_cross_entropy.h"
#include "parallel.h"
#include "quantize.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

bestrq2::Float float_type(const std::string& name) {
  if (name == "float32") return bestrq2::Float::f32;
  if (name == "bfloat16") return bestrq2::Float::bf16;
  if (name == "float16") return bestrq2::Float::f16;
  if (name == "float64") return bestrq2::Float::f64;
  throw std::invalid_argument("expected float32, bfloat16, float16 or float64, got " + name);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU and CUDA kernels of bestrq2; call them through bestrq2.ops.";
#ifdef BESTRQ2_WITH_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("isa",
        [] { return std::string(bestrq2::isa_name(bestrq2::best_isa())) + (bestrq2::use_vnni() ? "_vnni" : ""); });
  m.def("force_isa", [](const std::string& name) {
    for (auto isa : {bestrq2::Isa::portable, bestrq2::Isa::avx2, bestrq2::Isa::avx512})
      if (name == bestrq2::isa_name(isa)) return bestrq2::force_isa(isa);
    if (name == "avx512_vnni") return bestrq2::force_isa(bestrq2::Isa::avx512, true);
    throw std::invalid_argument("unknown instruction set '" + name +
                                "': expected portable, avx2, avx512 or avx512_vnni");
  });
  m.def("thread_pool", [] { return std::string(bestrq2::thread_pool()); });
  m.def(
      "quantize",
      [](std::uintptr_t x, const std::string& x_type, std::int64_t rows, std::int64_t features, std::int64_t row_stride,
         std::int64_t feature_stride, std::uintptr_t mask, std::uintptr_t projection, bool shared_projection,
         std::uintptr_t codebook, bool shared_codebook, std::int64_t books, std::int64_t dims, std::int64_t codes,
         bool layer_norm, std::uintptr_t out, int threads) {
        bestrq2::Quantize q{};
        q.x = at<const void>(x), q.x_type = float_type(x_type), q.mask = at<const bool>(mask);
        q.rows = rows, q.features = features, q.row_stride = row_stride, q.feature_stride = feature_stride;
        q.projection = at<const double>(projection), q.shared_projection = shared_projection;
        q.codebook = at<const float>(codebook), q.shared_codebook = shared_codebook;
        q.books = books, q.dims = dims, q.codes = codes, q.layer_norm = layer_norm;
        q.out = at<std::int64_t>(out), q.threads = threads;
        const py::gil_scoped_release release;
        return bestrq2::quantize(q);
      },
      py::kw_only(), py::arg("x"), py::arg("x_type"), py::arg("rows"), py::arg("features"), py::arg("row_stride"),
      py::arg("feature_stride"), py::arg("mask"), py::arg("projection"), py::arg("shared_projection"),
      py::arg("codebook"), py::arg("shared_codebook"), py::arg("books"), py::arg("dims"), py::arg("codes"),
      py::arg("layer_norm"), py::arg("out"), py::arg("threads"));
  m.def(
      "softmax_gradient",
      [](std::uintptr_t logits, bool bf16, std::int64_t rows, std::int64_t classes, std::uintptr_t index,
         std::uintptr_t targets, std::uintptr_t weights, float scale, float label_smoothing, float z_loss,
         bool gradient, std::uintptr_t losses, std::uintptr_t correct, int threads) {
        bestrq2::SoftmaxGradient chunk{};
        chunk.logits = at<void>(logits), chunk.bf16 = bf16, chunk.rows = rows, chunk.classes = classes;
        chunk.index = at<const std::int64_t>(index), chunk.targets = at<const std::int64_t>(targets);
        chunk.weights = at<const float>(weights), chunk.scale = scale;
        chunk.label_smoothing = label_smoothing, chunk.z_loss = z_loss, chunk.gradient = gradient;
        chunk.losses = at<float>(losses), chunk.correct = at<float>(correct), chunk.threads = threads;
        const py::gil_scoped_release release;
        bestrq2::softmax_gradient(chunk);
      },
      py::kw_only(), py::arg("logits"), py::arg("bf16"), py::arg("rows"), py::arg("classes"), py::arg("index"),
      py::arg("targets"), py::arg("weights"), py::arg("scale"), py::arg("label_smoothing"), py::arg("z_loss"),
      py::arg("gradient"), py::arg("losses"), py::arg("correct"), py::arg("threads"));
}
