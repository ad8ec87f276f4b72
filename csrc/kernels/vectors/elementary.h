// exp, expm1 and the normal distribution for vectors, to about one unit in the last place of float32. float64 calls the
// C library for each lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace BATCHNORM_NAMESPACE {

// A polynomial by Horner's rule; the coefficient of the highest power comes first.
template <class... More>
BATCHNORM_INLINE Vec<float> polynomial(Vec<float> x, float first, More... more) {
  Vec<float> sum = broadcast(first);
  ((sum = fma(sum, x, broadcast(more))), ...);
  return sum;
}

// e^x = 2^n·e^r for an integer n, and a polynomial (e^r - 1)/r, which is minimax for |r| <= ln 2 / 2.
struct Exponential {
  Vec<float> shifted;  // n + kMagic, so that n is in the lowest bits
  Vec<float> r, slope;
  static constexpr float kMagic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer

  BATCHNORM_INLINE Exponential of(Vec<float> x) {
    const Vec<float> shifted = fma(x, broadcast(1.44269504f), broadcast(kMagic)), n = shifted - kMagic;
    Vec<float> r = fma(n, broadcast(-0.693359375f), x);  // ln 2 in two parts, the first of few digits
    r = fma(n, broadcast(2.12194440e-4f), r);
    return {shifted, r,
            polynomial(r, 1.38145406e-3f, 8.36874545e-3f, 4.16683890e-2f, 1.66665211e-1f, 0.49999994f, 1.0f)};
  }
  __attribute__((always_inline)) Int32 n() const {
    return reinterpret_cast<Int32>(shifted) - reinterpret_cast<Int32>(broadcast(kMagic));
  }
};

// 2^n for -126 <= n <= 127.
BATCHNORM_INLINE Vec<float> power_of_two(Int32 n) { return reinterpret_cast<Vec<float>>((n + 127) << 23); }

BATCHNORM_INLINE Vec<float> exp(Vec<float> x) {
  const auto e = Exponential::of(at_least(at_most(x, 89.0f), -104.0f));
  const Vec<float> p = fma(e.slope, e.r, broadcast(1.0f));
#if defined(__AVX512F__)
  return _mm512_scalef_ps(p, e.shifted - Exponential::kMagic);
#else
  const Int32 n = e.n(), half = n >> 1;  // in two steps, to cover the whole range
  return p * power_of_two(half) * power_of_two(n - half);
#endif
}

// e^x - 1 for x <= 0, as 2^n·(e^r - 1) + (2^n - 1), which does not cancel.
BATCHNORM_INLINE Vec<float> expm1_of_negative(Vec<float> x) {
  const auto e = Exponential::of(at_least(x, -87.0f));
  const Vec<float> power = power_of_two(e.n());
  return fma(power, e.slope * e.r, power - 1.0f);
}

// The standard normal distribution's cumulative probability and density.
template <class V>
struct NormalDistribution {
  V probability, density;
};

// The probability of a value beyond |t| is e^(-t²/2) times a polynomial in |t|, whose error weighted by e^(-t²/2) is
// minimax. Beyond 6 the probability is 0 to the precision of float32.
BATCHNORM_INLINE NormalDistribution<Vec<float>> normal_distribution(Vec<float> t) {
  const Vec<float> bell = exp(-0.5f * t * t), a = at_most(select(t < 0.0f, -t, t), 6.0f);
  const Vec<float> beyond =
      bell * polynomial(a, 5.85334448e-8f, -1.60366949e-6f, 1.98930957e-5f, -1.49791580e-4f, 7.79675611e-4f,
                        -3.05535295e-3f, 9.65980161e-3f, -2.60691755e-2f, 6.22623861e-2f, -1.32916898e-1f,
                        2.49991104e-1f, -3.98941785e-1f, 0.5f);
  return {select(t < 0.0f, beyond, 1.0f - beyond), 0.398942280f * bell};
}

[[maybe_unused]] static Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

[[maybe_unused]] static Vec<double> expm1_of_negative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::expm1(x[i]);
  return x;
}

[[maybe_unused]] static NormalDistribution<Vec<double>> normal_distribution(Vec<double> t) {
  NormalDistribution<Vec<double>> found;
  for (int i = 0; i < kLanes<double>; ++i) {
    found.probability[i] = 0.5 * ::erfc(t[i] * -0.70710678118654752440);
    found.density[i] = 0.39894228040143267794 * ::exp(-0.5 * t[i] * t[i]);
  }
  return found;
}

}  // namespace BATCHNORM_NAMESPACE
