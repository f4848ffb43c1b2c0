#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <string>

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

bool vnni_supported() {
#ifdef BESTRQ2_X86
  return supported(Isa::avx512) && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

struct Choice {
  std::atomic<Isa> isa{Isa::portable};
  std::atomic<bool> vnni{false};

  Choice() {
    const char* variable = std::getenv("BESTRQ2_ISA");
    const std::string wanted = variable != nullptr ? variable : "";
    if (vnni_supported() && (wanted.empty() || wanted == "avx512_vnni")) {
      isa = Isa::avx512;
      vnni = true;
      return;
    }
    for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::portable}) {
      if (!wanted.empty() && wanted != isa_name(candidate)) continue;
      if (!supported(candidate)) continue;
      isa = candidate;
      return;
    }
  }
};

Choice& chosen() {
  static Choice choice;
  return choice;
}

}  // namespace

Isa best_isa() { return chosen().isa; }

bool use_vnni() { return chosen().vnni; }

bool use_bf16_dot() {
#ifdef BESTRQ2_X86
  return best_isa() == Isa::avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool force_isa(Isa isa, bool vnni) {
  if (!supported(isa) || (vnni && (isa != Isa::avx512 || !vnni_supported()))) return false;
  chosen().isa = isa;
  chosen().vnni = vnni;
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
