// Random projection and nearest code on the CPU: codes[n, g] = argmax_v <norm(x[n]) P[g], C[g, v]>.
#pragma once

#include <cstdint>

#include "common/float_type.h"

namespace bestrq2 {

struct Quantize {
  const void* x;  // (rows, features), any strides, in elements
  Float x_type;
  int64_t rows, features, row_stride, feature_stride;
  const bool* mask;          // (rows) contiguous, or null: every row
  const double* projection;  // (num_codebooks or 1, features, codebook_dim) contiguous
  const float* codebook;     // (num_codebooks or 1, codebook_size, codebook_dim) contiguous
  bool shared_projection, shared_codebook;
  int64_t num_codebooks, codebook_size, codebook_dim;
  bool layer_norm;
  int64_t* out;  // (rows, num_codebooks) contiguous
  int threads;
};

// Fills q.out; rows that the mask leaves out get -1. Returns the first selected row that holds NaN or inf, else -1.
// Throws std::invalid_argument if projection or codebook is not finite.
int64_t quantize(const Quantize& q);

}  // namespace bestrq2
