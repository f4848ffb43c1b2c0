// Masked cross-entropy with fp32 products of our own: the passes over one chunk of rows. The
// weight is read as it is and its gradient written in place; only the rows are copied.
//
//   pack       rows of the chunk, twice: summed over features, and over rows
//   logits     Z^T = W H^T, a block of classes for all rows
//   softmax    losses and accuracy, dz in place, a panel of rows for all classes
//   gradients  dH^T = W^T dz^T, some panels of rows; dW += dz^T H and d bias, a block of classes
#include <algorithm>

#include "common/integers.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "masked_cross_entropy/fp32_passes.h"
#include "masked_cross_entropy/masked_cross_entropy.h"

namespace bestrq2 {
namespace {

constexpr int64_t kLogitTiles = 16;          // of one task: their weights stay in the L2 cache for all rows
constexpr int64_t kGradientTiles = 8;        // of one task
constexpr int64_t kRowTasks = 2;             // for each thread: each task reads the whole weight
constexpr int64_t kWorkPerThread = 1 << 22;  // products: less is not worth waking another thread several times
constexpr int64_t kPage = 4096 / sizeof(float);

const Fp32Passes& passes() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::fp32_passes;
  if (best_isa() == Isa::avx2) return avx2::fp32_passes;
#endif
  return portable::fp32_passes;
}

}  // namespace

void masked_cross_entropy_fp32(const MaskedCrossEntropy& f) {
  const Fp32Passes& pass = passes();
  const int64_t enough = 1 + f.count * f.classes * f.features / kWorkPerThread;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(f.threads, 1), enough));
  const int64_t step = std::min(std::max<int64_t>(f.chunk_rows, 1), f.count);
  const auto panels = [&](int64_t n) { return (n + pass.panel - 1) / pass.panel; };

  Fp32Chunk c{};
  c.keep = f.grad_hidden != nullptr || f.grad_weight != nullptr || f.grad_bias != nullptr;
  // A tile of the weight gradient reads the same classes of all panels, which must not meet in the sets of a cache.
  c.logits_stride = round_up(round_up(f.classes, pass.tile) * pass.panel, kPage) + pass.tile * pass.panel;
  const auto by_feature = allocate<float>(panels(step) * pass.panel * f.features);
  const auto by_row =
      allocate<float>(f.grad_weight != nullptr ? panels(step) * panels(f.features) * pass.panel * pass.panel : 0);
  const auto logits = allocate<float>(panels(step) * c.logits_stride);
  // With several codebooks every chunk keeps the gradient of its rows from one to the next.
  const int64_t kept = f.num_codebooks > 1 ? (f.count + step - 1) / step : 1;
  const int64_t grad_size = panels(step) * pass.panel * round_up(f.features, pass.tile);
  const auto grad_T = allocate<float>(f.grad_hidden != nullptr ? kept * grad_size : 0);
  const int64_t scratch_size = round_up(pass.scratch_size(f.features), 16);
  const auto scratch = allocate<float>(scratch_size * threads);
  c.by_feature = by_feature.get(), c.by_row = by_row.get(), c.logits = logits.get();

  for (int64_t g = 0; g < f.num_codebooks; ++g) {
    const MaskedCrossEntropy call = of_codebook(f, g);
    c.call = &call;
    c.first_codebook = g == 0, c.last_codebook = g == f.num_codebooks - 1;
    for (int64_t first = 0; first < f.count; first += step) {
      c.first = first, c.rows = std::min(step, f.count - first);
      c.first_chunk = first == 0;
      c.grad_T = grad_T.get() + (kept > 1 ? first / step * grad_size : 0);
      const int64_t row_panels = panels(c.rows);
      const auto own = [&](int thread) { return scratch.get() + thread * scratch_size; };
      const auto blocks = [&](int64_t tiles) { return (f.classes + tiles * pass.tile - 1) / (tiles * pass.tile); };
      const auto block = [&](auto* of_classes, int64_t number, int64_t tiles, int thread) {
        const int64_t begin = number * tiles * pass.tile;
        of_classes(c, begin, std::min(begin + tiles * pass.tile, f.classes), own(thread));
      };
      parallel_for(row_panels, threads, [&](int64_t p, int) { pass.pack_rows(c, p); });
      parallel_for(blocks(kLogitTiles), threads,
                   [&](int64_t number, int thread) { block(pass.logits, number, kLogitTiles, thread); });
      parallel_for(row_panels, threads, [&](int64_t p, int) { pass.softmax(c, p); });
      if (!c.keep) continue;
      // Long tasks first.
      const int64_t row_tasks = f.grad_hidden == nullptr ? 0 : std::min(row_panels, kRowTasks * threads);
      const bool of_classes = f.grad_weight != nullptr || f.grad_bias != nullptr;
      parallel_for(row_tasks + (of_classes ? blocks(kGradientTiles) : 0), threads, [&](int64_t task, int thread) {
        if (task < row_tasks)
          pass.hidden_gradient(c, row_panels * task / row_tasks, row_panels * (task + 1) / row_tasks, own(thread));
        else
          block(pass.class_gradients, task - row_tasks, kGradientTiles, thread);
      });
    }
  }
}

}  // namespace bestrq2
