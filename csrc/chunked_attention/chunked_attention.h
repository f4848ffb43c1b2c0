// Chunked attention with Transformer-XL relative positions on the CPU, in tiles: nothing of size Tq x Tk is stored.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace bestrq2 {

// (B, H, T, d) with unit stride in d, in elements; data is null where the tensor is absent.
struct Frames {
  void* data;
  int64_t batch_stride, head_stride, frame_stride;
};

struct ChunkedAttention {
  Float type;  // of query, key, value, out, grad and grad_query
  int64_t batch, heads, query_length, key_length, head_dim;
  Frames query, key, value, out;
  float* logsumexp;  // (B, H, Tq) contiguous

  // Multiply in bf16 (AVX-512 BF16 or AMX) with fp32 sums: needs type bf16 and a best_dot() other than none.
  bool bf16_products;

  // Contiguous, or null.
  const void* position;        // (H, table_rows, d), bf16 with bf16_products, otherwise fp32; the others are fp32
  const float* content_bias;   // (H, d)
  const float* position_bias;  // (H, d)
  int64_t table_rows, position_zero;

  const int64_t* lengths;   // (B), or null: nothing is padded
  const int64_t* starts;    // (B), or null
  const uint8_t* key_mask;  // (B, Tk), 1 where a key is visible; or null

  int64_t chunk_size, left_context, right_context;  // kUnlimited for None
  int64_t query_offset;
  float scale;
  int threads;

  // Backward only. grad_key and grad_value are of the same type with bf16_products; otherwise they are fp32, zeroed,
  // with frames of padded_dim(head_dim) elements to write to. The last three are contiguous, shaped and typed like
  // their inputs, zeroed, or null where those are null.
  Frames grad, grad_query, grad_key, grad_value;
  void* grad_position;
  float *grad_content_bias, *grad_position_bias;
};

constexpr int64_t kUnlimited = int64_t{1} << 40;

// Elements per frame in the tiles: whole vectors of every instruction set.
inline int64_t padded_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Fills out and logsumexp (of the scaled scores; 0 for rows that see nothing, whose out is 0).
void chunked_attention_forward(const ChunkedAttention& a);

// Fills every gradient. Bit-deterministic for any number of threads.
void chunked_attention_backward(const ChunkedAttention& a);

// The same with bf16_products; the two above call them.
void chunked_attention_forward_bf16(const ChunkedAttention& a);
void chunked_attention_backward_bf16(const ChunkedAttention& a);

}  // namespace bestrq2
