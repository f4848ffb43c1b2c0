// Bounds and rounding of integers. No standard library templates: in files compiled for AVX-512, their inline functions
// could be the copies that the linker keeps for every other file.
#pragma once

#include <cstdint>

namespace bestrq2 {
namespace {

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace
}  // namespace bestrq2
