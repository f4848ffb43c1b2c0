// Element types of tensors.
#pragma once

namespace bestrq2 {

// Element type of a tensor that Python hands over.
enum class Float { f32, bf16, f16, f64 };

}  // namespace bestrq2
