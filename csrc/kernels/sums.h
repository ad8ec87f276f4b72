// What the loops over planes and over rows of lanes share: how they sum and prefetch.
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

// Returns a mask of lanes [from, to).
BATCHNORM_INLINE auto lanes_between(int64_t from, int64_t to, float) {
  Int32 lane;
  for (int i = 0; i < kLanes<float>; ++i) lane[i] = i;
  return (lane >= static_cast<int32_t>(from)) & (lane < static_cast<int32_t>(to));
}
BATCHNORM_INLINE auto lanes_between(int64_t from, int64_t to, double) {
  Vec<int64_t> lane;
  for (int i = 0; i < kLanes<double>; ++i) lane[i] = i;
  return (lane >= from) & (lane < to);
}

// Prefetches [offset, offset + count), line by line.
template <int cache, class Term>
BATCHNORM_INLINE void fetch_lines(const Term& term, int64_t offset, int64_t count) {
  constexpr int64_t kLine = 64 / sizeof(typename Term::Type);
  for (int64_t i = 0; i < count; i += kLine) term.template fetch<cache>(offset + i);
}

}  // namespace BATCHNORM_NAMESPACE
