// A layer's call in few steps. These functions do the work of several operators of the contract, with fewer tensors. They
// are strict: arguments that a layer must not accept, such as a float64 weight for a float32 x, are errors. A layer
// therefore calls them first, and checks its arguments one by one only after an error.
//
// Compiled twice: as operators (strict.cpp), and for the node of torch's autograd (autograd.cpp).
#pragma once

#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>

#include "frame.h"
#include "running.h"

namespace batchnorm::strict {

inline void expect(bool holds, const char* what) {
  STD_TORCH_CHECK(holds, "batchnorm's strict operators expect ", what,
                  ", got something else. Call batchnorm.functional.batch_norm, which reports what is wrong.");
}

inline Attributes attributes_of(double eps, int64_t activation, double parameter) {
  expect(activation >= 0 && activation < kActivations, "the number of an activation in the table");
  return {eps, static_cast<Activation>(activation), parameter};
}

// Checks a vector's dtype: x's, or float32 if x is half precision.
inline void check_vector(const Frame& frame, const MaybeTensor& t) {
  if (!t) return;
  const int32_t code = dtype_code(*t);
  const bool fits = code == code_of(frame.dtype) ||
                    (code == code_of(DType::float32) && statistics_of(frame.dtype) == DType::float32);
  expect(fits, "vectors of x's dtype, or of float32 if x is float16 or bfloat16");
}

inline void check_residual(const Frame& frame, const MaybeTensor& residual) {
  if (residual) expect(dtype_code(*residual) == code_of(frame.dtype), "a residual of x's dtype");
}

// ---- the statistics that forward keeps for backward: [3, C] of a batch (mean, mean_low, var), or [2, C] (mean, var) --------

struct Rows {
  char* data;
  int64_t bytes;
  void* operator[](int64_t row) const { return data + row * bytes; }
};
inline Rows rows_of(const Tensor& t, const Frame& frame) {
  void* data = const_cast<void*>(t.const_data_ptr());
  return {static_cast<char*>(data), frame.shape.c * size_of(statistics_of(frame.dtype))};
}

// Copies a vector [c] to a row, and makes it the vector.
template <class From, class To>
inline void convert(const void* from, int64_t c, void* to) {
  for (int64_t i = 0; i < c; ++i) static_cast<To*>(to)[i] = converted<To>(static_cast<const From*>(from)[i]);
}
inline void copy_vector(Vector& vector, int64_t c, void* row, DType dtype) {
  if (vector.dtype == dtype) {
    std::memcpy(row, vector.data, static_cast<size_t>(c * size_of(dtype)));
  } else if (vector.dtype == DType::bfloat16) {
    convert<c10::BFloat16, float>(vector.data, c, row);
  } else {
    convert<c10::Half, float>(vector.data, c, row);
  }
  vector = {row, dtype, 1};
}

template <class T>
inline Batch<T> batch_of(const Rows& rows, const Frame& frame) {
  return {static_cast<const T*>(rows[0]), static_cast<const T*>(rows[1]), static_cast<const T*>(rows[2]),
          static_cast<size_t>(frame.shape.c), static_cast<double>(frame.shape.n * frame.shape.s)};
}

// ---- forward -------------------------------------------------------------------------------------------------------

// Returns y and statistics [3, C], and updates the running statistics, which may be absent.
inline std::tuple<Tensor, Tensor> train_forward_(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                                 const MaybeTensor& residual, const MaybeTensor& running_mean,
                                                 const MaybeTensor& running_var,
                                                 const MaybeTensor& num_batches_tracked, const Attributes& attributes,
                                                 std::optional<double> momentum, bool skip_nonfinite) {
  TrainForward args{};
  Frame frame(x);
  const int64_t n = frame.shape.n * frame.shape.s;
  expect(n > 1, "more than one value per channel");
  expect(running_mean.has_value() == running_var.has_value(), "running_mean and running_var both or neither");
  for (const MaybeTensor* t : {&weight, &bias, &running_mean, &running_var}) check_vector(frame, *t);
  args.normalization = normalization_of(frame, false, {}, {}, {}, weight, bias, attributes);
  check_residual(frame, residual);
  read_forward(frame, args, x, residual);
  if (running_mean) {
    for (const Tensor* t : {&*running_mean, &*running_var}) {
      expect(t->is_cpu() && t->dim() == 1 && t->size(0) == frame.shape.c, "running statistics of shape [C] on the CPU");
    }
    expect(!num_batches_tracked || (num_batches_tracked->is_cpu() && dtype_code(*num_batches_tracked) == codes().int64),
           "num_batches_tracked of dtype int64 on the CPU");
  }
  Tensor y = frame.result(), statistics = empty_rows(true, 3, frame.shape.c, statistics_of(frame.dtype));
  const Rows rows = rows_of(statistics, frame);
  args.y = y.mutable_data_ptr();
  args.mean = rows[0];
  args.mean_low = rows[1];
  args.var = rows[2];
  kernels(frame.dtype).train_forward(threads(), args);
  const Tensor result = frame.returned(y);
  if (running_mean && !in_backward()) {  // last, so that an error leaves the running statistics unchanged
    const auto move = [&](const auto& batch) {
      move_running(*running_mean, *running_var, num_batches_tracked, batch, momentum, skip_nonfinite);
    };
    if (statistics_of(frame.dtype) == DType::float64) {
      move(batch_of<double>(rows, frame));
    } else {
      move(batch_of<float>(rows, frame));
    }
  }
  return {result, statistics};
}

// Returns y. If `kept` is given, also copies the running statistics to it, as statistics [2, C], because they may change
// before backward.
inline Tensor normalize(const Tensor& x, const Tensor& running_mean, const Tensor& running_var,
                        const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& residual,
                        const Attributes& attributes, MaybeTensor* kept = nullptr) {
  Normalize args{};
  Frame frame(x);
  const MaybeTensor mean = running_mean, var = running_var;
  for (const MaybeTensor* t : {&mean, &var, &weight, &bias}) check_vector(frame, *t);
  args.normalization = normalization_of(frame, false, mean, {}, var, weight, bias, attributes);
  check_residual(frame, residual);
  read_forward(frame, args, x, residual);
  if (kept) {
    const DType dtype = statistics_of(frame.dtype);
    *kept = empty_rows(true, 2, frame.shape.c, dtype);
    const Rows rows = rows_of(**kept, frame);
    copy_vector(args.normalization.mean, frame.shape.c, rows[0], dtype);
    copy_vector(args.normalization.var, frame.shape.c, rows[1], dtype);
  }
  Tensor y = frame.result();
  args.y = y.mutable_data_ptr();
  kernels(frame.dtype).normalize(threads(), args);
  return frame.returned(y);
}

// ---- backward ------------------------------------------------------------------------------------------------------

// The gradient of a weight or bias: the kernel's sums in the parameter's dtype.
class ParameterGradient {
 public:
  ParameterGradient(const Frame& frame, const MaybeTensor& parameter)
      : wanted_(parameter.has_value()), sums_(empty_vector(frame.shape.c, statistics_of(frame.dtype))) {
    if (wanted_) dtype_ = floating("weight and bias", *parameter);
  }
  void* sums() { return sums_.mutable_data_ptr(); }
  MaybeTensor result() const {
    if (!wanted_) return std::nullopt;
    if (dtype_code(sums_) == code_of(dtype_)) return sums_;
    Tensor gradient = empty_vector(sums_.size(0), dtype_);
    const auto* from = static_cast<const float*>(sums_.const_data_ptr());
    with_plain_data(gradient, true, [&](auto* to) {
      using T = std::remove_reference_t<decltype(*to)>;
      for (int64_t i = 0; i < sums_.size(0); ++i) to[i] = converted<T>(from[i]);
    });
    return gradient;
  }

 private:
  bool wanted_;
  DType dtype_ = DType::float32;
  Tensor sums_;
};

struct Gradients {
  MaybeTensor dx, dweight, dbias, dz;
};

// Returns the gradients of a call with these statistics: those of a batch depend on x, the others are constants. Parameters
// that are absent have no gradient.
inline Gradients backward(const Tensor& dy, const Tensor& x, const MaybeTensor& residual, const MaybeTensor& y,
                          const Tensor& statistics, const MaybeTensor& weight, const MaybeTensor& bias,
                          const Attributes& attributes, bool need_dx, bool need_dz) {
  Backward args{};
  Frame frame(x);
  const int64_t c = frame.shape.c;
  const DType dtype = statistics_of(frame.dtype);
  expect(statistics.is_cpu() && statistics.dim() == 2 && (statistics.size(0) == 3 || statistics.size(0) == 2) &&
             statistics.size(1) == c && statistics.is_contiguous() && dtype_code(statistics) == code_of(dtype),
         "statistics [3, C] or [2, C] of a forward pass");
  check_memory("statistics", statistics);
  for (const MaybeTensor* t : {&weight, &bias}) check_vector(frame, *t);
  args.normalization = normalization_of(frame, false, {}, {}, {}, weight, bias, attributes);
  const Rows rows = rows_of(statistics, frame);
  args.through_batch = need_dx && statistics.size(0) == 3;
  args.normalization.mean = {rows[0], dtype, 1};
  if (statistics.size(0) == 3) args.normalization.mean_low = {rows[1], dtype, 1};
  args.normalization.var = {rows[statistics.size(0) - 1], dtype, 1};
  read_backward(frame, args, dy, x, residual, y);
  args.groups = 1;
  ParameterGradient dweight(frame, weight), dbias(frame, bias);
  args.sum_dz_xhat = dweight.sums();
  args.sum_dz = dbias.sums();
  MaybeTensor dx, dz;
  if (need_dx) {
    dx = frame.result();
    args.dx = dx->mutable_data_ptr();
  }
  if (need_dz) {
    dz = frame.result();
    args.dz = dz->mutable_data_ptr();
  }
  kernels(frame.dtype).backward(threads(), args);
  if (dx) dx = frame.returned(*dx);
  if (dz) dz = frame.returned(*dz);
  return {dx, dweight.result(), dbias.result(), dz};
}

}  // namespace batchnorm::strict
