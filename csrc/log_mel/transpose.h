// Transposes of kLanes x kLanes floats: frames become vector lanes, and lanes rows of the result.
#pragma once

#include "log_mel/fft.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

#if defined(__AVX512F__)

inline void transpose(Floats* rows) {
  __m256 a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44), b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44), b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = (Floats)_mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  }
}

#elif defined(__AVX2__)

inline void transpose(Floats* rows) {
  __m128 a = rows[0], b = rows[1], c = rows[2], d = rows[3];
  _MM_TRANSPOSE4_PS(a, b, c, d);
  rows[0] = (Floats)a, rows[1] = (Floats)b, rows[2] = (Floats)c, rows[3] = (Floats)d;
}

#else

inline void transpose(Floats* rows) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float above = rows[j][i];
      rows[j][i] = rows[i][j], rows[i][j] = above;
    }
}

#endif

// to[n][lane] = from[lane][n] for n < count; `to` is aligned to whole vectors.
inline void rows_to_lanes(const float* const* from, int64_t count, float* to) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    Floats block[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) block[lane] = *reinterpret_cast<const LooseFloats*>(from[lane] + n);
    transpose(block);
    for (int i = 0; i < kLanes; ++i) *reinterpret_cast<Floats*>(to + (n + i) * kLanes) = block[i];
  }
  for (; n < count; ++n)
    for (int lane = 0; lane < kLanes; ++lane) to[n * kLanes + lane] = from[lane][n];
}

// to[lane][n] = from[n][lane] for n < count; `from` is aligned to whole vectors.
inline void lanes_to_rows(const float* from, int64_t count, float* const* to) {
  int64_t n = 0;
  for (; n + kLanes <= count; n += kLanes) {
    Floats block[kLanes];
    for (int i = 0; i < kLanes; ++i) block[i] = *reinterpret_cast<const Floats*>(from + (n + i) * kLanes);
    transpose(block);
    for (int lane = 0; lane < kLanes; ++lane) *reinterpret_cast<LooseFloats*>(to[lane] + n) = block[lane];
  }
  for (; n < count; ++n)
    for (int lane = 0; lane < kLanes; ++lane) to[lane][n] = from[n * kLanes + lane];
}

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
