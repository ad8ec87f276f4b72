// Access to tensors through torch's stable ABI, so that one binary works with every torch from 2.10 on.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "shim.h"

namespace batchnorm {

using torch::stable::empty_like;
using torch::stable::select;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t dtype_code(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// The dtype codes of this torch, read once.
struct Codes {
  int32_t by_dtype[kDTypes] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(),
                               aoti_torch_dtype_float16()};
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
};
inline const Codes& codes() {
  static const Codes read;
  return read;
}

inline int64_t storage_bytes(const Tensor& t) {
  int64_t bytes;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &bytes));
  return bytes;
}

inline int64_t storage_offset(const Tensor& t) {
  int64_t offset;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  return offset;
}

inline Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t code) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, codes().cpu, -1, &made));
  return Tensor(made);
}

// Copies values, and converts their dtype.
inline void copy_to(const Tensor& to, const Tensor& from) {
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(to.get(), from.get(), 0));
}

// Increments a tensor's version for autograd, by copying it to itself. Returns false if it must not be written.
inline bool increment_version(const Tensor& t) { return aoti_torch_copy_(t.get(), t.get(), 0) == 0; }

inline void run(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

inline Threads threads() { return {run, static_cast<int64_t>(torch::stable::get_num_threads())}; }

}  // namespace batchnorm
