// The computations on one vector of values, written once for both memory layouts.
//
// A *term* computes (u, v) per value; the drivers sum Σ u and Σ u·v per channel. A *map* writes results per value. Both
// take coefficients per channel. These are broadcast if all lanes of a vector belong to one channel, and loaded if each
// lane is a channel of its own. All tensors of a call have the same layout, so one offset addresses all of them.
#pragma once

#include <type_traits>

#include "kernels/vectors/activations.h"
#include "kernels/vectors/packets.h"

namespace BATCHNORM_NAMESPACE {

// Arrays [C] or [rows, C]. The term or map determines which of them are set.
template <class A>
struct Coefficients {
  const A* mean = nullptr;   // the high part; for moments, the pivot
  const A* scale = nullptr;  // γ·invstd
  const A* shift = nullptr;  // β - mean_low·scale
  const A* slope = nullptr;  // dx -= constant + (x - mean)·slope
  const A* constant = nullptr;
};

// The coefficients of the values of a vector or packet V. All have one channel.
template <class V>
struct OneChannel {
  int64_t at;
  template <class A>
  BATCHNORM_INLINE V get(const A* p, const OneChannel& c) {
    return broadcast_to<V>(p[c.at]);
  }
};

// The lanes in `next` belong to the second channel, the others to the first.
template <class V>
struct TwoChannels {
  int64_t first, second;
  decltype(lanes_between<V>(0, 0)) next;
  template <class A>
  BATCHNORM_INLINE V get(const A* p, const TwoChannels& c) {
    return select(c.next, broadcast_to<V>(p[c.second]), broadcast_to<V>(p[c.first]));
  }
};

// Lanes without a bit belong to channel `at`, those in `next` to channel at + 1, and those in `after`, which `next`
// contains, to the channel after it. `last` is the last channel that exists.
template <class V>
struct ThreeChannels {
  int64_t at, last;
  decltype(lanes_between<V>(0, 0)) next, after;
  template <class A>
  BATCHNORM_INLINE V get(const A* p, const ThreeChannels& c) {
    const V third = broadcast_to<V>(p[c.at + 2 < c.last ? c.at + 2 : c.last]);
    return select(c.after, third, select(c.next, broadcast_to<V>(p[c.at + 1]), broadcast_to<V>(p[c.at])));
  }
};

template <class V>
struct ManyChannels {
  int64_t at, count;
  template <class A>
  BATCHNORM_INLINE V get(const A* p, const ManyChannels& c) {
    return load_as<V>(p + c.at, c.count);
  }
};

// Σ w·(x - pivot) and Σ w·(x - pivot)². If `clears`, a value with weight 0 may be NaN.
template <class T, bool weighted>
struct MomentTerm {
  using Type = T;
  using A = Arithmetic<T>;
  static constexpr int kInputs = 1;
  const T* x;
  Coefficients<A> coefficients;
  const A* weights;
  bool clears = false;

  template <class V>
  struct Loaded {
    V pivot;
  };
  template <template <class> class Channels, class V>
  __attribute__((always_inline)) Loaded<V> at(const Channels<V>& c) const {
    return {Channels<V>::get(coefficients.mean, c)};
  }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(x + offset);
  }
  template <class V>
  __attribute__((always_inline)) void pair(const Loaded<V>& c, int64_t offset, int64_t count, V w, V& u, V& v) const {
    v = load_as<V>(x + offset, count) - c.pivot;
    if constexpr (weighted) {
      auto counted = [](auto weight, auto value) __attribute__((always_inline)) {
        return select(weight != A(0), value, decltype(value){});
      };
      if (clears) v = each(counted, w, v);
      u = w * v;
    } else {
      u = v;
    }
  }
};

// Computes z, the argument of the activation. Forward and backward both call this, so their masks agree exactly.
template <class V>
BATCHNORM_INLINE V preactivation(V deviation, V scale, V shift) {
  return fma(deviation, scale, shift);
}

// Stores `count` values. If `streamed`, stores a full aligned vector or packet that bypasses the caches.
template <class T, class V>
BATCHNORM_INLINE void put(T* p, V v, int64_t count, bool streamed) {
  if (streamed) {
    stream(p, v);
  } else {
    store(p, v, count);
  }
}

// The coefficients of z.
template <class V>
struct ScaleAndShift {
  V mean, scale, shift;
  template <class A, class Channels>
  BATCHNORM_INLINE ScaleAndShift of(const Coefficients<A>& coefficients, const Channels& c) {
    return {Channels::get(coefficients.mean, c), Channels::get(coefficients.scale, c),
            Channels::get(coefficients.shift, c)};
  }
};

template <class T, class F>
struct NormalizeMap {
  using Type = T;
  using A = Arithmetic<T>;
  const T* x;
  const T* residual;
  T* y;
  Coefficients<A> coefficients;
  A parameter;
  static constexpr const A* weights = nullptr;

  template <class V>
  using Loaded = ScaleAndShift<V>;
  template <template <class> class Channels, class V>
  __attribute__((always_inline)) Loaded<V> at(const Channels<V>& c) const {
    return Loaded<V>::of(coefficients, c);
  }
  T* first_output() const { return y; }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(x + offset);
    if (residual) prefetch<cache>(residual + offset);
  }
  template <class V>
  __attribute__((always_inline)) void apply(const Loaded<V>& c, int64_t offset, int64_t count, V, bool streamed) const {
    V z = preactivation(load_as<V>(x + offset, count) - c.mean, c.scale, c.shift);
    if (residual) z = z + load_as<V>(residual + offset, count);
    auto forward = [&](auto part) __attribute__((always_inline)) { return F::forward(part, parameter); };
    put(y + offset, each(forward, z), count, streamed);
  }
};

// u = dz = dy·f'(z) and v = x - mean, for Σ dz and Σ dz·(x - mean).
template <class T, class F>
struct BackwardTerm {
  using Type = T;
  using A = Arithmetic<T>;
  static constexpr int kInputs = 2;  // dy and x; few calls have a third
  const T* dy;
  const T* x;
  const T* residual;
  const T* y;
  Coefficients<A> coefficients;
  A parameter;
  static constexpr const A* weights = nullptr;

  template <class V>
  using Loaded = ScaleAndShift<V>;
  template <template <class> class Channels, class V>
  __attribute__((always_inline)) Loaded<V> at(const Channels<V>& c) const {
    return Loaded<V>::of(coefficients, c);
  }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(dy + offset);
    prefetch<cache>(x + offset);
    if (residual) prefetch<cache>(residual + offset);
    if (y) prefetch<cache>(y + offset);
  }
  template <class V>
  __attribute__((always_inline)) void pair(const Loaded<V>& c, int64_t offset, int64_t count, V, V& dz,
                                           V& deviation) const {
    deviation = load_as<V>(x + offset, count) - c.mean;
    dz = load_as<V>(dy + offset, count);
    if constexpr (!std::is_same_v<F, None>) {
      V t;
      if (y) {
        t = load_as<V>(y + offset, count);
      } else {
        t = preactivation(deviation, c.scale, c.shift);
        if (residual) t = t + load_as<V>(residual + offset, count);
      }
      auto backward = [&](auto dy_part, auto t_part) __attribute__((always_inline)) {
        return F::backward(dy_part, t_part, parameter);
      };
      dz = each(backward, dz, t);
    }
  }
};

// dx = γ·invstd·dz - w·(constant + (x - mean)·slope), and dz itself.
template <class T, class F>
struct ApplyMap {
  using Type = T;
  using A = Arithmetic<T>;
  BackwardTerm<T, F> term;
  T* dx;
  T* dz;
  bool through_statistics;
  const A* weights;
  Coefficients<A> coefficients;

  template <class V>
  struct Loaded {
    ScaleAndShift<V> term;
    V scale, slope, constant;
  };
  template <template <class> class Channels, class V>
  __attribute__((always_inline)) Loaded<V> at(const Channels<V>& c) const {
    using C = Channels<V>;
    return {term.at(c), C::get(coefficients.scale, c), C::get(coefficients.slope, c), C::get(coefficients.constant, c)};
  }
  T* first_output() const { return dx; }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    term.template fetch<cache>(offset);
  }
  template <class V>
  __attribute__((always_inline)) void apply(const Loaded<V>& c, int64_t offset, int64_t count, V w,
                                            bool streamed) const {
    V upstream, deviation;
    term.pair(c.term, offset, count, w, upstream, deviation);
    V result;
    if (through_statistics) {
      V share = fma(deviation, c.slope, c.constant);
      if (weights) share = share * w;
      result = fma(upstream, c.scale, -share);
    } else {
      result = upstream * c.scale;
    }
    put(dx + offset, result, count, streamed);
    if (dz) put(dz + offset, upstream, count, streamed);
  }
};

}  // namespace BATCHNORM_NAMESPACE
