// Masked cross-entropy of bf16 products as a whole: products, softmax, losses and gradients, chunk by chunk of rows.
// For processors with bf16 dot products (AVX-512 BF16) or bf16 matrix tiles (AMX).
#pragma once

#include <cstdint>

#include "masked_cross_entropy.h"

namespace bestrq2 {

// Rows count, classes V, features D. Operands in fp32 are rounded to bf16 as they are packed; every sum is fp32, in an
// order that does not depend on the number of threads. Losses, `correct` and gradients are those of SoftmaxGradient in
// masked_cross_entropy.h, but from logits that were never rounded to bf16.
struct FusedCrossEntropy {
  const void* hidden;  // (rows, D) contiguous, bf16 or fp32; row index[r] belongs to r
  bool hidden_bf16;
  const void* weight;  // (V, D) contiguous, bf16 or fp32
  bool weight_bf16;
  const float* bias;  // (V) or null
  int64_t count, classes, features;
  const int64_t* index;    // (count) or null
  const int64_t* targets;  // by index
  const float* weights;    // by index, or null
  float scale, label_smoothing, z_loss;
  float* losses;      // by index
  float* correct;     // by index
  void* grad_hidden;  // like hidden, or null; only rows in index are written
  void* grad_weight;  // like weight, or null
  float* grad_bias;   // (V) or null
  int64_t chunk_rows;
  int threads;
};

// Only where best_dot() is not Dot::none.
void masked_cross_entropy_fused(const FusedCrossEntropy& f);

}  // namespace bestrq2
