// Batch normalization by its definition, one value at a time in float64, with a tolerance for the rounding of each
// result: units of the arithmetic's precision times the sum of the magnitudes that were added.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "buffer.h"

// Roundings of the arithmetic of one value, and of a sum. A float32 sum has at most 32 additions in sequence. A float64
// sum may have any number, whose roundings partly cancel.
inline constexpr double kRoundings = 6.0, kSummedRoundings = 12.0;

struct Result {
  std::vector<double> value, tolerance;
  void resize(int64_t n) { value.assign(n, 0.0), tolerance.assign(n, 0.0); }
  // Adds one rounding to the dtype that stores the result to the tolerance.
  void stored_as(DType dtype) {
    for (size_t i = 0; i < value.size(); ++i) {
      tolerance[i] += std::abs(value[i]) * unit(dtype) + (tolerance[i] > 0.0 ? smallest(dtype) : 0.0);
    }
  }
};

// Neumaier's summation, so that the oracle's own rounding is negligible.
struct Sum {
  double high = 0.0, low = 0.0;
  void add(double v) {
    const double sum = high + v;
    low += std::abs(high) >= std::abs(v) ? (high - sum) + v : (v - sum) + high;
    high = sum;
  }
  double value() const { return high + low; }
};

inline double softplus(double z) { return std::fmax(z, 0.0) + std::log1p(std::exp(-std::abs(z))); }

inline double activate(Activation activation, double z, double parameter) {
  switch (activation) {
    case Activation::none:
      return z;
    case Activation::relu:
      return z > 0 ? z : 0.0;
    case Activation::relu6:
      return z > 0 ? std::fmin(z, 6.0) : 0.0;
    case Activation::leaky_relu:
      return z > 0 ? z : parameter * z;
    case Activation::silu:
      return z / (1 + std::exp(-z));
    case Activation::gelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::hardswish:
      return z * std::fmin(std::fmax(z + 3, 0.0), 6.0) / 6;
    case Activation::mish:
      return z * std::tanh(softplus(z));
    case Activation::hardsigmoid:
      return std::fmin(std::fmax(z + 3, 0.0), 6.0) / 6;
    case Activation::tanh:
      return std::tanh(z);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-z));
    case Activation::elu:
      return z > 0 ? z : parameter * std::expm1(z);
  }
  return NAN;
}

inline double derivative(Activation activation, double t, double parameter) {
  switch (activation) {
    case Activation::none:
      return 1.0;
    case Activation::relu:
      return t > 0 ? 1.0 : 0.0;
    case Activation::relu6:
      return t > 0 && t < 6 ? 1.0 : 0.0;
    case Activation::leaky_relu:
      return t > 0 ? 1.0 : parameter;
    case Activation::silu: {
      const double sigmoid = 1 / (1 + std::exp(-t));
      return sigmoid == 0.0 ? 0.0 : sigmoid * (1 + t * (1 - sigmoid));
    }
    case Activation::gelu:
      return 0.5 * std::erfc(-t / std::sqrt(2.0)) + t * std::exp(-0.5 * t * t) / std::sqrt(2 * M_PI);
    case Activation::hardswish:
      return t <= -3 ? 0.0 : t >= 3 ? 1.0 : t / 3 + 0.5;
    case Activation::mish: {
      const double tanh = std::tanh(softplus(t));
      return tanh + t * (1 - tanh * tanh) / (1 + std::exp(-t));
    }
    case Activation::hardsigmoid:
      return std::abs(t) < 3 ? 1.0 / 6 : 0.0;
    case Activation::tanh:
      return 1 - std::tanh(t) * std::tanh(t);
    case Activation::sigmoid:
      return 1 / (1 + std::exp(-t)) / (1 + std::exp(t));
    case Activation::elu:
      return t > 0 ? 1.0 : parameter * std::exp(t);
  }
  return NAN;
}

// Returns whether the derivative jumps within `distance` of t. Both derivatives are then correct.
inline bool near_kink(Activation activation, double t, double distance) {
  auto at = [&](double kink) { return std::abs(t - kink) <= distance; };
  switch (activation) {
    case Activation::relu:
    case Activation::leaky_relu:
    case Activation::elu:
      return at(0.0);
    case Activation::relu6:
      return at(0.0) || at(6.0);
    case Activation::hardswish:
    case Activation::hardsigmoid:
      return at(-3.0) || at(3.0);
    default:
      return false;
  }
}

// The inputs of a call, widened. Absent quantities are empty.
struct Inputs {
  Shape shape;
  DType dtype;
  std::vector<double> x, dy, residual, y, position_weights;  // [n, s]
  std::vector<double> mean, mean_low, var, weight, bias;     // [c] or [k, c]
  std::vector<int64_t> index;                                // [n]
  double eps = 1e-5, parameter = 0.2;
  Activation activation = Activation::none;
  bool own_statistics = false;  // mean and var are exact here, but rounded in the kernel

  double arithmetic_unit() const { return dtype == DType::float64 ? unit(DType::float64) : unit(DType::float32); }
  double sum_unit() const {
    const double additions = dtype == DType::float64 ? std::sqrt(static_cast<double>(shape.n * shape.s)) : 0.0;
    return arithmetic_unit() * (kSummedRoundings + additions);
  }
  int64_t row(int64_t n) const { return index.empty() ? 0 : index[n]; }
  double pick(const std::vector<double>& v, int64_t n, int64_t c, double otherwise) const {
    if (v.empty()) return otherwise;
    return v[(static_cast<int64_t>(v.size()) > shape.c ? row(n) * shape.c : 0) + c];
  }
  double invstd(int64_t n, int64_t c) const { return 1 / std::sqrt(pick(var, n, c, 1.0) + eps); }
  // Calls body(i, n, c, p) for every value in memory.
  template <class Body>
  void each(const Body& body) const {
    int64_t i = 0;
    for (int64_t n = 0; n < shape.n; ++n) {
      for (int64_t a = 0; a < (shape.channels_last ? shape.s : shape.c); ++a) {
        for (int64_t b = 0; b < (shape.channels_last ? shape.c : shape.s); ++b, ++i) {
          shape.channels_last ? body(i, n, b, a) : body(i, n, a, b);
        }
      }
    }
  }
};

struct MomentsResult {
  Result count, mean, m2;
  std::vector<double> first, delta;  // the mean as a pair
};

inline MomentsResult moments(const Inputs& in, int64_t groups, bool weighted) {
  const Shape& s = in.shape;
  const int64_t all = groups * s.c;
  const double u = in.arithmetic_unit(), sum_unit = in.sum_unit();
  std::vector<Sum> counts(all), sums(all), squares(all), sizes(all);
  MomentsResult r;
  r.first.assign(all, NAN), r.delta.assign(all, 0.0);
  std::vector<double>&first = r.first, &delta = r.delta;
  auto each = [&](auto body) {
    in.each([&](int64_t i, int64_t n, int64_t c, int64_t p) {
      const double w = weighted ? in.position_weights[n * s.s + p] : 1.0;
      if (w != 0.0) body(in.row(n) * s.c + c, in.x[i], w);
    });
  };
  each([&](int64_t k, double x, double w) {
    if (std::isnan(first[k])) first[k] = x;
    counts[k].add(w), sums[k].add(w * (x - first[k]));
  });
  r.count.resize(groups), r.mean.resize(all), r.m2.resize(all);
  for (int64_t n = 0; n < s.n; ++n) {
    for (int64_t p = 0; p < s.s; ++p) r.count.value[in.row(n)] += weighted ? in.position_weights[n * s.s + p] : 1.0;
  }
  for (double& t : r.count.tolerance) t = 1e-13 * static_cast<double>(s.n * s.s);
  for (int64_t k = 0; k < all; ++k) {
    if (counts[k].value() > 0.0) delta[k] = sums[k].value() / counts[k].value();
  }
  each([&](int64_t k, double x, double w) {
    const double deviation = (x - first[k]) - delta[k];
    squares[k].add(w * deviation * deviation), sizes[k].add(w * std::abs(deviation));
  });
  for (int64_t k = 0; k < all; ++k) {
    if (counts[k].value() == 0.0) continue;
    r.mean.value[k] = first[k] + delta[k];
    r.m2.value[k] = squares[k].value();
    r.m2.tolerance[k] = sum_unit * r.m2.value[k];
    // The pair is more precise than x. float64 has no wider type, so both sides of the comparison are rounded to it.
    // The oracle and the kernel also round the mean's distance from the first value, which can be large with weights.
    r.mean.tolerance[k] = sum_unit * (sizes[k].value() / counts[k].value()) +
                          2 * (unit(in.dtype) * u + unit(DType::float64)) * std::abs(r.mean.value[k]) +
                          kRoundings * unit(DType::float64) * std::abs(delta[k]);
  }
  return r;
}

// Computes z, the activation's argument.
inline Result preactivation(const Inputs& in) {
  Result z;
  z.resize(in.shape.numel());
  in.each([&](int64_t i, int64_t n, int64_t c, int64_t) {
    const double scale = in.pick(in.weight, n, c, 1.0) * in.invstd(n, c), bias = in.pick(in.bias, n, c, 0.0);
    const double deviation = in.x[i] - in.pick(in.mean, n, c, 0.0), low = in.pick(in.mean_low, n, c, 0.0);
    const double residual = in.residual.empty() ? 0.0 : in.residual[i];
    z.value[i] = (deviation - low) * scale + bias + residual;
    z.tolerance[i] = kRoundings * in.arithmetic_unit() *
                     ((std::abs(deviation) + std::abs(low)) * std::abs(scale) + std::abs(bias) + std::abs(residual));
    if (in.own_statistics) {  // the mean's error is relative to the mean deviation, the variance's to itself
      const double weight = std::abs(in.pick(in.weight, n, c, 1.0));
      z.tolerance[i] += in.sum_unit() * (weight + std::abs((deviation - low) * scale));
    }
  });
  return z;
}

inline Result normalize(const Inputs& in) {
  Result y = preactivation(in);
  // The rounding of f itself if f(0) is not zero. The tolerance of z does not cover it.
  const double own = kRoundings * in.arithmetic_unit() * std::abs(activate(in.activation, 0.0, in.parameter));
  for (size_t i = 0; i < y.value.size(); ++i) {
    y.value[i] = activate(in.activation, y.value[i], in.parameter);
    y.tolerance[i] *= in.activation == Activation::none ? 1.0 : 1.5;  // |f'| and f's own rounding
    y.tolerance[i] += own;
  }
  return y;
}

inline Result dz_of(const Inputs& in) {
  const double u = in.arithmetic_unit();
  Result dz = in.y.empty() ? preactivation(in) : Result{in.y, std::vector<double>(in.y.size(), 0.0)};
  for (size_t i = 0; i < dz.value.size(); ++i) {
    const double t = dz.value[i], distance = dz.tolerance[i], dy = std::abs(in.dy[i]);
    dz.value[i] = in.dy[i] * derivative(in.activation, t, in.parameter);
    if (in.activation == Activation::none) {
      dz.tolerance[i] = 0.0;
    } else if (in.y.empty() && near_kink(in.activation, t, distance)) {
      dz.tolerance[i] = dy;
    } else {
      dz.tolerance[i] = dy * (kRoundings * u * (1 + std::fmin(std::abs(t), 100.0)) + std::fmin(distance, 1.0));
    }
  }
  return dz;
}

struct SumsResult {
  Result dz, dz_xhat;
};

inline SumsResult sums_of(const Inputs& in, const Result& dz, int64_t groups) {
  const double u = in.sum_unit();
  const int64_t all = groups * in.shape.c;
  std::vector<Sum> sums(all), products(all);
  SumsResult r;
  r.dz.resize(all), r.dz_xhat.resize(all);
  in.each([&](int64_t i, int64_t n, int64_t c, int64_t) {
    const int64_t k = in.row(n) * in.shape.c + c;
    const double deviation = in.x[i] - in.pick(in.mean, n, c, 0.0), low = in.pick(in.mean_low, n, c, 0.0);
    const double invstd = in.invstd(n, c), size = (std::abs(deviation) + std::abs(low)) * invstd;
    sums[k].add(dz.value[i]), products[k].add(dz.value[i] * (deviation - low) * invstd);
    r.dz.tolerance[k] += u * std::abs(dz.value[i]) + dz.tolerance[i];
    r.dz_xhat.tolerance[k] += (u * std::abs(dz.value[i]) + dz.tolerance[i]) * size;
  });
  for (int64_t k = 0; k < all; ++k) r.dz.value[k] = sums[k].value(), r.dz_xhat.value[k] = products[k].value();
  return r;
}

// Computes γ·invstd·dz - w·invstd·(a + x̂·b) for given means a and b, [c] or [k, c].
inline Result dx_of(const Inputs& in, const Result& dz, const Result& a, const Result& b, bool weighted) {
  const double u = kRoundings * in.arithmetic_unit();
  Result dx;
  dx.resize(in.shape.numel());
  in.each([&](int64_t i, int64_t n, int64_t c, int64_t p) {
    const double invstd = in.invstd(n, c), scale = in.pick(in.weight, n, c, 1.0) * invstd;
    dx.value[i] = scale * dz.value[i];
    dx.tolerance[i] = std::abs(scale) * (u * std::abs(dz.value[i]) + dz.tolerance[i]);
    if (a.value.empty()) return;
    const double w = weighted ? in.position_weights[n * in.shape.s + p] : 1.0;
    const double deviation = in.x[i] - in.pick(in.mean, n, c, 0.0), low = in.pick(in.mean_low, n, c, 0.0);
    const double xhat = (deviation - low) * invstd, size = (std::abs(deviation) + std::abs(low)) * invstd;
    const double mean = in.pick(a.value, n, c, 0.0), mean_xhat = in.pick(b.value, n, c, 0.0);
    dx.value[i] -= w * invstd * (mean + xhat * mean_xhat);
    dx.tolerance[i] += w * invstd *
                       (u * std::abs(mean) + in.pick(a.tolerance, n, c, 0.0) +
                        size * (u * std::abs(mean_xhat) + in.pick(b.tolerance, n, c, 0.0)));
  });
  return dx;
}
