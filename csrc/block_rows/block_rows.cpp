#include "block_rows/block_rows.h"

#include <algorithm>
#include <vector>

#include "block_rows/kernel.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace bestrq2 {
namespace {

constexpr int64_t kValuesPerTask = 1 << 14;  // about ten microseconds: less is not worth handing out
constexpr int64_t kRowsPerSum = 16;
constexpr int64_t kMostSegments = 64;  // partial sums of weight gradients

const BlockRows& kernels() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::block_rows;
  if (best_isa() == Isa::avx2) return avx2::block_rows;
#endif
  return portable::block_rows;
}

// Cuts rows into tasks of a size that depends on the shape alone, so that sums do not depend on the number of threads.
struct Cut {
  int64_t rows, step, tasks;

  Cut(int64_t rows, int64_t width, bool summed) : rows(rows) {
    step = std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(width, 1));
    // Short sums of sums round less than one long sum.
    if (summed) step = std::max(std::min(step, kRowsPerSum), (rows + kMostSegments - 1) / kMostSegments);
    tasks = (rows + step - 1) / step;
  }

  template <class Task>
  void run(int threads, Task task) const {
    parallel_for(tasks, threads, [&](int64_t index, int thread) {
      task(index * step, std::min((index + 1) * step, rows), index, thread);
    });
  }
};

// Scratch of `size` floats for every thread, on cache lines of its own.
class Scratch {
 public:
  Scratch(int threads, int64_t size) : size_((size + 31) / 16 * 16), data_(size_ * std::max(threads, 1)) {}
  float* operator[](int thread) { return data_.data() + thread * size_; }

 private:
  int64_t size_;
  std::vector<float> data_;
};

// out[i] = the sum of element i of all segments, in their order.
void sum_segments(const float* partial, int64_t segments, int64_t stride, int64_t width, float* out) {
  if (out == nullptr) return;
  std::fill(out, out + width, 0.0f);
  for (int64_t segment = 0; segment < segments; ++segment)
    for (int64_t i = 0; i < width; ++i) out[i] += partial[segment * stride + i];
}

}  // namespace

void norm_rows_forward(const NormRows& a) {
  Scratch scratch(a.threads, a.width);
  Cut(a.rows, a.width, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int thread) {
    kernels().norm_forward(a, first, last, scratch[thread]);
  });
}

void norm_rows_backward(const NormRows& a) {
  Scratch scratch(a.threads, 2 * a.width);
  const Cut cut(a.rows, a.width, true);
  std::vector<float> partial(static_cast<size_t>(cut.tasks * 3 * a.width), 0.0f);
  cut.run(a.threads, [&](int64_t first, int64_t last, int64_t index, int thread) {
    kernels().norm_backward(a, first, last, scratch[thread], partial.data() + index * 3 * a.width);
  });
  sum_segments(partial.data(), cut.tasks, 3 * a.width, a.width, a.grad_weight);
  sum_segments(partial.data() + a.width, cut.tasks, 3 * a.width, a.width, a.grad_bias);
  sum_segments(partial.data() + 2 * a.width, cut.tasks, 3 * a.width, a.width, a.grad_branch_bias);
}

void rotary_rows_forward(const RotaryRows& a) {
  Scratch scratch(a.threads, a.dim);
  Cut(a.rows, 2 * a.heads * a.dim, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int thread) {
    kernels().rotary_forward(a, first, last, scratch[thread]);
  });
}

void rotary_rows_backward(const RotaryRows& a) {
  Scratch scratch(a.threads, 2 * a.dim);
  const Cut cut(a.rows, 3 * a.heads * a.dim, true);
  std::vector<float> partial(static_cast<size_t>(cut.tasks * 2 * a.dim), 0.0f);
  cut.run(a.threads, [&](int64_t first, int64_t last, int64_t index, int thread) {
    kernels().rotary_backward(a, first, last, scratch[thread], partial.data() + index * 2 * a.dim);
  });
  sum_segments(partial.data(), cut.tasks, 2 * a.dim, a.dim, a.grad_query_weight);
  sum_segments(partial.data() + a.dim, cut.tasks, 2 * a.dim, a.dim, a.grad_key_weight);
}

void gated_rows_forward(const GatedRows& a) {
  Cut(a.rows, a.width, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int) {
    kernels().gated_forward(a, first, last);
  });
}

void gated_rows_backward(const GatedRows& a) {
  Cut(a.rows, a.width, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int) {
    kernels().gated_backward(a, first, last);
  });
}

void gelu_rows_forward(const GeluRows& a) {
  Cut(a.rows, a.width, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int) {
    kernels().gelu_forward(a, first, last);
  });
}

void gelu_rows_backward(const GeluRows& a) {
  const Cut cut(a.rows, a.width, true);
  std::vector<float> partial(static_cast<size_t>(cut.tasks * a.width), 0.0f);
  cut.run(a.threads, [&](int64_t first, int64_t last, int64_t index, int) {
    kernels().gelu_backward(a, first, last, partial.data() + index * a.width);
  });
  sum_segments(partial.data(), cut.tasks, a.width, a.width, a.grad_bias);
}

void add_bias_rows(const BiasRows& a) {
  Cut(a.rows, a.width, false).run(a.threads, [&](int64_t first, int64_t last, int64_t, int) {
    kernels().add_bias(a, first, last);
  });
}

void sum_rows(const BiasRows& a) {
  const Cut cut(a.rows, a.width, true);
  std::vector<float> partial(static_cast<size_t>(cut.tasks * a.width), 0.0f);
  cut.run(a.threads, [&](int64_t first, int64_t last, int64_t index, int) {
    kernels().sum_rows(a, first, last, partial.data() + index * a.width);
  });
  sum_segments(partial.data(), cut.tasks, a.width, a.width, a.sums);
}

}  // namespace bestrq2
