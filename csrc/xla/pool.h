// Loops over XLA's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "xla/ffi/api/ffi.h"

namespace batchnorm {

// One loop, in parts that threads take from a counter. The caller takes parts as well, and waits only for parts that a
// thread has begun. A pool whose threads all run such loops therefore makes progress.
class PoolLoop {
 public:
  PoolLoop(int64_t begin, int64_t end, int64_t part, Threads::Body body, void* context)
      : end_(end), part_(part), body_(body), context_(context), next_(begin), left_(end - begin) {}

  void work() {
    for (;;) {
      const int64_t begin = next_.fetch_add(part_);
      if (begin >= end_) return;
      const int64_t stop = std::min(begin + part_, end_);
      try {
        body_(begin, stop, context_);
      } catch (const std::exception& error) {
        if (!failed_.test_and_set()) error_ = error.what();
      }
      if (left_.fetch_sub(stop - begin) == stop - begin) left_.notify_all();
    }
  }

  // Waits for all parts, and throws the first error of a part.
  void wait() {
    for (int64_t left = left_.load(); left > 0; left = left_.load()) left_.wait(left);
    if (!error_.empty()) throw std::runtime_error(error_);
  }

 private:
  const int64_t end_, part_;
  const Threads::Body body_;
  void* const context_;
  std::atomic<int64_t> next_, left_;
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::string error_;  // an exception_ptr would need the C++ library of GCC 11
};

// Makes XLA's pool the threads of the kernels that this thread calls during the object's life.
class Pool {
 public:
  explicit Pool(xla::ffi::ThreadPool& pool) { current() = &pool; }
  ~Pool() { current() = nullptr; }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  Threads threads() const { return {run, std::max<int64_t>(current()->num_threads(), 1)}; }

 private:
  static xla::ffi::ThreadPool*& current() {
    static thread_local xla::ffi::ThreadPool* pool = nullptr;
    return pool;
  }
  static void run(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
    xla::ffi::ThreadPool& pool = *current();
    const int64_t n = end - begin;
    const int64_t parts = std::min((n + grain - 1) / grain, std::max<int64_t>(pool.num_threads(), 1));
    if (parts <= 1) return body(begin, end, context);
    const auto loop = std::make_shared<PoolLoop>(begin, end, (n + parts - 1) / parts, body, context);
    for (int64_t i = 1; i < parts; ++i) pool.Schedule([loop] { loop->work(); });
    loop->work();
    loop->wait();
  }
};

}  // namespace batchnorm
