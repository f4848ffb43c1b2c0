// What each instruction set offers to short_attention.cpp for fp32.
#pragma once

#include "short_attention/short_attention.h"

namespace bestrq2 {

// One head of one clip at a time; `next` is the number batch * heads + head that this thread will probably take
// next, or -1.
struct Fp32ShortAttention {
  int64_t (*scratch_bytes)(const ShortAttention& a, bool backward);
  void (*forward)(const ShortAttention& a, int64_t batch, int64_t head, int64_t next, void* scratch);
  void (*backward)(const ShortAttention& a, int64_t batch, int64_t head, int64_t next, void* scratch);
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
