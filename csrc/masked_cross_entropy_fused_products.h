// C = A B and C += A B of panels (layouts in masked_cross_entropy_fused_kernel.h). Included by the one file that is
// compiled for these instruction sets; no standard library templates, whose AVX-512 copies the linker could keep.
#pragma once

#include <immintrin.h>

#include "masked_cross_entropy_fused_kernel.h"

namespace bestrq2 {
namespace fused {
namespace {

using u16 = uint16_t;  // the bits of a bf16

constexpr int64_t kLanes = 16;

constexpr int64_t kMaxSteps = 16;  // of one product: its panels are 32 KB each. Partial sums of more are added to C.

// Eight rows at a time: 16 sums, two vectors of B and one broadcast pair of A in registers.
void product_avx512(const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  for (int group = 0; group < 4; ++group) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    const u16* row = a + group * 8 * kPanel;
    const u16* column = b;
    for (int64_t s = 0; s < steps; ++s, row += kStep)
      for (int k = 0; k < kPanel; k += 2, column += 2 * kPanel) {
        const auto b0 = (__m512bh)_mm512_load_si512(column), b1 = (__m512bh)_mm512_load_si512(column + kPanel);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          int32_t pair;
          __builtin_memcpy(&pair, row + i * kPanel + k, sizeof pair);
          const auto x = (__m512bh)_mm512_set1_epi32(pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
        }
      }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        float* target = c + (group * 8 + i) * kPanel + h * kLanes;
        _mm512_store_ps(target, add ? _mm512_add_ps(_mm512_load_ps(target), sum[i][h]) : sum[i][h]);
      }
  }
}

#ifdef __AMX_BF16__

struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers belong to a thread: every task configures and releases them.
struct Tiles {
  explicit Tiles(Dot dot) : used(dot == Dot::amx) {
    static const TileConfig config;
    if (used) _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (used) _tile_release();
  }
  const bool used;
};

// C is 2 x 2 tiles of 16 x 16, A two tiles of 16 rows x 32 k, B two of 16 pairs x 16 columns.
void product_amx(const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  constexpr int64_t kRow = kPanel * sizeof(float), kPairs = 2 * kPanel * sizeof(u16);
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say that they read and write memory
  if (add) {
    _tile_loadd(0, c, kRow);
    _tile_loadd(1, c + kLanes, kRow);
    _tile_loadd(2, c + 16 * kPanel, kRow);
    _tile_loadd(3, c + 16 * kPanel + kLanes, kRow);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a += kStep, b += kStep) {
    _tile_loadd(6, b, kPairs);
    _tile_loadd(4, a, kPanel * sizeof(u16));
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kPanel, kPairs);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kStep / 2, kPanel * sizeof(u16));
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, kRow);
  _tile_stored(1, c + kLanes, kRow);
  _tile_stored(2, c + 16 * kPanel, kRow);
  _tile_stored(3, c + 16 * kPanel + kLanes, kRow);
  asm volatile("" ::: "memory");
}

#else

struct Tiles {
  explicit Tiles(Dot) {}
};

void product_amx(const u16*, const u16*, int64_t, float*, bool) { __builtin_trap(); }  // best_dot() excludes it

#endif

void product(Dot dot, const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  (dot == Dot::amx ? product_amx : product_avx512)(a, b, steps, c, add);
}

}  // namespace
}  // namespace fused
}  // namespace bestrq2
