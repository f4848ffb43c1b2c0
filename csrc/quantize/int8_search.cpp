// The search with 8-bit dot products (AVX-512 VNNI), about three times the fp32 rate, and still exact.
//
//   screen    all codes, 8-bit: only the maximum of every entry of 16 consecutive codes is kept, in the L1 cache
//   rescore   the few entries within the proven error of the row's 8-bit maximum, in fp32; in double if two of their
//             codes are within the bound of fp32 errors (search.h)
//
// Error of a screened score: |<y, c> - <y', c'>| <= |y - y'| max|c| + |y'| max|c - c'|, primes being the 8-bit values.
// The best code and a rival can both be off by that much, so every code within twice the bound of the maximum is
// rescored.
#include <immintrin.h>

#include <cstddef>

#include "quantize/search.h"
#include "quantize/search_kernel.h"

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr int kRows = 8, kVectors = 2;
constexpr int64_t kEntry = 16;               // consecutive codes that share one screened maximum
constexpr int64_t kGroup = kEntry * kLanes;  // codes of the entries that one vector of maxima covers
constexpr int64_t kHeader = 64;              // floats

struct Header {
  double norm[kParts];      // largest |c|^2 of every part of the codebook
  double rounding[kParts];  // largest |c - c'|^2
  double scale;             // of the 8-bit codes
};
static_assert(sizeof(Header) <= kHeader * sizeof(float), "");

// Data of a codebook that the rows need.
struct Bounds {
  double scale;     // of the 8-bit codes
  double norm;      // largest |c|
  double rounding;  // largest |c - c'|
};

inline int64_t groups_of(int64_t codes) { return (codes + kGroup - 1) / kGroup; }
inline int64_t words_of(int64_t dims) { return (dims + 3) / 4; }

// Packed codebook: Header, then fp32 (entries, dims, 16), then 8 bits (groups, 16 / kVectors, words, kVectors, lanes,
// 4) where lane l of vector v holds code l * 16 + v of its group, plus 128.
int64_t packed_codebook_size(int64_t codes, int64_t dims) {
  return kHeader + groups_of(codes) * kGroup * (dims + words_of(dims));
}

double scale_for(const float* values, int64_t count) {
  uint32_t largest = 0;  // bits of positive floats sort like the floats
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = bits_as<uint32_t>(values[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest > 0 ? bits_as<float>(largest) / 127.0 : 1.0;
}

void pack_codebook(const float* codebook, int64_t codes, int64_t dims, int64_t part, float* packed) {
  const double scale = scale_for(codebook, codes * dims), inverse = 1.0 / scale;
  float* exact = packed + kHeader;
  auto* screen = reinterpret_cast<uint8_t*>(exact + groups_of(codes) * kGroup * dims);
  const int64_t words = words_of(dims), groups = groups_of(codes);
  double largest_norm = 0.0, largest_rounding = 0.0;
  for (int64_t code = groups * part / kParts * kGroup; code < groups * (part + 1) / kParts * kGroup; ++code) {
    const int64_t group = code / kGroup, lane = code % kGroup / kEntry, vector = code % kEntry;
    const float* source = codebook + (code < codes ? code : codes - 1) * dims;  // rescore() ignores the padding
    const int64_t first = (group * kEntry + vector / kVectors * kVectors) * words + vector % kVectors;
    uint8_t* bytes = screen + (first * kLanes + lane) * 4;
    double norm = 0.0, rounding = 0.0;
    for (int64_t k = 0; k < words * 4; ++k) {
      const double value = k < dims ? source[k] : 0.0, level = __builtin_rint(value * inverse);
      bytes[(k / 4) * kVectors * kLanes * 4 + k % 4] = static_cast<uint8_t>(static_cast<int>(level) + 128);
      if (k < dims) exact[(code / kEntry * dims + k) * kEntry + vector] = source[k];
      norm += value * value;
      rounding += (value - level * scale) * (value - level * scale);
    }
    largest_norm = norm > largest_norm ? norm : largest_norm;
    largest_rounding = rounding > largest_rounding ? rounding : largest_rounding;
  }
  auto* header = reinterpret_cast<char*>(packed);
  if (part == 0) __builtin_memcpy(header + offsetof(Header, scale), &scale, sizeof(double));
  __builtin_memcpy(header + offsetof(Header, norm) + part * sizeof(double), &largest_norm, sizeof(double));
  __builtin_memcpy(header + offsetof(Header, rounding) + part * sizeof(double), &largest_rounding, sizeof(double));
}

Bounds bounds_of(const float* packed) {
  Header header;
  __builtin_memcpy(&header, packed, sizeof header);
  Bounds bounds{header.scale, 0.0, 0.0};
  for (int64_t part = 0; part < kParts; ++part) {
    bounds.norm = header.norm[part] > bounds.norm ? header.norm[part] : bounds.norm;
    bounds.rounding = header.rounding[part] > bounds.rounding ? header.rounding[part] : bounds.rounding;
  }
  bounds.norm = __builtin_sqrt(bounds.norm);
  bounds.rounding = __builtin_sqrt(bounds.rounding);
  return bounds;
}

// How far below the maximum a score can be and still belong to the best code.
struct Margins {
  int32_t screened;  // in units of the screened scores
  float rescored;    // in fp32; negative for a row of zeros
};

// Fills the 8-bit copy of y (dims), four to a word.
Margins quantize_row(const float* y, int64_t dims, const Bounds& codes, int32_t* words) {
  const double scale = scale_for(y, dims), inverse = 1.0 / scale;
  int8_t bytes[4];
  double rounding = 0.0, norm = 0.0;
  for (int64_t word = 0; word < words_of(dims); ++word) {
    for (int64_t j = 0; j < 4; ++j) {
      const double value = word * 4 + j < dims ? y[word * 4 + j] : 0.0, level = __builtin_rint(value * inverse);
      bytes[j] = static_cast<int8_t>(level);
      rounding += (value - level * scale) * (value - level * scale);
      norm += value * value;
    }
    __builtin_memcpy(words + word, bytes, sizeof bytes);
  }
  rounding = __builtin_sqrt(rounding);
  norm = __builtin_sqrt(norm);
  const double error = score_error(norm, codes.norm, dims);
  const double bound = rounding * codes.norm + (norm + rounding) * codes.rounding + error;
  const double margin = 2.0 * bound / (scale * codes.scale) + 2.0;
  return {margin < 1e9 ? static_cast<int32_t>(margin) : 1000000000, norm > 0.0 ? margin_for(error) : -1.0f};
}

// Maximum screened score of every entry: maxima (kRows, groups * kLanes), y (kRows, words).
template <int kWords>
void screen(const int32_t* y, const uint8_t* codes, int64_t words, int64_t groups, int32_t* maxima) {
  const int64_t depth = kWords > 0 ? kWords : words;
  for (int64_t group = 0; group < groups; ++group) {
    __m512i top[kRows];
    for (int vector = 0; vector < kEntry; vector += kVectors) {
      __asm__ volatile("" : "+r"(y));  // as in fp32_search.cpp
      __m512i score[kRows][kVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < kVectors; ++v) score[r][v] = _mm512_setzero_si512();
#pragma GCC unroll 16
      for (int64_t k = 0; k < depth; ++k) {
        __m512i code[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) code[v] = _mm512_load_si512(codes + (k * kVectors + v) * 64);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const __m512i value = _mm512_set1_epi32(y[r * depth + k]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) score[r][v] = _mm512_dpbusd_epi32(score[r][v], code[v], value);
        }
      }
      codes += depth * kVectors * 64;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        __m512i largest = score[r][0];
        for (int v = 1; v < kVectors; ++v) largest = _mm512_max_epi32(largest, score[r][v]);
        top[r] = vector == 0 ? largest : _mm512_max_epi32(top[r], largest);
      }
    }
    for (int r = 0; r < kRows; ++r) _mm512_store_si512(maxima + (r * groups + group) * kLanes, top[r]);
  }
}

// fp32 scores of the 16 codes of one entry.
inline Floats scores_of(const float* y, const float* entry, int64_t dims) {
  const Floats zero = splat(0.0f);
  return chained_score(zero, y, dims, zero, [&](float value, int64_t k, Floats sum) {
    return multiply_add(splat(value), load(entry + k * kEntry), sum);
  });
}

// The code of the best fp32 score among the entries that can hold it, or -1 if another score is less than `margin`
// below.
int64_t rescore(const float* y, const float* exact, int64_t codes, int64_t dims, const int32_t* maxima,
                const Margins& margins) {
  const int64_t groups = groups_of(codes);
  __m512i top = _mm512_load_si512(maxima);
  for (int64_t group = 1; group < groups; ++group)
    top = _mm512_max_epi32(top, _mm512_load_si512(maxima + group * kLanes));
  const __m512i threshold = _mm512_set1_epi32(_mm512_reduce_max_epi32(top) - margins.screened);
  const Floats nothing = splat(-__builtin_inff());
  Floats best = nothing, second = nothing;
  Ints best_entry = splat(0);
  for (int64_t group = 0; group < groups; ++group) {
    uint32_t entries = _mm512_cmpge_epi32_mask(_mm512_load_si512(maxima + group * kLanes), threshold);
    for (; entries != 0; entries &= entries - 1) {
      const int64_t entry = group * kLanes + __builtin_ctz(entries);
      const int64_t present = codes - entry * kEntry;
      if (present <= 0) break;
      const __mmask16 exists = present >= kEntry ? 0xffff : static_cast<__mmask16>((1u << present) - 1);
      const Floats score = _mm512_mask_mov_ps(nothing, exists, scores_of(y, exact + entry * kEntry * dims, dims));
      second = maximum(second, score > best ? best : score);
      best_entry = score > best ? splat(static_cast<int32_t>(entry)) : best_entry;
      best = maximum(best, score);
    }
  }
  const float largest = _mm512_reduce_max_ps(best);
  const Floats rival = splat(largest - margins.rescored);
  if (_mm512_cmp_ps_mask(second, rival, _CMP_GE_OQ) != 0) return -1;
  const uint32_t lanes = _mm512_cmp_ps_mask(best, rival, _CMP_GE_OQ);
  if ((lanes & (lanes - 1)) != 0) return -1;
  const int lane = __builtin_ctz(lanes);
  return best_entry[lane] * kEntry + lane;
}

using Screen = void (*)(const int32_t*, const uint8_t*, int64_t, int64_t, int32_t*);

Screen screen_for(int64_t words) {
  switch (words) {
    case 2:
      return screen<2>;
    case 4:
      return screen<4>;
    case 8:
      return screen<8>;
    case 16:
      return screen<16>;
    default:
      return screen<0>;
  }
}

struct Scratch {
  Arena arena;
  Chunk<kRows> chunk;
  int32_t *words, *maxima;

  Scratch(const Quantize& q, const int64_t* rows, int64_t first, int64_t count, void* memory)
      : arena(memory), chunk(q, rows, first, count, arena) {
    words = arena.take<int32_t>(kRows * words_of(q.codebook_dim));
    maxima = arena.take<int32_t>(kRows * groups_of(q.codebook_size) * kLanes);
  }
};

int64_t scratch_size(const Quantize& q, int64_t count) { return Scratch(q, nullptr, 0, count, nullptr).arena.bytes(); }

int64_t run(const Quantize& q, const float* codebooks, const double* projections, const int64_t* rows, int64_t first,
            int64_t count, void* memory) {
  const Scratch scratch(q, rows, first, count, memory);
  const Chunk<kRows>& chunk = scratch.chunk;
  const int64_t bad = chunk.project(projections);
  if (bad >= 0) return bad;

  const int64_t groups = groups_of(q.codebook_size), words = words_of(q.codebook_dim);
  const Screen screen_codes = screen_for(words);
  for (int64_t book = 0; book < q.num_codebooks; ++book) {
    const float* codebook =
        codebooks + (q.shared_codebook ? 0 : book * packed_codebook_size(q.codebook_size, q.codebook_dim));
    const Bounds bounds = bounds_of(codebook);
    const float* exact = codebook + kHeader;
    const auto* codes = reinterpret_cast<const uint8_t*>(exact + groups * kGroup * q.codebook_dim);
    for (int64_t i = 0; i < chunk.padded; i += kRows) {
      const float* y = chunk.projected(book, i);
      Margins margins[kRows];
      for (int r = 0; r < kRows; ++r)
        margins[r] = quantize_row(y + r * q.codebook_dim, q.codebook_dim, bounds, scratch.words + r * words);
      screen_codes(scratch.words, codes, words, groups, scratch.maxima);
      for (int64_t r = 0; r < kRows && i + r < count; ++r) {
        int64_t code = 0;  // of a row that is projected to zero
        if (margins[r].rescored >= 0.0f) {
          code = rescore(y + r * q.codebook_dim, exact, q.codebook_size, q.codebook_dim,
                         scratch.maxima + r * groups * kLanes, margins[r]);
          if (code < 0)
            code = exact_winner<kEntry>(chunk.exactly_projected(projections, book, i + r), exact,
                                        kEntry * q.codebook_dim, q.codebook_size, q.codebook_dim, bounds.norm);
        }
        chunk.code(book, i + r) = code;
      }
    }
  }
  return -1;
}

}  // namespace

extern const QuantizeKernel quantize_kernel = {packed_codebook_size, packed_projection_size, pack_codebook,
                                               pack_projection,      scratch_size,           run};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
