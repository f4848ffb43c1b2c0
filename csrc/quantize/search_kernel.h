// Interface of each instruction set, called by quantize.cpp. Implemented by fp32_search.cpp, compiled once per
// set, and by int8_search.cpp for processors with 8-bit dot products.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "quantize/quantize.h"

namespace bestrq2 {

constexpr int64_t kParts = 8;  // a codebook is packed in so many independent parts

struct QuantizeKernel {
  // Sizes of the repacked codebook (float) and projection (double) of one book.
  int64_t (*packed_codebook_size)(int64_t codes, int64_t dims);
  int64_t (*packed_projection_size)(int64_t features, int64_t dims);
  void (*pack_codebook)(const float* codebook, int64_t codes, int64_t dims, int64_t part, float* packed);
  void (*pack_projection)(const double* projection, int64_t features, int64_t dims, double* packed);
  // Bytes of 64-byte aligned scratch for chunks of `count` rows.
  int64_t (*scratch_size)(const Quantize& q, int64_t count);
  // Codes of the `count` rows listed in `rows` (null: first, first + 1, ...). `codebooks` and `projections` are the
  // packed books. Returns the first row that is not finite, or -1.
  int64_t (*run)(const Quantize& q, const float* codebooks, const double* projections, const int64_t* rows,
                 int64_t first, int64_t count, void* scratch);
};

namespace portable {
extern const QuantizeKernel quantize_kernel;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const QuantizeKernel quantize_kernel;
}
namespace avx512 {
extern const QuantizeKernel quantize_kernel;
}
namespace avx512vnni {
extern const QuantizeKernel quantize_kernel;  // int8_search.cpp
}
#endif

}  // namespace bestrq2
