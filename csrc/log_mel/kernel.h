// Interface of each instruction set, called by log_mel.cpp. Implemented by kernel.cpp.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "log_mel/log_mel.h"

namespace bestrq2 {

constexpr int kMostLanes = 8;  // frames computed side by side, at most

struct LogMelKernel {
  int64_t lanes;
  // Bytes of 64-byte aligned scratch.
  int64_t (*scratch_size)(const LogMel& job);
  // Frames of `lanes` clips and times; entries may repeat.
  void (*run)(const LogMel& job, const int64_t* clips, const int64_t* times, void* scratch);
};

namespace portable {
extern const LogMelKernel log_mel_kernel;
}
#ifdef BESTRQ2_X86
namespace avx2 {
extern const LogMelKernel log_mel_kernel;
}
namespace avx512 {
extern const LogMelKernel log_mel_kernel;
}
#endif

}  // namespace bestrq2
