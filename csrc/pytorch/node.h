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
#include <vector>

#include "launched.h"
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

inline std::tuple<Tensor, MaybeTensor> launched_or_refused(const Tensor& x, const MaybeTensor& weight,
                                                           const MaybeTensor& bias, const MaybeTensor& residual,
                                                           const Call& call, bool differentiable) {
  RECORD_FUNCTION(call.training ? "batchnorm::strict_train_forward_" : "batchnorm::strict_normalize",
                  c10::ArrayRef<const c10::IValue>{});
  auto found = call.training ? launched::train_forward_(x, weight, bias, residual, call.running_mean, call.running_var,
                                                        call.num_batches_tracked, call.attributes,
                                                        {call.momentum, call.skip_nonfinite})
                             : launched::normalize(x, *call.running_mean, *call.running_var, weight, bias, residual,
                                                   call.attributes, differentiable);
  if (!found) throw Refused("other routes compute this call");
  return *std::move(found);
}

// Returns y, and the statistics for backward if `differentiable` or training.
inline std::tuple<Tensor, MaybeTensor> computed(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                                const MaybeTensor& residual, const Call& call, bool differentiable) {
  at::AutoDispatchBelowADInplaceOrView below;  // for copies of tensors in another layout
  if (call.launched) return launched_or_refused(x, weight, bias, residual, call, differentiable);
  if (call.training) {
    RECORD_FUNCTION("batchnorm::strict_train_forward_", c10::ArrayRef<const c10::IValue>{});
    return strict::train_forward_(x, weight, bias, residual, call.running_mean, call.running_var,
                                  call.num_batches_tracked, call.attributes, call.momentum, call.skip_nonfinite);
  }
  RECORD_FUNCTION("batchnorm::strict_normalize", c10::ArrayRef<const c10::IValue>{});
  MaybeTensor statistics;
  Tensor y = strict::normalize(x, *call.running_mean, *call.running_var, weight, bias, residual, call.attributes,
                               differentiable ? &statistics : nullptr);
  return {y, statistics};
}

// The gradients by the operator `batchnorm::strict_gradients`, which Python implements: as differentiable functions if
// gradients are enabled, else by the operators of the contract, which modes and transforms can see.
inline strict::Gradients by_operators(const Tensor& dy, const Tensor& x, const MaybeTensor& residual,
                                      const MaybeTensor& y, const Tensor& statistics, const MaybeTensor& weight,
                                      const MaybeTensor& bias, const Attributes& attributes,
                                      const std::array<bool, 4>& needs) {
  using Maybe = const MaybeTensor&;
  static const auto call =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("batchnorm::strict_gradients", "")
          .typed<std::tuple<MaybeTensor, MaybeTensor, MaybeTensor, MaybeTensor>(
              const Tensor&, const Tensor&, Maybe, Maybe, const Tensor&, Maybe, Maybe, double, int64_t, double,
              std::array<bool, 4>)>();
  auto [dx, dweight, dbias, dz] = call.call(dy, x, residual, y, statistics, weight, bias, attributes.eps,
                                            static_cast<int64_t>(attributes.activation), attributes.parameter, needs);
  return {dx, dweight, dbias, dz};
}

class BatchNorm : public torch::autograd::Function<BatchNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                        const MaybeTensor& residual, const Call& call) {
    Tensor y;
    MaybeTensor statistics;
    try {
      std::tie(y, statistics) = computed(x, weight, bias, residual, call, true);
    } catch (const launched::Raised&) {
      throw;
    } catch (const std::exception& error) {
      throw Refused(error.what());
    }
    const bool activated = residual && call.attributes.activation != Activation::none;
    const auto saved = [](const MaybeTensor& t, bool wanted = true) { return t && wanted ? *t : Tensor(); };
    context->save_for_backward({x, saved(residual, activated && !call.keeps_y), activated && call.keeps_y ? y : Tensor(),
                                *statistics, saved(weight), saved(bias)});
    context->saved_data["attributes"] =
        std::vector<double>{call.attributes.eps, static_cast<double>(call.attributes.activation),
                            call.attributes.parameter, residual ? 1.0 : 0.0, call.launched ? 1.0 : 0.0};
    context->set_materialize_grads(false);
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& upstream) {
    variable_list gradients(5);  // as many as forward has arguments
    const Tensor& dy = upstream[0];
    if (!dy.defined()) return gradients;
    const variable_list saved = context->get_saved_variables();
    const auto maybe = [&](size_t i) { return saved[i].defined() ? MaybeTensor(saved[i]) : std::nullopt; };
    const Tensor &x = saved[0], &statistics = saved[3];
    const MaybeTensor residual = maybe(1), y = maybe(2), weight = maybe(4), bias = maybe(5);
    const std::vector<double> data = context->saved_data["attributes"].toDoubleVector();
    const Attributes attributes = strict::attributes_of(data[0], static_cast<int64_t>(data[1]), data[2]);

    // needs_input_grad counts only the arguments that are there.
    const bool given[] = {true, weight.has_value(), bias.has_value(), data[3] != 0.0};
    std::array<bool, 4> needs{};
    for (size_t i = 0, edge = 0; i < needs.size(); ++i) needs[i] = given[i] && context->needs_input_grad(edge++);

    bool ordinary = !at::GradMode::is_enabled() && !observed() && plain(dy);
    for (const Tensor& t : saved) ordinary = ordinary && (!t.defined() || plain(t));
    std::optional<strict::Gradients> found;
    const bool need_dz = needs[3] && attributes.activation != Activation::none, need_dx = needs[0] || need_dz;
    const bool launches = data[4] != 0.0;
    if (ordinary && (need_dx || !launches)) {
      at::AutoDispatchBelowADInplaceOrView below;
      RECORD_FUNCTION("batchnorm::strict_backward", c10::ArrayRef<const c10::IValue>{});
      found = launches ? launched::backward(dy, x, residual, y, statistics, weight, bias, attributes, need_dz)
                       : strict::backward(dy, x, residual, y, statistics, weight, bias, attributes, need_dx, need_dz);
      if (found && needs[3] && !need_dz) found->dz = dy;
    }
    if (!found) found = by_operators(dy, x, residual, y, statistics, weight, bias, attributes, needs);
    const MaybeTensor* all[] = {&found->dx, &found->dweight, &found->dbias, &found->dz};
    for (size_t i = 0; i < needs.size(); ++i) {
      if (needs[i] && *all[i]) gradients[i] = **all[i];
    }
    return gradients;
  }
};

// Returns y, with this node if a gradient is needed. Returns nothing, before any change, if another route must be used.
inline MaybeTensor batch_norm(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                              const MaybeTensor& residual, const Call& call) {
  bool differentiable = false;
  if (!plain(x) || (!call.training && !(call.running_mean && call.running_var))) return std::nullopt;
  for (const MaybeTensor* t : {&call.running_mean, &call.running_var, &call.num_batches_tracked}) {
    if (!plain(*t) || (*t && (*t)->requires_grad())) return std::nullopt;
  }
  differentiable = x.requires_grad();
  for (const MaybeTensor* t : {&weight, &bias, &residual}) {
    if (!plain(*t)) return std::nullopt;
    differentiable = differentiable || (*t && (*t)->requires_grad());
  }
  differentiable = differentiable && at::GradMode::is_enabled();
  if (differentiable && x.is_inference()) return std::nullopt;  // autograd cannot save it
  try {
    if (differentiable) return BatchNorm::apply(x, weight, bias, residual, call);
    return std::get<0>(computed(x, weight, bias, residual, call, false));
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
