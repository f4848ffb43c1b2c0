// One tile of queries against the tiles of keys that its windows reach. Compiled once per instruction set.
//
//   scores of a tile = [ (q + u) K^T + shear((q + v) P^T) ] * scale
//
// The second product is formed for a stripe of kRows queries over the columns of the position strip that the stripe
// touches, and added to the scores with each row shifted by one: the shear happens in the L1 cache. In the backward
// pass the same shear is a stride: score gradients are read with row stride + 1.
#include "chunked_attention/tile_kernel.h"

#include <initializer_list>

#include "chunked_attention/queries.h"
#include "chunked_attention/tile_products.h"
#include "common/arena.h"
#include "common/exp.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int64_t kStrip = kTile + 32;  // floats per row of a sheared stripe: kTile + kRows - 1 in whole vectors
constexpr int64_t kGuard = 16;          // zeros on both sides of a row of score gradients, read by the shear
constexpr int64_t kSheared = kTile + 2 * kGuard;
const float kInfinity = __builtin_inff();

struct Buffers {
  float *query, *with_content, *with_position, *key, *value, *transposed, *scores, *strip, *out, *largest, *total;
  float *grad, *score_grad, *content_grad, *position_grad, *delta;
  int32_t* visible;  // of each key of a tile: all ones or 0
};

Buffers divide(const ChunkedAttention& a, Arena& arena, bool backward) {
  const int64_t frames = kTile * padded_dim(a.head_dim);
  Buffers b{};
  for (float** part : {&b.query, &b.with_content, &b.with_position, &b.key, &b.value, &b.transposed, &b.out})
    *part = arena.take<float>(frames);
  b.scores = arena.take<float>(kTile * kTile);
  b.strip = arena.take<float>(kRows * kStrip);
  b.largest = arena.take<float>(kTile);
  b.total = arena.take<float>(kTile);
  b.visible = arena.take<int32_t>(kTile);
  if (backward) {
    for (float** part : {&b.grad, &b.content_grad, &b.position_grad}) *part = arena.take<float>(frames);
    b.score_grad = arena.take<float>(kTile * kSheared + kSheared);
    b.delta = arena.take<float>(kTile);
  }
  return b;
}

int64_t forward_scratch(const ChunkedAttention& a) {
  Arena arena(nullptr);
  divide(a, arena, false);
  return arena.bytes();
}

int64_t backward_scratch(const ChunkedAttention& a) {
  Arena arena(nullptr);
  divide(a, arena, true);
  return arena.bytes();
}

void read_frames(const ChunkedAttention& a, const Frames& f, int64_t batch, int64_t head, int64_t frame, int64_t count,
                 float* out) {
  const int64_t bytes = a.type == Float::f32 ? 4 : 2;
  read_rows(static_cast<const char*>(f.data) + offset_of(f, batch, head, frame) * bytes, a.type, f.frame_stride, count,
            a.head_dim, padded_dim(a.head_dim), out);
}

void write_frame(const ChunkedAttention& a, const Frames& f, int64_t batch, int64_t head, int64_t frame,
                 const float* in) {
  write_row(in, a.type, a.head_dim, f.data, offset_of(f, batch, head, frame));
}

// Zeroes the rows of a tile that find_queries left out.
void write_zeros(const ChunkedAttention& a, const Frames& f, int64_t batch, int64_t head, int64_t tile,
                 const Queries& q, float* zeros) {
  const int64_t padded = padded_dim(a.head_dim);
  for (int64_t i = 0; i < padded; ++i) zeros[i] = 0;
  const int64_t begin = at_least(tile * kTile, a.query_offset);
  const int64_t end = at_most((tile + 1) * kTile, a.query_offset + a.query_length);
  for (int64_t position = begin; position < end; ++position)
    if (position < q.begin || position >= q.end) write_frame(a, f, batch, head, position - a.query_offset, zeros);
}

// Fills b.visible for a tile of keys; false if the mask hides all of them.
bool read_mask(const ChunkedAttention& a, int64_t batch, int64_t first, int64_t keys, const Buffers& b) {
  const uint8_t* mask = a.key_mask + batch * a.key_length + first;
  bool any = false;
  for (int64_t c = 0; c < kTile; ++c) {
    b.visible[c] = c < keys && mask[c] ? -1 : 0;
    any |= b.visible[c] != 0;
  }
  return any;
}

// Keys or values of a tile, zero where the mask hides them: there they may hold NaN.
void read_keys(const ChunkedAttention& a, const Frames& f, int64_t batch, int64_t head, int64_t first, int64_t keys,
               const Buffers& b, float* out) {
  read_frames(a, f, batch, head, first, keys, out);
  if (a.key_mask == nullptr) return;
  const int64_t padded = padded_dim(a.head_dim);
  for (int64_t c = 0; c < keys; ++c)
    if (!b.visible[c]) std::memset(out + c * padded, 0, padded * sizeof(float));
}

// b.with_content = (q + u) * scale, b.with_position = (q + v) * scale.
void read_queries(const ChunkedAttention& a, int64_t batch, int64_t head, const Queries& q, const Buffers& b) {
  const int64_t dim = a.head_dim, padded = padded_dim(dim);
  read_frames(a, a.query, batch, head, q.begin - a.query_offset, q.rows, b.query);
  const auto add = [&](const float* bias, float* out) {
    std::memcpy(out, b.query, q.rows * padded * sizeof(float));
    for (int64_t r = 0; r < q.rows; ++r)
      for (int64_t i = 0; i < dim; ++i)
        out[r * padded + i] = (out[r * padded + i] + (bias ? bias[head * dim + i] : 0.0f)) * a.scale;
  };
  add(a.content_bias, b.with_content);
  if (a.position) add(a.position_bias, b.with_position);
}

// Scaled scores of every row against the `columns` (whole vectors) keys in b.transposed, which begin at `first_key`.
void score(const ChunkedAttention& a, const PositionStrip& p, int64_t head, const Queries& q, int64_t first_key,
           int64_t columns, const Buffers& b) {
  const int64_t dim = a.head_dim, padded = padded_dim(dim);
  multiply(q.rows, columns, dim, b.with_content, padded, 1, b.transposed, kTile, b.scores, kTile, false);
  if (!a.position) return;
  for (int64_t r = 0; r < q.rows; r += kRows) {
    const int64_t rows = at_most(q.rows - r, kRows), shift = rows - 1;
    const float* table = p.by_dim + head * dim * p.width + (first_key - (q.begin + r + shift) + p.zero);
    multiply_stripe(rows, whole_vectors(columns + shift), dim, b.with_position + r * padded, padded, 1, table, p.width,
                    b.strip, kStrip, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = b.scores + (r + i) * kTile;
      for (int64_t c = 0; c < columns; c += kLanes)
        store(row + c, load(row + c) + load(b.strip + i * kStrip + shift - i + c));
    }
  }
}

inline Floats visible_only(Floats x, int64_t column, int64_t low, int64_t high, float hidden) {
  const Ints c = iota() + static_cast<int32_t>(column);
  const Ints visible = (c >= static_cast<int32_t>(low)) & (c < static_cast<int32_t>(high));
  return visible ? x : splat(hidden);
}

inline Floats unmasked_only(Floats x, const int32_t* visible, float hidden) {
  const Ints mask = load(visible);
  return mask ? x : splat(hidden);
}

// One step of the online softmax: scores become exp(score - running maximum), earlier sums are rescaled.
template <bool kMasked>
void softmax_step(const Queries& q, int64_t first_key, int64_t columns, int64_t padded, const Buffers& b) {
  for (int64_t r = 0; r < q.rows; ++r) {
    float* row = b.scores + r * kTile;
    const int64_t low = within(q.low[r], first_key), high = within(q.high[r], first_key);
    Floats most = splat(-kInfinity);
    for (int64_t c = 0; c < columns; c += kLanes) {
      Floats x = load(row + c);
      if constexpr (kMasked) store(row + c, x = unmasked_only(x, b.visible + c, -kInfinity));
      if (low > c || high < c + kLanes) store(row + c, x = visible_only(x, c, low, high, -kInfinity));
      most = maximum(x, most);
    }
    const float before = b.largest[r], found = largest(most), now = found > before ? found : before;
    const float base = now == -kInfinity ? 0.0f : now;  // nothing visible yet: exp(-inf - 0) = 0
    Floats total = splat(0.0f);
    for (int64_t c = 0; c < columns; c += kLanes) {
      const Floats weight = exp_nonpositive(load(row + c) - base);
      store(row + c, weight);
      total += weight;
    }
    const float keep = exp_nonpositive(splat(before - base))[0];
    b.total[r] = b.total[r] * keep + sum(total);
    b.largest[r] = now;
    if (keep != 1.0f)
      for (int64_t i = 0; i < padded; i += kLanes) store(b.out + r * padded + i, load(b.out + r * padded + i) * keep);
  }
}

void forward(const ChunkedAttention& a, const PositionStrip& p, int64_t batch, int64_t head, int64_t tile,
             void* scratch) {
  Arena arena(scratch);
  const Buffers b = divide(a, arena, false);
  const int64_t padded = padded_dim(a.head_dim);
  const Queries q = find_queries(a, batch, tile);
  write_zeros(a, a.out, batch, head, tile, q, b.out);
  float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.query_length - a.query_offset;
  for (int64_t position = at_least(tile * kTile, a.query_offset);
       position < at_most((tile + 1) * kTile, a.query_offset + a.query_length); ++position)
    logsumexp[position] = 0;
  if (q.rows == 0) return;

  read_queries(a, batch, head, q, b);
  std::memset(b.out, 0, q.rows * padded * sizeof(float));
  for (int64_t r = 0; r < q.rows; ++r) b.largest[r] = -kInfinity, b.total[r] = 0;
  for (int64_t first = q.low[0]; first < q.high[q.rows - 1]; first += kTile) {
    const int64_t keys = at_most(q.high[q.rows - 1] - first, kTile), columns = whole_vectors(keys);
    if (a.key_mask && !read_mask(a, batch, first, keys, b)) continue;
    read_keys(a, a.key, batch, head, first, keys, b, b.key);
    read_keys(a, a.value, batch, head, first, keys, b, b.value);
    transpose(b.key, keys, padded, b.transposed, kTile);
    score(a, p, head, q, first, columns, b);
    (a.key_mask ? softmax_step<true> : softmax_step<false>)(q, first, columns, padded, b);
    multiply(q.rows, padded, keys, b.scores, kTile, 1, b.value, padded, b.out, padded, true);
  }
  for (int64_t r = 0; r < q.rows; ++r) {
    const bool sees_nothing = b.total[r] == 0;  // the key mask hides the whole window
    const float total = sees_nothing ? 1.0f : b.total[r];
    for (int64_t i = 0; i < padded; ++i) b.out[r * padded + i] /= total;
    write_frame(a, a.out, batch, head, q.begin + r - a.query_offset, b.out + r * padded);
    logsumexp[q.begin + r] = sees_nothing ? 0.0f : b.largest[r] + __builtin_logf(total);
  }
}

// b.scores = softmax weights, b.score_grad = gradient of the scaled scores, both 0 where nothing is visible.
template <bool kMasked>
void weights_and_score_grad(const Queries& q, const float* logsumexp, int64_t first_key, int64_t columns,
                            const Buffers& b) {
  for (int64_t r = 0; r < q.rows; ++r) {
    float* row = b.scores + r * kTile;
    float* grad = b.score_grad + r * kSheared + kGuard;
    const int64_t low = within(q.low[r], first_key), high = within(q.high[r], first_key);
    for (int64_t c = 0; c < columns; c += kLanes) {
      // Clamped at 0: rounding may put a score above its own log-sum-exp.
      Floats exponent = load(row + c) - logsumexp[r];
      exponent = exponent > splat(0.0f) ? splat(0.0f) : exponent;
      Floats weight = exp_nonpositive(exponent), score_grad = weight * (load(grad + c) - b.delta[r]);
      if constexpr (kMasked) {
        weight = unmasked_only(weight, b.visible + c, 0.0f);
        score_grad = unmasked_only(score_grad, b.visible + c, 0.0f);
      }
      if (low > c || high < c + kLanes) {
        weight = visible_only(weight, c, low, high, 0.0f);
        score_grad = visible_only(score_grad, c, low, high, 0.0f);
      }
      store(row + c, weight);
      store(grad + c, score_grad);
    }
    for (int64_t c = columns; c < kTile; ++c) grad[c] = 0;
  }
}

// Adds the position gradients of a tile: to the queries, and to the table columns of this tile (from `column` on for
// row 0 and key 0). Column x meets row r at key x + r, hence the row stride + 1.
void add_position_grads(int64_t rows, int64_t columns, int64_t padded, const float* table, float* table_grad,
                        const Buffers& b) {
  const float* grad = b.score_grad + kGuard;
  for (int64_t r = 0; r < rows; r += kRows) {
    const int64_t count = at_most(rows - r, kRows), first = -(r + count - 1), depth = columns + count - 1;
    multiply(count, padded, depth, grad + r * kSheared + r + first, kSheared + 1, 1, table + first * padded, padded,
             b.position_grad + r * padded, padded, true);
  }
  for (int64_t x = 1 - rows; x < columns; x += kRows) {
    const int64_t count = at_most(columns - x, kRows);
    const int64_t begin = at_least(0, -(x + count - 1)), end = at_most(rows, columns - x);
    multiply(count, padded, end - begin, grad + x + begin * (kSheared + 1), 1, kSheared + 1,
             b.with_position + begin * padded, padded, table_grad + x * padded, padded, true);
  }
}

void add_rows(int64_t rows, int64_t padded, const float* in, float* out) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < padded; ++i) out[i] += in[r * padded + i];
}

void backward_tile(const ChunkedAttention& a, const PositionStrip& p, int64_t batch, int64_t head, int64_t tile,
                   const BackwardSums& sums, const Buffers& b) {
  const int64_t padded = padded_dim(a.head_dim);
  const Queries q = find_queries(a, batch, tile);
  write_zeros(a, a.grad_query, batch, head, tile, q, b.out);
  if (q.rows == 0) return;

  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.query_length + q.begin - a.query_offset;
  read_queries(a, batch, head, q, b);
  read_frames(a, a.out, batch, head, q.begin - a.query_offset, q.rows, b.out);
  read_frames(a, a.grad, batch, head, q.begin - a.query_offset, q.rows, b.grad);
  for (int64_t r = 0; r < q.rows; ++r) {
    Floats total = splat(0.0f);
    for (int64_t i = 0; i < padded; i += kLanes) total += load(b.out + r * padded + i) * load(b.grad + r * padded + i);
    b.delta[r] = sum(total);
  }
  std::memset(b.content_grad, 0, q.rows * padded * sizeof(float));
  std::memset(b.position_grad, 0, q.rows * padded * sizeof(float));
  for (int64_t first = q.low[0]; first < q.high[q.rows - 1]; first += kTile) {
    const int64_t keys = at_most(q.high[q.rows - 1] - first, kTile), columns = whole_vectors(keys);
    if (a.key_mask && !read_mask(a, batch, first, keys, b)) continue;
    read_keys(a, a.key, batch, head, first, keys, b, b.key);
    transpose(b.key, keys, padded, b.transposed, kTile);
    score(a, p, head, q, first, columns, b);
    read_keys(a, a.value, batch, head, first, keys, b, b.value);
    transpose(b.value, keys, padded, b.transposed, kTile);
    float* grad = b.score_grad + kGuard;
    multiply(q.rows, columns, a.head_dim, b.grad, padded, 1, b.transposed, kTile, grad, kSheared, false);
    (a.key_mask ? weights_and_score_grad<true> : weights_and_score_grad<false>)(q, logsumexp, first, columns, b);

    const auto frame = [&](const Frames& f) { return static_cast<float*>(f.data) + offset_of(f, batch, head, first); };
    multiply(keys, padded, q.rows, b.scores, 1, kTile, b.grad, padded, frame(a.grad_value), a.grad_value.frame_stride,
             true);
    multiply(keys, padded, q.rows, grad, 1, kSheared, b.with_content, padded, frame(a.grad_key),
             a.grad_key.frame_stride, true);
    multiply(q.rows, padded, keys, grad, kSheared, 1, b.key, padded, b.content_grad, padded, true);
    if (a.position) {
      const int64_t column = first - q.begin + p.zero;
      add_position_grads(q.rows, columns, padded, p.by_column + (head * p.width + column) * padded,
                         sums.position + column * padded, b);
    }
  }
  for (int64_t i = 0; i < q.rows * padded; ++i) b.content_grad[i] *= a.scale, b.position_grad[i] *= a.scale;
  add_rows(q.rows, padded, b.content_grad, sums.content_bias);
  add_rows(q.rows, padded, b.position_grad, sums.position_bias);
  for (int64_t i = 0; i < q.rows * padded; ++i) b.content_grad[i] += b.position_grad[i];
  for (int64_t r = 0; r < q.rows; ++r)
    write_frame(a, a.grad_query, batch, head, q.begin + r - a.query_offset, b.content_grad + r * padded);
}

void backward(const ChunkedAttention& a, const PositionStrip& p, int64_t batch, int64_t head, int64_t first_tile,
              int64_t last_tile, const BackwardSums& sums, void* scratch) {
  Arena arena(scratch);
  const Buffers b = divide(a, arena, true);
  const int64_t padded = padded_dim(a.head_dim);
  if (a.position) std::memset(sums.position, 0, p.width * padded * sizeof(float));
  std::memset(sums.content_bias, 0, padded * sizeof(float));
  std::memset(sums.position_bias, 0, padded * sizeof(float));
  std::memset(b.score_grad, 0, (kTile * kSheared + kSheared) * sizeof(float));
  for (int64_t tile = first_tile; tile < last_tile; ++tile) backward_tile(a, p, batch, head, tile, sums, b);
}

}  // namespace

extern const AttentionKernel attention_kernel = {forward_scratch, backward_scratch, forward, backward};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
