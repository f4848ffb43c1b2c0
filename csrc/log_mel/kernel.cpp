// Log-mel frames, kLanes at a time, one per vector lane: every step below is scalar code over vectors, so the bits of a
// frame depend neither on its neighbours nor on the number of threads. Compiled once per instruction set.
//
//   kLanes frames -> samples[n][lane] -> times window, first pass of the FFT -> other passes -> power of pairs of bins
//                    (transposed floats)  (a window shorter than the FFT:        (fft.h)         k and size / 2 - k
//                                          absent points cost nothing)
//                 -> sparse filters -> decibels -> (dB - mean) / std -> rows of out
//
// The power of a frame does not change when the frame is shifted in a circle, so a window shorter than the FFT starts
// at point 0 wherever its centre should be.
#include "log_mel/kernel.h"

#include "common/arena.h"
#include "log_mel/fft.h"
#include "log_mel/transpose.h"

// No standard library templates here: their inline functions, compiled for AVX-512, could be the copies that the linker
// keeps for every other file.

namespace bestrq2 {
namespace BESTRQ2_ISA {
namespace {

constexpr double kFloor = 1e-10;  // -100 dB

struct Scratch {
  float* samples;   // (window_length, kLanes)
  float* edges;     // (kLanes, window_length)
  Complex* points;  // (size / 2)
  Doubles* powers;  // (size / 2 + 1)
  Doubles* mels;    // (bands)
  float* bands;     // (bands, kLanes)
};

int64_t lay_out(const LogMel& job, void* memory, Scratch* scratch) {
  Arena arena(memory);
  scratch->samples = arena.take<float>(job.window_length * kLanes);
  scratch->edges = arena.take<float>(job.window_length * kLanes);
  scratch->points = arena.take<Complex>(job.size / 2);
  scratch->powers = arena.take<Doubles>(job.size / 2 + 1);
  scratch->mels = arena.take<Doubles>(job.bands);
  scratch->bands = arena.take<float>(job.bands * kLanes);
  return arena.bytes();
}

int64_t scratch_size(const LogMel& job) {
  Scratch scratch;
  return lay_out(job, nullptr, &scratch);
}

// The samples of a frame in a row: in the waveform itself, or reflected into `edge`.
const float* frame_samples(const LogMel& job, int64_t clip, int64_t time, float* edge) {
  const float* x = job.waveform + clip * job.stride;
  const int64_t length = job.lengths[clip], first = job.begin + time * job.hop;
  if (first >= 0 && first + job.window_length <= length) return x + first;
  const int64_t period = length > 1 ? 2 * (length - 1) : 1;
  int64_t place = first % period;
  if (place < 0) place += period;
  for (int64_t n = 0; n < job.window_length; ++n) {
    edge[n] = x[place < length ? place : period - place];
    if (++place == period) place = 0;
  }
  return edge;
}

inline Doubles windowed(const float* samples, const double* window, int64_t n) {
  const Floats row = *reinterpret_cast<const Floats*>(samples + n * kLanes);
  return __builtin_convertvector(row, Doubles) * window[n];
}

// First pass for j in [from, to): point j + p m with p < Present is sample 2 (j + p m) and the next one, others are
// zero.
template <int Radix, int Present>
void first_pass_of(const LogMel& job, const float* samples, Complex* x, int64_t m, int64_t from, int64_t to) {
  const double* w = job.twiddles + 2 * from * (Radix - 1);
  for (int64_t j = from; j < to; ++j, w += 2 * (Radix - 1)) {
    Complex points[Radix];
    for (int p = 0; p < Radix; ++p) {
      const int64_t n = 2 * (j + p * m);
      if (p < Present)
        points[p] = {windowed(samples, job.window, n), windowed(samples, job.window, n + 1)};
      else
        points[p] = {Doubles{}, Doubles{}};
    }
    Butterfly<Radix>::run(points);
    x[j] = points[0];
    for (int p = 1; p < Radix; ++p) x[j + p * m] = turned(points[p], w + 2 * (p - 1));
  }
}

template <int Radix, int Most = Radix>
void first_pass(int64_t present, const LogMel& job, const float* samples, Complex* x, int64_t m, int64_t from,
                int64_t to) {
  if (present == Most) return first_pass_of<Radix, Most>(job, samples, x, m, from, to);
  if constexpr (Most > 0) first_pass<Radix, Most - 1>(present, job, samples, x, m, from, to);
}

template <int Radix>
void first_pass(const LogMel& job, const float* samples, Complex* x, int64_t m) {
  const int64_t points = job.window_length / 2, whole = points / m, rest = points % m;
  first_pass<Radix>(whole + 1, job, samples, x, m, 0, rest);
  first_pass<Radix>(whole, job, samples, x, m, rest, m);
}

void first_pass(const LogMel& job, const float* samples, Complex* x, int64_t m) {
  switch (job.radices[0]) {
    case 2:
      return first_pass<2>(job, samples, x, m);
    case 3:
      return first_pass<3>(job, samples, x, m);
    case 4:
      return first_pass<4>(job, samples, x, m);
    case 5:
      return first_pass<5>(job, samples, x, m);
    default:
      return first_pass<8>(job, samples, x, m);
  }
}

// |2 X[k]|^2 of the real signal from the transform Z of its even samples plus i times its odd ones:
// 2 X[k] = E + T and 2 conj(X[h - k]) = E - T, where h = size / 2, E = Z[k] + conj(Z[h - k]) and
// T = exp(-2 pi i k / size) times -i (Z[k] - conj(Z[h - k])).
void powers(const LogMel& job, const Complex* z, Doubles* power) {
  const int64_t half = job.size / 2;
  const double* w = job.half_turns;
  for (int64_t k = 0; k <= half / 2; ++k, w += 2) {
    const Complex a = z[job.places[k]], b = z[job.places[k > 0 ? half - k : 0]];
    const Complex e = {a.re + b.re, a.im - b.im}, o = {a.im + b.im, b.re - a.re};
    const Complex t = turned(o, w);
    const Complex plus = e + t, minus = e - t;
    power[k] = plus.re * plus.re + plus.im * plus.im;
    power[half - k] = minus.re * minus.re + minus.im * minus.im;
  }
}

// 10 log10(v) for positive normal v: v = 2^n f with f in [sqrt(1/2), sqrt(2)) and log f = 2 artanh((f - 1) / (f + 1)).
// Absolute error below 1e-12.
inline Doubles decibels(Doubles v) {
  constexpr double kPerOctave = 3.0102999566398119521, kPerNeper = 4.3429448190325182765;
  constexpr int64_t kRootBits = 0x3fe6a09e667f3bcd;  // sqrt(1/2)
  const Integers bits = (Integers)v;
  const Integers above = bits - kRootBits;  // its exponent field counts octaves from sqrt(1/2)
  const Integers octave = above >> 52;
  const Doubles f = (Doubles)(bits - (octave << 52));
  // octave + 2048 as a double, by writing it into the low bits of 2^52.
  const Doubles n = (Doubles)((octave + 2048) | 0x4330000000000000) - (4503599627370496.0 + 2048.0);
  const Doubles s = (f - 1.0) / (f + 1.0), q = s * s;
  Doubles series = q * (1.0 / 19) + 1.0 / 17;
  series = series * q + 1.0 / 15;
  series = series * q + 1.0 / 13;
  series = series * q + 1.0 / 11;
  series = series * q + 1.0 / 9;
  series = series * q + 1.0 / 7;
  series = series * q + 1.0 / 5;
  series = series * q + 1.0 / 3;
  series = series * q + 1.0;
  return n * kPerOctave + s * series * (2.0 * kPerNeper);
}

void filter(const LogMel& job, const Doubles* powers, Doubles* mels) {
  for (int64_t m = 0; m < job.bands; ++m) {
    const double* weight = job.weights + job.offsets[m];
    const Doubles* power = powers + job.bins[m];
    const int64_t count = job.offsets[m + 1] - job.offsets[m];
    Doubles sum = {}, other = {};
    int64_t j = 0;
    for (; j + 1 < count; j += 2) sum += power[j] * weight[j], other += power[j + 1] * weight[j + 1];
    if (j < count) sum += power[j] * weight[j];
    mels[m] = sum + other;
  }
}

// A loop of its own: behind the inner loop of filter(), whose end is hard to foresee, no band would overlap the next.
void standardised_decibels(const LogMel& job, const Doubles* mels, float* bands) {
  const Doubles floor = Doubles{} + kFloor, largest = Doubles{} + __DBL_MAX__;
  for (int64_t m = 0; m < job.bands; ++m) {
    // NaN and infinity stay what they are: they are not below the floor, and not what decibels() takes.
    const Doubles level = decibels(mels[m] < floor ? floor : mels[m]);
    const Floats rounded = __builtin_convertvector(mels[m] <= largest ? level : mels[m], Floats);
    *reinterpret_cast<Floats*>(bands + m * kLanes) = (rounded - job.mean[m]) / job.std[m];
  }
}

void run(const LogMel& job, const int64_t* clips, const int64_t* times, void* memory) {
  Scratch s;
  lay_out(job, memory, &s);
  const int64_t length = job.window_length, half = job.size / 2;
  const float* frames[kLanes];
  float* rows[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    frames[lane] = frame_samples(job, clips[lane], times[lane], s.edges + lane * length);
    rows[lane] = job.out + (clips[lane] * job.frames + times[lane]) * job.bands;
  }
  rows_to_lanes(frames, length, s.samples);
  const int64_t radix = job.radices[0], m = half / radix;
  first_pass(job, s.samples, s.points, m);
  finish(job.radices + 1, job.passes - 1, job.twiddles + 2 * m * (radix - 1), s.points, m, radix);
  powers(job, s.points, s.powers);
  filter(job, s.powers, s.mels);
  standardised_decibels(job, s.mels, s.bands);
  lanes_to_rows(s.bands, job.bands, rows);
}

}  // namespace

extern const LogMelKernel log_mel_kernel = {kLanes, scratch_size, run};

}  // namespace BESTRQ2_ISA
}  // namespace bestrq2
