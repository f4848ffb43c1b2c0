// Building blocks of the attention tiles for the instruction set this file is compiled for: small matrix products, and
// rows of any element type. No standard library templates: their inline functions, compiled for AVX-512, could be
// the copies that the linker keeps for every other file.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/float_type.h"
#include "common/half.h"
#include "common/integers.h"
#include "common/simd.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

// kRows x kVectors accumulators plus one row of the second operand fill the register file.
#if defined(__AVX512F__)
constexpr int kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif

// c[R][V vectors] (+)= a[R][depth] x b[depth][V vectors]. The strides of `a` are free, which is what makes transposed
// and sheared operands cost nothing.
template <int R, int V>
__attribute__((noinline)) void block(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                                     int64_t b_depth, float* c, int64_t c_row, bool accumulate) {
  Floats sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sums[r][v] = accumulate ? load(c + r * c_row + v * kLanes) : splat(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    Floats row[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Floats x = splat(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] += x * row[v];
    }
    a += a_depth;
    b += b_depth;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) store(c + r * c_row + v * kLanes, sums[r][v]);
}

template <int R, int V, class... Args>
inline void pick_block(int64_t rows, int64_t vectors, Args... args) {
  if (rows < R) {
    if constexpr (R > 1) pick_block<R - 1, V>(rows, vectors, args...);
  } else if (vectors < V) {
    if constexpr (V > 1) pick_block<R, V - 1>(rows, vectors, args...);
  } else {
    block<R, V>(args...);
  }
}

// One stripe of at most kRows rows; `columns` is a multiple of kLanes.
inline void multiply_stripe(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row,
                            int64_t a_depth, const float* b, int64_t b_depth, float* c, int64_t c_row,
                            bool accumulate) {
  for (int64_t v = 0; v < columns; v += kVectors * kLanes)
    pick_block<kRows, kVectors>(rows, at_most((columns - v) / kLanes, kVectors), depth, a, a_row, a_depth, b + v,
                                b_depth, c + v, c_row, accumulate);
}

// c (+)= a x b, see block().
inline void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                     const float* b, int64_t b_depth, float* c, int64_t c_row, bool accumulate) {
  for (int64_t v = 0; v < columns; v += kVectors * kLanes) {
    const int64_t vectors = at_most((columns - v) / kLanes, kVectors);
    for (int64_t r = 0; r < rows; r += kRows)
      pick_block<kRows, kVectors>(at_most(rows - r, kRows), vectors, depth, a + r * a_row, a_row, a_depth, b + v,
                                  b_depth, c + r * c_row + v, c_row, accumulate);
  }
}

// out[r] = the r-th of `rows` frames of `dim` elements in fp32, padded with zeros to `padded`.
inline void read_rows(const void* data, Float type, int64_t stride, int64_t rows, int64_t dim, int64_t padded,
                      float* out) {
  for (int64_t r = 0; r < rows; ++r, out += padded) {
    if (type == Float::f32) {
      std::memcpy(out, static_cast<const float*>(data) + r * stride, dim * sizeof(float));
    } else {
      const uint16_t* in = static_cast<const uint16_t*>(data) + r * stride;
      if (type == Float::bf16)
        for (int64_t i = 0; i < dim; ++i) out[i] = from_bf16(in[i]);
      else
        for (int64_t i = 0; i < dim; ++i) out[i] = from_f16(in[i]);
    }
    for (int64_t i = dim; i < padded; ++i) out[i] = 0;
  }
}

inline void write_row(const float* in, Float type, int64_t dim, void* data, int64_t offset) {
  if (type == Float::f32) {
    std::memcpy(static_cast<float*>(data) + offset, in, dim * sizeof(float));
  } else {
    uint16_t* out = static_cast<uint16_t*>(data) + offset;
    if (type == Float::bf16)
      for (int64_t i = 0; i < dim; ++i) out[i] = to_bf16(in[i]);
    else
      for (int64_t i = 0; i < dim; ++i) out[i] = to_f16(in[i]);
  }
}

// out[dim][row] = rows[row][dim], out padded to `columns` with zeros; four by four to touch few lines at a time.
inline void transpose(const float* rows, int64_t count, int64_t padded, float* out, int64_t columns) {
  typedef float Four __attribute__((vector_size(16), aligned(4), may_alias));
  typedef int32_t Order __attribute__((vector_size(16)));
  const auto shuffle = [](Four a, Four b, Order order) {
#if defined(__clang__)
    Four r;
    for (int i = 0; i < 4; ++i) r[i] = order[i] < 4 ? a[order[i]] : b[order[i] - 4];
    return r;
#else
    return (Four)__builtin_shuffle(a, b, order);
#endif
  };
  const Order low = {0, 4, 1, 5}, high = {2, 6, 3, 7}, first = {0, 1, 4, 5}, second = {2, 3, 6, 7};
  int64_t c = 0;
  for (; c + 4 <= count; c += 4) {
    const float* in = rows + c * padded;
    for (int64_t i = 0; i < padded; i += 4) {
      const auto at = [&](int r) { return *reinterpret_cast<const Four*>(in + r * padded + i); };
      const Four a = shuffle(at(0), at(1), low), b = shuffle(at(2), at(3), low);
      const Four d = shuffle(at(0), at(1), high), e = shuffle(at(2), at(3), high);
      float* to = out + i * columns + c;
      *reinterpret_cast<Four*>(to) = shuffle(a, b, first);
      *reinterpret_cast<Four*>(to + columns) = shuffle(a, b, second);
      *reinterpret_cast<Four*>(to + 2 * columns) = shuffle(d, e, first);
      *reinterpret_cast<Four*>(to + 3 * columns) = shuffle(d, e, second);
    }
  }
  for (; c < columns; ++c)
    for (int64_t i = 0; i < padded; ++i) out[i * columns + c] = c < count ? rows[c * padded + i] : 0.0f;
}

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
