// Parts that the fp32 search (fp32_search.cpp) and the 8-bit one (int8_search.cpp) share: fp32 scores and a bound of
// their errors, double where that bound leaves several codes, and the way from rows to projected rows to codes.
#pragma once

#include "common/arena.h"
#include "common/simd.h"
#include "quantize/projection.h"
#include "quantize/quantize.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int64_t kBlock = 64;  // dims summed in one chain; longer codes add such partial sums

// fp32 sum of y[k] * code(k) for one code (T: float) or a vector of them (Floats).
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

inline double norm_of(const float* y, int64_t dims) {
  double square = 0.0;
  for (int64_t k = 0; k < dims; ++k) square += static_cast<double>(y[k]) * y[k];
  return __builtin_sqrt(square);
}

// Largest error of an fp32 score of a row of this norm with a code of at most norm `reach`, against <y, c> of the row
// before it was rounded to float. With u = 2^-24: u for the row, u for every step of a chain of sums and one more for
// its products where they are rounded, and u for the comparison of two scores, all times |y| |c| (Cauchy-Schwarz); and
// what underflows.
inline double score_error(double norm, double reach, int64_t dims) {
  const double steps = static_cast<double>((dims < kBlock ? dims : kBlock) + dims / kBlock + 4);
  const double error = steps * 0x1p-24 * norm * reach + static_cast<double>(dims) * (0x1p-149 + 0x1p-149 * reach);
  return norm * reach < 1e37 ? error : __builtin_inf();  // beyond, sums may overflow
}

// How far below the best score another one must be to lose for certain: twice the error, and 1 % for the rounding here.
inline float margin_for(double error) { return static_cast<float>(2.02 * error); }

// Codes closer than this, relative to |y| |c|, are a tie in the definition: the lowest wins.
constexpr double kTie = 0x1p-46;

// The code of the definition, in double: the lowest of those with the largest score. Codes are in blocks of kWidth that
// begin `block` floats apart and hold one row of kWidth for each dimension.
template <int kWidth>
int64_t exact_winner(const double* y, const float* codebook, int64_t block, int64_t codes, int64_t dims, double reach) {
  double square = 0.0;
  for (int64_t k = 0; k < dims; ++k) square += y[k] * y[k];
  const double tie = kTie * __builtin_sqrt(square) * reach;
  double best = -__builtin_inf();
  for (int pass = 0; pass < 2; ++pass) {
    const float* block_codes = codebook;
    for (int64_t first = 0; first < codes; first += kWidth, block_codes += block) {
      double score[kWidth] = {};
      for (int64_t k = 0; k < dims; ++k)
        for (int lane = 0; lane < kWidth; ++lane) score[lane] += y[k] * block_codes[k * kWidth + lane];
      for (int lane = 0; lane < kWidth && first + lane < codes; ++lane) {
        if (pass == 1 && score[lane] >= best - tie) return first + lane;
        if (pass == 0 && score[lane] > best) best = score[lane];
      }
    }
  }
  return 0;
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
  // The projection of one row before it is rounded, scaled like it. Uses `values` and `sums`.
  const double* exactly_projected(const double* projections, int64_t book, int64_t row) const {
    const double* projection =
        projections + (q.shared_projection ? 0 : book * packed_projection_size(q.features, q.codebook_dim));
    prepare_row(q, index(row), values);
    sum_products<1>(values, projection, q.features, q.codebook_dim, sums);
    const PowerOfTwo scale(sums, q.codebook_dim);
    for (int64_t k = 0; k < q.codebook_dim; ++k) sums[k] = scale * sums[k];
    return sums;
  }
  int64_t index(int64_t row) const { return rows != nullptr ? rows[row] : first + row; }
  int64_t& code(int64_t book, int64_t row) const { return q.out[index(row) * q.num_codebooks + book]; }
};

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
