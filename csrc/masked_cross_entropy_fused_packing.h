// From rows of the caller to panels, and back (layouts in masked_cross_entropy_fused_kernel.h).
#pragma once

#include "masked_cross_entropy_fused_products.h"

namespace bestrq2 {
namespace fused {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline __mmask16 first_lanes(int64_t n) {
  return n >= kLanes ? 0xffff : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// 16 values as bf16, those outside of the mask 0.
inline __m256i load(const u16* p, __mmask16 mask) { return _mm256_maskz_loadu_epi16(mask, p); }
inline __m256i load(const float* p, __mmask16 mask) {
  return (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(mask, p));
}

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

// Row number of the caller's tensors of row r of the chunk.
inline int64_t row_of(const Chunk& c, int64_t r) {
  return c.call->index != nullptr ? c.call->index[c.first + r] : c.first + r;
}

// Step of a B panel whose columns are 32 rows and which is summed over 32 features: `get(i, d)` gives 16 features.
template <class Get>
void pack_columns(Get get, int64_t d, u16* out) {
  for (int half = 0; half < 2; ++half) {
    __m512i x[16];
    for (int i = 0; i < 16; ++i)
      x[i] = _mm512_inserti64x4(_mm512_castsi256_si512(get(half * 16 + i, d)), get(half * 16 + i, d + kLanes), 1);
    transpose(x);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * 2 * kPanel + half * kPanel, x[i]);
  }
}

// Step of a B panel whose columns are 32 features and which is summed over 32 rows.
template <class Get>
void pack_summed(Get get, int64_t d, u16* out) {
  for (int i = 0; i < 16; ++i)
    for (int half = 0; half < 2; ++half) {
      const int64_t at = d + half * kLanes;
      _mm512_store_si512(out + i * 2 * kPanel + half * kPanel, pairs(get(2 * i, at), get(2 * i + 1, at)));
    }
}

template <class T>
void pack_rows_of(const Chunk& c, const T* hidden, int64_t p) {
  const FusedCrossEntropy& f = *c.call;
  const int64_t features = f.features, row_panels = panels(c.rows), steps = panels(features);
  const T* rows[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t r = p * kPanel + i;
    rows[i] = r < c.rows ? hidden + row_of(c, r) * features : nullptr;
  }
  const auto get = [&](int64_t i, int64_t d) {
    const bool exists = rows[i] != nullptr;
    return load(exists ? rows[i] + d : hidden, exists ? first_lanes(features - d) : __mmask16{0});
  };
  for (int64_t s = 0; s < steps; ++s) {
    pack_columns(get, s * kPanel, c.by_feature + (p * steps + s) * kStep);
    if (c.by_row != nullptr) pack_summed(get, s * kPanel, c.by_row + (s * row_panels + p) * kStep);
  }
}

// A panel of 32 classes, summed over features.
template <class T>
void pack_classes(const FusedCrossEntropy& f, const T* weight, int64_t q, u16* out) {
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t v = q * kPanel + i;
    const bool exists = v < f.classes;
    for (int64_t d = 0; d < panels(f.features) * kPanel; d += kLanes) {
      const __mmask16 mask = exists ? first_lanes(f.features - d) : __mmask16{0};
      const __m256i x = load(exists ? weight + v * f.features + d : weight, mask);
      _mm256_store_si256(reinterpret_cast<__m256i*>(out + d / kPanel * kStep + i * kPanel + d % kPanel), x);
    }
  }
}

// A panels of features, summed over classes: the step of panel q, at the same place of every panel.
template <class T>
void pack_transposed(const FusedCrossEntropy& f, const T* weight, int64_t q, u16* out, int64_t panel_stride) {
  for (int64_t d = 0; d < panels(f.features) * kPanel; d += kLanes) {
    const auto get = [&](int64_t v) {
      const bool exists = v < f.classes;
      return load(exists ? weight + v * f.features + d : weight, exists ? first_lanes(f.features - d) : __mmask16{0});
    };
    __m512i x[16];
    for (int i = 0; i < 16; ++i) x[i] = pairs(get(q * kPanel + 2 * i), get(q * kPanel + 2 * i + 1));
    transpose(x);
    u16* block = out + d / kPanel * panel_stride + d % kPanel * kPanel;
    for (int i = 0; i < 16; ++i) _mm512_store_si512(block + i * kPanel, x[i]);
  }
}

// Gradient of one panel of rows, from grad_T.
template <class T>
void write_rows(const Chunk& c, int64_t p, T* out) {
  const FusedCrossEntropy& f = *c.call;
  const int64_t feature_panels = panels(f.features);
  for (int64_t s = 0; s < feature_panels; ++s) {
    const float* block = c.grad_T + (p * feature_panels + s) * kStep;  // (32 features, 32 rows)
    for (int half = 0; half < 2; ++half)
      for (int group = 0; group < 2; ++group) {
        __m512i x[16];
        for (int i = 0; i < 16; ++i) x[i] = _mm512_load_si512(block + (group * 16 + i) * kPanel + half * kLanes);
        transpose(x);
        const int64_t d = s * kPanel + group * kLanes;
        for (int i = 0; i < 16; ++i) {
          const int64_t row = p * kPanel + half * 16 + i;
          if (row >= c.rows) break;
          store_rounded(out + row_of(c, row) * f.features + d, first_lanes(f.features - d), _mm512_castsi512_ps(x[i]));
        }
      }
  }
}

}  // namespace
}  // namespace fused
}  // namespace bestrq2
