// Run-time choice of instruction set. Each <op>_kernel.cpp is compiled once per set into its own namespace.
#pragma once

namespace bestrq2 {

enum class Isa { portable = 0, avx2 = 1, avx512 = 2 };

// The best set that processor and build support, up to the one that BESTRQ2_ISA names: portable | avx2 | avx512 |
// avx512_vnni | avx512_bf16 | amx, in rising order. Decided once per process.
Isa best_isa();

// False if BESTRQ2_ISA is set to something else.
bool isa_known();

// True if best_isa() is avx512 and 8-bit dot products (AVX-512 VNNI) may be used as well.
bool use_vnni();

enum class Dot { none = 0, avx512 = 1, amx = 2 };

// The best way to multiply bf16 that processor, system and build offer and best_isa() allows: dot products (AVX-512
// BF16) and matrix tiles (AMX) both need avx512.
Dot best_dot();

// True if best_dot() multiplies faster than fp32 FMAs. Tiles do, and so do AMD's dot products, which issue like FMAs
// with twice the products. Intel's issue every other cycle on one port: half the products of its two FMA ports.
bool dot_beats_fma();

// Forbid better ways than `most` (tests compare all of them); Dot::amx forbids none. What BESTRQ2_ISA forbids stays so.
void limit_dot(Dot most);

// Force a set (tests compare all of them); returns false when processor or build lacks it, or BESTRQ2_ISA forbids it.
bool force_isa(Isa isa, bool vnni = false);

const char* isa_name(Isa isa);

}  // namespace bestrq2
