// A portable SIMD type based on the vector extension of GCC and Clang, which the compiler maps to the instruction set
// that the file is compiled for. Intrinsics are used only where the extension has no equivalent: fused multiply-add,
// float16, and stores that bypass the cache.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// Everything compiled per instruction set has its own namespace and is `static` or a template. Otherwise, the linker
// could use the AVX-512 copy of an inline function for all instruction sets.
#define BATCHNORM_NAMESPACE batchnorm::BATCHNORM_CAPABILITY
#define BATCHNORM_INLINE static inline __attribute__((always_inline))

namespace BATCHNORM_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kBytes = 32;
#else
inline constexpr int kBytes = 16;
#endif

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// The arithmetic type for values of type T.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

template <class A, int bytes>
struct VectorOf {
  typedef A type __attribute__((vector_size(bytes)));
};
template <class A>
using Vec = typename VectorOf<A, kBytes>::type;
template <class A>
inline constexpr int kLanes = kBytes / static_cast<int>(sizeof(A));

using Int32 = Vec<int32_t>;
using UInt32 = Vec<uint32_t>;
using UInt16 = Vec<uint16_t>;
using UInt16Half = typename VectorOf<uint16_t, kBytes / 2>::type;

template <class A>
BATCHNORM_INLINE Vec<A> broadcast(A a) {
  return a - Vec<A>{};
}

BATCHNORM_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f32(c, a, b);
#else
  return a * b + c;
#endif
}

BATCHNORM_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_pd(a, b, c);
#elif defined(__aarch64__)
  return vfmaq_f64(c, a, b);
#else
  return a * b + c;
#endif
}

// Returns mask ? a : b, lane by lane, for the mask of a comparison.
template <class M, class V>
BATCHNORM_INLINE V select(M mask, V a, V b) {
  return mask ? a : b;
}

// Returns the smaller of v and `bound`; NaN stays NaN. g++ 12 does not find the instruction in a comparison.
BATCHNORM_INLINE Vec<float> at_most(Vec<float> v, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), v);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), v);
#elif defined(__x86_64__)
  return _mm_min_ps(broadcast(bound), v);
#elif defined(__aarch64__)
  return vminq_f32(broadcast(bound), v);
#else
  return select(v > bound, broadcast(bound), v);
#endif
}
BATCHNORM_INLINE Vec<double> at_most(Vec<double> v, double bound) { return select(v > bound, broadcast(bound), v); }

// Returns the larger of v and `bound`; NaN stays NaN.
template <class A, class V>
BATCHNORM_INLINE V at_least(V v, A bound) {
  return -at_most(-v, -bound);
}

}  // namespace BATCHNORM_NAMESPACE
