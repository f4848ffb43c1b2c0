// Offsets, tiles and segments of a call, the same for every kernel and any number of threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "chunked_attention/tile_kernel.h"

namespace bestrq2 {

// A tile's corners reach this far beyond the window: its other queries, its other keys, one more vector and stripe.
constexpr int64_t kMargin = 2 * kTile + 48;
// Shortest stretch of queries whose key gradients one task sums; sets how many partial position gradients there are.
constexpr int64_t kShortestSegment = 1024;

// Bounds of query position - key over all visible pairs, as ChunkLayout.offsets in Python.
inline int64_t lowest_offset(const ChunkedAttention& a) {
  return std::max(a.query_offset - a.key_length + 1, 1 - a.chunk_size - a.right_context);
}

inline int64_t highest_offset(const ChunkedAttention& a) {
  return std::min(a.query_offset + a.query_length - 1, a.chunk_size - 1 + a.left_context);
}

struct QueryTiles {
  int64_t first, last;
  explicit QueryTiles(const ChunkedAttention& a)
      : first(a.query_offset / kTile), last((a.query_offset + a.query_length + kTile - 1) / kTile) {}
};

// Queries are cut into segments, the same ones for any number of threads. A segment is longer than the reach of a
// window, so segments 0, 2, 4, ... add to disjoint rows of grad_key and grad_value, and so do 1, 3, 5, ...: two
// parallel passes give every row its additions in a fixed order, with no atomics and no second buffer.
inline int64_t tiles_per_segment(const ChunkedAttention& a) {
  const int64_t reach = a.left_context + a.right_context + 2 * a.chunk_size;
  const int64_t longest = a.query_length + kTile;
  return (std::min(longest, std::max(2 * std::min(reach, longest), kShortestSegment)) + kTile - 1) / kTile;
}

}  // namespace bestrq2
