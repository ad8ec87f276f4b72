// The operators of the contract on the CPU. They use torch's stable ABI only, as all files of this library do, so that
// one binary works with every torch from 2.10 on.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "frame.h"
#include "parts.h"
#include "running.h"

namespace {

using namespace batchnorm;

constexpr int64_t kAnyGroups = INT64_MAX;

// Returns the activation of this name. Takes ownership of the string, as operators do. An operator calls it first, so that
// an error in another argument does not leak the string.
Activation activation_of(StringHandle handle) {
  const char* name = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &name));
  const std::optional<Activation> found = find_activation(name);
  std::string expected, unknown;
  if (!found) {
    unknown = name;
    for (const char* known : kActivationNames) expected.append(expected.empty() ? "" : ", ").append(known);
  }
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  STD_TORCH_CHECK(found.has_value(), "batchnorm expects activation to be one of ", expected, ", got '", unknown,
                  "'. Choose one of them.");
  return *found;
}

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> train_forward(const Tensor& x, const MaybeTensor& weight,
                                                         const MaybeTensor& bias, const MaybeTensor& residual,
                                                         double eps, StringHandle activation, double parameter) {
  const Attributes attributes{eps, activation_of(activation), parameter};
  TrainForward args{};
  Frame frame(x);
  const DType statistics = statistics_of(frame.dtype);
  Tensor y = frame.result(), mean = empty_vector(frame.shape.c, statistics);
  Tensor mean_low = empty_vector(frame.shape.c, statistics), var = empty_vector(frame.shape.c, statistics);
  args.normalization = normalization_of(frame, false, {}, {}, {}, weight, bias, attributes);
  read_forward(frame, args, x, residual);
  args.y = y.mutable_data_ptr();
  args.mean = mean.mutable_data_ptr();
  args.mean_low = mean_low.mutable_data_ptr();
  args.var = var.mutable_data_ptr();
  kernels(frame.dtype).train_forward(threads(), args);
  return {frame.returned(y), mean, mean_low, var};
}

Tensor normalize(const Tensor& x, const Tensor& mean, const MaybeTensor& mean_low, const Tensor& var,
                 const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                 const MaybeTensor& index, double eps, StringHandle activation, double parameter) {
  const Attributes attributes{eps, activation_of(activation), parameter};
  Normalize args{};
  Frame frame(x);
  Tensor y = frame.result();
  args.normalization = normalization_of(frame, index.has_value(), mean, mean_low, var, weight, bias, attributes);
  args.normalization.index = frame.index(index, kAnyGroups);
  read_forward(frame, args, x, residual);
  args.y = y.mutable_data_ptr();
  kernels(frame.dtype).normalize(threads(), args);
  return frame.returned(y);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moments(const Tensor& x, const MaybeTensor& index,
                                                   const MaybeTensor& weights, int64_t groups) {
  Moments args{};
  Frame frame(x);
  const bool indexed = index.has_value();
  STD_TORCH_CHECK(indexed ? groups >= 0 : groups == 1, "batchnorm expects groups to be ",
                  indexed ? ">= 0 with an index" : "1 without an index", ", got ", groups,
                  ". Pass the number of groups in the index, or 1 without one.");
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
  kernels(frame.dtype).moments(threads(), args);
  return {count, mean, mean_low, m2};
}

// The arguments that every operator of the backward pass takes.
struct Kept {
  const Tensor &dy, &x;
  const MaybeTensor &residual, &y;
  const Tensor& mean;
  const MaybeTensor& mean_low;
  const Tensor& var;
  const MaybeTensor &weight, &bias;
};

// One call of an operator of the backward pass, with the requested results.
struct BackwardCall {
  Frame frame;
  bool indexed;
  Backward args{};
  Tensor sum_dz, sum_dz_xhat, dx, dz;

  BackwardCall(const Kept& kept, bool indexed_, const Attributes& attributes)
      : frame(kept.x), indexed(indexed_) {
    args.normalization = normalization_of(frame, indexed, kept.mean, kept.mean_low, kept.var, kept.weight, kept.bias,
                                          attributes);
    read_backward(frame, args, kept.dy, kept.x, kept.residual, kept.y);
    args.groups = 1;
  }
  void want_sums(int64_t groups) {
    const DType statistics = statistics_of(frame.dtype);
    sum_dz = empty_rows(indexed, groups, frame.shape.c, statistics);
    sum_dz_xhat = empty_rows(indexed, groups, frame.shape.c, statistics);
    args.sum_dz = sum_dz.mutable_data_ptr();
    args.sum_dz_xhat = sum_dz_xhat.mutable_data_ptr();
    if (indexed) args.groups = groups;
  }
  void want_dx(bool need_dz) {
    dx = frame.result();
    args.dx = dx.mutable_data_ptr();
    dz = need_dz ? frame.result() : empty_vector(0, frame.dtype);
    args.dz = need_dz ? dz.mutable_data_ptr() : nullptr;
  }
  void run(const MaybeTensor& index = {}, int64_t groups = kAnyGroups) {
    args.normalization.index = frame.index(index, groups);
    kernels(frame.dtype).backward(threads(), args);
    if (args.dx) dx = frame.returned(dx);
    if (args.dz) dz = frame.returned(dz);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> train_backward(const Tensor& dy, const Tensor& x,
                                                          const MaybeTensor& residual, const MaybeTensor& y,
                                                          const Tensor& mean, const MaybeTensor& mean_low,
                                                          const Tensor& var, const MaybeTensor& weight,
                                                          const MaybeTensor& bias, double eps, StringHandle activation,
                                                          double parameter, bool need_dz) {
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, false,
                    {eps, activation_of(activation), parameter});
  call.want_sums(1);
  call.want_dx(need_dz);
  call.args.through_batch = true;
  call.run();
  return {call.dx, call.sum_dz_xhat, call.sum_dz, call.dz};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize_backward(const Tensor& dy, const Tensor& x,
                                                              const MaybeTensor& residual, const MaybeTensor& y,
                                                              const Tensor& mean, const MaybeTensor& mean_low,
                                                              const Tensor& var, const MaybeTensor& weight,
                                                              const MaybeTensor& bias, const MaybeTensor& index,
                                                              int64_t groups, double eps, StringHandle activation,
                                                              double parameter, bool need_dz) {
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, index.has_value(),
                    {eps, activation_of(activation), parameter});
  call.want_sums(groups);
  call.want_dx(need_dz);
  call.run(index, groups);
  return {call.dx, call.sum_dz_xhat, call.sum_dz, call.dz};
}

std::tuple<Tensor, Tensor> backward_reduce(const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                                           const MaybeTensor& y, const Tensor& mean, const MaybeTensor& mean_low,
                                           const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                           const MaybeTensor& index, int64_t groups, double eps,
                                           StringHandle activation, double parameter) {
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, index.has_value(),
                    {eps, activation_of(activation), parameter});
  call.want_sums(groups);
  call.run(index, groups);
  return {call.sum_dz, call.sum_dz_xhat};
}

std::tuple<Tensor, Tensor> backward_apply(const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                                          const MaybeTensor& y, const Tensor& mean, const MaybeTensor& mean_low,
                                          const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                                          const MaybeTensor& mean_dxhat, const MaybeTensor& mean_dxhat_xhat,
                                          const MaybeTensor& index, const MaybeTensor& weights, double eps,
                                          StringHandle activation, double parameter, bool need_dz) {
  const bool indexed = index.has_value();
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, indexed,
                    {eps, activation_of(activation), parameter});
  if (mean_dxhat && mean_dxhat_xhat) {
    call.args.mean_dxhat = call.frame.vector("mean_dxhat", mean_dxhat, indexed);
    call.args.mean_dxhat_xhat = call.frame.vector("mean_dxhat_xhat", mean_dxhat_xhat, indexed);
    call.args.weights = call.frame.read_weights(weights);
  }
  call.want_dx(need_dz);
  call.run(index);
  return {call.dx, call.dz};
}

// ---- both halves at once -------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> parts_forward(
    const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
    const MaybeTensor& index, const MaybeTensor& weights, int64_t groups, bool shared, double eps,
    StringHandle activation, double parameter) {
  const Attributes attributes{eps, activation_of(activation), parameter};
  const auto [y, found] = parts::forward(x, weight, bias, residual, {index, weights, groups, shared}, attributes);
  return {y, found.count, found.mean, found.mean_low, found.var, found.effective_count};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> parts_backward(
    const Tensor& dy, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& y, const Tensor& mean,
    const MaybeTensor& mean_low, const Tensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
    const Tensor& count, const MaybeTensor& index, const MaybeTensor& weights, int64_t groups, double eps,
    StringHandle activation, double parameter, bool need_dz) {
  const Attributes attributes{eps, activation_of(activation), parameter};
  const parts::Gradients found = parts::backward(dy, x, residual, y, mean, mean_low, var, weight, bias, count,
                                                 {index, weights, groups}, attributes, need_dz);
  return {found.dx, found.sum_dz_xhat, found.sum_dz, found.dz};
}

// ---- running statistics --------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> copy_running(const Tensor& running_mean, const Tensor& running_var) {
  const auto copy = [](const char* name, const Tensor& t) {
    check_memory(name, t);
    const int32_t code = code_of(statistics_of(floating(name, t)));
    return copy_with(t, contiguous_strides(t.sizes().data(), t.dim()).data(), code);
  };
  return {copy("running_mean", running_mean), copy("running_var", running_var)};
}

void update_running_(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                     const Tensor& mean, const Tensor& mean_low, const Tensor& var, int64_t m, const MaybeTensor& count,
                     std::optional<double> momentum, bool skip_nonfinite) {
  if (in_backward()) return;
  STD_TORCH_CHECK(!count || count->numel() == 1, "batchnorm::update_running_ expects count of one value, got ",
                  count->numel(), ". Pass a scalar.");
  const double n = count ? values_of("count", *count)[0] : static_cast<double>(m);
  const std::vector<double> high = values_of("mean", mean), low = values_of("mean_low", mean_low);
  const std::vector<double> biased = values_of("var", var);
  STD_TORCH_CHECK(low.size() == high.size() && biased.size() == high.size(), "batchnorm::update_running_ expects mean, "
                  "mean_low and var of one size, got ", high.size(), ", ", low.size(), " and ", biased.size(),
                  ". Pass vectors of one size.");
  const Batch<double> batch{high.data(), low.data(), biased.data(), high.size(), n};
  move_running(running_mean, running_var, num_batches_tracked, batch, momentum, skip_nonfinite);
}

void update_parts_(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                   const Tensor& count, const Tensor& mean, const Tensor& mean_low, const Tensor& var,
                   const Tensor& effective_count, std::optional<double> momentum, bool skip_nonfinite) {
  parts::update_(running_mean, running_var, num_batches_tracked, {count, mean, mean_low, var, effective_count},
                 momentum, skip_nonfinite);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def(
      "strict_parts_forward(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? index, Tensor? weights, "
      "int groups, bool shared, float eps, str activation, float negative_slope) -> "
      "(Tensor y, Tensor count, Tensor mean, Tensor mean_low, Tensor var, Tensor effective_count)");
  m.def(
      "strict_parts_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor mean, Tensor? mean_low, "
      "Tensor var, Tensor? weight, Tensor? bias, Tensor count, Tensor? index, Tensor? weights, int groups, float eps, "
      "str activation, float negative_slope, bool need_dz) -> "
      "(Tensor dx, Tensor sum_dz_xhat, Tensor sum_dz, Tensor dz)");
  m.def(
      "strict_update_parts_(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked, "
      "Tensor count, Tensor mean, Tensor mean_low, Tensor var, Tensor effective_count, float? momentum, "
      "bool skip_nonfinite) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("strict_parts_forward", TORCH_BOX(&parts_forward));
  m.impl("strict_parts_backward", TORCH_BOX(&parts_backward));
  m.impl("train_forward", TORCH_BOX(&train_forward));
  m.impl("train_backward", TORCH_BOX(&train_backward));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("normalize", TORCH_BOX(&normalize));
  m.impl("normalize_backward", TORCH_BOX(&normalize_backward));
  m.impl("backward_reduce", TORCH_BOX(&backward_reduce));
  m.impl("backward_apply", TORCH_BOX(&backward_apply));
  m.impl("copy_running", TORCH_BOX(&copy_running));
  if (can_see_backward()) {  // otherwise it stays eager
    m.impl("update_running_", TORCH_BOX(&update_running_));
    m.impl("strict_update_parts_", TORCH_BOX(&update_parts_));
  }
}
