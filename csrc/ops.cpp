// The operators on the CPU. Only this file, frame.h and tensors.h use torch, and only its stable ABI, so that one binary
// works with every torch from 2.10 on.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <tuple>
#include <vector>

#include "frame.h"

// Returns the number of the running backward pass, or -1 if none is running. It is not in the stable ABI, so the symbol
// is weak. In a torch without it, the address is null. `update_running_` is then not registered here and stays eager.
namespace torch::autograd {
__attribute__((weak)) int get_current_graph_task_id();
}

namespace {

using namespace batchnorm;

constexpr int64_t kAnyGroups = INT64_MAX;

void run(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

Threads threads() { return {run, static_cast<int64_t>(torch::stable::get_num_threads())}; }

// The arguments that are not tensors. An operator reads them first, so that an error in another argument does not leak
// the activation's name, which the operator owns.
struct Attributes {
  Attributes(double eps_, StringHandle name, double parameter_)
      : eps(eps_), activation(activation_of(name)), parameter(parameter_) {}
  double eps;
  Activation activation;
  double parameter;
};

// Collects the arguments of the map from x to y. If `indexed`, vectors may have rows, and each sample uses one row.
Normalization normalization_of(Frame& frame, bool indexed, const MaybeTensor& mean, const MaybeTensor& mean_low,
                               const MaybeTensor& var, const MaybeTensor& weight, const MaybeTensor& bias,
                               const Attributes& attributes) {
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

// ---- operators -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor, Tensor> train_forward(const Tensor& x, const MaybeTensor& weight,
                                                         const MaybeTensor& bias, const MaybeTensor& residual,
                                                         double eps, StringHandle activation, double parameter) {
  const Attributes attributes(eps, activation, parameter);
  TrainForward args{};
  Frame frame(x);
  const DType statistics = statistics_of(frame.dtype);
  Tensor y = frame.result(), mean = empty_vector(frame.shape.c, statistics);
  Tensor mean_low = empty_vector(frame.shape.c, statistics), var = empty_vector(frame.shape.c, statistics);
  args.normalization = normalization_of(frame, false, {}, {}, {}, weight, bias, attributes);
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.residual = frame.read("residual", residual);
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
  const Attributes attributes(eps, activation, parameter);
  Normalize args{};
  Frame frame(x);
  Tensor y = frame.result();
  args.normalization = normalization_of(frame, index.has_value(), mean, mean_low, var, weight, bias, attributes);
  args.normalization.index = frame.index(index, kAnyGroups);
  args.shape = frame.shape;
  args.x = frame.read("x", x);
  args.residual = frame.read("residual", residual);
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
    args.shape = frame.shape;
    args.x = frame.read("x", kept.x);
    args.dy = frame.read("dy", kept.dy);
    if (args.normalization.activation != Activation::none) {
      args.y = frame.read("y", kept.y);
      if (!args.y) args.residual = frame.read("residual", kept.residual);
    }
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
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, false, {eps, activation, parameter});
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
                    {eps, activation, parameter});
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
                    {eps, activation, parameter});
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
  BackwardCall call({dy, x, residual, y, mean, mean_low, var, weight, bias}, indexed, {eps, activation, parameter});
  if (mean_dxhat && mean_dxhat_xhat) {
    call.args.mean_dxhat = call.frame.vector("mean_dxhat", mean_dxhat, indexed);
    call.args.mean_dxhat_xhat = call.frame.vector("mean_dxhat_xhat", mean_dxhat_xhat, indexed);
    call.args.weights = call.frame.read_weights(weights);
  }
  call.want_dx(need_dz);
  call.run(index);
  return {call.dx, call.dz};
}

// ---- running statistics --------------------------------------------------------------------------------------------

// Returns whether the values of a small tensor can be read and written without torch.
bool plain_float(const Tensor& t) { return dtype_code(t) == code_of(DType::float32) && t.is_contiguous(); }

// Reads a small tensor's values as float64. torch converts other dtypes and strides.
std::vector<double> values_of(const char* name, const Tensor& t) {
  check_memory(name, t);
  std::vector<double> values(static_cast<size_t>(t.numel()));
  if (values.empty()) return values;
  if (plain_float(t)) {
    const auto* p = static_cast<const float*>(t.const_data_ptr());
    std::copy(p, p + values.size(), values.begin());
  } else {
    const Tensor wide = copy_with(t, contiguous_strides(t.sizes().data(), t.dim()), code_of(DType::float64));
    std::memcpy(values.data(), wide.const_data_ptr(), values.size() * sizeof(double));
  }
  return values;
}

std::tuple<Tensor, Tensor> copy_running(const Tensor& running_mean, const Tensor& running_var) {
  const auto copy = [](const char* name, const Tensor& t) {
    check_memory(name, t);
    const int32_t code = code_of(statistics_of(floating(name, t)));
    return copy_with(t, contiguous_strides(t.sizes().data(), t.dim()), code);
  };
  return {copy("running_mean", running_mean), copy("running_var", running_var)};
}

// Checks that a tensor can be written, and increments its version for autograd by copying it to itself.
void announce_write(const char* name, const Tensor& t) {
  check_memory(name, t);
  bool writable = true;
  for (int64_t d = 0; d < t.dim(); ++d) writable &= t.stride(d) != 0 || t.size(d) < 2;
  STD_TORCH_CHECK(writable && aoti_torch_copy_(t.get(), t.get(), 0) == 0, "batchnorm::update_running_ expects ", name,
                  " to be a buffer that can be written, got an expanded tensor, an inference tensor or a leaf that "
                  "requires a gradient. Make a copy with .detach().clone() outside inference_mode.");
}

// Writes each value once, because other threads may read at any time.
void write(const Tensor& t, const std::vector<double>& values) {
  if (plain_float(t)) {
    std::copy(values.begin(), values.end(), static_cast<float*>(t.mutable_data_ptr()));
    return;
  }
  const std::vector<int64_t> strides = contiguous_strides(t.sizes().data(), t.dim());
  Tensor wide = empty(t.sizes().data(), strides.data(), t.dim(), code_of(DType::float64));
  std::copy(values.begin(), values.end(), static_cast<double*>(wide.mutable_data_ptr()));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), wide.get(), 0));
}

void update_running_(const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& num_batches_tracked,
                     const Tensor& mean, const Tensor& mean_low, const Tensor& var, int64_t m, const MaybeTensor& count,
                     std::optional<double> momentum, bool skip_nonfinite) {
  if (torch::autograd::get_current_graph_task_id() != -1) return;
  STD_TORCH_CHECK(momentum || num_batches_tracked,
                  "batchnorm::update_running_ expects num_batches_tracked if momentum is None, got None for both. Pass "
                  "the counter, or a momentum.");
  const std::vector<double> high = values_of("mean", mean), low = values_of("mean_low", mean_low);
  const std::vector<double> biased = values_of("var", var);
  std::vector<double> new_mean = values_of("running_mean", running_mean);
  std::vector<double> new_var = values_of("running_var", running_var);
  const size_t c = new_mean.size();
  for (const size_t size : {high.size(), low.size(), biased.size(), new_var.size()}) {
    STD_TORCH_CHECK(size == c, "batchnorm::update_running_ expects mean, mean_low, var and running_var of ",
                    "running_mean's size ", c, ", got ", size, ". Pass vectors of one size.");
  }
  double n = static_cast<double>(m);
  for (const auto& [name, t] : {std::pair{"num_batches_tracked", &num_batches_tracked}, std::pair{"count", &count}}) {
    STD_TORCH_CHECK(!*t || (*t)->numel() == 1, "batchnorm::update_running_ expects ", name, " of one value, got ",
                    (*t)->numel(), ". Pass a scalar.");
  }
  if (count) n = values_of("count", *count)[0];
  bool moves = n > 0.0;
  for (size_t i = 0; moves && skip_nonfinite && i < c; ++i) {
    moves = std::isfinite(high[i]) && std::isfinite(low[i]) && std::isfinite(biased[i]);
  }
  if (!moves) return;
  announce_write("running_mean", running_mean);  // check every buffer before the first is written
  announce_write("running_var", running_var);
  if (num_batches_tracked) announce_write("num_batches_tracked", *num_batches_tracked);

  double tracked = 0.0;
  if (num_batches_tracked && dtype_code(*num_batches_tracked) == codes().int64) {
    auto* p = static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
    tracked = static_cast<double>(++*p);
  } else if (num_batches_tracked) {
    tracked = values_of("num_batches_tracked", *num_batches_tracked)[0] + 1.0;
    write(*num_batches_tracked, {tracked});
  }
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
  m.impl("copy_running", TORCH_BOX(&copy_running));
  if (&torch::autograd::get_current_graph_task_id != nullptr) {
    m.impl("update_running_", TORCH_BOX(&update_running_));
  }
}
