// C = A B and C += A B for blocks of 32 x 32 whose operands are bf16 and whose sums are fp32, with AVX-512 BF16 or AMX.
// Included by the files that are compiled for these instruction sets; no standard library templates, whose AVX-512
// copies the linker could keep.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "common/isa.h"

namespace bestrq2 {
namespace bf16 {
namespace {

using u16 = uint16_t;  // the bits of a bf16

constexpr int64_t kLanes = 16;
constexpr int64_t kBlock = 32;  // rows and columns of C, and values of one step along the summed axis

// 32 rows of 32 values a step. All strides are free, in values; tiles that cross
// cache lines load six times as slowly.
struct Left {
  const u16* data;
  int64_t row, step;
};

// 16 pairs of rows a step: 32 columns, the two values of a pair of rows side by side.
struct Right {
  const u16* data;
  int64_t pair, step;
};

// Eight rows at a time: 16 sums, two vectors of B and one broadcast pair of A in registers. Inlined, so that strides
// which are constants in the caller.
__attribute__((always_inline)) inline void product_avx512(Left a, Right b, int64_t steps, float* c, int64_t c_row,
                                                          bool add) {
  for (int group = 0; group < 4; ++group) {
    __m512 sum[8][2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
    for (int64_t s = 0; s < steps; ++s) {
      const u16* row = a.data + s * a.step + group * 8 * a.row;
      const u16* column = b.data + s * b.step;
      for (int k = 0; k < kBlock; k += 2, column += b.pair) {
        const auto b0 = (__m512bh)_mm512_loadu_si512(column), b1 = (__m512bh)_mm512_loadu_si512(column + kBlock);
#pragma GCC unroll 8
        for (int i = 0; i < 8; ++i) {
          int32_t pair;
          __builtin_memcpy(&pair, row + i * a.row + k, sizeof pair);
          const auto x = (__m512bh)_mm512_set1_epi32(pair);
          sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
          sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        float* target = c + (group * 8 + i) * c_row + h * kLanes;
        _mm512_storeu_ps(target, add ? _mm512_add_ps(_mm512_loadu_ps(target), sum[i][h]) : sum[i][h]);
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
__attribute__((always_inline)) inline void product_amx(Left a, Right b, int64_t steps, float* c, int64_t c_row,
                                                       bool add) {
  const int64_t c_bytes = c_row * int64_t{sizeof(float)}, a_bytes = a.row * int64_t{sizeof(u16)},
                b_bytes = b.pair * int64_t{sizeof(u16)};
  float* low = c + 16 * c_row;
  asm volatile("" ::: "memory");  // GCC's tile intrinsics do not say that they read and write memory
  if (add) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kLanes, c_bytes);
    _tile_loadd(2, low, c_bytes);
    _tile_loadd(3, low + kLanes, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t s = 0; s < steps; ++s, a.data += a.step, b.data += b.step) {
    _tile_loadd(6, b.data, b_bytes);
    _tile_loadd(4, a.data, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b.data + kBlock, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a.data + 16 * a.row, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kLanes, c_bytes);
  _tile_stored(2, low, c_bytes);
  _tile_stored(3, low + kLanes, c_bytes);
  asm volatile("" ::: "memory");
}

#else

struct Tiles {
  explicit Tiles(Dot) {}
};

inline void product_amx(Left, Right, int64_t, float*, int64_t, bool) { __builtin_trap(); }  // best_dot() excludes it

#endif

}  // namespace
}  // namespace bf16
}  // namespace bestrq2
