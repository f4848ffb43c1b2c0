// Vectors of the instruction set this file is compiled for, in that set's own namespace. No standard library templates:
// their inline functions, compiled for AVX-512, could be the copies that the linker keeps for every other file.
//
// The vectors are those of the compiler, with its operators. Functions stand for what operators do not say: a fused
// multiply-add also where contraction is switched off, and a maximum in one instruction.
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
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else  // SSE2, NEON or plain scalars, whatever the base architecture has
constexpr int kLanes = 4;
#endif
constexpr int kDoubles = kLanes / 2;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef double Doubles __attribute__((vector_size(4 * kLanes)));
typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t LooseInts __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef double LooseDoubles __attribute__((vector_size(4 * kLanes), aligned(8), may_alias));

// At any address of whole elements.
inline Floats load(const float* p) { return *reinterpret_cast<const LooseFloats*>(p); }
inline Ints load(const int32_t* p) { return *reinterpret_cast<const LooseInts*>(p); }
inline Doubles load(const double* p) { return *reinterpret_cast<const LooseDoubles*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<LooseFloats*>(p) = v; }
inline void store(int32_t* p, Ints v) { *reinterpret_cast<LooseInts*>(p) = v; }
inline void store(double* p, Doubles v) { *reinterpret_cast<LooseDoubles*>(p) = v; }

// x - 0 is x, also for -0 and NaN, so this is one broadcast instruction (a loop over lanes is not).
inline Floats splat(float x) { return x - Floats{}; }
inline Doubles splat(double x) { return x - Doubles{}; }
inline Ints splat(int32_t x) { return x + Ints{}; }

#if defined(__AVX512F__)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps(a, b, c); }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm512_fmadd_pd(a, b, c); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm512_max_ps(a, b); }
#elif defined(__AVX2__)
inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps(a, b, c); }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm256_fmadd_pd(a, b, c); }
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return (Floats)_mm256_max_ps(a, b); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) {
  return (Doubles)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
inline float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }
#else
// In files compiled without contraction, the vector and the scalar form round alike.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }
inline Doubles multiply_add(Doubles a, Doubles b, Doubles c) { return a * b + c; }
inline float multiply_add(float a, float b, float c) { return a * b + c; }
inline Floats maximum(Floats a, Floats b) { return a > b ? a : b; }  // b if one is NaN, as the instructions above
#endif

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

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
