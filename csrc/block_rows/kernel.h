// What each instruction set offers to block_rows.cpp: rows [first, last) of every pass.
#pragma once

#include "block_rows/block_rows.h"

namespace bestrq2 {

struct BlockRows {
  // scratch: 2 * width floats; partial: sums over rows (of norms: weight, bias, branch bias), added to.
  void (*norm_forward)(const NormRows& a, int64_t first, int64_t last, float* scratch);
  void (*norm_backward)(const NormRows& a, int64_t first, int64_t last, float* scratch, float* partial);
  void (*rotary_forward)(const RotaryRows& a, int64_t first, int64_t last, float* scratch);
  void (*rotary_backward)(const RotaryRows& a, int64_t first, int64_t last, float* scratch, float* partial);
  void (*gated_forward)(const GatedRows& a, int64_t first, int64_t last);
  void (*gated_backward)(const GatedRows& a, int64_t first, int64_t last);
  void (*gelu_forward)(const GeluRows& a, int64_t first, int64_t last);
  void (*gelu_backward)(const GeluRows& a, int64_t first, int64_t last, float* partial);
  void (*add_bias)(const BiasRows& a, int64_t first, int64_t last);
  void (*sum_rows)(const BiasRows& a, int64_t first, int64_t last, float* partial);
};

namespace portable {
extern const BlockRows block_rows;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const BlockRows block_rows;
}
namespace avx512 {
extern const BlockRows block_rows;
}
#endif

}  // namespace bestrq2
