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
  // Product with one column of the projection (features, dims), and the sum of squares of the row.
  BESTRQ2_DEVICE float project(const float* column, int64_t dims, float& square) const {
    Sum sum;
    square = 0.0f;
    for (int64_t k = 0; k < features; ++k) {
      const float value = (scaled(k) - first) - mean;
      sum.add_product(value, column[k * dims]);
      square = fmaf(value, value, square);
    }
    return sum.value();
  }
};

BESTRQ2_DEVICE uint32_t largest_magnitude(const float* y, int64_t dims) {
  uint32_t largest = 0;
  for (int64_t k = 0; k < dims; ++k) largest = larger(largest, magnitude_of(y[k]));
  return largest;
}

// How far below the best fp32 score another one must be to lose for certain: twice the largest error of a score of y
// (dims), which was multiplied by `scale`, with a code of at most norm `reach`. u = 2^-24; |P| is the norm of the
// projection, `square` |x|^2 as the projection took the row, `mean` that of its differences from its first value.
//
//   projection     u |y|, and the rounding of 2 n sums of lost errors, each at most (n + 1) u |x| |P|
//   layer norm     u (2 |x| + sqrt(n) |mean|) |P| for differences and centring, u (|x| + 3 sqrt(n) |mean|) |P| for the
//   mean score          d u |y| reach for a chain of d sums, u for the comparison
//
// Infinite where a square or a sum could leave the range of fp32.
BESTRQ2_DEVICE float margin(const QuantizeCuda& q, float square, float mean, float norm, float reach, const float* y,
                            float scale) {
  constexpr float kUnit = 0x1p-24f;
  const float features = static_cast<float>(q.features);
  float length = sqrtf(square), rounding = 2.0f * features * (features + 1.0f) * kUnit * length;
  if (q.layer_norm) {
    const float offset = sqrtf(features) * fabsf(mean);
    rounding = 2.0f * rounding + (3.0f * length + 4.0f * offset) + 4.0f * features * features * kUnit * offset;
  }
  float square_of_y = 0.0f;
  for (int64_t k = 0; k < q.codebook_dim; ++k) square_of_y = fmaf(y[k], y[k], square_of_y);
  const float steps = static_cast<float>(q.codebook_dim + 3);
  const float error = kUnit * (steps * sqrtf(square_of_y) + rounding * (norm * scale)) * reach;
  const bool ordinary = square > 8e-28f && square < 1e30f && norm > 3e-14f && norm < 1e15f && reach > 1e-20f &&
                        reach < 1e20f && error < 1e30f;  // false with a NaN
  return ordinary ? 2.04f * error : INFINITY;
}

// Scales y (dims), the projection of x by the first of its columns onwards, by a power of two so that its largest
// magnitude is in [1, 8). Returns its margin from `square` and `mean`; -1 if x is not finite. Sums of a row near the
// end of fp32 may have overflowed and products of a tiny one lost bits: such a row, and not one that is just silent, is
// projected once more, scaled itself.
BESTRQ2_DEVICE float scale_row(const QuantizeCuda& q, const void* x, const float* projection, float norm, float reach,
                               float square, float mean, float* y) {
  uint32_t largest = largest_magnitude(y, q.codebook_dim);
  bool trusted = true;
  if (largest >= kInfinite || largest < bits_of(0x1p-100f)) {
    trusted = false;
    const uint32_t size = Row(q, x, 1.0f).magnitude();
    if (size > 0 && (size < bits_of(0x1p-60f) || size > bits_of(0x1p60f))) {
      const Row row(q, x, inverse_power(size));
      for (int64_t k = 0; k < q.codebook_dim; ++k) y[k] = row.project(projection + k, q.codebook_dim, square);
      largest = largest_magnitude(y, q.codebook_dim);
    }
  }
  if (largest >= kInfinite) return -1.0f;
  const float scale = inverse_power(largest);
  for (int64_t k = 0; k < q.codebook_dim; ++k) y[k] *= scale;
  return trusted ? margin(q, square, mean, norm, reach, y, scale) : INFINITY;
}

// The two largest scores of codes, and the code of the largest.
struct Best {
  float score = -INFINITY, second = -INFINITY;
  int32_t code = 0;

  BESTRQ2_DEVICE void see(float candidate, int32_t number) {
    second = fmaxf(second, fminf(score, candidate));
    if (candidate > score) {
      score = candidate;
      code = number;
    }
  }
  // Joins those of other codes.
  BESTRQ2_DEVICE void join(float other, float other_second, int32_t number) {
    second = fmaxf(fmaxf(second, other_second), fminf(score, other));
    if (other > score) {
      score = other;
      code = number;
    }
  }
  BESTRQ2_DEVICE bool certain(float margin) const { return second < score - margin; }
};

// A row as the definition takes it, in double: times the number of features instead of dividing its sum by it.
struct ExactRow {
  const void* x;
  Float type;
  int64_t features, stride;
  double first = 0.0, times = 1.0, sum = 0.0;

  BESTRQ2_DEVICE ExactRow(const QuantizeCuda& q, const void* x)
      : x(x), type(q.x_type), features(q.features), stride(q.feature_stride) {
    if (!q.layer_norm) return;
    first = value(0);
    times = static_cast<double>(features);
    for (int64_t k = 0; k < features; ++k) sum += value(k) - first;
  }
  BESTRQ2_DEVICE double value(int64_t k) const { return read_value(x, type, k * stride); }
  BESTRQ2_DEVICE double project(const float* column, int64_t dims) const {
    double total = 0.0;
    for (int64_t k = 0; k < features; ++k) total += ((value(k) - first) * times - sum) * column[k * dims];
    return total;
  }
};

// Whether one of the values first, first + step, ... of a row is not zero; with layer norm, not that of the first
// value.
BESTRQ2_DEVICE bool sounds(const QuantizeCuda& q, const void* x, int64_t first, int64_t step) {
  const float silence = q.layer_norm ? read_value(x, q.x_type, 0) : 0.0f;
  bool differs = false;
  for (int64_t k = first; k < q.features; k += step)
    differs = differs || read_value(x, q.x_type, k * q.feature_stride) != silence;
  return differs;
}

// Running maximum of scores in double; of equal ones the lowest code wins.
struct ExactBest {
  double score = -INFINITY;
  int32_t code = 0;

  BESTRQ2_DEVICE void join(double candidate, int32_t number) {
    if (candidate > score || (candidate == score && number < code)) {
      score = candidate;
      code = number;
    }
  }
  BESTRQ2_DEVICE void see(const double* y, const float* codebook, int64_t dims, int64_t number) {
    double candidate = 0.0;
    for (int64_t k = 0; k < dims; ++k) candidate += y[k] * codebook[number * dims + k];
    join(candidate, static_cast<int32_t>(number));
  }
};

}  // namespace bestrq2
