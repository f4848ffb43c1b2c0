// One tile of 64 queries against the tiles of 64 keys that its windows reach, 32 x 32 scores at a time.
// Compiled for AVX-512 BF16 and, where the compiler knows it, AMX.
//
// The strip of position scores of 32 queries is a product over 96 columns of the table; each row is added to the scores
// one column further left. In the backward pass score gradients are stored a second time, each row one column further
// right, as they meet the table.
#include "chunked_attention_bf16_kernel.h"

#include <initializer_list>

#include "chunked_attention_bf16_packing.h"

extern "C" float log2f(float);

namespace bestrq2 {
namespace attention_bf16 {
namespace {

using bf16::join;
using bf16::least;
using bf16::Left;
using bf16::pairs;
using bf16::Right;
using bf16::Tiles;
using bf16::widen;

constexpr int64_t kStrip = 96;           // columns of the table that 32 queries and 64 keys meet, 95, in whole blocks
constexpr int64_t kGuard = kBlock;       // zeros on both sides of a row of score gradients, read by the shear
constexpr int64_t kSheared = 2 * kTile;  // values per row of score gradients, pairs per row of sheared pairs
constexpr float kLog2E = 1.44269504088896341f;
const float kInfinity = __builtin_inff();

void product(Dot dot, Left a, Right b, int64_t steps, float* c, int64_t c_row, bool add) {
  if (dot == Dot::amx)
    bf16::product_amx(a, b, steps, c, c_row, add);
  else
    bf16::product_avx512(a, b, steps, c, c_row, add);
}

struct Scratch {
  u16 *content, *position;       // [64][dim] q + u and q + v, zeros below the last query
  float *scores, *strip;         // [32][64], [32][96]
  u16* weights;                  // [32][64]
  float *out, *largest, *total;  // [64][dim], [64], [64][16]
  // Backward only.
  u16 *grad, *content_T, *position_T, *grad_T;  // [64][dim], [dim][64]
  float* value_scores;                          // [32][64] gradient x value
  u16 *weight_pairs, *grad_pairs;               // [32][64][2]
  u16 *score_grad, *sheared, *sheared_pairs;    // [64][32 + 64 + 32], [64][32 + 96], [32][128][2]
  float *content_grad, *position_grad, *delta, *base;
};

// Hands out 64-byte aligned parts of the scratch memory; with null it only measures.
struct Arena {
  char* at;
  int64_t used = 0;
  template <class T>
  void take(T*& part, int64_t count) {
    part = at == nullptr ? nullptr : reinterpret_cast<T*>(at + used);
    used += (count * int64_t{sizeof(T)} + 63) / 64 * 64;
  }
};

Scratch divide(const Call& c, Arena& arena) {
  const int64_t frames = kTile * c.dim;
  Scratch s{};
  arena.take(s.content, frames), arena.take(s.position, frames);
  arena.take(s.scores, kBlock * kTile), arena.take(s.strip, kBlock * kStrip);
  arena.take(s.out, frames);
  if (!c.backward) {
    arena.take(s.weights, kBlock * kTile), arena.take(s.largest, kTile), arena.take(s.total, kTile * kLanes);
    return s;
  }
  for (u16** part : {&s.grad, &s.content_T, &s.position_T, &s.grad_T}) arena.take(*part, frames);
  arena.take(s.value_scores, kBlock * kTile);
  arena.take(s.weight_pairs, kTile * kTile), arena.take(s.grad_pairs, kTile * kTile);
  arena.take(s.score_grad, kTile * kSheared), arena.take(s.sheared, kTile * kSheared),
      arena.take(s.sheared_pairs, kTile * kSheared);
  arena.take(s.content_grad, frames), arena.take(s.position_grad, frames);
  arena.take(s.delta, kTile), arena.take(s.base, kTile);
  return s;
}

// 2^x, -inf gives 0, NaN stays NaN: 2^floor(x) times a polynomial of degree 5 in x - floor(x), minimax with p(0) = 1,
// relative error below 9e-8 before rounding.
inline __m512 exp2(__m512 x) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(0.0018671300495043397f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.009017030708491802f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.05579991266131401f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.24016444385051727f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.6931512951850891f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, x);
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

void read_queries(const Call& c, int64_t batch, int64_t head, const Queries& q, const Scratch& s) {
  const auto all = [](int64_t) { return true; };
  const auto rows = rows_of(c, c.a->query, batch, head, q.begin - c.a->query_offset, all);
  add_bias(c, rows, q.rows, c.a->content_bias, head, s.content);
  if (c.a->position) add_bias(c, rows, q.rows, c.a->position_bias, head, s.position);
}

// Zeroes the rows of a tile that find_queries left out.
void write_zeros(const Call& c, const Frames& f, int64_t batch, int64_t head, int64_t tile, const Queries& q) {
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

Half find_half(const Call& c, const Queries& q, int64_t half, int64_t first_key) {
  Half h{half * kBlock, least(q.rows - half * kBlock, kBlock), 0, 0, 0};
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
void score(const Call& c, const Half& h, int64_t head, const u16* keys, const Scratch& s) {
  const int64_t steps = c.dim / kBlock;
  for (int64_t block = h.begin; block < h.end; ++block)
    product(c.dot, {s.content + h.first * c.dim, c.dim, kBlock}, {keys + 2 * block * kBlock, 2 * kTile, kBlock * kTile},
            steps, s.scores + block * kBlock, kTile, false);
  if (!c.a->position) return;
  const u16* table = c.position_by_dim + head * c.dim * c.width + 2 * h.column;
  for (int64_t block = h.begin; block <= h.end; ++block)
    product(c.dot, {s.position + h.first * c.dim, c.dim, kBlock},
            {table + 2 * block * kBlock, 2 * c.width, kBlock * c.width}, steps, s.strip + block * kBlock, kStrip,
            false);
}

// Scores of row r of a half from column on.
template <bool kPosition>
inline __m512 score_at(const Scratch& s, int64_t r, int64_t column) {
  const __m512 x = _mm512_load_ps(s.scores + r * kTile + column);
  if (!kPosition) return x;
  return _mm512_add_ps(x, _mm512_loadu_ps(s.strip + r * kStrip + kBlock - 1 - r + column));
}

// A step of the online softmax in powers of two: s.weights = 2^(score - base) in bf16. The base follows the largest
// score only when it is left behind by more than 8, so that sums are seldom rescaled; weights then reach 2^8.
template <bool kPosition, int kVectors>
void softmax_step(const Call& c, const Queries& q, const Half& h, int64_t first_key, uint64_t visible, bool started,
                  const Scratch& s) {
  const __m512 scale = _mm512_set1_ps(c.a->scale * kLog2E), hidden = _mm512_set1_ps(-kInfinity);
  const int64_t column = h.begin * kBlock;
  for (int64_t r = 0; r < kBlock; ++r) {
    const uint64_t seen = r < h.count ? seen_keys(q, h.first + r, first_key, visible) >> column : 0;
    __m512 x[kVectors], most = hidden;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const auto mask = static_cast<__mmask16>(seen >> v * kLanes);
      x[v] = _mm512_mask_mul_ps(hidden, mask, score_at<kPosition>(s, r, column + v * kLanes), scale);
      most = _mm512_max_ps(x[v], most);
    }
    const float found = _mm512_reduce_max_ps(most);
    float* largest = s.largest + h.first + r;
    float* total = s.total + (h.first + r) * kLanes;
    if (found > *largest + 8.0f) {
      const __m512 keep = exp2(_mm512_set1_ps(*largest - found));
      *largest = found;
      _mm512_store_ps(total, _mm512_mul_ps(_mm512_load_ps(total), keep));
      float* out = s.out + (h.first + r) * c.dim;
      for (int64_t d = 0; started && d < c.dim; d += kLanes)
        _mm512_store_ps(out + d, _mm512_mul_ps(_mm512_load_ps(out + d), keep));
    }
    const __m512 base = _mm512_set1_ps(*largest == -kInfinity ? 0.0f : *largest);  // exp(-inf - 0) = 0
    __m512 sum = _mm512_load_ps(total);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum = _mm512_add_ps(sum, x[v] = exp2(_mm512_sub_ps(x[v], base)));
    _mm512_store_ps(total, sum);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2)
      _mm512_store_si512(s.weights + r * kTile + column + v * kLanes, join(x[v], x[v + 1]));
  }
}

// Products with rows of `dim`: c [32][dim] (+)= a b, where b has pairs of rows of `dim`.
void add_product(const Call& c, Left a, const u16* b, int64_t steps, float* out, bool add) {
  for (int64_t d = 0; d < c.dim; d += kBlock)
    product(c.dot, a, {b + 2 * d, 2 * c.dim, kBlock * c.dim}, steps, out + d, c.dim, add);
}

// c [dim][32] += a b, where a is [dim][64].
void add_transposed(const Call& c, Left a, Right b, int64_t steps, float* out, int64_t out_row) {
  for (int64_t d = 0; d < c.dim; d += kBlock)
    product(c.dot, {a.data + d * kTile, kTile, kBlock}, b, steps, out + d * out_row, out_row, true);
}

}  // namespace

int64_t scratch_bytes(const Call& c) {
  Arena arena{nullptr};
  divide(c, arena);
  return arena.used;
}

void forward(const Call& c, int64_t batch, int64_t head, int64_t tile, void* scratch) {
  const ChunkedAttention& a = *c.a;
  Arena arena{static_cast<char*>(scratch)};
  const Scratch s = divide(c, arena);
  const Queries q = find_queries(a, batch, tile);
  write_zeros(c, a.out, batch, head, tile, q);
  float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.query_length - a.query_offset;
  for (int64_t position = at_least(tile * kTile, a.query_offset);
       position < at_most((tile + 1) * kTile, a.query_offset + a.query_length); ++position)
    logsumexp[position] = 0;
  if (q.rows == 0) return;

  read_queries(c, batch, head, q, s);
  for (int64_t r = 0; r < kTile; ++r) s.largest[r] = -kInfinity;
  __builtin_memset(s.total, 0, kTile * kLanes * sizeof(float));
  bool started[2] = {};
  const Tiles tiles(c.dot);
  for (int64_t t = q.low[0] / kTile; t * kTile < q.high[q.rows - 1]; ++t) {
    const uint64_t visible = visible_keys(a, batch, t);
    if (visible == 0) continue;
    const int64_t at = c.key_tile(batch, head, t);
    for (int64_t half = 0; half < 2; ++half) {
      const Half h = find_half(c, q, half, t * kTile);
      if (h.begin >= h.end) continue;
      score(c, h, head, c.key_by_dim + at, s);
      const bool both = h.end - h.begin == 2;
      (a.position ? both ? softmax_step<true, 4> : softmax_step<true, 2>
       : both     ? softmax_step<false, 4>
                  : softmax_step<false, 2>)(c, q, h, t * kTile, visible, started[half], s);
      add_product(c, {s.weights + h.begin * kBlock, kTile, kBlock}, c.value_by_key + at + h.begin * kBlock * c.dim,
                  h.end - h.begin, s.out + h.first * c.dim, started[half]);
      started[half] = true;
    }
  }
  for (int64_t r = 0; r < q.rows; ++r) {
    const float total = _mm512_reduce_add_ps(_mm512_load_ps(s.total + r * kLanes));
    const bool sees_nothing = total == 0;  // the key mask hides the whole window
    float* out = s.out + r * c.dim;
    const __m512 divisor = _mm512_set1_ps(total);
    for (int64_t d = 0; d < c.dim; d += kLanes)
      _mm512_store_ps(out + d, sees_nothing ? _mm512_setzero_ps() : _mm512_div_ps(_mm512_load_ps(out + d), divisor));
    write_row(c, out, frame(a.out, batch, head, q.begin + r - a.query_offset));
    logsumexp[q.begin + r] = sees_nothing ? 0.0f : (s.largest[r] + log2f(total)) * (1.0f / kLog2E);
  }
}

namespace {

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
            w[v] = _mm512_maskz_mov_ps(mask, exp2(_mm512_fmsub_ps(score_at<kPosition>(s, r, column), scale, base)));
            g[v] = _mm512_maskz_mul_ps(mask, w[v],
                                       _mm512_sub_ps(_mm512_load_ps(s.value_scores + r * kTile + column), delta));
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
    begin = least(begin, half), end = half + 1;
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
    for (int64_t half = 0; half < 2; ++half) {
      const Half& h = halves[half];
      if (h.begin >= h.end) continue;
      score(c, h, head, c.key_by_dim + at, s);
      for (int64_t block = h.begin; block < h.end; ++block)
        product(c.dot, {s.grad + h.first * c.dim, c.dim, kBlock},
                {c.value_by_dim + at + 2 * block * kBlock, 2 * kTile, kBlock * kTile}, c.dim / kBlock,
                s.value_scores + block * kBlock, kTile, false);
      (a.position ? score_grads<true> : score_grads<false>)(c, q, h, t * kTile, visible, s);
      add_product(c, {s.score_grad + h.first * kSheared + kGuard + h.begin * kBlock, kSheared, kBlock},
                  c.key_by_key + at + h.begin * kBlock * c.dim, h.end - h.begin, s.content_grad + h.first * c.dim,
                  started[half]);
    }
    for (int64_t block = 0; block < 2; ++block) {
      int64_t from = 2, to = 0;  // halves that see the block
      for (int64_t half = 0; half < 2; ++half)
        if (halves[half].begin <= block && block < halves[half].end) from = least(from, half), to = half + 1;
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
  Arena arena{static_cast<char*>(scratch)};
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
