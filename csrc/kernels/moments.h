// Mean (as a pair) and sum of squared deviations of a batch, of groups of its samples, or with weights.
#pragma once

#include "lanes.h"

namespace BATCHNORM_NAMESPACE {
namespace {

// Moves a pivot close to the mean. Rounds it to x's precision, so that deviations from it are exact, or nearly so.
A rounded(A pivot, double deviation) { return static_cast<A>(round_to<T>(static_cast<double>(pivot) + deviation)); }

// Sums the moments of a batch and calls record(c, MomentsOfChannel) for each channel. Deviations are taken from a
// pivot, which is the mean of a few values spread over the batch. The pivot of a constant channel is exactly its value.
template <class Record>
struct PlaneMoments final : PlaneSteps {
  const Reducer& reducer;
  const T* x;
  A* pivot;
  const Shape& shape;
  Record record;

  PlaneMoments(const Reducer& reducer_, const T* x_, A* pivot_, const Shape& shape_, const Record& record_)
      : reducer(reducer_), x(x_), pivot(pivot_), shape(shape_), record(record_) {}

  void begin(int64_t c0, int64_t channels) override {
    constexpr int64_t kSamples = 4, kValuesEach = 64, kShare = 16;
    const int64_t few = shape.s < kValuesEach ? shape.s : kValuesEach;
    int64_t samples = shape.n * shape.s / (kShare * few);
    samples = samples < 1 ? 1 : samples > kSamples ? kSamples : samples;
    for (int64_t c = c0; c < c0 + channels; ++c) pivot[c] = widen_one(x + c * shape.s);
    WideSums sums[kChannelsAtOnce];
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t n = shape.n * k / samples;
      reducer.planes(reducer.term, shape, n, n + 1, (shape.s - few) / 2, few, c0, channels, nullptr, sums);
    }
    for (int64_t k = 0; k < channels; ++k) {
      pivot[c0 + k] = rounded(pivot[c0 + k], sum_lanes(sums[k].u) / static_cast<double>(few * samples));
    }
  }
  bool finish(int64_t c, const WideSums& sums, bool again) override {
    const double values = static_cast<double>(shape.n * shape.s);
    const auto found = moments_of<T>(pivot[c], sum_lanes(sums.u), sum_lanes(sums.uv), values);
    if (found.far && !again) {
      pivot[c] = static_cast<A>(found.mean);
      return true;
    }
    record(c, found);
    return false;
  }
};

template <class Record>
struct RowMoments final : RowSteps {
  const Reducer& reducer;
  const T* x;
  LaneCoefficients& pivots;
  const RowShape& shape;
  double values;
  Record record;

  RowMoments(const Reducer& reducer_, const T* x_, LaneCoefficients& pivots_, double values_, const Record& record_)
      : reducer(reducer_), x(x_), pivots(pivots_), shape(pivots_.shape), values(values_), record(record_) {}

  void begin() override {
    constexpr int64_t kRows = 16;
    const int64_t few = shape.rows < kRows ? shape.rows : kRows, per_channel = shape.lanes / shape.channels * few;
    A* pivot = pivots.channels.mean;
    for (int64_t c = 0; c < shape.channels; ++c) pivot[c] = widen_one(x + c * shape.positions);
    pivots.spread_all(&CoefficientArrays<A>::mean);
    Scratch scratch;
    double* sums = scratch.get<double>(2 * shape.lanes);
    for (int64_t j = 0; j < 2 * shape.lanes; ++j) sums[j] = 0.0;
    for (int64_t k = 0; k < few; ++k) {
      const int64_t row = shape.rows * k / few;
      reducer.rows(reducer.term, shape.lanes, row, row + 1, 0, shape.lanes, 0, sums, sums + shape.lanes);
    }
    fold(shape, sums);
    for (int64_t c = 0; c < shape.channels; ++c) {
      pivot[c] = rounded(pivot[c], sums[c] / static_cast<double>(per_channel));
    }
    pivots.spread_all(&CoefficientArrays<A>::mean);
  }
  bool finish(double* u, double* uv, bool again) override {
    fold(shape, u), fold(shape, uv);
    A* pivot = pivots.channels.mean;
    bool far = false;
    for (int64_t c = 0; c < shape.channels && !again; ++c) {
      const auto found = moments_of<T>(pivot[c], u[c], uv[c], values);
      if (found.far) pivot[c] = static_cast<A>(found.mean), far = true;
    }
    if (far) {
      pivots.spread_all(&CoefficientArrays<A>::mean);
      return true;
    }
    for (int64_t c = 0; c < shape.channels; ++c) record(c, moments_of<T>(pivot[c], u[c], uv[c], values));
    record.done();
    return false;
  }
};

struct StoreMoments {
  A *mean, *mean_low, *m2;
  void operator()(int64_t c, const MomentsOfChannel& found) const {
    mean[c] = static_cast<A>(found.mean);
    mean_low[c] = static_cast<A>(found.mean_low);
    m2[c] = static_cast<A>(found.m2);
  }
  void done() const {}
};

// Replaces each group's pivots, which are its first values, by means of a few values of its first samples (at most 1/8
// of all).
void near_the_mean(const Shape& s, const RowShape& r, bool planes, const Reducer& sums, const Moments& args, A* pivot,
                   double* u, Scratch& scratch) {
  constexpr int64_t kLeast = 16, kMost = 256, kValuesEach = 64, kShare = 8;
  int64_t values = s.n * s.s / (args.groups * kShare);
  values = values < kLeast ? kLeast : values > kMost ? kMost : values;
  int64_t few = s.s < kValuesEach ? s.s : kValuesEach;
  few = few < values ? few : values;
  const int64_t samples = (values + few - 1) / few, begin = (s.s - few) / 2, all = args.groups * s.c;
  const A* weights = static_cast<const A*>(args.weights);
  int64_t* seen = scratch.get<int64_t>(args.groups);
  double *count = scratch.get<double>(args.groups), *unused = scratch.get<double>(s.c);
  for (int64_t g = 0; g < args.groups; ++g) seen[g] = 0, count[g] = 0.0;
  for (int64_t i = 0; i < all; ++i) u[i] = 0.0;
  for (int64_t n = 0; n < s.n; ++n) {
    const int64_t g = args.index ? args.index[n] : 0;
    if (seen[g]++ >= samples) continue;
    for (int64_t p = begin; p < begin + few; ++p) {
      count[g] += weights ? static_cast<double>(weights[n * s.s + p]) : 1.0;
    }
    if (planes) {
      for (int64_t c0 = 0; c0 < s.c; c0 += kChannelsAtOnce) {
        const int64_t channels = s.c - c0 < kChannelsAtOnce ? s.c - c0 : kChannelsAtOnce;
        WideSums found[kChannelsAtOnce];
        sums.planes(sums.term, s, n, n + 1, begin, few, c0, channels, args.index, found);
        for (int64_t k = 0; k < channels; ++k) u[g * s.c + c0 + k] += sum_lanes(found[k].u);
      }
    } else {
      for (int64_t c = 0; c < s.c; ++c) unused[c] = 0.0;
      sums.rows(sums.term, r.lanes, n * s.s + begin, n * s.s + begin + few, 0, r.lanes, g * s.c, u + g * s.c, unused);
    }
  }
  for (int64_t i = 0; i < all; ++i) {
    if (count[i / s.c] > 0.0) pivot[i] = rounded(pivot[i], u[i] / count[i / s.c]);
  }
}

// Computes moments per group or with weights.
void grouped_moments(const Threads& threads, const Moments& args) {
  const Shape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  const A* weights = static_cast<const A*>(args.weights);
  const bool planes = in_planes(s, true);
  const RowShape r = row_shape<T>(s, true);
  Scratch scratch;
  const int64_t all = args.groups * s.c;
  A* pivot = scratch.get<A>(all);
  int64_t* first = scratch.get<int64_t>(args.groups);
  fill(pivot, all, A(0));
  for (int64_t g = 0; g < args.groups; ++g) first[g] = -1, args.count[g] = 0.0;
  for (int64_t n = 0; n < s.n; ++n) {
    const int64_t g = args.index ? args.index[n] : 0;
    double count = 0.0;
    if (!weights) {
      count = static_cast<double>(s.s);
      if (s.s > 0 && first[g] < 0) first[g] = n * s.s;
    }
    for (int64_t p = 0; weights && p < s.s; ++p) {
      A w = weights[n * s.s + p];
      count += static_cast<double>(w);
      if (w != A(0) && first[g] < 0) first[g] = n * s.s + p;
    }
    args.count[g] += count;
  }
  for (int64_t g = 0; g < args.groups; ++g) {
    if (first[g] < 0) continue;
    int64_t n = first[g] / s.s, p = first[g] % s.s;
    for (int64_t c = 0; c < s.c; ++c) {
      pivot[g * s.c + c] = widen_one(x + (planes ? (n * s.c + c) * s.s + p : first[g] * s.c + c));
    }
  }
  double *u = scratch.get<double>(all), *uv = scratch.get<double>(all);
  StoreMoments store{static_cast<A*>(args.mean), static_cast<A*>(args.mean_low), static_cast<A*>(args.m2)};
  auto sum_and_store = [&](auto weighted) {
    MomentTerm<T, decltype(weighted)::value> term{x, {}, weights};
    term.coefficients.mean = pivot;
    const Reducer sums = reducer(term);
    if (s.numel() > 0) near_the_mean(s, r, planes, sums, args, pivot, u, scratch);
    for (bool again = false, unfinished = true; unfinished; again = true) {
      for (int64_t i = 0; i < all; ++i) u[i] = uv[i] = 0.0;
      if (s.numel() > 0 && planes) {
        reduce_grouped_planes(threads, s, sums, args.index, args.index, kValues, u, uv);
      } else if (s.numel() > 0) {
        reduce_grouped_rows(threads, r, sums, args.index, args.index, args.groups, u, uv);
      }
      unfinished = false;
      for (int64_t i = 0; i < all; ++i) {
        MomentsOfChannel found{0.0, 0.0, 0.0, false};
        if (first[i / s.c] >= 0) found = moments_of<T>(pivot[i], u[i], uv[i], args.count[i / s.c]);
        store(i, found);
        if (found.far && !again) pivot[i] = static_cast<A>(found.mean), unfinished = true;
      }
    }
  };
  if (weights) return sum_and_store(Constant<bool, true>{});
  sum_and_store(Constant<bool, false>{});
}

void moments(const Threads& threads, const Moments& args) {
  const Shape& s = args.shape;
  if (s.numel() == 0 || args.index || args.weights) return grouped_moments(threads, args);
  *args.count = static_cast<double>(s.n * s.s);
  Scratch scratch;
  const T* x = static_cast<const T*>(args.x);
  StoreMoments store{static_cast<A*>(args.mean), static_cast<A*>(args.mean_low), static_cast<A*>(args.m2)};
  if (in_planes(s, false)) {
    CoefficientArrays<A> pivots(s.c, scratch);
    const MomentTerm<T, false> term{x, pivots.view(), nullptr};
    const Reducer sums = reducer(term);
    PlaneMoments<StoreMoments> steps(sums, x, pivots.mean, s, store);
    reduce_then_map(threads, s, sums, steps, Mapper{}, false, 1, kValues);
    return;
  }
  const RowShape r = row_shape<T>(s, false);
  LaneCoefficients pivots(r, scratch);
  const MomentTerm<T, false> term{x, pivots.lanes.view(), nullptr};
  const Reducer sums = reducer(term);
  RowMoments<StoreMoments> steps(sums, x, pivots, *args.count, store);
  reduce_then_map(threads, r, sums, steps, Mapper{}, false, kValues);
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
