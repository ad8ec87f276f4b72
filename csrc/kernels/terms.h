// The computations on one vector of values, written once for both memory layouts.
//
// A *term* computes (u, v) per value; the drivers sum Σ u and Σ u·v per channel. A *map* writes results per value. Both
// take coefficients per channel. These are broadcast if all lanes of a vector belong to one channel, and loaded if each
// lane is a channel of its own. All tensors of a call have the same layout, so one offset addresses all of them.
#pragma once

#include <type_traits>

#include "activations.h"
#include "simd.h"

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

template <class A>
struct OneChannel {
  int64_t at;
  BATCHNORM_INLINE Vec<A> get(const A* p, const OneChannel& c) { return broadcast(p[c.at]); }
};

// The lanes in `next` belong to channel at + 1, the others to channel `at`.
template <class A>
struct TwoChannels {
  int64_t at;
  decltype(Vec<A>{} < Vec<A>{}) next;
  BATCHNORM_INLINE Vec<A> get(const A* p, const TwoChannels& c) {
    return select(c.next, broadcast(p[c.at + 1]), broadcast(p[c.at]));
  }
};

// Lanes without a bit belong to channel `at`, those in `next` to channel at + 1, and those in `after`, which `next`
// contains, to the channel after it. `last` is the last channel that exists.
template <class A>
struct ThreeChannels {
  int64_t at, last;
  decltype(Vec<A>{} < Vec<A>{}) next, after;
  BATCHNORM_INLINE Vec<A> get(const A* p, const ThreeChannels& c) {
    const A third = p[c.at + 2 < c.last ? c.at + 2 : c.last];
    return select(c.after, broadcast(third), select(c.next, broadcast(p[c.at + 1]), broadcast(p[c.at])));
  }
};

template <class A>
struct ManyChannels {
  int64_t at, count;
  BATCHNORM_INLINE Vec<A> get(const A* p, const ManyChannels& c) { return load(p + c.at, c.count); }
};

// Σ w·(x - pivot) and Σ w·(x - pivot)². A value with weight 0 may be NaN.
template <class T, bool weighted>
struct MomentTerm {
  using Type = T;
  using A = Arithmetic<T>;
  static constexpr int kInputs = 1;
  const T* x;
  Coefficients<A> coefficients;
  const A* weights;

  struct Loaded {
    Vec<A> pivot;
  };
  template <class Channels>
  __attribute__((always_inline)) Loaded at(const Channels& c) const {
    return {Channels::get(coefficients.mean, c)};
  }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(x + offset);
  }
  __attribute__((always_inline)) void pair(const Loaded& c, int64_t offset, int64_t count, Vec<A> w, Vec<A>& u,
                                           Vec<A>& v) const {
    v = load(x + offset, count) - c.pivot;
    if constexpr (weighted) {
      v = select(w != A(0), v, Vec<A>{});
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

// Stores `count` values. If `streamed`, stores a full aligned vector that bypasses the caches.
template <class T>
BATCHNORM_INLINE void put(T* p, Vec<Arithmetic<T>> v, int64_t count, bool streamed) {
  if (streamed) {
    stream(p, v);
  } else {
    store(p, v, count);
  }
}

// The coefficients of z, as vectors.
template <class A>
struct ScaleAndShift {
  Vec<A> mean, scale, shift;
  template <class Channels>
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

  using Loaded = ScaleAndShift<A>;
  template <class Channels>
  __attribute__((always_inline)) Loaded at(const Channels& c) const {
    return Loaded::of(coefficients, c);
  }
  T* first_output() const { return y; }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(x + offset);
    if (residual) prefetch<cache>(residual + offset);
  }
  __attribute__((always_inline)) void apply(const Loaded& c, int64_t offset, int64_t count, Vec<A>,
                                            bool streamed) const {
    Vec<A> z = preactivation(load(x + offset, count) - c.mean, c.scale, c.shift);
    if (residual) z = z + load(residual + offset, count);
    put(y + offset, F::forward(z, parameter), count, streamed);
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

  using Loaded = ScaleAndShift<A>;
  template <class Channels>
  __attribute__((always_inline)) Loaded at(const Channels& c) const {
    return Loaded::of(coefficients, c);
  }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    prefetch<cache>(dy + offset);
    prefetch<cache>(x + offset);
    if (residual) prefetch<cache>(residual + offset);
    if (y) prefetch<cache>(y + offset);
  }
  __attribute__((always_inline)) void pair(const Loaded& c, int64_t offset, int64_t count, Vec<A>, Vec<A>& dz,
                                           Vec<A>& deviation) const {
    deviation = load(x + offset, count) - c.mean;
    dz = load(dy + offset, count);
    if constexpr (!std::is_same_v<F, None>) {
      Vec<A> t;
      if (y) {
        t = load(y + offset, count);
      } else {
        t = preactivation(deviation, c.scale, c.shift);
        if (residual) t = t + load(residual + offset, count);
      }
      dz = F::backward(dz, t, parameter);
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

  struct Loaded {
    typename BackwardTerm<T, F>::Loaded term;
    Vec<A> scale, slope, constant;
  };
  template <class Channels>
  __attribute__((always_inline)) Loaded at(const Channels& c) const {
    return {term.at(c), Channels::get(coefficients.scale, c), Channels::get(coefficients.slope, c),
            Channels::get(coefficients.constant, c)};
  }
  T* first_output() const { return dx; }
  template <int cache>
  __attribute__((always_inline)) void fetch(int64_t offset) const {
    term.template fetch<cache>(offset);
  }
  __attribute__((always_inline)) void apply(const Loaded& c, int64_t offset, int64_t count, Vec<A> w,
                                            bool streamed) const {
    Vec<A> upstream, deviation;
    term.pair(c.term, offset, count, w, upstream, deviation);
    Vec<A> result;
    if (through_statistics) {
      Vec<A> share = fma(deviation, c.slope, c.constant);
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
