// Phases of the kernels with bf16 products: operands are packed once per call, then tiles of queries run in parallel,
// then gradients are brought back to the caller's layout.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "chunked_attention/bf16_kernel.h"
#include "chunked_attention/segments.h"
#include "common/memory.h"
#include "common/parallel.h"

namespace bestrq2 {

#ifdef BESTRQ2_X86

namespace {

using attention_bf16::Call;
using attention_bf16::u16;

struct Operands {
  Call call{};
  Buffer<u16> position_by_dim, position_by_column, key_by_dim, key_by_key, value_by_dim, value_by_key;
  Buffer<float> grad_key, grad_value;
};

// Tiles of keys that some query reaches.
void find_key_tiles(const ChunkedAttention& a, Call& c) {
  const int64_t last_query = a.query_offset + a.query_length - 1;
  const int64_t low = a.query_offset / a.chunk_size * a.chunk_size - a.left_context;
  const int64_t high = last_query / a.chunk_size * a.chunk_size + a.chunk_size + a.right_context;
  c.first_tile = std::min(std::max<int64_t>(low, 0), a.key_length) / kTile;
  c.last_tile = std::max(c.first_tile, (std::min(high, a.key_length) + kTile - 1) / kTile);
}

// Memory for everything that is packed once per call.
Operands allocate_operands(const ChunkedAttention& a, bool backward) {
  Operands o;
  Call& c = o.call;
  c.a = &a, c.dot = best_dot(), c.backward = backward;
  if (c.dot == Dot::none) throw std::runtime_error("chunked_attention: bf16 products need AVX-512 BF16");
  c.dim = (a.head_dim + 31) / 32 * 32;
  if (a.position != nullptr) {
    // Column 31 queries before a tile's own first key is where its products begin: aligned if tiles and chunks are.
    c.zero = (std::max(lowest_offset(a), highest_offset(a)) + kMargin + 31) / 32 * 32 + 31;
    c.width = (c.zero - lowest_offset(a) + kMargin + 16) / 16 | 1;  // odd: rows a power of two apart share cache sets
    c.width *= 16;
    o.position_by_dim = allocate<u16>(a.heads * c.dim * c.width);
    if (backward) o.position_by_column = allocate<u16>(a.heads * c.dim * c.width);
    c.position_by_dim = o.position_by_dim.get(), c.position_by_column = o.position_by_column.get();
  }
  find_key_tiles(a, c);
  const int64_t tiles = c.last_tile - c.first_tile, rows = a.batch * a.heads, size = rows * tiles * kTile * c.dim;
  const auto make = [&](auto& buffer, auto*& pointer) {
    buffer = allocate<std::remove_reference_t<decltype(*pointer)>>(size);
    pointer = buffer.get();
  };
  make(o.key_by_dim, c.key_by_dim);
  if (backward) {
    make(o.key_by_key, c.key_by_key), make(o.value_by_dim, c.value_by_dim);
    make(o.grad_key, c.grad_key), make(o.grad_value, c.grad_value);
  } else {
    make(o.value_by_key, c.value_by_key);
  }
  return o;
}

// The first phase of every kernel; rows of the first item also pack the positions of their head.
Phase packing(const Call& c) {
  return {c.last_tile - c.first_tile + 1, [&c](int64_t row, int64_t index, int) {
            if (index > 0)
              return attention_bf16::pack_keys(c, row / c.a->heads, row % c.a->heads, c.first_tile + index - 1);
            if (row < c.a->heads && c.a->position != nullptr) attention_bf16::pack_position(c, row);
          }};
}

// One block of scratch memory per thread, allocated by the calling thread so that a failure is an exception here.
std::vector<Buffer<char>> make_scratch(const Call& c) {
  std::vector<Buffer<char>> scratch;
  for (int i = 0; i < std::max(c.a->threads, 1); ++i)
    scratch.push_back(allocate<char>(attention_bf16::scratch_bytes(c)));
  return scratch;
}

void add_rows(const float* in, int64_t size, float* out) {
  for (int64_t i = 0; i < size; ++i) out[i] += in[i];
}

}  // namespace

void chunked_attention_forward_bf16(const ChunkedAttention& a) {
  const Operands operands = allocate_operands(a, false);
  const Call& c = operands.call;
  const QueryTiles tiles(a);
  const auto scratch = make_scratch(c);
  const Phase queries{tiles.last - tiles.first, [&](int64_t row, int64_t index, int thread) {
                        attention_bf16::forward(c, row / a.heads, row % a.heads, tiles.first + index,
                                                scratch[thread].get());
                      }};
  parallel_phases(a.batch * a.heads, a.heads, {packing(c), queries}, a.threads);
}

void chunked_attention_backward_bf16(const ChunkedAttention& a) {
  const Operands operands = allocate_operands(a, true);
  const Call& c = operands.call;
  const QueryTiles tiles(a);
  const auto scratch = make_scratch(c);
  const int64_t step = tiles_per_segment(a), segments = (tiles.last - tiles.first + step - 1) / step;
  const int64_t table = c.width * c.dim, size = table + 2 * c.dim;
  const auto partials = allocate<float>(a.batch * a.heads * segments * size);
  const auto partial = [&](int64_t row, int64_t segment) { return partials.get() + (row * segments + segment) * size; };
  const auto every_other_segment = [&](int64_t parity) -> Phase {
    return {(segments + 1 - parity) / 2, [&, parity](int64_t row, int64_t index, int thread) {
              const int64_t segment = 2 * index + parity, first = tiles.first + segment * step;
              float* sums = partial(row, segment);
              attention_bf16::backward(c, row / a.heads, row % a.heads, first, std::min(first + step, tiles.last),
                                       {sums, sums + table, sums + table + c.dim}, scratch[thread].get());
            }};
  };
  const Phase keys{(a.key_length + kTile - 1) / kTile, [&](int64_t row, int64_t index, int) {
                     attention_bf16::write_key_grads(c, row / a.heads, row % a.heads, index);
                   }};
  parallel_phases(a.batch * a.heads, a.heads, {packing(c), every_other_segment(0), every_other_segment(1), keys},
                  a.threads);
  parallel_for(a.heads, a.threads, [&](int64_t head, int) {
    std::vector<const float*> parts;
    std::vector<float> biases(static_cast<size_t>(2 * c.dim), 0.0f);
    for (int64_t batch = 0; batch < a.batch; ++batch)
      for (int64_t segment = 0; segment < segments; ++segment) {
        parts.push_back(partial(batch * a.heads + head, segment));
        add_rows(parts.back() + table, 2 * c.dim, biases.data());
      }
    const auto copy = [&](const float* in, float* out) {
      if (out != nullptr) std::copy(in, in + a.head_dim, out + head * a.head_dim);
    };
    copy(biases.data(), a.grad_content_bias);
    copy(biases.data() + c.dim, a.grad_position_bias);
    if (a.grad_position != nullptr)
      attention_bf16::write_position_grad(c, head, parts.data(), static_cast<int64_t>(parts.size()));
  });
}

#else

void chunked_attention_forward_bf16(const ChunkedAttention&) {
  throw std::runtime_error("chunked_attention: bf16 products need AVX-512 BF16");
}
void chunked_attention_backward_bf16(const ChunkedAttention& a) { chunked_attention_forward_bf16(a); }

#endif

}  // namespace bestrq2
