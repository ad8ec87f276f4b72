// Sums and prefetches for the loops over planes and over rows of lanes.
#pragma once

#include "terms.h"

namespace BATCHNORM_NAMESPACE {

inline constexpr int64_t kChannelsAtOnce = 128;  // planes: channels summed together

// The number of consecutive additions in the arithmetic type; their sum is then added in float64.
inline constexpr int64_t kAdditions = 32;

// The part of a core's own cache that holds values that are read twice. The same amount is prefetched.
inline constexpr int64_t kCacheBytes = 512 << 10;

// The values that sums prefetch, in bytes, together for all inputs: half of a first-level cache. Processors also
// prefetch, but restart after every jump. This prefetch reads short rows and many lanes a third faster, but long rows
// and inputs that are already in the cache slower.
inline constexpr int64_t kFetchBytes = 16384, kLongRowBytes = 8192;
template <class Term>
inline constexpr int64_t kValueBytes = Term::kInputs * static_cast<int64_t>(sizeof(typename Term::Type));
template <class Term>
inline constexpr int64_t kAhead = kFetchBytes / kValueBytes<Term>;

// Σ u and Σ u·v in float64, with one partial sum per lane.
struct WideSums {
  Vec<double> u{}, uv{};
};

// Widens v to float64 and adds its parts. Returns float64 unchanged.
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

// Loads up to kLanes<double> values as float64, and sets the others to zero.
BATCHNORM_INLINE Vec<double> load_wide(const double* p, int64_t count) { return load(p, count); }
BATCHNORM_INLINE Vec<double> load_wide(const float* p, int64_t count) {
  typename VectorOf<float, kBytes / 2>::type half{};
  std::memcpy(&half, p, static_cast<size_t>(count) * sizeof(float));
  return __builtin_convertvector(half, Vec<double>);
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
BATCHNORM_INLINE void add_to(double* sums, Pair<Vec<float>> v, int64_t count) {
  constexpr int64_t W = kLanes<float>;
  add_to(sums, v.low, count < W ? count : W);
  if (count > W) add_to(sums + W, v.high, count - W);
}

// Prefetches [offset, offset + count), line by line.
template <int cache, class Term>
BATCHNORM_INLINE void fetch_lines(const Term& term, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(typename Term::Type);
  for (int64_t i = 0; i < count; i += kLine) term.template fetch<cache>(offset + i);
}

}  // namespace BATCHNORM_NAMESPACE
