#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace bestrq2 {
namespace {

bool supported(Isa isa) {
  if (isa == Isa::portable) return true;
#ifdef BESTRQ2_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

Isa detect() {
  const char* wanted = std::getenv("BESTRQ2_ISA");
  for (Isa isa : {Isa::avx512, Isa::avx2, Isa::portable}) {
    if (wanted != nullptr && std::strcmp(wanted, isa_name(isa)) != 0) continue;
    if (supported(isa)) return isa;
  }
  return Isa::portable;
}

std::atomic<int>& chosen() {
  static std::atomic<int> isa{static_cast<int>(detect())};
  return isa;
}

}  // namespace

Isa best_isa() { return static_cast<Isa>(chosen().load(std::memory_order_relaxed)); }

bool force_isa(Isa isa) {
  if (!supported(isa)) return false;
  chosen().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
}

}  // namespace bestrq2
