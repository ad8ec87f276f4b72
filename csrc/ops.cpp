// The operators on the CPU: checks that guard memory, allocation, and calls of the kernels. The only file that sees
// torch, and of torch only its stable ABI: one binary serves every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "kernels/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_WIN32)
#define BATCHNORM_EXPORT extern "C" __declspec(dllexport)
#else
#define BATCHNORM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Not in the stable ABI: whether a backward pass is running. Weak: a torch without it leaves it null, and then
// `update_running_` is not registered here and stays with the eager implementation.
namespace torch::autograd {
__attribute__((weak)) int get_current_graph_task_id();
}

namespace {

using batchnorm::Activation;
using batchnorm::DType;
using batchnorm::Shape;
using batchnorm::Vector;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- reading arguments ---------------------------------------------------------------------------------------------

int32_t dtype_code(const Tensor& t) {
  int32_t code;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// The dtype codes of this torch, read once.
struct Codes {
  int32_t by_dtype[batchnorm::kDTypes] = {aoti_torch_dtype_float64(), aoti_torch_dtype_float32(),
                                          aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  int32_t int64 = aoti_torch_dtype_int64();
  int32_t cpu = aoti_torch_device_type_cpu();
};
const Codes& codes() {
  static const Codes read;
  return read;
}

int32_t code_of(DType dtype) { return codes().by_dtype[static_cast<int>(dtype)]; }

DType floating(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  for (int i = 0; i < batchnorm::kDTypes; ++i) {
    if (code == codes().by_dtype[i]) return static_cast<DType>(i);
  }
  STD_TORCH_CHECK(false, "batchnorm expects ", name, " of dtype float64, float32, bfloat16 or float16, got ",
                  torch::headeronly::toString(t.scalar_type()), ". Convert it with .to().");
}

int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

DType statistics_of(DType x) { return x == DType::float64 ? DType::float64 : DType::float32; }

// Takes ownership of the string, as operators do.
Activation activation_of(StringHandle handle) {
  static constexpr const char* kNames[] = {"none", "relu", "relu6", "leaky_relu", "silu", "gelu", "hardswish"};
  const char* name = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &name));
  int found = -1;
  for (int i = 0; i < 7; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) found = i;
  }
  const std::string unknown = found < 0 ? name : "";
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  STD_TORCH_CHECK(found >= 0, "batchnorm expects activation to be one of none, relu, relu6, leaky_relu, silu, gelu, ",
                  "hardswish, got '", unknown, "'.");
  return static_cast<Activation>(found);
}

// ---- allocation and layout -----------------------------------------------------------------------------------------

Tensor empty(const int64_t* sizes, const int64_t* strides, int64_t dim, int32_t code) {
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, code, codes().cpu, -1, &made));
  return Tensor(made);
}

// Asks for huge pages where a large result lies: new memory is then faulted in 2 MB at a time rather than 4 KB, which
// would take longer than computing what goes there. Only advice; where it is not heeded nothing is lost.
void advise_huge_pages([[maybe_unused]] const Tensor& t, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < int64_t{8} << 20) return;
  const auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge,
                  last = (begin + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

Tensor empty_vector(int64_t n, DType dtype) {
  const int64_t one = 1;
  return empty(&n, &one, 1, code_of(dtype));
}

// [groups, c] with an index, else [c].
Tensor empty_rows(bool rows, int64_t groups, int64_t c, DType dtype) {
  const int64_t sizes[] = {groups, c}, strides[] = {c, 1};
  return rows ? empty(sizes, strides, 2, code_of(dtype)) : empty_vector(c, dtype);
}

// Whether a tensor of these sizes and strides is dense in memory in the order of dimensions given by `at(i)`.
template <class At>
bool dense(const int64_t* sizes, const int64_t* strides, int64_t dim, const At& at) {
  int64_t expected = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    const int64_t d = at(i);
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

bool contiguous(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  return dense(sizes, strides, dim, [](int64_t i) { return i; });
}

bool channels_last(const int64_t* sizes, const int64_t* strides, int64_t dim) {
  // [n, s..., c]: dimension 1 comes last.
  return dense(sizes, strides, dim, [dim](int64_t i) { return i == 0 ? 0 : i == dim - 1 ? 1 : i + 1; });
}

Tensor copy_with(const Tensor& t, const std::vector<int64_t>& strides, int32_t code) {
  Tensor copy = empty(t.sizes().data(), strides.data(), t.dim(), code);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.get(), t.get(), 0));
  return copy;
}

// x's sizes, and the memory layout in which the kernels see every tensor like x: that of empty_like(x) where it is
// contiguous or channels-last, else contiguous, by copies.
class Frame {
 public:
  explicit Frame(const Tensor& x) : dtype(floating("x", x)), dim_(x.dim()), like_(x) {
    STD_TORCH_CHECK(dim_ >= 2, "batchnorm expects x of shape [N, C, *S], got ", dim_, " dimension(s).");
    const int64_t* sizes = x.sizes().data();
    sizes_.assign(sizes, sizes + dim_);
    shape = {sizes[0], sizes[1], 1, false};
    for (int64_t d = 2; d < dim_; ++d) shape.s *= sizes[d];
    if (shape.numel() > 0 && take(x)) return;
    like_ = torch::stable::empty_like(x);
    if (take(like_)) return;
    converted_ = true;
    strides_.assign(static_cast<size_t>(dim_), 1);
    for (int64_t d = dim_ - 2; d >= 0; --d) strides_[d] = strides_[d + 1] * std::max<int64_t>(sizes_[d + 1], 1);
  }

  // The data of a tensor like x, from a copy where its strides or dtype are others.
  const void* read(const char* name, const Tensor& t) {
    const int64_t* sizes = t.sizes().data();
    STD_TORCH_CHECK(t.dim() == dim_ && std::equal(sizes_.begin(), sizes_.end(), sizes), "batchnorm expects ", name,
                    " of x's shape, got another. Reshape or expand it.");
    STD_TORCH_CHECK(t.is_cpu(), "batchnorm expects ", name, " on the CPU, where x is. Move it with .to().");
    const int64_t* strides = t.strides().data();
    bool same = dtype_code(t) == code_of(dtype);
    for (int64_t d = 0; same && d < dim_; ++d) same = sizes_[d] == 1 || strides[d] == strides_[d];
    if (same) return t.const_data_ptr();
    copies_.push_back(copy_with(t, strides_, code_of(dtype)));
    return copies_.back().const_data_ptr();
  }
  const void* read(const char* name, const MaybeTensor& t) { return t ? read(name, *t) : nullptr; }

  // A result like x, and after the kernel has written it, what to return.
  Tensor result() const {
    Tensor made = empty(sizes_.data(), strides_.data(), dim_, code_of(dtype));
    advise_huge_pages(made, shape.numel() * size_of(dtype));
    return made;
  }
  Tensor returned(const Tensor& written) const {
    if (!converted_) return written;
    Tensor out = torch::stable::empty_like(like_);
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(out.get(), written.get(), 0));
    return out;
  }

  // weights [N, *S] in the statistics' dtype.
  const void* read_weights(const MaybeTensor& t) {
    if (!t) return nullptr;
    const int64_t* sizes = t->sizes().data();
    bool fits = t->dim() == dim_ - 1 && sizes[0] == sizes_[0];
    for (int64_t d = 2; fits && d < dim_; ++d) fits = sizes[d - 1] == sizes_[d];
    STD_TORCH_CHECK(fits, "batchnorm expects weights of shape [N, *S], that of x without its channels.");
    STD_TORCH_CHECK(t->is_cpu(), "batchnorm expects weights on the CPU, where x is. Move them with .to().");
    const int32_t code = code_of(statistics_of(dtype));
    if (dtype_code(*t) == code && t->is_contiguous()) return t->const_data_ptr();
    std::vector<int64_t> strides(static_cast<size_t>(dim_ - 1), 1);
    for (int64_t d = dim_ - 3; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
    copies_.push_back(copy_with(*t, strides, code));
    return copies_.back().const_data_ptr();
  }

  // A [C] or, with an index, [K, C] vector.
  Vector vector(const char* name, const MaybeTensor& t, bool indexed) {
    if (!t) return {};
    const int64_t dim = t->dim();
    const int64_t* sizes = t->sizes().data();
    STD_TORCH_CHECK((dim == 1 || (dim == 2 && indexed)) && sizes[dim - 1] == shape.c, "batchnorm expects ", name,
                    " of shape [", shape.c, "], or [K, ", shape.c, "] with an index. Pass one value per channel.");
    STD_TORCH_CHECK(t->is_cpu(), "batchnorm expects ", name, " on the CPU, where x is. Move it with .to().");
    Vector v{nullptr, floating(name, *t), dim == 2 ? sizes[0] : 1};
    if (dim == 2) rows_ = std::min(rows_, v.rows);
    if (t->is_contiguous()) {
      v.data = t->const_data_ptr();
    } else {
      const std::vector<int64_t> strides = dim == 2 ? std::vector<int64_t>{shape.c, 1} : std::vector<int64_t>{1};
      copies_.push_back(copy_with(*t, strides, code_of(v.dtype)));
      v.data = copies_.back().const_data_ptr();
    }
    return v;
  }

  // index [N], checked against the rows of all vectors read so far and against `groups`.
  const int64_t* index(const MaybeTensor& t, int64_t groups) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == shape.n && dtype_code(*t) == codes().int64 && t->is_cpu(),
                    "batchnorm expects index of shape [", shape.n, "] and dtype int64 on the CPU.");
    copies_.push_back(t->is_contiguous() ? *t : copy_with(*t, {1}, codes().int64));
    const auto* p = static_cast<const int64_t*>(copies_.back().const_data_ptr());
    const int64_t rows = std::min(rows_, groups);
    for (int64_t n = 0; n < shape.n; ++n) {
      STD_TORCH_CHECK(p[n] >= 0 && p[n] < rows, "batchnorm expects each index in [0, ", rows, "), got ", p[n],
                      ". It names a sample's row.");
    }
    return p;
  }

  const DType dtype;
  Shape shape;

 private:
  bool take(const Tensor& t) {
    const int64_t* strides = t.strides().data();
    const bool plain = contiguous(sizes_.data(), strides, dim_);
    if (!plain && !channels_last(sizes_.data(), strides, dim_)) return false;
    shape.channels_last = !plain;
    strides_.assign(strides, strides + dim_);
    return true;
  }

  int64_t dim_;
  Tensor like_;
  bool converted_ = false;
  std::vector<int64_t> sizes_, strides_;
  std::vector<Tensor> copies_;
  int64_t rows_ = INT64_MAX;
};

constexpr int64_t kAnyGroups = INT64_MAX;

void run(int64_t begin, int64_t end, int64_t grain, batchnorm::Threads::Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

batchnorm::Threads threads() { return {run, static_cast<int64_t>(torch::stable::get_num_threads())}; }

Tensor no_dz(const Frame& frame) { return empty_vector(0, frame.dtype); }

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> train_forward(const Tensor& x, const MaybeTensor& weight,
                                                         const MaybeTensor& bias, const MaybeTensor& residual,
                                                         double eps, StringHandle activation, double negative_slope) {
  batchnorm::TrainForward args{};
  args.normalization.activation = activation_of(activation);
  args.normalization.negative_slope = negative_slope;
  args.normalization.eps = eps;
  Frame frame(x);
  const DType statistics = statistics_of(frame.dtype);
  Tensor y = frame.result(), mean = empty_vector(frame.shape.c, statistics);
  Tensor mean_low = empty_vector(frame.shape.c, statistics), var = empty_vector(frame.shape.c, statistics);
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.residual = frame.read("residual", residual);
  args.normalization.weight = frame.vector("weight", weight, false);
  args.normalization.bias = frame.vector("bias", bias, false);
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.mean_low = mean_low.mutable_data_ptr();
  args.var = var.mutable_data_ptr();
  batchnorm::kernels(frame.dtype).train_forward(threads(), args);
  return {frame.returned(y), mean, mean_low, var};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const MaybeTensor& mean_low, const Tensor& var,
                 const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                 const MaybeTensor& index, double eps, StringHandle activation, double negative_slope) {
  batchnorm::Normalize args{};
  args.normalization.activation = activation_of(activation);
  args.normalization.negative_slope = negative_slope;
  args.normalization.eps = eps;
  Frame frame(x);
  Tensor y = frame.result();
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.residual = frame.read("residual", residual);
  const bool indexed = index.has_value();
  args.normalization.mean = frame.vector("mean", mean, indexed);
  args.normalization.mean_low = frame.vector("mean_low", mean_low, indexed);
  args.normalization.var = frame.vector("var", var, indexed);
  args.normalization.weight = frame.vector("weight", weight, indexed);
  args.normalization.bias = frame.vector("bias", bias, indexed);
  args.normalization.index = frame.index(index, kAnyGroups);
  args.y = y.mutable_data_ptr();
  batchnorm::kernels(frame.dtype).normalize(threads(), args);
  return frame.returned(y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, const MaybeTensor& index,
                                                   const MaybeTensor& weights, int64_t groups) {
  batchnorm::Moments args{};
  Frame frame(x);
  const bool indexed = index.has_value();
  STD_TORCH_CHECK(indexed ? groups >= 0 : groups == 1, "batchnorm expects groups to be 1 without an index, got ",
                  groups, ".");
  const DType statistics = statistics_of(frame.dtype);
  Tensor count = empty(&groups, std::array<int64_t, 1>{1}.data(), indexed ? 1 : 0, code_of(DType::float64));
  Tensor mean = empty_rows(indexed, groups, frame.shape.c, statistics);
  Tensor mean_low = empty_rows(indexed, groups, frame.shape.c, statistics);
  Tensor m2 = empty_rows(indexed, groups, frame.shape.c, statistics);
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.index = frame.index(index, groups);
  args.weights = frame.read_weights(weights);
  args.groups = groups;
  args.count = static_cast<double*>(count.mutable_data_ptr());
  args.mean = mean.mutable_data_ptr();
  args.mean_low = mean_low.mutable_data_ptr();
  args.m2 = m2.mutable_data_ptr();
  batchnorm::kernels(frame.dtype).moments(threads(), args);
  return {count, mean, mean_low, m2};
}

// What every operator of the backward pass is given.
struct Kept {
  const Tensor &dy, &x;
  const MaybeTensor &residual, &y;
  const Tensor& mean;
  const MaybeTensor& mean_low;
  const Tensor& var;
  const MaybeTensor &weight, &bias;
};

batchnorm::Backward backward_arguments(Frame& frame, const Kept& kept, bool indexed, double eps,
                                       StringHandle activation, double negative_slope) {
  batchnorm::Backward args{};
  args.normalization.activation = activation_of(activation);
  args.normalization.negative_slope = negative_slope;
  args.normalization.eps = eps;
  args.shape = frame.shape;
  args.x = frame.read("x", kept.x);
  args.dy = frame.read("dy", kept.dy);
  if (args.normalization.activation != Activation::none) {
    args.y = frame.read("y", kept.y);
    if (!args.y) args.residual = frame.read("residual", kept.residual);
  }
  args.normalization.mean = frame.vector("mean", kept.mean, indexed);
  args.normalization.mean_low = frame.vector("mean_low", kept.mean_low, indexed);
  args.normalization.var = frame.vector("var", kept.var, indexed);
  args.normalization.weight = frame.vector("weight", kept.weight, indexed);
  args.normalization.bias = frame.vector("bias", kept.bias, indexed);
  args.groups = 1;
  return args;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(const Tensor& dy, const Tensor& x,
                                                          const MaybeTensor& residual, const MaybeTensor& y,
                                                          const Tensor& mean, const MaybeTensor& mean_low,
                                                          const Tensor& var, const MaybeTensor& weight,
                                                          const MaybeTensor& bias, double eps, StringHandle activation,
                                                          double negative_slope, bool need_dz) {
  Frame frame(x);
  auto args = backward_arguments(frame, {dy, x, residual, y, mean, mean_low, var, weight, bias}, false, eps, activation,
                                 negative_slope);
  const DType statistics = statistics_of(frame.dtype);
  Tensor dx = frame.result(), dz = need_dz ? frame.result() : no_dz(frame);
  Tensor dweight = empty_vector(frame.shape.c, statistics), dbias = empty_vector(frame.shape.c, statistics);
  args.dx = dx.mutable_data_ptr();
  args.dz = need_dz ? dz.mutable_data_ptr() : nullptr;
  args.sum_dz = dbias.mutable_data_ptr();
  args.sum_dz_xhat = dweight.mutable_data_ptr();
  args.through_batch = true;
  batchnorm::kernels(frame.dtype).backward(threads(), args);
  return {frame.returned(dx), dweight, dbias, need_dz ? frame.returned(dz) : dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_backward(const Tensor& dy, const Tensor& x,
                                                              const MaybeTensor& residual, const MaybeTensor& y,
                                                              const Tensor& mean, const MaybeTensor& mean_low,
                                                              const Tensor& var, const MaybeTensor& weight,
                                                              const MaybeTensor& bias, const MaybeTensor& index,
                                                              int64_t groups, double eps, StringHandle activation,
                                                              double negative_slope, bool need_dz) {
  Frame frame(x);
  const bool indexed = index.has_value();
  auto args = backward_arguments(frame, {dy, x, residual, y, mean, mean_low, var, weight, bias}, indexed, eps,
                                 activation, negative_slope);
  const DType statistics = statistics_of(frame.dtype);
  Tensor dx = frame.result(), dz = need_dz ? frame.result() : no_dz(frame);
  Tensor sum_dz = empty_rows(indexed, groups, frame.shape.c, statistics);
  Tensor sum_dz_xhat = empty_rows(indexed, groups, frame.shape.c, statistics);
  args.normalization.index = frame.index(index, groups);
  args.groups = indexed ? groups : 1;
  args.dx = dx.mutable_data_ptr();
  args.dz = need_dz ? dz.mutable_data_ptr() : nullptr;
  args.sum_dz = sum_dz.mutable_data_ptr();
  args.sum_dz_xhat = sum_dz_xhat.mutable_data_ptr();
  batchnorm::kernels(frame.dtype).backward(threads(), args);
  return {frame.returned(dx), sum_dz_xhat, sum_dz, need_dz ? frame.returned(dz) : dz};
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                                           const MaybeTensor& y, const Tensor& mean, const MaybeTensor& mean_low,
                                           const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                           const MaybeTensor& index, int64_t groups, double eps,
                                           StringHandle activation, double negative_slope) {
  Frame frame(x);
  const bool indexed = index.has_value();
  auto args = backward_arguments(frame, {dy, x, residual, y, mean, mean_low, var, weight, bias}, indexed, eps,
                                 activation, negative_slope);
  const DType statistics = statistics_of(frame.dtype);
  Tensor sum_dz = empty_rows(indexed, groups, frame.shape.c, statistics);
  Tensor sum_dz_xhat = empty_rows(indexed, groups, frame.shape.c, statistics);
  args.normalization.index = frame.index(index, groups);
  args.groups = indexed ? groups : 1;
  args.sum_dz = sum_dz.mutable_data_ptr();
  args.sum_dz_xhat = sum_dz_xhat.mutable_data_ptr();
  batchnorm::kernels(frame.dtype).backward(threads(), args);
  return {sum_dz, sum_dz_xhat};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                                          const MaybeTensor& y, const Tensor& mean, const MaybeTensor& mean_low,
                                          const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                          const MaybeTensor& mean_dxhat, const MaybeTensor& mean_dxhat_xhat,
                                          const MaybeTensor& index, const MaybeTensor& weights, double eps,
                                          StringHandle activation, double negative_slope, bool need_dz) {
  Frame frame(x);
  const bool indexed = index.has_value();
  auto args = backward_arguments(frame, {dy, x, residual, y, mean, mean_low, var, weight, bias}, indexed, eps,
                                 activation, negative_slope);
  Tensor dx = frame.result(), dz = need_dz ? frame.result() : no_dz(frame);
  if (mean_dxhat && mean_dxhat_xhat) {
    args.mean_dxhat = frame.vector("mean_dxhat", mean_dxhat, indexed);
    args.mean_dxhat_xhat = frame.vector("mean_dxhat_xhat", mean_dxhat_xhat, indexed);
    args.weights = frame.read_weights(weights);
  }
  args.normalization.index = frame.index(index, kAnyGroups);
  args.dx = dx.mutable_data_ptr();
  args.dz = need_dz ? dz.mutable_data_ptr() : nullptr;
  batchnorm::kernels(frame.dtype).backward(threads(), args);
  return {frame.returned(dx), need_dz ? frame.returned(dz) : dz};
}

// ---- running statistics --------------------------------------------------------------------------------------------

// A small tensor's values in float64, and back. They are moved by torch: any dtype and strides, and writing counts as
// a change that autograd notices.
std::vector<double> values_of(const Tensor& t) {
  std::vector<double> values(static_cast<size_t>(t.numel()));
  if (values.empty()) return values;
  const int32_t wide = code_of(DType::float64);
  const auto copy = [&](const Tensor& from) {
    std::memcpy(values.data(), from.const_data_ptr(), values.size() * sizeof(double));
  };
  if (dtype_code(t) == code_of(DType::float32) && t.is_contiguous()) {
    const auto* p = static_cast<const float*>(t.const_data_ptr());
    std::copy(p, p + values.size(), values.begin());
  } else if (dtype_code(t) == wide && t.is_contiguous()) {
    copy(t);
  } else {
    std::vector<int64_t> strides(static_cast<size_t>(t.dim()), 1);
    for (int64_t d = t.dim() - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(t.size(d + 1), 1);
    copy(copy_with(t, strides, wide));
  }
  return values;
}

void write(const Tensor& t, const std::vector<double>& values) {
  if (dtype_code(t) == code_of(DType::float32) && t.is_contiguous()) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));  // tells autograd of the change
    std::copy(values.begin(), values.end(), static_cast<float*>(t.mutable_data_ptr()));
    return;
  }
  std::vector<int64_t> strides(static_cast<size_t>(t.dim()), 1);
  for (int64_t d = t.dim() - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(t.size(d + 1), 1);
  Tensor wide = empty(t.sizes().data(), strides.data(), t.dim(), code_of(DType::float64));
  std::copy(values.begin(), values.end(), static_cast<double*>(wide.mutable_data_ptr()));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), wide.get(), 0));
}

void update_running_(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                     const Tensor& mean, const Tensor& mean_low, const Tensor& var, int64_t m, const MaybeTensor& count,
                     std::optional<double> momentum, bool skip_nonfinite) {
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  const std::vector<double> high = values_of(mean), low = values_of(mean_low), biased = values_of(var);
  std::vector<double> new_mean = values_of(running_mean), new_var = values_of(running_var);
  const size_t c = new_mean.size();
  for (const size_t size : {high.size(), low.size(), biased.size(), new_var.size()}) {
    STD_TORCH_CHECK(size == c, "batchnorm::update_running_ expects mean, mean_low, var and running_var of ",
                    "running_mean's size ", c, ", got ", size, ".");
  }
  double n = static_cast<double>(m);
  if (count) {
    STD_TORCH_CHECK(count->numel() == 1, "batchnorm::update_running_ expects a count of one value, got ",
                    count->numel(), ".");
    n = values_of(*count)[0];
  }
  bool moves = n > 0.0;
  for (size_t i = 0; moves && skip_nonfinite && i < c; ++i) {
    moves = std::isfinite(high[i]) && std::isfinite(low[i]) && std::isfinite(biased[i]);
  }
  double tracked = 0.0;
  if (num_batches_tracked) {
    STD_TORCH_CHECK(num_batches_tracked->numel() == 1, "batchnorm::update_running_ expects one num_batches_tracked.");
    if (dtype_code(*num_batches_tracked) == codes().int64) {
      auto* p = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
      const int64_t after = *p + moves;
      STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(num_batches_tracked->get()));  // tells autograd of the change
      *p = after;
      tracked = static_cast<double>(after);
    } else {
      tracked = values_of(*num_batches_tracked)[0] + moves;
      write(*num_batches_tracked, {tracked});
    }
  }
  STD_TORCH_CHECK(momentum || num_batches_tracked,
                  "update_running_ expects num_batches_tracked where momentum is None, got None for both.");
  if (!moves) return;
  const double rate = momentum ? *momentum : 1.0 / std::max(tracked, 1.0), unbiased = n / (n - 1.0);
  for (size_t i = 0; i < c; ++i) {
    new_mean[i] = new_mean[i] * (1.0 - rate) + (high[i] + low[i]) * rate;
    new_var[i] = new_var[i] * (1.0 - rate) + biased[i] * unbiased * rate;
  }
  write(running_mean, new_mean);
  if (n > 1.0) write(running_var, new_var);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("train_forward", TORCH_BOX(&train_forward));
  m.impl("train_backward", TORCH_BOX(&train_backward));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
  m.impl("backward_reduce", TORCH_BOX(&backward_reduce));
  m.impl("backward_apply", TORCH_BOX(&backward_apply));
  if (&torch::autograd::get_current_graph_task_id != nullptr) {
    m.impl("update_running_", TORCH_BOX(&update_running_));
  }
}

// What Python asks of the library; see batchnorm/ops/backends.py.
BATCHNORM_EXPORT const char* batchnorm_cpu_capability() { return batchnorm::capability(); }
BATCHNORM_EXPORT const char* batchnorm_cpu_capabilities() { return batchnorm::capabilities(); }
BATCHNORM_EXPORT const char* batchnorm_cpu_capability_problem() { return batchnorm::capability_problem(); }
BATCHNORM_EXPORT int batchnorm_set_cpu_capability(const char* name) { return batchnorm::set_capability(name); }
