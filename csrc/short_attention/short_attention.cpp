#include "short_attention/short_attention.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "common/memory.h"
#include "common/parallel.h"

namespace bestrq2 {

#ifdef BESTRQ2_X86

namespace {

template <class Pass>
void every_head(const ShortAttention& a, bool backward, Pass pass) {
  const Dot dot = best_dot();
  if (dot == Dot::none) throw std::runtime_error("short_attention: bf16 products need AVX-512 BF16");
  const int threads = static_cast<int>(std::min<int64_t>(std::max(a.threads, 1), a.batch * a.heads));
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < threads; ++i) scratch.push_back(allocate<char>(short_attention::scratch_bytes(a, backward)));
  parallel_for(a.batch * a.heads, threads, [&](int64_t index, int thread) {
    pass(a, dot, index / a.heads, index % a.heads, scratch[static_cast<size_t>(thread)].get());
  });
}

}  // namespace

void short_attention_forward(const ShortAttention& a) { every_head(a, false, short_attention::forward); }
void short_attention_backward(const ShortAttention& a) { every_head(a, true, short_attention::backward); }

#else

void short_attention_forward(const ShortAttention&) {
  throw std::runtime_error("short_attention: bf16 products need AVX-512 BF16");
}
void short_attention_backward(const ShortAttention& a) { short_attention_forward(a); }

#endif

}  // namespace bestrq2
