// The same in fp32, compiled once per instruction set. Products take their left operand with any strides and their
// right one as rows of whole vectors, so queries, weights and score gradients are never transposed, keys and values
// once. Q is queries, K keys, D channels; keys and channels are padded to whole vectors with zeros.
//
// forward    S = q k^T (Q, K) -> P = exp(S scale - max) -> out = P v / sum + value_bias
// backward   P = exp(S scale - logsumexp); dP = dout v^T; dS = P (dP - sum_j P dP) scale
//            dv = P^T dout, dq = dS k, dk = dS^T q
//
// q is the query with its bias. Some rows of scores at a time, so that they stay in the first cache level between the
// passes over them. The frames of a head are short pieces of long rows, which no processor fetches ahead by itself: the
// products do it, for the results of their own head and for the operands of the next.
#include "short_attention/fp32_kernel.h"

#include "chunked_attention/tile_products.h"
#include "common/arena.h"
#include "common/exp.h"

extern "C" float logf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int64_t kStripe = 4 * kRows;  // rows of scores at a time

struct Head {
  int64_t queries, keys, dim;  // valid ones; channels
  int64_t wide_keys, wide_dim;
  float *query, *key, *value, *grad;    // (rows, wide_dim)
  float *key_by_dim, *value_by_dim;     // (wide_dim, wide_keys)
  float *scores, *score_grad, *frames;  // forward (kStripe, wide_keys), backward (Q, wide_keys); (rows, wide_dim)
};

Head divide(const ShortAttention& a, bool backward, Arena& arena) {
  Head h{};
  h.queries = a.queries, h.keys = a.keys, h.dim = a.dim;
  h.wide_keys = whole_vectors(a.keys), h.wide_dim = whole_vectors(a.dim);
  const int64_t longest = h.queries > h.keys ? h.queries : h.keys;
  h.query = arena.take<float>(h.queries * h.wide_dim), h.key_by_dim = arena.take<float>(h.wide_dim * h.wide_keys);
  h.frames = arena.take<float>(longest * h.wide_dim);
  if (!backward) {
    h.value = arena.take<float>(h.keys * h.wide_dim);
    h.scores = arena.take<float>(at_most(h.queries, kStripe) * h.wide_keys);
    return h;
  }
  h.key = arena.take<float>(h.keys * h.wide_dim), h.grad = arena.take<float>(h.queries * h.wide_dim);
  h.value_by_dim = arena.take<float>(h.wide_dim * h.wide_keys);
  h.scores = arena.take<float>(h.queries * h.wide_keys), h.score_grad = arena.take<float>(h.queries * h.wide_keys);
  return h;
}

int64_t scratch_bytes(const ShortAttention& a, bool backward) {
  Arena arena{nullptr};
  divide(a, backward, arena);
  return arena.bytes();
}

// Brings rows to the second cache level, a few at a time.
class Ahead {
 public:
  explicit Ahead(int64_t dim) : bytes_(dim * static_cast<int64_t>(sizeof(float))) {}

  void add(const TokenRows& rows, int64_t batch, int64_t head, int64_t count) {
    parts_[number_++] = {reinterpret_cast<const char*>(rows.at<float>(batch, head)),
                         rows.token * static_cast<int64_t>(sizeof(float)), count};
    left_ += count;
  }
  // Cuts the rows into shares for so many calls of next().
  void divide(int64_t calls) { share_ = (left_ + calls - 1) / (calls > 0 ? calls : 1); }

  void next() {
    for (int64_t i = 0; i < share_ && part_ < number_; ++i) {
      Part& part = parts_[part_];
      for (int64_t at = 0; at < bytes_; at += 64) __builtin_prefetch(part.row + at, 0, 2);
      part.row += part.step;
      if (--part.rows <= 0) ++part_;
    }
  }

 private:
  struct Part {
    const char* row;
    int64_t step, rows;
  };
  Part parts_[8];
  int64_t bytes_, number_ = 0, part_ = 0, left_ = 0, share_ = 0;
};

int64_t blocks(int64_t rows, int64_t columns) {
  return (rows + kRows - 1) / kRows * ((columns + kVectors * kLanes - 1) / (kVectors * kLanes));
}

// c = a x b, see block().
void product(Ahead& ahead, int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
             const float* b, int64_t b_depth, float* c, int64_t c_row) {
  for (int64_t v = 0; v < columns; v += kVectors * kLanes) {
    const int64_t vectors = at_most((columns - v) / kLanes, kVectors);
    for (int64_t r = 0; r < rows; r += kRows) {
      pick_block<kRows, kVectors>(at_most(rows - r, kRows), vectors, depth, a + r * a_row, a_row, a_depth, b + v,
                                  b_depth, c + r * c_row + v, c_row, false);
      ahead.next();
    }
  }
}

float total(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  return sum(v);
#endif
}

float peak(Floats v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  return largest(v);
#endif
}

void read(const TokenRows& from, int64_t batch, int64_t head, int64_t rows, const float* bias, const Head& h,
          float* out) {
  read_rows(from.at<float>(batch, head), Float::f32, from.token, rows, h.dim, h.wide_dim, out);
  if (bias == nullptr) return;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < h.dim; ++d) out[r * h.wide_dim + d] += bias[head * h.dim + d];
}

// Rows of one head in memory, or their padded copy where channels are no whole vectors.
struct Target {
  float* rows;
  int64_t row;
};

Target target(const TokenRows& to, int64_t batch, int64_t head, int64_t first, const Head& h) {
  if (h.dim == h.wide_dim) return {to.at<float>(batch, head) + first * to.token, to.token};
  return {h.frames + first * h.wide_dim, h.wide_dim};
}

// Ends the rows from `first` on that were computed at target(); those behind the valid ones are zeros.
void finish(const TokenRows& to, int64_t batch, int64_t head, int64_t first, int64_t valid, int64_t count,
            const Head& h) {
  for (int64_t r = first; r < count; ++r) {
    float* out = to.at<float>(batch, head) + r * to.token;
    if (r >= valid)
      __builtin_memset(out, 0, h.dim * sizeof(float));
    else if (h.dim != h.wide_dim)
      __builtin_memcpy(out, h.frames + r * h.wide_dim, h.dim * sizeof(float));
  }
}

// sums[d] = the sum of these rows.
void sum_columns(const float* rows, int64_t row, int64_t count, int64_t dim, float* sums) {
  for (int64_t d = 0; d < dim; ++d) sums[d] = 0;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < dim; ++d) sums[d] += rows[r * row + d];
}

// Sizes of this clip. Returns false if it has no valid key.
bool count_valid(const ShortAttention& a, int64_t batch, Head& h) {
  if (a.lengths != nullptr) {
    h.keys = at_most(a.keys, a.lengths[batch]);
    if (a.queries == a.keys) h.queries = h.keys;
    h.wide_keys = whole_vectors(h.keys);
  }
  return h.keys > 0;
}

// Weights of one row, not yet divided by their sum, in the place of its scores; returns the sum.
float softmax_row(float* row, const Head& h, float scale, float* logsumexp) {
  const int64_t whole = h.keys / kLanes * kLanes;
  float most = row[0];
  if (whole > 0) {
    Floats peaks = load(row);
    for (int64_t k = kLanes; k < whole; k += kLanes) peaks = maximum(load(row + k), peaks);
    most = peak(peaks);
  }
  for (int64_t k = whole; k < h.keys; ++k) most = row[k] > most ? row[k] : most;
  most *= scale;
  const Floats factor = splat(scale), base = splat(most);
  Floats sums = splat(0.0f);
  for (int64_t k = 0; k < h.wide_keys; k += kLanes) {
    Floats p = exp_nonpositive(load(row + k) * factor - base);
    if (k + kLanes > h.keys)
      for (int64_t i = h.keys - k; i < kLanes; ++i) p[i] = 0;
    sums += p;
    store(row + k, p);
  }
  const float all = total(sums);
  *logsumexp = most + logf(all);
  return all;
}

void forward(const ShortAttention& a, int64_t batch, int64_t head, int64_t next, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, false, arena);
  float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  const bool any = count_valid(a, batch, h);
  for (int64_t r = any ? h.queries : 0; r < a.queries; ++r) logsumexp[r] = 0;
  if (!any) return finish(a.out, batch, head, 0, 0, a.queries, h);
  Ahead ahead(h.dim);
  ahead.add(a.out, batch, head, h.queries);
  if (next >= 0) {
    ahead.add(a.key, next / a.heads, next % a.heads, a.keys),
        ahead.add(a.value, next / a.heads, next % a.heads, a.keys);
    ahead.add(a.query, next / a.heads, next % a.heads, a.queries);
  }
  ahead.divide(blocks(h.queries, h.wide_keys) + blocks(h.queries, h.wide_dim));
  read(a.key, batch, head, h.keys, nullptr, h, h.value);
  transpose(h.value, h.keys, h.wide_dim, h.key_by_dim, h.wide_keys);
  read(a.value, batch, head, h.keys, nullptr, h, h.value);
  read(a.query, batch, head, h.queries, a.query_bias, h, h.query);
  const float* bias = a.value_bias != nullptr ? a.value_bias + head * h.dim : nullptr;
  for (int64_t first = 0; first < h.queries; first += kStripe) {
    const int64_t rows = at_most(h.queries - first, kStripe);
    product(ahead, rows, h.wide_keys, h.dim, h.query + first * h.wide_dim, h.wide_dim, 1, h.key_by_dim, h.wide_keys,
            h.scores, h.wide_keys);
    float sums[kStripe];
    for (int64_t r = 0; r < rows; ++r)
      sums[r] = softmax_row(h.scores + r * h.wide_keys, h, a.scale, logsumexp + first + r);
    const Target out = target(a.out, batch, head, first, h);
    product(ahead, rows, h.wide_dim, h.keys, h.scores, h.wide_keys, 1, h.value, h.wide_dim, out.rows, out.row);
    for (int64_t r = 0; r < rows; ++r) {
      const float inverse = 1.0f / sums[r];
      float* row = out.rows + r * out.row;
      if (bias != nullptr)
        for (int64_t d = 0; d < h.dim; ++d) row[d] = row[d] * inverse + bias[d];
      else
        for (int64_t d = 0; d < h.dim; ++d) row[d] *= inverse;
    }
  }
  finish(a.out, batch, head, 0, h.queries, a.queries, h);
}

// P and dS of one row, in the places of its scores and of dP.
void softmax_gradient_row(float* row, float* grad, const Head& h, float scale, float logsumexp) {
  const Floats factor = splat(scale), base = splat(logsumexp);
  Floats along = splat(0.0f);
  for (int64_t k = 0; k < h.wide_keys; k += kLanes) {
    // Rounding may put a score above its log-sum-exp.
    const Floats x = load(row + k) * factor - base;
    Floats p = exp_nonpositive(x > Floats{} ? Floats{} : x);
    if (k + kLanes > h.keys)
      for (int64_t i = h.keys - k; i < kLanes; ++i) p[i] = 0;
    along = multiply_add(p, load(grad + k), along);
    store(row + k, p);
  }
  const Floats mean = splat(total(along));
  for (int64_t k = 0; k < h.wide_keys; k += kLanes) store(grad + k, load(row + k) * (load(grad + k) - mean) * factor);
}

void backward(const ShortAttention& a, int64_t batch, int64_t head, int64_t next, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, true, arena);
  const bool any = count_valid(a, batch, h);
  Ahead ahead(h.dim);
  if (any) {
    ahead.add(a.grad_query, batch, head, h.queries);
    ahead.add(a.grad_key, batch, head, h.keys), ahead.add(a.grad_value, batch, head, h.keys);
    if (next >= 0) {
      const int64_t b = next / a.heads, i = next % a.heads;
      ahead.add(a.key, b, i, a.keys), ahead.add(a.value, b, i, a.keys);
      ahead.add(a.query, b, i, a.queries), ahead.add(a.grad, b, i, a.queries);
    }
    ahead.divide(2 * blocks(h.queries, h.wide_keys) + blocks(h.queries, h.wide_dim) + 2 * blocks(h.keys, h.wide_dim));
    read(a.value, batch, head, h.keys, nullptr, h, h.key);
    transpose(h.key, h.keys, h.wide_dim, h.value_by_dim, h.wide_keys);
    read(a.key, batch, head, h.keys, nullptr, h, h.key);
    transpose(h.key, h.keys, h.wide_dim, h.key_by_dim, h.wide_keys);
    read(a.query, batch, head, h.queries, a.query_bias, h, h.query);
    read(a.grad, batch, head, h.queries, nullptr, h, h.grad);
    const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
    for (int64_t first = 0; first < h.queries; first += kStripe) {
      const int64_t rows = at_most(h.queries - first, kStripe);
      float *scores = h.scores + first * h.wide_keys, *score_grad = h.score_grad + first * h.wide_keys;
      product(ahead, rows, h.wide_keys, h.dim, h.query + first * h.wide_dim, h.wide_dim, 1, h.key_by_dim, h.wide_keys,
              scores, h.wide_keys);
      product(ahead, rows, h.wide_keys, h.dim, h.grad + first * h.wide_dim, h.wide_dim, 1, h.value_by_dim, h.wide_keys,
              score_grad, h.wide_keys);
      for (int64_t r = 0; r < rows; ++r)
        softmax_gradient_row(scores + r * h.wide_keys, score_grad + r * h.wide_keys, h, a.scale, logsumexp[first + r]);
      const Target out = target(a.grad_query, batch, head, first, h);
      product(ahead, rows, h.wide_dim, h.keys, score_grad, h.wide_keys, 1, h.key, h.wide_dim, out.rows, out.row);
    }
  } else {
    h.queries = 0;
  }
  finish(a.grad_query, batch, head, 0, h.queries, a.queries, h);
  if (a.bias_sums != nullptr) {
    // The bias of the keys adds the same to all scores of a row, which has no effect. That of the values is added to
    // out.
    const int64_t width = a.heads * h.dim;
    float* sums = a.bias_sums + batch * 3 * width + head * h.dim;
    sum_columns(a.grad_query.at<float>(batch, head), a.grad_query.token, h.queries, h.dim, sums);
    __builtin_memset(sums + width, 0, h.dim * sizeof(float));
    sum_columns(h.grad, h.wide_dim, h.queries, h.dim, sums + 2 * width);
  }
  // The left operand is a transpose: one float of every row of P or dS for each of a block's rows.
  const auto of_keys = [&](const float* left, const float* right, const TokenRows& to) {
    const Target out = target(to, batch, head, 0, h);
    if (any) product(ahead, h.keys, h.wide_dim, h.queries, left, 1, h.wide_keys, right, h.wide_dim, out.rows, out.row);
    finish(to, batch, head, 0, any ? h.keys : 0, a.keys, h);
  };
  of_keys(h.score_grad, h.query, a.grad_key);
  of_keys(h.scores, h.grad, a.grad_value);
}

}  // namespace

extern const Fp32ShortAttention fp32_short_attention = {scratch_bytes, forward, backward};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
