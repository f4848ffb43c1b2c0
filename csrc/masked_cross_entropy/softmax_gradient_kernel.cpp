// Softmax gradient of rows of logits, in place. Compiled once per instruction set; the loops are written so that the
// compiler vectorises them (-fopenmp-simd allows it to reorder the marked sums and maxima, and nothing else).
//
//   row of products                   scratch                     row, now the gradient of z
//   +-----------------------+  pass 1 +-------------------+ pass 3 +-----------------------+
//   | z_0 z_1 ...     z_V-1 | ------> | z + bias, then    | -----> | w (p f - s/V)         |
//   +-----------------------+ maximum | e = exp(z - max)  |        +-----------------------+
//                                     +-------------------+        then -w (1 - s) at the target
//                                       pass 2: sum of e
//
// A row of 8192 floats stays in the first two cache levels between the passes: each logit is fetched and stored once.
#include "masked_cross_entropy/softmax_gradient_kernel.h"

#include "common/exp.h"

// No standard library templates here: their inline functions, compiled for AVX-512, could be the copies that the linker
// keeps for every other file.
extern "C" float logf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

// One row; `e` holds its logits, then their exponentials.
void row_gradient(const SoftmaxGradient& c, float* z, int64_t target, float weight, float* loss, float* correct,
                  float* e) {
  const int64_t classes = c.classes;
  const float* bias = c.bias;
  float largest = -__builtin_inff();
  if (bias != nullptr) {
#pragma omp simd reduction(max : largest)
    for (int64_t v = 0; v < classes; ++v) {
      const float value = z[v] + bias[v];
      e[v] = value;
      largest = largest > value ? largest : value;
    }
  } else {
#pragma omp simd reduction(max : largest)
    for (int64_t v = 0; v < classes; ++v) {
      const float value = z[v];
      e[v] = value;
      largest = largest > value ? largest : value;
    }
  }
  const float at_target = e[target];
  int64_t first = target;
  if (at_target == largest)
    for (int64_t v = target - 1; v >= 0; --v)
      if (e[v] == largest) first = v;
  *correct = at_target == largest && first == target ? 1.0f : 0.0f;

  float mean = 0.0f;
  if (c.label_smoothing != 0.0f) {
    // Relative to the maximum, so that large common offsets do not round the small differences away.
#pragma omp simd reduction(+ : mean)
    for (int64_t v = 0; v < classes; ++v) mean += e[v] - largest;
    mean /= static_cast<float>(classes);
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < classes; ++v) {
    e[v] = exp_nonpositive(e[v] - largest);
    sum += e[v];
  }
  const float log_sum = logf(sum), lse = largest + log_sum;
  const float kept = 1.0f - c.label_smoothing;
  // lse - kept * z_t - smoothing * mean(z), every logit taken relative to the maximum.
  const float entropy = log_sum - kept * (at_target - largest) - c.label_smoothing * mean;
  *loss = weight * (entropy + c.z_loss * lse * lse);
  if (!c.gradient) return;

  const float factor = weight * (1.0f + 2.0f * c.z_loss * lse) / sum;
  const float uniform = weight * c.label_smoothing / static_cast<float>(classes);
  const float gradient_at_target = e[target] * factor - uniform - weight * kept;
#pragma omp simd
  for (int64_t v = 0; v < classes; ++v) z[v] = e[v] * factor - uniform;
  z[target] = gradient_at_target;
}

void softmax_gradient(const SoftmaxGradient& c, int64_t first, int64_t last, float* scratch) {
  for (int64_t r = first; r < last; ++r) {
    const int64_t i = c.index != nullptr ? c.index[r] : r;
    const float weight = c.scale * (c.row_weights != nullptr ? c.row_weights[i] : 1.0f);
    row_gradient(c, c.logits + r * c.classes, c.targets[i], weight, c.losses + i, c.correct + i, scratch);
  }
}

}  // namespace

extern const SoftmaxGradientRows softmax_gradient_rows = softmax_gradient;

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
