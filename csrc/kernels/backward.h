// Sums and gradients of the backward pass. Statistics depend on the batch or are constants.
#pragma once

#include "forward.h"

namespace BATCHNORM_NAMESPACE {
namespace {

// Computes the operator's sums from Σ dz and Σ dz·(x - mean). If statistics depend on the batch, also computes the
// coefficients of dx.
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
  bool finish(int64_t c, const WideSums& sums, bool) override {
    steps.one(c, sum_lanes(sums.u), sum_lanes(sums.uv));
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
    lanes.spread_slope_constant();
    return false;
  }
};

// Coefficients of dx for given means, in the same row layout as mean, scale and shift.
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

// With an index or weights: computes sums per group and dx in separate passes.
template <class F>
void grouped_backward(const Threads& threads, const Backward& args, const Channels<T>& channels,
                      const CoefficientRows& rows, const Coefficients<A>& coefficients, Scratch& scratch) {
  const Shape& s = args.shape;
  const bool planes = in_planes(s, true);
  const RowShape r = row_shape<T>(s, true);
  if (args.sum_dz) {
    const int64_t* groups = args.normalization.index;
    const auto term = backward_term<F>(args, coefficients);
    const int64_t all = args.groups * s.c;
    double *u = scratch.get<double>(all), *uv = scratch.get<double>(all);
    for (int64_t i = 0; i < all; ++i) u[i] = uv[i] = 0.0;
    if (planes) {
      reduce_grouped_planes(threads, s, reducer(term), rows.of_sample, groups, kValues, u, uv);
    } else {
      reduce_grouped_rows(threads, r, reducer(term), rows.of_sample, groups, args.groups, u, uv);
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
  const RowShape r = planes ? RowShape{s.c, 1, 0, s.c, 1, 1} : row_shape<T>(s, false);
  LaneCoefficients coefficients(r, scratch);
  fill_coefficients(channels, rows, s.c, coefficients.channels);
  coefficients.spread_mean_scale_shift();
  if (args.mean_dxhat.data) {
    fill_given_means(args, channels, rows, s.c, coefficients.channels, scratch);
    coefficients.spread_slope_constant();
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
}  // namespace BATCHNORM_NAMESPACE
