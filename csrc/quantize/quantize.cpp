// Packs projections and codebooks, then gives chunks of rows to the search of the best instruction set.
#include "quantize/quantize.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"
#include "quantize/search_kernel.h"

namespace bestrq2 {
namespace {

constexpr int64_t kChunk = 192;  // rows a thread takes at a time: enough to reuse a panel of codes from the L2 cache
#ifdef BESTRQ2_X86
constexpr int64_t kScreenRows = 512;  // fewer rows do not repay the longer packing of int8_search.cpp
#endif

// Both AVX-512 kernels give the same codes, bit for bit.
const QuantizeKernel& kernel_for(const Quantize& q) {
#ifdef BESTRQ2_X86
  if (use_vnni() && q.rows >= kScreenRows) return avx512vnni::quantize_kernel;
  if (best_isa() == Isa::avx512) return avx512::quantize_kernel;
  if (best_isa() == Isa::avx2) return avx2::quantize_kernel;
#endif
  static_cast<void>(q);
  return portable::quantize_kernel;
}

template <class T>
void require_finite(const T* values, int64_t count, const char* name) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  constexpr Bits kExponent = sizeof(T) == 4 ? Bits{0x7f800000u} : static_cast<Bits>(0x7ff0000000000000u);
  Bits bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    Bits bits;
    std::memcpy(&bits, values + i, sizeof bits);
    bad |= (bits & kExponent) == kExponent;
  }
  if (bad != 0) throw std::invalid_argument(std::string("quantize: ") + name + " must be finite");
}

}  // namespace

int64_t quantize(const Quantize& q) {
  const QuantizeKernel& k = kernel_for(q);
  const int64_t projections = q.shared_projection ? 1 : q.num_codebooks,
                codebooks = q.shared_codebook ? 1 : q.num_codebooks;
  const int64_t codebook_size = k.packed_codebook_size(q.codebook_size, q.codebook_dim);
  const int64_t projection_size = k.packed_projection_size(q.features, q.codebook_dim);
  auto packed_codebooks = allocate<float>(codebooks * codebook_size);
  auto packed_projections = allocate<double>(projections * projection_size);
  parallel_for(codebooks * kParts + projections, q.threads, [&](int64_t i, int) {
    if (i < projections) {
      const double* projection = q.projection + i * q.features * q.codebook_dim;
      require_finite(projection, q.features * q.codebook_dim, "projection");
      k.pack_projection(projection, q.features, q.codebook_dim, packed_projections.get() + i * projection_size);
      return;
    }
    const int64_t book = (i - projections) / kParts, part = (i - projections) % kParts;
    const float* codebook = q.codebook + book * q.codebook_size * q.codebook_dim;
    if (part == 0) require_finite(codebook, q.codebook_size * q.codebook_dim, "codebook");
    k.pack_codebook(codebook, q.codebook_size, q.codebook_dim, part, packed_codebooks.get() + book * codebook_size);
  });

  std::vector<int64_t> selected;
  int64_t count = q.rows;
  if (q.mask != nullptr) {
    std::fill(q.out, q.out + q.rows * q.num_codebooks, int64_t{-1});
    for (int64_t row = 0; row < q.rows; ++row)
      if (q.mask[row]) selected.push_back(row);
    count = static_cast<int64_t>(selected.size());
  }
  if (count == 0) return -1;

  // Short inputs are divided evenly among the threads.
  const int threads = std::max(q.threads, 1);
  const int64_t chunk = std::min(kChunk, (count + threads - 1) / threads);
  const int64_t chunks = (count + chunk - 1) / chunk;
  const int64_t scratch_size = (k.scratch_size(q, chunk) + 63) / 64 * 64;
  auto scratch = allocate<char>(scratch_size * threads);
  std::atomic<int64_t> first_bad{q.rows};
  parallel_for(chunks, threads, [&](int64_t i, int thread) {
    const int64_t begin = i * chunk;
    const int64_t bad = k.run(q, packed_codebooks.get(), packed_projections.get(),
                              q.mask != nullptr ? selected.data() + begin : nullptr, begin,
                              std::min(chunk, count - begin), scratch.get() + thread * scratch_size);
    if (bad < 0) return;
    int64_t known = first_bad.load();
    while (bad < known && !first_bad.compare_exchange_weak(known, bad)) {
    }
  });
  return first_bad.load() < q.rows ? first_bad.load() : -1;
}

}  // namespace bestrq2
