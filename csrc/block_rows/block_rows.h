// What a Transformer block does between its matrix products, one pass over memory each: residual sum with norm, rotary
// positions with query and key norms, SwiGLU. Activations are fp32 or bf16, arithmetic and weights fp32.
#pragma once

#include <cstdint>

namespace bestrq2 {

// sum = x + factor * scale[clip] * (branch + branch_bias), rounded to the type of the activations;
// out = norm(sum) * weight + bias. The clip of a row is row / rows_per_clip.
//
// Stochastic depth drops branches of whole clips, and nothing need be computed of what is dropped: `branch` and `out`
// may hold fewer clips than x. Clip c of x is then clip branch_place[c] of `branch` and out_place[c] of `out`, or is
// not there (-1). A null place: clip c is clip c.
struct NormRows {
  bool bf16, layer_norm;  // layer_norm: minus the mean, over the deviation; else over the root mean square
  int64_t rows, width, rows_per_clip;
  const void *x, *branch;  // (rows, width); branch null: sum is x and is not written
  const float* scale;      // null: 1
  float factor, epsilon;
  const float *weight, *bias;  // (width), either may be null
  const float* branch_bias;    // (width) or null
  const int64_t *branch_place, *out_place;
  void *sum, *out;  // out null: the sum alone
  int threads;

  // Backward: of (sum, out) to x, branch, weight and bias. `sum` is read.
  const void *grad_sum, *grad_out;  // null: 0
  void *grad_x, *grad_branch;       // grad_branch null: not wanted (it equals grad_x where scale and factor are 1)
  float *grad_weight, *grad_bias, *grad_branch_bias;  // (width), null: not wanted
};

void norm_rows_forward(const NormRows& a);
void norm_rows_backward(const NormRows& a);

// qkv (rows, 3, heads, dim) -> out (rows, 2, heads, dim): queries and keys, RMS-normalised where weights are given,
// then channel pairs (i, i + dim / 2) turned by the angle of their row. cos and sin (angle_rows, dim / 2), row %
// angle_rows.
struct RotaryRows {
  bool bf16;
  int64_t rows, heads, dim, angle_rows;
  float epsilon;
  const void* qkv;
  const float *query_weight, *key_weight;  // (dim) or null
  const float *cos, *sin;                  // or null: no turning
  void* out;
  int threads;

  // Backward: gradients of queries, keys and values in any strides (batch, row of the clip, head) -> grad_qkv.
  int64_t rows_per_clip;
  const void *grad_query, *grad_key, *grad_value;
  int64_t query_strides[3], key_strides[3], value_strides[3];
  void* grad_qkv;
  float *grad_query_weight, *grad_key_weight;
};

void rotary_rows_forward(const RotaryRows& a);
void rotary_rows_backward(const RotaryRows& a);

// x (rows, 2 * width) = gate | value -> out (rows, width) = silu(gate) * value; backward: grad (rows, width) -> grad_x.
struct GatedRows {
  bool bf16;
  int64_t rows, width;
  const void *x, *grad;
  void *out, *grad_x;
  int threads;
};

void gated_rows_forward(const GatedRows& a);
void gated_rows_backward(const GatedRows& a);

// out = gelu(x + bias), the exact one, within 3e-7 of max(|out|, 1); backward: grad of out -> grad_x, and its column
// sums.
struct GeluRows {
  bool bf16;
  int64_t rows, width;
  const void *x, *grad;
  const float* bias;  // (width) or null
  void *out, *grad_x;
  float* grad_bias;  // (width), null: not wanted
  int threads;
};

void gelu_rows_forward(const GeluRows& a);
void gelu_rows_backward(const GeluRows& a);

// x += bias, in place, and the gradient of the bias: column sums of x.
struct BiasRows {
  bool bf16;
  int64_t rows, width;
  void* x;
  const float* bias;
  float* sums;
  int threads;
};

void add_bias_rows(const BiasRows& a);
void sum_rows(const BiasRows& a);

}  // namespace bestrq2
