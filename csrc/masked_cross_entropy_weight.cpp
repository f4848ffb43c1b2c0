#include "masked_cross_entropy_weight.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "isa.h"
#include "parallel.h"

namespace bestrq2 {

bool has_weight_gradient() { return use_bf16_dot(); }

#ifdef BESTRQ2_X86

namespace {

struct Free {
  void operator()(void* pointer) const { std::free(pointer); }
};

std::unique_ptr<uint32_t[], Free> aligned(int64_t count) {
  const size_t bytes = (static_cast<size_t>(count) * sizeof(uint32_t) + 63) / 64 * 64;
  auto* pointer = static_cast<uint32_t*>(std::aligned_alloc(64, std::max<size_t>(bytes, 64)));
  if (pointer == nullptr) throw std::bad_alloc();
  return std::unique_ptr<uint32_t[], Free>(pointer);
}

}  // namespace

void weight_gradient(const WeightGradient& w) {
  if (!has_weight_gradient()) throw std::runtime_error("weight_gradient needs a processor with AVX-512 BF16");
  const int threads = std::max(w.threads, 1);
  const auto packed = aligned(avx512bf16::packed_rows_size(w.count, w.features));
  parallel_for(avx512bf16::panels(w.features), threads,
               [&](int64_t panel, int) { avx512bf16::pack_panel(w, panel, packed.get()); });
  const int64_t scratch_size = avx512bf16::packed_block_size(w.count);
  const auto scratch = aligned(scratch_size * threads);
  const int64_t blocks = (w.classes + avx512bf16::kClasses - 1) / avx512bf16::kClasses;
  parallel_for(blocks, threads, [&](int64_t number, int thread) {
    avx512bf16::block(w, number, packed.get(), scratch.get() + thread * scratch_size);
  });
}

#else

void weight_gradient(const WeightGradient&) {
  throw std::runtime_error("weight_gradient needs a processor with AVX-512 BF16");
}

#endif

}  // namespace bestrq2
