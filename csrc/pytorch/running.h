// Running statistics: reads and writes tensors of any dtype and strides, and moves them toward a batch's statistics.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "tensors.h"

// Returns the number of the running backward pass, or -1 if none is running. It is not in the stable ABI, so the symbol
// is weak. In a torch without it, the address is null. The operators that update running statistics are then not
// registered here.
namespace torch::autograd {
__attribute__((weak)) int get_current_graph_task_id();
}

namespace batchnorm {

inline bool can_see_backward() { return &torch::autograd::get_current_graph_task_id != nullptr; }
inline bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

// Calls f with a tensor's data as a typed pointer. Returns false if the dtype or the strides need torch.
template <class F>
inline bool with_plain_data(const Tensor& t, bool writes, const F& f) {
  if (!t.is_contiguous()) return false;
  void* data = writes ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
  const int32_t code = dtype_code(t);
  if (code == code_of(DType::float32)) return f(static_cast<float*>(data)), true;
  if (code == code_of(DType::float64)) return f(static_cast<double*>(data)), true;
  if (code == code_of(DType::bfloat16)) return f(static_cast<c10::BFloat16*>(data)), true;
  if (code == code_of(DType::float16)) return f(static_cast<c10::Half*>(data)), true;
  return false;
}

// Converts a value to another dtype. Half precision is rounded as torch does: from float32.
template <class To, class From>
inline To converted(From value) {
  using Step = std::conditional_t<std::is_same_v<To, double>, double, float>;
  return static_cast<To>(static_cast<Step>(value));
}

// Reads a small tensor's values as float64. torch converts other dtypes and strides.
inline std::vector<double> values_of(const char* name, const Tensor& t) {
  check_memory(name, t);
  std::vector<double> values(static_cast<size_t>(t.numel()));
  if (values.empty()) return values;
  const bool plain = with_plain_data(t, false, [&](auto* p) {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(p[i]);
  });
  if (!plain) {
    const Tensor wide = copy_with(t, contiguous_strides(t.sizes().data(), t.dim()).data(), code_of(DType::float64));
    std::memcpy(values.data(), wide.const_data_ptr(), values.size() * sizeof(double));
  }
  return values;
}

// Checks that a tensor can be written, and increments its version for autograd.
inline void announce_write(const char* name, const Tensor& t) {
  check_memory(name, t);
  bool writable = true;
  for (int64_t d = 0; d < t.dim(); ++d) writable &= t.stride(d) != 0 || t.size(d) < 2;
  STD_TORCH_CHECK(writable && increment_version(t), "batchnorm::update_running_ expects ", name,
                  " to be a buffer that can be written, got an expanded tensor, an inference tensor or a leaf that "
                  "requires a gradient. Make a copy with .detach().clone() outside inference_mode.");
}

// Replaces each value by f(its place, the value). Writes each value once, because other threads may read at any time.
template <class F>
inline void replace_values(const char* name, const Tensor& t, const F& f) {
  const auto size = static_cast<size_t>(t.numel());
  const bool plain = with_plain_data(t, true, [&](auto* p) {
    using T = std::remove_reference_t<decltype(*p)>;
    for (size_t i = 0; i < size; ++i) p[i] = converted<T>(f(i, static_cast<double>(p[i])));
  });
  if (plain) return;
  const std::vector<double> old = values_of(name, t);
  const Dims strides = contiguous_strides(t.sizes().data(), t.dim());
  Tensor wide = empty(t.sizes().data(), strides.data(), t.dim(), code_of(DType::float64));
  auto* p = static_cast<double*>(wide.mutable_data_ptr());
  for (size_t i = 0; i < size; ++i) p[i] = f(i, old[i]);
  copy_to(t, wide);
}

// The statistics of a batch: its mean as a pair, its biased variance, and its number of values per channel.
template <class T>
struct Batch {
  const T *mean, *mean_low, *var;
  size_t size;
  double n;

  double mean_at(size_t i) const { return static_cast<double>(mean[i]) + static_cast<double>(mean_low[i]); }
  double var_at(size_t i) const { return static_cast<double>(var[i]); }
  bool finite() const {
    bool all = true;
    for (size_t i = 0; i < size; ++i) all &= std::isfinite(mean[i]) && std::isfinite(mean_low[i]) && std::isfinite(var[i]);
    return all;
  }
};

// Moves running statistics toward those of a batch, once, and counts the batch: all of the tensors or none. momentum may
// be absent if there is a counter.
template <class T>
inline void move_running(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                         const Batch<T>& batch, std::optional<double> momentum, bool skip_nonfinite) {
  STD_TORCH_CHECK(momentum || num_batches_tracked,
                  "batchnorm::update_running_ expects num_batches_tracked if momentum is None, got None for both. Pass "
                  "the counter, or a momentum.");
  STD_TORCH_CHECK(!num_batches_tracked || num_batches_tracked->numel() == 1, "batchnorm::update_running_ expects ",
                  "num_batches_tracked of one value, got ", num_batches_tracked->numel(), ". Pass a scalar.");
  for (const Tensor* t : {&running_mean, &running_var}) {
    STD_TORCH_CHECK(static_cast<size_t>(t->numel()) == batch.size, "batchnorm::update_running_ expects running_mean and "
                    "running_var of the batch's size ", batch.size, ", got ", t->numel(), ". Pass vectors of one size.");
  }
  if (!(batch.n > 0.0) || (skip_nonfinite && !batch.finite())) return;
  announce_write("running_mean", running_mean);  // check every buffer before the first is written
  announce_write("running_var", running_var);
  if (num_batches_tracked) announce_write("num_batches_tracked", *num_batches_tracked);

  double tracked = 0.0;
  if (num_batches_tracked && dtype_code(*num_batches_tracked) == codes().int64) {
    auto* p = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    tracked = static_cast<double>(++*p);
  } else if (num_batches_tracked) {
    replace_values("num_batches_tracked", *num_batches_tracked, [&](size_t, double old) { return tracked = old + 1.0; });
  }
  const double rate = momentum ? *momentum : 1.0 / std::max(tracked, 1.0), unbiased = batch.n / (batch.n - 1.0);
  replace_values("running_mean", running_mean,
                 [&](size_t i, double old) { return old * (1.0 - rate) + batch.mean_at(i) * rate; });
  if (!(batch.n > 1.0)) return;  // one value has no variance
  replace_values("running_var", running_var,
                 [&](size_t i, double old) { return old * (1.0 - rate) + batch.var_at(i) * unbiased * rate; });
}

}  // namespace batchnorm
