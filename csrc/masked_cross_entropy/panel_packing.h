// From rows of the caller to panels, and back (layouts in bf16_passes.h).
#pragma once

#include "common/bf16_packing.h"
#include "masked_cross_entropy/panel_products.h"

namespace bestrq2 {
namespace panel {
namespace {

using bf16::first_lanes;
using bf16::join;
using bf16::load;
using bf16::pack_columns;
using bf16::pack_summed;
using bf16::pairs;
using bf16::store_rounded;
using bf16::transpose;
using bf16::widen;

// Row number of the caller's tensors of row r of the chunk.
inline int64_t row_of(const Chunk& c, int64_t r) {
  return c.call->index != nullptr ? c.call->index[c.first + r] : c.first + r;
}

template <class T>
void pack_rows_of(const Chunk& c, const T* hidden, int64_t p) {
  const MaskedCrossEntropy& f = *c.call;
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
    pack_columns(get, s * kPanel, c.by_feature + (p * steps + s) * kStep, 2 * kPanel);
    if (c.by_row != nullptr) pack_summed(get, s * kPanel, c.by_row + (s * row_panels + p) * kStep, 2 * kPanel);
  }
}

// A panel of 32 classes, summed over features.
template <class T>
void pack_classes(const MaskedCrossEntropy& f, const T* weight, int64_t q, u16* out) {
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
void pack_transposed(const MaskedCrossEntropy& f, const T* weight, int64_t q, u16* out, int64_t panel_stride) {
  for (int64_t d = 0; d < panels(f.features) * kPanel; d += kLanes) {
    const auto get = [&](int64_t i, int64_t) {
      const int64_t v = q * kPanel + i;
      const bool exists = v < f.classes;
      return load(exists ? weight + v * f.features + d : weight, exists ? first_lanes(f.features - d) : __mmask16{0});
    };
    bf16::pack_transposed(get, d, out + d / kPanel * panel_stride + d % kPanel * kPanel, kPanel);
  }
}

// Gradient of one panel of rows, from grad_T.
template <class T>
void write_rows(const Chunk& c, int64_t p, T* out) {
  const MaskedCrossEntropy& f = *c.call;
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
}  // namespace panel
}  // namespace bestrq2
