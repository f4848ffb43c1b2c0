// Chunked attention whose matrix products take bf16 operands (AVX-512 BF16 or AMX); scores, softmax and sums are fp32.
// Interface of the file that is compiled for these instruction sets, called by bf16.cpp.
//
// `dim` is the head size padded to 32. A "pairs" layout is a right operand of bf16_products.h: [pairs][columns][2].
#pragma once

#include "chunked_attention/chunked_attention.h"
#include "chunked_attention/tile_kernel.h"
#include "common/isa.h"

namespace bestrq2 {
namespace attention_bf16 {

using u16 = uint16_t;  // the bits of a bf16

struct Call {
  const ChunkedAttention* a;
  Dot dot;
  bool backward;
  int64_t dim;

  // Position table in the direction of the keys, as PositionStrip in tile_kernel.h.
  int64_t zero, width;
  u16* position_by_dim;     // (H)[dim / 2][width][2]: query x position
  u16* position_by_column;  // (H)[width / 2][dim][2]: score gradient x position; backward only

  // Keys and values in tiles of 64, those that any query reaches; zero where padded or masked.
  int64_t first_tile, last_tile;
  u16* key_by_dim;    // (B, H, tiles)[dim / 2][64][2]: query x key
  u16* key_by_key;    // [32][dim][2]: score gradient x key; backward only
  u16* value_by_dim;  // [dim / 2][64][2]: gradient x value; backward only
  u16* value_by_key;  // [32][dim][2]: weights x value; forward only
  float* grad_key;    // [dim][64], without the scale; backward only
  float* grad_value;

  int64_t key_tile(int64_t batch, int64_t head, int64_t tile) const {
    return ((batch * a->heads + head) * (last_tile - first_tile) + tile - first_tile) * dim * kTile;
  }
};

struct Sums {           // over the queries of one segment, zeroed by the kernel
  float* position;      // [dim][width], without the scale
  float* content_bias;  // [dim]
  float* position_bias;
};

int64_t scratch_bytes(const Call& c);
void pack_position(const Call& c, int64_t head);
void pack_keys(const Call& c, int64_t batch, int64_t head, int64_t tile);
// Tile t holds the queries at positions [t * kTile, (t + 1) * kTile).
void forward(const Call& c, int64_t batch, int64_t head, int64_t tile, void* scratch);
void backward(const Call& c, int64_t batch, int64_t head, int64_t first_tile, int64_t last_tile, const Sums& sums,
              void* scratch);
// Gradients of the keys and values of a tile, rounded to bf16.
void write_key_grads(const Call& c, int64_t batch, int64_t head, int64_t tile);
// grad_position of a head = the partial sums, `count` of them `stride` apart, in their order.
void write_position_grad(const Call& c, int64_t head, const float* const* partials, int64_t count);

}  // namespace attention_bf16
}  // namespace bestrq2
