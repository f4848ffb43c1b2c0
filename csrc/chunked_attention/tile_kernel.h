// Interface of each instruction set, called by chunked_attention.cpp. Implemented by tile_kernel.cpp, compiled
// once per set.
#pragma once

#include <cstdint>

#include "chunked_attention/chunked_attention.h"
#include "common/isa.h"

namespace bestrq2 {

constexpr int64_t kTile = 64;  // queries and keys of a tile

// The part of the position table that the window can reach, repacked once per call so that it runs in the direction of
// the keys: column x of the table belongs to key - query = x - zero. Columns beyond the window, which only masked
// scores of a tile's corners touch, are zero.
struct PositionStrip {
  int64_t zero, width;
  const float* by_dim;     // (H, d, width): second operand of query x position
  const float* by_column;  // (H, width, padded_dim): second operand of score gradient x position
};

struct BackwardSums {  // fp32 sums over the queries of one segment, zeroed by the kernel
  float* position;     // (width, padded_dim), columns as in PositionStrip
  float* content_bias;
  float* position_bias;  // (padded_dim)
};

struct AttentionKernel {
  int64_t (*forward_scratch)(const ChunkedAttention& a);   // bytes of 64-byte aligned scratch per thread
  int64_t (*backward_scratch)(const ChunkedAttention& a);  // the same
  // Tile t holds the queries at positions [t * kTile, (t + 1) * kTile).
  void (*forward)(const ChunkedAttention& a, const PositionStrip& p, int64_t batch, int64_t head, int64_t tile,
                  void* scratch);
  void (*backward)(const ChunkedAttention& a, const PositionStrip& p, int64_t batch, int64_t head, int64_t first_tile,
                   int64_t last_tile, const BackwardSums& sums, void* scratch);
};

namespace portable {
extern const AttentionKernel attention_kernel;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const AttentionKernel attention_kernel;
}
namespace avx512 {
extern const AttentionKernel attention_kernel;
}
#endif

}  // namespace bestrq2
