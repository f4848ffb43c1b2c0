// Gradients of the tiles of 64 queries of a segment, from the tiles of 64 keys that their windows reach.
//
// Gradients of keys, values and the table are summed transposed, so that the right operands are pairs of rows of
// scores, which two permutations make of two rows. Score gradients are stored a second time, each row one column
// further right, as they meet the table.
#include "chunked_attention/bf16_tiles.h"

namespace bestrq2 {
namespace attention_bf16 {
namespace {

// c [dim][32] += a b, where a is [dim][64].
void add_transposed(const Call& c, Left a, Right b, int64_t steps, float* out, int64_t out_row) {
  for (int64_t d = 0; d < c.dim; d += kBlock)
    product(c.dot, {a.data + d * kTile, kTile, kBlock}, b, steps, out + d * out_row, out_row, true);
}

// Weights and score gradients of 32 queries, 0 where nothing is visible: rows of gradients, and pairs of rows of both.
template <bool kPosition>
void score_grads(const Call& c, const Queries& q, const Half& h, int64_t first_key, uint64_t visible,
                 const Scratch& s) {
  const __m512 scale = _mm512_set1_ps(c.a->scale * kLog2E);
  alignas(64) u16 low[kBlock], high[kBlock];  // words of two rows in turn
  for (int i = 0; i < kBlock; ++i) {
    low[i] = static_cast<u16>(i / 2 + i % 2 * kBlock);
    high[i] = static_cast<u16>(low[i] + kBlock / 2);
  }
  const __m512i first = _mm512_load_si512(low), second = _mm512_load_si512(high);
  for (int64_t pair = 0; pair < kBlock / 2; ++pair)
    for (int64_t block = 0; block < 2; ++block) {
      __m512i weights[2] = {}, grads[2] = {};
      if (h.begin <= block && block < h.end)
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
          const int64_t r = 2 * pair + i, row = h.first + r;
          const uint64_t seen = r < h.count ? seen_keys(q, row, first_key, visible) >> block * kBlock : 0;
          const __m512 base = _mm512_set1_ps(s.base[row]), delta = _mm512_set1_ps(s.delta[row]);
          __m512 w[2], g[2];
#pragma GCC unroll 2
          for (int v = 0; v < 2; ++v) {
            const int64_t column = block * kBlock + v * kLanes;
            const auto mask = static_cast<__mmask16>(seen >> v * kLanes);
            w[v] = _mm512_maskz_mov_ps(mask, exp2(_mm512_fmsub_ps(score_at<kPosition>(s, h, r, column), scale, base)));
            g[v] = _mm512_maskz_mul_ps(
                mask, w[v], _mm512_sub_ps(_mm512_load_ps(s.value_scores + (h.first + r) * kTile + column), delta));
          }
          weights[i] = join(w[0], w[1]), grads[i] = join(g[0], g[1]);
        }
      const int64_t at = (h.first / 2 + pair) * 2 * kTile + block * 2 * kBlock;
      _mm512_store_si512(s.weight_pairs + at, _mm512_permutex2var_epi16(weights[0], first, weights[1]));
      _mm512_store_si512(s.weight_pairs + at + kBlock, _mm512_permutex2var_epi16(weights[0], second, weights[1]));
      _mm512_store_si512(s.grad_pairs + at, _mm512_permutex2var_epi16(grads[0], first, grads[1]));
      _mm512_store_si512(s.grad_pairs + at + kBlock, _mm512_permutex2var_epi16(grads[0], second, grads[1]));
      u16* row = s.score_grad + (h.first + 2 * pair) * kSheared + kGuard + block * kBlock;
      _mm512_store_si512(row, grads[0]);
      _mm512_store_si512(row + kSheared, grads[1]);
      u16* sheared = s.sheared + (h.first + 2 * pair) * kSheared + kGuard + kBlock - 1 - 2 * pair + block * kBlock;
      _mm512_storeu_si512(sheared, grads[0]);
      _mm512_storeu_si512(sheared + kSheared - 1, grads[1]);
    }
}

// Pairs of rows of score gradients, sheared: the second one column further right than the first.
void shear_pairs(int64_t first_row, const Scratch& s) {
  for (int64_t r = 0; r < kBlock; r += 2) {
    const u16* even = s.score_grad + (first_row + r) * kSheared + kGuard - 1;
    const u16* odd = s.score_grad + (first_row + r + 1) * kSheared + kGuard;
    u16* out = s.sheared_pairs + (first_row + r) * kSheared + 2 * (kBlock - 2 - r);
    for (int64_t i = 0; i <= kTile; i += kLanes)
      _mm512_storeu_si512(out + 2 * i, pairs(bf16::load(even + i, 0xffff), bf16::load(odd + i, 0xffff)));
  }
}

// Adds the position gradients of a tile of keys: to the queries of each half, and to the columns of the table.
void add_position_grads(const Call& c, int64_t head, const Half (&halves)[2], const bool (&started)[2], float* table,
                        const Scratch& s) {
  const u16* columns = c.position_by_column + head * c.dim * c.width;
  int64_t begin = 2, end = 0;
  for (int64_t half = 0; half < 2; ++half) {
    const Half& h = halves[half];
    if (h.begin >= h.end) continue;
    const int64_t odd = h.column & 1;  // pairs of columns begin at even ones
    add_product(c, {s.sheared + h.first * kSheared + kGuard - odd, kSheared, kBlock},
                columns + (h.column - odd) * c.dim, kStrip / kBlock, s.position_grad + h.first * c.dim, started[half]);
    shear_pairs(h.first, s);
    begin = at_most(begin, half), end = half + 1;
  }
  // Block b of the first half's columns is block b + 1 of the second half's.
  const int64_t column = halves[begin].column + begin * kBlock;
  for (int64_t b = -1; b < 3; ++b) {
    const int64_t from = at_least(begin, b < 0), to = at_most(end, b < 2 ? 2 : 1);
    if (from >= to) continue;
    add_transposed(c, {s.position_T + from * kBlock, kTile, kBlock},
                   {s.sheared_pairs + from * kBlock * kSheared + (b + from) * 2 * kBlock, 2 * kSheared,
                    kBlock * kSheared + 2 * kBlock},
                   to - from, table + column + b * kBlock, c.width);
  }
}

void add_columns(const Call& c, float* rows, int64_t count, float scale, float* sums) {
  const __m512 factor = _mm512_set1_ps(scale);
  for (int64_t d = 0; d < c.dim; d += kLanes) {
    __m512 sum = _mm512_loadu_ps(sums + d);
    for (int64_t r = 0; r < count; ++r) {
      const __m512 x = _mm512_mul_ps(_mm512_load_ps(rows + r * c.dim + d), factor);
      _mm512_store_ps(rows + r * c.dim + d, x);
      sum = _mm512_add_ps(sum, x);
    }
    _mm512_storeu_ps(sums + d, sum);
  }
}

void read_gradient(const Call& c, int64_t batch, int64_t head, const Queries& q, const Scratch& s) {
  const auto exists = [&](int64_t i) { return i < q.rows; };
  const int64_t first = q.begin - c.a->query_offset;
  const auto grad = rows_of(c, c.a->grad, batch, head, first, exists);
  const auto out = rows_of(c, c.a->out, batch, head, first, exists);
  const float* logsumexp = c.a->logsumexp + (batch * c.a->heads + head) * c.a->query_length + first;
  for (int64_t r = 0; r < kTile; ++r) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t d = 0; d < c.dim; d += kLanes) {
      const __m256i g = grad(r, d);
      sum = _mm512_fmadd_ps(widen(g), widen(out(r, d)), sum);
      _mm256_store_si256(reinterpret_cast<__m256i*>(s.grad + r * c.dim + d), g);
    }
    s.delta[r] = _mm512_reduce_add_ps(sum);
    s.base[r] = r < q.rows ? logsumexp[r] * kLog2E : 0.0f;
  }
  transpose_rows(c, s.content, s.content_T);
  transpose_rows(c, s.grad, s.grad_T);
  if (c.a->position) transpose_rows(c, s.position, s.position_T);
}

void backward_tile(const Call& c, int64_t batch, int64_t head, int64_t tile, const Sums& sums, const Scratch& s) {
  const ChunkedAttention& a = *c.a;
  const Queries q = find_queries(a, batch, tile);
  write_zeros(c, a.grad_query, batch, head, tile, q);
  if (q.rows == 0) return;
  read_queries(c, batch, head, q, s);
  read_gradient(c, batch, head, q, s);
  bool started[2] = {};
  for (int64_t t = q.low[0] / kTile; t * kTile < q.high[q.rows - 1]; ++t) {
    const uint64_t visible = visible_keys(a, batch, t);
    if (visible == 0) continue;
    const int64_t at = c.key_tile(batch, head, t);
    const Half halves[2] = {find_half(c, q, 0, t * kTile), find_half(c, q, 1, t * kTile)};
    // Step by step for both halves, so that no step reads what is still being stored.
    for (const Half& h : halves) {
      if (h.begin >= h.end) continue;
      score(c, h, head, c.key_by_dim + at, s);
      for (int64_t block = h.begin; block < h.end; ++block)
        product(c.dot, {s.grad + h.first * c.dim, c.dim, kBlock},
                {c.value_by_dim + at + 2 * block * kBlock, 2 * kTile, kBlock * kTile}, c.dim / kBlock,
                s.value_scores + h.first * kTile + block * kBlock, kTile, false);
    }
    for (const Half& h : halves)
      if (h.begin < h.end) (a.position ? score_grads<true> : score_grads<false>)(c, q, h, t * kTile, visible, s);
    for (const Half& h : halves)
      if (h.begin < h.end)
        add_product(c, {s.score_grad + h.first * kSheared + kGuard + h.begin * kBlock, kSheared, kBlock},
                    c.key_by_key + at + h.begin * kBlock * c.dim, h.end - h.begin, s.content_grad + h.first * c.dim,
                    started[h.first / kBlock]);
    for (int64_t block = 0; block < 2; ++block) {
      int64_t from = 2, to = 0;  // halves that see the block
      for (int64_t half = 0; half < 2; ++half)
        if (halves[half].begin <= block && block < halves[half].end) from = at_most(from, half), to = half + 1;
      if (from >= to) continue;
      const int64_t pair = from * kBlock * kTile + block * 2 * kBlock;
      const auto add = [&](const u16* queries, const u16* scores, float* grads) {
        add_transposed(c, {queries + from * kBlock, kTile, kBlock}, {scores + pair, 2 * kTile, kBlock * kTile},
                       to - from, grads + at + block * kBlock, kTile);
      };
      add(s.content_T, s.grad_pairs, c.grad_key);
      add(s.grad_T, s.weight_pairs, c.grad_value);
    }
    if (a.position) add_position_grads(c, head, halves, started, sums.position, s);
    for (int64_t half = 0; half < 2; ++half) started[half] |= halves[half].begin < halves[half].end;
  }
  for (int64_t half = 0; half < 2; ++half)
    if (!started[half])
      for (float* grads : {s.content_grad, s.position_grad})
        __builtin_memset(grads + half * kBlock * c.dim, 0, kBlock * c.dim * sizeof(float));
  if (!a.position) __builtin_memset(s.position_grad, 0, kTile * c.dim * sizeof(float));
  add_columns(c, s.content_grad, q.rows, a.scale, sums.content_bias);
  add_columns(c, s.position_grad, q.rows, a.scale, sums.position_bias);
  for (int64_t r = 0; r < q.rows; ++r) {
    float* grad = s.content_grad + r * c.dim;
    for (int64_t d = 0; d < c.dim; d += kLanes)
      _mm512_store_ps(grad + d,
                      _mm512_add_ps(_mm512_load_ps(grad + d), _mm512_load_ps(s.position_grad + r * c.dim + d)));
    write_row(c, grad, frame(a.grad_query, batch, head, q.begin + r - a.query_offset));
  }
}

}  // namespace

void backward(const Call& c, int64_t batch, int64_t head, int64_t first_tile, int64_t last_tile, const Sums& sums,
              void* scratch) {
  Arena arena(scratch);
  const Scratch s = divide(c, arena);
  __builtin_memset(sums.position, 0, c.width * c.dim * sizeof(float));
  __builtin_memset(sums.content_bias, 0, c.dim * sizeof(float));
  __builtin_memset(sums.position_bias, 0, c.dim * sizeof(float));
  __builtin_memset(s.score_grad, 0, kTile * kSheared * sizeof(u16));  // the guards stay zero
  __builtin_memset(s.sheared, 0, kTile * kSheared * sizeof(u16));
  __builtin_memset(s.sheared_pairs, 0, kTile * kSheared * sizeof(u16));
  const Tiles tiles(c.dot);
  for (int64_t tile = first_tile; tile < last_tile; ++tile) backward_tile(c, batch, head, tile, sums, s);
}

}  // namespace attention_bf16
}  // namespace bestrq2
