// The blocks and threads of quantize.cu as loops, on CPU memory.
#include "quantize/cuda_thread.h"

namespace bestrq2 {

void quantize_cuda_emulated(const QuantizeCuda& q) {
  constexpr int kThreads = 128;
  const int64_t item_size = q.x_type == Float::f32 ? 4 : 2;
  for (int64_t row = 0; row < q.rows; ++row)
    for (int64_t book = 0; book < q.num_codebooks; ++book) {
      int64_t& out = q.out[row * q.num_codebooks + book];
      out = -1;
      if (q.mask != nullptr && !q.mask[row]) continue;
      const char* x = static_cast<const char*>(q.x) + row * q.row_stride * item_size;
      const float* projection = q.projection + (q.shared_projection ? 0 : book * q.features * q.codebook_dim);
      const float* codebook = q.codebook + (q.shared_codebook ? 0 : book * q.codebook_size * q.codebook_dim);
      float y[kQuantizeCudaDims], square = 0.0f;
      const Row values(q, x, 1.0f);
      for (int64_t k = 0; k < q.codebook_dim; ++k) y[k] = values.project(projection + k, q.codebook_dim, square);
      const float margin = scale_row(q, x, projection, q.projection_norm[q.shared_projection ? 0 : book],
                                     q.reach[q.shared_codebook ? 0 : book], square, values.mean, y);
      if (margin < 0.0f) continue;
      Best winner;
      for (int64_t thread = kThreads - 1; thread >= 0; --thread) {  // joined in an order that is not the codes'
        Best best;
        for (int64_t code = thread; code < q.codebook_size; code += kThreads) {
          float score = 0.0f;
          for (int64_t k = 0; k < q.codebook_dim; ++k) score = fmaf(y[k], codebook[code * q.codebook_dim + k], score);
          best.see(score, static_cast<int32_t>(code));
        }
        winner.join(best.score, best.second, best.code);
      }
      out = winner.code;
      if (winner.certain(margin)) continue;
      ExactBest exact;
      if (sounds(q, x, 0, 1)) {
        double exact_y[kQuantizeCudaDims];
        const ExactRow row_values(q, x);
        for (int64_t k = 0; k < q.codebook_dim; ++k) exact_y[k] = row_values.project(projection + k, q.codebook_dim);
        for (int64_t code = q.codebook_size - 1; code >= 0; --code) exact.see(exact_y, codebook, q.codebook_dim, code);
      }
      out = exact.code;
    }
}

}  // namespace bestrq2
