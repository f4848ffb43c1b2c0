// GELU of rows and its gradient, the exact one: x Phi(x) with the normal distribution function Phi.
//
// By its tail Phi(-|x|), and the tail of the derivative Phi(x) + x phi(x), which is symmetrical in the same way: a
// positive x has one minus the tail. AVX-512 can look up coefficients by lane, so there both tails are polynomials of
// degree 5 in 16 pieces of |x| < 6. Elsewhere they are built from an exponential.
#pragma once

#include "common/half.h"
#include "common/simd.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

inline float widen(float v) { return v; }
inline float widen(uint16_t v) { return from_bf16(v); }

inline void narrow(float v, float& out) { out = v; }
inline void narrow(float v, uint16_t& out) { out = to_bf16(v); }

// exp(t) to about 2 ulp for t within [-87, 88], and NaN.
inline float exponential(float t) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x / log 2) in the low mantissa bits
  const float shifted = t * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = t - n * 0.693359375f;  // log 2 in two parts; the first has few bits, so n times it is exact
  r = r + n * 2.12194440e-4f;
  float q = 1.0f / 720;
  q = q * r + 1.0f / 120;
  q = q * r + 1.0f / 24;
  q = q * r + 1.0f / 6;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  q = q * r + 1.0f;
  return q * as_float((as_bits(shifted) + 127u) << 23);
}

#if defined(__AVX512F__)

// Column i: Chebyshev coefficients as those of powers of |x| - (i + 1/2) 3/8. Beyond 6, where the tail is below 1e-9,
// it is 0. The results are within 1.1e-7 of max(|out|, 1), and 8.5e-8 for the derivative.
alignas(64) constexpr float kTail[6][16] = {
    {0.425634325f, 0.286887705f, 0.174250722f, 0.0946757421f, 0.0457536243f, 0.0195800774f, 0.00739460625f,
     0.00245790114f, 0.000717542542f, 0.000183670185f, 4.11675937e-05f, 8.07099605e-06f, 1.38283031e-06f,
     2.06901404e-07f, 2.70176166e-08f, 3.07750314e-09f},
    {-0.3919909f, -0.340567589f, -0.257073909f, -0.168593183f, -0.0960615054f, -0.0475538895f, -0.0204526726f,
     -0.00764260488f, -0.00248119072f, -0.000699852128f, -0.000171506239f, -3.65158303e-05f, -6.75476394e-06f,
     -1.08559323e-06f, -1.51583649e-07f, -1.83893416e-08f},
    {0.036748115f, 0.0957824439f, 0.120501779f, 0.110639118f, 0.081052728f, 0.0490408428f, 0.0249271356f, 0.0107474485f,
     0.00395427225f, 0.00124649331f, 0.000337587117f, 7.87103563e-05f, 1.58228304e-05f, 2.74565218e-06f,
     4.11631959e-07f, 5.33565299e-08f},
    {0.0630338714f, 0.0388014838f, 0.00518908771f, -0.0203049872f, -0.029581137f, -0.0257894993f, -0.0168444552f,
     -0.00880210195f, -0.003788047f, -0.00136368175f, -0.000414555252f, -0.000107082407f, -2.36044689e-05f,
     -4.45421938e-06f, -7.21227593e-07f, -1.00388654e-07f},
    {-0.00900115911f, -0.0212538689f, -0.0211770106f, -0.011764803f, -0.00109229982f, 0.00505665783f, 0.00607665069f,
     0.00439510588f, 0.00236907369f, 0.0010157465f, 0.000356801174f, 0.000104368642f, 2.56797339e-05f, 5.35073877e-06f,
     9.48657373e-07f, 1.43616333e-07f},
    {-0.00905073993f, -0.00340113277f, 0.00317290751f, 0.00608993275f, 0.00476735411f, 0.00176498946f, -0.000435214635f,
     -0.00114379486f, -0.000934223237f, -0.00051433756f, -0.000216559056f, -7.31281689e-05f, -2.02836472e-05f,
     -4.68648886e-06f, -9.10183076e-07f, -1.49525789e-07f},
};
alignas(64) constexpr float kTailSlope[6][16] = {
    {0.352136046f, 0.095318459f, -0.0667560622f, -0.126602814f, -0.116350174f, -0.0784998313f, -0.0424587838f,
     -0.0190369245f, -0.00719125103f, -0.00230955216f, -0.000634137949f, -0.00014940351f, -3.02801545e-05f,
     -5.28893088e-06f, -7.97223947e-07f, -1.03811892e-07f},
    {-0.770200849f, -0.57337749f, -0.288203984f, -0.0467582904f, 0.0814271346f, 0.107182026f, 0.0806123018f,
     0.0451689959f, 0.0202469025f, 0.00748240016f, 0.0023160018f, 0.000606076093f, 0.00013491018f, 2.56512649e-05f,
     4.17858882e-06f, 5.84502686e-07f},
    {0.145696461f, 0.352815926f, 0.376094222f, 0.25196743f, 0.0934077501f, -0.0124470023f, -0.0483929925f,
     -0.042025961f, -0.0243610349f, -0.010835195f, -0.00388426101f, -0.00114924985f, -0.000284459238f, -5.9405942e-05f,
     -1.05282697e-05f, -1.58999751e-06f},
    {0.245321587f, 0.107010648f, -0.0591139942f, -0.143047199f, -0.125271678f, -0.0608849861f, -0.00780655164f,
     0.0142653901f, 0.0149322748f, 0.00889227912f, 0.00388312875f, 0.0013370018f, 0.000374840893f, 8.7088556e-05f,
     1.69506438e-05f, 2.78404286e-06f},
    {-0.0533227772f, -0.115497865f, -0.090806663f, -0.0188959427f, 0.0346082523f, 0.0433710366f, 0.0250531044f,
     0.00591260754f, -0.00301913219f, -0.00407051668f, -0.00247614668f, -0.00105489674f, -0.000347382622f,
     -9.2083952e-05f, -2.00728282e-05f, -3.6449585e-06f},
    {-0.0525115021f, -0.0097664753f, 0.0320238397f, 0.0383040421f, 0.0164898876f, -0.00521329511f, -0.0118253082f,
     -0.00768354349f, -0.0021571226f, 0.000537295651f, 0.000926963112f, 0.00055757229f, 0.000226351272f,
     6.99297889e-05f, 1.72302698e-05f, 3.46856677e-06f},
};

struct Pieces {
  __m512 coefficients[6];

  explicit Pieces(const float (&table)[6][16]) {
    for (int k = 0; k < 6; ++k) coefficients[k] = _mm512_load_ps(table[k]);
  }
  // The tail at -|x|, or one minus it if x > 0.
  __m512 operator()(__m512 x) const {
    const __m512 a = _mm512_abs_ps(x);
    const __m512i piece = _mm512_cvttps_epi32(_mm512_mul_ps(a, _mm512_set1_ps(16.0f / 6.0f)));
    const __m512 middle = _mm512_add_ps(_mm512_cvtepi32_ps(piece), _mm512_set1_ps(0.5f));
    const __m512 r = _mm512_fnmadd_ps(middle, _mm512_set1_ps(0.375f), a);
    __m512 tail = _mm512_permutexvar_ps(piece, coefficients[5]);
#pragma GCC unroll 5
    for (int k = 4; k >= 0; --k) tail = _mm512_fmadd_ps(tail, r, _mm512_permutexvar_ps(piece, coefficients[k]));
    tail = _mm512_mask_mov_ps(tail, _mm512_cmp_ps_mask(a, _mm512_set1_ps(6.0f), _CMP_GE_OQ), _mm512_setzero_ps());
    const __mmask16 positive = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ);
    return _mm512_mask_sub_ps(tail, positive, _mm512_set1_ps(1.0f), tail);
  }
};

inline __mmask16 lanes(int64_t n) { return n >= kLanes ? 0xffff : static_cast<__mmask16>((1u << n) - 1); }

inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const uint16_t* p, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline void store(float* p, __mmask16 mask, __m512 v) { _mm512_mask_storeu_ps(p, mask, v); }
inline void store(uint16_t* p, __mmask16 mask, __m512 v) {  // rounded as to_bf16() does
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  rounded = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
  _mm256_mask_storeu_epi16(p, mask, _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

// out = gelu(x + bias); bias null: 0.
template <class T>
void gelu_row(const T* x, const float* bias, int64_t width, T* out) {
  const Pieces pieces(kTail);
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = lanes(width - i);
    __m512 v = load(x + i, mask);
    if (bias != nullptr) v = _mm512_add_ps(v, load(bias + i, mask));
    store(out + i, mask, _mm512_mul_ps(v, pieces(v)));
  }
}

// grad_x = grad * gelu'(x + bias), added to `sums` where there is a bias.
template <class T>
void gelu_row_backward(const T* x, const float* bias, const T* grad, int64_t width, T* grad_x, float* sums) {
  const Pieces pieces(kTailSlope);
  for (int64_t i = 0; i < width; i += kLanes) {
    const __mmask16 mask = lanes(width - i);
    __m512 v = load(x + i, mask);
    if (bias != nullptr) v = _mm512_add_ps(v, load(bias + i, mask));
    const __m512 g = _mm512_mul_ps(load(grad + i, mask), pieces(v));
    store(grad_x + i, mask, g);
    if (bias != nullptr) store(sums + i, mask, _mm512_add_ps(load(sums + i, mask), g));
  }
}

#else

struct Normal {
  float bell, below;  // exp(-x^2 / 2), and the normal distribution function at x
};

// The tail at -|x| is bell * t Q(t) with t = 1 / (1 + 0.3 |x|): Q is a polynomial fitted to the scaled complementary
// error function, relative error below 4e-9 before rounding for |x| <= 13.
inline Normal normal(float x) {
  const float a = x < 0.0f ? -x : x;
  float t = -0.5f * x * x;
  t = t < -87.0f ? -87.0f : t;
  const float bell = exponential(t), s = 1.0f / (1.0f + 0.3f * a);
  float q = -0.02060525491833687f;
  q = q * s + 0.11233314126729965f;
  q = q * s - 0.22796329855918884f;
  q = q * s + 0.1914367973804474f;
  q = q * s - 0.07912132143974304f;
  q = q * s + 0.09598688781261444f;
  q = q * s + 0.07845137268304825f;
  q = q * s + 0.1102214977145195f;
  q = q * s + 0.11957358568906784f;
  q = q * s + 0.11968659609556198f;
  const float tail = bell * s * q;
  return {bell, x > 0.0f ? 1.0f - tail : tail};
}

// out = gelu(x + bias); bias null: 0.
template <class T>
void gelu_row(const T* x, const float* bias, int64_t width, T* out) {
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float v = widen(x[i]) + bias[i];
      narrow(v * normal(v).below, out[i]);
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float v = widen(x[i]);
      narrow(v * normal(v).below, out[i]);
    }
  }
}

// grad_x = grad * gelu'(x + bias), added to `sums` where there is a bias.
template <class T>
void gelu_row_backward(const T* x, const float* bias, const T* grad, int64_t width, T* grad_x, float* sums) {
  constexpr float kDensity = 0.398942280401432678f;  // 1 / sqrt(2 pi)
  if (bias != nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float v = widen(x[i]) + bias[i];
      const Normal n = normal(v);
      const float g = widen(grad[i]) * (n.below + v * n.bell * kDensity);
      narrow(g, grad_x[i]);
      sums[i] += g;
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float v = widen(x[i]);
      const Normal n = normal(v);
      narrow(widen(grad[i]) * (n.below + v * n.bell * kDensity), grad_x[i]);
    }
  }
}

#endif

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
