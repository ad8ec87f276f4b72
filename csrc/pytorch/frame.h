// Converts the tensors of a call to the pointers and sizes that the kernels take, with checks that protect memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "tensors.h"

namespace batchnorm {

// Holds x's sizes, and the memory layout that the kernels use for every tensor of x's shape. This layout is that of
// empty_like(x) if it is contiguous or channels-last, and contiguous otherwise. Tensors with another layout are copied.
class Frame {
 public:
  explicit Frame(const Tensor& x) : dtype(floating("x", x)), dim_(x.dim()), like_(x) {
    STD_TORCH_CHECK(dim_ >= 2, "batchnorm expects x of shape [N, C, *S], got ", dim_,
                    " dimension(s). Add the missing batch or channel dimension.");
    const int64_t* sizes = x.sizes().data();
    sizes_ = Dims(sizes, dim_);
    shape = {sizes[0], sizes[1], 1, false};
    for (int64_t d = 2; d < dim_; ++d) shape.s *= sizes[d];
    if (shape.numel() > 0 && take(x)) return;
    like_ = empty_like(x);
    if (take(like_)) return;
    converted_ = true;
    strides_ = contiguous_strides(sizes, dim_);
  }

  // Returns the data of a tensor of x's shape, or of a copy if its strides or dtype differ.
  const void* read(const char* name, const Tensor& t) {
    const int64_t* sizes = t.sizes().data();
    STD_TORCH_CHECK(t.dim() == dim_ && std::equal(sizes, sizes + dim_, sizes_.data()), "batchnorm expects ", name,
                    " of x's shape ", shape_text(sizes_.data(), dim_), ", got ", shape_text(sizes, t.dim()),
                    ". Reshape or expand it.");
    check_device(name, t);
    const int64_t* strides = t.strides().data();
    bool same = dtype_code(t) == code_of(dtype);
    for (int64_t d = 0; same && d < dim_; ++d) same = sizes_[d] == 1 || strides[d] == strides_[d];
    return data(name, t, same, strides_.data(), code_of(dtype));
  }
  const void* read(const char* name, const MaybeTensor& t) { return t ? read(name, *t) : nullptr; }

  // Allocates a result of x's shape, which the kernel writes. `returned` converts it to the tensor to return.
  Tensor result() const {
    Tensor made = empty(sizes_.data(), strides_.data(), dim_, code_of(dtype));
    advise_huge_pages(made.mutable_data_ptr(), shape.numel() * size_of(dtype));
    return made;
  }
  Tensor returned(const Tensor& written) const {
    if (!converted_) return written;
    Tensor out = empty_like(like_);
    copy_to(out, written);
    return out;
  }

  // Returns the data of weights [N, *S] in the statistics' dtype.
  const void* read_weights(const MaybeTensor& t) {
    if (!t) return nullptr;
    const int64_t* sizes = t->sizes().data();
    bool fits = t->dim() == dim_ - 1 && sizes[0] == sizes_[0];
    for (int64_t d = 2; fits && d < dim_; ++d) fits = sizes[d - 1] == sizes_[d];
    STD_TORCH_CHECK(fits, "batchnorm expects weights of shape [N, *S] for x of shape ",
                    shape_text(sizes_.data(), dim_), ", got ", shape_text(sizes, t->dim()),
                    ". Pass one weight per position, without a dimension for channels.");
    check_device("weights", *t);
    return contiguous_data("weights", *t, code_of(statistics_of(dtype)));
  }

  // Returns the data of a tensor [C], or [C, columns], in the statistics' dtype.
  const void* read_channels(const char* name, const MaybeTensor& t, int64_t columns) {
    if (!t) return nullptr;
    const int64_t dim = t->dim();
    const int64_t* sizes = t->sizes().data();
    STD_TORCH_CHECK((dim == 2 ? sizes[1] == columns : dim == 1 && columns == 1) && sizes[0] == shape.c,
                    "batchnorm expects ", name, " of shape [", shape.c, ", ", columns, "], got ",
                    shape_text(sizes, dim), ". Pass one row per channel.");
    check_device(name, *t);
    return contiguous_data(name, *t, code_of(statistics_of(dtype)));
  }

  // Returns a vector [C], or [K, C] if `indexed`.
  Vector vector(const char* name, const MaybeTensor& t, bool indexed) {
    if (!t) return {};
    const int64_t dim = t->dim();
    const int64_t* sizes = t->sizes().data();
    STD_TORCH_CHECK((dim == 1 || (dim == 2 && indexed)) && sizes[dim - 1] == shape.c, "batchnorm expects ", name,
                    " of shape [", shape.c, "], or [K, ", shape.c, "] with an index, got ", shape_text(sizes, dim),
                    ". Pass one value per channel.");
    check_device(name, *t);
    const DType own = floating(name, *t);
    const int64_t rows = dim == 2 ? sizes[0] : 1;
    if (dim == 2) rows_ = std::min(rows_, rows);
    return {contiguous_data(name, *t, code_of(own)), own, rows};
  }

  // Returns the data of index [N]. Checks it against the rows of all vectors read so far and against `groups`.
  const int64_t* index(const MaybeTensor& t, int64_t groups) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == shape.n && dtype_code(*t) == codes().int64 && t->is_cpu(),
                    "batchnorm expects index of shape [", shape.n, "] and dtype int64 on the CPU, got ",
                    shape_text(t->sizes().data(), t->dim()), " and ", torch::headeronly::toString(t->scalar_type()),
                    t->is_cpu() ? "" : " on another device", ". Pass one row number per sample.");
    const auto* p = static_cast<const int64_t*>(contiguous_data("index", *t, codes().int64));
    const int64_t rows = std::min(rows_, groups);
    for (int64_t n = 0; n < shape.n; ++n) {
      STD_TORCH_CHECK(p[n] >= 0 && p[n] < rows, "batchnorm expects each index in [0, ", rows, "), got ", p[n],
                      ". Each index selects a sample's row: correct it, or pass more rows.");
    }
    return p;
  }

  const DType dtype;
  Shape shape;

 private:
  void check_device(const char* name, const Tensor& t) const {
    STD_TORCH_CHECK(t.is_cpu(), "batchnorm expects ", name, " on x's device, the CPU, got ", name,
                    " on another device. Move it with .to(x.device).");
  }
  // Returns the tensor's data if `same`, else the data of a copy with these strides and this dtype.
  const void* data(const char* name, const Tensor& t, bool same, const int64_t* strides, int32_t code) {
    check_memory(name, t);
    if (same) return t.const_data_ptr();
    copies_.push_back(copy_with(t, strides, code));
    return copies_.back().const_data_ptr();
  }
  const void* contiguous_data(const char* name, const Tensor& t, int32_t code) {
    const bool same = dtype_code(t) == code && t.is_contiguous();
    return data(name, t, same, contiguous_strides(t.sizes().data(), t.dim()).data(), code);
  }
  bool take(const Tensor& t) {
    const int64_t* strides = t.strides().data();
    const bool plain = contiguous(sizes_.data(), strides, dim_);
    if (!plain && !channels_last(sizes_.data(), strides, dim_)) return false;
    shape.channels_last = !plain;
    strides_ = Dims(strides, dim_);
    return true;
  }

  int64_t dim_;
  Tensor like_;
  bool converted_ = false;
  Dims sizes_, strides_;
  std::vector<Tensor> copies_;
  int64_t rows_ = INT64_MAX;
};

// The arguments that are not tensors.
struct Attributes {
  double eps;
  Activation activation;
  double parameter;
};

// Collects the arguments of the map from x to y. If `indexed`, vectors may have rows, and each sample uses one row.
inline Normalization normalization_of(Frame& frame, bool indexed, const MaybeTensor& mean,
                                      const MaybeTensor& mean_low, const MaybeTensor& var, const MaybeTensor& weight,
                                      const MaybeTensor& bias, const Attributes& attributes) {
  Normalization n;
  n.activation = attributes.activation;
  n.parameter = attributes.parameter;
  n.eps = attributes.eps;
  n.mean = frame.vector("mean", mean, indexed);
  n.mean_low = frame.vector("mean_low", mean_low, indexed);
  n.var = frame.vector("var", var, indexed);
  n.weight = frame.vector("weight", weight, indexed);
  n.bias = frame.vector("bias", bias, indexed);
  return n;
}

// Sets the arguments that every operator of the forward pass reads.
template <class Args>
void read_forward(Frame& frame, Args& args, const Tensor& x, const MaybeTensor& residual) {
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.residual = frame.read("residual", residual);
}

// The same for the backward pass. The normalization must be set. y or the residual is only read for an activation.
inline void read_backward(Frame& frame, Backward& args, const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                          const MaybeTensor& y) {
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.dy = frame.read("dy", dy);
  if (args.normalization.activation == Activation::none) return;
  args.y = frame.read("y", y);
  if (!args.y) args.residual = frame.read("residual", residual);
}

}  // namespace batchnorm
