// Interface of each instruction set, called by softmax_gradient.cpp. Implemented by softmax_gradient_kernel.cpp.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "masked_cross_entropy/softmax_gradient.h"

namespace bestrq2 {

// Rows [first, last) of the chunk; `scratch` holds chunk.classes floats.
using SoftmaxGradientRows = void (*)(const SoftmaxGradient& chunk, int64_t first, int64_t last, float* scratch);

namespace portable {
extern const SoftmaxGradientRows softmax_gradient_rows;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const SoftmaxGradientRows softmax_gradient_rows;
}
namespace avx512 {
extern const SoftmaxGradientRows softmax_gradient_rows;
}
#endif

}  // namespace bestrq2
