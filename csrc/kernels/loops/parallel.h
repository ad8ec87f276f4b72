// Loops over the caller's threads, and scratch memory. Results must not depend on how a loop is split, so sums are
// computed in fixed blocks and added in a fixed order.
#pragma once

#include <new>

#include "kernels/kernels.h"
#include "kernels/vectors/packets.h"

namespace BATCHNORM_NAMESPACE {

// The smallest number of values for which waking a thread pays.
inline constexpr int64_t kGrain = 16384;

// The size of a value in memory, and the number of values per vector of its arithmetic type.
struct Values {
  int64_t bytes, lanes;
};

// A compile-time constant as an argument.
template <class T, T v>
struct Constant {
  static constexpr T value = v;
};

// Calls body(begin, end) on parts of [0, n) with at least kGrain values each.
template <class Body>
static void parallel(const Threads& threads, int64_t n, int64_t values_each, const Body& body) {
  int64_t grain = values_each > 0 ? (kGrain + values_each - 1) / values_each : n;
  if (threads.count <= 1 || n <= grain) {
    if (n > 0) body(int64_t{0}, n);
    return;
  }
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const Body*>(context))(begin, end); };
  threads.run(0, n, grain, call, const_cast<Body*>(&body));
}

// Aligned memory for the duration of a call, from the stack if it is small.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (blocks_) {
      Block* next = blocks_->next;
      ::operator delete(blocks_, kAlignment);
      blocks_ = next;
    }
  }

  template <class T>
  T* get(int64_t n) {
    size_t bytes = (static_cast<size_t>(n > 0 ? n : 1) * sizeof(T) + 63) / 64 * 64;
    if (used_ + bytes <= sizeof local_) {
      void* p = local_ + used_;
      used_ += bytes;
      return static_cast<T*>(p);
    }
    auto* block = static_cast<Block*>(::operator new(bytes + sizeof(Block), kAlignment));
    block->next = blocks_;
    blocks_ = block;
    return reinterpret_cast<T*>(block + 1);
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct alignas(64) Block {
    Block* next;
  };
  Block* blocks_ = nullptr;
  size_t used_ = 0;
  alignas(64) char local_[16384];
};

}  // namespace BATCHNORM_NAMESPACE
