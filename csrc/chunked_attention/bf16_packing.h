// Operands of the attention products from the caller's rows, and gradients back to them (layouts in
// bf16_kernel.h).
#pragma once

#include "chunked_attention/bf16_kernel.h"
#include "chunked_attention/queries.h"
#include "common/bf16_packing.h"

namespace bestrq2 {
namespace attention_bf16 {
namespace {

using namespace BESTRQ2_ISA;
using bf16::first_lanes;
using bf16::kBlock;
using bf16::kLanes;

// Rows first, first + 1, ... of frames, 16 values at a time, rows for which exists(i) is false as zeros.
template <class Exists>
struct Rows {
  const u16* data;
  int64_t stride, dim;
  Exists exists;
  __m256i operator()(int64_t i, int64_t d) const {
    const bool given = exists(i);
    return bf16::load(given ? data + i * stride + d : data, given ? first_lanes(dim - d) : __mmask16{0});
  }
};

template <class Exists>
Rows<Exists> rows_of(const Call& c, const Frames& f, int64_t batch, int64_t head, int64_t first, Exists exists) {
  return {static_cast<const u16*>(f.data) + offset_of(f, batch, head, first), f.frame_stride, c.a->head_dim, exists};
}

// Of 64 rows: right operand summed over dimensions, [dim / 2][64][2].
template <class Get>
void pack_by_dim(const Call& c, Get get, u16* out) {
  for (int64_t block = 0; block < kTile; block += kBlock) {
    const auto row = [&](int64_t i, int64_t d) { return get(block + i, d); };
    for (int64_t d = 0; d < c.dim; d += kBlock) bf16::pack_columns(row, d, out + d * kTile + 2 * block, 2 * kTile);
  }
}

// Of 64 rows: right operand summed over rows, [32][dim][2].
template <class Get>
void pack_by_row(const Call& c, Get get, u16* out) {
  for (int64_t block = 0; block < kTile; block += kBlock) {
    const auto row = [&](int64_t i, int64_t d) { return get(block + i, d); };
    for (int64_t d = 0; d < c.dim; d += kBlock) bf16::pack_summed(row, d, out + block * c.dim + 2 * d, 2 * c.dim);
  }
}

// 64 rows [64][dim] as a left operand summed over them, [dim][64].
inline void transpose_rows(const Call& c, const u16* rows, u16* out) {
  for (int64_t block = 0; block < kTile; block += kBlock) {
    const auto row = [&](int64_t i, int64_t d) { return bf16::load(rows + (block + i) * c.dim + d, 0xffff); };
    for (int64_t d = 0; d < c.dim; d += kLanes) bf16::pack_transposed(row, d, out + d * kTile + block, kTile);
  }
}

inline void write_row(const Call& c, const float* in, u16* out) {
  for (int64_t d = 0; d < c.a->head_dim; d += kLanes)
    bf16::store_rounded(out + d, first_lanes(c.a->head_dim - d), _mm512_loadu_ps(in + d));
}

inline u16* frame(const Frames& f, int64_t batch, int64_t head, int64_t at) {
  return static_cast<u16*>(f.data) + offset_of(f, batch, head, at);
}

// Columns of sums [dim][stride], scaled, as `count` rows of bf16: row i to out + i * row.
inline void write_columns(const Call& c, const float* sums, int64_t stride, int64_t count, float scale, u16* out,
                          int64_t row) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t d = 0; d < c.a->head_dim; d += kLanes) {
      __m512i x[16];
      for (int i = 0; i < 16; ++i)
        x[i] = _mm512_castps_si512(_mm512_mul_ps(factor, _mm512_loadu_ps(sums + (d + i) * stride + first)));
      bf16::transpose(x);
      for (int64_t i = 0; i < at_most(kLanes, count - first); ++i)
        bf16::store_rounded(out + (first + i) * row + d, first_lanes(c.a->head_dim - d), _mm512_castsi512_ps(x[i]));
    }
}

// Keys of a tile that the key mask and the item's bounds leave visible, one bit each.
inline uint64_t visible_keys(const ChunkedAttention& a, int64_t batch, int64_t tile) {
  const int64_t begin = a.starts ? at_least(a.starts[batch], 0) : 0;
  const int64_t end = a.lengths ? at_most(a.lengths[batch], a.key_length) : a.key_length;
  const auto before = [&](int64_t key) {
    const int64_t bits = key - tile * kTile;
    return bits >= 64 ? ~uint64_t{0} : bits <= 0 ? 0 : (uint64_t{1} << bits) - 1;
  };
  const uint64_t inside = before(end) & ~before(begin);
  if (a.key_mask == nullptr || inside == 0) return inside;
  const auto* mask = a.key_mask + batch * a.key_length + tile * kTile;
  const __m512i bytes = _mm512_maskz_loadu_epi8(inside, mask);
  return inside & _mm512_test_epi8_mask(bytes, bytes);
}

}  // namespace
}  // namespace attention_bf16
}  // namespace bestrq2
