// The passes over one chunk of rows. Logits exist only as exponentials in bf16, relative to the maximum of their 32
// classes, so that each is computed once; losses and all sums are fp32.
//
//   pack       rows of the chunk as B panels, twice: summed over features, and over rows
//   logits     Z^T = W H^T, 32 classes x 32 rows at a time; exponentials to the buffer, maxima and sums to stats
//   losses     joins the statistics of all classes
//   gradients  dz^T of 32 classes from the buffer, in place and in a private panel; dW = dz^T H, written once a chunk
//   hidden     dH^T += W^T dz^T, after every group of classes
#include "masked_cross_entropy_fused.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "isa.h"
#include "masked_cross_entropy_fused_kernel.h"
#include "parallel.h"

namespace bestrq2 {

#ifdef BESTRQ2_X86

namespace {

using fused::Chunk;
using fused::kClassPanels;
using fused::kPanel;
using fused::kStep;
using fused::panels;

constexpr int64_t kRowBlock = 16;  // panels of rows of the logits at a time: they stay in the L2 cache
constexpr int64_t kRowPanels = 8;  // the same of the hidden gradient, whose fp32 blocks are twice as large
constexpr int64_t kGroup = 32;     // least number of panels of classes between two passes over the rows

// Whether the processor multiplies tiles of bf16 and the system lets this process keep tile registers.
bool tiles_allowed() {
#if defined(BESTRQ2_AMX) && defined(__linux__) && defined(__x86_64__)
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID 7.0: EDX
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

std::atomic<Dot>& most_dot() {
  static std::atomic<Dot> most{Dot::amx};
  return most;
}

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};
template <class T>
using Buffer = std::unique_ptr<T[], Free>;

template <class T>
Buffer<T> allocate(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
  auto* pointer = static_cast<T*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (pointer == nullptr) throw std::bad_alloc();
  return Buffer<T>(pointer);
}

// Rows of the chunk by panel of their target's class, in order.
void sort_by_target(Chunk& c) {
  const FusedCrossEntropy& f = *c.call;
  const int64_t class_panels = panels(f.classes);
  const auto panel = [&](int64_t r) {
    const int64_t masked = c.first + r;
    return f.targets[f.index != nullptr ? f.index[masked] : masked] / kPanel;
  };
  std::fill(c.bounds, c.bounds + class_panels + 1, 0);
  for (int64_t r = 0; r < c.rows; ++r) ++c.bounds[panel(r) + 1];
  for (int64_t q = 0; q < class_panels; ++q) c.bounds[q + 1] += c.bounds[q];
  std::vector<int64_t> next(c.bounds, c.bounds + class_panels);
  for (int64_t r = 0; r < c.rows; ++r) c.entries[next[static_cast<size_t>(panel(r))]++] = r;
}

}  // namespace

Dot best_dot() {
  if (!use_bf16_dot()) return Dot::none;
  return std::min(most_dot().load(), tiles_allowed() ? Dot::amx : Dot::avx512);
}

void limit_dot(Dot most) { most_dot() = most; }

void masked_cross_entropy_fused(const FusedCrossEntropy& f) {
  if (best_dot() == Dot::none) throw std::runtime_error("masked_cross_entropy_fused needs AVX-512 BF16");
  const int threads = std::max(f.threads, 1);
  const int64_t step = std::min(std::max<int64_t>(f.chunk_rows, 1), f.count);
  const int64_t row_panels = panels(step), class_panels = panels(f.classes), feature_panels = panels(f.features);
  // Larger groups give every thread work; the sums do not depend on them.
  const int64_t share = std::min(std::max<int64_t>(class_panels / (4 * threads), 1), kClassPanels);
  const int64_t group = std::min(class_panels, std::max<int64_t>(kGroup, 2 * share * threads));

  Chunk c{};
  c.call = &f, c.dot = best_dot();
  c.keep = f.grad_hidden != nullptr || f.grad_weight != nullptr || f.grad_bias != nullptr;
  const auto by_feature = allocate<uint16_t>(row_panels * feature_panels * kStep);
  const auto by_row = allocate<uint16_t>(f.grad_weight != nullptr ? row_panels * feature_panels * kStep : 0);
  const auto buffer = allocate<uint16_t>(c.keep ? row_panels * class_panels * kStep : 0);
  const auto stats = allocate<float>(row_panels * class_panels * 3 * kPanel);
  const auto row_stats = allocate<float>(fused::kRowStats * row_panels * kPanel);
  const auto entries = allocate<int64_t>(step);
  const auto bounds = allocate<int64_t>(class_panels + 1);
  const auto transposed = allocate<uint16_t>(f.grad_hidden != nullptr ? 2 * group * feature_panels * kStep : 0);
  const auto grad_T = allocate<float>(f.grad_hidden != nullptr ? row_panels * feature_panels * kStep : 0);
  const bool several = f.count > step && f.grad_weight != nullptr;
  const auto total = allocate<float>(several && f.weight_bf16 ? f.classes * f.features : 0);
  const int64_t scratch_size = (fused::scratch_size(f, step) + 15) / 16 * 16;
  const auto scratch = allocate<float>(scratch_size * threads);
  c.by_feature = by_feature.get(), c.by_row = f.grad_weight != nullptr ? by_row.get() : nullptr;
  c.buffer = buffer.get(), c.stats = stats.get(), c.row_stats = row_stats.get();
  c.entries = entries.get(), c.bounds = bounds.get(), c.transposed = transposed.get(), c.grad_T = grad_T.get();
  c.total = f.weight_bf16 ? total.get() : static_cast<float*>(f.grad_weight);

  for (int64_t first = 0; first < f.count; first += step) {
    c.first = first, c.rows = std::min(step, f.count - first);
    c.first_chunk = first == 0, c.last_chunk = first + step >= f.count;
    const int64_t rows = panels(c.rows);
    parallel_for(rows, threads, [&](int64_t p, int) { fused::pack_rows(c, p); });
    sort_by_target(c);
    const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
    parallel_for(blocks * class_panels, threads, [&](int64_t task, int thread) {
      const int64_t begin = rows * (task / class_panels) / blocks, end = rows * (task / class_panels + 1) / blocks;
      fused::logits(c, task % class_panels, begin, end, scratch.get() + thread * scratch_size);
    });
    parallel_for(rows, threads, [&](int64_t p, int) { fused::losses(c, p); });
    if (!c.keep) continue;
    // The rows of one group of classes and the classes of the next share a pass: fewer barriers, at each of which a
    // thread that the system has taken off its core would keep the others waiting.
    const int64_t groups = (class_panels + group - 1) / group;
    const int64_t row_tasks =
        f.grad_hidden == nullptr ? 0 : std::min(rows, std::max<int64_t>((rows + kRowPanels - 1) / kRowPanels, threads));
    for (int64_t g = 0; g < groups + (row_tasks > 0 ? 1 : 0); ++g) {
      const int64_t begin = g * group, end = std::min(begin + group, class_panels);
      const int64_t class_tasks = g < groups ? (end - begin + share - 1) / share : 0;
      parallel_for(class_tasks + (g > 0 ? row_tasks : 0), threads, [&](int64_t task, int thread) {
        float* own = scratch.get() + thread * scratch_size;
        Chunk part = c;
        part.transposed += (task < class_tasks ? g : g - 1) % 2 * group * feature_panels * kStep;
        if (task < class_tasks) {
          const int64_t slot = task * share;
          fused::gradients(part, begin + slot, std::min(begin + slot + share, end), slot, end - begin, own);
        } else {
          task -= class_tasks;
          fused::hidden_gradient(part, rows * task / row_tasks, rows * (task + 1) / row_tasks, begin - group,
                                 std::min(begin, class_panels), g == groups, own);
        }
      });
    }
  }
}

#else

Dot best_dot() { return Dot::none; }
void limit_dot(Dot) {}
void masked_cross_entropy_fused(const FusedCrossEntropy&) {
  throw std::runtime_error("masked_cross_entropy_fused needs AVX-512 BF16");
}

#endif

}  // namespace bestrq2
