// Arithmetic of one thread of quantize.cu, also compiled for the CPU so that it can be tested without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "quantize_cuda.h"

#ifdef __CUDACC__
#define BESTRQ2_DEVICE __host__ __device__ __forceinline__
#else
#define BESTRQ2_DEVICE inline
#endif

namespace bestrq2 {

BESTRQ2_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

BESTRQ2_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

BESTRQ2_DEVICE bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

// Element `index` of x, exactly.
BESTRQ2_DEVICE float read_value(const void* x, Float type, int64_t index) {
  if (type == Float::f32) return static_cast<const float*>(x)[index];
  const uint32_t bits = static_cast<const uint16_t*>(x)[index];
  if (type == Float::bf16) return float_from_bits(bits << 16);
  const uint32_t magnitude = bits & 0x7fffu, sign = (bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | (magnitude << 13));
  return float_from_bits(sign | bits_of(float_from_bits(magnitude << 13) * 0x1p112f));
}

// A sum in fp32 with the rounding errors kept aside: raw decibels share an offset that cancels in the projection.
struct Sum {
  float total = 0.0f, lost = 0.0f;

  // Adds a * b; the product's own rounding error comes from the fused multiply-add.
  BESTRQ2_DEVICE void add_product(float a, float b) {
    const float product = a * b;
    add(product);
    lost += fmaf(a, b, -product);
  }
  BESTRQ2_DEVICE void add(float value) {
    const float next = total + value;
    const float taken = next - total;
    lost += (total - (next - taken)) + (value - taken);
    total = next;
  }
  BESTRQ2_DEVICE float value() const { return total + lost; }
};

// Mean of x[0..features) minus x[0], added up as differences: exactly zero for a constant row.
BESTRQ2_DEVICE float mean_difference(const void* x, Float type, int64_t features, int64_t stride, float first) {
  Sum sum;
  for (int64_t k = 0; k < features; ++k) sum.add(read_value(x, type, k * stride) - first);
  return sum.value() / static_cast<float>(features);
}

// Scales y by a power of two so that its largest magnitude is in [1, 4); false if y is not finite.
BESTRQ2_DEVICE bool scale_row(float* y, int64_t dims, int64_t stride) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < dims; ++k) {
    const uint32_t magnitude = bits_of(y[k * stride]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= 0x7f800000u) return false;
  const uint32_t exponent = largest & 0x7f800000u;
  const float scale = float_from_bits(0x7f000000u - (exponent < 0x7e000000u ? exponent : 0x7e000000u));
  for (int64_t k = 0; k < dims; ++k) y[k * stride] *= scale;
  return true;
}

// Running maximum over codes seen in increasing order.
struct Best {
  float score = -INFINITY;
  int32_t code = 0;

  BESTRQ2_DEVICE void see(float candidate, int32_t number) {
    if (candidate > score) {  // strictly: the lowest code keeps a tie
      score = candidate;
      code = number;
    }
  }
  // Joins the maximum of other codes, in any order.
  BESTRQ2_DEVICE void join(float candidate, int32_t number) {
    if (candidate > score || (candidate == score && number < code)) {
      score = candidate;
      code = number;
    }
  }
};

}  // namespace bestrq2
