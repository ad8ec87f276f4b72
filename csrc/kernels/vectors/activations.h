// Activations y = f(z, parameter) and dz = dy·f'(t, parameter). t is z, or y if y determines the derivative.
// At kinks and for NaN, the results equal torch's.
#pragma once

#include "elementary.h"
#include "kernels/kernels.h"

namespace BATCHNORM_NAMESPACE {

struct None {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return z;
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V, A) {
    return dy;
  }
};

struct Relu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return select(z <= A(0), V{}, z);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    return select(t <= A(0), V{}, dy);
  }
};

struct Relu6 {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return select(z <= A(0), V{}, select(z >= A(6), broadcast(A(6)), z));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    return select(t <= A(0), V{}, select(t >= A(6), V{}, dy));
  }
};

struct LeakyRelu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A slope) {
    return select(z > A(0), z, z * slope);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A slope) {
    return select(t > A(0), dy, dy * slope);
  }
};

struct Silu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return z / (A(1) + exp(-z));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    V sigmoid = A(1) / (A(1) + exp(-t));
    return dy * sigmoid * fma(t, A(1) - sigmoid, broadcast(A(1)));
  }
};

struct Gelu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return z * normal_distribution(z).probability;
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    const auto normal = normal_distribution(t);
    return dy * fma(t, normal.density, normal.probability);
  }
};

struct Hardsigmoid {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return at_least(at_most(z + A(3), A(6)), A(0)) * A(1.0 / 6);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    return select((t > A(-3)) & (t < A(3)), dy * A(1.0 / 6), V{});
  }
};

struct Hardswish {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A a) {
    return z * Hardsigmoid::forward(z, a);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    V inner = dy * fma(t, broadcast(A(1.0 / 3)), broadcast(A(0.5)));
    return select(t <= A(-3), V{}, select(t >= A(3), dy, inner));
  }
};

// z·tanh(log(1 + e^z)) = z·w/(w + 2) with w = e^z·(e^z + 2). For z >= 20, the factor of z is 1 in every dtype.
struct Mish {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V e = exp(at_most(z, A(20))), w = e * (e + A(2));
    return z * (w / (w + A(2)));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    t = at_most(t, A(20));
    V e = exp(t), w = e * (e + A(2)), share = A(1) / (w + A(2));
    return dy * (share * fma(t, A(4) * share * (e * (e + A(1))), w));
  }
};

// With u = e^(-2|z|) - 1, -tanh |z| is u/(u + 2).
struct Tanh {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V u = expm1_of_negative(select(z < A(0), z, -z) * A(2)), negative = u / (u + A(2));
    return select(z < A(0), negative, A(0) - negative);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A a) {
    V y = forward(t, a);
    return dy * (A(1) - y * y);
  }
};

struct Sigmoid {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return A(1) / (A(1) + exp(-z));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A a) {
    V y = forward(t, a);
    return dy * (y * (A(1) - y));
  }
};

struct Elu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A alpha) {
    return select(z > A(0), z, alpha * expm1_of_negative(at_most(z, A(0))));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A alpha) {
    return select(t <= A(0), dy * (alpha * exp(t)), dy);
  }
};

// Calls body with the activation's type.
template <class Body>
BATCHNORM_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
#define BATCHNORM_CASE(name, type) \
  case Activation::name:           \
    return body(type{});
    BATCHNORM_ACTIVATIONS(BATCHNORM_CASE)
#undef BATCHNORM_CASE
  }
}

}  // namespace BATCHNORM_NAMESPACE
