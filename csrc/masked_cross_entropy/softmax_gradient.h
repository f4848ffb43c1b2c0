// The part of masked cross-entropy that is not a matrix product: one pass over a chunk of logits on the CPU.
#pragma once

#include <cstdint>

namespace bestrq2 {

// For every row r of the chunk, with z = logits[r] + bias, i = index[r] (r where index is null), t = targets[i],
// w = scale * row_weights[i] (scale where they are null) and lse = log sum_v exp(z_v):
//
//   losses[i]  = w * (lse - (1 - label_smoothing) * z_t - label_smoothing * mean(z) + z_loss * lse^2)
//   correct[i] = 1 if t is the first largest logit, else 0
//   logits[r]  = w * (exp(z - lse) * (1 + 2 * z_loss * lse) - (1 - label_smoothing) * onehot(t)
//                     - label_smoothing / classes)                                        where `gradient` is set
//
// All arithmetic is fp32. Targets must lie in [0, classes).
struct SoftmaxGradient {
  float* logits;  // (rows, classes) contiguous
  int64_t rows, classes;
  const int64_t* index;      // (rows) or null
  const int64_t* targets;    // by index
  const float* row_weights;  // by index, or null
  float scale, label_smoothing, z_loss;
  bool gradient;
  const float* bias;  // (classes) or null
  float* losses;      // by index
  float* correct;     // by index
  int threads;
};

void softmax_gradient(const SoftmaxGradient& chunk);

}  // namespace bestrq2
