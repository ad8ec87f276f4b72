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

// ---- float16 and bfloat16 --------------------------------------------------------------------------------------

// Convert 16 bits to 32 and back by intrinsics, because g++ 12 generates slow code for __builtin_convertvector here.
BATCHNORM_INLINE UInt32 to_32_bits(UInt16Half v) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(v)));
#elif defined(__AVX2__)
  return reinterpret_cast<UInt32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(v)));
#else
  return __builtin_convertvector(v, UInt32);
#endif
}

BATCHNORM_INLINE UInt16Half to_16_bits(UInt32 v) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt16Half>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v));
  return reinterpret_cast<UInt16Half>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  return __builtin_convertvector(v, UInt16Half);
#endif
}

BATCHNORM_INLINE Vec<float> widen(UInt16Half raw, bfloat16) {
  return reinterpret_cast<Vec<float>>(to_32_bits(raw) << 16);
}

// Rounds to nearest, ties to even; NaN stays NaN.
BATCHNORM_INLINE UInt16Half narrow(Vec<float> v, bfloat16) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // the instruction treats these as zero
  if (_mm512_fpclass_ps_mask(v, kSubnormal) == 0) return reinterpret_cast<UInt16Half>(_mm512_cvtneps_pbh(v));
#endif
  UInt32 bits = reinterpret_cast<UInt32>(v);
  UInt32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  UInt32 quiet = (bits >> 16) | 0x40;
  return to_16_bits(select(v == v, rounded, quiet));
}

#if !defined(__F16C__) && !defined(__aarch64__)
// Without conversion instructions: shift exponent and mantissa, and convert subnormals by a float subtraction.
BATCHNORM_INLINE Vec<float> widen(UInt16Half raw, float16) {
  UInt32 h = __builtin_convertvector(raw, UInt32);
  UInt32 sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
  UInt32 exponent = rest & 0x0f800000;
  UInt32 normal = rest + (112u << 23);
  UInt32 special = rest | 0x7f800000;
  Vec<float> tiny = reinterpret_cast<Vec<float>>(rest + (113u << 23)) - 6.103515625e-05f;
  UInt32 bits = select(exponent == 0x0f800000, special, normal);
  bits = select(exponent == 0, reinterpret_cast<UInt32>(tiny), bits);
  return reinterpret_cast<Vec<float>>(bits | sign);
}

BATCHNORM_INLINE UInt16Half narrow(Vec<float> v, float16) {
  UInt32 bits = reinterpret_cast<UInt32>(v);
  UInt32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  UInt32 normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5 leaves the rounded value in the lowest bits.
  UInt32 tiny = reinterpret_cast<UInt32>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
  UInt32 half = select(magnitude < 0x38800000, tiny, normal);
  half = select(magnitude >= 0x477ff000, UInt32{} + 0x7c00, half);
  half = select(magnitude > 0x7f800000, UInt32{} + 0x7e00, half);
  return __builtin_convertvector(half | sign, UInt16Half);
}
#else
BATCHNORM_INLINE Vec<float> widen(UInt16Half raw, float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(raw));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(raw));
#else
  return vcvt_f32_f16(reinterpret_cast<float16x4_t>(raw));
#endif
}

BATCHNORM_INLINE UInt16Half narrow(Vec<float> v, float16) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt16Half>(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__F16C__)
  return reinterpret_cast<UInt16Half>(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  return reinterpret_cast<UInt16Half>(vcvt_f16_f32(v));
#endif
}
#endif

// ---- memory ----------------------------------------------------------------------------------------------------

// Loads count <= kLanes values, and sets the other lanes to zero.
template <class T>
BATCHNORM_INLINE Vec<Arithmetic<T>> load(const T* p, int64_t count) {
  if constexpr (sizeof(T) >= 4) {
    Vec<T> v{};
    if (count == kLanes<T>) {
      std::memcpy(&v, p, sizeof v);
    } else {
      std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(T));
    }
    return v;
  } else {
    UInt16Half raw{};
    if (count == kLanes<float>) {
      std::memcpy(&raw, p, sizeof raw);
    } else {
      std::memcpy(&raw, p, static_cast<size_t>(count) * sizeof(T));
    }
    return widen(raw, T{});
  }
}

template <class T>
BATCHNORM_INLINE void store(T* p, Vec<Arithmetic<T>> v, int64_t count) {
  if constexpr (sizeof(T) >= 4) {
    std::memcpy(p, &v, count == kLanes<T> ? sizeof v : static_cast<size_t>(count) * sizeof(T));
  } else {
    UInt16Half raw = narrow(v, T{});
    std::memcpy(p, &raw, count == kLanes<float> ? sizeof raw : static_cast<size_t>(count) * sizeof(T));
  }
}

// Prefetches the cache line at p into the first-level or second-level cache. The address need not be valid.
template <int cache>
BATCHNORM_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, cache == 1 ? 3 : 2);
}

#if defined(__x86_64__)
// Stores a full vector to an aligned address, bypassing the caches.
template <class T>
BATCHNORM_INLINE void stream(T* p, Vec<Arithmetic<T>> v) {
  auto* words = reinterpret_cast<long long*>(p);
  if constexpr (sizeof(T) >= 4) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(words), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(words), reinterpret_cast<__m256i>(v));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(words), reinterpret_cast<__m128i>(v));
#endif
  } else {
    UInt16Half raw = narrow(v, T{});
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(words), reinterpret_cast<__m256i>(raw));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(words), reinterpret_cast<__m128i>(raw));
#else
    long long word;
    std::memcpy(&word, &raw, sizeof word);
    _mm_stream_si64(words, word);
#endif
  }
}
BATCHNORM_INLINE void stream_fence() { _mm_sfence(); }
inline constexpr bool kHasStream = true;
#else
template <class T>
BATCHNORM_INLINE void stream(T* p, Vec<Arithmetic<T>> v) {
  store(p, v, kLanes<Arithmetic<T>>);
}
BATCHNORM_INLINE void stream_fence() {}
inline constexpr bool kHasStream = false;
#endif

// ---- single values and sums ------------------------------------------------------------------------------------

template <class T>
BATCHNORM_INLINE Arithmetic<T> widen_one(const T* p) {
  return load(p, 1)[0];
}

// Rounds v to the precision of T.
template <class T>
BATCHNORM_INLINE double round_to(double v) {
  if constexpr (sizeof(T) == 8) {
    return v;
  } else if constexpr (sizeof(T) == 4) {
    return static_cast<double>(static_cast<float>(v));
  } else {
    return static_cast<double>(widen(narrow(broadcast(static_cast<float>(v)), T{}), T{})[0]);
  }
}

// Widens v to float64 and adds its two halves. Returns float64 unchanged.
BATCHNORM_INLINE Vec<double> wide_sum(Vec<double> v) { return v; }
BATCHNORM_INLINE Vec<double> wide_sum(Vec<float> v) {
  typename VectorOf<float, kBytes / 2>::type low, high;
  std::memcpy(&low, &v, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
  return __builtin_convertvector(low, Vec<double>) + __builtin_convertvector(high, Vec<double>);
}

BATCHNORM_INLINE double sum_lanes(Vec<double> v) {
  double sum = v[0];
  for (int i = 1; i < kLanes<double>; ++i) sum += v[i];
  return sum;
}

// sums[0 .. count) += v in float64.
BATCHNORM_INLINE void add_to(double* sums, Vec<float> v, int64_t count) {
  if (count == kLanes<float>) {
    typename VectorOf<float, kBytes / 2>::type half[2];
    std::memcpy(&half, &v, sizeof v);
    for (int i = 0; i < 2; ++i) {
      Vec<double> sum = load(sums + i * kLanes<double>, kLanes<double>);
      store(sums + i * kLanes<double>, sum + __builtin_convertvector(half[i], Vec<double>), kLanes<double>);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(v[i]);
  }
}
BATCHNORM_INLINE void add_to(double* sums, Vec<double> v, int64_t count) { store(sums, load(sums, count) + v, count); }

}  // namespace BATCHNORM_NAMESPACE
