// Masked cross-entropy with bf16 products: the passes over one chunk of rows. Logits exist only as exponentials in
// bf16, relative to the maximum of their 32 classes, so that each is computed once; losses and all sums are fp32.
//
//   pack       rows of the chunk as B panels, twice: summed over features, and over rows
//   logits     Z^T = W H^T, 32 classes x 32 rows at a time; exponentials to the buffer, maxima and sums to stats
//   losses     joins the statistics of all classes
//   gradients  dz^T of 32 classes from the buffer, in place and in a private panel; dW = dz^T H, written once a chunk
//   hidden     dH^T += W^T dz^T, after every group of classes
#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "masked_cross_entropy/bf16_passes.h"
#include "masked_cross_entropy/masked_cross_entropy.h"

namespace bestrq2 {

MaskedCrossEntropy of_codebook(const MaskedCrossEntropy& f, int64_t g) {
  const auto at = [](auto* pointer, int64_t offset) { return pointer == nullptr ? nullptr : pointer + offset; };
  const int64_t bytes = f.classes * f.features * (f.weight_bf16 ? 2 : 4);
  MaskedCrossEntropy of = f;
  of.weight = at(static_cast<const char*>(f.weight), g * bytes);
  of.grad_weight = at(static_cast<char*>(f.grad_weight), g * bytes);
  of.bias = at(f.bias, g * f.classes), of.grad_bias = at(f.grad_bias, g * f.classes);
  of.targets = at(f.targets, g * f.rows), of.row_weights = at(f.row_weights, g * f.row_weights_stride);
  of.losses = at(f.losses, g * f.rows), of.correct = at(f.correct, g * f.rows);
  return of;
}

#ifdef BESTRQ2_X86

namespace {

using panel::Chunk;
using panel::kClassPanels;
using panel::kPanel;
using panel::kStep;
using panel::panels;

constexpr int64_t kRowBlock = 16;            // panels of rows of the logits at a time: they stay in the L2 cache
constexpr int64_t kRowPanels = 8;            // the same of the hidden gradient, whose fp32 blocks are twice as large
constexpr int64_t kWorkPerThread = 1 << 24;  // products: less is not worth waking another thread several times
constexpr int64_t kGroup = 16;               // least number of panels of classes between two passes over the rows
constexpr int64_t kAhead = 2;                // groups of classes that may be computed before the rows of a group
constexpr int64_t kSlots = kAhead + 2;       // groups whose transposed weight is kept

// Rows of the chunk by panel of their target's class, in order.
void sort_by_target(Chunk& c) {
  const MaskedCrossEntropy& f = *c.call;
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

// Passes over classes and passes over rows depend on each other group by group. A barrier after every pass would make
// all threads wait whenever the system has taken one off its core; here a thread that is ahead goes on with the next
// kAhead groups of classes before it waits.
void gradients_and_rows(const Chunk& c, int threads, int64_t group, int64_t share, float* scratch,
                        int64_t scratch_size) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t rows = panels(c.rows), class_panels = panels(f.classes), feature_panels = panels(f.features);
  const int64_t groups = (class_panels + group - 1) / group, class_tasks = (group + share - 1) / share;
  const int64_t row_tasks =
      f.grad_hidden == nullptr ? 0 : std::min(rows, std::max<int64_t>((rows + kRowPanels - 1) / kRowPanels, threads));
  struct Item {
    bool of_rows;
    int64_t group, task;
  };
  std::vector<Item> items;  // each needs only items before it
  for (int64_t g = 0; g < groups + kAhead; ++g) {
    for (int64_t task = 0; g < groups && task < class_tasks; ++task) items.push_back({false, g, task});
    for (int64_t task = 0; g >= kAhead && task < row_tasks; ++task) items.push_back({true, g - kAhead, task});
  }
  std::vector<std::atomic<int64_t>> classes_done(static_cast<size_t>(groups));    // tasks of each group
  std::vector<std::atomic<int64_t>> groups_done(static_cast<size_t>(row_tasks));  // groups added to each block of rows
  parallel_for(static_cast<int64_t>(items.size()), threads, [&](int64_t number, int thread) {
    const Item item = items[static_cast<size_t>(number)];
    const int64_t begin = item.group * group, end = std::min(begin + group, class_panels);
    float* own = scratch + thread * scratch_size;
    Chunk part = c;
    part.transposed += item.group % kSlots * group * feature_panels * kStep;
    const auto wait_until = [](const std::atomic<int64_t>& counter, int64_t value) {
      while (counter.load(std::memory_order_acquire) < value) std::this_thread::yield();
    };
    auto& classes = classes_done[static_cast<size_t>(item.group)];
    if (item.of_rows) {
      auto& added = groups_done[static_cast<size_t>(item.task)];
      wait_until(classes, class_tasks);
      wait_until(added, item.group);  // sums in the order of the groups
      const int64_t first = rows * item.task / row_tasks, last = rows * (item.task + 1) / row_tasks;
      panel::hidden_gradient(part, first, last, begin, end, c.last_codebook && item.group == groups - 1, own);
      added.store(item.group + 1, std::memory_order_release);
    } else {
      for (const auto& added : groups_done) wait_until(added, item.group - kSlots + 1);  // its slot is free
      const int64_t slot = item.task * share;
      if (begin + slot < end)
        panel::gradients(part, begin + slot, std::min(begin + slot + share, end), slot, end - begin, own);
      classes.fetch_add(1, std::memory_order_acq_rel);
    }
  });
}

}  // namespace

void masked_cross_entropy_bf16(const MaskedCrossEntropy& f) {
  if (best_dot() == Dot::none) throw std::runtime_error("masked_cross_entropy_bf16 needs AVX-512 BF16");
  const int64_t enough = 1 + f.count * f.classes * f.features / kWorkPerThread;
  const int threads = static_cast<int>(std::min<int64_t>(std::max(f.threads, 1), enough));
  const int64_t step = std::min(std::max<int64_t>(f.chunk_rows, 1), f.count);
  const int64_t row_panels = panels(step), class_panels = panels(f.classes), feature_panels = panels(f.features);
  // Larger groups give every thread work; the sums do not depend on them.
  const int64_t share = std::min(std::max<int64_t>(class_panels / (4 * threads), 1), kClassPanels);
  const int64_t group = std::min(class_panels, std::max<int64_t>(kGroup, share * threads));

  Chunk c{};
  c.dot = best_dot();
  c.keep = f.grad_hidden != nullptr || f.grad_weight != nullptr || f.grad_bias != nullptr;
  // With several codebooks every chunk keeps its packed rows and the gradient of its rows from one to the next.
  const int64_t kept = f.num_codebooks > 1 ? (f.count + step - 1) / step : 1,
                size = row_panels * feature_panels * kStep;
  const auto by_feature = allocate<uint16_t>(kept * size);
  const auto by_row = allocate<uint16_t>(f.grad_weight != nullptr ? kept * size : 0);
  const auto buffer = allocate<uint16_t>(c.keep ? row_panels * class_panels * kStep : 0);
  const auto stats = allocate<float>(row_panels * class_panels * 3 * kPanel);
  const auto row_stats = allocate<float>(panel::kRowStats * row_panels * kPanel);
  const auto entries = allocate<int64_t>(step);
  const auto bounds = allocate<int64_t>(class_panels + 1);
  const auto transposed = allocate<uint16_t>(f.grad_hidden != nullptr ? kSlots * group * feature_panels * kStep : 0);
  const auto grad_T = allocate<float>(f.grad_hidden != nullptr ? kept * size : 0);
  const bool several = f.count > step && f.grad_weight != nullptr;
  const auto total = allocate<float>(several && f.weight_bf16 ? f.classes * f.features : 0);
  const int64_t scratch_size = (panel::scratch_size(f, step) + 15) / 16 * 16;
  const auto scratch = allocate<float>(scratch_size * threads);
  c.buffer = buffer.get(), c.stats = stats.get(), c.row_stats = row_stats.get();
  c.entries = entries.get(), c.bounds = bounds.get(), c.transposed = transposed.get();

  for (int64_t g = 0; g < f.num_codebooks; ++g) {
    const MaskedCrossEntropy call = of_codebook(f, g);
    c.call = &call;
    c.first_codebook = g == 0, c.last_codebook = g == f.num_codebooks - 1;
    c.total = f.weight_bf16 ? total.get() : static_cast<float*>(call.grad_weight);
    for (int64_t first = 0; first < f.count; first += step) {
      const int64_t offset = kept > 1 ? first / step * size : 0;
      c.first = first, c.rows = std::min(step, f.count - first);
      c.first_chunk = first == 0, c.last_chunk = first + step >= f.count;
      c.by_feature = by_feature.get() + offset, c.grad_T = grad_T.get() + offset;
      c.by_row = f.grad_weight != nullptr ? by_row.get() + offset : nullptr;
      const int64_t rows = panels(c.rows);
      if (c.first_codebook) parallel_for(rows, threads, [&](int64_t p, int) { panel::pack_rows(c, p); });
      sort_by_target(c);
      const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
      parallel_for(blocks * class_panels, threads, [&](int64_t task, int thread) {
        const int64_t begin = rows * (task / class_panels) / blocks, end = rows * (task / class_panels + 1) / blocks;
        panel::logits(c, task % class_panels, begin, end, scratch.get() + thread * scratch_size);
      });
      parallel_for(rows, threads, [&](int64_t p, int) { panel::losses(c, p); });
      if (c.keep) gradients_and_rows(c, threads, group, share, scratch.get(), scratch_size);
    }
  }
}

#else

void masked_cross_entropy_bf16(const MaskedCrossEntropy&) {
  throw std::runtime_error("masked_cross_entropy_bf16 needs AVX-512 BF16");
}

#endif

}  // namespace bestrq2
