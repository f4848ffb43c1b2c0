// Bindings of what Transformer blocks call dozens of times a step: positional arguments, because reading a dict takes
// as long as a short pass. Tensors are addresses and sizes that bestrq2.layers has validated; absent ones have address
// 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <vector>

#include "block_rows/block_rows.h"
#include "optimizer/optimizer.h"
#include "short_attention/short_attention.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void define_blocks(py::module_& m) {
  m.def("norm_rows_forward",
        [](bool bf16, bool layer_norm, std::int64_t rows, std::int64_t width, std::int64_t rows_per_clip,
           std::uintptr_t x, std::uintptr_t branch, std::uintptr_t branch_bias, std::uintptr_t branch_place,
           std::uintptr_t out_place, std::uintptr_t scale, float factor, float epsilon, std::uintptr_t weight,
           std::uintptr_t bias, std::uintptr_t sum, std::uintptr_t out, int threads) {
          bestrq2::NormRows a{};
          a.branch_bias = at<float>(branch_bias), a.branch_place = at<std::int64_t>(branch_place);
          a.out_place = at<std::int64_t>(out_place);
          a.bf16 = bf16, a.layer_norm = layer_norm, a.rows = rows, a.width = width, a.rows_per_clip = rows_per_clip;
          a.x = at<void>(x), a.branch = at<void>(branch), a.scale = at<float>(scale), a.factor = factor;
          a.epsilon = epsilon, a.weight = at<float>(weight), a.bias = at<float>(bias);
          a.sum = at<void>(sum), a.out = at<void>(out), a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::norm_rows_forward(a);
        });
  m.def("norm_rows_backward",
        [](bool bf16, bool layer_norm, std::int64_t rows, std::int64_t width, std::int64_t rows_per_clip,
           std::uintptr_t branch_place, std::uintptr_t out_place, std::uintptr_t scale, float factor, float epsilon,
           std::uintptr_t weight, std::uintptr_t sum, std::uintptr_t grad_sum, std::uintptr_t grad_out,
           std::uintptr_t grad_x, std::uintptr_t grad_branch, std::uintptr_t grad_weight, std::uintptr_t grad_bias,
           std::uintptr_t grad_branch_bias, int threads) {
          bestrq2::NormRows a{};
          a.branch_place = at<std::int64_t>(branch_place), a.out_place = at<std::int64_t>(out_place);
          a.grad_branch_bias = at<float>(grad_branch_bias);
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
  m.def("gelu_rows_forward", [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x, std::uintptr_t bias,
                                std::uintptr_t out, int threads) {
    bestrq2::GeluRows a{};
    a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.bias = at<float>(bias), a.out = at<void>(out);
    a.threads = threads;
    const py::gil_scoped_release release;
    bestrq2::gelu_rows_forward(a);
  });
  m.def("gelu_rows_backward",
        [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x, std::uintptr_t bias, std::uintptr_t grad,
           std::uintptr_t grad_x, std::uintptr_t grad_bias, int threads) {
          bestrq2::GeluRows a{};
          a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.bias = at<float>(bias);
          a.grad = at<void>(grad), a.grad_x = at<void>(grad_x), a.grad_bias = at<float>(grad_bias);
          a.threads = threads;
          const py::gil_scoped_release release;
          bestrq2::gelu_rows_backward(a);
        });
  m.def("add_bias_rows", [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x, std::uintptr_t bias,
                            int threads) {
    bestrq2::BiasRows a{};
    a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.bias = at<float>(bias), a.threads = threads;
    const py::gil_scoped_release release;
    bestrq2::add_bias_rows(a);
  });
  m.def("sum_rows", [](bool bf16, std::int64_t rows, std::int64_t width, std::uintptr_t x, std::uintptr_t sums,
                       int threads) {
    bestrq2::BiasRows a{};
    a.bf16 = bf16, a.rows = rows, a.width = width, a.x = at<void>(x), a.sums = at<float>(sums), a.threads = threads;
    const py::gil_scoped_release release;
    bestrq2::sum_rows(a);
  });
  // sizes: batch, heads, queries, keys, dim. Rows: address, then strides of batch, head and token. Biases: of queries
  // and of values; their sums are for backward.
  using Addresses = std::array<std::uintptr_t, 2>;
  const auto short_attention = [](bool bf16, const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths,
                                  float scale, const std::vector<std::array<std::int64_t, 4>>& rows,
                                  const Addresses& biases, std::uintptr_t logsumexp, int threads) {
    bestrq2::ShortAttention a{};
    a.bf16 = bf16, a.batch = sizes[0], a.heads = sizes[1], a.queries = sizes[2], a.keys = sizes[3], a.dim = sizes[4];
    a.lengths = at<const std::int64_t>(lengths), a.scale = scale, a.logsumexp = at<float>(logsumexp);
    a.query_bias = at<const float>(biases[0]), a.value_bias = at<const float>(biases[1]), a.threads = threads;
    bestrq2::TokenRows* const fields[] = {&a.query, &a.key,        &a.value,    &a.out,
                                          &a.grad,  &a.grad_query, &a.grad_key, &a.grad_value};
    for (std::size_t i = 0; i < std::min(rows.size(), std::size(fields)); ++i)
      *fields[i] = {at<void>(static_cast<std::uintptr_t>(rows[i][0])), rows[i][1], rows[i][2], rows[i][3]};
    return a;
  };
  m.def("short_attention_forward",
        [short_attention](bool bf16, const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths, float scale,
                          const std::vector<std::array<std::int64_t, 4>>& rows, const Addresses& biases,
                          std::uintptr_t logsumexp, int threads) {
          const auto a = short_attention(bf16, sizes, lengths, scale, rows, biases, logsumexp, threads);
          const py::gil_scoped_release release;
          bestrq2::short_attention_forward(a);
        });
  m.def("short_attention_backward",
        [short_attention](bool bf16, const std::array<std::int64_t, 5>& sizes, std::uintptr_t lengths, float scale,
                          const std::vector<std::array<std::int64_t, 4>>& rows, const Addresses& biases,
                          std::uintptr_t logsumexp, std::uintptr_t bias_sums, int threads) {
          auto a = short_attention(bf16, sizes, lengths, scale, rows, biases, logsumexp, threads);
          a.bias_sums = at<float>(bias_sums);
          const py::gil_scoped_release release;
          bestrq2::short_attention_backward(a);
        });
  // Tensors: parameter, both moments, gradient, whether it is bf16, size; and their numbers of this step.
  m.def("adamw",
        [](const std::vector<std::array<std::uintptr_t, 6>>& tensors, const std::vector<std::array<double, 3>>& numbers,
           double beta1, double beta2, double epsilon, double factor, int threads) {
          std::vector<bestrq2::AdamTensor> all;
          for (std::size_t i = 0; i < tensors.size(); ++i) {
            const auto& [parameter, mean, square, grad, bf16, size] = tensors[i];
            const auto& [decay, step_size, root] = numbers.at(i);
            all.push_back({at<float>(parameter), at<float>(mean), at<float>(square), at<void>(grad), bf16 != 0,
                           static_cast<std::int64_t>(size), static_cast<float>(decay), static_cast<float>(step_size),
                           static_cast<float>(root)});
          }
          const py::gil_scoped_release release;
          bestrq2::adamw(all, {static_cast<float>(1 - beta1), static_cast<float>(beta2), static_cast<float>(1 - beta2),
                               static_cast<float>(epsilon), static_cast<float>(factor), threads});
        });
  // Tensors: address, whether it is bf16, size.
  m.def("norm_of", [](const std::vector<std::array<std::uintptr_t, 3>>& tensors, int threads) {
    std::vector<bestrq2::GradTensor> all;
    for (const auto& [grad, bf16, size] : tensors)
      all.push_back({at<void>(grad), bf16 != 0, static_cast<std::int64_t>(size)});
    const py::gil_scoped_release release;
    return bestrq2::norm_of(all, threads);
  });
}
