// Vectors of the instruction set this file is compiled for, in that set's own namespace. No standard library templates:
// their inline functions, compiled for AVX-512, could be the copies that the linker keeps for every other file.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
constexpr int kDoubles = 8;
using Floats = __m512;
using Ints = __m512i;
using Doubles = __m512d;
using Mask = __mmask16;

inline Floats load(const float* p) { return _mm512_load_ps(p); }
inline Ints load(const int32_t* p) { return _mm512_load_si512(p); }
inline Doubles load(const double* p) { return _mm512_load_pd(p); }
inline void store(float* p, Floats v) { _mm512_store_ps(p, v); }
inline void store(int32_t* p, Ints v) { _mm512_store_si512(p, v); }
inline void store(double* p, Doubles v) { _mm512_store_pd(p, v); }
inline Floats broadcast(float v) { return _mm512_set1_ps(v); }
inline Ints broadcast(int32_t v) { return _mm512_set1_epi32(v); }
inline Doubles broadcast(double v) { return _mm512_set1_pd(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
inline Ints select(Mask m, Ints yes, Ints no) { return _mm512_mask_mov_epi32(no, m, yes); }

#elif defined(__AVX2__)

constexpr int kLanes = 8;
constexpr int kDoubles = 4;
using Floats = __m256;
using Ints = __m256i;
using Doubles = __m256d;
using Mask = __m256;

inline Floats load(const float* p) { return _mm256_load_ps(p); }
inline Ints load(const int32_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline Doubles load(const double* p) { return _mm256_load_pd(p); }
inline void store(float* p, Floats v) { _mm256_store_ps(p, v); }
inline void store(int32_t* p, Ints v) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), v); }
inline void store(double* p, Doubles v) { _mm256_store_pd(p, v); }
inline Floats broadcast(float v) { return _mm256_set1_ps(v); }
inline Ints broadcast(int32_t v) { return _mm256_set1_epi32(v); }
inline Doubles broadcast(double v) { return _mm256_set1_pd(v); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Mask greater(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
inline Ints select(Mask m, Ints yes, Ints no) { return _mm256_blendv_epi8(no, yes, _mm256_castps_si256(m)); }

#else  // vectors of the compiler: SSE2, NEON or plain scalars, whatever the base architecture has

constexpr int kLanes = 4;
constexpr int kDoubles = 2;
typedef float Floats __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
using Mask = Ints;

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const Ints*>(p); }
inline Doubles load(const double* p) { return *reinterpret_cast<const Doubles*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<Ints*>(p) = v; }
inline void store(double* p, Doubles v) { *reinterpret_cast<Doubles*>(p) = v; }
inline Floats broadcast(float v) { return Floats{v, v, v, v}; }
inline Ints broadcast(int32_t v) { return Ints{v, v, v, v}; }
inline Doubles broadcast(double v) { return Doubles{v, v}; }
inline Floats add(Floats a, Floats b) { return a + b; }
#if defined(__ARM_NEON) && defined(__aarch64__)
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
// Compiled without contraction, so that the vector and the scalar form round alike.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline float multiply_add(float a, float b, float c) { return a * b + c; }
#endif
inline Mask greater(Floats a, Floats b) { return a > b; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
inline Ints select(Mask m, Ints yes, Ints no) { return (m & yes) | (~m & no); }

#endif

inline float add(float a, float b) { return a + b; }

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
