// Interface of each instruction set, called by fp32.cpp. Implemented by fp32_passes.cpp.
//
// Everything is transposed, as in bf16_passes.h: Z^T = W H^T, so the weight is read in its own layout, its gradient is
// written in it, and a vector holds one class of neighbouring rows. Rows are cut into panels of two vectors:
//
//   by_feature  [row panel][feature][row]               the rows, summed over features
//   by_row      [feature panel][row of the chunk][feature]   the rows, summed over rows
//   logits      [row panel][class][row]                 logits, then exponentials, then their gradients dz
//   grad_T      [row panel][feature][row]               gradient of the rows
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "masked_cross_entropy/masked_cross_entropy.h"

namespace bestrq2 {

// One chunk of rows and one codebook.
struct Fp32Chunk {
  const MaskedCrossEntropy* call;  // its arrays are those of the codebook
  int64_t first, rows;             // of the masked rows
  bool keep;                       // whether gradients follow
  bool first_chunk, first_codebook, last_codebook;
  float *by_feature, *by_row, *logits, *grad_T;
  int64_t logits_stride;  // between row panels
};

struct Fp32Passes {
  int64_t panel;                              // rows of a row panel, features of a feature panel
  int64_t tile;                               // classes or features computed at a time
  int64_t (*scratch_size)(int64_t features);  // floats, per thread
  void (*pack_rows)(const Fp32Chunk& c, int64_t row_panel);
  // Logits of the classes [first, last), of which `first` is a multiple of `tile`, for all rows.
  void (*logits)(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch);
  // Losses, accuracy and dz of one panel of rows.
  void (*softmax)(const Fp32Chunk& c, int64_t row_panel);
  // Gradient of the row panels [first, last), written in the end of the last codebook.
  void (*hidden_gradient)(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch);
  // Gradients of weight and bias of the classes [first, last), of which `first` is a multiple of `tile`.
  void (*class_gradients)(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch);
};

namespace portable {
extern const Fp32Passes fp32_passes;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const Fp32Passes fp32_passes;
}
namespace avx512 {
extern const Fp32Passes fp32_passes;
}
#endif

}  // namespace bestrq2
