#include "optimizer/optimizer.h"

#include <algorithm>
#include <cmath>

#include "common/isa.h"
#include "common/parallel.h"
#include "optimizer/kernel.h"

namespace bestrq2 {
namespace {

constexpr int64_t kPiece = 1 << 16;  // elements of a task

const OptimizerKernel& kernel() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::optimizer_kernel;
  if (best_isa() == Isa::avx2) return avx2::optimizer_kernel;
#endif
  return portable::optimizer_kernel;
}

// run(number of the piece, tensor, first, last) for all pieces of all tensors; returns how many there are.
template <class T, class Run>
void every_piece(const std::vector<T>& tensors, int threads, Run run) {
  std::vector<int64_t> ends;  // pieces up to and with each tensor
  int64_t pieces = 0;
  for (const T& tensor : tensors) ends.push_back(pieces += (tensor.size + kPiece - 1) / kPiece);
  parallel_for(pieces, threads, [&](int64_t piece, int) {
    const auto which = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), piece) - ends.begin());
    const int64_t first = (piece - (which > 0 ? ends[which - 1] : 0)) * kPiece;
    run(piece, tensors[which], first, std::min(first + kPiece, tensors[which].size));
  });
}

}  // namespace

void adamw(const std::vector<AdamTensor>& tensors, const AdamSettings& settings) {
  every_piece(tensors, settings.threads, [&](int64_t, const AdamTensor& tensor, int64_t first, int64_t last) {
    kernel().adamw(tensor, settings, first, last);
  });
}

double norm_of(const std::vector<GradTensor>& tensors, int threads) {
  int64_t pieces = 0;
  for (const GradTensor& tensor : tensors) pieces += (tensor.size + kPiece - 1) / kPiece;
  std::vector<double> sums(static_cast<size_t>(pieces));
  every_piece(tensors, threads, [&](int64_t piece, const GradTensor& tensor, int64_t first, int64_t last) {
    sums[static_cast<size_t>(piece)] = kernel().sum_of_squares(tensor, first, last);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace bestrq2
