// softmax(q k^T scale) v for clips of at most some hundred tokens, whose scores stay in the second cache level: fp32 on
// any processor, or products of bf16 with fp32 sums (AVX-512 BF16 or AMX) and fp32 softmax. Only the log-sum-exp of
// every row is kept for backward.
//
// The layer before may leave its bias to this. That of the keys adds the same to all scores of a row, so it has no
// effect and its gradient is 0; that of the values is added to the result, since weights sum to 1.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace bestrq2 {

struct TokenRows {  // T is the type of the frames; any strides of batch, head and token, channels side by side
  void* data;
  int64_t batch, head, token;

  template <class T>
  T* at(int64_t b, int64_t h) const {
    return static_cast<T*>(data) + b * batch + h * head;
  }
};

struct ShortAttention {
  bool bf16;
  int64_t batch, heads, queries, keys, dim;
  const int64_t* lengths;  // (batch) valid keys, and valid queries where there are as many, or null
  float scale;
  TokenRows query, key, value, out;
  float* logsumexp;                      // (batch, heads, queries), of the scaled scores; bf16: in powers of two
  const float *query_bias, *value_bias;  // (heads, dim) or null
  int threads;

  // Backward only.
  TokenRows grad, grad_query, grad_key, grad_value;
  float* bias_sums;  // (batch, 3, heads, dim): gradients of both and 0 for the keys, of each clip; or null
};

void short_attention_forward(const ShortAttention& a);
void short_attention_backward(const ShortAttention& a);

namespace short_attention {  // compiled for AVX-512 BF16 and AMX

int64_t scratch_bytes(const ShortAttention& a, bool backward);
void forward(const ShortAttention& a, Dot dot, int64_t batch, int64_t head, void* scratch);
void backward(const ShortAttention& a, Dot dot, int64_t batch, int64_t head, void* scratch);

}  // namespace short_attention
}  // namespace bestrq2
