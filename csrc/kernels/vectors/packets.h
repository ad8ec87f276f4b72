// Loads and stores of the dtypes. A *packet* is what a register of a dtype holds: a vector of the arithmetic type, or two
// vectors for float16 and bfloat16.
#pragma once

#include <type_traits>

#include "simd.h"

namespace BATCHNORM_NAMESPACE {

// ---- packets ---------------------------------------------------------------------------------------------------

// Two vectors, in the order of memory.
template <class V>
struct Pair {
  V low, high;
};

// The values of one register in memory, in the arithmetic type: a vector, or two for a half type.
template <class T>
struct PacketOf {
  using type = Vec<T>;
};
template <>
struct PacketOf<bfloat16> {
  using type = Pair<Vec<float>>;
};
template <>
struct PacketOf<float16> {
  using type = Pair<Vec<float>>;
};
template <class T>
using Packet = typename PacketOf<T>::type;
template <class T>
inline constexpr int kPacket = kBytes / static_cast<int>(sizeof(T));

// Calls f with each vector of the packets.
template <class F, class... V>
BATCHNORM_INLINE auto each(const F& f, const V&... v) {
  return f(v...);
}
template <class F, class... V>
BATCHNORM_INLINE auto each(const F& f, const Pair<V>&... v) {
  return Pair<decltype(f(v.low...))>{f(v.low...), f(v.high...)};
}

template <class V>
BATCHNORM_INLINE Pair<V> operator+(Pair<V> a, Pair<V> b) {
  return {a.low + b.low, a.high + b.high};
}
template <class V>
BATCHNORM_INLINE Pair<V> operator-(Pair<V> a, Pair<V> b) {
  return {a.low - b.low, a.high - b.high};
}
template <class V>
BATCHNORM_INLINE Pair<V> operator-(Pair<V> a) {
  return {-a.low, -a.high};
}
template <class V>
BATCHNORM_INLINE Pair<V> operator*(Pair<V> a, Pair<V> b) {
  return {a.low * b.low, a.high * b.high};
}
template <class V>
BATCHNORM_INLINE Pair<V> fma(Pair<V> a, Pair<V> b, Pair<V> c) {
  return {fma(a.low, b.low, c.low), fma(a.high, b.high, c.high)};
}
template <class M, class V>
BATCHNORM_INLINE Pair<V> select(Pair<M> mask, Pair<V> a, Pair<V> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

// The number of values of a vector or packet.
template <class V>
inline constexpr int64_t kValuesIn = sizeof(V) / sizeof(V{}[0]);
template <class V>
inline constexpr int64_t kValuesIn<Pair<V>> = 2 * kValuesIn<V>;

// A vector or packet, all of whose values are a.
template <class V, class A>
BATCHNORM_INLINE V broadcast_to(A a) {
  if constexpr (std::is_same_v<V, Vec<A>>) {
    return broadcast(a);
  } else {
    return {broadcast(a), broadcast(a)};
  }
}

// Returns a mask of the values [from, to) of a vector or packet.
template <class V>
BATCHNORM_INLINE auto lanes_between(int64_t from, int64_t to) {
  if constexpr (std::is_same_v<V, Pair<Vec<float>>>) {
    constexpr int64_t W = kLanes<float>;
    using Mask = decltype(lanes_between<Vec<float>>(from, to));
    return Pair<Mask>{lanes_between<Vec<float>>(from, to), lanes_between<Vec<float>>(from - W, to - W)};
  } else {
    using Index = std::conditional_t<std::is_same_v<V, Vec<double>>, int64_t, int32_t>;
    Vec<Index> lane;
    for (int i = 0; i < kLanes<Index>; ++i) lane[i] = i;
    return (lane >= static_cast<Index>(from)) & (lane < static_cast<Index>(to));
  }
}

// ---- float16 and bfloat16 --------------------------------------------------------------------------------------

#if defined(__AVX512F__)
// The positions of the words 0, 2, .. (first = 0) or 1, 3, .. (first = 1) of two registers.
BATCHNORM_INLINE __m512i every_second_word(int first) {
  UInt16 at;
  for (int i = 0; i < kPacket<uint16_t>; ++i) at[i] = static_cast<uint16_t>(2 * i + first);
  return reinterpret_cast<__m512i>(at);
}
// The positions of the words from `first`, each twice.
BATCHNORM_INLINE __m512i words_twice(int first) {
  UInt16 at;
  for (int i = 0; i < kPacket<uint16_t>; ++i) at[i] = static_cast<uint16_t>(first + i / 2);
  return reinterpret_cast<__m512i>(at);
}
#endif

// Widens 16 bits to 32: to the high bits if `high`, else to the low bits. The others are zero.
template <bool high>
BATCHNORM_INLINE Pair<UInt32> to_32_bits(UInt16 v) {
#if defined(__AVX512F__)
  constexpr __mmask32 kWords = high ? 0xaaaaaaaa : 0x55555555;
  const auto raw = reinterpret_cast<__m512i>(v);
  return {reinterpret_cast<UInt32>(_mm512_maskz_permutexvar_epi16(kWords, words_twice(0), raw)),
          reinterpret_cast<UInt32>(_mm512_maskz_permutexvar_epi16(kWords, words_twice(16), raw))};
#elif defined(__AVX2__)
  const auto raw = reinterpret_cast<__m256i>(v);
  const auto low = reinterpret_cast<UInt32>(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(raw)));
  const auto upper = reinterpret_cast<UInt32>(_mm256_cvtepu16_epi32(_mm256_extracti128_si256(raw, 1)));
  return {high ? low << 16 : low, high ? upper << 16 : upper};
#elif defined(__x86_64__)
  const auto raw = reinterpret_cast<__m128i>(v), zero = _mm_setzero_si128();
  const auto a = high ? zero : raw, b = high ? raw : zero;
  return {reinterpret_cast<UInt32>(_mm_unpacklo_epi16(a, b)), reinterpret_cast<UInt32>(_mm_unpackhi_epi16(a, b))};
#elif defined(__aarch64__)
  const UInt16 a = high ? UInt16{} : v, b = high ? v : UInt16{};
  return {reinterpret_cast<UInt32>(vzip1q_u16(a, b)), reinterpret_cast<UInt32>(vzip2q_u16(a, b))};
#else
  Pair<UInt32> wide;
  for (int i = 0; i < kLanes<float>; ++i) wide.low[i] = v[i], wide.high[i] = v[kLanes<float> + i];
  return high ? Pair<UInt32>{wide.low << 16, wide.high << 16} : wide;
#endif
}

// Returns the high bits of each value if `high`. Otherwise, returns the low bits; the high bits must be zero.
template <bool high>
BATCHNORM_INLINE UInt16 to_16_bits(Pair<UInt32> v) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt16>(_mm512_permutex2var_epi16(reinterpret_cast<__m512i>(v.low), every_second_word(high),
                                                            reinterpret_cast<__m512i>(v.high)));
#elif defined(__AVX2__)
  if (high) v = {v.low >> 16, v.high >> 16};
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(v.low), reinterpret_cast<__m256i>(v.high));
  return reinterpret_cast<UInt16>(_mm256_permute4x64_epi64(packed, 0xd8));
#elif defined(__x86_64__)
  if (!high) v = {v.low << 16, v.high << 16};  // the only packing instruction takes signed values
  return reinterpret_cast<UInt16>(_mm_packs_epi32(_mm_srai_epi32(reinterpret_cast<__m128i>(v.low), 16),
                                                  _mm_srai_epi32(reinterpret_cast<__m128i>(v.high), 16)));
#elif defined(__aarch64__)
  const auto a = reinterpret_cast<UInt16>(v.low), b = reinterpret_cast<UInt16>(v.high);
  return high ? vuzp2q_u16(a, b) : vuzp1q_u16(a, b);
#else
  UInt16 r;
  for (int i = 0; i < kLanes<float>; ++i) {
    r[i] = static_cast<uint16_t>(high ? v.low[i] >> 16 : v.low[i]);
    r[kLanes<float> + i] = static_cast<uint16_t>(high ? v.high[i] >> 16 : v.high[i]);
  }
  return r;
#endif
}

BATCHNORM_INLINE Pair<Vec<float>> widen(UInt16 raw, bfloat16) {
  const Pair<UInt32> bits = to_32_bits<true>(raw);
  return {reinterpret_cast<Vec<float>>(bits.low), reinterpret_cast<Vec<float>>(bits.high)};
}

// Rounds to nearest, ties to even; NaN stays NaN.
BATCHNORM_INLINE UInt16 narrow(Pair<Vec<float>> v, bfloat16) {
#if defined(__AVX512BF16__)
  constexpr int kSubnormal = 0x20;  // the instruction treats these as zero
  if ((_mm512_fpclass_ps_mask(v.low, kSubnormal) | _mm512_fpclass_ps_mask(v.high, kSubnormal)) == 0) {
    return reinterpret_cast<UInt16>(_mm512_cvtne2ps_pbh(v.high, v.low));
  }
#endif
  auto rounded = [](Vec<float> half) __attribute__((always_inline)) {
    const UInt32 bits = reinterpret_cast<UInt32>(half);
    return select(half == half, bits + 0x7fff + ((bits >> 16) & 1), bits | 0x400000);
  };
  return to_16_bits<true>(each(rounded, v));
}

#if defined(__F16C__)
#if defined(__AVX512F__)
BATCHNORM_INLINE Pair<Vec<float>> widen(UInt16 raw, float16) {
  const auto words = reinterpret_cast<__m512i>(raw);
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(words)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(words, 1))};
}

BATCHNORM_INLINE UInt16 narrow(Pair<Vec<float>> v, float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m512i low = _mm512_castsi256_si512(_mm512_cvtps_ph(v.low, kNearest));
  return reinterpret_cast<UInt16>(_mm512_inserti64x4(low, _mm512_cvtps_ph(v.high, kNearest), 1));
}
#else
BATCHNORM_INLINE Pair<Vec<float>> widen(UInt16 raw, float16) {
  const auto words = reinterpret_cast<__m256i>(raw);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(words)), _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1))};
}

BATCHNORM_INLINE UInt16 narrow(Pair<Vec<float>> v, float16) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256i low = _mm256_castsi128_si256(_mm256_cvtps_ph(v.low, kNearest));
  return reinterpret_cast<UInt16>(_mm256_inserti128_si256(low, _mm256_cvtps_ph(v.high, kNearest), 1));
}
#endif
#elif defined(__aarch64__)
BATCHNORM_INLINE Pair<Vec<float>> widen(UInt16 raw, float16) {
  const auto halves = reinterpret_cast<float16x8_t>(raw);
  return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
}

BATCHNORM_INLINE UInt16 narrow(Pair<Vec<float>> v, float16) {
  return reinterpret_cast<UInt16>(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high));
}
#else
// Without conversion instructions: shift exponent and mantissa, and convert subnormals by a float subtraction.
BATCHNORM_INLINE Pair<Vec<float>> widen(UInt16 raw, float16) {
  auto widened = [](UInt32 h) __attribute__((always_inline)) {
    UInt32 sign = (h & 0x8000) << 16, rest = (h & 0x7fff) << 13;
    UInt32 exponent = rest & 0x0f800000;
    UInt32 normal = rest + (112u << 23);
    UInt32 special = rest | 0x7f800000;
    Vec<float> tiny = reinterpret_cast<Vec<float>>(rest + (113u << 23)) - 6.103515625e-05f;
    UInt32 bits = select(exponent == 0x0f800000, special, normal);
    bits = select(exponent == 0, reinterpret_cast<UInt32>(tiny), bits);
    return reinterpret_cast<Vec<float>>(bits | sign);
  };
  return each(widened, to_32_bits<false>(raw));
}

BATCHNORM_INLINE UInt16 narrow(Pair<Vec<float>> v, float16) {
  auto narrowed = [](Vec<float> value) __attribute__((always_inline)) {
    UInt32 bits = reinterpret_cast<UInt32>(value);
    UInt32 sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    UInt32 normal = (magnitude + 0xc8000fff + ((magnitude >> 13) & 1)) >> 13;
    // Below 2^-14: adding 0.5 leaves the rounded value in the lowest bits.
    UInt32 tiny = reinterpret_cast<UInt32>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3f000000;
    UInt32 half = select(magnitude < 0x38800000, tiny, normal);
    half = select(magnitude >= 0x477ff000, UInt32{} + 0x7c00, half);
    half = select(magnitude > 0x7f800000, UInt32{} + 0x7e00, half);
    return half | sign;
  };
  return to_16_bits<false>(each(narrowed, v));
}
#endif

// ---- memory ----------------------------------------------------------------------------------------------------

// A register that starts with `half`. The compiler would do this through memory.
BATCHNORM_INLINE UInt16 in_register(UInt16Half half) {
#if defined(__AVX512F__)
  return reinterpret_cast<UInt16>(_mm512_castsi256_si512(reinterpret_cast<__m256i>(half)));
#elif defined(__AVX2__)
  return reinterpret_cast<UInt16>(_mm256_castsi128_si256(reinterpret_cast<__m128i>(half)));
#elif defined(__x86_64__)
  return reinterpret_cast<UInt16>(_mm_cvtsi64_si128(reinterpret_cast<long long>(half)));
#else
  UInt16 whole{};
  std::memcpy(&whole, &half, sizeof half);
  return whole;
#endif
}

// Loads count values as a vector or packet, and sets the others to zero.
template <class V, class T>
BATCHNORM_INLINE V load_as(const T* p, int64_t count) {
  constexpr bool narrow = sizeof(T) < 4, pair = std::is_same_v<V, Pair<Vec<float>>>;
  if constexpr (pair && !narrow) {
    constexpr int64_t W = kLanes<float>;
    return {load_as<Vec<float>>(p, count < W ? count : W), load_as<Vec<float>>(p + W, count < W ? 0 : count - W)};
  } else {
    std::conditional_t<!narrow, V, std::conditional_t<pair, UInt16, UInt16Half>> raw{};
    std::memcpy(&raw, p, count == kValuesIn<V> ? sizeof raw : static_cast<size_t>(count) * sizeof(T));
    if constexpr (!narrow) {
      return raw;
    } else if constexpr (pair) {
      return widen(raw, T{});
    } else {
      return widen(in_register(raw), T{}).low;
    }
  }
}
template <class T>
BATCHNORM_INLINE Packet<T> load(const T* p, int64_t count) {
  return load_as<Packet<T>>(p, count);
}

// The values as they are in memory. Those of one vector of a half type are the first half.
template <class T, class V>
BATCHNORM_INLINE auto narrow_to(V v) {
  if constexpr (sizeof(T) >= 4) {
    return v;
  } else if constexpr (std::is_same_v<V, Packet<T>>) {
    return narrow(v, T{});
  } else {
    return narrow(Packet<T>{v, v}, T{});
  }
}

template <class T, class V>
BATCHNORM_INLINE void store(T* p, V v, int64_t count) {
  const auto raw = narrow_to<T>(v);
  std::memcpy(p, &raw, static_cast<size_t>(count == kValuesIn<V> ? kValuesIn<V> : count) * sizeof(T));
}

// Prefetches the cache line at p into the first-level or second-level cache. The address need not be valid.
template <int cache>
BATCHNORM_INLINE void prefetch(const void* p) {
  __builtin_prefetch(p, 0, cache == 1 ? 3 : 2);
}

#if defined(__x86_64__)
// Store a register, or its first half, to an aligned address, bypassing the caches.
template <class Register>
BATCHNORM_INLINE void stream_register(void* p, Register v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#else
  _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(v));
#endif
}

BATCHNORM_INLINE void stream_half_register(void* p, UInt16 v) {
#if defined(__AVX512F__)
  _mm256_stream_si256(static_cast<__m256i*>(p), _mm512_castsi512_si256(reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  _mm_stream_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(reinterpret_cast<__m256i>(v)));
#else
  _mm_stream_si64(static_cast<long long*>(p), _mm_cvtsi128_si64(reinterpret_cast<__m128i>(v)));
#endif
}

template <class T, class V>
BATCHNORM_INLINE void stream(T* p, V v) {
  if constexpr (std::is_same_v<V, Packet<T>>) {
    stream_register(p, narrow_to<T>(v));
  } else {
    stream_half_register(p, narrow_to<T>(v));
  }
}
BATCHNORM_INLINE void stream_fence() { _mm_sfence(); }
inline constexpr bool kHasStream = true;
#else
template <class T, class V>
BATCHNORM_INLINE void stream(T* p, V v) {
  store(p, v, kValuesIn<V>);
}
BATCHNORM_INLINE void stream_fence() {}
inline constexpr bool kHasStream = false;
#endif

// ---- single values ---------------------------------------------------------------------------------------------

template <class T>
BATCHNORM_INLINE Arithmetic<T> widen_one(const T* p) {
  if constexpr (sizeof(T) < 4) {
    return load(p, 1).low[0];
  } else {
    return *p;
  }
}

// Rounds v to the precision of T.
template <class T>
BATCHNORM_INLINE double round_to(double v) {
  if constexpr (sizeof(T) == 8) {
    return v;
  } else if constexpr (sizeof(T) == 4) {
    return static_cast<double>(static_cast<float>(v));
  } else {
    return static_cast<double>(widen(narrow(broadcast_to<Packet<T>>(static_cast<float>(v)), T{}), T{}).low[0]);
  }
}

}  // namespace BATCHNORM_NAMESPACE
