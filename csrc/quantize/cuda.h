// Random projection and nearest code on the GPU, in fp32 FMAs without matrix units, and in double for the rows whose
// two best codes the rounding of fp32 could exchange.
#pragma once

#include <cstdint>

#include "quantize/quantize.h"

namespace bestrq2 {

struct QuantizeCuda {
  const void* x;  // (rows, features), any strides, in elements; not f64
  Float x_type;
  int64_t rows, features, row_stride, feature_stride;
  const bool* mask;              // (rows) contiguous, or null: every row
  const float* projection;       // (num_codebooks or 1, features, codebook_dim) contiguous
  const float* codebook;         // (num_codebooks or 1, codebook_size, codebook_dim) contiguous
  const float* projection_norm;  // (num_codebooks or 1): at least the Frobenius norm of each projection
  const float* reach;            // (num_codebooks or 1): at least the norm of the longest code of each codebook
  bool shared_projection, shared_codebook;
  int64_t num_codebooks, codebook_size, codebook_dim;
  bool layer_norm;
  int64_t* out;  // (rows, num_codebooks); rows that are masked out or not finite get -1
  void* stream;
};

// Queues the kernel on q.stream. Returns a cudaError_t; codebook_dim must be at most kQuantizeCudaDims.
constexpr int64_t kQuantizeCudaDims = 64;
int quantize_cuda(const QuantizeCuda& q);
const char* cuda_error_text(int error);

// The arithmetic of one kernel thread run on the CPU, row by row, with the same order of operations: what tests compare
// with the reference on machines without a GPU. Same arguments, CPU memory.
void quantize_cuda_emulated(const QuantizeCuda& q);

}  // namespace bestrq2
