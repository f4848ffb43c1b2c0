// Gives rows of logits to the kernel of the best instruction set, on several threads.
#include "masked_cross_entropy/softmax_gradient.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "masked_cross_entropy/softmax_gradient_kernel.h"

namespace bestrq2 {
namespace {

constexpr int64_t kRowsPerTask = 8;            // some hundred microseconds at 8192 classes
constexpr int64_t kBiasSums = 32;              // tasks at most where each has sums of its own for the bias
constexpr int64_t kClassesPerTask = 1024;
constexpr int64_t kLogitsPerThread = 1 << 15;  // some ten microseconds: less is not worth waking another thread

SoftmaxGradientRows kernel() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::softmax_gradient_rows;
  if (best_isa() == Isa::avx2) return avx2::softmax_gradient_rows;
#endif
  return portable::softmax_gradient_rows;
}

}  // namespace

void softmax_gradient(const SoftmaxGradient& chunk) {
  const SoftmaxGradientRows rows = kernel();
  const int64_t enough = 1 + chunk.rows * chunk.classes / kLogitsPerThread;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(chunk.threads, 1), enough));
  std::vector<std::unique_ptr<float[]>> scratch(static_cast<size_t>(threads));
  for (auto& buffer : scratch) buffer.reset(new float[static_cast<size_t>(chunk.classes)]);
  // Cut by the number of rows alone: sums do not depend on the number of threads.
  const bool sums = chunk.gradient && chunk.grad_bias != nullptr;
  const int64_t size = std::max(kRowsPerTask, sums ? (chunk.rows + kBiasSums - 1) / kBiasSums : 0);
  const int64_t tasks = (chunk.rows + size - 1) / size, classes = chunk.classes;
  const std::unique_ptr<float[]> bias_sums(sums ? new float[static_cast<size_t>(tasks * classes)] : nullptr);
  parallel_for(tasks, threads, [&](int64_t task, int thread) {
    rows(chunk, task * size, std::min((task + 1) * size, chunk.rows), scratch[static_cast<size_t>(thread)].get(),
         sums ? bias_sums.get() + task * classes : nullptr);
  });
  if (!sums) return;
  parallel_for((classes + kClassesPerTask - 1) / kClassesPerTask, threads, [&](int64_t part, int) {
    const int64_t last = std::min((part + 1) * kClassesPerTask, classes);
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t v = part * kClassesPerTask; v < last; ++v)
        chunk.grad_bias[v] += bias_sums[static_cast<size_t>(task * classes + v)];
  });
}

}  // namespace bestrq2
