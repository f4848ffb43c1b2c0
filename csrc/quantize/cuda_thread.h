// Arithmetic of one thread of quantize.cu, also compiled for the CPU so that it can be tested without a GPU.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "quantize/cuda.h"

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

constexpr uint32_t kInfinite = 0x7f800000u;

// Bits of |value|: integers in the order of the numbers, infinity and NaN above all.
BESTRQ2_DEVICE uint32_t magnitude_of(float value) { return bits_of(value) & 0x7fffffffu; }
BESTRQ2_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The power of two, whose products are exact, that takes a number of this magnitude to [1, 8), subnormal ones below.
BESTRQ2_DEVICE float inverse_power(uint32_t magnitude) {
  const uint32_t exponent = magnitude & kInfinite;
  return float_from_bits(0x7f000000u - (exponent < 0x7e000000u ? exponent : 0x7e000000u));
}

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

// A row as the projection takes it: times a power of two and, for layer norm, centred. Without division by the
// deviation, which moves no code.
struct Row {
  const void* x;
  Float type;
  int64_t features, stride;
  float scale, first = 0.0f, mean = 0.0f;

  BESTRQ2_DEVICE Row(const QuantizeCuda& q, const void* x, float scale)
      : x(x), type(q.x_type), features(q.features), stride(q.feature_stride), scale(scale) {
    if (!q.layer_norm) return;
    first = scaled(0);
    Sum sum;  // added up as differences: exactly zero for a constant row
    for (int64_t k = 0; k < features; ++k) sum.add(scaled(k) - first);
    mean = sum.value() / static_cast<float>(features);
  }
  BESTRQ2_DEVICE float scaled(int64_t k) const { return read_value(x, type, k * stride) * scale; }
  BESTRQ2_DEVICE uint32_t magnitude() const {
    uint32_t largest = 0;
    for (int64_t k = 0; k < features; ++k) largest = larger(largest, magnitude_of(read_value(x, type, k * stride)));
    return largest;
  }
  // Product with one column of the projection (features, dims).
  BESTRQ2_DEVICE float project(const float* column, int64_t dims) const {
    Sum sum;
    for (int64_t k = 0; k < features; ++k) sum.add_product((scaled(k) - first) - mean, column[k * dims]);
    return sum.value();
  }
};

BESTRQ2_DEVICE uint32_t largest_magnitude(const float* y, int64_t dims) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < dims; ++k) largest = larger(largest, magnitude_of(y[k]));
  return largest;
}

// Scales y (dims), the projection of x by the first of its columns onwards, by a power of two so that its largest
// magnitude is in [1, 8); false if x is not finite. Sums of a row near the end of fp32 may have overflowed and products
// of a tiny one lost bits: such a row, and not one that is just silent, is projected once more, scaled itself.
BESTRQ2_DEVICE bool scale_row(const QuantizeCuda& q, const void* x, const float* projection, float* y) {
  uint32_t largest = largest_magnitude(y, q.codebook_dim);
  if (largest >= kInfinite || largest < bits_of(0x1p-100f)) {
    const uint32_t size = Row(q, x, 1.0f).magnitude();
    if (size > 0 && (size < bits_of(0x1p-60f) || size > bits_of(0x1p60f))) {
      const Row row(q, x, inverse_power(size));
      for (int64_t k = 0; k < q.codebook_dim; ++k) y[k] = row.project(projection + k, q.codebook_dim);
      largest = largest_magnitude(y, q.codebook_dim);
    }
  }
  if (largest >= kInfinite) return false;
  const float scale = inverse_power(largest);
  for (int64_t k = 0; k < q.codebook_dim; ++k) y[k] *= scale;
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
