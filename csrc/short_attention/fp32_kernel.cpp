// The same in fp32, compiled once per instruction set. Products take their left operand with any strides and their
// right one as rows of whole vectors, so queries, weights and score gradients are never transposed, keys and values
// once. Q is queries, K keys, D channels; keys and channels are padded to whole vectors with zeros.
//
// forward    S = q k^T (Q, K) -> P = exp(S scale - max) -> out = P v / sum
// backward   P = exp(S scale - logsumexp); dP = dout v^T; dS = P (dP - sum_j P dP) scale
//            dv = P^T dout, dq = dS k, dk = dS^T q
#include "short_attention/fp32_kernel.h"

#include "chunked_attention/tile_products.h"
#include "common/arena.h"
#include "common/exp.h"

extern "C" float logf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

struct Head {
  int64_t queries, keys, dim;  // valid ones; channels
  int64_t wide_keys, wide_dim;
  float *query, *key, *value, *grad;    // (rows, wide_dim)
  float *key_by_dim, *value_by_dim;     // (wide_dim, wide_keys)
  float *scores, *score_grad, *frames;  // (Q, wide_keys), (Q, wide_keys), (rows, wide_dim)
};

Head divide(const ShortAttention& a, bool backward, Arena& arena) {
  Head h{};
  h.queries = a.queries, h.keys = a.keys, h.dim = a.dim;
  h.wide_keys = whole_vectors(a.keys), h.wide_dim = whole_vectors(a.dim);
  const int64_t longest = h.queries > h.keys ? h.queries : h.keys;
  h.query = arena.take<float>(h.queries * h.wide_dim), h.key = arena.take<float>(h.keys * h.wide_dim);
  h.value = arena.take<float>(h.keys * h.wide_dim), h.key_by_dim = arena.take<float>(h.wide_dim * h.wide_keys);
  h.scores = arena.take<float>(h.queries * h.wide_keys), h.frames = arena.take<float>(longest * h.wide_dim);
  if (!backward) return h;
  h.grad = arena.take<float>(h.queries * h.wide_dim), h.value_by_dim = arena.take<float>(h.wide_dim * h.wide_keys);
  h.score_grad = arena.take<float>(h.queries * h.wide_keys);
  return h;
}

int64_t scratch_bytes(const ShortAttention& a, bool backward) {
  Arena arena{nullptr};
  divide(a, backward, arena);
  return arena.bytes();
}

void read(const TokenRows& from, int64_t batch, int64_t head, int64_t rows, const Head& h, float* out) {
  read_rows(from.at<float>(batch, head), Float::f32, from.token, rows, h.dim, h.wide_dim, out);
}

// Rows behind the valid ones are zeros.
void write(const float* rows, int64_t valid, const TokenRows& to, int64_t batch, int64_t head, int64_t count,
           const Head& h) {
  float* out = to.at<float>(batch, head);
  for (int64_t r = 0; r < count; ++r, out += to.token)
    if (r < valid)
      __builtin_memcpy(out, rows + r * h.wide_dim, h.dim * sizeof(float));
    else
      __builtin_memset(out, 0, h.dim * sizeof(float));
}

// Sizes of this clip, its operands, and S. Returns false if it has no valid key.
bool begin(const ShortAttention& a, int64_t batch, int64_t head, Head& h) {
  if (a.lengths != nullptr) {
    h.keys = at_most(a.keys, a.lengths[batch]);
    if (a.queries == a.keys) h.queries = h.keys;
    h.wide_keys = whole_vectors(h.keys);
  }
  if (h.keys <= 0) return false;
  read(a.query, batch, head, h.queries, h, h.query), read(a.key, batch, head, h.keys, h, h.key);
  read(a.value, batch, head, h.keys, h, h.value);
  transpose(h.key, h.keys, h.wide_dim, h.key_by_dim, h.wide_keys);
  multiply(h.queries, h.wide_keys, h.dim, h.query, h.wide_dim, 1, h.key_by_dim, h.wide_keys, h.scores, h.wide_keys,
           false);
  return true;
}

void forward(const ShortAttention& a, int64_t batch, int64_t head, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, false, arena);
  float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  if (!begin(a, batch, head, h)) {
    for (int64_t r = 0; r < a.queries; ++r) logsumexp[r] = 0;
    write(h.frames, 0, a.out, batch, head, a.queries, h);
    return;
  }
  for (int64_t r = h.queries; r < a.queries; ++r) logsumexp[r] = 0;
  const Floats scale = splat(a.scale);
  const int64_t whole = h.keys / kLanes * kLanes;
  for (int64_t r = 0; r < h.queries; ++r) {
    float* row = h.scores + r * h.wide_keys;
    float most = row[0];
    if (whole > 0) {
      Floats peaks = load(row);
      for (int64_t k = kLanes; k < whole; k += kLanes) peaks = maximum(load(row + k), peaks);
      most = largest(peaks);
    }
    for (int64_t k = whole; k < h.keys; ++k) most = row[k] > most ? row[k] : most;
    most *= a.scale;
    Floats total = splat(0.0f);
    for (int64_t k = 0; k < h.wide_keys; k += kLanes) {
      Floats p = exp_nonpositive(load(row + k) * scale - splat(most));
      if (k + kLanes > h.keys)
        for (int64_t i = h.keys - k; i < kLanes; ++i) p[i] = 0;
      total += p;
      store(row + k, p);
    }
    const float all = sum(total);
    const Floats inverse = splat(1.0f / all);
    for (int64_t k = 0; k < h.wide_keys; k += kLanes) store(row + k, load(row + k) * inverse);
    logsumexp[r] = most + logf(all);
  }
  multiply(h.queries, h.wide_dim, h.keys, h.scores, h.wide_keys, 1, h.value, h.wide_dim, h.frames, h.wide_dim, false);
  write(h.frames, h.queries, a.out, batch, head, a.queries, h);
}

void backward(const ShortAttention& a, int64_t batch, int64_t head, void* scratch) {
  Arena arena{scratch};
  Head h = divide(a, true, arena);
  if (!begin(a, batch, head, h)) {
    write(h.frames, 0, a.grad_query, batch, head, a.queries, h);
    write(h.frames, 0, a.grad_key, batch, head, a.keys, h);
    write(h.frames, 0, a.grad_value, batch, head, a.keys, h);
    return;
  }
  read(a.grad, batch, head, h.queries, h, h.grad);
  transpose(h.value, h.keys, h.wide_dim, h.value_by_dim, h.wide_keys);
  multiply(h.queries, h.wide_keys, h.dim, h.grad, h.wide_dim, 1, h.value_by_dim, h.wide_keys, h.score_grad, h.wide_keys,
           false);
  const float* logsumexp = a.logsumexp + (batch * a.heads + head) * a.queries;
  const Floats scale = splat(a.scale);
  for (int64_t r = 0; r < h.queries; ++r) {
    float *row = h.scores + r * h.wide_keys, *grad = h.score_grad + r * h.wide_keys;
    const Floats base = splat(logsumexp[r]);
    Floats total = splat(0.0f);
    for (int64_t k = 0; k < h.wide_keys; k += kLanes) {
      // Rounding may put a score above its log-sum-exp.
      const Floats x = load(row + k) * scale - base;
      Floats p = exp_nonpositive(x > Floats{} ? Floats{} : x);
      if (k + kLanes > h.keys)
        for (int64_t i = h.keys - k; i < kLanes; ++i) p[i] = 0;
      total = multiply_add(p, load(grad + k), total);
      store(row + k, p);
    }
    const Floats mean = splat(sum(total));
    for (int64_t k = 0; k < h.wide_keys; k += kLanes) store(grad + k, load(row + k) * (load(grad + k) - mean) * scale);
  }
  multiply(h.queries, h.wide_dim, h.keys, h.score_grad, h.wide_keys, 1, h.key, h.wide_dim, h.frames, h.wide_dim, false);
  write(h.frames, h.queries, a.grad_query, batch, head, a.queries, h);
  multiply(h.keys, h.wide_dim, h.queries, h.score_grad, 1, h.wide_keys, h.query, h.wide_dim, h.frames, h.wide_dim,
           false);
  write(h.frames, h.keys, a.grad_key, batch, head, a.keys, h);
  multiply(h.keys, h.wide_dim, h.queries, h.scores, 1, h.wide_keys, h.grad, h.wide_dim, h.frames, h.wide_dim, false);
  write(h.frames, h.keys, a.grad_value, batch, head, a.keys, h);
}

}  // namespace

extern const Fp32ShortAttention fp32_short_attention = {scratch_bytes, forward, backward};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
