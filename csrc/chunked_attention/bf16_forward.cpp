// The output of one tile of 64 queries, from the tiles of 64 keys that its windows reach.
#include "chunked_attention/bf16_tiles.h"

extern "C" float log2f(float);

namespace bestrq2 {
namespace attention_bf16 {
namespace {

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
      x[v] = _mm512_mask_mul_ps(hidden, mask, score_at<kPosition>(s, h, r, column + v * kLanes), scale);
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
      _mm512_store_si512(s.weights + (h.first + r) * kTile + column + v * kLanes, join(x[v], x[v + 1]));
  }
}

}  // namespace

int64_t scratch_bytes(const Call& c) {
  Arena arena(nullptr);
  divide(c, arena);
  return arena.bytes();
}

void forward(const Call& c, int64_t batch, int64_t head, int64_t tile, void* scratch) {
  const ChunkedAttention& a = *c.a;
  Arena arena(scratch);
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
    // Step by step for both halves, so that no step reads what is still being stored.
    const Half halves[2] = {find_half(c, q, 0, t * kTile), find_half(c, q, 1, t * kTile)};
    for (const Half& h : halves)
      if (h.begin < h.end) score(c, h, head, c.key_by_dim + at, s);
    for (const Half& h : halves) {
      if (h.begin >= h.end) continue;
      const bool both = h.end - h.begin == 2;
      (a.position ? both ? softmax_step<true, 4> : softmax_step<true, 2>
       : both     ? softmax_step<false, 4>
                  : softmax_step<false, 2>)(c, q, h, t * kTile, visible, started[h.first / kBlock], s);
    }
    for (const Half& h : halves) {
      if (h.begin >= h.end) continue;
      bool& begun = started[h.first / kBlock];
      add_product(c, {s.weights + h.first * kTile + h.begin * kBlock, kTile, kBlock},
                  c.value_by_key + at + h.begin * kBlock * c.dim, h.end - h.begin, s.out + h.first * c.dim, begun);
      begun = true;
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

}  // namespace attention_bf16
}  // namespace bestrq2
