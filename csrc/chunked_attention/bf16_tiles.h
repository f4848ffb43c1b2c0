// Parts shared by the forward and backward pass over a tile of 64 queries: scratch memory, rows of queries, scores of
// 32 of them. Included by the files that are compiled for AVX-512 BF16 and, if the compiler supports it, AMX.
//
// The strip of position scores of 32 queries is a product over 96 columns of the table; each row is added to the scores
// one column further left.
#pragma once

#include <initializer_list>

#include "chunked_attention/bf16_packing.h"
#include "common/arena.h"
#include "common/exp.h"

namespace bestrq2 {
namespace attention_bf16 {
namespace {

using bf16::join;
using bf16::Left;
using bf16::pairs;
using bf16::Right;
using bf16::Tiles;
using bf16::widen;

constexpr int64_t kStrip = 96;           // columns of the table that 32 queries and 64 keys meet, 95, in whole blocks
constexpr int64_t kGuard = kBlock;       // zeros on both sides of a row of score gradients, read by the shear
constexpr int64_t kSheared = 2 * kTile;  // values per row of score gradients, pairs per row of sheared pairs
const float kInfinity = __builtin_inff();

inline void product(Dot dot, Left a, Right b, int64_t steps, float* c, int64_t c_row, bool add) {
  if (dot == Dot::amx)
    bf16::product_amx(a, b, steps, c, c_row, add);
  else
    bf16::product_avx512(a, b, steps, c, c_row, add);
}

struct Scratch {
  u16 *content, *position;  // [64][dim] q + u and q + v, zeros below the last query
  float *scores, *strip;    // [64][64], [64][96]
  // Forward only.
  u16* weights;                  // [64][64]
  float *out, *largest, *total;  // [64][dim], [64], [64][16]
  // Backward only.
  u16 *grad, *content_T, *position_T, *grad_T;  // [64][dim], [dim][64]
  float* value_scores;                          // [64][64] gradient x value
  u16 *weight_pairs, *grad_pairs;               // [32][64][2]
  u16 *score_grad, *sheared, *sheared_pairs;    // [64][32 + 64 + 32], [64][32 + 96], [32][128][2]
  float *content_grad, *position_grad, *delta, *base;
};

template <class T>
void take(Arena& arena, T*& part, int64_t count) {
  part = arena.take<T>(count);
}

inline Scratch divide(const Call& c, Arena& arena) {
  const int64_t frames = kTile * c.dim;
  Scratch s{};
  take(arena, s.content, frames), take(arena, s.position, frames);
  take(arena, s.scores, kTile * kTile), take(arena, s.strip, kTile * kStrip);
  if (!c.backward) {
    take(arena, s.weights, kTile * kTile), take(arena, s.out, frames);
    take(arena, s.largest, kTile), take(arena, s.total, kTile * kLanes);
    return s;
  }
  for (u16** part : {&s.grad, &s.content_T, &s.position_T, &s.grad_T}) take(arena, *part, frames);
  take(arena, s.value_scores, kTile * kTile);
  take(arena, s.weight_pairs, kTile * kTile), take(arena, s.grad_pairs, kTile * kTile);
  take(arena, s.score_grad, kTile * kSheared), take(arena, s.sheared, kTile * kSheared),
      take(arena, s.sheared_pairs, kTile * kSheared);
  take(arena, s.content_grad, frames), take(arena, s.position_grad, frames);
  take(arena, s.delta, kTile), take(arena, s.base, kTile);
  return s;
}

// The first `count` rows of a tile with a bias added, as bf16; the others are zeros.
template <class Get>
void add_bias(const Call& c, Get rows, int64_t count, const float* bias, int64_t head, u16* out) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < c.dim; d += kLanes) {
      const __mmask16 mask = first_lanes(c.a->head_dim - d);
      const __m512 b = bias ? _mm512_maskz_loadu_ps(mask, bias + head * c.a->head_dim + d) : _mm512_setzero_ps();
      bf16::store_rounded(out + r * c.dim + d, 0xffff, _mm512_add_ps(widen(rows(r, d)), b));
    }
  __builtin_memset(out + count * c.dim, 0, (kTile - count) * c.dim * sizeof(u16));
}

inline void read_queries(const Call& c, int64_t batch, int64_t head, const Queries& q, const Scratch& s) {
  const auto all = [](int64_t) { return true; };
  const auto rows = rows_of(c, c.a->query, batch, head, q.begin - c.a->query_offset, all);
  add_bias(c, rows, q.rows, c.a->content_bias, head, s.content);
  if (c.a->position) add_bias(c, rows, q.rows, c.a->position_bias, head, s.position);
}

// Zeroes the rows of a tile that find_queries left out.
inline void write_zeros(const Call& c, const Frames& f, int64_t batch, int64_t head, int64_t tile, const Queries& q) {
  const int64_t end = at_most((tile + 1) * kTile, c.a->query_offset + c.a->query_length);
  for (int64_t position = at_least(tile * kTile, c.a->query_offset); position < end; ++position)
    if (position < q.begin || position >= q.end)
      __builtin_memset(frame(f, batch, head, position - c.a->query_offset), 0, c.a->head_dim * sizeof(u16));
}

// 32 queries of a tile, and the blocks of 32 keys that any of them sees in one tile of keys.
struct Half {
  int64_t first, count;  // rows of the tile
  int64_t begin, end;    // blocks
  int64_t column;        // of the strip: of the last row's first key
};

inline Half find_half(const Call& c, const Queries& q, int64_t half, int64_t first_key) {
  Half h{half * kBlock, at_most(q.rows - half * kBlock, kBlock), 0, 0, 0};
  if (h.count <= 0) return h;
  h.begin = within(q.low[h.first], first_key) / kBlock;
  h.end = (within(q.high[h.first + h.count - 1], first_key) + kBlock - 1) / kBlock;
  h.column = first_key - (q.begin + h.first + kBlock - 1) + c.zero;
  return h;
}

// Keys of a tile that row r sees, one bit each.
inline uint64_t seen_keys(const Queries& q, int64_t r, int64_t first_key, uint64_t visible) {
  const auto before = [](int64_t key) { return key >= 64 ? ~uint64_t{0} : (uint64_t{1} << key) - 1; };
  return visible & before(within(q.high[r], first_key)) & ~before(within(q.low[r], first_key));
}

// Unscaled scores of 32 queries: content to s.scores, positions to s.strip.
inline void score(const Call& c, const Half& h, int64_t head, const u16* keys, const Scratch& s) {
  const int64_t steps = c.dim / kBlock;
  for (int64_t block = h.begin; block < h.end; ++block)
    product(c.dot, {s.content + h.first * c.dim, c.dim, kBlock}, {keys + 2 * block * kBlock, 2 * kTile, kBlock * kTile},
            steps, s.scores + h.first * kTile + block * kBlock, kTile, false);
  if (!c.a->position) return;
  const u16* table = c.position_by_dim + head * c.dim * c.width + 2 * h.column;
  for (int64_t block = h.begin; block <= h.end; ++block)
    product(c.dot, {s.position + h.first * c.dim, c.dim, kBlock},
            {table + 2 * block * kBlock, 2 * c.width, kBlock * c.width}, steps,
            s.strip + h.first * kStrip + block * kBlock, kStrip, false);
}

// Scores of row r of a half from column on.
template <bool kPosition>
inline __m512 score_at(const Scratch& s, const Half& h, int64_t r, int64_t column) {
  const __m512 x = _mm512_load_ps(s.scores + (h.first + r) * kTile + column);
  if (!kPosition) return x;
  return _mm512_add_ps(x, _mm512_loadu_ps(s.strip + (h.first + r) * kStrip + kBlock - 1 - r + column));
}

// Products with rows of `dim`: c [32][dim] (+)= a b, where b has pairs of rows of `dim`.
inline void add_product(const Call& c, Left a, const u16* b, int64_t steps, float* out, bool add) {
  for (int64_t d = 0; d < c.dim; d += kBlock)
    product(c.dot, a, {b + 2 * d, 2 * c.dim, kBlock * c.dim}, steps, out + d, c.dim, add);
}

}  // namespace
}  // namespace attention_bf16
}  // namespace bestrq2
