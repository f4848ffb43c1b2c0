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
  const int64_t tasks = (chunk.rows + kRowsPerTask - 1) / kRowsPerTask;
  parallel_for(tasks, threads, [&](int64_t task, int thread) {
    const int64_t first = task * kRowsPerTask;
    rows(chunk, first, std::min(first + kRowsPerTask, chunk.rows), scratch[static_cast<size_t>(thread)].get());
  });
}

}  // namespace bestrq2
