// The only file that knows Python. Tensors arrive as addresses and sizes that bestrq2.ops has already validated.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "block_rows.h"
#include "chunked_attention.h"
#include "isa.h"
#include "masked_cross_entropy.h"
#include "masked_cross_entropy_fused.h"
#include "parallel.h"
#include "quantize.h"
#include "quantize_cuda.h"
#include "short_attention.h"

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

bestrq2::Frames frames(const py::dict& arguments, const char* name) {
  if (!arguments.contains(name)) return {};
  const auto f = arguments[name].cast<std::array<std::int64_t, 4>>();  // address, then strides of batch, head, frame
  return {at<void>(static_cast<std::uintptr_t>(f[0])), f[1], f[2], f[3]};
}

// Backward-only entries may be missing. Addresses of absent tensors are 0.
bestrq2::ChunkedAttention chunked_attention(const py::dict& d) {
  const auto integer = [&](const char* name) { return d[name].cast<std::int64_t>(); };
  const auto address = [&](const char* name) { return at<void>(d.contains(name) ? integer(name) : 0); };
  const auto floats = [&](const char* name) { return at<float>(d.contains(name) ? integer(name) : 0); };
  bestrq2::ChunkedAttention a{};
  a.type = float_type(d["type"].cast<std::string>());
  a.batch = integer("batch"), a.heads = integer("heads"), a.head_dim = integer("head_dim");
  a.query_length = integer("query_length"), a.key_length = integer("key_length");
  a.query = frames(d, "query"), a.key = frames(d, "key"), a.value = frames(d, "value"), a.out = frames(d, "out");
  a.logsumexp = floats("logsumexp");
  a.bf16_products = d["bf16_products"].cast<bool>();
  a.position = address("position"), a.table_rows = integer("table_rows"), a.position_zero = integer("position_zero");
  a.content_bias = floats("content_bias"), a.position_bias = floats("position_bias");
  a.lengths = at<const std::int64_t>(integer("lengths")), a.starts = at<const std::int64_t>(integer("starts"));
  a.key_mask = at<const std::uint8_t>(integer("key_mask"));
  const auto limit = [&](const char* name) {
    return d[name].is_none() ? bestrq2::kUnlimited : std::min(integer(name), bestrq2::kUnlimited);
  };
  a.chunk_size = limit("chunk_size"), a.left_context = limit("left_context");
  a.right_context = limit("right_context"), a.query_offset = integer("query_offset");
  a.scale = d["scale"].cast<float>(), a.threads = static_cast<int>(integer("threads"));
  a.grad = frames(d, "grad"), a.grad_query = frames(d, "grad_query");
  a.grad_key = frames(d, "grad_key"), a.grad_value = frames(d, "grad_value");
  a.grad_position = address("grad_position");
  a.grad_content_bias = floats("grad_content_bias"), a.grad_position_bias = floats("grad_position_bias");
  return a;
}

template <class Run>
void define_quantize_cuda(py::module_& m, const char* name, Run run) {
  m.def(
      name,
      [run](std::uintptr_t x, const std::string& x_type, std::int64_t rows, std::int64_t features,
            std::int64_t row_stride, std::int64_t feature_stride, std::uintptr_t mask, std::uintptr_t projection,
            bool shared_projection, std::uintptr_t codebook, bool shared_codebook, std::int64_t books,
            std::int64_t dims, std::int64_t codes, bool layer_norm, std::uintptr_t out, std::uintptr_t stream) {
        bestrq2::QuantizeCuda q{};
        q.x = at<const void>(x), q.x_type = float_type(x_type), q.mask = at<const bool>(mask);
        q.rows = rows, q.features = features, q.row_stride = row_stride, q.feature_stride = feature_stride;
        q.projection = at<const float>(projection), q.shared_projection = shared_projection;
        q.codebook = at<const float>(codebook), q.shared_codebook = shared_codebook;
        q.books = books, q.dims = dims, q.codes = codes, q.layer_norm = layer_norm;
        q.out = at<std::int64_t>(out), q.stream = at<void>(stream);
        if (dims > bestrq2::kQuantizeCudaDims) throw std::invalid_argument("quantize: too many dimensions for CUDA");
        run(q);
      },
      py::kw_only(), py::arg("x"), py::arg("x_type"), py::arg("rows"), py::arg("features"), py::arg("row_stride"),
      py::arg("feature_stride"), py::arg("mask"), py::arg("projection"), py::arg("shared_projection"),
      py::arg("codebook"), py::arg("shared_codebook"), py::arg("books"), py::arg("dims"), py::arg("codes"),
      py::arg("layer_norm"), py::arg("out"), py::arg("stream"));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
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
  define_quantize_cuda(m, "quantize_cuda_emulated", bestrq2::quantize_cuda_emulated);
#ifdef BESTRQ2_WITH_CUDA
  define_quantize_cuda(m, "quantize_cuda", [](const bestrq2::QuantizeCuda& q) {
    const int error = bestrq2::quantize_cuda(q);
    if (error != 0) throw std::runtime_error(std::string("quantize: ") + bestrq2::cuda_error_text(error));
  });
#endif
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
  m.def("masked_cross_entropy", [](const py::dict& d) {
    const auto address = [&](const char* name) { return d[name].cast<std::uintptr_t>(); };
    bestrq2::FusedCrossEntropy f{};
    f.hidden = at<const void>(address("hidden")), f.hidden_bf16 = d["hidden_bf16"].cast<bool>();
    f.weight = at<const void>(address("weight")), f.weight_bf16 = d["weight_bf16"].cast<bool>();
    f.bias = at<const float>(address("bias"));
    f.rows = d["rows"].cast<std::int64_t>(), f.codebooks = d["codebooks"].cast<std::int64_t>();
    f.weights_stride = d["weights_stride"].cast<std::int64_t>();
    f.count = d["count"].cast<std::int64_t>(), f.classes = d["classes"].cast<std::int64_t>();
    f.features = d["features"].cast<std::int64_t>(), f.chunk_rows = d["chunk_rows"].cast<std::int64_t>();
    f.index = at<const std::int64_t>(address("index")), f.targets = at<const std::int64_t>(address("targets"));
    f.weights = at<const float>(address("weights")), f.scale = d["scale"].cast<float>();
    f.label_smoothing = d["label_smoothing"].cast<float>(), f.z_loss = d["z_loss"].cast<float>();
    f.losses = at<float>(address("losses")), f.correct = at<float>(address("correct"));
    f.grad_hidden = at<void>(address("grad_hidden")), f.grad_weight = at<void>(address("grad_weight"));
    f.grad_bias = at<float>(address("grad_bias")), f.threads = d["threads"].cast<int>();
    const py::gil_scoped_release release;
    bestrq2::masked_cross_entropy_fused(f);
  });
  m.def("chunked_attention_forward", [](const py::dict& arguments) {
    const auto a = chunked_attention(arguments);
    const py::gil_scoped_release release;
    bestrq2::chunked_attention_forward(a);
  });
  m.def("chunked_attention_backward", [](const py::dict& arguments) {
    const auto a = chunked_attention(arguments);
    const py::gil_scoped_release release;
    bestrq2::chunked_attention_backward(a);
  });
  // Transformer blocks. Positional, because they are called dozens of times a step; absent tensors have address 0.
  m.def("norm_rows_forward",
        [](bool bf16, bool layer_norm, std::int64_t rows, std::int64_t width, std::int64_t rows_per_clip,
           std::uintptr_t x, std::uintptr_t branch, std::uintptr_t scale, float factor, float epsilon,
           std::uintptr_t weight, std::uintptr_t bias, std::uintptr_t sum, std::uintptr_t out, int threads) {
          bestrq2::NormRows a{};
          a.bf16 = bf16, a.layer_norm = layer_norm, a.rows = rows, a.width = width, a.rows_per_clip = rows_per_clip;
          a.x = at<void>(x), a.branch = at<void>(branch), a.scale = at<float>(scale), a.factor = factor;
          a.epsilon = epsilon, a.weight = at<float>(weight), a.bias = at<float>(bias);
          a.sum = at<void>(sum), a.out = at<void>(out), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::norm_rows_forward(a);
        });
  m.def("norm_rows_backward",
        [](bool bf16, bool layer_norm, std::int64_t rows, std::int64_t width, std::int64_t rows_per_clip,
           std::uintptr_t scale, float factor, float epsilon, std::uintptr_t weight, std::uintptr_t sum,
           std::uintptr_t grad_sum, std::uintptr_t grad_out, std::uintptr_t grad_x, std::uintptr_t grad_branch,
           std::uintptr_t grad_weight, std::uintptr_t grad_bias, int threads) {
          bestrq2::NormRows a{};
          a.bf16 = bf16, a.layer_norm = layer_norm, a.rows = rows, a.width = width, a.rows_per_clip = rows_per_clip;
          a.scale = at<float>(scale), a.factor = factor, a.epsilon = epsilon, a.weight = at<float>(weight);
          a.sum = at<void>(sum), a.grad_sum = at<void>(grad_sum), a.grad_out = at<void>(grad_out);
          a.grad_x = at<void>(grad_x), a.grad_branch = at<void>(grad_branch);
          a.grad_weight = at<float>(grad_weight), a.grad_bias = at<float>(grad_bias), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::norm_rows_backward(a);
        });
  m.def("rotary_rows_forward",
        [](bool bf16, std::int64_t rows, std::int64_t heads, std::int64_t dim, std::int64_t angle_rows, float epsilon,
           std::uintptr_t qkv, std::uintptr_t query_weight, std::uintptr_t key_weight, std::uintptr_t cos,
           std::uintptr_t sin, std::uintptr_t out, int threads) {
          bestrq2::RotaryRows a{};
          a.bf16 = bf16, a.rows = rows, a.heads = heads, a.dim = dim, a.angle_rows = angle_rows, a.epsilon = epsilon;
          a.qkv = at<void>(qkv), a.query_weight = at<float>(query_weight), a.key_weight = at<float>(key_weight);
          a.cos = at<float>(cos), a.sin = at<float>(sin), a.out = at<void>(out), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::rotary_rows_forward(a);
        });
  m.def("rotary_rows_backward",
        [](bool bf16, std::int64_t rows, std::int64_t heads, std::int64_t dim, std::int64_t angle_rows, float epsilon,
           std::uintptr_t qkv, std::uintptr_t query_weight, std::uintptr_t key_weight, std::uintptr_t cos,
           std::uintptr_t sin, std::int64_t rows_per_clip, const std::array<std::int64_t, 4>& grad_query,
           const std::array<std::int64_t, 4>& grad_key, const std::array<std::int64_t, 4>& grad_value,
           std::uintptr_t grad_qkv, std::uintptr_t grad_query_weight, std::uintptr_t grad_key_weight, int threads) {
          bestrq2::RotaryRows a{};
          a.bf16 = bf16, a.rows = rows, a.heads = heads, a.dim = dim, a.angle_rows = angle_rows, a.epsilon = epsilon;
          a.qkv = at<void>(qkv), a.query_weight = at<float>(query_weight), a.key_weight = at<float>(key_weight);
          a.cos = at<float>(cos), a.sin = at<float>(sin), a.rows_per_clip = rows_per_clip;
          const auto strided = [](const std::array<std::int64_t, 4>& from, const void*& address,
                                  std::int64_t* strides) {
            address = at<void>(static_cast<std::uintptr_t>(from[0]));
            std::copy(from.begin() + 1, from.end(), strides);
          };
          strided(grad_query, a.grad_query, a.query_strides);
          strided(grad_key, a.grad_key, a.key_strides);
          strided(grad_value, a.grad_value, a.value_strides);
          a.grad_qkv = at<void>(grad_qkv), a.grad_query_weight = at<float>(grad_query_weight);
          a.grad_key_weight = at<float>(grad_key_weight), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::rotary_rows_backward(a);
        });
  m.def("gated_rows_forward",
        [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x, std::uintptr_t out, int threads) {
          bestrq2::GatedRows a{};
          a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.out = at<void>(out), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::gated_rows_forward(a);
        });
  m.def("gated_rows_backward", [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x,
                                  std::uintptr_t grad, std::uintptr_t grad_x, int threads) {
    bestrq2::GatedRows a{};
    a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.grad = at<void>(grad);
    a.grad_x = at<void>(grad_x), a.threads = threads;
    const py::gil_scoped_release release;
    bestrq2::gated_rows_backward(a);
  });
  // sizes: batch, heads, queries, keys, dim. Rows: address, then strides of batch, head and token.
  const auto short_attention = [](const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths, float scale,
                                  const std::vector<std::array<std::int64_t, 4>>& rows, std::uintptr_t logsumexp,
                                  int threads) {
    bestrq2::ShortAttention a{};
    a.batch = sizes[0], a.heads = sizes[1], a.queries = sizes[2], a.keys = sizes[3], a.dim = sizes[4];
    a.lengths = at<const std::int64_t>(lengths), a.scale = scale, a.logsumexp = at<float>(logsumexp);
    a.threads = threads;
    bestrq2::TokenRows* const fields[] = {&a.query, &a.key,        &a.value,    &a.out,
                                          &a.grad,  &a.grad_query, &a.grad_key, &a.grad_value};
    for (std::size_t i = 0; i < std::min(rows.size(), std::size(fields)); ++i)
      *fields[i] = {at<std::uint16_t>(static_cast<std::uintptr_t>(rows[i][0])), rows[i][1], rows[i][2], rows[i][3]};
    return a;
  };
  m.def("short_attention_forward",
        [short_attention](const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths, float scale,
                          const std::vector<std::array<std::int64_t, 4>>& rows, std::uintptr_t logsumexp, int threads) {
          const auto a = short_attention(sizes, lengths, scale, rows, logsumexp, threads);
          const py::gil_scoped_release release;
          bestrq2::short_attention_forward(a);
        });
  m.def("short_attention_backward",
        [short_attention](const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths, float scale,
                          const std::vector<std::array<std::int64_t, 4>>& rows, std::uintptr_t logsumexp, int threads) {
          const auto a = short_attention(sizes, lengths, scale, rows, logsumexp, threads);
          const py::gil_scoped_release release;
          bestrq2::short_attention_backward(a);
        });
}
