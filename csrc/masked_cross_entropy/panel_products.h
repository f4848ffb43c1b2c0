// C = A B and C += A B of panels (layouts in bf16_passes.h).
#pragma once

#include "common/bf16_products.h"
#include "masked_cross_entropy/bf16_passes.h"

namespace bestrq2 {
namespace panel {
namespace {

using bf16::kLanes;
using bf16::Tiles;

constexpr int64_t kMaxSteps = 16;  // of one product: its panels are 32 KB each. Partial sums of more are added to C.

void product_avx512(const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  bf16::product_avx512({a, kPanel, kStep}, {b, 2 * kPanel, kStep}, steps, c, kPanel, add);
}

void product_amx(const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  bf16::product_amx({a, kPanel, kStep}, {b, 2 * kPanel, kStep}, steps, c, kPanel, add);
}

void product(Dot dot, const u16* a, const u16* b, int64_t steps, float* c, bool add) {
  (dot == Dot::amx ? product_amx : product_avx512)(a, b, steps, c, add);
}

}  // namespace
}  // namespace panel
}  // namespace bestrq2
