// Mean (as a pair) and sum of squared deviations of a batch, of groups of its samples, or with weights.
#pragma once

#include "kernels/loops/lanes.h"

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
  bool finish(int64_t c, const SumsByGroup& sums, bool again) override {
    const double values = static_cast<double>(shape.n * shape.s);
    const auto found = moments_of<T>(pivot[c], sums.u(0), sums.uv(0), values);
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

// Maps all values, with the coefficients of each sample's row in `mapped`.
void map_all(const Threads& threads, const Shape& s, const Mapper& mapper, bool streamed, const int64_t* mapped) {
  if (in_planes(s, true)) return map_all_planes(threads, s, mapper, streamed, mapped);
  map_all_rows(threads, row_shape<T>(s, true), mapper, streamed, kValues, mapped);
}

// Sums the moments of all values, and calls `record`, then maps.
template <class Record>
void all_moments(const Threads& threads, const Shape& s, const T* x, const Record& record, const Mapper& mapper,
                 const int64_t* mapped) {
  Scratch scratch;
  if (in_planes(s, false)) {
    CoefficientArrays<A> pivots(s.c, scratch);
    const MomentTerm<T, false> term{x, pivots.view(), nullptr};
    const Reducer sums = reducer(term);
    PlaneMoments<Record> steps(sums, x, pivots.mean, s, record);
    const Samples by{1, nullptr, nullptr, mapped};
    return reduce_then_map(threads, s, sums, steps, mapper, streams(s), 1, kValues, by);
  }
  const RowShape r = row_shape<T>(s, false);
  LaneCoefficients pivots(r, scratch);
  const MomentTerm<T, false> term{x, pivots.lanes.view(), nullptr};
  const Reducer sums = reducer(term);
  RowMoments<Record> steps(sums, x, pivots, static_cast<double>(s.n * s.s), record);
  reduce_then_map(threads, r, sums, steps, Mapper{}, false, kValues);
  if (mapper.map) map_all(threads, s, mapper, streams(s), mapped);
}

struct StoreMoments {
  A *mean, *mean_low, *m2;
  void operator()(int64_t c, const MomentsOfChannel& found) const {
    mean[c] = static_cast<A>(found.mean);
    mean_low[c] = static_cast<A>(found.mean_low);
    m2[c] = static_cast<A>(found.m2);
  }
  void done() const {}
};

// ---- by group, or with weights -------------------------------------------------------------------------------------

// Adds Σ w and Σ w² of positions [begin, begin + length) of sample n. Without weights, each is 1.
void add_weights(const Shape& shape, const A* weights, int64_t n, int64_t begin, int64_t length, double& sum,
                 double& sum_squares) {
  if (!weights) {
    sum += static_cast<double>(length), sum_squares += static_cast<double>(length);
    return;
  }
  const A* w = weights + n * shape.s + begin;
  WideSums sums;
  for (int64_t p = 0; p < length; p += kLanes<double>) {
    const Vec<double> wide = load_wide(w + p, length - p < kLanes<double> ? length - p : kLanes<double>);
    sums.u = sums.u + wide;
    sums.uv = fma(wide, wide, sums.uv);
  }
  sum += sum_lanes(sums.u), sum_squares += sum_lanes(sums.uv);
}

// The values of a batch by group. Groups and weights need rows of one position, so each lane is a channel.
struct Groups {
  const Shape& shape;
  const T* x;
  const A* weights;      // [n, s], or null
  const int64_t* index;  // [n], or null if there is one group
  const int64_t count;
  const bool planes;
  const RowShape rows;
  double *values, *squares;  // [count], Σ w and Σ w²
  A* pivot;                  // [count, c]
  bool* empty;               // [count], whether no value counts

  Groups(const Shape& s, const void* x_, const void* weights_, const int64_t* index_, int64_t count_, Scratch& scratch)
      : shape(s),
        x(static_cast<const T*>(x_)),
        weights(static_cast<const A*>(weights_)),
        index(index_),
        count(count_),
        planes(in_planes(s, true)),
        rows(row_shape<T>(s, true)),
        values(scratch.get<double>(count)),
        squares(scratch.get<double>(count)),
        pivot(scratch.get<A>(count * s.c)),
        empty(scratch.get<bool>(count)) {
    for (int64_t g = 0; g < count; ++g) values[g] = squares[g] = 0.0, empty[g] = true;
    for (int64_t n = 0; n < s.n && s.s > 0; ++n) {
      const int64_t g = group(n);
      add_weights(shape, weights, n, 0, s.s, values[g], squares[g]);
      if (!empty[g]) continue;
      int64_t p = 0;
      while (weights && p < s.s && weights[n * s.s + p] == A(0)) ++p;
      if (p == s.s) continue;
      empty[g] = false;
      for (int64_t c = 0; c < s.c; ++c) {
        pivot[g * s.c + c] = widen_one(x + (planes ? (n * s.c + c) * s.s + p : (n * s.s + p) * s.c + c));
      }
    }
    for (int64_t g = 0; g < count; ++g) {
      if (empty[g]) fill(pivot + g * s.c, s.c, A(0));
    }
  }
  int64_t group(int64_t n) const { return index ? index[n] : 0; }

  // Replaces each group's pivots, which are its first values, by means of a few values of its first samples (at most
  // 1/8 of all).
  void near_the_mean(const Reducer& reducer) {
    constexpr int64_t kLeast = 16, kMost = 256, kValuesEach = 64, kShare = 8;
    const Shape& s = shape;
    int64_t wanted = s.n * s.s / (count * kShare);
    wanted = wanted < kLeast ? kLeast : wanted > kMost ? kMost : wanted;
    int64_t few = s.s < kValuesEach ? s.s : kValuesEach;
    few = few < wanted ? few : wanted;
    const int64_t samples = (wanted + few - 1) / few, begin = (s.s - few) / 2, all = count * s.c;
    Scratch scratch;
    int64_t* seen = scratch.get<int64_t>(count);
    double *sum = scratch.get<double>(count), *u = scratch.get<double>(all), *unused = scratch.get<double>(s.c);
    for (int64_t g = 0; g < count; ++g) seen[g] = 0, sum[g] = 0.0;
    for (int64_t i = 0; i < all; ++i) u[i] = 0.0;
    for (int64_t n = 0; n < s.n; ++n) {
      const int64_t g = group(n);
      if (seen[g]++ >= samples) continue;
      double squares_of_few = 0.0;
      add_weights(shape, weights, n, begin, few, sum[g], squares_of_few);
      if (!planes) {
        for (int64_t c = 0; c < s.c; ++c) unused[c] = 0.0;
        reducer.rows(reducer.term, s.c, n * s.s + begin, n * s.s + begin + few, 0, s.c, g * s.c, u + g * s.c, unused);
        continue;
      }
      for (int64_t c0 = 0; c0 < s.c; c0 += kChannelsAtOnce) {
        const int64_t channels = s.c - c0 < kChannelsAtOnce ? s.c - c0 : kChannelsAtOnce;
        WideSums found[kChannelsAtOnce];
        reducer.planes(reducer.term, s, n, n + 1, begin, few, c0, channels, index, found);
        for (int64_t k = 0; k < channels; ++k) u[g * s.c + c0 + k] += sum_lanes(found[k].u);
      }
    }
    for (int64_t i = 0; i < all; ++i) {
      if (sum[i / s.c] > 0.0) pivot[i] = rounded(pivot[i], u[i] / sum[i / s.c]);
    }
  }
};

// Sums the moments of each group, and calls record(group, c, MomentsOfChannel) for each, and record.channel(c) after
// the last group of a channel.
template <class Record>
struct GroupedMoments final : PlaneSteps, RowSteps {
  const Groups& groups;
  Record& record;
  GroupedMoments(const Groups& groups_, Record& record_) : groups(groups_), record(record_) {}

  bool finish(int64_t c, const SumsByGroup& sums, bool again) override {
    return channel(c, again, [&](int64_t g) { return sums.u(g); }, [&](int64_t g) { return sums.uv(g); });
  }
  bool finish(double* u, double* uv, bool again) override {
    const int64_t channels = groups.shape.c;
    bool far = false;
    for (int64_t c = 0; c < channels; ++c) {
      far |= channel(c, again, [&](int64_t g) { return u[g * channels + c]; },
                     [&](int64_t g) { return uv[g * channels + c]; });
    }
    return far;
  }

 private:
  template <class U, class UV>
  bool channel(int64_t c, bool again, const U& u, const UV& uv) {
    bool far = false;
    for (int64_t g = 0; g < groups.count; ++g) {
      A& pivot = groups.pivot[g * groups.shape.c + c];
      // The sums of a group in which no value counts are 0, or NaN if one is not finite and the term does not clear it.
      MomentsOfChannel found{0.0, 0.0, uv(g), false};
      if (!groups.empty[g]) found = moments_of<T>(pivot, u(g), uv(g), groups.values[g]);
      record(g, c, found);
      if (found.far && !again) pivot = static_cast<A>(found.mean), far = true;
    }
    if (!far) record.channel(c);
    return far;
  }
};

// Sums all groups, calls `record`, then maps. `mapped` holds each sample's row of coefficients in the map.
// If `clears`, values with weight 0 may be NaN. Otherwise, such a value makes its channel's statistics NaN.
template <class Record>
void grouped_moments(const Threads& threads, Groups& groups, Record& record, bool clears, const Mapper& mapper,
                     const int64_t* mapped) {
  const Shape& s = groups.shape;
  auto run = [&](auto weighted) {
    MomentTerm<T, decltype(weighted)::value> term{groups.x, {}, groups.weights, clears};
    term.coefficients.mean = groups.pivot;
    const Reducer sums = reducer(term);
    const Samples by{groups.count, groups.index, groups.index, mapped};
    groups.near_the_mean(sums);
    GroupedMoments<Record> steps(groups, record);
    if (groups.planes) return reduce_then_map(threads, s, sums, steps, mapper, streams(s), 1, kValues, by);
    reduce_then_map(threads, groups.rows, sums, steps, mapper, streams(s), kValues, by);
  };
  if (groups.weights) return run(Constant<bool, true>{});
  run(Constant<bool, false>{});
}

struct StoreGroups {
  const StoreMoments& store;
  int64_t channels;
  void operator()(int64_t group, int64_t c, const MomentsOfChannel& found) const { store(group * channels + c, found); }
  void channel(int64_t) const {}
};

void moments(const Threads& threads, const Moments& args) {
  const Shape& s = args.shape;
  StoreMoments store{static_cast<A*>(args.mean), static_cast<A*>(args.mean_low), static_cast<A*>(args.m2)};
  if (s.numel() == 0 || args.index || args.weights) {
    Scratch scratch;
    Groups groups(s, args.x, args.weights, args.index, args.groups, scratch);
    for (int64_t g = 0; g < args.groups; ++g) args.count[g] = groups.values[g];
    StoreGroups record{store, s.c};
    if (s.numel() > 0) return grouped_moments(threads, groups, record, true, Mapper{}, nullptr);
    for (int64_t i = 0; i < args.groups * s.c; ++i) store(i, {0.0, 0.0, 0.0, false});
    return;
  }
  *args.count = static_cast<double>(s.n * s.s);
  all_moments(threads, s, static_cast<const T*>(args.x), store, Mapper{}, nullptr);
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
