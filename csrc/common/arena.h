// Scratch memory of a task, cut into aligned parts.
#pragma once

#include "common/integers.h"

namespace bestrq2 {
namespace {

// Hands out 64-byte aligned parts of a buffer; with a null buffer it only measures.
class Arena {
 public:
  explicit Arena(void* buffer) : buffer_(static_cast<char*>(buffer)) {}
  template <class T>
  T* take(int64_t count) {
    T* part = buffer_ == nullptr ? nullptr : reinterpret_cast<T*>(buffer_ + bytes_);
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return part;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* buffer_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace bestrq2
