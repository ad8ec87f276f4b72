// Selects the driver for a shape and arranges the coefficients per channel for it, in the compiled dtype.
#pragma once

#include "channels.h"
#include "planes.h"
#include "rows.h"

namespace BATCHNORM_NAMESPACE {
namespace {

using T = BATCHNORM_TYPE;
using A = Arithmetic<T>;
constexpr Values kValues{sizeof(T), kLanes<A>};

// Larger outputs bypass the caches. This is a quarter of a typical last-level cache, which also holds the inputs and
// must keep the output until it is read.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

bool streams(const Shape& s) { return kHasStream && s.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes; }

// Returns whether to process x in planes (each row is one channel) instead of rows of lanes. Rows of half a vector or
// more take part if there are few samples: spreading coefficients over lanes then takes longer than the values do.
bool in_planes(const Shape& s, bool whole) {
  constexpr int64_t kFewSamples = 8;
  if (s.channels_last || s.s <= 1) return false;
  return whole || s.s >= kLanes<A> || (2 * s.s >= kLanes<A> && s.n <= kFewSamples);
}

// Spreads [c] coefficients over lanes if lanes and channels differ.
void spread(const RowShape& r, const A* per_channel, A* lanes) {
  if (r.positions > 1) {
    for (int64_t c = 0; c < r.channels; ++c) {
      for (int64_t p = 0; p < r.positions; ++p) *lanes++ = per_channel[c];
    }
  } else {
    for (int64_t j = 0; j < r.lanes; j += r.channels) {
      for (int64_t c = 0; c < r.channels; ++c) lanes[j + c] = per_channel[c];
    }
  }
}

// Sums the lanes of each channel, in place and in the order of the lanes.
void fold(const RowShape& r, double* sums) {
  if (r.positions > 1) {
    for (int64_t c = 0; c < r.channels; ++c) {
      double sum = sums[c * r.positions];
      for (int64_t p = 1; p < r.positions; ++p) sum += sums[c * r.positions + p];
      sums[c] = sum;
    }
  } else {
    for (int64_t j = r.channels; j < r.lanes; j += r.channels) {
      for (int64_t c = 0; c < r.channels; ++c) sums[c] += sums[j + c];
    }
  }
}

// Coefficients [rows, channels], and per lane if lanes and channels differ, where there is one row.
struct LaneCoefficients {
  const RowShape& shape;
  CoefficientArrays<A> channels, lanes;
  LaneCoefficients(const RowShape& r, Scratch& scratch, int64_t rows = 1)
      : shape(r),
        channels(rows * r.channels, scratch),
        lanes(r.one_to_one() ? channels : CoefficientArrays<A>(r.lanes, scratch)) {}
  template <class... Members>
  void spread_all(Members... which) {
    if (!shape.one_to_one()) (spread(shape, channels.*which, lanes.*which), ...);
  }
  void spread_mean_scale_shift() {
    spread_all(&CoefficientArrays<A>::mean, &CoefficientArrays<A>::scale, &CoefficientArrays<A>::shift);
  }
  void spread_slope_constant() { spread_all(&CoefficientArrays<A>::slope, &CoefficientArrays<A>::constant); }
};

void fill(A* p, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
