// In-place complex FFT of several signals at once, one per vector lane, so that no lane can change another's bits.
// Decimation in frequency, radices 2, 3, 4, 5 and 8. A block of radix * m points becomes `radix` blocks of m points,
// which are finished one after the other: they fit the first cache where the whole transform does not.
//
//   x_0 .. x_{m-1} | x_m .. | .. | x_{(r-1)m} ..     butterfly over x_j, x_{j+m}, .. times exp(-2 pi i j p / (r m))
//   block 0: X_{0 mod r} | block 1: X_{1 mod r} | ..  each a transform of m points
#pragma once

#include <cstdint>

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 8;
#elif defined(__AVX2__)
constexpr int kLanes = 4;
#else
constexpr int kLanes = 2;
#endif
typedef double Doubles __attribute__((vector_size(8 * kLanes)));
typedef int64_t Integers __attribute__((vector_size(8 * kLanes)));
typedef float Floats __attribute__((vector_size(4 * kLanes)));

struct Complex {
  Doubles re, im;
};

inline Complex operator+(const Complex& a, const Complex& b) { return {a.re + b.re, a.im + b.im}; }
inline Complex operator-(const Complex& a, const Complex& b) { return {a.re - b.re, a.im - b.im}; }
inline Complex minus_i(const Complex& a) { return {a.im, -a.re}; }
inline Complex add_minus_i(const Complex& a, const Complex& b) { return {a.re + b.im, a.im - b.re}; }  // a - i b
inline Complex add_i(const Complex& a, const Complex& b) { return {a.re - b.im, a.im + b.re}; }        // a + i b
inline Complex turned(const Complex& a, const double* w) {
  return {a.re * w[0] - a.im * w[1], a.re * w[1] + a.im * w[0]};
}

template <int Radix>
struct Butterfly;

template <>
struct Butterfly<2> {
  static inline __attribute__((always_inline)) void run(Complex* x) {
    const Complex sum = x[0] + x[1];
    x[1] = x[0] - x[1], x[0] = sum;
  }
};

template <>
struct Butterfly<3> {
  static inline __attribute__((always_inline)) void run(Complex* x) {
    constexpr double kSine = 0.86602540378443864676;
    const Complex sum = x[1] + x[2], difference = x[1] - x[2];
    const Complex middle = {x[0].re - 0.5 * sum.re, x[0].im - 0.5 * sum.im};
    const Complex side = {difference.re * kSine, difference.im * kSine};
    x[0] = x[0] + sum, x[1] = add_minus_i(middle, side), x[2] = add_i(middle, side);
  }
};

template <>
struct Butterfly<4> {
  static inline __attribute__((always_inline)) void run(Complex* x) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = x[1] - x[3];
    x[0] = a + c, x[1] = add_minus_i(b, d), x[2] = a - c, x[3] = add_i(b, d);
  }
};

template <>
struct Butterfly<5> {
  static inline __attribute__((always_inline)) void run(Complex* x) {
    constexpr double kCosine1 = 0.30901699437494742410, kCosine2 = -0.80901699437494742410;
    constexpr double kSine1 = 0.95105651629515357212, kSine2 = 0.58778525229247312917;
    const Complex a = x[1] + x[4], b = x[2] + x[3], c = x[1] - x[4], d = x[2] - x[3];
    const Complex m1 = {x[0].re + kCosine1 * a.re + kCosine2 * b.re, x[0].im + kCosine1 * a.im + kCosine2 * b.im};
    const Complex m2 = {x[0].re + kCosine2 * a.re + kCosine1 * b.re, x[0].im + kCosine2 * a.im + kCosine1 * b.im};
    const Complex n1 = {kSine1 * c.re + kSine2 * d.re, kSine1 * c.im + kSine2 * d.im};
    const Complex n2 = {kSine2 * c.re - kSine1 * d.re, kSine2 * c.im - kSine1 * d.im};
    x[0] = x[0] + a + b;
    x[1] = add_minus_i(m1, n1), x[4] = add_i(m1, n1), x[2] = add_minus_i(m2, n2), x[3] = add_i(m2, n2);
  }
};

template <>
struct Butterfly<8> {
  static inline __attribute__((always_inline)) void run(Complex* x) {
    constexpr double kRoot = 0.70710678118654752440;
    Complex even[4] = {x[0] + x[4], x[1] + x[5], x[2] + x[6], x[3] + x[7]};
    const Complex b1 = x[1] - x[5], b3 = x[3] - x[7];
    Complex odd[4] = {x[0] - x[4],
                      {(b1.re + b1.im) * kRoot, (b1.im - b1.re) * kRoot},
                      minus_i(x[2] - x[6]),
                      {(b3.im - b3.re) * kRoot, (b3.re + b3.im) * -kRoot}};
    Butterfly<4>::run(even);
    Butterfly<4>::run(odd);
    for (int p = 0; p < 4; ++p) x[2 * p] = even[p], x[2 * p + 1] = odd[p];
  }
};

// One pass over a block of Radix * m points; `w` as in LogMel::twiddles.
template <int Radix>
inline void pass(Complex* x, int64_t m, const double* w) {
  for (int64_t j = 0; j < m; ++j, w += 2 * (Radix - 1)) {
    Complex points[Radix];
    for (int p = 0; p < Radix; ++p) points[p] = x[j + p * m];
    Butterfly<Radix>::run(points);
    x[j] = points[0];
    for (int p = 1; p < Radix; ++p) x[j + p * m] = turned(points[p], w + 2 * (p - 1));
  }
}

template <int Radix>
inline void last_pass(Complex* x, int64_t blocks) {  // m = 1: all twiddles are 1
  for (int64_t block = 0; block < blocks; ++block, x += Radix) {
    Complex points[Radix];
    for (int p = 0; p < Radix; ++p) points[p] = x[p];
    Butterfly<Radix>::run(points);
    for (int p = 0; p < Radix; ++p) x[p] = points[p];
  }
}

inline void run_pass(int64_t radix, Complex* x, int64_t m, const double* w) {
  switch (radix) {
    case 2:
      return pass<2>(x, m, w);
    case 3:
      return pass<3>(x, m, w);
    case 4:
      return pass<4>(x, m, w);
    case 5:
      return pass<5>(x, m, w);
    default:
      return pass<8>(x, m, w);
  }
}

inline void run_last_pass(int64_t radix, Complex* x, int64_t blocks) {
  switch (radix) {
    case 2:
      return last_pass<2>(x, blocks);
    case 3:
      return last_pass<3>(x, blocks);
    case 4:
      return last_pass<4>(x, blocks);
    case 5:
      return last_pass<5>(x, blocks);
    default:
      return last_pass<8>(x, blocks);
  }
}

// Passes from the present one on, over `blocks` neighbouring blocks of `points` points each.
void finish(const int64_t* radices, int64_t passes, const double* w, Complex* x, int64_t points, int64_t blocks) {
  if (passes == 0) return;
  if (passes == 1) return run_last_pass(radices[0], x, blocks);
  const int64_t radix = radices[0], m = points / radix;
  for (int64_t block = 0; block < blocks; ++block, x += points) {
    run_pass(radix, x, m, w);
    finish(radices + 1, passes - 1, w + 2 * m * (radix - 1), x, m, radix);
  }
}

}  // namespace
}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
