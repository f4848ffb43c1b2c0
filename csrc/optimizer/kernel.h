// What each instruction set offers to optimizer.cpp: elements [first, last) of a tensor.
#pragma once

#include "optimizer/optimizer.h"

namespace bestrq2 {

struct OptimizerKernel {
  void (*adamw)(const AdamTensor& tensor, const AdamSettings& settings, int64_t first, int64_t last);
  double (*sum_of_squares)(const GradTensor& tensor, int64_t first, int64_t last);
};

namespace portable {
extern const OptimizerKernel optimizer_kernel;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const OptimizerKernel optimizer_kernel;
}
namespace avx512 {
extern const OptimizerKernel optimizer_kernel;
}
#endif

}  // namespace bestrq2
