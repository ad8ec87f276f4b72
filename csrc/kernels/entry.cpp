// The kernels of one dtype in one instruction set: chooses layout, term and map, and turns sums into results.
// Compiled once per BATCHNORM_CAPABILITY (a name) and BATCHNORM_TYPE (a type of simd.h).

#include <initializer_list>

#include "channels.h"
#include "kernels.h"
#include "planes.h"
#include "rows.h"

namespace BATCHNORM_NAMESPACE {
namespace {

using T = BATCHNORM_TYPE;
using A = Arithmetic<T>;
constexpr Values kValues{sizeof(T), kLanes<A>};

// Larger outputs are written past the caches: half of a usual last-level cache, as the input goes through it too.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

bool streams(const Shape& s) { return kHasStream && s.numel() * static_cast<int64_t>(sizeof(T)) > kStreamBytes; }

// Whether values are summed and mapped in rows of one channel; else in rows of lanes.
bool in_planes(const Shape& s, bool whole) {
  return !s.channels_last && s.s > 1 && (whole || s.s >= kLanes<A>);
}

// Spreads [c] coefficients over lanes, where a lane is not just a channel.
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

// Sums lanes to channels, in place and in the lanes' order.
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

// Coefficients per channel, and per lane where that differs.
struct LaneCoefficients {
  const RowShape& shape;
  CoefficientArrays<A> channels, lanes;
  LaneCoefficients(const RowShape& r, Scratch& scratch)
      : shape(r), channels(r.channels, scratch), lanes(r.one_to_one() ? channels : CoefficientArrays<A>(r.lanes, scratch)) {}
  void spread_all(A* CoefficientArrays<A>::*which) {
    if (!shape.one_to_one()) spread(shape, channels.*which, lanes.*which);
  }
};

// ---- moments -----------------------------------------------------------------------------------------------------

// A pivot moved to near the mean, in x's own precision: there deviations are exact, or nearly.
A rounded(A pivot, double deviation) { return static_cast<A>(round_to<T>(static_cast<double>(pivot) + deviation)); }

// Sums a batch's moments and calls record(c, MomentsOfChannel) once they stand. Pivots are what deviations are
// measured from: near the mean by a few values from all over the batch, and in a constant channel exactly its value.
template <class Record>
struct PlaneMoments final : PlaneSteps {
  const Reducer& reducer;
  const T* x;
  A* pivot;
  const Shape& shape;
  Record record;

  PlaneMoments(const Reducer& reducer_, const T* x_, A* pivot_, const Shape& shape_, const Record& record_)
      : reducer(reducer_), x(x_), pivot(pivot_), shape(shape_), record(record_) {}

  void begin(int64_t c) override {
    constexpr int64_t kSamples = 4, kValuesEach = 64;
    const int64_t samples = shape.n < kSamples ? shape.n : kSamples, few = shape.s < kValuesEach ? shape.s : kValuesEach;
    pivot[c] = widen_one(x + c * shape.s);
    WideSums sums;
    for (int64_t k = 0; k < samples; ++k) {
      const int64_t n = shape.n * k / samples;
      reducer.planes(reducer.term, shape, n, n + 1, (shape.s - few) / 2, few, c, 1, nullptr, &sums);
    }
    pivot[c] = rounded(pivot[c], sum_lanes(sums.u) / static_cast<double>(few * samples));
  }
  bool finish(int64_t c, double sum, double sum_squares, bool again) override {
    auto found = moments_of<T>(pivot[c], sum, sum_squares, static_cast<double>(shape.n * shape.s));
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

// Stores the statistics, and writes the coefficients that normalize by them over the pivots.
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
    channels.mean_low.set(c, static_cast<double>(mean_low[c]));
    channels.var.set(c, static_cast<double>(var[c]));
    coefficients.mean[c] = mean[c];
    coefficients.scale[c] = channels.scale(0, c);
    coefficients.shift[c] = channels.shift(0, c, coefficients.scale[c]);
  }
  void done() const {
    if (!lanes) return;
    lanes->spread_all(&CoefficientArrays<A>::mean);
    lanes->spread_all(&CoefficientArrays<A>::scale);
    lanes->spread_all(&CoefficientArrays<A>::shift);
  }
};

void fill(A* p, int64_t n, A value) {
  for (int64_t i = 0; i < n; ++i) p[i] = value;
}

void train_forward(const Threads& threads, const TrainForward& args) {
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
  auto map = [&](auto f, const Coefficients<A>& coefficients) {
    return NormalizeMap<T, decltype(f)>{x, static_cast<const T*>(args.residual), static_cast<T*>(args.y), coefficients,
                                        static_cast<A>(args.normalization.negative_slope)};
  };
  if (in_planes(s, false)) {
    CoefficientArrays<A> coefficients(s.c, scratch);
    const MomentTerm<T, false> term{x, coefficients.view(), nullptr};
    const Reducer sums = reducer(term);
    PlaneMoments<StoreStatistics> steps(sums, x, coefficients.mean, s, {mean, low, var, values, channels, coefficients});
    with_activation(args.normalization.activation, [&](auto f) {
      const auto to_y = map(f, coefficients.view());
      reduce_then_map(threads, s, sums, steps, mapper(to_y), streams(s), 1, kValues);
    });
    return;
  }
  const RowShape r = row_shape<A>(s, false);
  LaneCoefficients coefficients(r, scratch);
  const MomentTerm<T, false> term{x, coefficients.lanes.view(), nullptr};
  const Reducer sums = reducer(term);
  RowMoments<StoreStatistics> steps(sums, x, coefficients, values,
                                    {mean, low, var, values, channels, coefficients.channels, &coefficients});
  with_activation(args.normalization.activation, [&](auto f) {
    const auto to_y = map(f, coefficients.lanes.view());
    reduce_then_map(threads, r, sums, steps, mapper(to_y), streams(s), kValues);
  });
}

// Moments by group or with weights.
void grouped_moments(const Threads& threads, const Moments& args) {
  const Shape& s = args.shape;
  const T* x = static_cast<const T*>(args.x);
  const A* weights = static_cast<const A*>(args.weights);
  const bool planes = in_planes(s, true);
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
  auto sum = [&](auto weighted) {
    if (s.numel() == 0) return;
    MomentTerm<T, decltype(weighted)::value> term{x, {}, weights};
    term.coefficients.mean = pivot;
    if (planes) return reduce_grouped_planes(threads, s, reducer(term), args.index, args.index, kValues, u, uv);
    reduce_grouped_rows(threads, row_shape<A>(s, true), reducer(term), args.index, args.index, u, uv);
  };
  StoreMoments store{static_cast<A*>(args.mean), static_cast<A*>(args.mean_low), static_cast<A*>(args.m2)};
  for (int round = 0; round < 2; ++round) {  // from the first value, then from the mean
    for (int64_t i = 0; i < all; ++i) u[i] = uv[i] = 0.0;
    if (weights) {
      sum(Constant<bool, true>{});
    } else {
      sum(Constant<bool, false>{});
    }
    for (int64_t g = 0; g < args.groups; ++g) {
      for (int64_t c = 0; c < s.c; ++c) {
        int64_t i = g * s.c + c;
        MomentsOfChannel found{0.0, 0.0, 0.0, false};
        if (first[g] >= 0) found = moments_of<T>(pivot[i], u[i], uv[i], args.count[g]);
        store(i, found);
        pivot[i] = static_cast<A>(found.mean);
      }
    }
  }
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
  const RowShape r = row_shape<A>(s, false);
  LaneCoefficients pivots(r, scratch);
  const MomentTerm<T, false> term{x, pivots.lanes.view(), nullptr};
  const Reducer sums = reducer(term);
  RowMoments<StoreMoments> steps(sums, x, pivots, *args.count, store);
  reduce_then_map(threads, r, sums, steps, Mapper{}, false, kValues);
}

// ---- given statistics ----------------------------------------------------------------------------------------------

// Rows of coefficients for [rows, c] quantities: one per row, or one per sample where samples are fewer.
struct CoefficientRows {
  int64_t count = 1;
  const int64_t* of_sample = nullptr;  // the row of each sample; null: all have one
  const int64_t* of_row = nullptr;     // the quantities' row for each row here; null: the same

  CoefficientRows(const Normalization& n, std::initializer_list<const Vector*> more, int64_t samples,
                  Scratch& scratch) {
    auto widen = [&](const Vector* v) { count = v->data && v->rows > count ? v->rows : count; };
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

// Fills mean, scale and shift of all rows.
void fill_coefficients(const Channels<T>& channels, const CoefficientRows& rows, int64_t c,
                       const CoefficientArrays<A>& into) {
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t from = rows.source(row);
    for (int64_t k = 0; k < c; ++k) {
      int64_t i = row * c + k;
      into.mean[i] = static_cast<A>(channels.mean.get(from, k));
      into.scale[i] = channels.scale(from, k);
      into.shift[i] = channels.shift(from, k, into.scale[i]);
    }
  }
}

void spread_mean_scale_shift(LaneCoefficients& coefficients) {
  for (auto which : {&CoefficientArrays<A>::mean, &CoefficientArrays<A>::scale, &CoefficientArrays<A>::shift}) {
    coefficients.spread_all(which);
  }
}

void normalize(const Threads& threads, const Normalize& args) {
  const Shape& s = args.shape;
  if (s.numel() == 0) return;
  Scratch scratch;
  const Channels<T> channels(args.normalization, s.c, scratch);
  const CoefficientRows rows(args.normalization, {}, s.n, scratch);
  auto map = [&](auto f, const Coefficients<A>& coefficients) {
    return NormalizeMap<T, decltype(f)>{static_cast<const T*>(args.x), static_cast<const T*>(args.residual),
                                        static_cast<T*>(args.y), coefficients,
                                        static_cast<A>(args.normalization.negative_slope)};
  };
  const bool planes = in_planes(s, rows.of_sample);
  const RowShape r = planes ? RowShape{s.c, 1, 0, s.c, 1, 1} : row_shape<A>(s, rows.of_sample);
  with_activation(args.normalization.activation, [&](auto f) {
    if (planes || rows.of_sample) {
      CoefficientArrays<A> coefficients(rows.count * s.c, scratch);
      fill_coefficients(channels, rows, s.c, coefficients);
      const auto to_y = map(f, coefficients.view());
      if (planes) return map_all_planes(threads, s, mapper(to_y), streams(s), rows.of_sample);
      return map_all_rows(threads, r, mapper(to_y), streams(s), kValues, rows.of_sample);
    }
    LaneCoefficients coefficients(r, scratch);
    fill_coefficients(channels, rows, s.c, coefficients.channels);
    spread_mean_scale_shift(coefficients);
    const auto to_y = map(f, coefficients.lanes.view());
    map_all_rows(threads, r, mapper(to_y), streams(s), kValues, nullptr);
  });
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Turns Σ dz and Σ dz·(x - mean) into the operator's sums and, through a batch's statistics, into coefficients of dx.
struct BackwardSteps {
  const Backward& args;
  const Channels<T>& channels;
  const CoefficientArrays<A>& coefficients;
  double values;

  void one(int64_t c, double sum_dz, double sum_dz_deviation) const {
    double sum_dz_xhat = channels.sum_dz_xhat(0, c, sum_dz, sum_dz_deviation);
    static_cast<A*>(args.sum_dz)[c] = static_cast<A>(sum_dz);
    static_cast<A*>(args.sum_dz_xhat)[c] = static_cast<A>(sum_dz_xhat);
    if (args.through_batch) {
      double scale = channels.weight.get(0, c) * channels.invstd(0, c);
      double slope = scale * channels.invstd(0, c) * sum_dz_xhat / values;
      coefficients.slope[c] = static_cast<A>(slope);
      coefficients.constant[c] = channels.constant(0, c, scale * sum_dz / values, slope);
    }
  }
};

struct PlaneBackward final : PlaneSteps {
  const BackwardSteps& steps;
  explicit PlaneBackward(const BackwardSteps& steps_) : steps(steps_) {}
  bool finish(int64_t c, double sum_dz, double sum_dz_deviation, bool) override {
    steps.one(c, sum_dz, sum_dz_deviation);
    return false;
  }
};

struct RowBackward final : RowSteps {
  const BackwardSteps& steps;
  LaneCoefficients& lanes;
  RowBackward(const BackwardSteps& steps_, LaneCoefficients& lanes_) : steps(steps_), lanes(lanes_) {}
  bool finish(double* sum_dz, double* sum_dz_deviation, bool) override {
    fold(lanes.shape, sum_dz), fold(lanes.shape, sum_dz_deviation);
    for (int64_t c = 0; c < lanes.shape.channels; ++c) steps.one(c, sum_dz[c], sum_dz_deviation[c]);
    lanes.spread_all(&CoefficientArrays<A>::slope);
    lanes.spread_all(&CoefficientArrays<A>::constant);
    return false;
  }
};

// Coefficients of dx where the means are given: in the dtype's own row layout, as mean, scale and shift are.
void fill_given_means(const Backward& args, const Channels<T>& channels, const CoefficientRows& rows, int64_t c,
                      const CoefficientArrays<A>& into, Scratch& scratch) {
  const Wide dxhat(args.mean_dxhat, c, 0.0, scratch), dxhat_xhat(args.mean_dxhat_xhat, c, 0.0, scratch);
  for (int64_t row = 0; row < rows.count; ++row) {
    int64_t from = rows.source(row);
    for (int64_t k = 0; k < c; ++k) {
      double invstd = channels.invstd(from, k), slope = invstd * invstd * dxhat_xhat.get(from, k);
      into.slope[row * c + k] = static_cast<A>(slope);
      into.constant[row * c + k] = channels.constant(from, k, invstd * dxhat.get(from, k), slope);
    }
  }
}

template <class F>
BackwardTerm<T, F> backward_term(const Backward& args, const Coefficients<A>& coefficients) {
  return {static_cast<const T*>(args.dy), static_cast<const T*>(args.x), static_cast<const T*>(args.residual),
          static_cast<const T*>(args.y), coefficients, static_cast<A>(args.normalization.negative_slope)};
}

template <class F>
ApplyMap<T, F> apply_map(const Backward& args, const Coefficients<A>& coefficients) {
  return {backward_term<F>(args, coefficients), static_cast<T*>(args.dx), static_cast<T*>(args.dz),
          args.through_batch || args.mean_dxhat.data != nullptr, static_cast<const A*>(args.weights), coefficients};
}

bool streams(const Backward& args) {
  auto phase = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64; };
  return streams(args.shape) && (!args.dz || phase(args.dz) == phase(args.dx));
}

// With an index or weights: sums by group, then dx, each on its own.
template <class F>
void grouped_backward(const Threads& threads, const Backward& args, const Channels<T>& channels,
                      const CoefficientRows& rows, const Coefficients<A>& coefficients, Scratch& scratch) {
  const Shape& s = args.shape;
  const bool planes = in_planes(s, true);
  const RowShape r = row_shape<A>(s, true);
  if (args.sum_dz) {
    const int64_t* groups = args.normalization.index;
    const auto term = backward_term<F>(args, coefficients);
    const int64_t all = args.groups * s.c;
    double *u = scratch.get<double>(all), *uv = scratch.get<double>(all);
    for (int64_t i = 0; i < all; ++i) u[i] = uv[i] = 0.0;
    if (planes) {
      reduce_grouped_planes(threads, s, reducer(term), rows.of_sample, groups, kValues, u, uv);
    } else {
      reduce_grouped_rows(threads, r, reducer(term), rows.of_sample, groups, u, uv);
    }
    for (int64_t g = 0; g < args.groups; ++g) {
      for (int64_t c = 0; c < s.c; ++c) {
        int64_t i = g * s.c + c;
        static_cast<A*>(args.sum_dz)[i] = static_cast<A>(u[i]);
        // A group without samples may have no row of statistics.
        static_cast<A*>(args.sum_dz_xhat)[i] =
            static_cast<A>(g < channels.rows() ? channels.sum_dz_xhat(g, c, u[i], uv[i]) : 0.0);
      }
    }
  }
  if (args.dx) {
    const auto map = apply_map<F>(args, coefficients);
    if (planes) return map_all_planes(threads, s, mapper(map), streams(args), rows.of_sample);
    map_all_rows(threads, r, mapper(map), streams(args), kValues, rows.of_sample);
  }
}

void backward(const Threads& threads, const Backward& args) {
  const Shape& s = args.shape;
  if (s.numel() == 0) {
    if (args.sum_dz) {
      fill(static_cast<A*>(args.sum_dz), args.groups * s.c, A(0));
      fill(static_cast<A*>(args.sum_dz_xhat), args.groups * s.c, A(0));
    }
    return;
  }
  Scratch scratch;
  const Channels<T> channels(args.normalization, s.c, scratch);
  const CoefficientRows rows(args.normalization, {&args.mean_dxhat, &args.mean_dxhat_xhat}, s.n, scratch);
  const bool grouped = args.normalization.index || args.weights;
  const double values = static_cast<double>(s.n * s.s);
  const int inputs = 2 + (args.residual != nullptr || args.y != nullptr);

  if (grouped) {
    CoefficientArrays<A> coefficients(rows.count * s.c, scratch);
    fill_coefficients(channels, rows, s.c, coefficients);
    fill_given_means(args, channels, rows, s.c, coefficients, scratch);
    with_activation(args.normalization.activation, [&](auto f) {
      grouped_backward<decltype(f)>(threads, args, channels, rows, coefficients.view(), scratch);
    });
    return;
  }
  const bool planes = in_planes(s, false);
  const RowShape r = planes ? RowShape{s.c, 1, 0, s.c, 1, 1} : row_shape<A>(s, false);
  LaneCoefficients coefficients(r, scratch);
  fill_coefficients(channels, rows, s.c, coefficients.channels);
  spread_mean_scale_shift(coefficients);
  if (args.mean_dxhat.data) {
    fill_given_means(args, channels, rows, s.c, coefficients.channels, scratch);
    coefficients.spread_all(&CoefficientArrays<A>::slope);
    coefficients.spread_all(&CoefficientArrays<A>::constant);
  }
  const BackwardSteps common{args, channels, coefficients.channels, values};
  with_activation(args.normalization.activation, [&](auto f) {
    using F = decltype(f);
    const auto term = backward_term<F>(args, coefficients.lanes.view());
    const auto map = apply_map<F>(args, coefficients.lanes.view());
    const Mapper to_dx = args.dx ? mapper(map) : Mapper{};
    if (planes) {
      if (!args.sum_dz) return map_all_planes(threads, s, to_dx, streams(args), nullptr);
      PlaneBackward steps(common);
      return reduce_then_map(threads, s, reducer(term), steps, to_dx, streams(args), inputs, kValues);
    }
    if (!args.sum_dz) return map_all_rows(threads, r, to_dx, streams(args), kValues, nullptr);
    RowBackward steps(common, coefficients);
    reduce_then_map(threads, r, reducer(term), steps, to_dx, streams(args), kValues);
  });
}

}  // namespace

extern const Kernels BATCHNORM_TABLE;
const Kernels BATCHNORM_TABLE = {train_forward, normalize, moments, backward};

}  // namespace BATCHNORM_NAMESPACE
