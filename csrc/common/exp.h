// Exponentials of floats and of vectors of them. All split the argument into a whole number of powers of two and a
// remainder, whose exponential is a polynomial.
#pragma once

#include "common/half.h"
#include "common/simd.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

inline Ints as_bits(Floats x) { return (Ints)x; }
inline Floats as_float(Ints bits) { return (Floats)bits; }
using bestrq2::as_bits;
using bestrq2::as_float;

constexpr float kLog2E = 1.44269504088896341f;
// log 2 in two parts; the first has few bits, so that a whole number times it is exact.
constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;

// exp(r) for |r| <= log(2) / 2: Taylor to degree 7, relative error below 6e-9 before rounding. F: float or a vector.
template <class F>
inline F exp_polynomial(F r) {
  F q = r * (1.0f / 5040) + 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  return q * r + 1.0f;
}

// exp(x) for x <= 0, within 2 ulp: 2^n exp(r), x = n log 2 + r. 0 below -87 and for -inf; NaN stays NaN.
template <class F>
inline F exp_nonpositive(F x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / log 2) in the low mantissa bits
  const F shifted = x * kLog2E + kRound;
  const F n = shifted - kRound;
  const F r = (x - n * kLog2High) - n * kLog2Low;
  const F power = as_float((as_bits(shifted) + 127) << 23);
  return x < F{} - 87.0f ? F{} : exp_polynomial(r) * power;
}

#if defined(__AVX512F__)

// The same within 1 ulp and down to subnormal results, which are 0 below -104.
inline __m512 exp_nonpositive_to_subnormal(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-104.0f), x);  // the second operand, if one is NaN
  const __m512 n =
      _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLog2High), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLog2Low), r);
  return _mm512_scalef_ps((__m512)exp_polynomial((Floats)r), n);
}

// 2^x, -inf gives 0, NaN stays NaN: 2^floor(x) times a polynomial of degree 5 in x - floor(x), minimax with p(0) = 1,
// relative error below 9e-8 before rounding.
inline __m512 exp2(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0018671300495043397f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009017030708491802f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05579991266131401f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24016444385051727f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931512951850891f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
}

#endif

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
