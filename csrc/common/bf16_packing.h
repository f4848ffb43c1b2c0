// Rows of bf16 or fp32 as operands of bf16_products.h, 16 values at a time.
#pragma once

#include "common/bf16_products.h"
#include "common/integers.h"

namespace bestrq2 {
namespace bf16 {
namespace {

inline __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// 16 values as bf16, those outside of the mask 0.
inline __m256i load(const u16* p, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, p); }
inline __m256i load(const float* p, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, p));
}

inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512i join(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void store_rounded(u16* p, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store_rounded(float* p, __mmask16 mask, __m512 x) { _mm512_mask_storeu_ps(p, mask, x); }

// Word i of `low` and word i of `high` as one 32-bit word.
inline __m512i pairs(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

inline void transpose(__m512i (&x)[16]) {  // 16 x 16 words of 32 bits
  __m512i y[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[4 * i] = _mm512_unpacklo_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 1] = _mm512_unpackhi_epi64(y[4 * i], y[4 * i + 2]);
    x[4 * i + 2] = _mm512_unpacklo_epi64(y[4 * i + 1], y[4 * i + 3]);
    x[4 * i + 3] = _mm512_unpackhi_epi64(y[4 * i + 1], y[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
    y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
    y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
    y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
    x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
    x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
    x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
  }
}

// 32 rows of 32 values d, d + 1, ... as a step of a right operand that is summed over values, whose columns are the
// rows: `get(i, d)` gives 16 values of row i.
template <class Get>
void pack_columns(Get get, int64_t d, u16* out, int64_t pair) {
  for (int half = 0; half < 2; ++half) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i)
      x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(get(half * 16 + i, d)), get(half * 16 + i, d + kLanes), 1);
    transpose(x);
    for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * pair + half * kBlock, x[i]);
  }
}

// The same values as a step that is summed over rows and whose columns are the values.
template <class Get>
void pack_summed(Get get, int64_t d, u16* out, int64_t pair) {
  for (int i = 0; i < 16; ++i)
    for (int half = 0; half < 2; ++half) {
      const int64_t at = d + half * kLanes;
      _mm512_storeu_si512(out + i * pair + half * kBlock, pairs(get(2 * i, at), get(2 * i + 1, at)));
    }
}

// 16 values of each of 32 rows as 16 rows of a left operand that is summed over the 32.
template <class Get>
void pack_transposed(Get get, int64_t d, u16* out, int64_t row) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = pairs(get(2 * i, d), get(2 * i + 1, d));
  transpose(x);
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + i * row, x[i]);
}

}  // namespace
}  // namespace bf16
}  // namespace bestrq2
