// AdamW over all tensors in one loop, and the norm of all gradients. Parameters and moments are fp32, gradients fp32 or
// bf16. Every element is computed from its own five numbers, and sums are cut by position alone, so nothing depends on
// the number of threads.
#pragma once

#include <cstdint>
#include <vector>

namespace bestrq2 {

struct AdamTensor {
  float *parameter, *mean, *square;  // the parameter and its two moments
  const void* grad;
  bool bf16;  // of grad
  int64_t size;
  float decay, step_size, root;  // 1 - rate * decay; rate / (1 - beta1^t); 1 / sqrt(1 - beta2^t)
};

struct AdamSettings {
  float rest1, beta2, rest2, epsilon;  // 1 - beta1, beta2, 1 - beta2: each rounded by itself
  float factor;                        // of the gradients
  int threads;
};

// Loshchilov and Hutter 2019: p = p decay - step_size * m / (sqrt(v) root + epsilon).
void adamw(const std::vector<AdamTensor>& tensors, const AdamSettings& settings);

struct GradTensor {
  const void* grad;
  bool bf16;
  int64_t size;
};

// Square root of the sum of squares.
double norm_of(const std::vector<GradTensor>& tensors, int threads);

}  // namespace bestrq2
