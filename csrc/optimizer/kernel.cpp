// Compiled once per instruction set; the compiler vectorises the marked loops.
#include "optimizer/kernel.h"

#include "common/half.h"

extern "C" float sqrtf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

inline float widen(float v) { return v; }
inline float widen(uint16_t v) { return from_bf16(v); }

template <class G>
void update(const AdamTensor& a, const AdamSettings& s, int64_t first, int64_t last) {
  float *parameter = a.parameter, *mean = a.mean, *square = a.square;
  const G* grad = static_cast<const G*>(a.grad);
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    const float g = widen(grad[i]) * s.factor;
    const float m = mean[i] + (g - mean[i]) * s.rest1;
    const float v = square[i] * s.beta2 + g * g * s.rest2;
    mean[i] = m;
    square[i] = v;
    parameter[i] = parameter[i] * a.decay - a.step_size * m / (sqrtf(v) * a.root + s.epsilon);
  }
}

void adamw(const AdamTensor& a, const AdamSettings& s, int64_t first, int64_t last) {
  a.bf16 ? update<uint16_t>(a, s, first, last) : update<float>(a, s, first, last);
}

constexpr int64_t kBlock = 1024;  // added up in fp32, blocks of it in double

template <class G>
double squares(const void* data, int64_t first, int64_t last) {
  const G* x = static_cast<const G*>(data);
  double total = 0;
  for (; first < last; first += kBlock) {
    const int64_t end = first + kBlock < last ? first + kBlock : last;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < end; ++i) sum += widen(x[i]) * widen(x[i]);
    total += sum;
  }
  return total;
}

double sum_of_squares(const GradTensor& a, int64_t first, int64_t last) {
  return a.bf16 ? squares<uint16_t>(a.grad, first, last) : squares<float>(a.grad, first, last);
}

}  // namespace

extern const OptimizerKernel optimizer_kernel = {adamw, sum_of_squares};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
