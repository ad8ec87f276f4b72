// Sums and gradients of the backward pass. Statistics depend on the batch or are constants.
#pragma once

#include "forward.h"

namespace BATCHNORM_NAMESPACE {
namespace {

// Fills the coefficients of dx for channel k in one row, from the means of dx̂ and dx̂·x̂.
void fill_means(const Channels<T>& channels, const CoefficientRows& rows, int64_t c, int64_t row, int64_t k,
                double mean_dxhat, double mean_dxhat_xhat, const CoefficientArrays<A>& into) {
  const int64_t from = rows.source(row);
  const double invstd = channels.invstd(from, k), slope = invstd * invstd * mean_dxhat_xhat;
  into.slope[row * c + k] = static_cast<A>(slope);
  into.constant[row * c + k] = channels.constant(from, k, invstd * mean_dxhat, slope);
}

void fill_given_means(const Backward& args, const Channels<T>& channels, const CoefficientRows& rows, int64_t c,
                      const CoefficientArrays<A>& into, Scratch& scratch) {
  const Wide dxhat(args.mean_dxhat, c, 0.0, scratch), dxhat_xhat(args.mean_dxhat_xhat, c, 0.0, scratch);
  for (int64_t row = 0; row < rows.count; ++row) {
    const int64_t from = rows.source(row);
    for (int64_t k = 0; k < c; ++k) {
      fill_means(channels, rows, c, row, k, dxhat.get(from, k), dxhat_xhat.get(from, k), into);
    }
  }
}

// Computes the operator's sums from Σ dz and Σ dz·(x - mean). If statistics depend on the batch, also computes the
// coefficients of dx.
struct BackwardSteps final : PlaneSteps, RowSteps {
  const Backward& args;
  const Channels<T>& channels;
  const CoefficientRows& rows;
  LaneCoefficients& coefficients;
  const int64_t c, known, statistics;    // channels; rows that statistics have, and their number
  const double* count;                   // Σ w of each row of statistics; null if all values count
  double counted = 0.0;
  double *dxhat, *dxhat_xhat = nullptr;  // [statistics, c]: Σ dx̂ and Σ dx̂·x̂

  BackwardSteps(const Backward& args_, const Channels<T>& channels_, const CoefficientRows& rows_,
                LaneCoefficients& coefficients_, Scratch& scratch)
      : args(args_),
        channels(channels_),
        rows(rows_),
        coefficients(coefficients_),
        c(args.shape.c),
        known(channels.rows()),
        statistics(channels.mean.rows()),
        count(args.count),
        dxhat(scratch.get<double>(args.through_batch ? 2 * statistics * c : 0)) {
    if (!args.through_batch) return;
    dxhat_xhat = dxhat + statistics * c;
    for (int64_t i = 0; i < 2 * statistics * c; ++i) dxhat[i] = 0.0;
    if (count || !args.weights) return;
    double squares = 0.0;
    for (int64_t n = 0; n < args.shape.n; ++n) {
      add_weights(args.shape, static_cast<const A*>(args.weights), n, 0, args.shape.s, counted, squares);
    }
    count = &counted;
  }
  BackwardSteps(const BackwardSteps&) = delete;  // count may point into this object

  bool finish(int64_t k, const SumsByGroup& sums, bool) override {
    for (int64_t g = 0; g < args.groups; ++g) add(g, k, sums.u(g), sums.uv(g));
    if (args.through_batch) fill_channel(k);
    return false;
  }
  bool finish(double* u, double* uv, bool) override {
    fold(coefficients.shape, u), fold(coefficients.shape, uv);
    for (int64_t g = 0; g < args.groups; ++g) {
      for (int64_t k = 0; k < c; ++k) add(g, k, u[g * c + k], uv[g * c + k]);
    }
    for (int64_t k = 0; args.through_batch && k < c; ++k) fill_channel(k);
    coefficients.spread_slope_constant();
    return false;
  }

 private:
  void add(int64_t g, int64_t k, double sum_dz, double sum_dz_deviation) {
    // A group without samples may have no row of statistics.
    const double sum_dz_xhat = g < known ? channels.sum_dz_xhat(g, k, sum_dz, sum_dz_deviation) : 0.0;
    static_cast<A*>(args.sum_dz)[g * c + k] = static_cast<A>(sum_dz);
    static_cast<A*>(args.sum_dz_xhat)[g * c + k] = static_cast<A>(sum_dz_xhat);
    if (!args.through_batch) return;
    const int64_t i = (statistics > 1 ? g * c : 0) + k;
    dxhat[i] += channels.weight.get(g, k) * stored(sum_dz);
    dxhat_xhat[i] += channels.weight.get(g, k) * stored(sum_dz_xhat);
  }
  // In parts, sums and means have the bits of those that are stored between the halves.
  double stored(double v) const { return count ? static_cast<double>(static_cast<A>(v)) : v; }
  void fill_channel(int64_t k) {
    for (int64_t row = 0; row < rows.count; ++row) {
      const int64_t from = statistics > 1 ? rows.source(row) : 0, i = from * c + k;
      const double values = count ? count[from] : static_cast<double>(args.shape.n * args.shape.s);
      auto mean = [&](double sum) { return values > 0.0 ? stored(sum / values) : 0.0; };  // no value: constants
      fill_means(channels, rows, c, row, k, mean(dxhat[i]), mean(dxhat_xhat[i]), coefficients.channels);
    }
  }
};

template <class F>
BackwardTerm<T, F> backward_term(const Backward& args, const Coefficients<A>& coefficients) {
  return {static_cast<const T*>(args.dy),
          static_cast<const T*>(args.x),
          static_cast<const T*>(args.residual),
          static_cast<const T*>(args.y),
          coefficients,
          static_cast<A>(args.normalization.parameter)};
}

template <class F>
ApplyMap<T, F> apply_map(const Backward& args, const Coefficients<A>& coefficients) {
  return {backward_term<F>(args, coefficients),
          static_cast<T*>(args.dx),
          static_cast<T*>(args.dz),
          args.through_batch || args.mean_dxhat.data != nullptr,
          static_cast<const A*>(args.weights),
          coefficients};
}

bool streams(const Backward& args) {
  auto phase = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 64; };
  return streams(args.shape) && (!args.dz || phase(args.dz) == phase(args.dx));
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
  const bool whole = args.normalization.index;
  const int inputs = 2 + (args.residual != nullptr || args.y != nullptr);
  const bool planes = in_planes(s, whole);
  const RowShape r = planes ? RowShape{s.c, 1, 0, s.c, 1, 1} : row_shape<T>(s, whole);
  // The map needs whole rows for weights. The sums do not, and have the bits of sums without a map.
  const bool apart = args.weights && !planes && !r.one_to_one();
  LaneCoefficients coefficients(r, scratch, rows.count);
  fill_coefficients(channels, rows, s.c, coefficients.channels);
  coefficients.spread_mean_scale_shift();
  if (args.mean_dxhat.data) {
    fill_given_means(args, channels, rows, s.c, coefficients.channels, scratch);
    coefficients.spread_slope_constant();
  }
  BackwardSteps steps(args, channels, rows, coefficients, scratch);
  const Samples by{args.groups, args.normalization.index, rows.of_sample, rows.of_sample};
  with_activation(args.normalization.activation, [&](auto f) {
    using F = decltype(f);
    const auto term = backward_term<F>(args, coefficients.lanes.view());
    const auto map = apply_map<F>(args, (apart ? coefficients.channels : coefficients.lanes).view());
    const Mapper to_dx = args.dx ? mapper(map) : Mapper{}, with_sums = apart ? Mapper{} : to_dx;
    if (planes) {
      if (!args.sum_dz) return map_all_planes(threads, s, to_dx, streams(args), by.mapped);
      return reduce_then_map(threads, s, reducer(term), steps, to_dx, streams(args), inputs, kValues, by);
    }
    if (args.sum_dz) reduce_then_map(threads, r, reducer(term), steps, with_sums, streams(args), kValues, by);
    if (apart) return map_all(threads, s, to_dx, streams(args), by.mapped);
    if (!args.sum_dz) map_all_rows(threads, r, to_dx, streams(args), kValues, by.mapped);
  });
}

}  // namespace
}  // namespace BATCHNORM_NAMESPACE
