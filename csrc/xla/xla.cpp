// The kernels as custom calls of XLA on the CPU. Only this file and pool.h use XLA, and of it only the header-only FFI,
// so that the binary needs no library of XLA. An absent argument or result is an array without values.
// batchnorm/jax/kernels.py registers and calls these functions.

#include <algorithm>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "kernels/export.h"
#include "pool.h"
#include "shim.h"

namespace {

using namespace batchnorm;
namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using Out = ffi::Result<AnyBuffer>;

DType dtype_of(const AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::DataType::F64:
      return DType::float64;
    case ffi::DataType::F32:
      return DType::float32;
    case ffi::DataType::BF16:
      return DType::bfloat16;
    case ffi::DataType::F16:
      return DType::float16;
    default:
      throw std::invalid_argument("batchnorm expects float64, float32, bfloat16 or float16, got another dtype. Convert "
                                  "the array with .astype().");
  }
}

int64_t count_of(const AnyBuffer& buffer) { return static_cast<int64_t>(buffer.element_count()); }

const void* data(const AnyBuffer& buffer) { return count_of(buffer) > 0 ? buffer.untyped_data() : nullptr; }

void* data(Out& buffer) {
  if (count_of(*buffer) == 0) return nullptr;
  advise_huge_pages(buffer->untyped_data(), count_of(*buffer) * size_of(dtype_of(*buffer)));
  return buffer->untyped_data();
}

// The sizes as for torch's tensors, so that the kernels sum in the same order.
Shape shape_of(const AnyBuffer& x, int64_t axis) {
  const auto sizes = x.dimensions();
  const auto dim = static_cast<int64_t>(sizes.size());
  Shape shape{1, sizes[axis], 1, axis == dim - 1 && dim > 2};
  for (int64_t d = 0; d < dim; ++d) {
    if (d == axis) continue;
    (d > axis || (shape.channels_last && d > 0) ? shape.s : shape.n) *= sizes[d];
  }
  return shape;
}

Vector vector(const AnyBuffer& buffer, const Shape& shape) {
  if (count_of(buffer) == 0) return {};
  if (count_of(buffer) != shape.c) {
    throw std::invalid_argument("batchnorm expects one value per channel, got " + std::to_string(count_of(buffer)) +
                                " for " + std::to_string(shape.c) + " channels. Pass vectors of shape [C].");
  }
  return {buffer.untyped_data(), dtype_of(buffer), 1};
}

// The attributes of every call.
struct Attributes {
  int64_t axis;
  double eps;
  std::string_view activation;
  double parameter;
};

void set_attributes(Normalization& normalization, const Attributes& attributes) {
  const auto activation = find_activation(attributes.activation);
  if (!activation) {
    throw std::invalid_argument("batchnorm expects an activation of the kernels, got '" +
                                std::string(attributes.activation) + "'. Reinstall batchnorm.");
  }
  normalization.activation = *activation;
  normalization.eps = attributes.eps;
  normalization.parameter = attributes.parameter;
}

template <class Call>
ffi::Error guarded(const Call& call) {
  try {
    call();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error::InvalidArgument(error.what());
  } catch (const std::exception& error) {
    return ffi::Error::Internal(error.what());
  }
}

// ---- calls ---------------------------------------------------------------------------------------------------------

// Fills `count` [c] with the number of values of a channel, or the sum of their weights.
void store_count(const Shape& shape, DType dtype, double counted, Out& count) {
  with_statistics(dtype, data(count), [&](auto* values) { std::fill_n(values, shape.c, counted); });
}

// Computes results of `args` with weights again, without the values whose weight is 0.
void clear_then_train(const Threads& threads, DType dtype, const TrainForward& args) {
  const Shape& shape = args.shape;
  const DType statistics = statistics_of(dtype);
  double counted = 0.0;
  kernels(dtype).moments(threads, {shape, args.x, nullptr, args.weights, 1, &counted, args.mean, args.mean_low, args.var});
  with_statistics(statistics, args.var, [&](auto* var) {
    using A = std::remove_reference_t<decltype(*var)>;
    const double divisor = counted > 0.0 ? counted : 1.0;
    for (int64_t c = 0; c < shape.c; ++c) var[c] = static_cast<A>(static_cast<double>(var[c]) / divisor);
  });
  Normalize again{shape, args.x, args.residual, args.normalization, args.y};
  again.normalization.mean = {args.mean, statistics, 1};
  again.normalization.mean_low = {args.mean_low, statistics, 1};
  again.normalization.var = {args.var, statistics, 1};
  kernels(dtype).normalize(threads, again);
}

ffi::Error train_forward(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer weight, AnyBuffer bias, AnyBuffer residual,
                         AnyBuffer weights, int64_t axis, double eps, std::string_view activation, double parameter,
                         Out y, Out count, Out mean, Out mean_low, Out var) {
  return guarded([&] {
    const Pool pool(threads);
    const DType dtype = dtype_of(x);
    TrainForward args{};
    args.shape = shape_of(x, axis);
    args.x = data(x);
    args.residual = data(residual);
    set_attributes(args.normalization, {axis, eps, activation, parameter});
    args.normalization.weight = vector(weight, args.shape);
    args.normalization.bias = vector(bias, args.shape);
    args.y = data(y);
    args.mean = data(mean);
    args.mean_low = data(mean_low);
    args.var = data(var);
    args.weights = data(weights);
    double counts[] = {static_cast<double>(args.shape.n * args.shape.s), 0.0};
    if (args.weights) args.count = counts;
    kernels(dtype).train_forward(pool.threads(), args);
    store_count(args.shape, dtype, counts[0], count);
    const bool finite = !args.weights || all_finite(statistics_of(dtype), args.var, args.shape.c);
    if (!finite) clear_then_train(pool.threads(), dtype, args);
  });
}

ffi::Error moments(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer weights, int64_t axis, double, std::string_view,
                   double, Out count, Out mean, Out mean_low, Out m2) {
  return guarded([&] {
    const Pool pool(threads);
    double counted = 0.0;  // float64 arrays are disabled by default in JAX
    Moments args{};
    args.shape = shape_of(x, axis);
    args.x = data(x);
    args.weights = data(weights);
    args.groups = 1;
    args.count = &counted;
    args.mean = data(mean);
    args.mean_low = data(mean_low);
    args.m2 = data(m2);
    kernels(dtype_of(x)).moments(pool.threads(), args);
    store_count(args.shape, dtype_of(x), counted, count);
  });
}

// The vectors of the map from x to y.
struct Vectors {
  const AnyBuffer &mean, &mean_low, &var, &weight, &bias;
};

Normalization normalization_of(const Vectors& vectors, const Shape& shape, const Attributes& attributes) {
  Normalization normalization;
  set_attributes(normalization, attributes);
  normalization.mean = vector(vectors.mean, shape);
  normalization.mean_low = vector(vectors.mean_low, shape);
  normalization.var = vector(vectors.var, shape);
  normalization.weight = vector(vectors.weight, shape);
  normalization.bias = vector(vectors.bias, shape);
  return normalization;
}

ffi::Error normalize(ffi::ThreadPool threads, AnyBuffer x, AnyBuffer residual, AnyBuffer mean, AnyBuffer mean_low,
                     AnyBuffer var, AnyBuffer weight, AnyBuffer bias, int64_t axis, double eps,
                     std::string_view activation, double parameter, Out y) {
  return guarded([&] {
    const Pool pool(threads);
    Normalize args{};
    args.shape = shape_of(x, axis);
    args.x = data(x);
    args.residual = data(residual);
    args.normalization =
        normalization_of({mean, mean_low, var, weight, bias}, args.shape, {axis, eps, activation, parameter});
    args.y = data(y);
    kernels(dtype_of(x)).normalize(pool.threads(), args);
  });
}

// The sums are computed if sum_dz has values, dx and dz if they have values. The means are given if mean_dxhat has
// values; otherwise dx takes them from the sums and the weights.
ffi::Error backward(ffi::ThreadPool threads, AnyBuffer dy, AnyBuffer x, AnyBuffer residual, AnyBuffer mean,
                    AnyBuffer mean_low, AnyBuffer var, AnyBuffer weight, AnyBuffer bias, AnyBuffer mean_dxhat,
                    AnyBuffer mean_dxhat_xhat, AnyBuffer weights, int64_t axis, double eps,
                    std::string_view activation, double parameter, Out sum_dz, Out sum_dz_xhat, Out dx, Out dz) {
  return guarded([&] {
    const Pool pool(threads);
    Backward args{};
    args.shape = shape_of(x, axis);
    args.dy = data(dy);
    args.x = data(x);
    args.residual = data(residual);
    args.normalization =
        normalization_of({mean, mean_low, var, weight, bias}, args.shape, {axis, eps, activation, parameter});
    args.groups = 1;
    args.sum_dz = data(sum_dz);
    args.sum_dz_xhat = data(sum_dz_xhat);
    args.dx = data(dx);
    args.dz = data(dz);
    args.mean_dxhat = vector(mean_dxhat, args.shape);
    args.mean_dxhat_xhat = vector(mean_dxhat_xhat, args.shape);
    args.through_batch = args.sum_dz && args.dx;
    args.weights = data(weights);
    kernels(dtype_of(x)).backward(pool.threads(), args);
  });
}

// Binds a function of `args` arguments and `rets` results. A binding can be extended, but neither copied nor moved.
template <int rets, class Binding, class Function>
auto bind_results(Binding&& binding, Function function) {
  if constexpr (rets == 0) {
    return std::move(binding).To(function);
  } else {
    return bind_results<rets - 1>(std::move(binding).template Ret<AnyBuffer>(), function);
  }
}
template <int args, int rets, class Binding, class Function>
auto bind_arguments(Binding&& binding, Function function) {
  if constexpr (args == 0) {
    return bind_results<rets>(std::move(binding)
                                  .template Attr<int64_t>("axis")
                                  .template Attr<double>("eps")
                                  .template Attr<std::string_view>("activation")
                                  .template Attr<double>("parameter"),
                              function);
  } else {
    return bind_arguments<args - 1, rets>(std::move(binding).template Arg<AnyBuffer>(), function);
  }
}
template <int args, int rets, class Function>
auto bind(Function function) {
  return bind_arguments<args, rets>(ffi::Ffi::Bind().Ctx<ffi::ThreadPool>(), function);
}

}  // namespace

BATCHNORM_EXPORT XLA_FFI_Error* batchnorm_xla_train_forward(XLA_FFI_CallFrame* frame) {
  static const auto handler = bind<5, 5>(train_forward);
  return handler->Call(frame);
}
BATCHNORM_EXPORT XLA_FFI_Error* batchnorm_xla_moments(XLA_FFI_CallFrame* frame) {
  static const auto handler = bind<2, 4>(moments);
  return handler->Call(frame);
}
BATCHNORM_EXPORT XLA_FFI_Error* batchnorm_xla_normalize(XLA_FFI_CallFrame* frame) {
  static const auto handler = bind<7, 1>(normalize);
  return handler->Call(frame);
}
BATCHNORM_EXPORT XLA_FFI_Error* batchnorm_xla_backward(XLA_FFI_CallFrame* frame) {
  static const auto handler = bind<11, 4>(backward);
  return handler->Call(frame);
}

// The version of the FFI that this library was built with.
BATCHNORM_EXPORT int batchnorm_xla_ffi_major() { return XLA_FFI_API_MAJOR; }
BATCHNORM_EXPORT int batchnorm_xla_ffi_minor() { return XLA_FFI_API_MINOR; }
