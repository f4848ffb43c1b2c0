// Interface of the file that is compiled for AVX-512 BF16 and AMX, called by bf16.cpp.
//
// Matrices are cut into panels of 32 rows or columns and steps of 32 along the summed axis, so that one layout serves
// both instruction sets (u16: the bits of a bf16):
//
//   A panel: [step][32 rows][32 k] u16     B panel: [step][16 pairs of k][32 columns][2] u16     C block: [32][32] fp32
#pragma once

#include "common/isa.h"
#include "masked_cross_entropy/masked_cross_entropy.h"

namespace bestrq2 {
namespace panel {

using u16 = uint16_t;

constexpr int64_t kPanel = 32;
constexpr int64_t kStep = kPanel * kPanel;  // values of a step of a panel, and of a block
constexpr int64_t kClassPanels = 8;         // at most, of one task of gradients(): they share the rows in the L2 cache
constexpr int64_t kFeaturePanels = 8;       // of the rows in the L2 cache at a time

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// One chunk of rows and one codebook. P, Q and S are its panels of rows, and those of all classes and features.
struct Chunk {
  const MaskedCrossEntropy* call;  // its arrays are those of the codebook
  Dot dot;
  int64_t first, rows;  // of the masked rows
  bool keep;            // whether gradients follow, so that exponentials have to be kept
  bool first_chunk, last_chunk;
  bool first_codebook, last_codebook;
  u16* by_feature;   // [P] B panels, summed over features: the rows
  u16* by_row;       // [S] B panels, summed over rows: the rows
  u16* buffer;       // [Q][P][32 classes][32 rows]: exponentials, then dz: steps of B panels summed over classes
  float* stats;      // [Q][P][3][32]: maximum, sum of exponentials, sum of differences from the maximum
  float* row_stats;  // [kRowStats][P*32]
  int64_t* entries;  // rows of the chunk in the order of their targets' panels
  int64_t* bounds;   // (Q+1) first entry of each panel of classes
  u16* transposed;   // [S] A panels of one group of classes, summed over classes: the weight
  float* grad_T;     // [P][S] C blocks: gradient of the rows, transposed, summed over codebooks
  float* total;      // (V, D) fp32 sum of the weight gradients of earlier chunks, or null
};

enum RowStat { kMaximum, kAtTarget, kEarlier, kFactor, kUniform, kGradientAtTarget, kRowStats };

int64_t scratch_size(const MaskedCrossEntropy& f, int64_t rows);  // floats, per thread
void pack_rows(const Chunk& c, int64_t row_panel);
// Logits of one panel of classes for row panels [begin, end): exponentials and their statistics.
void logits(const Chunk& c, int64_t class_panel, int64_t begin, int64_t end, float* scratch);
// Losses, accuracy and what gradients need, for one panel of rows.
void losses(const Chunk& c, int64_t row_panel);
// dz of the panels of classes [first, last), at most kClassPanels, the gradient of their weights, and their part of
// `transposed`, from `slot` of `slots` on.
void gradients(const Chunk& c, int64_t first, int64_t last, int64_t slot, int64_t slots, float* scratch);
// Gradient of the row panels [first, last): adds the panels of classes [begin, end) that `transposed` holds, and writes
// it in the end.
void hidden_gradient(const Chunk& c, int64_t first, int64_t last, int64_t begin, int64_t end, bool write,
                     float* scratch);

}  // namespace panel
}  // namespace bestrq2
