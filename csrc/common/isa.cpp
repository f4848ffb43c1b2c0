// Instruction sets that processor, system and build offer.
#include "common/isa.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <initializer_list>
#include <string>

#if defined(BESTRQ2_AMX) && defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#ifdef BESTRQ2_X86
// True if the processor multiplies tiles of bf16 and the system lets this process keep tile registers.
bool tiles_allowed() {
#if defined(BESTRQ2_AMX) && defined(__linux__) && defined(__x86_64__)
  static const bool allowed = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;  // CPUID 7.0: EDX
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & kBf16) == 0 || (d & kTiles) == 0) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return allowed;
#else
  return false;
#endif
}

#endif

std::atomic<Dot>& most_dot() {
  static std::atomic<Dot> most{Dot::amx};
  return most;
}

// Values of BESTRQ2_ISA, each with everything before it.
constexpr const char* kLevels[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"};
constexpr int kBest = 5;

// Place in kLevels of what the environment allows at most; -1: of none.
int allowed_level() {
  const char* variable = std::getenv("BESTRQ2_ISA");
  if (variable == nullptr || *variable == 0) return kBest;
  for (int level = 0; level <= kBest; ++level)
    if (std::string(variable) == kLevels[level]) return level;
  return -1;
}

struct Choice {
  const int level = allowed_level();
  std::atomic<Isa> isa{Isa::portable};
  std::atomic<bool> vnni{false};

  Choice() {
    for (Isa candidate : {Isa::avx512, Isa::avx2, Isa::portable}) {
      if (!allows(candidate)) continue;
      isa = candidate;
      break;
    }
    vnni = isa == Isa::avx512 && allows_vnni();
  }

  bool allows(Isa candidate) const { return static_cast<int>(candidate) <= level && supported(candidate); }
  bool allows_vnni() const { return level >= 3 && vnni_supported(); }
  Dot best_dot() const { return level == kBest ? Dot::amx : level == kBest - 1 ? Dot::avx512 : Dot::none; }
};

Choice& chosen() {
  static Choice choice;
  return choice;
}

}  // namespace

bool isa_known() { return allowed_level() >= 0; }

Isa best_isa() { return chosen().isa; }

bool use_vnni() { return chosen().vnni; }

Dot best_dot() {
#ifdef BESTRQ2_X86
  if (best_isa() != Isa::avx512 || !__builtin_cpu_supports("avx512bf16")) return Dot::none;
  return std::min({most_dot().load(), chosen().best_dot(), tiles_allowed() ? Dot::amx : Dot::avx512});
#else
  return Dot::none;
#endif
}

bool dot_beats_fma() {
#ifdef BESTRQ2_X86
  return best_dot() == Dot::amx || (best_dot() == Dot::avx512 && __builtin_cpu_is("amd"));
#else
  return false;
#endif
}

void limit_dot(Dot most) { most_dot() = most; }

bool force_isa(Isa isa, bool vnni) {
  if (!chosen().allows(isa) || (vnni && (isa != Isa::avx512 || !chosen().allows_vnni()))) return false;
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
