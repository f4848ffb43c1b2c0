// Compiled once per instruction set; the loops are written so that the compiler vectorises them (-fopenmp-simd allows
// it to reorder the marked sums, and nothing else). A row stays in the first cache between its passes.
#include "block_rows/kernel.h"

#include "block_rows/gelu.h"

extern "C" float sqrtf(float);

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

// 1 / (1 + exp(-x)) to about 3 ulp, for every x and NaN.
inline float logistic(float x) {
  float t = -x;
  t = t > 88.0f ? 88.0f : t;
  t = t < -87.0f ? -87.0f : t;
  return 1.0f / (1.0f + exponential(t));
}

struct Moments {
  float mean, inverse;  // of the norm: (s - mean) * inverse
};

Moments moments(const float* s, int64_t width, bool layer_norm, float epsilon) {
  float mean = 0.0f;
  if (layer_norm) {
#pragma omp simd reduction(+ : mean)
    for (int64_t i = 0; i < width; ++i) mean += s[i];
    mean /= static_cast<float>(width);
  }
  float square = 0.0f;
#pragma omp simd reduction(+ : square)
  for (int64_t i = 0; i < width; ++i) square += (s[i] - mean) * (s[i] - mean);
  return {mean, 1.0f / sqrtf(square / static_cast<float>(width) + epsilon)};
}

// Row of `branch` or `out` that belongs to a row of x, -1: none.
inline int64_t placed(const int64_t* place, int64_t row, int64_t rows_per_clip) {
  if (place == nullptr) return row;
  const int64_t clip = place[row / rows_per_clip];
  return clip < 0 ? -1 : clip * rows_per_clip + row % rows_per_clip;
}

template <class T>
void norm_forward(const NormRows& a, int64_t first, int64_t last, float* s) {
  const int64_t width = a.width;
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * width;
    const int64_t of_branch = a.branch != nullptr ? placed(a.branch_place, row, a.rows_per_clip) : -1;
    const int64_t of_out = a.out != nullptr ? placed(a.out_place, row, a.rows_per_clip) : -1;
    if (of_branch >= 0) {
      const T* branch = static_cast<const T*>(a.branch) + of_branch * width;
      T* sum = static_cast<T*>(a.sum) + row * width;
      const float scale = a.factor * (a.scale != nullptr ? a.scale[row / a.rows_per_clip] : 1.0f);
      if (a.branch_bias != nullptr) {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          T rounded;
          narrow(widen(x[i]) + scale * (widen(branch[i]) + a.branch_bias[i]), rounded);
          sum[i] = rounded;
          s[i] = widen(rounded);
        }
      } else {
#pragma omp simd
        for (int64_t i = 0; i < width; ++i) {
          T rounded;
          narrow(widen(x[i]) + scale * widen(branch[i]), rounded);
          sum[i] = rounded;
          s[i] = widen(rounded);
        }
      }
    } else {
      if (a.branch != nullptr) __builtin_memcpy(static_cast<T*>(a.sum) + row * width, x, width * sizeof(T));
      if (of_out < 0) continue;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) s[i] = widen(x[i]);
    }
    if (of_out < 0) continue;
    const Moments m = moments(s, width, a.layer_norm, a.epsilon);
    T* out = static_cast<T*>(a.out) + of_out * width;
    if (a.weight == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow((s[i] - m.mean) * m.inverse, out[i]);
    } else if (a.bias == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow((s[i] - m.mean) * m.inverse * a.weight[i], out[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow((s[i] - m.mean) * m.inverse * a.weight[i] + a.bias[i], out[i]);
    }
  }
}

// g = gradient of one row through its norm; weight and bias: sums, added to.
template <class T>
void norm_row_backward(const NormRows& a, const T* sum, const T* grad, float* s, float* g, float* weight, float* bias) {
  const int64_t width = a.width;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) s[i] = widen(sum[i]);
  const Moments m = moments(s, width, a.layer_norm, a.epsilon);
  float mean = 0.0f, along = 0.0f;  // of g, and of g times the normalised row
  if (a.weight != nullptr) {
#pragma omp simd reduction(+ : mean, along)
    for (int64_t i = 0; i < width; ++i) {
      const float normal = (s[i] - m.mean) * m.inverse, upstream = widen(grad[i]);
      weight[i] += upstream * normal;
      bias[i] += upstream;
      s[i] = normal;
      g[i] = upstream * a.weight[i];
      mean += g[i];
      along += g[i] * normal;
    }
  } else {
#pragma omp simd reduction(+ : mean, along)
    for (int64_t i = 0; i < width; ++i) {
      s[i] = (s[i] - m.mean) * m.inverse;
      g[i] = widen(grad[i]);
      mean += g[i];
      along += g[i] * s[i];
    }
  }
  mean = a.layer_norm ? mean / static_cast<float>(width) : 0.0f;
  along /= static_cast<float>(width);
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) g[i] = m.inverse * (g[i] - mean - s[i] * along);
}

template <class T>
void norm_backward(const NormRows& a, int64_t first, int64_t last, float* scratch, float* partial) {
  const int64_t width = a.width;
  float *g = scratch + width, *branch_bias = partial + 2 * width;
  for (int64_t row = first; row < last; ++row) {
    const int64_t of_out = a.grad_out != nullptr ? placed(a.out_place, row, a.rows_per_clip) : -1;
    if (of_out >= 0)
      norm_row_backward(a, static_cast<const T*>(a.sum) + row * width,
                        static_cast<const T*>(a.grad_out) + of_out * width, scratch, g, partial, partial + width);
    else
      __builtin_memset(g, 0, width * sizeof(float));
    T* grad_x = static_cast<T*>(a.grad_x) + row * width;
    if (a.grad_sum != nullptr) {
      const T* straight = static_cast<const T*>(a.grad_sum) + row * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) {
        g[i] += widen(straight[i]);
        narrow(g[i], grad_x[i]);
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow(g[i], grad_x[i]);
    }
    if (a.grad_branch == nullptr && a.grad_branch_bias == nullptr) continue;
    const int64_t of_branch = placed(a.branch_place, row, a.rows_per_clip);
    if (of_branch < 0) continue;
    const float scale = a.factor * (a.scale != nullptr ? a.scale[row / a.rows_per_clip] : 1.0f);
    if (a.grad_branch != nullptr) {
      T* grad_branch = static_cast<T*>(a.grad_branch) + of_branch * width;
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) narrow(scale * g[i], grad_branch[i]);
    }
    if (a.grad_branch_bias != nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < width; ++i) branch_bias[i] += scale * g[i];
    }
  }
}

template <class T>
void rotary_forward(const RotaryRows& a, int64_t first, int64_t last, float* x) {
  const int64_t dim = a.dim, half = dim / 2;
  for (int64_t row = first; row < last; ++row) {
    const int64_t angle = a.cos != nullptr ? row % a.angle_rows * half : 0;
    for (int64_t which = 0; which < 2; ++which) {
      const float* weight = which == 0 ? a.query_weight : a.key_weight;
      const T* in = static_cast<const T*>(a.qkv) + (row * 3 + which) * a.heads * dim;
      T* out = static_cast<T*>(a.out) + (row * 2 + which) * a.heads * dim;
      for (int64_t head = 0; head < a.heads; ++head, in += dim, out += dim) {
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) x[i] = widen(in[i]);
        if (weight != nullptr) {
          const float inverse = moments(x, dim, false, a.epsilon).inverse;
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) x[i] *= inverse * weight[i];
        }
        if (a.cos == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) narrow(x[i], out[i]);
          continue;
        }
        const float *cos = a.cos + angle, *sin = a.sin + angle;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
          narrow(x[i] * cos[i] - x[half + i] * sin[i], out[i]);
          narrow(x[half + i] * cos[i] + x[i] * sin[i], out[half + i]);
        }
      }
    }
  }
}

template <class T>
void rotary_backward(const RotaryRows& a, int64_t first, int64_t last, float* scratch, float* partial) {
  const int64_t dim = a.dim, half = dim / 2;
  float *x = scratch, *g = scratch + dim;
  for (int64_t row = first; row < last; ++row) {
    const int64_t clip = row / a.rows_per_clip, place = row % a.rows_per_clip;
    const int64_t angle = a.cos != nullptr ? row % a.angle_rows * half : 0;
    for (int64_t which = 0; which < 3; ++which) {
      const void* base = which == 0 ? a.grad_query : which == 1 ? a.grad_key : a.grad_value;
      const int64_t* strides = which == 0 ? a.query_strides : which == 1 ? a.key_strides : a.value_strides;
      const float* weight = which == 0 ? a.query_weight : which == 1 ? a.key_weight : nullptr;
      float* of_weight = partial + (which == 1 ? dim : 0);
      const T* in = static_cast<const T*>(a.qkv) + (row * 3 + which) * a.heads * dim;
      T* out = static_cast<T*>(a.grad_qkv) + (row * 3 + which) * a.heads * dim;
      for (int64_t head = 0; head < a.heads; ++head, in += dim, out += dim) {
        const T* grad = static_cast<const T*>(base) + clip * strides[0] + place * strides[1] + head * strides[2];
        if (which == 2) {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) out[i] = grad[i];
          continue;
        }
        if (a.cos != nullptr) {
          const float *cos = a.cos + angle, *sin = a.sin + angle;
#pragma omp simd
          for (int64_t i = 0; i < half; ++i) {
            const float low = widen(grad[i]), high = widen(grad[half + i]);
            g[i] = low * cos[i] + high * sin[i];
            g[half + i] = high * cos[i] - low * sin[i];
          }
        } else {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) g[i] = widen(grad[i]);
        }
        if (weight == nullptr) {
#pragma omp simd
          for (int64_t i = 0; i < dim; ++i) narrow(g[i], out[i]);
          continue;
        }
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) x[i] = widen(in[i]);
        const float inverse = moments(x, dim, false, a.epsilon).inverse;
        float along = 0.0f;
#pragma omp simd reduction(+ : along)
        for (int64_t i = 0; i < dim; ++i) {
          x[i] *= inverse;
          of_weight[i] += g[i] * x[i];
          g[i] *= weight[i];
          along += g[i] * x[i];
        }
        along /= static_cast<float>(dim);
#pragma omp simd
        for (int64_t i = 0; i < dim; ++i) narrow(inverse * (g[i] - x[i] * along), out[i]);
      }
    }
  }
}

template <class T>
void gated_forward(const GatedRows& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T *gate = static_cast<const T*>(a.x) + row * 2 * a.width, *value = gate + a.width;
    T* out = static_cast<T*>(a.out) + row * a.width;
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) {
      const float g = widen(gate[i]);
      narrow(g * logistic(g) * widen(value[i]), out[i]);
    }
  }
}

template <class T>
void gated_backward(const GatedRows& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T *gate = static_cast<const T*>(a.x) + row * 2 * a.width, *value = gate + a.width;
    const T* grad = static_cast<const T*>(a.grad) + row * a.width;
    T *grad_gate = static_cast<T*>(a.grad_x) + row * 2 * a.width, *grad_value = grad_gate + a.width;
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) {
      const float g = widen(gate[i]), s = logistic(g), upstream = widen(grad[i]);
      narrow(upstream * widen(value[i]) * s * (1.0f + g * (1.0f - s)), grad_gate[i]);
      narrow(upstream * g * s, grad_value[i]);
    }
  }
}

template <class T>
void gelu_forward(const GeluRows& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row)
    gelu_row(static_cast<const T*>(a.x) + row * a.width, a.bias, a.width, static_cast<T*>(a.out) + row * a.width);
}

template <class T>
void gelu_backward(const GeluRows& a, int64_t first, int64_t last, float* partial) {
  for (int64_t row = first; row < last; ++row)
    gelu_row_backward(static_cast<const T*>(a.x) + row * a.width, a.bias, static_cast<const T*>(a.grad) + row * a.width,
                      a.width, static_cast<T*>(a.grad_x) + row * a.width, partial);
}

template <class T>
void add_bias(const BiasRows& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    T* x = static_cast<T*>(a.x) + row * a.width;
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) narrow(widen(x[i]) + a.bias[i], x[i]);
  }
}

template <class T>
void sum_rows(const BiasRows& a, int64_t first, int64_t last, float* partial) {
  for (int64_t row = first; row < last; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
#pragma omp simd
    for (int64_t i = 0; i < a.width; ++i) partial[i] += widen(x[i]);
  }
}

#define BY_TYPE(name) [](const auto& a, auto... rest) { a.bf16 ? name<uint16_t>(a, rest...) : name<float>(a, rest...); }

}  // namespace

extern const BlockRows block_rows = {BY_TYPE(norm_forward),    BY_TYPE(norm_backward), BY_TYPE(rotary_forward),
                                     BY_TYPE(rotary_backward), BY_TYPE(gated_forward), BY_TYPE(gated_backward),
                                     BY_TYPE(gelu_forward),    BY_TYPE(gelu_backward), BY_TYPE(add_bias),
                                     BY_TYPE(sum_rows)};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
