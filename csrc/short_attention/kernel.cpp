// One head of one clip at a time. Sizes are padded to blocks of 32 with zeros; Q is queries, K keys, D channels.
//
// forward    S = q k^T (Q, K) fp32 -> P = 2^(S - max) bf16 -> out = P v / sum + value_bias
// backward   P = 2^(S - logsumexp); dP = dout v^T; dS = P (dP - sum_j P dP) scale
//            dv = P^T dout, dq = dS k, dk = dS^T q
#include <type_traits>

#include "common/arena.h"
#include "common/bf16_packing.h"
#include "common/exp.h"
#include "short_attention/short_attention.h"

extern "C" float log2f(float);

namespace bestrq2 {
namespace short_attention {
namespace {

using bf16::first_lanes;
using bf16::join;
using bf16::kBlock;
using bf16::kLanes;
using bf16::Left;
using bf16::Right;
using bf16::Tiles;
using bf16::u16;
using bf16::widen;

using namespace BESTRQ2_ISA;

inline int64_t padded(int64_t n) { return round_up(n, kBlock); }

struct Head {
  int64_t queries, keys, dim;  // padded
  int64_t valid_queries, valid_keys;
  u16 *query, *key_by_dim, *value_by_key, *weights;  // [Q][D], [D/2][K][2], [K/2][D][2], [Q][K]
  float *scores, *frames;                            // [Q][K], [max(Q, K)][D]
  // Backward only.
  u16 *grad, *value_by_dim, *key_by_key, *query_by_row, *grad_by_row;  // [Q][D], [D/2][K][2], then [rows/2][D][2]
  u16 *weights_T, *score_grad, *score_grad_T;                          // [K][Q], [Q][K], [K][Q]
  float* value_scores;                                                 // [Q][K]
};

Head divide(const ShortAttention& a, bool backward, Arena& arena) {
  Head h{};
  h.queries = padded(a.queries), h.keys = padded(a.keys), h.dim = padded(a.dim);
  const int64_t scores = h.queries * h.keys, longest = h.queries > h.keys ? h.queries : h.keys;
  const auto take = [&](auto*& part, int64_t count) {
    part = arena.take<std::remove_reference_t<decltype(*part)>>(count);
  };
  take(h.query, h.queries * h.dim), take(h.key_by_dim, h.keys * h.dim);
  take(h.weights, scores), take(h.scores, scores), take(h.frames, longest * h.dim);
  if (!backward) {
    take(h.value_by_key, h.keys * h.dim);
    return h;
  }
  take(h.grad, h.queries * h.dim), take(h.value_by_dim, h.keys * h.dim);
  take(h.key_by_key, h.keys * h.dim), take(h.query_by_row, h.queries * h.dim);
  take(h.grad_by_row, h.queries * h.dim), take(h.weights_T, scores);
  take(h.score_grad, scores), take(h.score_grad_T, scores), take(h.value_scores, scores);
  return h;
}

struct Rows {  // 16 channels of a row plus a bias, zeros beyond its end and behind the last valid row
  const u16* data;
  int64_t token, valid, dim;
  const float* bias;

  __m256i operator()(int64_t row, int64_t d) const {
    if (row >= valid) return _mm256_setzero_si256();
    const __mmask16 mask = first_lanes(dim - d);
    const __m256i x = bf16::load(data + row * token + d, mask);
    if (bias == nullptr) return x;
    return (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps(widen(x), _mm512_maskz_loadu_ps(mask, bias + d)));
  }
};

Rows rows_of(const TokenRows& x, int64_t batch, int64_t head, int64_t valid, int64_t dim, const float* bias = nullptr) {
  return {x.at<const u16>(batch, head), x.token, valid, dim, bias != nullptr ? bias + head * dim : nullptr};
}

void copy_rows(const Rows& from, int64_t rows, int64_t dim, u16* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += kLanes)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * dim + d), from(r, d));
}

// Right operand summed over channels whose columns are the rows: [dim / 2][rows][2].
void pack_by_dim(const Rows& from, int64_t rows, int64_t dim, u16* out) {
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t d = 0; d < dim; d += kBlock)
      bf16::pack_columns([&](int64_t i, int64_t at) { return from(r + i, at); }, d, out + d * rows + r * 2, rows * 2);
}

// Right operand summed over rows whose columns are channels: [rows / 2][dim][2].
void pack_by_row(const Rows& from, int64_t rows, int64_t dim, u16* out) {
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t d = 0; d < dim; d += kBlock)
      bf16::pack_summed([&](int64_t i, int64_t at) { return from(r + i, at); }, d, out + r * dim + d * 2, dim * 2);
}

void transpose(const u16* in, int64_t rows, int64_t columns, u16* out) {
  for (int64_t r = 0; r < rows; r += kBlock)
    for (int64_t c = 0; c < columns; c += kLanes)
      bf16::pack_transposed(
          [&](int64_t i, int64_t at) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + (r + i) * columns + at));
          },
          c, out + c * rows + r, rows);
}

// c (rows, columns) = a (rows, inner) b, with b as [inner / 2][columns][2].
void multiply(Dot dot, const u16* a, const u16* b, int64_t rows, int64_t inner, int64_t columns, float* c) {
  for (int64_t column = 0; column < columns; column += kBlock)
    for (int64_t row = 0; row < rows; row += kBlock) {
      const Left left{a + row * inner, inner, kBlock};
      const Right right{b + column * 2, columns * 2, columns * kBlock};
      float* out = c + row * columns + column;
      if (dot == Dot::amx)
        bf16::product_amx(left, right, inner / kBlock, out, columns, false);
      else
        bf16::product_avx512(left, right, inner / kBlock, out, columns, false);
    }
}

// sums[d] = the sum of the valid rows.
void sum_columns(const float* rows, int64_t stride, int64_t valid, int64_t dim, float* sums) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __mmask16 mask = first_lanes(dim - d);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t r = 0; r < valid; ++r) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, rows + r * stride + d));
    _mm512_mask_storeu_ps(sums + d, mask, sum);
  }
}

void sum_columns(const Rows& rows, float* sums) {
  for (int64_t d = 0; d < rows.dim; d += kLanes) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t r = 0; r < rows.valid; ++r) sum = _mm512_add_ps(sum, widen(rows(r, d)));
    _mm512_mask_storeu_ps(sums + d, first_lanes(rows.dim - d), sum);
  }
}

void write_rows(const float* in, int64_t stride, const TokenRows& to, int64_t batch, int64_t head, int64_t rows,
                int64_t valid, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < dim; d += kLanes) {
      const __mmask16 mask = first_lanes(dim - d);
      const __m512 x = r < valid ? _mm512_maskz_loadu_ps(mask, in + r * stride + d) : _mm512_setzero_ps();
      bf16::store_rounded(to.at<u16>(batch, head) + r * to.token + d, mask, x);
    }
}

void count_valid(const ShortAttention& a, int64_t batch, Head& h) {
  h.valid_queries = a.queries, h.valid_keys = a.keys;
  if (a.lengths == nullptr) return;
  h.valid_keys = at_most(a.keys, a.lengths[batch]);
  if (a.queries == a.keys) h.valid_queries = h.valid_keys;
}

}  // namespace

int64_t scratch_bytes(const ShortAttention& a, bool backward) {
  Arena arena{nullptr};
  divide(a, backward, arena);
  return arena.bytes();
}

void forward(const ShortAttention& a, Dot dot, int64_t batch, int64_t head, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, false, arena);
  count_valid(a, batch, h);
  const Tiles tiles(dot);
  copy_rows(rows_of(a.query, batch, head, h.valid_queries, a.dim, a.query_bias), h.queries, h.dim, h.query);
  pack_by_dim(rows_of(a.key, batch, head, h.valid_keys, a.dim), h.keys, h.dim, h.key_by_dim);
  pack_by_row(rows_of(a.value, batch, head, h.valid_keys, a.dim), h.keys, h.dim, h.value_by_key);
  multiply(dot, h.query, h.key_by_dim, h.queries, h.dim, h.keys, h.scores);
  const __m512 scale = _mm512_set1_ps(a.scale * kLog2E), hidden = _mm512_set1_ps(-__builtin_inff());
  float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  for (int64_t r = 0; r < h.queries; ++r) {
    float* row = h.scores + r * h.keys;
    u16* weights = h.weights + r * h.keys;
    if (r >= h.valid_queries || h.valid_keys == 0) {
      __builtin_memset(weights, 0, h.keys * sizeof(u16));
      if (r < a.queries) logsumexp[r] = 0;
      row[0] = 0;
      continue;
    }
    __m512 most = hidden;
    for (int64_t k = 0; k < h.keys; k += kLanes) {
      const __m512 x = _mm512_mask_mul_ps(hidden, first_lanes(h.valid_keys - k), _mm512_loadu_ps(row + k), scale);
      _mm512_storeu_ps(row + k, x);
      most = _mm512_max_ps(most, x);
    }
    const float largest = _mm512_reduce_max_ps(most);
    const __m512 base = _mm512_set1_ps(largest);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < h.keys; k += kBlock) {
      const __m512 low = exp2(_mm512_sub_ps(_mm512_loadu_ps(row + k), base));
      const __m512 high = exp2(_mm512_sub_ps(_mm512_loadu_ps(row + k + kLanes), base));
      sum = _mm512_add_ps(sum, _mm512_add_ps(low, high));
      _mm512_storeu_si512(weights + k, join(low, high));
    }
    const float total = _mm512_reduce_add_ps(sum);
    logsumexp[r] = largest + log2f(total);
    row[0] = 1.0f / total;  // the scores of this row are no longer needed
  }
  multiply(dot, h.weights, h.value_by_key, h.queries, h.keys, h.dim, h.frames);
  for (int64_t r = 0; r < h.valid_queries; ++r) {
    const __m512 factor = _mm512_set1_ps(h.scores[r * h.keys]);
    for (int64_t d = 0; d < h.dim; d += kLanes) {
      const __mmask16 mask = first_lanes(a.dim - d);
      const float* bias = a.value_bias != nullptr ? a.value_bias + head * a.dim + d : nullptr;
      const __m512 added = bias != nullptr ? _mm512_maskz_loadu_ps(mask, bias) : _mm512_setzero_ps();
      float* out = h.frames + r * h.dim + d;
      _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_loadu_ps(out), factor, added));
    }
  }
  write_rows(h.frames, h.dim, a.out, batch, head, a.queries, h.valid_queries, a.dim);
}

void backward(const ShortAttention& a, Dot dot, int64_t batch, int64_t head, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, true, arena);
  count_valid(a, batch, h);
  const Tiles tiles(dot);
  const Rows query = rows_of(a.query, batch, head, h.valid_queries, a.dim, a.query_bias);
  const Rows key = rows_of(a.key, batch, head, h.valid_keys, a.dim);
  const Rows value = rows_of(a.value, batch, head, h.valid_keys, a.dim);
  const Rows grad = rows_of(a.grad, batch, head, h.valid_queries, a.dim);
  copy_rows(query, h.queries, h.dim, h.query), copy_rows(grad, h.queries, h.dim, h.grad);
  pack_by_dim(key, h.keys, h.dim, h.key_by_dim), pack_by_dim(value, h.keys, h.dim, h.value_by_dim);
  pack_by_row(key, h.keys, h.dim, h.key_by_key), pack_by_row(query, h.queries, h.dim, h.query_by_row);
  pack_by_row(grad, h.queries, h.dim, h.grad_by_row);
  multiply(dot, h.query, h.key_by_dim, h.queries, h.dim, h.keys, h.scores);
  multiply(dot, h.grad, h.value_by_dim, h.queries, h.dim, h.keys, h.value_scores);
  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  const __m512 scale = _mm512_set1_ps(a.scale * kLog2E);
  for (int64_t r = 0; r < h.queries; ++r) {
    u16 *weights = h.weights + r * h.keys, *score_grad = h.score_grad + r * h.keys;
    if (r >= h.valid_queries || h.valid_keys == 0) {
      __builtin_memset(weights, 0, h.keys * sizeof(u16)), __builtin_memset(score_grad, 0, h.keys * sizeof(u16));
      continue;
    }
    float *row = h.scores + r * h.keys, *of_value = h.value_scores + r * h.keys;
    const __m512 base = _mm512_set1_ps(logsumexp[r]);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t k = 0; k < h.keys; k += kBlock) {
      __m512 p[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = k + i * kLanes;
        const __m512 x = _mm512_fmsub_ps(_mm512_loadu_ps(row + at), scale, base);
        p[i] = _mm512_maskz_mov_ps(first_lanes(h.valid_keys - at), exp2(x));
        sum = _mm512_fmadd_ps(p[i], _mm512_loadu_ps(of_value + at), sum);
        _mm512_storeu_ps(row + at, p[i]);
      }
      _mm512_storeu_si512(weights + k, join(p[0], p[1]));
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(a.scale);
    for (int64_t k = 0; k < h.keys; k += kBlock) {
      __m512 g[2];
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int64_t at = k + i * kLanes;
        const __m512 centred = _mm512_sub_ps(_mm512_loadu_ps(of_value + at), mean);
        g[i] = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(row + at), centred), factor);
      }
      _mm512_storeu_si512(score_grad + k, join(g[0], g[1]));
    }
  }
  multiply(dot, h.score_grad, h.key_by_key, h.queries, h.keys, h.dim, h.frames);
  write_rows(h.frames, h.dim, a.grad_query, batch, head, a.queries, h.valid_queries, a.dim);
  if (a.bias_sums != nullptr) {
    const int64_t width = a.heads * a.dim;
    float* sums = a.bias_sums + batch * 3 * width + head * a.dim;
    sum_columns(h.frames, h.dim, h.valid_queries, a.dim, sums);
    __builtin_memset(sums + width, 0, a.dim * sizeof(float));
    sum_columns(grad, sums + 2 * width);
  }
  transpose(h.score_grad, h.queries, h.keys, h.score_grad_T);
  multiply(dot, h.score_grad_T, h.query_by_row, h.keys, h.queries, h.dim, h.frames);
  write_rows(h.frames, h.dim, a.grad_key, batch, head, a.keys, h.valid_keys, a.dim);
  transpose(h.weights, h.queries, h.keys, h.weights_T);
  multiply(dot, h.weights_T, h.grad_by_row, h.keys, h.queries, h.dim, h.frames);
  write_rows(h.frames, h.dim, a.grad_value, batch, head, a.keys, h.valid_keys, a.dim);
}

}  // namespace short_attention
}  // namespace bestrq2
