// Float64 arithmetic on [C] vectors: computes statistics and gradients from sums, and coefficients from both.
#pragma once

#include <cmath>
#include <initializer_list>

#include "parallel.h"
#include "terms.h"

namespace BATCHNORM_NAMESPACE {

// A [rows, c] quantity in float64, filled with `otherwise` if it is absent.
class Wide {
 public:
  Wide(const Vector& v, int64_t c, double otherwise, Scratch& scratch) : c_(c), rows_(v.rows) {
    int64_t n = rows_ * c;
    data_ = scratch.get<double>(n);
    switch (v.data ? static_cast<int>(v.dtype) : -1) {
      case static_cast<int>(DType::float64):
        copy<double>(v.data, n);
        break;
      case static_cast<int>(DType::float32):
        copy<float>(v.data, n);
        break;
      case static_cast<int>(DType::bfloat16):
        copy<bfloat16>(v.data, n);
        break;
      case static_cast<int>(DType::float16):
        copy<float16>(v.data, n);
        break;
      default:
        for (int64_t i = 0; i < n; ++i) data_[i] = otherwise;
    }
  }
  double get(int64_t row, int64_t c) const { return data_[(rows_ > 1 ? row : 0) * c_ + c]; }
  int64_t rows() const { return rows_; }
  void set(int64_t row, int64_t c, double value) { data_[row * c_ + c] = value; }

 private:
  template <class T>
  void copy(const void* from, int64_t n) {
    const T* p = static_cast<const T*>(from);
    for (int64_t i = 0; i < n; ++i) data_[i] = static_cast<double>(widen_one(p + i));
  }
  int64_t c_, rows_;
  double* data_;
};

// Mean (as a pair) and sum of squared deviations, computed from Σ(x - pivot) and Σ(x - pivot)² of n values.
struct MomentsOfChannel {
  double mean, mean_low, m2;
  bool far;  // m2 lost digits, because the pivot is many deviations from the mean; sum again with the mean as pivot
};

template <class T>
BATCHNORM_INLINE MomentsOfChannel moments_of(double pivot, double sum, double sum_squares, double n) {
  MomentsOfChannel r;
  double delta = sum / n;
  r.mean = round_to<T>(pivot + delta);
  r.mean_low = (pivot - r.mean) + delta;
  r.m2 = sum_squares - sum * delta;
  r.far = sum * delta > 4.0 * r.m2;
  if (r.m2 < 0.0) r.m2 = 0.0;
  return r;
}

// The inputs from which the coefficients of a normalization are computed.
template <class T>
struct Channels {
  using A = Arithmetic<T>;
  Wide mean, mean_low, inverse, weight, bias;  // inverse: 1/√(var + ε), once for all rows of weight and bias
  double eps;

  Channels(const Normalization& n, int64_t c, Scratch& scratch)
      : mean(n.mean, c, 0.0, scratch),
        mean_low(n.mean_low, c, 0.0, scratch),
        inverse(n.var, c, 1.0, scratch),
        weight(n.weight, c, 1.0, scratch),
        bias(n.bias, c, 0.0, scratch),
        eps(n.eps) {
    for (int64_t row = 0; n.var.data && row < n.var.rows; ++row) {
      for (int64_t k = 0; k < c; ++k) set_var(row, k, inverse.get(row, k));
    }
  }

  // The number of rows of statistics; a [c] vector applies to every row.
  int64_t rows() const {
    int64_t rows = INT64_MAX;
    for (const Wide* w : {&mean, &mean_low, &inverse}) rows = w->rows() > 1 && w->rows() < rows ? w->rows() : rows;
    return rows;
  }
  void set_var(int64_t row, int64_t c, double var) { inverse.set(row, c, 1.0 / std::sqrt(var + eps)); }
  double invstd(int64_t row, int64_t c) const { return inverse.get(row, c); }
  A scale(int64_t row, int64_t c) const { return static_cast<A>(weight.get(row, c) * invstd(row, c)); }
  A shift(int64_t row, int64_t c, A scale) const {
    double low = mean_low.get(row, c);
    return static_cast<A>(low == 0.0 ? bias.get(row, c) : bias.get(row, c) - low * static_cast<double>(scale));
  }
  // Converts Σ dz·(x - mean) to Σ dz·x̂.
  double sum_dz_xhat(int64_t row, int64_t c, double sum_dz, double sum_dz_deviation) const {
    double low = mean_low.get(row, c);
    return (low == 0.0 ? sum_dz_deviation : sum_dz_deviation - low * sum_dz) * invstd(row, c);
  }
  // Corrects the constant for mean_low: the slope multiplies x - mean instead of x - mean - mean_low.
  A constant(int64_t row, int64_t c, double constant, double slope) const {
    double low = mean_low.get(row, c);
    return static_cast<A>(low == 0.0 ? constant : constant - low * slope);
  }
};

// Writable coefficients for `lanes` lanes.
template <class A>
struct CoefficientArrays {
  A *mean, *scale, *shift, *slope, *constant;
  CoefficientArrays(int64_t lanes, Scratch& scratch) {
    A* all = scratch.get<A>(5 * lanes);
    for (int64_t i = 0; i < 5 * lanes; ++i) all[i] = A(0);
    mean = all, scale = all + lanes, shift = all + 2 * lanes, slope = all + 3 * lanes, constant = all + 4 * lanes;
  }
  Coefficients<A> view() const { return {mean, scale, shift, slope, constant}; }
};

}  // namespace BATCHNORM_NAMESPACE
