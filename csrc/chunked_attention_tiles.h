// Building blocks of the attention tiles for the instruction set this file is compiled for: small matrix products, exp,
// and rows of any element type. No standard library templates: their inline functions, compiled for AVX-512, could be
// the copies that the linker keeps for every other file.
#pragma once

#include <cstdint>
#include <cstring>

#include "chunked_attention_queries.h"
#include "float_type.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

// kRows x kVectors accumulators plus one row of the second operand fill the register file.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 6, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kRows = 6, kVectors = 2;
#else
constexpr int kLanes = 4, kRows = 4, kVectors = 2;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }

// x - 0 is x, also for -0 and NaN, so this is one broadcast instruction (a loop over lanes is not).
inline Floats splat(float x) { return x - Floats{}; }

inline Ints iota() {
  Ints v;
  for (int i = 0; i < kLanes; ++i) v[i] = i;
  return v;
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

inline float largest(Floats v) {
  float most = v[0];
  for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
  return most;
}

inline int64_t whole_vectors(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// exp(x) for x <= 0 (-inf gives 0, NaN stays NaN), within 2 units in the last place: 2^n * exp(r), |r| <= ln(2) / 2,
// by the Taylor polynomial of degree 7, whose remainder there is below 6e-9.
inline Floats exp_of_nonpositive(Floats x) {
  const Floats shift = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, left in the low bits
  const Floats shifted = x * 1.44269504088896341f + shift;
  const Floats n = shifted - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440054690583e-4f;  // ln(2) in two parts, the first one exact
  Floats p = splat(1.0f / 5040);
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Floats result = (Floats)((Ints)p + ((Ints)shifted << 23));
  return x < splat(-87.0f) ? splat(0.0f) : result;
}

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

inline float from_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float from_bf16(uint16_t h) { return from_bits(uint32_t{h} << 16); }

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t bits = magnitude < 0x400u ? to_bits(subnormal) : normal;
  return from_bits(bits | (uint32_t{h} & 0x8000u) << 16);
}

inline uint16_t to_f16(float x) {  // to nearest, ties to even
  const uint32_t bits = to_bits(x), magnitude = bits & 0x7fffffffu;
  // Adding 0.5, whose last place is 2^-24, rounds to the spacing of subnormal halves.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x477ff000u) h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(h | (bits >> 16 & 0x8000u));
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
