// Windows of the queries of a tile. Included by the files that are compiled once per instruction set.
#pragma once

#include <cstdint>

#include "chunked_attention/tile_kernel.h"
#include "common/integers.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

// The queries of a tile that see something, and what they see. Windows of later rows never begin or end earlier.
struct Queries {
  int64_t begin, end;  // positions of rows 0 and `rows`
  int64_t rows;
  int64_t low[kTile], high[kTile];  // visible keys of each row: [low, high)
};

inline Queries find_queries(const ChunkedAttention& a, int64_t batch, int64_t tile) {
  const int64_t first_key = a.starts ? at_least(a.starts[batch], 0) : 0;
  const int64_t last_key = a.lengths ? at_most(a.lengths[batch], a.key_length) : a.key_length;
  int64_t begin = at_least(tile * kTile, a.query_offset);
  int64_t end = at_most((tile + 1) * kTile, a.query_offset + a.query_length);
  if (a.starts) begin = at_least(begin, a.starts[batch]);
  if (a.lengths) end = at_most(end, a.lengths[batch]);
  Queries q{begin, begin, 0, {}, {}};
  for (int64_t position = begin; position < end; ++position) {
    const int64_t chunk_begin = position / a.chunk_size * a.chunk_size;
    const int64_t low = at_least(first_key, chunk_begin - a.left_context);
    const int64_t high = at_most(last_key, chunk_begin + a.chunk_size + a.right_context);
    if (low >= high) continue;
    if (q.rows == 0) q.begin = position;
    q.low[q.rows] = low;
    q.high[q.rows] = high;
    ++q.rows;
  }
  q.end = q.begin + q.rows;
  return q;
}

// Bounds of a row's window within a tile, clamped so that they fit the vector comparison.
inline int64_t within(int64_t key, int64_t first_key) { return at_most(at_least(key - first_key, 0), kTile); }

inline int64_t offset_of(const Frames& f, int64_t batch, int64_t head, int64_t frame) {
  return batch * f.batch_stride + head * f.head_stride + frame * f.frame_stride;
}

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
