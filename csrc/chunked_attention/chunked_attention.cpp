// Order of the tiles with fp32 products: position table and scratch memory, tiles of queries in parallel, sums.
#include "chunked_attention/chunked_attention.h"

#include <algorithm>
#include <vector>

#include "chunked_attention/segments.h"
#include "chunked_attention/tile_kernel.h"
#include "common/isa.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace bestrq2 {
namespace {

const AttentionKernel& kernel() {
#ifdef BESTRQ2_X86
  if (best_isa() == Isa::avx512) return avx512::attention_kernel;
  if (best_isa() == Isa::avx2) return avx2::attention_kernel;
#endif
  return portable::attention_kernel;
}

struct Strip {
  PositionStrip view{};
  Buffer<float> by_dim, by_column;
};

// Rows of the table, in the direction of the keys and with zeros around them.
Strip make_strip(const ChunkedAttention& a, bool backward) {
  Strip strip;
  if (a.position == nullptr) return strip;
  const int64_t lowest = lowest_offset(a), highest = highest_offset(a);
  const int64_t dim = a.head_dim, padded = padded_dim(dim);
  const int64_t zero = std::max(lowest, highest) + kMargin;  // lowest > highest: nothing is visible
  int64_t width = (zero - lowest + kMargin + 16) / 16 * 16;
  if (width % 256 == 0) width += 16;  // rows a power of two apart would share cache sets
  strip.by_dim = allocate<float>(a.heads * dim * width);
  if (backward) strip.by_column = allocate<float>(a.heads * width * padded);
  parallel_for(a.heads, a.threads, [&](int64_t head, int) {
    float* by_dim = strip.by_dim.get() + head * dim * width;
    float* by_column = backward ? strip.by_column.get() + head * width * padded : nullptr;
    std::fill(by_dim, by_dim + dim * width, 0.0f);
    if (backward) std::fill(by_column, by_column + width * padded, 0.0f);
    for (int64_t offset = lowest; offset <= highest; ++offset) {
      const float* row = static_cast<const float*>(a.position) + (head * a.table_rows + a.position_zero + offset) * dim;
      const int64_t x = zero - offset;
      for (int64_t i = 0; i < dim; ++i) by_dim[i * width + x] = row[i];
      if (backward) std::copy(row, row + dim, by_column + x * padded);
    }
  });
  strip.view = {zero, width, strip.by_dim.get(), strip.by_column.get()};
  return strip;
}

// One block of scratch memory per thread, allocated by the calling thread so that a failure is an exception here.
std::vector<Buffer<char>> make_scratch(int64_t bytes, int threads) {
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < std::max(threads, 1); ++i) scratch.push_back(allocate<char>(bytes));
  return scratch;
}

// out[row] = sum over batch items and segments, in that order, of the partial sums of `head`.
void add_partials(const ChunkedAttention& a, const Buffer<float>& partials, int64_t size, int64_t segments,
                  int64_t head, int64_t at, float* out) {
  std::fill(out, out + a.head_dim, 0.0f);
  for (int64_t batch = 0; batch < a.batch; ++batch)
    for (int64_t segment = 0; segment < segments; ++segment) {
      const float* in = partials.get() + ((batch * a.heads + head) * segments + segment) * size + at;
      for (int64_t i = 0; i < a.head_dim; ++i) out[i] += in[i];
    }
}

}  // namespace

void chunked_attention_forward(const ChunkedAttention& a) {
  if (a.bf16_products) return chunked_attention_forward_bf16(a);
  const AttentionKernel& k = kernel();
  const QueryTiles tiles(a);
  const int64_t count = tiles.last - tiles.first;
  const Strip strip = make_strip(a, false);
  const auto scratch = make_scratch(k.forward_scratch(a), a.threads);
  parallel_for(a.batch * a.heads * count, a.threads, [&](int64_t index, int thread) {
    const int64_t row = index / count;
    k.forward(a, strip.view, row / a.heads, row % a.heads, tiles.first + index % count, scratch[thread].get());
  });
}

void chunked_attention_backward(const ChunkedAttention& a) {
  if (a.bf16_products) return chunked_attention_backward_bf16(a);
  const AttentionKernel& k = kernel();
  const QueryTiles tiles(a);
  const Strip strip = make_strip(a, true);
  const auto scratch = make_scratch(k.backward_scratch(a), a.threads);
  const int64_t step = tiles_per_segment(a), segments = (tiles.last - tiles.first + step - 1) / step;
  const int64_t padded = padded_dim(a.head_dim), table = strip.view.width * padded, size = table + 2 * padded;
  const Buffer<float> partials = allocate<float>(a.batch * a.heads * segments * size);
  for (int64_t parity = 0; parity < 2; ++parity) {
    const int64_t count = (segments + 1 - parity) / 2;
    parallel_for(a.batch * a.heads * count, a.threads, [&](int64_t index, int thread) {
      const int64_t row = index / count, segment = 2 * (index % count) + parity;
      const int64_t first = tiles.first + segment * step;
      float* sums = partials.get() + (row * segments + segment) * size;
      k.backward(a, strip.view, row / a.heads, row % a.heads, first, std::min(first + step, tiles.last),
                 {sums, sums + table, sums + table + padded}, scratch[thread].get());
    });
  }

  const auto reduce = [&](int64_t head, int64_t at, float* out) {
    add_partials(a, partials, size, segments, head, at, out);
  };
  const int64_t lowest = lowest_offset(a), highest = highest_offset(a);
  parallel_for(a.heads, a.threads, [&](int64_t head, int) {
    if (a.grad_content_bias) reduce(head, table, a.grad_content_bias + head * a.head_dim);
    if (a.grad_position_bias) reduce(head, table + padded, a.grad_position_bias + head * a.head_dim);
    if (a.grad_position == nullptr) return;
    float* out = static_cast<float*>(a.grad_position) + head * a.table_rows * a.head_dim;
    std::fill(out, out + a.table_rows * a.head_dim, 0.0f);
    for (int64_t offset = lowest; offset <= highest; ++offset)
      reduce(head, (strip.view.zero - offset) * padded, out + (a.position_zero + offset) * a.head_dim);
  });
}

}  // namespace bestrq2
