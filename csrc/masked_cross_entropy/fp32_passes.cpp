// The passes over one chunk of rows in fp32 (layouts in fp32_passes.h). Compiled once per instruction set.
//
//                    two vectors of neighbouring rows, or of features
//                   +----------------+
//   kTile classes,  | FMA tile, in   |   every product is a loop over the summed axis: two loads of vectors,
//   or features     | registers      |   kTile broadcasts and 2 kTile multiply-adds a step
//                   +----------------+
#include "masked_cross_entropy/fp32_passes.h"

#include "common/exp.h"
#include "common/integers.h"
#include "common/simd.h"

// No standard library templates here: their inline functions, compiled for AVX-512, could be the copies that the linker
// keeps for every other file.
extern "C" float logf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTile = 12;
#else
constexpr int kTile = 6;
#endif
constexpr int kVectors = 2;
constexpr int64_t kPanel = kVectors * kLanes;
constexpr int64_t kFeatures = 384;  // summed at a time in the logits: a panel of rows is 24 KB then
constexpr int64_t kClasses = 64;    // summed at a time in the gradient of the rows, for all of its panels
constexpr int64_t kBlock = 64;      // classes whose exponentials are summed before they are added to the sum

int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

// Row number of the caller's tensors of row r of the chunk.
int64_t row_of(const Fp32Chunk& c, int64_t r) {
  return c.call->index != nullptr ? c.call->index[c.first + r] : c.first + r;
}

struct Tile {
  Floats sum[kTile][kVectors];

  Tile() {
#pragma GCC unroll 12
    for (auto& row : sum)
      for (auto& vector : row) vector = Floats{};
  }

  // sum(i, :) += a(i, k) b(k, :) over `steps` k; a(i, k) = a[i * row + k * step], b is (steps, kPanel).
  __attribute__((always_inline)) void add_product(const float* a, int64_t row, int64_t step, const float* b,
                                                  int64_t steps) {
    const float* low = a + kTile / 2 * row;  // a second base, for the addressing modes of x86
#pragma GCC unroll 4
    for (int64_t k = 0; k < steps; ++k) {
      Floats right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kPanel + v * kLanes);
#pragma GCC unroll 12
      for (int i = 0; i < kTile; ++i) {
        const Floats left = splat(i < kTile / 2 ? a[i * row] : low[(i - kTile / 2) * row]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
      }
      a += step, low += step;
    }
  }

  // Adds c, (kTile, kPanel) in rows of `stride`.
  void add(const float* c, int64_t stride) {
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i)
      for (int v = 0; v < kVectors; ++v) sum[i][v] += load(c + i * stride + v * kLanes);
  }

  void put(float* c, int64_t stride) const {
#pragma GCC unroll 12
    for (int i = 0; i < kTile; ++i)
      for (int v = 0; v < kVectors; ++v) store(c + i * stride + v * kLanes, sum[i][v]);
  }
};

int64_t scratch_size(int64_t features) { return kTile * at_least(features, at_least(kClasses, kPanel)); }

void pack_rows(const Fp32Chunk& c, int64_t p) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t features = f.features, all_rows = panels(c.rows) * kPanel;
  const float* hidden = static_cast<const float*>(f.hidden);
  float* by_feature = c.by_feature + p * features * kPanel;
  for (int64_t i = 0; i < kPanel; ++i) {
    const int64_t r = p * kPanel + i;
    const float* row = r < c.rows ? hidden + row_of(c, r) * features : nullptr;
    for (int64_t d = 0; d < features; ++d) by_feature[d * kPanel + i] = row != nullptr ? row[d] : 0.0f;
    if (f.grad_weight == nullptr) continue;
    for (int64_t d = 0; d < panels(features) * kPanel; ++d)
      c.by_row[(d / kPanel * all_rows + r) * kPanel + d % kPanel] = row != nullptr && d < features ? row[d] : 0.0f;
  }
}

void logits(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t features = f.features, row_panels = panels(c.rows);
  const float* weight = static_cast<const float*>(f.weight);
  const bool ragged = last % kTile != 0;  // the last tile reads a copy with zeros behind it
  if (ragged) {
    const int64_t from = last / kTile * kTile;
    for (int64_t i = 0; i < kTile; ++i)
      for (int64_t d = 0; d < features; ++d)
        scratch[i * features + d] = from + i < last ? weight[(from + i) * features + d] : 0.0f;
  }
  for (int64_t from = 0; from < features; from += kFeatures) {
    const int64_t steps = at_most(kFeatures, features - from);
    for (int64_t p = 0; p < row_panels; ++p)
      for (int64_t v = first; v < last; v += kTile) {
        const float* classes = v + kTile > last ? scratch : weight + v * features;
        float* z = c.logits + p * c.logits_stride + v * kPanel;
        Tile tile;
        tile.add_product(classes + from, features, 1, c.by_feature + (p * features + from) * kPanel, steps);
        if (from > 0) tile.add(z, kPanel);
        tile.put(z, kPanel);
      }
  }
}

// Calls use(v, z) for the classes [first, last), with the bias added.
template <class Use>
inline void for_classes(const float* z, const float* bias, int64_t first, int64_t last, const Use& use) {
  if (bias != nullptr)
    for (int64_t v = first; v < last; ++v) use(v, load(z + v * kPanel) + splat(bias[v]));
  else
    for (int64_t v = first; v < last; ++v) use(v, load(z + v * kPanel));
}

void softmax(const Fp32Chunk& c, int64_t p) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t classes = f.classes;
  const float kept = 1.0f - f.label_smoothing;
  for (int64_t h = 0; h < kVectors; ++h) {
    float* z = c.logits + p * c.logits_stride + h * kLanes;
    int64_t rows[kLanes];  // of the caller; -1 behind the last
    Ints target{};
    Floats at_target{};
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t r = p * kPanel + h * kLanes + i;
      rows[i] = r < c.rows ? row_of(c, r) : -1;
      if (rows[i] < 0) continue;
      const int64_t t = f.targets[rows[i]];
      target[i] = static_cast<int32_t>(t);
      at_target[i] = z[t * kPanel + i] + (f.bias != nullptr ? f.bias[t] : 0.0f);
    }
    Floats largest = splat(-__builtin_inff());
    for_classes(z, f.bias, 0, classes, [&](int64_t, Floats x) { largest = maximum(x, largest); });

    Floats sum{}, spread{};  // spread: sum of the differences from the maximum
    Ints beaten{};           // an earlier class has the largest logit, too
    for (int64_t first = 0; first < classes; first += kBlock) {
      Floats part{}, spread_part{};
      for_classes(z, f.bias, first, at_most(first + kBlock, classes), [&](int64_t v, Floats x) {
        const Floats distance = x - largest;
        beaten |= (x == largest) & (splat(static_cast<int32_t>(v)) < target);
        spread_part += distance;
        const Floats e = exp_nonpositive(distance);
        part += e;
        if (c.keep) store(z + v * kPanel, e);
      });
      sum += part, spread += spread_part;
    }

    Floats factor{}, uniform{};
    float gradient_at_target[kLanes];
    Ints live{};
    for (int64_t i = 0; i < kLanes; ++i) {
      if (rows[i] < 0) continue;
      live[i] = -1;
      const float weight = f.scale * (f.row_weights != nullptr ? f.row_weights[rows[i]] : 1.0f);
      const float log_sum = logf(sum[i]), lse = largest[i] + log_sum, distance = at_target[i] - largest[i];
      float entropy = log_sum - kept * distance;
      if (f.label_smoothing != 0.0f) entropy -= f.label_smoothing * (spread[i] / static_cast<float>(classes));
      f.losses[rows[i]] = weight * (entropy + f.z_loss * lse * lse);
      f.correct[rows[i]] = at_target[i] == largest[i] && beaten[i] == 0 ? 1.0f : 0.0f;
      factor[i] = weight * (1.0f + 2.0f * f.z_loss * lse) / sum[i];
      uniform[i] = weight * f.label_smoothing / static_cast<float>(classes);
      if (c.keep) gradient_at_target[i] = z[target[i] * kPanel + i] * factor[i] - uniform[i] - weight * kept;
    }
    if (!c.keep) continue;
    for (int64_t v = 0; v < classes; ++v) {
      const Floats dz = load(z + v * kPanel) * factor - uniform;
      store(z + v * kPanel, as_float(as_bits(dz) & live));  // 0 behind the last row, whatever the weight holds
    }
    for (int64_t i = 0; i < kLanes; ++i)
      if (rows[i] >= 0) z[target[i] * kPanel + i] = gradient_at_target[i];
  }
}

void hidden_gradient(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t features = f.features, padded = (features + kTile - 1) / kTile * kTile;
  const float* weight = static_cast<const float*>(f.weight);
  for (int64_t v = 0; v < f.classes; v += kClasses) {
    const int64_t steps = at_most(kClasses, f.classes - v);
    if (padded != features)  // the last tile reads a copy with zeros beside it
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t i = 0; i < kTile; ++i) {
          const int64_t d = padded - kTile + i;
          scratch[k * kTile + i] = d < features ? weight[(v + k) * features + d] : 0.0f;
        }
    for (int64_t p = first; p < last; ++p)
      for (int64_t d = 0; d < features; d += kTile) {
        const bool copied = d + kTile > features;
        float* grad = c.grad_T + (p * padded + d) * kPanel;
        Tile tile;
        tile.add_product(copied ? scratch : weight + v * features + d, 1, copied ? kTile : features,
                         c.logits + p * c.logits_stride + v * kPanel, steps);
        if (v > 0 || !c.first_codebook) tile.add(grad, kPanel);
        tile.put(grad, kPanel);
      }
  }
  if (!c.last_codebook) return;
  for (int64_t r = first * kPanel; r < at_most(last * kPanel, c.rows); ++r) {
    float* row = static_cast<float*>(f.grad_hidden) + row_of(c, r) * features;
    const float* grad = c.grad_T + r / kPanel * padded * kPanel + r % kPanel;
    for (int64_t d = 0; d < features; ++d) row[d] = grad[d * kPanel];
  }
}

void class_gradients(const Fp32Chunk& c, int64_t first, int64_t last, float* scratch) {
  const MaskedCrossEntropy& f = *c.call;
  const int64_t features = f.features, row_panels = panels(c.rows), all_rows = row_panels * kPanel;
  if (f.grad_bias != nullptr)
    for (int64_t v = first; v < last; ++v) {
      Floats total{};
      for (int64_t p = 0; p < row_panels; ++p)
        for (int h = 0; h < kVectors; ++h) total += load(c.logits + p * c.logits_stride + v * kPanel + h * kLanes);
      f.grad_bias[v] = sum(total) + (c.first_chunk ? 0.0f : f.grad_bias[v]);
    }
  if (f.grad_weight == nullptr) return;
  for (int64_t v = first; v < last; v += kTile)
    for (int64_t d = 0; d < features; d += kPanel) {
      float* grad = static_cast<float*>(f.grad_weight) + v * features + d;
      Tile tile;
      for (int64_t p = 0; p < row_panels; ++p)
        tile.add_product(c.logits + p * c.logits_stride + v * kPanel, kPanel, 1,
                         c.by_row + (d / kPanel * all_rows + p * kPanel) * kPanel, kPanel);
      if (v + kTile <= last && d + kPanel <= features) {
        if (!c.first_chunk) tile.add(grad, features);
        tile.put(grad, features);
        continue;
      }
      tile.put(scratch, kPanel);
      for (int64_t i = 0; i < at_most(kTile, last - v); ++i)
        for (int64_t j = 0; j < at_most(kPanel, features - d); ++j) {
          float& value = grad[i * features + j];
          value = scratch[i * kPanel + j] + (c.first_chunk ? 0.0f : value);
        }
    }
}

}  // namespace

extern const Fp32Passes fp32_passes = {kPanel, kTile,   scratch_size,    pack_rows,
                                       logits, softmax, hidden_gradient, class_gradients};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
