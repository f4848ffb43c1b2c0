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
#include "quantize_kernel.h"

#include "quantize_simd.h"

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
constexpr int64_t kBlock = 64;               // dims summed in one chain; longer codes add such partial sums
constexpr int64_t kPanelBytes = 192 * 1024;  // codes kept in the L2 cache while all rows of the chunk pass over them
constexpr int64_t kColumns = 2 * kDoubles;   // outputs of the projection computed together
constexpr double kLayerNormEps = 1e-5;

int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
int64_t groups_of(int64_t codes) { return (codes + kGroup - 1) / kGroup; }

// Packed codebook, per group: kGroup starting values (0, or -inf where there is no code), then dims rows of kGroup.
int64_t codebook_size(int64_t codes, int64_t dims) { return groups_of(codes) * kGroup * (dims + 1); }

void pack_codebook(const float* codebook, int64_t codes, int64_t dims, float* packed) {
  for (int64_t group = 0; group < groups_of(codes); ++group, packed += kGroup * (dims + 1)) {
    for (int64_t lane = 0; lane < kGroup; ++lane) {
      const int64_t code = group * kGroup + lane;
      const bool exists = code < codes;
      packed[lane] = exists ? 0.0f : -__builtin_inff();
      for (int64_t k = 0; k < dims; ++k) packed[(k + 1) * kGroup + lane] = exists ? codebook[code * dims + k] : 0.0f;
    }
  }
}

// Packed projection: (dims / kColumns, features, kColumns), zero padded.
int64_t projection_size(int64_t features, int64_t dims) { return features * round_up(dims, kColumns); }

void pack_projection(const double* projection, int64_t features, int64_t dims, double* packed) {
  for (int64_t column = 0; column < dims; column += kColumns)
    for (int64_t feature = 0; feature < features; ++feature)
      for (int64_t k = column; k < column + kColumns; ++k) *packed++ = k < dims ? projection[feature * dims + k] : 0.0;
}

double widen(float v) { return v; }
double widen(double v) { return v; }
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
float as_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}
double widen(BFloat16 v) { return as_float(uint32_t{v.bits} << 16); }
double widen(Half v) {
  const uint32_t magnitude = v.bits & 0x7fffu, sign = uint32_t{v.bits & 0x8000u} << 16;
  const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // inf and NaN keep their exponent
  // Reading the exponent with float's bias gives value * 2^-112, subnormal halves included; the product is exact.
  const double scaled = as_float(magnitude << 13);
  const double value = special ? as_float((magnitude << 13) | special) : scaled * 0x1p112;
  return sign ? -value : value;
}

// Copies one row to doubles; returns whether it is finite.
template <class T>
bool read_row(const T* x, int64_t features, int64_t stride, double* row) {
  int bad = 0;
  if (stride == 1) {
    for (int64_t i = 0; i < features; ++i) row[i] = widen(x[i]);
  } else {
    for (int64_t i = 0; i < features; ++i) row[i] = widen(x[i * stride]);
  }
  for (int64_t i = 0; i < features; ++i) bad |= !(row[i] - row[i] == 0.0);
  return bad == 0;
}

bool read_row(const Quantize& q, int64_t row, double* values) {
  const int64_t offset = row * q.row_stride;
  switch (q.x_type) {
    case Float::bf16:
      return read_row(static_cast<const BFloat16*>(q.x) + offset, q.features, q.feature_stride, values);
    case Float::f16:
      return read_row(static_cast<const Half*>(q.x) + offset, q.features, q.feature_stride, values);
    case Float::f64:
      return read_row(static_cast<const double*>(q.x) + offset, q.features, q.feature_stride, values);
    default:
      return read_row(static_cast<const float*>(q.x) + offset, q.features, q.feature_stride, values);
  }
}

// Eight partial sums: the compiler may use vectors, and the order never depends on anything but the row's length.
template <class Term>
double sum(int64_t count, Term term) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    for (int j = 0; j < 8; ++j) partial[j] += term(i + j);
  for (int j = 0; i < count; ++i, ++j) partial[j] += term(i);
  return ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
         ((partial[4] + partial[5]) + (partial[6] + partial[7]));
}

void layer_norm(double* row, int64_t features) {
  const double first = row[0];  // subtracting it first makes a constant row exactly zero, however long
  for (int64_t i = 0; i < features; ++i) row[i] -= first;
  const double mean = sum(features, [=](int64_t i) { return row[i]; }) / features;
  for (int64_t i = 0; i < features; ++i) row[i] -= mean;
  const double variance = sum(features, [=](int64_t i) { return row[i] * row[i]; }) / features;
  const double scale = 1.0 / __builtin_sqrt(variance + kLayerNormEps);
  for (int64_t i = 0; i < features; ++i) row[i] *= scale;
}

// y (kRows, dims) = rows (kRows, features) @ projection, summed in double, each row scaled by a power of two into
// [-1, 1] before it is rounded to float: the argmax does not change and nothing overflows or loses bits.
void project(const double* rows, const double* projection, int64_t features, int64_t dims, double* sums, float* y) {
  const int64_t stride = round_up(dims, kColumns);
  for (int64_t column = 0; column < dims; column += kColumns, projection += features * kColumns) {
    Doubles total[kRows][2];
    for (int r = 0; r < kRows; ++r) total[r][0] = total[r][1] = broadcast(0.0);
    for (int64_t feature = 0; feature < features; ++feature) {
      const Doubles left = load(projection + feature * kColumns);
      const Doubles right = load(projection + feature * kColumns + kDoubles);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Doubles value = broadcast(rows[r * features + feature]);
        total[r][0] = multiply_add(value, left, total[r][0]);
        total[r][1] = multiply_add(value, right, total[r][1]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      store(sums + r * stride + column, total[r][0]);
      store(sums + r * stride + column + kDoubles, total[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    double largest = 0.0;
    for (int64_t k = 0; k < dims; ++k) largest = __builtin_fmax(largest, __builtin_fabs(sums[r * stride + k]));
    int exponent = 0;
    if (largest > 0.0) __builtin_frexp(largest, &exponent);
    for (int64_t k = 0; k < dims; ++k)
      y[r * dims + k] = static_cast<float>(__builtin_ldexp(sums[r * stride + k], -exponent));
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
      const Floats value = broadcast(y[r * y_stride + k]);
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
          for (int v = 0; v < kVectors; ++v) partial[r][v] = broadcast(0.0f);
        accumulate<0>(y + k, codes + k * kGroup, dims, depth, partial);
        for (int r = 0; r < kRows; ++r)
          for (int v = 0; v < kVectors; ++v) score[r][v] = add(score[r][v], partial[r][v]);
      }
    }
    const Ints number = broadcast(static_cast<int32_t>(group));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Floats largest = score[r][0];
#pragma GCC unroll 4
      for (int v = 1; v < kVectors; ++v) largest = maximum(largest, score[r][v]);
      const Mask better = greater(largest, top[r]);  // strictly: the lowest group keeps a tie
      top[r] = maximum(largest, top[r]);
      top_group[r] = select(better, number, top_group[r]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    store(best + r * kLanes, top[r]);
    store(best_group + r * kLanes, top_group[r]);
  }
}

// The score of one code, rounded exactly as search() rounds it.
float score_of(const float* y, const float* column, int64_t dims) {
  float score = column[0];
  const float* codes = column + kGroup;
  if (dims == 8 || dims == 16 || dims == 32 || dims == 64) {
    for (int64_t k = 0; k < dims; ++k) score = multiply_add(y[k], codes[k * kGroup], score);
    return score;
  }
  for (int64_t begin = 0; begin < dims; begin += kBlock) {
    float partial = 0.0f;
    for (int64_t k = begin; k < dims && k < begin + kBlock; ++k)
      partial = multiply_add(y[k], codes[k * kGroup], partial);
    score += partial;
  }
  return score;
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
  double *rows, *sums;
  float *y, *best;
  int32_t* best_group;
  int64_t bytes;

  Scratch(const Quantize& q, int64_t count, char* base) {
    const int64_t padded = round_up(count, kRows);
    char* next = base;
    const auto take = [&](int64_t size) {
      char* start = next;
      next += round_up(size, 64);
      return start;
    };
    rows = reinterpret_cast<double*>(take(kRows * q.features * 8));
    sums = reinterpret_cast<double*>(take(kRows * round_up(q.dims, kColumns) * 8));
    y = reinterpret_cast<float*>(take(q.books * padded * q.dims * 4));
    best = reinterpret_cast<float*>(take(padded * kLanes * 4));
    best_group = reinterpret_cast<int32_t*>(take(padded * kLanes * 4));
    bytes = next - base;
  }
};

int64_t scratch_size(const Quantize& q, int64_t count) { return Scratch(q, count, nullptr).bytes; }

int64_t run(const Quantize& q, const float* codebooks, const double* projections, const int64_t* rows, int64_t first,
            int64_t count, void* memory) {
  const Scratch scratch(q, count, static_cast<char*>(memory));
  const int64_t padded = round_up(count, kRows);
  const int64_t projection_step = q.shared_projection ? 0 : projection_size(q.features, q.dims);
  const int64_t codebook_step = q.shared_codebook ? 0 : codebook_size(q.codes, q.dims);

  for (int64_t i = 0; i < padded; i += kRows) {
    for (int64_t r = 0; r < kRows; ++r) {
      double* row = scratch.rows + r * q.features;
      if (i + r >= count) {  // rows that fill the last tile
        for (int64_t k = 0; k < q.features; ++k) row[k] = 0.0;
        continue;
      }
      const int64_t index = rows != nullptr ? rows[i + r] : first + i + r;
      if (!read_row(q, index, row)) return index;
      if (q.layer_norm) layer_norm(row, q.features);
    }
    for (int64_t book = 0; book < (q.shared_projection ? 1 : q.books); ++book)
      project(scratch.rows, projections + book * projection_step, q.features, q.dims, scratch.sums,
              scratch.y + (book * padded + i) * q.dims);
  }

  const Search search_groups = search_for(q.dims);
  const int64_t groups = groups_of(q.codes);
  const int64_t panel = kPanelBytes / (kGroup * (q.dims + 1) * 4) > 0 ? kPanelBytes / (kGroup * (q.dims + 1) * 4) : 1;
  for (int64_t book = 0; book < q.books; ++book) {
    const float* y = scratch.y + (q.shared_projection ? 0 : book * padded * q.dims);
    const float* codebook = codebooks + book * codebook_step;
    for (int64_t i = 0; i < padded * kLanes; ++i) {
      scratch.best[i] = -__builtin_inff();
      scratch.best_group[i] = 0;
    }
    for (int64_t begin = 0; begin < groups; begin += panel) {
      const int64_t end = begin + panel < groups ? begin + panel : groups;
      for (int64_t i = 0; i < padded; i += kRows)
        search_groups(y + i * q.dims, codebook, q.dims, begin, end, scratch.best + i * kLanes,
                      scratch.best_group + i * kLanes);
    }
    for (int64_t i = 0; i < count; ++i) {
      const int64_t index = rows != nullptr ? rows[i] : first + i;
      q.out[index * q.books + book] =
          winner(y + i * q.dims, codebook, q.dims, scratch.best + i * kLanes, scratch.best_group + i * kLanes);
    }
  }
  return -1;
}

}  // namespace

extern const QuantizeKernel quantize_kernel = {codebook_size,   projection_size, pack_codebook,
                                               pack_projection, scratch_size,    run};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
