// A layer's call on a device whose kernels are started by functions in Python, such as those for GPUs. Here, the
// arguments are checked and the results allocated, which takes Python several times as long.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/ops/stack.h>
#include <c10/core/DeviceGuard.h>

#include <exception>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>

#include "running.h"
#include "strict.h"

namespace batchnorm::launched {

enum class Pass { train_forward, normalize, backward };

struct Update {
  std::optional<double> momentum;
  bool skip_nonfinite;
};

// A tensor, which may be undefined, or a row of a matrix. A view of the row takes longer to make than its address.
struct Argument {
  Argument(const Tensor& t, int64_t row = -1) : whole(t), row(row) {}
  Argument(const MaybeTensor& t) : whole(t ? *t : Tensor()) {}

  bool defined() const { return whole.defined(); }
  Tensor tensor() const { return row < 0 ? whole : whole.select(0, row); }
  void* address() const {
    auto* start = static_cast<char*>(whole.data_ptr());
    return row < 0 ? start : start + row * whole.stride(0) * static_cast<int64_t>(whole.element_size());
  }

  Tensor whole;
  int64_t row = -1;
};
using Arguments = std::initializer_list<Argument>;

// Starts the kernels of a pass for these arguments, of which the first is x. Returns whether it started them. If not,
// other routes must compute the call. The module of the node sets it.
using Start = bool (*)(Pass pass, Arguments arguments, const Attributes& attributes,
                       const Update* update);
inline Start start = nullptr;

// Returns what the launches of a call follow from: everything but the addresses of its tensors.
inline std::string key(Pass pass, Arguments arguments, const Attributes& attributes, const Update* update) {
  std::string bytes;
  bytes.reserve(256);
  const auto add = [&](const auto& value) { bytes.append(reinterpret_cast<const char*>(&value), sizeof value); };
  const Tensor& x = arguments.begin()->whole;
  add(pass);
  add(x.device().index());
  for (int64_t size : x.sizes()) add(size);
  for (int64_t stride : x.strides()) add(stride);
  for (const Argument& a : arguments) {
    add(a.defined() ? a.whole.scalar_type() : at::ScalarType::Undefined);
    add(a.defined() && reinterpret_cast<uintptr_t>(a.address()) % 16 == 0);  // Triton then compiles another variant
  }
  add(attributes.eps);
  add(attributes.activation);
  add(attributes.parameter);
  if (update != nullptr) {
    add(update->momentum.has_value());
    add(update->momentum.value_or(0.0));
    add(update->skip_nonfinite);
  }
  return bytes;
}

// A function in Python raised an error, which Python's error indicator holds.
struct Raised : std::exception {};

// Each row of statistics starts at a multiple of this many float32 values, because kernels access aligned vectors.
constexpr int64_t kAligned = 4;

// The kernels' requirements of x, and of other tensors for it. Tensors that do not fit are left to other routes, which
// convert them or report what is wrong.
class Expected {
 public:
  explicit Expected(const Tensor& x) : x_(x) {}

  bool fits() const {
    const int64_t* sizes = x_.sizes().data();
    const at::ScalarType dtype = x_.scalar_type();
    return (dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16) && x_.dim() >= 2 &&
           x_.numel() > 0 && allocated(x_) &&
           (x_.is_contiguous() || channels_last(sizes, x_.strides().data(), x_.dim()));
  }
  bool here(const Tensor& t) const { return t.device() == x_.device() && allocated(t); }
  int64_t channels() const { return x_.size(1); }
  int64_t values_per_channel() const { return x_.numel() / x_.size(1); }

  bool like_x(const Tensor& t) const {
    if (t.scalar_type() != x_.scalar_type() || t.sizes() != x_.sizes() || !here(t)) return false;
    for (int64_t d = 0; d < x_.dim(); ++d) {
      if (x_.size(d) != 1 && t.stride(d) != x_.stride(d)) return false;
    }
    return true;
  }
  bool like_x(const MaybeTensor& t) const { return !t || like_x(*t); }

  // A vector [C] of float32 or, unless it is a `statistic`, of x's dtype.
  bool vector(const MaybeTensor& t, bool statistic = false) const {
    return !t || (t->dim() == 1 && t->size(0) == channels() && t->is_contiguous() && here(*t) &&
                  (t->scalar_type() == at::kFloat || (!statistic && t->scalar_type() == x_.scalar_type())));
  }
  bool counter(const MaybeTensor& t) const {
    return !t || (t->scalar_type() == at::kLong && t->numel() == 1 && here(*t));
  }

  Tensor vectors(int64_t rows) const {
    const int64_t step = (channels() + kAligned - 1) / kAligned * kAligned;
    return at::empty_strided({rows, channels()}, {step, 1}, x_.options().dtype(at::kFloat));
  }

 private:
  const Tensor& x_;
};

// Returns y and the statistics [3, C] of the batch, and updates the running statistics, which may be absent.
inline std::optional<std::tuple<Tensor, MaybeTensor>> train_forward_(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& running_mean, const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked,
    const Attributes& attributes, const Update& update) {
  const Expected expected(x);
  bool fits = expected.fits() && expected.values_per_channel() > 1 && expected.like_x(residual) &&
              running_mean.has_value() == running_var.has_value() && expected.counter(num_batches_tracked) &&
              (update.momentum || num_batches_tracked || !running_mean);
  for (const MaybeTensor* t : {&weight, &bias, &running_mean, &running_var}) fits = fits && expected.vector(*t);
  if (!fits) return std::nullopt;
  const bool updates = running_mean && !in_backward();
  if (updates) {
    announce_write("running_mean", *running_mean);
    announce_write("running_var", *running_var);
    if (num_batches_tracked) announce_write("num_batches_tracked", *num_batches_tracked);
  }
  const auto updated = [&](const MaybeTensor& t) { return updates ? t : std::nullopt; };
  const c10::OptionalDeviceGuard guard(x.device());
  Tensor y = at::empty_like(x), statistics = expected.vectors(3);
  const bool started = start(Pass::train_forward,
                             {x, residual, y, {statistics, 0}, {statistics, 1}, {statistics, 2}, weight, bias,
                              updated(running_mean), updated(running_var), updated(num_batches_tracked)},
                             attributes, &update);
  if (!started) return std::nullopt;
  return std::tuple(y, MaybeTensor(statistics));
}

// Returns y. If `kept`, also returns a copy [2, C] of the running statistics, which may change before backward.
inline std::optional<std::tuple<Tensor, MaybeTensor>> normalize(const Tensor& x, const Tensor& running_mean,
                                                                const Tensor& running_var, const MaybeTensor& weight,
                                                                const MaybeTensor& bias, const MaybeTensor& residual,
                                                                const Attributes& attributes, bool kept) {
  const Expected expected(x);
  if (!expected.fits() || !expected.like_x(residual) || !expected.vector(running_mean, true) ||
      !expected.vector(running_var, true) || !expected.vector(weight) || !expected.vector(bias)) {
    return std::nullopt;
  }
  const c10::OptionalDeviceGuard guard(x.device());
  MaybeTensor statistics;
  if (kept) statistics = at::stack({running_mean, running_var});  // one launch
  Tensor y = at::empty_like(x);
  const bool started =
      start(Pass::normalize, {x, residual, y, running_mean, running_var, weight, bias}, attributes, nullptr);
  if (!started) return std::nullopt;
  return std::tuple(y, statistics);
}

// Returns the gradients; see strict::backward.
inline std::optional<strict::Gradients> backward(const Tensor& dy, const Tensor& x,
                                                 const MaybeTensor& residual, const MaybeTensor& y,
                                                 const Tensor& statistics, const MaybeTensor& weight,
                                                 const MaybeTensor& bias, const Attributes& attributes, bool need_dz) {
  const Expected expected(x);
  if (!expected.fits() || !expected.like_x(dy) || !expected.like_x(residual) || !expected.like_x(y) ||
      !expected.vector(weight) || !expected.vector(bias) || !expected.here(statistics)) {
    return std::nullopt;
  }
  const c10::OptionalDeviceGuard guard(x.device());
  const bool of_batch = statistics.size(0) == 3;
  Tensor dx = at::empty_like(x), dz = need_dz ? at::empty_like(x) : Tensor();
  const auto sums = [&] { return at::empty({expected.channels()}, x.options().dtype(at::kFloat)); };
  const Tensor dbias = sums(), dweight = sums();
  const bool started = start(Pass::backward,
                             {x, dy, residual, y, dx, dz, {statistics, 0},
                              of_batch ? Argument(statistics, 1) : Argument(Tensor()), {statistics, of_batch ? 2 : 1},
                              weight, bias, dbias, dweight},
                             attributes, nullptr);
  if (!started) return std::nullopt;
  const auto gradient = [](const MaybeTensor& parameter, const Tensor& sum) {
    return parameter ? MaybeTensor(sum.to(parameter->scalar_type())) : std::nullopt;
  };
  return strict::Gradients{dx, gradient(weight, dweight), gradient(bias, dbias),
                           need_dz ? MaybeTensor(dz) : std::nullopt};
}

}  // namespace batchnorm::launched
