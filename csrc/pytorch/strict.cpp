// The functions of strict.h as operators, through torch's stable ABI.

#include <torch/csrc/stable/library.h>

#include "strict.h"

namespace {

using namespace batchnorm;

std::tuple<Tensor, Tensor> train_forward_(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                          const MaybeTensor& residual, const MaybeTensor& running_mean,
                                          const MaybeTensor& running_var, const MaybeTensor& num_batches_tracked,
                                          double eps, int64_t activation, double parameter,
                                          std::optional<double> momentum, bool skip_nonfinite) {
  return strict::train_forward_(x, weight, bias, residual, running_mean, running_var, num_batches_tracked,
                                strict::attributes_of(eps, activation, parameter), momentum, skip_nonfinite);
}

std::tuple<Tensor, MaybeTensor, MaybeTensor, MaybeTensor> train_backward(
    const Tensor& dy, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& y, const Tensor& statistics,
    const MaybeTensor& weight, const MaybeTensor& bias, double eps, int64_t activation, double parameter,
    bool need_dz) {
  const strict::Gradients found = strict::backward(dy, x, residual, y, statistics, weight, bias,
                                                   strict::attributes_of(eps, activation, parameter), true, need_dz);
  return {*found.dx, found.dweight, found.dbias, found.dz};
}

Tensor normalize(const Tensor& x, const Tensor& running_mean, const Tensor& running_var, const MaybeTensor& weight,
                 const MaybeTensor& bias, const MaybeTensor& residual, double eps, int64_t activation,
                 double parameter) {
  return strict::normalize(x, running_mean, running_var, weight, bias, residual,
                           strict::attributes_of(eps, activation, parameter));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(batchnorm, m) {
  m.def(
      "strict_train_forward_(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor(a!)? running_mean, "
      "Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float eps, int activation, float negative_slope, "
      "float? momentum, bool skip_nonfinite) -> (Tensor y, Tensor statistics)");
  m.def(
      "strict_train_backward(Tensor dy, Tensor x, Tensor? residual, Tensor? y, Tensor statistics, Tensor? weight, "
      "Tensor? bias, float eps, int activation, float negative_slope, bool need_dz) -> "
      "(Tensor dx, Tensor? dweight, Tensor? dbias, Tensor? dz)");
  m.def(
      "strict_normalize(Tensor x, Tensor running_mean, Tensor running_var, Tensor? weight, Tensor? bias, "
      "Tensor? residual, float eps, int activation, float negative_slope) -> Tensor y");
}

STABLE_TORCH_LIBRARY_IMPL(batchnorm, CPU, m) {
  m.impl("strict_train_backward", TORCH_BOX(&train_backward));
  m.impl("strict_normalize", TORCH_BOX(&normalize));
  if (can_see_backward()) m.impl("strict_train_forward_", TORCH_BOX(&train_forward_));
}
