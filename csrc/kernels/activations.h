// Activations y = f(z) and dz = dy·f'(t), with t = z, or y where y tells the derivative as well.
// At kinks and for NaN each does what torch does.
#pragma once

#include "elementary.h"
#include "kernels.h"

namespace BATCHNORM_NAMESPACE {

struct None {
  static constexpr bool kIdentity = true;
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
  static constexpr bool kIdentity = false;
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
  static constexpr bool kIdentity = false;
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
  static constexpr bool kIdentity = false;
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
  static constexpr bool kIdentity = false;
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
  static constexpr bool kIdentity = false;
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
  static constexpr bool kIdentity = false;
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

// Calls body with the activation's type.
template <class Body>
BATCHNORM_INLINE void with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::none:
      return body(None{});
    case Activation::relu:
      return body(Relu{});
    case Activation::relu6:
      return body(Relu6{});
    case Activation::leaky_relu:
      return body(LeakyRelu{});
    case Activation::silu:
      return body(Silu{});
    case Activation::gelu:
      return body(Gelu{});
    case Activation::hardswish:
      return body(Hardswish{});
  }
}

}  // namespace BATCHNORM_NAMESPACE
