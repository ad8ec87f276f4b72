// Dtypes, memory and layout of tensors, for either API of torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "shim.h"

#if defined(BATCHNORM_ATEN)
#include "aten_tensors.h"
#else
#include "stable_tensors.h"
#endif

namespace batchnorm {

// ---- reading arguments ---------------------------------------------------------------------------------------------

inline int32_t code_of(DType dtype) { return codes().by_dtype[static_cast<int>(dtype)]; }

// A shape in an error, such as "[2, 3]".
inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "[";
  for (int64_t d = 0; d < dim; ++d) text.append(d ? ", " : "").append(std::to_string(sizes[d]));
  return text + "]";
}

inline DType floating(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  for (int i = 0; i < kDTypes; ++i) {
    if (code == codes().by_dtype[i]) return static_cast<DType>(i);
  }
  STD_TORCH_CHECK(false, "batchnorm expects ", name, " of dtype float64, float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(t.scalar_type()), ". Convert it with .to().");
}

// Returns the bytes of storage that a tensor's values reach.
inline int64_t bytes_reached(const Tensor& t) {
  int64_t last = 0;
  const int64_t *sizes = t.sizes().data(), *strides = t.strides().data(), dim = t.dim();
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] == 0) return 0;
    last += (sizes[d] - 1) * strides[d];
  }
  return (storage_offset(t) + last + 1) * static_cast<int64_t>(t.element_size());
}

// Returns whether a tensor's memory is allocated. FSDP, for example, frees the storage of parameters between uses. The
// data of such a tensor would be at address 0, or near it.
inline bool allocated(const Tensor& t) { return bytes_reached(t) <= storage_bytes(t); }

inline void check_memory(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(allocated(t), "batchnorm expects ", name, " with its memory allocated, got a storage of ",
                  storage_bytes(t), " bytes for a tensor of ", t.numel(), " values. It was freed or resized: allocate it ",
                  "and fill it first. With FSDP, call the wrapped module, which gathers its parameters.");
}

// ---- allocation and layout -----------------------------------------------------------------------------------------

inline Tensor empty_vector(int64_t n, DType dtype) {
  const int64_t one = 1;
  return empty(&n, &one, 1, code_of(dtype));
}

// [groups, c] with an index, else [c].
inline Tensor empty_rows(bool rows, int64_t groups, int64_t c, DType dtype) {
  const int64_t sizes[] = {groups, c}, strides[] = {c, 1};
  return rows ? empty(sizes, strides, 2, code_of(dtype)) : empty_vector(c, dtype);
}

// Returns whether a tensor of these sizes and strides is dense in memory. `at(i)` gives the order of the dimensions.
template <class At>
inline bool dense(const int64_t* sizes, const int64_t* strides, int64_t dim, const At& at) {
  int64_t expected = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    const int64_t d = at(i);
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

inline bool contiguous(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  return dense(sizes, strides, dim, [](int64_t i) { return i; });
}

inline bool channels_last(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  // [n, s..., c]: dimension 1 comes last.
  return dense(sizes, strides, dim, [dim](int64_t i) { return i == 0 ? 0 : i == dim - 1 ? 1 : i + 1; });
}

// Sizes or strides. Those of usual tensors take no memory of their own: each allocation costs as much as a small layer's
// arithmetic on a channel.
class Dims {
 public:
  Dims() = default;
  explicit Dims(int64_t dim) {
    if (dim > kInline) more_.resize(static_cast<size_t>(dim));
  }
  Dims(const int64_t* values, int64_t dim) : Dims(dim) { std::copy(values, values + dim, data()); }
  int64_t* data() { return more_.empty() ? few_ : more_.data(); }
  const int64_t* data() const { return more_.empty() ? few_ : more_.data(); }
  int64_t& operator[](int64_t d) { return data()[d]; }
  int64_t operator[](int64_t d) const { return data()[d]; }

 private:
  static constexpr int64_t kInline = 6;
  int64_t few_[kInline];
  std::vector<int64_t> more_;
};

inline Dims contiguous_strides(const int64_t* sizes, int64_t dim) {
  Dims strides(dim);
  int64_t step = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(sizes[d], 1);
  }
  return strides;
}

inline Tensor copy_with(const Tensor& t, const int64_t* strides, int32_t code) {
  Tensor copy = empty(t.sizes().data(), strides, t.dim(), code);
  copy_to(copy, t);
  return copy;
}

}  // namespace batchnorm
