// Access to tensors through torch's C++ API, which changes with every minor version of torch. It is much
// faster than the stable ABI, in which every call creates or reads a handle.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstdint>
#include <optional>

#include "shim.h"

namespace batchnorm {

using at::empty_like;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t dtype_code(const Tensor& t) { return static_cast<int32_t>(t.scalar_type()); }

struct Codes {
  int32_t by_dtype[kDTypes] = {static_cast<int32_t>(at::kDouble), static_cast<int32_t>(at::kFloat),
                               static_cast<int32_t>(at::kBFloat16), static_cast<int32_t>(at::kHalf)};
  int32_t int64 = static_cast<int32_t>(at::kLong);
};
inline constexpr Codes kCodes;
inline const Codes& codes() { return kCodes; }

inline int64_t storage_bytes(const Tensor& t) { return static_cast<int64_t>(t.storage().nbytes()); }
inline int64_t storage_offset(const Tensor& t) { return t.storage_offset(); }

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t code) {
  const auto length = static_cast<size_t>(dim);
  return at::detail::empty_strided_cpu({sizes, length}, {strides, length}, static_cast<at::ScalarType>(code));
}

inline Tensor select(const Tensor& t, int64_t dim, int64_t index) { return t.select(dim, index); }

inline void copy_to(const Tensor& to, const Tensor& from) { to.copy_(from); }

inline bool increment_version(const Tensor& t) {
  if (t.requires_grad() || (t.is_inference() && !c10::InferenceMode::is_enabled())) return false;
  t.unsafeGetTensorImpl()->bump_version();
  return true;
}

// Through the C function, because the C++ one is a template, which would need the compiler's own OpenMP.
inline void run(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
  TORCH_CHECK(torch_parallel_for(begin, end, grain, body, context) == 0, "torch's threads failed.");
}

inline Threads threads() { return {run, at::get_num_threads()}; }

}  // namespace batchnorm
