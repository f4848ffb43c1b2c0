// Masked cross-entropy as a whole: products, softmax, losses and gradients, chunk by chunk of rows.
#pragma once

#include <cstdint>

namespace bestrq2 {

// N rows, of which `count` count; G codebooks, each with a classifier of its own on the same rows; V classes, D
// features. Every sum is fp32, in an order that does not depend on the number of threads. Losses, `correct` and
// gradients are those of SoftmaxGradient in softmax_gradient.h.
struct MaskedCrossEntropy {
  const void* hidden;  // (N, D) contiguous, bf16 or fp32
  bool hidden_bf16;
  const void* weight;  // (G, V, D) contiguous, bf16 or fp32
  bool weight_bf16;
  const float* bias;  // (G, V) or null
  int64_t rows, count, num_codebooks, classes, features;
  const int64_t* index;        // (count) the rows that count, or null: all
  const int64_t* targets;      // (G, N)
  const float* row_weights;    // (N) or (G, N), or null: 1 each
  int64_t row_weights_stride;  // between codebooks: 0 or N
  float scale, label_smoothing, z_loss;
  float* losses;      // (G, N); only rows in index are written
  float* correct;     // the same
  void* grad_hidden;  // like hidden, or null; the same
  void* grad_weight;  // like weight, or null
  float* grad_bias;   // (G, V) or null
  int64_t chunk_rows;
  int threads;
};

// With bf16 products, for processors with bf16 dot products (AVX-512 BF16) or bf16 matrix tiles (AMX): only where
// best_dot() is not Dot::none. Operands in fp32 are rounded to bf16 as they are packed, logits never are.
void masked_cross_entropy_bf16(const MaskedCrossEntropy& f);

// With fp32 products, for every processor; all operands must be fp32.
void masked_cross_entropy_fp32(const MaskedCrossEntropy& f);

// The classifier of one codebook, as a call of its own.
MaskedCrossEntropy of_codebook(const MaskedCrossEntropy& f, int64_t g);

}  // namespace bestrq2
