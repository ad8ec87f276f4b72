// Normalization by batch statistics and by given statistics.
#pragma once

#include <initializer_list>

#include "moments.h"

namespace BATCHNORM_NAMESPACE {
namespace {

// Stores the statistics, and overwrites the pivots with the coefficients of the normalization.
struct StoreStatistics {
  A *mean, *mean_low, *var;
  double values;
  Channels<T>& channels;
  CoefficientArrays<A>& coefficients;
  LaneCoefficients* lanes = nullptr;

  void operator()(int64_t c, const MomentsOfChannel& found) const {
    mean[c] = static_cast<A>(found.mean);
    mean_low[c] = static_cast<A>(found.mean_low);
    var[c] = static_cast<A>(found.m2 / values);
    channels.mean_low.set(0, c, static_cast<double>(mean_low[c]));
    channels.set_var(0, c, static_cast<double>(var[c]));
    coefficients.mean[c] = mean[c];
    coefficients.scale[c] = channels.scale(0, c);
    coefficients.shift[c] = channels.shift(0, c, coefficients.scale[c]);
  }
  void done() const {
    if (lanes) lanes->spread_mean_scale_shift();
  }
};

// The map from x to y, of `TrainForward` and of `Normalize`.
template <class F, class Args>
NormalizeMap<T, F> normalize_map(F, const Args& args, const Coefficients<A>& coefficients) {
  return {static_cast<const T*>(args.x), static_cast<const T*>(args.residual), static_cast<T*>(args.y), coefficients,
          static_cast<A>(args.normalization.parameter)};
}

// Rows of coefficients for vectors [rows, c]: one per row, or one per sample if there are fewer samples than rows.
struct CoefficientRows {
  int64_t count = 1;
  const int64_t* of_sample = nullptr;  // the row of each sample; null if all share one
  const int64_t* of_row = nullptr;     // the vectors' row for each row of coefficients; null if both are the same

  CoefficientRows(const Normalization& n, std::initializer_list<const Vector*> more, int64_t samples,
                  Scratch& scratch) {
    auto widen = [&](const Vector* v) { count = v->rows > count ? v->rows : count; };
    for (const Vector* v : {&n.mean, &n.mean_low, &n.var, &n.weight, &n.bias}) widen(v);
    for (const Vector* v : more) widen(v);
    if (!n.index) return;
    of_sample = n.index;
    if (count == 1 || count > samples) {
      if (count > samples) of_row = n.index, count = samples;
      int64_t* own = scratch.get<int64_t>(samples);
      for (int64_t i = 0; i < samples; ++i) own[i] = of_row ? i : 0;
      of_sample = own;
    }
  }
  int64_t source(int64_t row) const { return of_row ? of_row[row] : row; }
};

// Fills mean, scale and shift of channel k in one row.
void fill_one(const Channels<T>& channels, const CoefficientRows& rows, int64_t c, int64_t row, int64_t k,
              const CoefficientArrays<A>& into) {
  const int64_t from = rows.source(row), i = row * c + k;
  into.mean[i] = static_cast<A>(channels.mean.get(from, k));
  into.scale[i] = channels.scale(from, k);
  into.shift[i] = channels.shift(from, k, into.scale[i]);
}

void fill_coefficients(const Channels<T>& channels, const CoefficientRows& rows, int64_t c,
                       const CoefficientArrays<A>& into) {
  for (int64_t row = 0; row < rows.count; ++row) {
    for (int64_t k = 0; k < c; ++k) fill_one(channels, rows, c, row, k, into);
  }
}

void fused_forward(const Threads& threads, const TrainForward& args) {
  const Shape& s = args.shape;
  A *mean = static_cast<A*>(args.mean), *low = static_cast<A*>(args.mean_low), *var = static_cast<A*>(args.var);
  if (s.numel() == 0) {
    for (A* p : {mean, low, var}) fill(p, s.c, A(0));
    return;
  }
  Scratch scratch;
  Channels<T> channels(args.normalization, s.c, scratch);
  const T* x = static_cast<const T*>(args.x);
  const double values = static_cast<double>(s.n * s.s);
  if (in_planes(s, false)) {
    CoefficientArrays<A> coefficients(s.c, scratch);
    const MomentTerm<T, false> term{x, coefficients.view(), nullptr};
    const Reducer sums = reducer(term);
    PlaneMoments<StoreStatistics> steps(sums, x, coefficients.mean, s,
                                        {mean, low, var, values, channels, coefficients});
    with_activation(args.normalization.activation, [&](auto f) {
      const auto to_y = normalize_map(f, args, coefficients.view());
      reduce_then_map(threads, s, sums, steps, mapper(to_y), streams(s), 1, kValues);
    });
    return;
  }
  const RowShape r = row_shape<T>(s, false);
  LaneCoefficients coefficients(r, scratch);
  const MomentTerm<T, false> term{x, coefficients.lanes.view(), nullptr};
  const Reducer sums = reducer(term);
  RowMoments<StoreStatistics> steps(sums, x, coefficients, values,
                                    {mean, low, var, values, channels, coefficients.channels, &coefficients});
  with_activation(args.normalization.activation, [&](auto f) {
    const auto to_y = normalize_map(f, args, coefficients.lanes.view());
    reduce_then_map(threads, r, sums, steps, mapper(to_y), streams(s), kValues);
  });
}

// ---- batch statistics by group, with weights, or with coefficients by sample ---------------------------------------

// Stores the statistics of each group, and computes the coefficients of the normalization from them. The variance has
// the bits of one that is computed from a stored m2.
struct StoreGroupStatistics {
  A *mean, *mean_low, *var;
  const double* values;
  int64_t c;
  Channels<T>& channels;
  const CoefficientRows& rows;
  const CoefficientArrays<A>& coefficients;

  void operator()(int64_t group, int64_t k, const MomentsOfChannel& found) const {
    const int64_t i = group * c + k;
    mean[i] = static_cast<A>(found.mean);
    mean_low[i] = static_cast<A>(found.mean_low);
    const double m2 = static_cast<double>(static_cast<A>(found.m2));
    var[i] = static_cast<A>(m2 / (values[group] > 0.0 ? values[group] : 1.0));
    channels.mean.set(group, k, static_cast<double>(mean[i]));
    channels.mean_low.set(group, k, static_cast<double>(mean_low[i]));
    channels.set_var(group, k, static_cast<double>(var[i]));
  }
  void channel(int64_t k) const {
    for (int64_t row = 0; row < rows.count; ++row) fill_one(channels, rows, c, row, k, coefficients);
  }
};

struct StoreSharedStatistics {
  const StoreGroupStatistics& store;
  void operator()(int64_t k, const MomentsOfChannel& found) const { store(0, k, found), store.channel(k); }
  void done() const {}
};

void grouped_forward(const Threads& threads, const TrainForward& args) {
  const Shape& s = args.shape;
  const int64_t* index = args.groups ? args.normalization.index : nullptr;
  const int64_t count = args.groups ? args.groups : 1;
  Scratch scratch;
  Groups groups(s, args.x, args.weights, index, count, scratch);
  for (int64_t g = 0; g < count; ++g) args.count[g] = groups.values[g], args.count[count + g] = groups.squares[g];
  A *mean = static_cast<A*>(args.mean), *low = static_cast<A*>(args.mean_low), *var = static_cast<A*>(args.var);
  if (s.numel() == 0) {
    for (A* p : {mean, low, var}) fill(p, count * s.c, A(0));
    return;
  }
  Normalization own = args.normalization;
  own.mean.rows = own.mean_low.rows = own.var.rows = count;
  Channels<T> channels(own, s.c, scratch);
  const CoefficientRows rows(own, {}, s.n, scratch);
  CoefficientArrays<A> coefficients(rows.count * s.c, scratch);
  StoreGroupStatistics record{mean, low, var, groups.values, s.c, channels, rows, coefficients};
  with_activation(args.normalization.activation, [&](auto f) {
    const auto to_y = normalize_map(f, args, coefficients.view());
    if (index || args.weights) {
      grouped_moments(threads, groups, record, false, mapper(to_y), rows.of_sample);
    } else {
      all_moments(threads, s, groups.x, StoreSharedStatistics{record}, mapper(to_y), rows.of_sample);
    }
  });
}

// ---- given statistics ----------------------------------------------------------------------------------------------

void normalize(const Threads& threads, const Normalize& args) {
  const Shape& s = args.shape;
  if (s.numel() == 0) return;
  Scratch scratch;
  const Channels<T> channels(args.normalization, s.c, scratch);
  const CoefficientRows rows(args.normalization, {}, s.n, scratch);
  const bool planes = in_planes(s, rows.of_sample);
  const RowShape r = planes ? RowShape{s.c, 1, 0, s.c, 1, 1} : row_shape<T>(s, rows.of_sample);
  LaneCoefficients coefficients(r, scratch, rows.count);
  fill_coefficients(channels, rows, s.c, coefficients.channels);
  coefficients.spread_mean_scale_shift();
  with_activation(args.normalization.activation, [&](auto f) {
    const auto to_y = normalize_map(f, args, coefficients.lanes.view());
    if (planes) return map_all_planes(threads, s, mapper(to_y), streams(s), rows.of_sample);
    map_all_rows(threads, r, mapper(to_y), streams(s), kValues, rows.of_sample);
  });
}

// ---- batch statistics ----------------------------------------------------------------------------------------------

// Sums can overflow although mean and variance do not. Such channels are summed again with tiny equal weights.
void train_forward(const Threads& threads, const TrainForward& args) {
  if (args.count) return grouped_forward(threads, args);
  fused_forward(threads, args);
  const Shape& s = args.shape;
  A *mean = static_cast<A*>(args.mean), *low = static_cast<A*>(args.mean_low), *var = static_cast<A*>(args.var);
  const auto overflowed = [&](int64_t c) { return !std::isfinite(var[c]); };
  bool any = false;
  for (int64_t c = 0; c < s.c; ++c) any |= overflowed(c);
  if (!any) return;

  const A tiny = static_cast<A>(std::ldexp(1.0, sizeof(A) == 8 ? -700 : -100));
  Scratch scratch;
  A* weights = scratch.get<A>(s.n * s.s);
  fill(weights, s.n * s.s, tiny);
  double sum_of_weights;
  A *found_mean = scratch.get<A>(s.c), *found_low = scratch.get<A>(s.c), *m2 = scratch.get<A>(s.c);
  moments(threads, {s, args.x, nullptr, weights, 1, &sum_of_weights, found_mean, found_low, m2});
  for (int64_t c = 0; c < s.c; ++c) {
    if (!overflowed(c)) continue;
    mean[c] = found_mean[c], low[c] = found_low[c];
    var[c] = static_cast<A>(static_cast<double>(m2[c]) / sum_of_weights);
  }
  Normalize again{s, args.x, args.residual, args.normalization, args.y};
  const DType dtype = sizeof(A) == 8 ? DType::float64 : DType::float32;
  again.normalization.mean = {mean, dtype, 1}, again.normalization.mean_low = {low, dtype, 1};
  again.normalization.var = {var, dtype, 1};
  normalize(threads, again);
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
