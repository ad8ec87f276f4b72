// Activations y = f(z, parameter) and dz = dy·f'(t, parameter). t is z, or y if y determines the derivative.
// At kinks and for NaN, the results equal torch's.
#pragma once

#include "elementary.h"
#include "kernels.h"

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
    return dy * sigmoid * (A(1) + t * (A(1) - sigmoid));
  }
};

struct Gelu {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    return z * A(0.5) * (A(1) + erf(z * A(0.70710678118654752440)));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    V cdf = A(0.5) * (A(1) + erf(t * A(0.70710678118654752440)));
    V density = A(0.39894228040143267794) * exp(A(-0.5) * t * t);
    return dy * (cdf + t * density);
  }
};

struct Hardswish {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V gate = z + A(3);
    gate = select(gate < A(0), V{}, select(gate > A(6), broadcast(A(6)), gate));
    return z * gate / A(6);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    V inner = dy * (t / A(3) + A(0.5));
    return select(t <= A(-3), V{}, select(t >= A(3), dy, inner));
  }
};

// z·tanh(log(1 + e^z)) = z·w/(w + 2) with w = e^z·(e^z + 2). For z >= 20, the factor of z is 1 in every dtype.
struct Mish {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V e = exp(select(z > A(20), broadcast(A(20)), z)), w = e * (e + A(2));
    return z * (w / (w + A(2)));
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    t = select(t > A(20), broadcast(A(20)), t);
    V e = exp(t), w = e * (e + A(2)), n = w + A(2);
    return dy * (w / n + t * (e / (e + A(1))) * (A(4) * (w + A(1)) / (n * n)));
  }
};

struct Hardsigmoid {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V gate = z + A(3);
    return select(gate < A(0), V{}, select(gate > A(6), broadcast(A(6)), gate)) / A(6);
  }
  template <class V, class A>
  BATCHNORM_INLINE V backward(V dy, V t, A) {
    return select((t > A(-3)) & (t < A(3)), dy / A(6), V{});
  }
};

// With u = e^(-2|z|) - 1, tanh |z| is -u/(u + 2).
struct Tanh {
  template <class V, class A>
  BATCHNORM_INLINE V forward(V z, A) {
    V u = expm1_of_negative(select(z < A(0), z, -z) * A(2)), magnitude = -u / (u + A(2));
    return select(z < A(0), -magnitude, magnitude);
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
    return select(z > A(0), z, alpha * expm1_of_negative(select(z > A(0), V{}, z)));
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
