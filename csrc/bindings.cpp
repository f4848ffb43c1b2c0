// Python bindings, with bindings_blocks.cpp the only files with Python headers. Here every kernel takes one dict, whose
// tensors are addresses and sizes that bestrq2.ops has already validated. Addresses of absent tensors are 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "chunked_attention/chunked_attention.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "log_mel/log_mel.h"
#include "masked_cross_entropy/masked_cross_entropy.h"
#include "masked_cross_entropy/softmax_gradient.h"
#include "quantize/cuda.h"
#include "quantize/quantize.h"

namespace py = pybind11;

void define_blocks(py::module_& m);  // bindings_blocks.cpp

namespace {

bestrq2::Float float_type(const std::string& name) {
  if (name == "float32") return bestrq2::Float::f32;
  if (name == "bfloat16") return bestrq2::Float::bf16;
  if (name == "float16") return bestrq2::Float::f16;
  if (name == "float64") return bestrq2::Float::f64;
  throw std::invalid_argument("expected float32, bfloat16, float16 or float64, got " + name);
}

// The arguments of one call; each is read into the field that takes it.
class Arguments {
 public:
  explicit Arguments(const py::dict& values) : values_(values) {}

  template <class T>
  void read(const char* name, T& field) const {
    const py::object value = values_[name];
    if constexpr (std::is_pointer_v<T>) {
      field = reinterpret_cast<T>(value.cast<std::uintptr_t>());
    } else if constexpr (std::is_same_v<T, bestrq2::Float>) {
      field = float_type(value.cast<std::string>());
    } else if constexpr (std::is_same_v<T, bestrq2::Frames>) {
      const auto f = value.cast<std::array<std::int64_t, 4>>();  // address, then strides of batch, head, frame
      field = {reinterpret_cast<void*>(f[0]), f[1], f[2], f[3]};
    } else {
      field = value.cast<T>();
    }
  }

  // Leaves the field as it is where the dict has no such entry.
  template <class T>
  void read_if_given(const char* name, T& field) const {
    if (values_.contains(name)) read(name, field);
  }

  // A number of frames; None is unlimited.
  void read_frames_or_none(const char* name, std::int64_t& field) const {
    field = bestrq2::kUnlimited;
    if (!values_[name].is_none()) field = std::min(values_[name].cast<std::int64_t>(), bestrq2::kUnlimited);
  }

 private:
  const py::dict& values_;
};

// Everything but threads (CPU) or stream (CUDA); the projection is read as double or as float.
template <class Call>
Call quantize_call(const Arguments& arguments) {
  Call q{};
  arguments.read("x", q.x);
  arguments.read("x_type", q.x_type);
  arguments.read("rows", q.rows);
  arguments.read("features", q.features);
  arguments.read("row_stride", q.row_stride);
  arguments.read("feature_stride", q.feature_stride);
  arguments.read("mask", q.mask);
  arguments.read("projection", q.projection);
  arguments.read("shared_projection", q.shared_projection);
  arguments.read("codebook", q.codebook);
  arguments.read("shared_codebook", q.shared_codebook);
  arguments.read("num_codebooks", q.num_codebooks);
  arguments.read("codebook_size", q.codebook_size);
  arguments.read("codebook_dim", q.codebook_dim);
  arguments.read("layer_norm", q.layer_norm);
  arguments.read("out", q.out);
  return q;
}

bestrq2::QuantizeCuda quantize_cuda_call(const py::dict& values) {
  const Arguments arguments(values);
  auto q = quantize_call<bestrq2::QuantizeCuda>(arguments);
  arguments.read("projection_norm", q.projection_norm);
  arguments.read("reach", q.reach);
  arguments.read("stream", q.stream);
  return q;
}

bestrq2::SoftmaxGradient softmax_gradient_call(const Arguments& arguments) {
  bestrq2::SoftmaxGradient chunk{};
  arguments.read("logits", chunk.logits);
  arguments.read("rows", chunk.rows);
  arguments.read("classes", chunk.classes);
  arguments.read("index", chunk.index);
  arguments.read("targets", chunk.targets);
  arguments.read("row_weights", chunk.row_weights);
  arguments.read("scale", chunk.scale);
  arguments.read("label_smoothing", chunk.label_smoothing);
  arguments.read("z_loss", chunk.z_loss);
  arguments.read("gradient", chunk.gradient);
  arguments.read_if_given("bias", chunk.bias);
  arguments.read("losses", chunk.losses);
  arguments.read("correct", chunk.correct);
  arguments.read("threads", chunk.threads);
  return chunk;
}

bestrq2::MaskedCrossEntropy masked_cross_entropy_call(const Arguments& arguments) {
  bestrq2::MaskedCrossEntropy call{};
  arguments.read("hidden", call.hidden);
  arguments.read("hidden_bf16", call.hidden_bf16);
  arguments.read("weight", call.weight);
  arguments.read("weight_bf16", call.weight_bf16);
  arguments.read("bias", call.bias);
  arguments.read("rows", call.rows);
  arguments.read("count", call.count);
  arguments.read("num_codebooks", call.num_codebooks);
  arguments.read("classes", call.classes);
  arguments.read("features", call.features);
  arguments.read("index", call.index);
  arguments.read("targets", call.targets);
  arguments.read("row_weights", call.row_weights);
  arguments.read("row_weights_stride", call.row_weights_stride);
  arguments.read("scale", call.scale);
  arguments.read("label_smoothing", call.label_smoothing);
  arguments.read("z_loss", call.z_loss);
  arguments.read("losses", call.losses);
  arguments.read("correct", call.correct);
  arguments.read("grad_hidden", call.grad_hidden);
  arguments.read("grad_weight", call.grad_weight);
  arguments.read("grad_bias", call.grad_bias);
  arguments.read("chunk_rows", call.chunk_rows);
  arguments.read("threads", call.threads);
  return call;
}

// Entries that only one of the two passes has may be missing.
bestrq2::ChunkedAttention chunked_attention_call(const py::dict& values) {
  const Arguments arguments(values);
  bestrq2::ChunkedAttention a{};
  arguments.read("type", a.type);
  arguments.read("batch", a.batch);
  arguments.read("heads", a.heads);
  arguments.read("query_length", a.query_length);
  arguments.read("key_length", a.key_length);
  arguments.read("head_dim", a.head_dim);
  arguments.read("query", a.query);
  arguments.read("key", a.key);
  arguments.read("value", a.value);
  arguments.read_if_given("out", a.out);
  arguments.read_if_given("logsumexp", a.logsumexp);
  arguments.read("bf16_products", a.bf16_products);
  arguments.read("position", a.position);
  arguments.read("content_bias", a.content_bias);
  arguments.read("position_bias", a.position_bias);
  arguments.read("table_rows", a.table_rows);
  arguments.read("position_zero", a.position_zero);
  arguments.read("lengths", a.lengths);
  arguments.read("starts", a.starts);
  arguments.read("key_mask", a.key_mask);
  arguments.read_frames_or_none("chunk_size", a.chunk_size);
  arguments.read_frames_or_none("left_context", a.left_context);
  arguments.read_frames_or_none("right_context", a.right_context);
  arguments.read("query_offset", a.query_offset);
  arguments.read("scale", a.scale);
  arguments.read("threads", a.threads);
  arguments.read_if_given("grad", a.grad);
  arguments.read_if_given("grad_query", a.grad_query);
  arguments.read_if_given("grad_key", a.grad_key);
  arguments.read_if_given("grad_value", a.grad_value);
  arguments.read_if_given("grad_position", a.grad_position);
  arguments.read_if_given("grad_content_bias", a.grad_content_bias);
  arguments.read_if_given("grad_position_bias", a.grad_position_bias);
  return a;
}

bestrq2::LogMel log_mel_call(const Arguments& arguments) {
  bestrq2::LogMel call{};
  arguments.read("waveform", call.waveform);
  arguments.read("clips", call.clips);
  arguments.read("stride", call.stride);
  arguments.read("lengths", call.lengths);
  arguments.read("counts", call.counts);
  arguments.read("begin", call.begin);
  arguments.read("hop", call.hop);
  arguments.read("size", call.size);
  arguments.read("window", call.window);
  arguments.read("window_length", call.window_length);
  arguments.read("radices", call.radices);
  arguments.read("passes", call.passes);
  arguments.read("twiddles", call.twiddles);
  arguments.read("places", call.places);
  arguments.read("half_turns", call.half_turns);
  arguments.read("bins", call.bins);
  arguments.read("offsets", call.offsets);
  arguments.read("weights", call.weights);
  arguments.read("bands", call.bands);
  arguments.read("mean", call.mean);
  arguments.read("std", call.std);
  arguments.read("out", call.out);
  arguments.read("frames", call.frames);
  arguments.read("threads", call.threads);
  return call;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (!bestrq2::isa_known())
    throw py::import_error(std::string("BESTRQ2_ISA: expected portable, avx2, avx512, avx512_vnni, avx512_bf16 or amx, "
                                       "got ") +
                           std::getenv("BESTRQ2_ISA"));
  m.doc() = "CPU and CUDA kernels of bestrq2; call them through bestrq2.ops.";
  m.attr("sources") = BESTRQ2_SOURCES;  // digest of csrc/, from CMakeLists.txt
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
  m.attr("quantize_cuda_dims") = bestrq2::kQuantizeCudaDims;
  m.def("quantize_cuda_emulated", [](const py::dict& values) {
    const auto q = quantize_cuda_call(values);
    const py::gil_scoped_release release;
    bestrq2::quantize_cuda_emulated(q);
  });
#ifdef BESTRQ2_WITH_CUDA
  m.def("quantize_cuda", [](const py::dict& values) {
    const auto q = quantize_cuda_call(values);
    const py::gil_scoped_release release;
    const int error = bestrq2::quantize_cuda(q);
    if (error != 0) throw std::runtime_error(std::string("quantize: ") + bestrq2::cuda_error_text(error));
  });
#endif
  m.def("thread_pool", [] { return std::string(bestrq2::thread_pool()); });
  m.def("quantize", [](const py::dict& values) {
    const Arguments arguments(values);
    auto q = quantize_call<bestrq2::Quantize>(arguments);
    arguments.read("threads", q.threads);
    const py::gil_scoped_release release;
    return bestrq2::quantize(q);
  });
  m.def("softmax_gradient", [](const py::dict& values) {
    const auto chunk = softmax_gradient_call(Arguments(values));
    const py::gil_scoped_release release;
    bestrq2::softmax_gradient(chunk);
  });
  m.def("bf16_dot", [] {
    const auto dot = bestrq2::best_dot();
    return std::string(dot == bestrq2::Dot::amx ? "amx" : dot == bestrq2::Dot::avx512 ? "avx512_bf16" : "none");
  });
  m.def("bf16_dot_beats_fma", &bestrq2::dot_beats_fma);
  m.def("limit_bf16_dot", [](const std::string& most) {
    if (most != "amx" && most != "avx512_bf16" && most != "none")
      throw std::invalid_argument("expected amx, avx512_bf16 or none, got " + most);
    bestrq2::limit_dot(most == "amx"           ? bestrq2::Dot::amx
                       : most == "avx512_bf16" ? bestrq2::Dot::avx512
                                               : bestrq2::Dot::none);
  });
  m.def("masked_cross_entropy_bf16", [](const py::dict& values) {
    const auto call = masked_cross_entropy_call(Arguments(values));
    const py::gil_scoped_release release;
    bestrq2::masked_cross_entropy_bf16(call);
  });
  m.def("masked_cross_entropy_fp32", [](const py::dict& values) {
    const auto call = masked_cross_entropy_call(Arguments(values));
    const py::gil_scoped_release release;
    bestrq2::masked_cross_entropy_fp32(call);
  });
  m.def("log_mel", [](const py::dict& values) {
    const auto call = log_mel_call(Arguments(values));
    const py::gil_scoped_release release;
    bestrq2::log_mel(call);
  });
  m.def("chunked_attention_forward", [](const py::dict& values) {
    const auto call = chunked_attention_call(values);
    const py::gil_scoped_release release;
    bestrq2::chunked_attention_forward(call);
  });
  m.def("chunked_attention_backward", [](const py::dict& values) {
    const auto call = chunked_attention_call(values);
    const py::gil_scoped_release release;
    bestrq2::chunked_attention_backward(call);
  });
  define_blocks(m);
}
