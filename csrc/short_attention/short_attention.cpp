#include "short_attention/short_attention.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "short_attention/fp32_kernel.h"

namespace bestrq2 {
namespace {

const Fp32ShortAttention& fp32_kernels() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::fp32_short_attention;
  if (best_isa() == Isa::avx2) return avx2::fp32_short_attention;
#endif
  return portable::fp32_short_attention;
}

// pass(batch, head, scratch) for every head, each thread with scratch of its own.
template <class Pass>
void every_head(const ShortAttention& a, int64_t bytes, Pass pass) {
  const int threads = static_cast<int>(std::min<int64_t>(std::max(a.threads, 1), a.batch * a.heads));
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(allocate<char>(bytes));
  parallel_for(a.batch * a.heads, threads, [&](int64_t index, int thread) {
    pass(index / a.heads, index % a.heads, scratch[static_cast<size_t>(thread)].get());
  });
}

void run(const ShortAttention& a, bool backward) {
  if (!a.bf16) {
    const Fp32ShortAttention& kernels = fp32_kernels();
    const auto pass = backward ? kernels.backward : kernels.forward;
    every_head(a, kernels.scratch_bytes(a, backward), [&](int64_t batch, int64_t head, void* scratch) {
      const int64_t next = batch * a.heads + head + std::max(a.threads, 1);
      pass(a, batch, head, next < a.batch * a.heads ? next : -1, scratch);
    });
    return;
  }
#ifdef BESTRQ2_X86
  if (const Dot dot = best_dot(); dot != Dot::none) {
    const auto pass = backward ? short_attention::backward : short_attention::forward;
    every_head(a, short_attention::scratch_bytes(a, backward),
               [&](int64_t batch, int64_t head, void* scratch) { pass(a, dot, batch, head, scratch); });
    return;
  }
#endif
  throw std::runtime_error("short_attention: bf16 products need AVX-512 BF16");
}

}  // namespace

void short_attention_forward(const ShortAttention& a) { run(a, false); }
void short_attention_backward(const ShortAttention& a) { run(a, true); }

}  // namespace bestrq2
