// Weight gradient of a chunk of bf16 rows, summed in fp32: what a library product that returns bf16 cannot do.
#pragma once

#include <cstdint>

namespace bestrq2 {

// total (classes, features) += gradient^T rows, or = where `overwrite` is set. Products of two bf16 values are exact in
// fp32; sums are fp32 in a fixed order that does not depend on the number of threads.
struct WeightGradient {
  const uint16_t* gradient;  // (count, classes) contiguous, bf16
  const uint16_t* rows;      // (count, features) contiguous, bf16
  int64_t count, classes, features;
  bool overwrite;
  float* total;
  int threads;
};

// Whether this processor has bf16 dot products (AVX-512 BF16) and the chosen instruction set allows them.
bool has_weight_gradient();

// Only where has_weight_gradient().
void weight_gradient(const WeightGradient& w);

#ifdef BESTRQ2_X86
namespace avx512bf16 {

// Implemented by masked_cross_entropy_bf16.cpp. Rows are packed once, in panels; then blocks of classes are
// independent.
constexpr int64_t kClasses = 128;  // classes of a block

int64_t panels(int64_t features);
int64_t packed_rows_size(int64_t count, int64_t features);  // of uint32, for all panels
int64_t packed_block_size(int64_t count);                   // of uint32, scratch of one thread
void pack_panel(const WeightGradient& w, int64_t panel, uint32_t* packed);
void block(const WeightGradient& w, int64_t number, const uint32_t* packed, uint32_t* scratch);

}  // namespace avx512bf16
#endif

}  // namespace bestrq2
