// One chunk of rows: project in double, then search all codes with a register tile of kRows x (kVectors * kLanes).
//
//                 group of codes (kVectors * kLanes)        lane l of the running maximum sees the codes
//              +---------+---------+---------+---------+    l, l + kLanes, l + 2 kLanes, ... of every group
//   kRows of y | FMA tile, dims deep, in registers     |
//              +---------+---------+---------+---------+    after each group: maximum over its kVectors vectors,
//                       \    \   /    /                     one compare with the running maximum of the lane and
//              running maximum and its group, kLanes wide   one select of the group's number
//
// The code inside the winning group is found once per row, at the end, by repeating the same sums.
#include "quantize/search.h"
#include "quantize/search_kernel.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kRows = 4, kVectors = 4;
#elif defined(__AVX2__)
constexpr int kRows = 6, kVectors = 2;
#else
constexpr int kRows = 4, kVectors = 2;
#endif
constexpr int64_t kGroup = kVectors * kLanes;
constexpr int64_t kPanelBytes = 192 * 1024;  // codes kept in the L2 cache while all rows of the chunk pass over them

int64_t groups_of(int64_t codes) { return (codes + kGroup - 1) / kGroup; }

// Packed codebook, per group: kGroup starting values (0, or -inf where there is no code), then dims rows of kGroup.
int64_t packed_codebook_size(int64_t codes, int64_t dims) { return groups_of(codes) * kGroup * (dims + 1); }

void pack_codebook(const float* codebook, int64_t codes, int64_t dims, int64_t part, float* packed) {
  const int64_t groups = groups_of(codes);
  for (int64_t group = groups * part / kParts; group < groups * (part + 1) / kParts; ++group) {
    float* target = packed + group * kGroup * (dims + 1);
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t code = group * kGroup + lane;
      const bool exists = code < codes;
      target[lane] = exists ? 0.0f : -__builtin_inff();
      for (int64_t k = 0; k < dims; ++k) target[(k + 1) * kGroup + lane] = exists ? codebook[code * dims + k] : 0.0f;
    }
  }
}

// One chain of sums over dims [begin, end) for the whole register tile.
template <int kDims>
inline void accumulate(const float* y, const float* codes, int64_t y_stride, int64_t dims,
                       Floats (&score)[kRows][kVectors]) {
  const int64_t depth = kDims > 0 ? kDims : dims;
#pragma GCC unroll 64
  for (int64_t k = 0; k < depth; ++k) {
    Floats code[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) code[v] = load(codes + k * kGroup + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats value = splat(y[r * y_stride + k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) score[r][v] = multiply_add(value, code[v], score[r][v]);
    }
  }
}

// Updates the running maximum and its group, both (kRows, kLanes), with the groups [begin, end).
template <int kDims>
void search(const float* y, const float* codebook, int64_t dims, int64_t begin, int64_t end, float* best,
            int32_t* best_group) {
  Floats top[kRows];
  Ints top_group[kRows];
  for (int r = 0; r < kRows; ++r) {
    top[r] = load(best + r * kLanes);
    top_group[r] = load(best_group + r * kLanes);
  }
  const int64_t stride = kDims > 0 ? kDims : dims;
  for (int64_t group = begin; group < end; ++group) {
    const float* codes = codebook + group * kGroup * (stride + 1);
    // Hides from the compiler that y is the same for every group: it would keep all of its broadcasts on the stack.
    __asm__ volatile("" : "+r"(y));
    Floats score[kRows][kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const Floats start = load(codes + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) score[r][v] = start;
    }
    codes += kGroup;
    if (kDims > 0) {
      accumulate<kDims>(y, codes, stride, stride, score);
    } else {
      for (int64_t k = 0; k < dims; k += kBlock) {
        const int64_t depth = dims - k < kBlock ? dims - k : kBlock;
        Floats partial[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) partial[r][v] = splat(0.0f);
        accumulate<0>(y + k, codes + k * kGroup, dims, depth, partial);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) score[r][v] += partial[r][v];
      }
    }
    const Ints number = splat(static_cast<int32_t>(group));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Floats largest = score[r][0];
#pragma GCC unroll 4
      for (int v = 1; v < kVectors; ++v) largest = maximum(largest, score[r][v]);
      top_group[r] = largest > top[r] ? number : top_group[r];  // strictly: the lowest group keeps a tie
      top[r] = maximum(largest, top[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store(best + r * kLanes, top[r]);
    store(best_group + r * kLanes, top_group[r]);
  }
}

// The score of one code, rounded exactly as search() rounds it.
float score_of(const float* y, const float* column, int64_t dims) {
  const float* codes = column + kGroup;
  return chained_score(column[0], y, dims, 0.0f,
                       [&](float value, int64_t k, float sum) { return multiply_add(value, codes[k * kGroup], sum); });
}

// The lowest code whose score is the row's maximum.
int64_t winner(const float* y, const float* codebook, int64_t dims, const float* best, const int32_t* best_group) {
  float largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  int64_t code = -1;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (best[lane] != largest) continue;
    const float* codes = codebook + best_group[lane] * kGroup * (dims + 1);
    for (int64_t column = lane; column < kGroup; column += kLanes) {
      if (score_of(y, codes + column, dims) != largest) continue;
      const int64_t candidate = best_group[lane] * kGroup + column;
      if (code < 0 || candidate < code) code = candidate;
      break;
    }
  }
  return code;
}

using Search = void (*)(const float*, const float*, int64_t, int64_t, int64_t, float*, int32_t*);

Search search_for(int64_t dims) {
  switch (dims) {
    case 8:
      return search<8>;
    case 16:
      return search<16>;
    case 32:
      return search<32>;
    case 64:
      return search<64>;
    default:
      return search<0>;
  }
}

struct Scratch {
  Arena arena;
  Chunk<kRows> chunk;
  float* best;  // (padded, kLanes), like best_group
  int32_t* best_group;

  Scratch(const Quantize& q, const int64_t* rows, int64_t first, int64_t count, void* memory)
      : arena(memory), chunk(q, rows, first, count, arena) {
    best = arena.take<float>(chunk.padded * kLanes);
    best_group = arena.take<int32_t>(chunk.padded * kLanes);
  }
};

int64_t scratch_size(const Quantize& q, int64_t count) { return Scratch(q, nullptr, 0, count, nullptr).arena.bytes(); }

int64_t run(const Quantize& q, const float* codebooks, const double* projections, const int64_t* rows, int64_t first,
            int64_t count, void* memory) {
  const Scratch scratch(q, rows, first, count, memory);
  const Chunk<kRows>& chunk = scratch.chunk;
  const int64_t bad = chunk.project(projections);
  if (bad >= 0) return bad;

  const Search search_groups = search_for(q.codebook_dim);
  const int64_t groups = groups_of(q.codebook_size);
  const int64_t panel =
      kPanelBytes / (kGroup * (q.codebook_dim + 1) * 4) > 0 ? kPanelBytes / (kGroup * (q.codebook_dim + 1) * 4) : 1;
  for (int64_t book = 0; book < q.num_codebooks; ++book) {
    const float* codebook =
        codebooks + (q.shared_codebook ? 0 : book * packed_codebook_size(q.codebook_size, q.codebook_dim));
    for (int64_t i = 0; i < chunk.padded * kLanes; ++i) {
      scratch.best[i] = -__builtin_inff();
      scratch.best_group[i] = 0;
    }
    for (int64_t begin = 0; begin < groups; begin += panel) {
      const int64_t end = begin + panel < groups ? begin + panel : groups;
      for (int64_t i = 0; i < chunk.padded; i += kRows)
        search_groups(chunk.projected(book, i), codebook, q.codebook_dim, begin, end, scratch.best + i * kLanes,
                      scratch.best_group + i * kLanes);
    }
    for (int64_t i = 0; i < count; ++i)
      chunk.code(book, i) = winner(chunk.projected(book, i), codebook, q.codebook_dim, scratch.best + i * kLanes,
                                   scratch.best_group + i * kLanes);
  }
  return -1;
}

}  // namespace

extern const QuantizeKernel quantize_kernel = {packed_codebook_size, packed_projection_size, pack_codebook,
                                               pack_projection,      scratch_size,           run};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
