// Rows in, projected rows out: shared by the two searches, compiled for each instruction set like them.
#pragma once

#include "common/half.h"
#include "common/integers.h"
#include "common/simd.h"
#include "quantize/quantize.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int64_t kColumns = 2 * kDoubles;  // outputs of the projection computed together
constexpr double kLayerNormEps = 1e-5;

// Packed projection: (dims / kColumns, features, kColumns), zero padded.
inline int64_t packed_projection_size(int64_t features, int64_t dims) { return features * round_up(dims, kColumns); }

inline void pack_projection(const double* projection, int64_t features, int64_t dims, double* packed) {
  for (int64_t column = 0; column < dims; column += kColumns)
    for (int64_t feature = 0; feature < features; ++feature)
      for (int64_t k = column; k < column + kColumns; ++k) *packed++ = k < dims ? projection[feature * dims + k] : 0.0;
}

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline double widen(float v) { return v; }
inline double widen(double v) { return v; }
inline double widen(BFloat16 v) { return from_bf16(v.bits); }
// Reading a half's exponent with float's bias gives value * 2^-112, subnormal halves included; the product is exact.
// from_f16 takes twice as long.
inline double widen(Half v) {
  const double magnitude = as_float(uint32_t{v.bits & 0x7fffu} << 13) * 0x1p112;
  return v.bits & 0x8000u ? -magnitude : magnitude;
}

// Inf and NaN have all exponent bits set. Integer tests, because the compiler makes vectors of them.
inline int not_finite(float v) { return (bits_as<uint32_t>(v) & 0x7f800000u) == 0x7f800000u; }
inline int not_finite(double v) { return (bits_as<uint64_t>(v) >> 52 & 0x7ffu) == 0x7ffu; }
inline int not_finite(BFloat16 v) { return (v.bits & 0x7f80u) == 0x7f80u; }
inline int not_finite(Half v) { return (v.bits & 0x7c00u) == 0x7c00u; }

// Copies one row to doubles; returns whether it is finite.
template <class T>
bool read_row(const T* __restrict x, int64_t features, int64_t stride, double* __restrict row) {
  int bad = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < features; ++i) bad |= not_finite(x[i]);
    for (int64_t i = 0; i < features; ++i) row[i] = widen(x[i]);
  } else {
    for (int64_t i = 0; i < features; ++i) {
      bad |= not_finite(x[i * stride]);
      row[i] = widen(x[i * stride]);
    }
  }
  return bad == 0;
}

inline bool read_row(const Quantize& q, int64_t row, double* values) {
  const int64_t offset = row * q.row_stride;
  switch (q.x_type) {
    case Float::bf16:
      return read_row(static_cast<const BFloat16*>(q.x) + offset, q.features, q.feature_stride, values);
    case Float::f16:
      return read_row(static_cast<const Half*>(q.x) + offset, q.features, q.feature_stride, values);
    case Float::f64:
      return read_row(static_cast<const double*>(q.x) + offset, q.features, q.feature_stride, values);
    default:
      return read_row(static_cast<const float*>(q.x) + offset, q.features, q.feature_stride, values);
  }
}

// Eight partial sums: the compiler may use vectors, and the order never depends on anything but the row's length.
template <class Term>
double sum(int64_t count, Term term) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) partial[j] += term(i + j);
  for (int j = 0; i < count; ++i, ++j) partial[j] += term(i);
  return ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
         ((partial[4] + partial[5]) + (partial[6] + partial[7]));
}

// The power of two that brings the largest of some finite values into [0.5, 1): multiplying by it is exact.
class PowerOfTwo {
 public:
  PowerOfTwo(const double* values, int64_t count) {
    uint64_t largest = 0;  // bits of positive doubles sort like the doubles
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t magnitude = bits_as<uint64_t>(values[i]) & ~(uint64_t{1} << 63);
      largest = magnitude > largest ? magnitude : largest;
    }
    int exponent = 0;
    if (largest > 0) __builtin_frexp(bits_as<double>(largest), &exponent);
    half_ = __builtin_ldexp(1.0, -exponent / 2), rest_ = __builtin_ldexp(1.0, -exponent - -exponent / 2);
  }
  double operator*(double value) const { return value * half_ * rest_; }

 private:
  double half_, rest_;  // one factor alone could overflow
};

inline void layer_norm(double* row, int64_t features) {
  const double first = row[0];  // subtracting it first makes a constant row exactly zero, however long
  for (int64_t i = 0; i < features; ++i) row[i] -= first;
  const double mean = sum(features, [=](int64_t i) { return row[i]; }) / features;
  for (int64_t i = 0; i < features; ++i) row[i] -= mean;
  const double variance = sum(features, [=](int64_t i) { return row[i] * row[i]; }) / features;
  const double scale = 1.0 / __builtin_sqrt(variance + kLayerNormEps);
  for (int64_t i = 0; i < features; ++i) row[i] *= scale;
}

// sums (kRows, dims rounded up) = rows (kRows, features) @ projection, in double.
template <int kRows>
void sum_products(const double* rows, const double* projection, int64_t features, int64_t dims, double* sums) {
  const int64_t stride = round_up(dims, kColumns);
  for (int64_t column = 0; column < dims; column += kColumns, projection += features * kColumns) {
    Doubles total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = splat(0.0);
    for (int64_t feature = 0; feature < features; ++feature) {
      const Doubles left = load(projection + feature * kColumns);
      const Doubles right = load(projection + feature * kColumns + kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Doubles value = splat(rows[r * features + feature]);
        total[r][0] = multiply_add(value, left, total[r][0]);
        total[r][1] = multiply_add(value, right, total[r][1]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(sums + r * stride + column, total[r][0]);
      store(sums + r * stride + column + kDoubles, total[r][1]);
    }
  }
}

// y (kRows, dims) = rows @ projection, each row scaled by a power of two into [-1, 1] before it is rounded to float:
// the argmax does not change and nothing overflows or loses bits.
template <int kRows>
void project(const double* rows, const double* projection, int64_t features, int64_t dims, double* sums, float* y) {
  sum_products<kRows>(rows, projection, features, dims, sums);
  for (int r = 0; r < kRows; ++r) {
    const double* row = sums + r * round_up(dims, kColumns);
    const PowerOfTwo scale(row, dims);
    for (int64_t k = 0; k < dims; ++k) y[r * dims + k] = static_cast<float>(scale * row[k]);
  }
}

// Row `index` of x as the projection takes it, in double; false if it is not finite.
inline bool prepare_row(const Quantize& q, int64_t index, double* row) {
  if (!read_row(q, index, row)) return false;
  if (q.x_type == Float::f64) {  // whose sums could leave the range of double; no other type's can
    const PowerOfTwo scale(row, q.features);
    for (int64_t k = 0; k < q.features; ++k) row[k] = scale * row[k];
  }
  if (q.layer_norm) layer_norm(row, q.features);
  return true;
}

// Projects the `count` rows listed in `rows` (null: first, first + 1, ...) for every book into y (books or 1, padded,
// dims), padded = count rounded up to kRows. `values` (kRows, features) and `sums` (kRows, dims rounded up) are
// scratch. Returns the first row that is not finite, or -1.
template <int kRows>
int64_t project_chunk(const Quantize& q, const double* projections, const int64_t* rows, int64_t first, int64_t count,
                      double* values, double* sums, float* y) {
  const int64_t padded = round_up(count, kRows);
  for (int64_t i = 0; i < padded; i += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      double* row = values + r * q.features;
      if (i + r >= count) {  // rows that fill the last tile
        for (int64_t k = 0; k < q.features; ++k) row[k] = 0.0;
        continue;
      }
      const int64_t index = rows != nullptr ? rows[i + r] : first + i + r;
      if (!prepare_row(q, index, row)) return index;
    }
    for (int64_t book = 0; book < (q.shared_projection ? 1 : q.num_codebooks); ++book)
      project<kRows>(values, projections + book * packed_projection_size(q.features, q.codebook_dim), q.features,
                     q.codebook_dim, sums, y + (book * padded + i) * q.codebook_dim);
  }
  return -1;
}

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
