// What each instruction set offers to short_attention.cpp for fp32.
#pragma once

#include "short_attention/short_attention.h"

namespace bestrq2 {

struct Fp32ShortAttention {
  int64_t (*scratch_bytes)(const ShortAttention& a, bool backward);
  void (*forward)(const ShortAttention& a, int64_t batch, int64_t head, void* scratch);
  void (*backward)(const ShortAttention& a, int64_t batch, int64_t head, void* scratch);
};

namespace portable {
extern const Fp32ShortAttention fp32_short_attention;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const Fp32ShortAttention fp32_short_attention;
}
namespace avx512 {
extern const Fp32ShortAttention fp32_short_attention;
}
#endif

}  // namespace bestrq2
