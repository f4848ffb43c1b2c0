// One block takes kRows rows and one codebook: y is projected into shared memory, then tiles of codes pass through
// shared memory while every thread scores its code against all kRows rows in registers.
//
//   thread t owns the codes t, t + kThreads, ... and for each of the kRows rows its best code and second best score;
//   those of kThreads threads are joined once, at the end.
//
// A row whose second best score is within the bound of the errors is computed once more in double, by the whole block.
#include <cuda_runtime.h>

#include "quantize/cuda_thread.h"

namespace bestrq2 {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 16;
constexpr unsigned kAll = 0xffffffffu;

// kDims: dims rounded up to 8, 16, 32 or 64; the padding is zero.
// Blocks a multiprocessor should hold: left alone, the compiler takes fewer registers and spills some from 16 dims on.
template <int kDims>
__global__ void __launch_bounds__(kThreads, kDims >= 16 ? 3 : 4) search(const QuantizeCuda q) {
  __shared__ __align__(16) float y[kRows][kDims];
  __shared__ float tile[kDims][kThreads + 1];  // one more: the transposed writes fall into different banks
  __shared__ int64_t row_of[kRows];
  __shared__ bool usable[kRows];
  __shared__ Best best_of[kThreads / 32][kRows];
  __shared__ float square[kRows], mean[kRows], margins[kRows];
  __shared__ bool close[kRows];
  __shared__ double exact_y[kDims];
  __shared__ ExactBest exact_of[kThreads / 32];

  const int thread = threadIdx.x;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * kRows;
  const int64_t book = blockIdx.y;
  const float* projection = q.projection + (q.shared_projection ? 0 : book * q.features * q.codebook_dim);
  const float* codebook = q.codebook + (q.shared_codebook ? 0 : book * q.codebook_size * q.codebook_dim);

  const float norm = q.projection_norm[q.shared_projection ? 0 : book];
  const float reach = q.reach[q.shared_codebook ? 0 : book];

  if (thread < kRows) {
    const int64_t row = first_row + thread;
    row_of[thread] = row;
    usable[thread] = row < q.rows && (q.mask == nullptr || q.mask[row]);
  }
  __syncthreads();

  // Projection: one (row, dim) per thread and step.
  const auto row_at = [&](int r) {
    return static_cast<const char*>(q.x) + row_of[r] * q.row_stride * (q.x_type == Float::f32 ? 4 : 2);
  };
  for (int i = thread; i < kRows * kDims; i += kThreads) {
    const int r = i / kDims, k = i % kDims;
    y[r][k] = 0.0f;
    if (usable[r] && k < q.codebook_dim) {
      const Row row(q, row_at(r), 1.0f);
      float of_row;
      y[r][k] = row.project(projection + k, q.codebook_dim, of_row);
      if (k == 0) square[r] = of_row, mean[r] = row.mean;
    }
  }
  __syncthreads();
  if (thread < kRows && usable[thread]) {
    margins[thread] = scale_row(q, row_at(thread), projection, norm, reach, square[thread], mean[thread], y[thread]);
    usable[thread] = margins[thread] >= 0.0f;
  }
  __syncthreads();

  Best best[kRows];
  for (int64_t first_code = 0; first_code < q.codebook_size; first_code += kThreads) {
    __syncthreads();
    const int64_t present = q.codebook_size - first_code < kThreads ? q.codebook_size - first_code : kThreads;
    for (int i = thread; i < kThreads * kDims; i += kThreads) {
      const int code = i / kDims, k = i % kDims;
      tile[k][code] = code < present && k < q.codebook_dim ? codebook[(first_code + code) * q.codebook_dim + k] : 0.0f;
    }
    __syncthreads();
    if (thread >= present) continue;  // every thread meets the barriers above: the trip count is the same for all
    float score[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) score[r] = 0.0f;
#pragma unroll 4
    for (int k = 0; k < kDims; k += 4) {
      const float c0 = tile[k][thread], c1 = tile[k + 1][thread], c2 = tile[k + 2][thread], c3 = tile[k + 3][thread];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const float4 value =
            *reinterpret_cast<const float4*>(&y[r][k]);  // the same address in all lanes: one broadcast
        score[r] = fmaf(value.w, c3, fmaf(value.z, c2, fmaf(value.y, c1, fmaf(value.x, c0, score[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) best[r].see(score[r], static_cast<int32_t>(first_code + thread));
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    for (int offset = 16; offset > 0; offset /= 2)
      best[r].join(__shfl_xor_sync(kAll, best[r].score, offset), __shfl_xor_sync(kAll, best[r].second, offset),
                   __shfl_xor_sync(kAll, best[r].code, offset));
    if (thread % 32 == 0) best_of[thread / 32][r] = best[r];
  }
  __syncthreads();
  if (thread < kRows) {
    Best winner = best_of[0][thread];
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      const Best& other = best_of[warp][thread];
      winner.join(other.score, other.second, other.code);
    }
    close[thread] = usable[thread] && !winner.certain(margins[thread]);
    if (row_of[thread] < q.rows) q.out[row_of[thread] * q.num_codebooks + book] = usable[thread] ? winner.code : -1;
  }
  __syncthreads();

  for (int r = 0; r < kRows; ++r) {  // the same branch for all threads
    if (!close[r]) continue;
    const void* x = row_at(r);
    ExactBest exact;
    if (__syncthreads_or(sounds(q, x, thread, kThreads))) {
      if (thread < q.codebook_dim) exact_y[thread] = ExactRow(q, x).project(projection + thread, q.codebook_dim);
      __syncthreads();
      for (int64_t code = thread; code < q.codebook_size; code += kThreads)
        exact.see(exact_y, codebook, q.codebook_dim, code);
    }
    for (int offset = 16; offset > 0; offset /= 2)
      exact.join(__shfl_xor_sync(kAll, exact.score, offset), __shfl_xor_sync(kAll, exact.code, offset));
    if (thread % 32 == 0) exact_of[thread / 32] = exact;
    __syncthreads();
    if (thread == 0) {
      for (int warp = 1; warp < kThreads / 32; ++warp) exact.join(exact_of[warp].score, exact_of[warp].code);
      q.out[row_of[r] * q.num_codebooks + book] = exact.code;
    }
    __syncthreads();  // exact_y and exact_of belong to the next row
  }
}

}  // namespace

int quantize_cuda(const QuantizeCuda& q) {
  if (q.rows == 0) return cudaSuccess;
  const int64_t blocks = (q.rows + kRows - 1) / kRows;
  if (q.codebook_dim > kQuantizeCudaDims || q.num_codebooks > 65535 || blocks > 2147483647)
    return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(q.num_codebooks));
  const auto stream = static_cast<cudaStream_t>(q.stream);
  if (q.codebook_dim <= 8) {
    search<8><<<grid, kThreads, 0, stream>>>(q);
  } else if (q.codebook_dim <= 16) {
    search<16><<<grid, kThreads, 0, stream>>>(q);
  } else if (q.codebook_dim <= 32) {
    search<32><<<grid, kThreads, 0, stream>>>(q);
  } else {
    search<64><<<grid, kThreads, 0, stream>>>(q);
  }
  return cudaGetLastError();
}

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace bestrq2
