// Compiled for AVX-512 BF16 and, if the compiler supports it, AMX. Each function is one pass over a panel; the
// order of the passes is in bf16.cpp.
#include "masked_cross_entropy/bf16_passes.h"

#include "common/exp.h"
#include "masked_cross_entropy/panel_packing.h"
#include "masked_cross_entropy/panel_products.h"

extern "C" float logf(float);

namespace bestrq2 {
namespace panel {
namespace {

using BESTRQ2_ISA::exp_nonpositive_to_subnormal;

inline __m512 widen_low(__m512i line) { return widen(_mm512_castsi512_si256(line)); }
inline __m512 widen_high(__m512i line) { return widen(_mm512_extracti64x4_epi64(line, 1)); }

inline void store_pair(u16* line, __m512 low, __m512 high) { _mm512_store_si512(line, join(low, high)); }
inline void store_scalar(u16* p, float value) {
  *p = static_cast<u16>(_mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0));
}

// Values that are needed in a while: from memory or the shared cache to the L2 cache.
void prefetch_far(const u16* values, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(u16);
  for (int64_t i = 0; i < count; i += kLine) _mm_prefetch(reinterpret_cast<const char*>(values + i), _MM_HINT_T1);
}

// A step that is about to be written.
void prefetch_block(const u16* block) {
  for (int64_t i = 0; i < kStep; i += 64 / sizeof(u16)) __builtin_prefetch(block + i, 1);
}

struct Entry {
  int64_t row, v;  // of the chunk, of the panel of classes
};
inline Entry entry(const Chunk& c, int64_t number, int64_t q) {
  const int64_t row = c.entries[number];
  return {row, c.call->targets[row_of(c, row)] - q * kPanel};
}

// Where every logit is -inf, differences from the maximum would be NaN.
inline __m512 finite_base(__m512 largest) {
  const __mmask16 none = _mm512_cmpeq_ps_mask(largest, _mm512_set1_ps(-__builtin_inff()));
  return _mm512_mask_mov_ps(largest, none, _mm512_setzero_ps());
}

// Statistics, exponentials and target logits of one block of logits z (32 classes, 32 rows).
void softmax_block(const Chunk& c, int64_t q, int64_t p, float* z, int64_t& number) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t classes = at_most(kPanel, f.classes - q * kPanel), row_panels = panels(c.rows);
  if (f.bias != nullptr)
    for (int64_t v = 0; v < classes; ++v) {
      const __m512 b = _mm512_set1_ps(f.bias[q * kPanel + v]);
      for (int h = 0; h < 2; ++h) {
        float* at = z + v * kPanel + h * kLanes;
        _mm512_store_ps(at, _mm512_add_ps(_mm512_load_ps(at), b));
      }
    }
  float* stats = c.stats + (q * row_panels + p) * 3 * kPanel;
  u16* out = c.buffer + (q * row_panels + p) * kStep;
  __m512 largest[2], base[2], sum[2], spread[2];
  for (int h = 0; h < 2; ++h) {
    largest[h] = _mm512_set1_ps(-__builtin_inff());
    for (int64_t v = 0; v < classes; ++v)
      largest[h] = _mm512_max_ps(largest[h], _mm512_load_ps(z + v * kPanel + h * kLanes));
    base[h] = finite_base(largest[h]);
    sum[h] = spread[h] = _mm512_setzero_ps();
  }
  for (int64_t v = 0; v < classes; ++v) {
    __m512 e[2];
    for (int h = 0; h < 2; ++h) {
      const __m512 x = _mm512_sub_ps(_mm512_load_ps(z + v * kPanel + h * kLanes), base[h]);
      spread[h] = _mm512_add_ps(spread[h], x);
      e[h] = exp_nonpositive_to_subnormal(x);
      sum[h] = _mm512_add_ps(sum[h], e[h]);
    }
    if (c.keep) store_pair(out + v * kPanel, e[0], e[1]);
  }
  if (c.keep)
    for (int64_t v = classes; v < kPanel; ++v) store_pair(out + v * kPanel, _mm512_setzero_ps(), _mm512_setzero_ps());
  for (int h = 0; h < 2; ++h) {
    _mm512_store_ps(stats + h * kLanes, largest[h]);
    _mm512_store_ps(stats + kPanel + h * kLanes, sum[h]);
    _mm512_store_ps(stats + 2 * kPanel + h * kLanes, spread[h]);
  }
  const int64_t all_rows = row_panels * kPanel;
  for (; number < c.bounds[q + 1]; ++number) {
    const Entry e = entry(c, number, q);
    if (e.row >= (p + 1) * kPanel) break;
    const float* column = z + e.row % kPanel;
    const float at_target = column[e.v * kPanel];
    bool earlier = false;
    for (int64_t v = 0; v < e.v; ++v) earlier |= column[v * kPanel] == at_target;
    c.row_stats[kAtTarget * all_rows + e.row] = at_target;
    c.row_stats[kEarlier * all_rows + e.row] = earlier ? 1.0f : 0.0f;
    // Its gradient comes from the exact logit: p - 1 would magnify the rounding of p.
    if (c.keep) out[e.v * kPanel + e.row % kPanel] = 0;
  }
}

// Memory that store_weight_gradient is about to read or write.
void prefetch_weight_gradient(const Chunk& c, int64_t q, int64_t s) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t classes = at_most(kPanel, f.classes - q * kPanel);
  for (int64_t v = 0; v < classes; ++v) {
    const int64_t at = (q * kPanel + v) * f.features + s * kPanel;
    if (c.last_chunk && f.weight_bf16) __builtin_prefetch(static_cast<u16*>(f.grad_weight) + at, 1);
    if (c.first_chunk && c.last_chunk && f.weight_bf16) continue;
    __builtin_prefetch(c.total + at, 1);
    __builtin_prefetch(c.total + at + kLanes, 1);
  }
}

// Block of the weight gradient: classes of panel q, features of panel s.
void store_weight_gradient(const Chunk& c, int64_t q, int64_t s, const float* block) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t classes = at_most(kPanel, f.classes - q * kPanel);
  for (int64_t v = 0; v < classes; ++v)
    for (int half = 0; half < 2; ++half) {
      const int64_t d = s * kPanel + half * kLanes, at = (q * kPanel + v) * f.features + d;
      const __mmask16 mask = first_lanes(f.features - d);
      __m512 sum = _mm512_load_ps(block + v * kPanel + half * kLanes);
      if (!c.first_chunk) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, c.total + at));
      if (c.last_chunk && f.weight_bf16)
        store_rounded(static_cast<u16*>(f.grad_weight) + at, mask, sum);
      else
        store_rounded(c.total + at, mask, sum);
    }
}

// dz of one line: 32 rows of class v.
struct LineGradient {
  __m512 factor[2], uniform[2];
  int64_t classes;
  float* bias_sums;  // [32][16], or null

  void operator()(int64_t v, __m512& low, __m512& high) const {
    low = v < classes ? _mm512_fmsub_ps(low, factor[0], uniform[0]) : _mm512_setzero_ps();
    high = v < classes ? _mm512_fmsub_ps(high, factor[1], uniform[1]) : _mm512_setzero_ps();
    if (bias_sums == nullptr) return;
    float* sum = bias_sums + v * kLanes;
    _mm512_store_ps(sum, _mm512_add_ps(_mm512_load_ps(sum), _mm512_add_ps(low, high)));
  }
};

// A block of exponentials becomes dz: in place, in pairs of classes, and once more as a step of an A panel.
void block_gradient(const LineGradient& gradient, u16* block, u16* a) {
  for (int64_t v = 0; v < kPanel; v += 2) {
    __m512i lines[2];
    for (int i = 0; i < 2; ++i) {
      const __m512i e = _mm512_load_si512(block + (v + i) * kPanel);
      __m512 low = widen_low(e), high = widen_high(e);
      gradient(v + i, low, high);
      lines[i] = join(low, high);
      _mm512_store_si512(a + (v + i) * kPanel, lines[i]);
    }
    _mm512_store_si512(block + v * kPanel, pairs(_mm512_castsi512_si256(lines[0]), _mm512_castsi512_si256(lines[1])));
    _mm512_store_si512(block + (v + 1) * kPanel,
                       pairs(_mm512_extracti64x4_epi64(lines[0], 1), _mm512_extracti64x4_epi64(lines[1], 1)));
  }
}
inline void set(u16* block, u16* a, int64_t v, int64_t r, float value) {
  store_scalar(a + v * kPanel + r, value);
  block[v / 2 * 2 * kPanel + 2 * r + v % 2] = a[v * kPanel + r];
}

// dz of one panel of classes, in the buffer and as an A panel summed over rows.
void logit_gradients(const Chunk& c, int64_t q, u16* a, float* bias_sums) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t row_panels = panels(c.rows), all_rows = row_panels * kPanel;
  LineGradient gradient{};
  gradient.classes = at_most(kPanel, f.classes - q * kPanel);
  gradient.bias_sums = f.grad_bias != nullptr ? bias_sums : nullptr;
  for (int64_t i = 0; i < kPanel * kLanes; i += kLanes) _mm512_store_ps(bias_sums + i, _mm512_setzero_ps());
  int64_t number = c.bounds[q];
  for (int64_t p = 0; p < row_panels; ++p) {
    u16* block = c.buffer + (q * row_panels + p) * kStep;
    for (int h = 0; h < 2; ++h) {
      const float* row = c.row_stats + p * kPanel + h * kLanes;
      const __m512 m = _mm512_load_ps(c.stats + (q * row_panels + p) * 3 * kPanel + h * kLanes);
      const __m512 share = exp_nonpositive_to_subnormal(_mm512_sub_ps(m, _mm512_load_ps(row + kMaximum * all_rows)));
      gradient.factor[h] = _mm512_mul_ps(_mm512_load_ps(row + kFactor * all_rows), share);
      gradient.uniform[h] = _mm512_load_ps(row + kUniform * all_rows);
    }
    block_gradient(gradient, block, a + p * kStep);
    for (; number < c.bounds[q + 1]; ++number) {
      const Entry e = entry(c, number, q);
      if (e.row >= (p + 1) * kPanel) break;
      const float at_target = c.row_stats[kGradientAtTarget * all_rows + e.row];
      set(block, a + p * kStep, e.v, e.row % kPanel, at_target);
      bias_sums[e.v * kLanes] += at_target + c.row_stats[kUniform * all_rows + e.row];
    }
  }
  if (f.grad_bias == nullptr) return;
  for (int64_t v = 0; v < gradient.classes; ++v) {
    const float sum = _mm512_reduce_add_ps(_mm512_load_ps(bias_sums + v * kLanes));
    float& target = f.grad_bias[q * kPanel + v];
    target = c.first_chunk ? sum : target + sum;
  }
}

}  // namespace

int64_t scratch_size(const MaskedCrossEntropy& f, int64_t rows) {
  const int64_t p = panels(rows), s = panels(f.features);
  const int64_t of_logits = p * kStep + s * kStep / 2, of_hidden = kMaxSteps * kStep / 2;
  const int64_t of_gradients = kFeaturePanels * kStep + kPanel * kLanes + kClassPanels * p * kStep / 2;
  const int64_t most = of_logits > of_gradients ? of_logits : of_gradients;
  return most > of_hidden ? most : of_hidden;
}

void pack_rows(const Chunk& c, int64_t p) {
  if (c.call->hidden_bf16)
    pack_rows_of(c, static_cast<const u16*>(c.call->hidden), p);
  else
    pack_rows_of(c, static_cast<const float*>(c.call->hidden), p);
}

void logits(const Chunk& c, int64_t q, int64_t begin, int64_t end, float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t steps = panels(f.features), parts = (steps + kMaxSteps - 1) / kMaxSteps;
  float* z = scratch;
  u16* classes = reinterpret_cast<u16*>(scratch + (end - begin) * kStep);
  if (f.weight_bf16)
    pack_classes(f, static_cast<const u16*>(f.weight), q, classes);
  else
    pack_classes(f, static_cast<const float*>(f.weight), q, classes);
  int64_t number = c.bounds[q];
  while (number < c.bounds[q + 1] && c.entries[number] < begin * kPanel) ++number;
  const Tiles tiles(c.dot);
  for (int64_t part = 0; part < parts; ++part) {
    const int64_t from = steps * part / parts, to = steps * (part + 1) / parts;
    for (int64_t p = begin; p < end; ++p) {
      const u16* rows = c.by_feature + (p * steps + from) * kStep;
      float* block = z + (p - begin) * kStep;
      const bool final = part == parts - 1;
      if (final && c.keep) prefetch_block(c.buffer + (q * panels(c.rows) + p) * kStep);
      product(c.dot, classes + from * kStep, rows, to - from, block, part > 0);
      if (final) softmax_block(c, q, p, block, number);
    }
  }
}

void losses(const Chunk& c, int64_t p) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t class_panels = panels(f.classes), all_rows = panels(c.rows) * kPanel, stride = 3 * all_rows;
  const float kept = 1.0f - f.label_smoothing;
  for (int h = 0; h < 2; ++h) {
    float* row = c.row_stats + p * kPanel + h * kLanes;
    const float* stats = c.stats + p * 3 * kPanel + h * kLanes;
    alignas(64) int32_t panel_of[kLanes];
    int64_t at[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t r = p * kPanel + h * kLanes + i;
      at[i] = r < c.rows ? row_of(c, r) : -1;
      panel_of[i] = at[i] < 0 ? 0 : static_cast<int32_t>(f.targets[at[i]] / kPanel);
    }
    const __m512i own = _mm512_load_si512(panel_of);
    const __m512 at_target = _mm512_load_ps(row + kAtTarget * all_rows);
    __m512 largest = _mm512_set1_ps(-__builtin_inff());
    __mmask16 beaten = _mm512_cmpneq_ps_mask(_mm512_load_ps(row + kEarlier * all_rows), _mm512_setzero_ps());
    for (int64_t q = 0; q < class_panels; ++q) {
      const __m512 m = _mm512_load_ps(stats + q * stride);
      largest = _mm512_max_ps(largest, m);
      const __mmask16 before = _mm512_cmpgt_epi32_mask(own, _mm512_set1_epi32(static_cast<int>(q)));
      beaten = static_cast<__mmask16>(beaten | _mm512_mask_cmp_ps_mask(before, m, at_target, _CMP_GE_OQ));
    }
    const auto best = static_cast<__mmask16>(_mm512_cmpeq_ps_mask(at_target, largest) & ~beaten);
    const __m512 base = finite_base(largest);
    __m512 sum = _mm512_setzero_ps(), spread = _mm512_setzero_ps();
    for (int64_t q = 0; q < class_panels; ++q) {
      const float* s = stats + q * stride;
      const __m512 m = _mm512_load_ps(s);
      const __m512 classes = _mm512_set1_ps(static_cast<float>(at_most(kPanel, f.classes - q * kPanel)));
      const __m512 moved = _mm512_sub_ps(finite_base(m), base);
      sum = _mm512_fmadd_ps(_mm512_load_ps(s + kPanel), exp_nonpositive_to_subnormal(_mm512_sub_ps(m, base)), sum);
      spread = _mm512_add_ps(spread, _mm512_fmadd_ps(moved, classes, _mm512_load_ps(s + 2 * kPanel)));
    }
    alignas(64) float maxima[kLanes], sums[kLanes], spreads[kLanes], distances[kLanes], shares[kLanes];
    const __m512 distance = _mm512_sub_ps(at_target, base);
    _mm512_store_ps(maxima, base), _mm512_store_ps(sums, sum), _mm512_store_ps(spreads, spread);
    _mm512_store_ps(distances, distance), _mm512_store_ps(shares, exp_nonpositive_to_subnormal(distance));
    for (int64_t i = 0; i < kLanes; ++i) {
      row[kMaximum * all_rows + i] = maxima[i];
      row[kFactor * all_rows + i] = row[kUniform * all_rows + i] = row[kGradientAtTarget * all_rows + i] = 0.0f;
      if (at[i] < 0) continue;
      const float weight = f.scale * (f.row_weights != nullptr ? f.row_weights[at[i]] : 1.0f);
      const float log_sum = logf(sums[i]), lse = maxima[i] + log_sum;
      float entropy = log_sum - kept * distances[i];
      if (f.label_smoothing != 0.0f) entropy -= f.label_smoothing * (spreads[i] / static_cast<float>(f.classes));
      f.losses[at[i]] = weight * (entropy + f.z_loss * lse * lse);
      f.correct[at[i]] = (best >> i & 1) != 0 ? 1.0f : 0.0f;
      const float factor = weight * (1.0f + 2.0f * f.z_loss * lse) / sums[i];
      const float uniform = weight * f.label_smoothing / static_cast<float>(f.classes);
      row[kFactor * all_rows + i] = factor;
      row[kUniform * all_rows + i] = uniform;
      row[kGradientAtTarget * all_rows + i] = factor * shares[i] - uniform - weight * kept;
    }
  }
}

void gradients(const Chunk& c, int64_t first, int64_t last, int64_t slot, int64_t slots, float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t row_panels = panels(c.rows), feature_panels = panels(f.features);
  float* blocks = scratch;                                              // [kFeaturePanels] C blocks
  float* bias_sums = blocks + kFeaturePanels * kStep;                   // [32][16]
  u16* const dz = reinterpret_cast<u16*>(bias_sums + kPanel * kLanes);  // [last - first] A panels
  for (int64_t q = first; q < last; ++q) {
    logit_gradients(c, q, dz + (q - first) * row_panels * kStep, bias_sums);
    if (f.grad_hidden == nullptr) continue;
    u16* out = c.transposed + (slot + q - first) * kStep;
    if (f.weight_bf16)
      pack_transposed(f, static_cast<const u16*>(f.weight), q, out, slots * kStep);
    else
      pack_transposed(f, static_cast<const float*>(f.weight), q, out, slots * kStep);
  }
  if (f.grad_weight == nullptr) return;
  const u16* by_row = c.by_row;
  const int64_t parts = (row_panels + kMaxSteps - 1) / kMaxSteps;
  const Tiles tiles(c.dot);
  for (int64_t begin = 0; begin < feature_panels; begin += kFeaturePanels) {
    const int64_t end = at_most(begin + kFeaturePanels, feature_panels);
    for (int64_t q = first; q < last; ++q) {
      // What the next block of features will read comes to the L2 cache a piece at a time.
      const int64_t ahead = at_most(end + kFeaturePanels, feature_panels) - end;
      const int64_t piece = ahead * row_panels * kStep / ((last - first) * parts * (end - begin));
      const u16* next = by_row + end * row_panels * kStep + (q - first) * parts * (end - begin) * piece;
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = row_panels * part / parts, to = row_panels * (part + 1) / parts;
        for (int64_t s = begin; s < end; ++s, next += piece) {
          const u16* a = dz + ((q - first) * row_panels + from) * kStep;
          float* block = blocks + (s - begin) * kStep;
          const bool final = part == parts - 1;
          if (final) prefetch_weight_gradient(c, q, s);
          prefetch_far(next, piece);
          product(c.dot, a, by_row + (s * row_panels + from) * kStep, to - from, block, part > 0);
          if (final) store_weight_gradient(c, q, s, block);
        }
      }
    }
  }
}

void hidden_gradient(const Chunk& c, int64_t first, int64_t last, int64_t begin, int64_t end, bool write,
                     float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t row_panels = panels(c.rows), feature_panels = panels(f.features), slots = end - begin;
  u16* dz = reinterpret_cast<u16*>(scratch);
  const Tiles tiles(c.dot);
  for (int64_t from = 0; from < slots; from += kMaxSteps) {
    const int64_t steps = at_most(kMaxSteps, slots - from);
    const int64_t piece = from + kMaxSteps < slots ? kMaxSteps * kStep / (last - first) : 0;
    for (int64_t p = first; p < last; ++p) {
      for (int64_t s = 0; s < steps; ++s) {
        const u16* block = c.buffer + ((begin + from + s) * row_panels + p) * kStep;
        __builtin_memcpy(dz + s * kStep, block, kStep * sizeof(u16));
      }
      for (int64_t s = 0; s < feature_panels; ++s) {
        const u16* weights = c.transposed + (s * slots + from) * kStep;
        prefetch_far(weights + kMaxSteps * kStep + (p - first) * piece, piece);
        product(c.dot, weights, dz, steps, c.grad_T + (p * feature_panels + s) * kStep,
                !c.first_codebook || begin + from > 0);
      }
    }
  }
  if (!write) return;
  for (int64_t p = first; p < last; ++p)
    if (f.hidden_bf16)
      write_rows(c, p, static_cast<u16*>(f.grad_hidden));
    else
      write_rows(c, p, static_cast<float*>(f.grad_hidden));
}

}  // namespace panel
}  // namespace bestrq2
