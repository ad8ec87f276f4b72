// exp, expm1 and erf for vectors, to about one unit in the last place of float32. float64 calls the C library for each
// lane.
#pragma once

#include <cmath>

#include "simd.h"

namespace BATCHNORM_NAMESPACE {

// As in Cephes: x = n·ln 2 + r, a polynomial in r, and 2^n in two steps to cover the whole range.
BATCHNORM_INLINE Vec<float> exp(Vec<float> x) {
  x = select(x > 89.0f, broadcast(89.0f), x);
  x = select(x < -104.0f, broadcast(-104.0f), x);
  const float magic = 12582912.0f;  // 1.5·2^23: adding it rounds to an integer
  Vec<float> n = (x * 1.44269504f + magic) - magic;
  Vec<float> r = fma(n, broadcast(-0.693359375f), x);
  r = fma(n, broadcast(2.12194440e-4f), r);
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = fma(p, r, broadcast(1.3981999507e-3f));
  p = fma(p, r, broadcast(8.3334519073e-3f));
  p = fma(p, r, broadcast(4.1665795894e-2f));
  p = fma(p, r, broadcast(1.6666665459e-1f));
  p = fma(p, r, broadcast(5.0000001201e-1f));
  p = fma(p, r * r, r + 1.0f);
  Int32 i = __builtin_convertvector(select(n == n, n, Vec<float>{}), Int32);
  Int32 half = i >> 1;
  Vec<float> first = reinterpret_cast<Vec<float>>((half + 127) << 23);
  Vec<float> second = reinterpret_cast<Vec<float>>((i - half + 127) << 23);
  return p * first * second;
}

// e^x - 1 for x <= 0; near zero, by a Taylor series, because the difference would lose digits.
BATCHNORM_INLINE Vec<float> expm1_of_negative(Vec<float> x) {
  Vec<float> p = broadcast(1.0f / 40320.0f);
  for (float coefficient : {1.0f / 5040.0f, 1.0f / 720.0f, 1.0f / 120.0f, 1.0f / 24.0f, 1.0f / 6.0f, 0.5f}) {
    p = fma(p, x, broadcast(coefficient));
  }
  return select(x < -0.5f, exp(x) - 1.0f, fma(p * x, x, x));
}

// Selects one of two polynomials by |a|, as N. Juffa's single-precision erf.
BATCHNORM_INLINE Vec<float> erf(Vec<float> a) {
  Vec<float> t = select(a < 0.0f, -a, a), s = a * a;
  Vec<float> far = fma(broadcast(-1.72853470e-5f), t, broadcast(3.83197126e-4f));
  Vec<float> u = fma(broadcast(-3.88396438e-3f), t, broadcast(2.42546219e-2f));
  far = fma(far, s, u);
  far = fma(far, t, broadcast(-1.06777877e-1f));
  far = fma(far, t, broadcast(-6.34846687e-1f));
  far = fma(far, t, broadcast(-1.28717512e-1f));
  far = fma(far, t, -t);
  far = select(t > 10.0f, broadcast(1.0f), 1.0f - exp(far));
  far = select(a < 0.0f, -far, far);
  Vec<float> near = broadcast(-5.96761703e-4f);
  near = fma(near, s, broadcast(4.99119423e-3f));
  near = fma(near, s, broadcast(-2.67681349e-2f));
  near = fma(near, s, broadcast(1.12819925e-1f));
  near = fma(near, s, broadcast(-3.76125336e-1f));
  near = fma(near, s, broadcast(1.28379166e-1f));
  near = fma(near, a, a);
  return select(t > 0.927734375f, far, near);
}

[[maybe_unused]] static Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::exp(x[i]);
  return x;
}

[[maybe_unused]] static Vec<double> expm1_of_negative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::expm1(x[i]);
  return x;
}

[[maybe_unused]] static Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = ::erf(x[i]);
  return x;
}

}  // namespace BATCHNORM_NAMESPACE
