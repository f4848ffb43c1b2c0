// Bits of floats, and bf16 and fp16 as the integers that hold their bits.
#pragma once

#include <cstdint>

namespace bestrq2 {
namespace {

template <class To, class From>
inline To bits_as(From bits) {
  static_assert(sizeof(To) == sizeof(From), "");
  To value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float as_float(uint32_t bits) { return bits_as<float>(bits); }
inline uint32_t as_bits(float value) { return bits_as<uint32_t>(value); }

inline float from_bf16(uint16_t h) { return as_float(uint32_t{h} << 16); }

inline uint16_t to_bf16(float x) {  // to nearest, ties to even
  const uint32_t bits = as_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(x == x ? rounded : 0x7fc0u);
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = h & 0x7fffu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7c00u ? 0x70000000u : 0x38000000u);
  const uint32_t bits = magnitude < 0x400u ? as_bits(subnormal) : normal;
  return as_float(bits | (uint32_t{h} & 0x8000u) << 16);
}

inline uint16_t to_f16(float x) {  // to nearest, ties to even
  const uint32_t bits = as_bits(x), magnitude = bits & 0x7fffffffu;
  // Adding 0.5, whose last place is 2^-24, rounds to the spacing of subnormal halves.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u) >> 13;
  uint32_t h = magnitude < 0x38800000u ? subnormal : normal;
  if (magnitude >= 0x477ff000u) h = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>(h | (bits >> 16 & 0x8000u));
}

}  // namespace
}  // namespace bestrq2
