// One chunk of rows: project in double, then search all codes with a register tile of kRows x (kVectors * kLanes).
//
//                 group of codes (kVectors * kLanes)        lane l sees the codes l, l + kLanes, ... of every group
//              +---------+---------+---------+---------+
//   kRows of y | FMA tile, dims deep, in registers     |
//              +---------+---------+---------+---------+    after each span of kSpan groups: the maximum of a lane's
//                       \    \   /    /                     codes meets its best and second best span so far
//              best span with its number, second best,
//              kLanes wide
//
// The code inside the winning span is found once per row, at the end. If another score is within the bound of the
// errors (search.h), of another span or in the same, the row is scored in double.
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
constexpr int64_t kSpan = 4;     // groups
constexpr int64_t kHeader = 16;  // floats
static_assert(kParts * sizeof(double) <= kHeader * sizeof(float), "");
constexpr int64_t kPanelBytes = 192 * 1024;  // codes kept in the L2 cache while all rows of the chunk pass over them

int64_t groups_of(int64_t codes) { return (codes + kGroup - 1) / kGroup; }

// Packed codebook: the largest |c| of every part (double), then per group kGroup starting values (0, or -inf where
// there is no code) and dims rows of kGroup.
int64_t packed_codebook_size(int64_t codes, int64_t dims) { return kHeader + groups_of(codes) * kGroup * (dims + 1); }

void pack_codebook(const float* codebook, int64_t codes, int64_t dims, int64_t part, float* packed) {
  const int64_t groups = groups_of(codes);
  double reach = 0.0;
  for (int64_t group = groups * part / kParts; group < groups * (part + 1) / kParts; ++group) {
    float* target = packed + kHeader + group * kGroup * (dims + 1);
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t code = group * kGroup + lane;
      const bool exists = code < codes;
      target[lane] = exists ? 0.0f : -__builtin_inff();
      for (int64_t k = 0; k < dims; ++k) target[(k + 1) * kGroup + lane] = exists ? codebook[code * dims + k] : 0.0f;
      const double norm = exists ? norm_of(codebook + code * dims, dims) : 0.0;
      reach = norm > reach ? norm : reach;
    }
  }
  __builtin_memcpy(reinterpret_cast<char*>(packed) + part * sizeof(double), &reach, sizeof(double));
}

// The largest |c|.
double reach_of(const float* packed) {
  double reach[kParts];
  __builtin_memcpy(reach, packed, sizeof reach);
  double largest = 0.0;
  for (double of_part : reach) largest = of_part > largest ? of_part : largest;
  return largest;
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

// Updates the best span, its number and the second best, all (kRows, kLanes), with the groups [begin, end).
template <int kDims>
void search(const float* y, const float* codebook, int64_t dims, int64_t begin, int64_t end, float* best, float* second,
            int32_t* best_span) {
  const int64_t stride = kDims > 0 ? kDims : dims;
  for (int64_t first = begin; first < end; first += kSpan) {
    Floats largest[kRows];
    for (int r = 0; r < kRows; ++r) largest[r] = splat(-__builtin_inff());
    const int64_t last = first + kSpan < end ? first + kSpan : end;
    for (int64_t group = first; group < last; ++group) {
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
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) largest[r] = maximum(score[r][v], largest[r]);
    }
    const Ints number = splat(static_cast<int32_t>(first / kSpan));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats top = load(best + r * kLanes);
      const Floats lesser = largest[r] > top ? top : largest[r];
      store(best_span + r * kLanes, largest[r] > top ? number : load(best_span + r * kLanes));
      store(best + r * kLanes, maximum(largest[r], top));
      store(second + r * kLanes, maximum(lesser, load(second + r * kLanes)));
    }
  }
}

// The code of the best score, or -1 if another score is less than `margin` below it.
int64_t winner(const float* y, const float* codebook, int64_t codes, int64_t dims, float margin, const float* best,
               const float* second, const int32_t* best_span) {
  float largest = best[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = best[lane] > largest ? best[lane] : largest;
  float threshold = largest - margin;
  int close = 0, lane = 0;
  for (int i = 0; i < kLanes; ++i) {
    close += (best[i] >= threshold) + (second[i] >= threshold);
    lane = best[i] == largest ? i : lane;
  }
  if (close > 1) return -1;
  const int64_t first = best_span[lane] * kSpan, groups = groups_of(codes);
  float top = -__builtin_inff(), rival = top;
  int64_t code = -1;
  for (int64_t group = first; group < first + kSpan && group < groups; ++group) {
    const float* start = codebook + group * kGroup * (dims + 1) + lane;
    for (int64_t column = 0; column < kGroup; column += kLanes) {
      const float* values = start + column + kGroup;
      const float score = chained_score(start[column], y, dims, 0.0f, [&](float value, int64_t k, float sum) {
        return multiply_add(value, values[k * kGroup], sum);
      });
      rival = score > top ? top : score > rival ? score : rival;
      code = score > top ? group * kGroup + lane + column : code;
      top = score > top ? score : top;
    }
  }
  return rival >= top - margin ? -1 : code;
}

using Search = void (*)(const float*, const float*, int64_t, int64_t, int64_t, float*, float*, int32_t*);

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
  float *best, *second;  // (padded, kLanes), like best_span
  int32_t* best_span;

  Scratch(const Quantize& q, const int64_t* rows, int64_t first, int64_t count, void* memory)
      : arena(memory), chunk(q, rows, first, count, arena) {
    best = arena.take<float>(chunk.padded * kLanes);
    second = arena.take<float>(chunk.padded * kLanes);
    best_span = arena.take<int32_t>(chunk.padded * kLanes);
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
  const int64_t fitting = kPanelBytes / (kGroup * (q.codebook_dim + 1) * 4) / kSpan * kSpan;
  const int64_t panel = fitting > kSpan ? fitting : kSpan;
  for (int64_t book = 0; book < q.num_codebooks; ++book) {
    const float* packed =
        codebooks + (q.shared_codebook ? 0 : book * packed_codebook_size(q.codebook_size, q.codebook_dim));
    const double reach = reach_of(packed);
    const float* codebook = packed + kHeader;
    for (int64_t i = 0; i < chunk.padded * kLanes; ++i) {
      scratch.best[i] = scratch.second[i] = -__builtin_inff();
      scratch.best_span[i] = 0;
    }
    for (int64_t begin = 0; begin < groups; begin += panel) {
      const int64_t end = begin + panel < groups ? begin + panel : groups;
      for (int64_t i = 0; i < chunk.padded; i += kRows)
        search_groups(chunk.projected(book, i), codebook, q.codebook_dim, begin, end, scratch.best + i * kLanes,
                      scratch.second + i * kLanes, scratch.best_span + i * kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      const float* y = chunk.projected(book, i);
      const double norm = norm_of(y, q.codebook_dim);
      int64_t code = 0;  // of a row that is projected to zero
      if (norm > 0.0) {
        const float margin = margin_for(score_error(norm, reach, q.codebook_dim));
        const int64_t lanes = i * kLanes;
        code = winner(y, codebook, q.codebook_size, q.codebook_dim, margin, scratch.best + lanes,
                      scratch.second + lanes, scratch.best_span + lanes);
        if (code < 0)
          code = exact_winner<kGroup>(chunk.exactly_projected(projections, book, i), codebook + kGroup,
                                      kGroup * (q.codebook_dim + 1), q.codebook_size, q.codebook_dim, reach);
      }
      chunk.code(book, i) = code;
    }
  }
  return -1;
}

}  // namespace

extern const QuantizeKernel quantize_kernel = {packed_codebook_size, packed_projection_size, pack_codebook,
                                               pack_projection,      scratch_size,           run};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
