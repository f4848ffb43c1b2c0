// Log-mel spectrogram on the CPU: window, real FFT, power, triangular filters, decibels, standardisation, frame by
// frame.
#pragma once

#include <cstdint>

namespace bestrq2 {

// For frame t < counts[b] of clip b, with x reflected at both ends of its lengths[b] samples (numpy's mode "reflect"):
//
//   X[k]      = sum_n x[begin + t hop + n] window[n] exp(-2 pi i k n / size),     n < window_length, k <= size / 2
//   mel[m]    = sum_j weights[offsets[m] + j] |2 X[bins[m] + j]|^2,               offsets[m] + j < offsets[m + 1]
//   out[b, t] = (10 log10(max(1e-10, mel)) - mean) / std
//
// All sums are in float64, decibels and what follows are rounded to float32. Rows t >= counts[b] become zero.
struct LogMel {
  const float* waveform;  // (clips, samples) with row stride
  int64_t clips, stride;
  const int64_t* lengths;  // (clips): samples, at least 1
  const int64_t* counts;   // (clips): frames
  int64_t begin, hop;      // frame t of a clip starts at sample begin + t hop; begin may be negative
  int64_t size;            // n_fft, even
  const double* window;    // (window_length)
  int64_t window_length;   // even, at most size
  // Complex FFT of size / 2 points, decimated in frequency: pass after pass in place, the result in permuted order.
  const int64_t* radices;  // of the passes, from {2, 3, 4, 5, 8}; their product is size / 2
  int64_t passes;
  const double* twiddles;    // of pass p: (m, radix - 1, 2) for blocks of m radix points; passes one after the other
  const int64_t* places;     // (size / 2): where point k ends up
  const double* half_turns;  // (size / 4 + 1, 2): exp(-2 pi i k / size)
  const int64_t* bins;       // (bands): first bin of a filter
  const int64_t* offsets;    // (bands + 1) into weights
  const double* weights;
  int64_t bands;
  const float* mean;  // (bands)
  const float* std;   // (bands)
  float* out;         // (clips, frames, bands) contiguous
  int64_t frames;
  int threads;
};

void log_mel(const LogMel& job);

}  // namespace bestrq2
