// A layer's call as a node of torch's autograd.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <utility>
#include <vector>

#include "launched.h"
#include "parts.h"
#include "strict.h"

namespace batchnorm::node {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The functions that compute a pass refused its arguments, before they changed anything.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The arguments of a call besides the tensors that may have gradients. In evaluation, keeps_y, momentum and
// skip_nonfinite are not used.
struct Call {
  MaybeTensor running_mean, running_var, num_batches_tracked;
  bool training;
  Attributes attributes;
  bool keeps_y;  // y determines the activation's derivative, so that backward does not need the residual
  std::optional<double> momentum;
  bool skip_nonfinite;
  bool launched;  // by functions in Python, instead of the kernels for the CPU
  std::optional<parts::Parts> parts = std::nullopt;  // if statistics are not those of all values
};

// y, and the statistics for backward.
struct Computed {
  Tensor y;
  MaybeTensor statistics;                         // of strict.h, if needed
  std::optional<parts::Statistics> of_parts = {};  // instead
};

// Returns whether a tensor is dense, on the CPU or a GPU, and holds its values in memory, so that no other part of torch
// needs to see the call.
inline bool plain(const Tensor& t) {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::ADInplaceOrView, DispatchKey::CPU, DispatchKey::AutogradCPU,
                                       DispatchKey::AutocastCPU, DispatchKey::CUDA, DispatchKey::AutogradCUDA,
                                       DispatchKey::AutocastCUDA});
  return (t.key_set().raw_repr() & ~usual.raw_repr()) == 0;
}
inline bool plain(const MaybeTensor& t) { return !t || plain(*t); }

// Returns whether a dispatch mode, a transform or a trace is active.
inline bool observed() {
  using c10::DispatchKey;
  constexpr c10::DispatchKeySet usual({DispatchKey::BackendSelect, DispatchKey::ADInplaceOrView});
  return (c10::impl::tls_local_dispatch_key_set().included_.raw_repr() & ~usual.raw_repr()) != 0;
}

inline Computed launched_or_refused(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                    const MaybeTensor& residual, const Call& call, bool differentiable) {
  RECORD_FUNCTION(call.training ? "batchnorm::strict_train_forward_" : "batchnorm::strict_normalize",
                  c10::ArrayRef<const c10::IValue>{});
  auto found = call.training ? launched::train_forward_(x, weight, bias, residual, call.running_mean, call.running_var,
                                                        call.num_batches_tracked, call.attributes,
                                                        {call.momentum, call.skip_nonfinite})
                             : launched::normalize(x, *call.running_mean, *call.running_var, weight, bias, residual,
                                                   call.attributes, differentiable);
  if (!found) throw Refused("other routes compute this call");
  return {std::get<0>(*found), std::get<1>(*found)};
}

inline Computed computed_by_parts(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                  const MaybeTensor& residual, const Call& call) {
  Computed found;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    RECORD_FUNCTION("batchnorm::strict_parts_forward", c10::ArrayRef<const c10::IValue>{});
    std::tie(found.y, found.of_parts) = parts::forward(x, weight, bias, residual, *call.parts, call.attributes);
  }
  if (call.running_mean) {  // above ADInplaceOrView, so that rows share the version of their tensor
    RECORD_FUNCTION("batchnorm::strict_update_parts_", c10::ArrayRef<const c10::IValue>{});
    parts::update_(*call.running_mean, *call.running_var, call.num_batches_tracked, *found.of_parts, call.momentum,
                   call.skip_nonfinite);
  }
  return found;
}

// Returns y, and the statistics if `differentiable` or training.
inline Computed computed(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                         const MaybeTensor& residual, const Call& call, bool differentiable) {
  if (call.parts) return computed_by_parts(x, weight, bias, residual, call);
  at::AutoDispatchBelowADInplaceOrView below;  // for copies of tensors in another layout
  if (call.launched) return launched_or_refused(x, weight, bias, residual, call, differentiable);
  if (call.training) {
    RECORD_FUNCTION("batchnorm::strict_train_forward_", c10::ArrayRef<const c10::IValue>{});
    auto [y, statistics] =
        strict::train_forward_(x, weight, bias, residual, call.running_mean, call.running_var,
                               call.num_batches_tracked, call.attributes, call.momentum, call.skip_nonfinite);
    return {y, statistics};
  }
  RECORD_FUNCTION("batchnorm::strict_normalize", c10::ArrayRef<const c10::IValue>{});
  MaybeTensor statistics;
  Tensor y = strict::normalize(x, *call.running_mean, *call.running_var, weight, bias, residual, call.attributes,
                               differentiable ? &statistics : nullptr);
  return {y, statistics};
}

// The tensors that forward saves for backward, by their places. The last six are only there with parts.
enum Place : size_t { kX, kResidual, kY, kStatistics, kWeight, kBias, kIndex, kWeights, kMean, kMeanLow, kVar, kCount };

// What backward computes from.
struct Pass {
  const Tensor& dy;
  const variable_list saved;
  Attributes attributes;
  bool launched;
  int64_t groups;             // of parts; 0 without
  std::array<bool, 4> needs;  // the gradients of x, weight, bias and residual

  const Tensor& operator[](Place place) const { return saved[place]; }
  MaybeTensor maybe(Place place) const { return saved[place].defined() ? MaybeTensor(saved[place]) : std::nullopt; }
  bool need_dz() const { return needs[3] && attributes.activation != Activation::none; }
  bool need_dx() const { return needs[0] || need_dz(); }
};

// The gradients by operators that Python implements: as differentiable functions if gradients are enabled, else by the
// operators of the contract, which modes and transforms can see.
inline strict::Gradients by_operators(const Pass& p) {
  using Maybe = const MaybeTensor&;
  using Result = std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>;
  using Needs = std::array<bool, 4>;
  static const auto find = [](const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); };
  static const auto whole =
      find("batchnorm::strict_gradients")
          .typed<Result(const Tensor&, const Tensor&, Maybe, Maybe, const Tensor&, Maybe, Maybe, double, int64_t,
                        double, Needs)>();
  static const auto by_parts =
      find("batchnorm::strict_parts_gradients")
          .typed<Result(const Tensor&, const Tensor&, Maybe, Maybe, const Tensor&, const Tensor&, const Tensor&, Maybe,
                        Maybe, const Tensor&, Maybe, Maybe, int64_t, double, int64_t, double, Needs)>();
  const auto activation = static_cast<int64_t>(p.attributes.activation);
  const double eps = p.attributes.eps, parameter = p.attributes.parameter;
  const MaybeTensor residual = p.maybe(kResidual), y = p.maybe(kY), weight = p.maybe(kWeight), bias = p.maybe(kBias);
  auto [dx, dweight, dbias, dz] =
      p.groups == 0
          ? whole.call(p.dy, p[kX], residual, y, p[kStatistics], weight, bias, eps, activation, parameter, p.needs)
          : by_parts.call(p.dy, p[kX], residual, y, p[kMean], p[kMeanLow], p[kVar], weight, bias, p[kCount],
                          p.maybe(kIndex), p.maybe(kWeights), p.groups, eps, activation, parameter, p.needs);
  return {dx, dweight, dbias, dz};
}

// Returns a parameter's gradient [C] or [K, C], in its dtype, from sums by row.
inline MaybeTensor gradient_of(const MaybeTensor& parameter, const Tensor& sums) {
  if (!parameter) return std::nullopt;
  return (sums.dim() > parameter->dim() ? sums.sum(0) : sums).to(parameter->scalar_type());
}

inline strict::Gradients by_parts(const Pass& p) {
  const MaybeTensor weight = p.maybe(kWeight), bias = p.maybe(kBias);
  const parts::Gradients found = parts::backward(
      p.dy, p[kX], p.maybe(kResidual), p.maybe(kY), p[kMean], p[kMeanLow], p[kVar], weight, bias, p[kCount],
      {p.maybe(kIndex), p.maybe(kWeights), p.groups}, p.attributes, p.need_dz());
  return {found.dx, gradient_of(weight, found.sum_dz_xhat), gradient_of(bias, found.sum_dz), found.dz};
}

// Returns the gradients by the kernels. Returns nothing if something else must see the call, or if they cannot compute it.
inline std::optional<strict::Gradients> by_kernels(const Pass& p) {
  if (at::GradMode::is_enabled() || observed() || !plain(p.dy)) return std::nullopt;
  for (const Tensor& t : p.saved) {
    if (t.defined() && !plain(t)) return std::nullopt;
  }
  if (!p.need_dx() && (p.launched || p.groups > 0)) return std::nullopt;
  at::AutoDispatchBelowADInplaceOrView below;
  std::optional<strict::Gradients> found;
  if (p.groups > 0) {
    RECORD_FUNCTION("batchnorm::strict_parts_backward", c10::ArrayRef<const c10::IValue>{});
    found = by_parts(p);
  } else {
    RECORD_FUNCTION("batchnorm::strict_backward", c10::ArrayRef<const c10::IValue>{});
    const MaybeTensor residual = p.maybe(kResidual), y = p.maybe(kY), weight = p.maybe(kWeight), bias = p.maybe(kBias);
    found = p.launched ? launched::backward(p.dy, p[kX], residual, y, p[kStatistics], weight, bias, p.attributes,
                                            p.need_dz())
                       : strict::backward(p.dy, p[kX], residual, y, p[kStatistics], weight, bias, p.attributes,
                                          p.need_dx(), p.need_dz());
  }
  if (found && p.needs[3] && !p.need_dz()) found->dz = p.dy;
  return found;
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& residual, const Call& call) {
    Computed found;
    try {
      found = computed(x, weight, bias, residual, call, true);
    } catch (const launched::Raised&) {
      throw;
    } catch (const std::exception& error) {
      throw Refused(error.what());
    }
    const bool activated = residual && call.attributes.activation != Activation::none;
    const auto saved = [](const MaybeTensor& t, bool wanted = true) { return t && wanted ? *t : Tensor(); };
    variable_list kept{x, saved(residual, activated && !call.keeps_y), activated && call.keeps_y ? found.y : Tensor(),
                       saved(found.statistics), saved(weight), saved(bias)};
    if (const auto& of_parts = found.of_parts) {
      for (const Tensor& t : {saved(call.parts->index), saved(call.parts->weights), of_parts->mean, of_parts->mean_low,
                              of_parts->var, of_parts->count}) {
        kept.push_back(t);
      }
    }
    context->save_for_backward(std::move(kept));
    context->saved_data["attributes"] = std::vector<double>{
        call.attributes.eps, static_cast<double>(call.attributes.activation), call.attributes.parameter,
        residual ? 1.0 : 0.0, call.launched ? 1.0 : 0.0, call.parts ? static_cast<double>(call.parts->groups) : 0.0};
    context->set_materialize_grads(false);
    return found.y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(5);  // as many as forward has arguments
    if (!upstream[0].defined()) return gradients;
    const std::vector<double> data = context->saved_data["attributes"].toDoubleVector();
    Pass pass{upstream[0], context->get_saved_variables(),
              strict::attributes_of(data[0], static_cast<int64_t>(data[1]), data[2]), data[4] != 0.0,
              static_cast<int64_t>(data[5]), {}};

    // needs_input_grad counts only the arguments that are there.
    const bool given[] = {true, pass[kWeight].defined(), pass[kBias].defined(), data[3] != 0.0};
    for (size_t i = 0, edge = 0; i < pass.needs.size(); ++i) {
      pass.needs[i] = given[i] && context->needs_input_grad(edge++);
    }
    std::optional<strict::Gradients> found = by_kernels(pass);
    if (!found) found = by_operators(pass);
    const MaybeTensor* all[] = {&found->dx, &found->dweight, &found->dbias, &found->dz};
    for (size_t i = 0; i < pass.needs.size(); ++i) {
      if (pass.needs[i] && *all[i]) gradients[i] = **all[i];
    }
    return gradients;
  }
};

// Returns y, with this node if a gradient is needed. Returns nothing, before any change, if another route must be used.
inline MaybeTensor batch_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                              const MaybeTensor& residual, const Call& call) {
  if (!plain(x) || (!call.training && !(call.running_mean && call.running_var))) return std::nullopt;
  for (const MaybeTensor* t : {&call.running_mean, &call.running_var, &call.num_batches_tracked}) {
    if (!plain(*t) || (*t && (*t)->requires_grad())) return std::nullopt;
  }
  bool differentiable = x.requires_grad(), can_be_saved = !x.is_inference();
  for (const MaybeTensor* t : {&weight, &bias, &residual}) {
    if (!plain(*t)) return std::nullopt;
    differentiable = differentiable || (*t && (*t)->requires_grad());
    can_be_saved = can_be_saved && !(*t && (*t)->is_inference());
  }
  if (call.parts) {
    for (const MaybeTensor* t : {&call.parts->index, &call.parts->weights}) {
      if (!plain(*t)) return std::nullopt;
      can_be_saved = can_be_saved && !(*t && (*t)->is_inference());
    }
  }
  differentiable = differentiable && at::GradMode::is_enabled();
  if (differentiable && !can_be_saved) return std::nullopt;  // before running statistics change
  try {
    if (differentiable) return BatchNorm::apply(x, weight, bias, residual, call);
    return computed(x, weight, bias, residual, call, false).y;
  } catch (const Refused&) {
    return std::nullopt;
  } catch (const launched::Raised&) {
    throw;
  } catch (const std::exception&) {
    if (differentiable) throw;  // an error of a hook on saved tensors
    return std::nullopt;
  }
}

}  // namespace batchnorm::node
