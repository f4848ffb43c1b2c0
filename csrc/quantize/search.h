// Parts of the fp32 search (fp32_search.cpp) and the 8-bit one (int8_search.cpp) that must agree: the rounding of a
// score, from which their codes agree bit for bit, and the way from rows to projected rows to codes.
#pragma once

#include "common/arena.h"
#include "common/simd.h"
#include "quantize/projection.h"
#include "quantize/quantize.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int64_t kBlock = 64;  // dims summed in one chain; longer codes add such partial sums

// Sum of y[k] * code(k) with the rounding that every search uses, for one code (T: float) or a vector of them (Floats).
template <class T, class Code>
inline T chained_score(T score, const float* y, int64_t dims, T zero, const Code& code) {
  for (int64_t begin = 0; begin < dims; begin += kBlock) {
    const int64_t end = begin + kBlock < dims ? begin + kBlock : dims;
    T partial = zero;
    for (int64_t k = begin; k < end; ++k) partial = code(y[k], k, partial);
    score = score + partial;
  }
  return score;
}

// A chunk of rows for a search that takes kRows at a time: buffers of the projection, and where rows come from and
// codes go to.
template <int kRows>
struct Chunk {
  const Quantize& q;
  const int64_t* rows;  // numbers of the rows, or null: first, first + 1, ...
  int64_t first, count, padded;
  double *values, *sums;
  float* y;  // (books or 1, padded, dims)

  Chunk(const Quantize& q, const int64_t* rows, int64_t first, int64_t count, Arena& arena)
      : q(q), rows(rows), first(first), count(count), padded(round_up(count, kRows)) {
    values = arena.take<double>(kRows * q.features);
    sums = arena.take<double>(kRows * round_up(q.codebook_dim, kColumns));
    y = arena.take<float>(q.num_codebooks * padded * q.codebook_dim);
  }

  // Fills y; returns the first row that is not finite, or -1.
  int64_t project(const double* projections) const {
    return project_chunk<kRows>(q, projections, rows, first, count, values, sums, y);
  }
  const float* projected(int64_t book, int64_t row) const {
    return y + ((q.shared_projection ? 0 : book * padded) + row) * q.codebook_dim;
  }
  int64_t& code(int64_t book, int64_t row) const {
    return q.out[(rows != nullptr ? rows[row] : first + row) * q.num_codebooks + book];
  }
};

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
