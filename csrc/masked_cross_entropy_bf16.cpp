// Weight gradient with AVX-512 BF16: every instruction multiplies pairs of bf16 values of two consecutive rows and adds
// both products to an fp32 sum. Both operands are packed so that such a pair is one 32-bit word:
//
//     rows of the chunk, packed once           classes of the block               total (classes, features), fp32
//     panel: 3 vectors of 16 features          tiles of 8 classes                        3 x 16 features
//                 48                              8                                  +--------------------+
//     pair 0 +-----------+             pair 0 +------+                               |  24 vectors stay   | 8
//     pair 1 |           |             pair 1 |      |    sum over pairs: 3 loads,   |  in registers for  | classes
//       ...  |           |               ...  |      |    8 broadcasts, 24 products  |  the whole chunk   |
//            +-----------+                    +------+                               +--------------------+
//
// A tile of classes stays in the L1 cache while a panel passes, panels come from the L2.
#include <immintrin.h>

#include "masked_cross_entropy_weight.h"

namespace bestrq2 {
namespace avx512bf16 {
namespace {

constexpr int64_t kLanes = 16;
constexpr int kVectors = 3;
constexpr int64_t kPanel = kVectors * kLanes;  // features
constexpr int kTile = 8;                       // classes

int64_t pairs_of(int64_t count) { return (count + 1) / 2; }

// One tile of `total`: `kWidth` vectors of features by kTile classes, of which `present` exist.
template <int kWidth>
void tile(const uint32_t* features, const uint32_t* classes, int64_t pairs, float* total, int64_t stride,
          int64_t present, __mmask16 last, bool overwrite) {
  __m512 sum[kTile][kWidth];
#pragma GCC unroll 8
  for (int c = 0; c < kTile; ++c) {
    if (c < present) _mm_prefetch(reinterpret_cast<const char*>(total + c * stride), _MM_HINT_T0);
#pragma GCC unroll 3
    for (int v = 0; v < kWidth; ++v) sum[c][v] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k) {
    __m512bh x[kWidth];
#pragma GCC unroll 3
    for (int v = 0; v < kWidth; ++v) x[v] = (__m512bh)_mm512_load_si512(features + k * kPanel + v * kLanes);
#pragma GCC unroll 8
    for (int c = 0; c < kTile; ++c) {
      const __m512bh g = (__m512bh)_mm512_set1_epi32(static_cast<int>(classes[k * kTile + c]));
#pragma GCC unroll 3
      for (int v = 0; v < kWidth; ++v) sum[c][v] = _mm512_dpbf16_ps(sum[c][v], x[v], g);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < kTile; ++c) {
    if (c >= present) break;
#pragma GCC unroll 3
    for (int v = 0; v < kWidth; ++v) {
      float* target = total + c * stride + v * kLanes;
      const __mmask16 mask = v == kWidth - 1 ? last : static_cast<__mmask16>(0xffff);
      const __m512 before = overwrite ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(mask, target);
      _mm512_mask_storeu_ps(target, mask, _mm512_add_ps(before, sum[c][v]));
    }
  }
}

}  // namespace

int64_t panels(int64_t features) { return (features + kPanel - 1) / kPanel; }
int64_t packed_rows_size(int64_t count, int64_t features) { return panels(features) * pairs_of(count) * kPanel; }
int64_t packed_block_size(int64_t count) { return kClasses * pairs_of(count); }

// Panel: (pairs, 48) words, zero where a feature or the second row of the last pair does not exist.
void pack_panel(const WeightGradient& w, int64_t panel, uint32_t* packed) {
  const int64_t pairs = pairs_of(w.count), first = panel * kPanel;
  uint32_t* out = packed + panel * pairs * kPanel;
  for (int64_t k = 0; k < pairs; ++k) {
    const uint16_t* low = w.rows + 2 * k * w.features + first;
    const bool whole = 2 * k + 1 < w.count;
    for (int v = 0; v < kVectors; ++v, out += kLanes) {
      const int64_t present = w.features - first - v * kLanes;
      const __mmask16 mask = present >= kLanes ? 0xffff : present > 0 ? static_cast<__mmask16>((1u << present) - 1) : 0;
      const __m256i a = _mm256_maskz_loadu_epi16(mask, low + v * kLanes);
      const __m256i b = _mm256_maskz_loadu_epi16(whole ? mask : 0, low + w.features + v * kLanes);
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
      _mm512_store_si512(out, _mm512_or_si512(_mm512_cvtepu16_epi32(a), high));
    }
  }
}

void block(const WeightGradient& w, int64_t number, const uint32_t* packed, uint32_t* scratch) {
  const int64_t pairs = pairs_of(w.count), first = number * kClasses;
  const int64_t classes = w.classes - first < kClasses ? w.classes - first : kClasses;
  const int64_t tiles = (classes + kTile - 1) / kTile;
  for (int64_t k = 0; k < pairs; ++k) {  // scratch: (tiles, pairs, 8) words
    const uint16_t* low = w.gradient + 2 * k * w.classes + first;
    const bool whole = 2 * k + 1 < w.count;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t present = classes - t * kTile;
      const __mmask8 mask = present >= kTile ? 0xff : static_cast<__mmask8>((1u << present) - 1);
      const __m128i a = _mm_maskz_loadu_epi16(mask, low + t * kTile);
      const __m128i b = _mm_maskz_loadu_epi16(whole ? mask : 0, low + w.classes + t * kTile);
      auto* out = reinterpret_cast<__m128i*>(scratch + (t * pairs + k) * kTile);
      _mm_store_si128(out, _mm_unpacklo_epi16(a, b));
      _mm_store_si128(out + 1, _mm_unpackhi_epi16(a, b));
    }
  }
  for (int64_t panel = 0; panel < panels(w.features); ++panel) {
    const int64_t width = w.features - panel * kPanel < kPanel ? w.features - panel * kPanel : kPanel;
    const int64_t vectors = (width + kLanes - 1) / kLanes;
    const auto last = static_cast<__mmask16>(0xffffu >> (vectors * kLanes - width));
    const uint32_t* features = packed + panel * pairs * kPanel;
    for (int64_t t = 0; t < tiles; ++t) {
      float* total = w.total + (first + t * kTile) * w.features + panel * kPanel;
      const auto run = vectors == 3 ? tile<3> : vectors == 2 ? tile<2> : tile<1>;
      run(features, scratch + t * pairs * kTile, pairs, total, w.features, classes - t * kTile, last, w.overwrite);
    }
  }
}

}  // namespace avx512bf16
}  // namespace bestrq2
