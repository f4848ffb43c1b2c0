// Packs the operands of a call before its tiles run, and writes the gradients that are sums over many of them.
// Compiled for AVX-512 BF16.
#include "chunked_attention/bf16_packing.h"

namespace bestrq2 {
namespace attention_bf16 {

void pack_position(const Call& c, int64_t head) {
  const ChunkedAttention& a = *c.a;
  const u16* table = static_cast<const u16*>(a.position) + head * a.table_rows * a.head_dim;
  const int64_t size = c.dim * c.width;
  // Column x is row position_zero + zero - x of the table, if the window reaches it.
  const int64_t lowest = at_least(a.query_offset - a.key_length + 1, 1 - a.chunk_size - a.right_context);
  const int64_t highest = at_most(a.query_offset + a.query_length - 1, a.chunk_size - 1 + a.left_context);
  for (int64_t first = 0; first < c.width; first += kBlock) {
    const auto get = [&](int64_t i, int64_t d) {
      const int64_t offset = c.zero - first - i;
      const bool exists = lowest <= offset && offset <= highest;
      return bf16::load(exists ? table + (a.position_zero + offset) * a.head_dim + d : table,
                        exists ? first_lanes(a.head_dim - d) : __mmask16{0});
    };
    // The width is an odd number of vectors: the last block has one.
    const bool whole = first + kBlock <= c.width;
    for (int64_t d = 0; d < c.dim; d += kBlock) {
      u16* by_dim = c.position_by_dim + head * size + d * c.width + 2 * first;
      if (whole) bf16::pack_columns(get, d, by_dim, 2 * c.width);
      for (int64_t i = 0; !whole && i < kBlock / 2; ++i)
        _mm512_storeu_si512(by_dim + i * 2 * c.width, _mm512_setzero_si512());  // margin
      if (c.position_by_column == nullptr) continue;
      u16* by_column = c.position_by_column + head * size + first * c.dim + 2 * d;
      if (whole) bf16::pack_summed(get, d, by_column, 2 * c.dim);
      for (int64_t i = 0; !whole && i < kLanes / 2; ++i) {
        _mm512_storeu_si512(by_column + i * 2 * c.dim, _mm512_setzero_si512());
        _mm512_storeu_si512(by_column + i * 2 * c.dim + kBlock, _mm512_setzero_si512());
      }
    }
  }
}

void pack_keys(const Call& c, int64_t batch, int64_t head, int64_t tile) {
  const ChunkedAttention& a = *c.a;
  const uint64_t visible = visible_keys(a, batch, tile);
  const auto exists = [&](int64_t i) { return (visible >> i & 1) != 0; };
  const auto key = rows_of(c, a.key, batch, head, tile * kTile, exists);
  const auto value = rows_of(c, a.value, batch, head, tile * kTile, exists);
  const int64_t at = c.key_tile(batch, head, tile);
  pack_by_dim(c, key, c.key_by_dim + at);
  if (!c.backward) return pack_by_row(c, value, c.value_by_key + at);
  pack_by_row(c, key, c.key_by_key + at);
  pack_by_dim(c, value, c.value_by_dim + at);
  __builtin_memset(c.grad_key + at, 0, kTile * c.dim * sizeof(float));
  __builtin_memset(c.grad_value + at, 0, kTile * c.dim * sizeof(float));
}

void write_key_grads(const Call& c, int64_t batch, int64_t head, int64_t tile) {
  const ChunkedAttention& a = *c.a;
  const int64_t first = tile * kTile, count = at_most(a.key_length - first, kTile);
  const auto write = [&](const float* sums, float scale, const Frames& f) {
    u16* out = frame(f, batch, head, first);
    if (c.first_tile <= tile && tile < c.last_tile)
      return write_columns(c, sums + c.key_tile(batch, head, tile), kTile, count, scale, out, f.frame_stride);
    for (int64_t i = 0; i < count; ++i) __builtin_memset(out + i * f.frame_stride, 0, a.head_dim * sizeof(u16));
  };
  write(c.grad_key, a.scale, a.grad_key);
  write(c.grad_value, 1.0f, a.grad_value);
}

void write_position_grad(const Call& c, int64_t head, const float* const* partials, int64_t count) {
  const ChunkedAttention& a = *c.a;
  u16* table = static_cast<u16*>(a.grad_position) + head * a.table_rows * a.head_dim;
  const int64_t lowest = at_least(a.query_offset - a.key_length + 1, 1 - a.chunk_size - a.right_context);
  const int64_t highest = at_most(a.query_offset + a.query_length - 1, a.chunk_size - 1 + a.left_context);
  alignas(64) float sums[256 * kLanes];  // [dim][16 columns]
  for (int64_t offset = highest; offset >= lowest; offset -= kLanes) {
    const int64_t x = c.zero - offset;
    for (int64_t d = 0; d < c.dim; ++d) {
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = 0; i < count; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(partials[i] + d * c.width + x));
      _mm512_store_ps(sums + d * kLanes, sum);
    }
    write_columns(c, sums, kLanes, at_most(kLanes, offset - lowest + 1), a.scale,
                  table + (a.position_zero + offset) * a.head_dim, -a.head_dim);
  }
}

}  // namespace attention_bf16
}  // namespace bestrq2
