// Compares the kernels of whitening with their definition.
#pragma once

#include "compare.h"

// Additions in sequence of one product: those of a vector's lane in a block, of at most 1024 positions.
inline constexpr double kProductRoundings = 64.0;

inline void check_whitening(const Case& c, const Inputs& in, const Held& x, const Held& dy, Random& random) {
  const DType wide = statistics(c.dtype);
  const int64_t sizes[] = {1, 3, 16, 64}, size = sizes[random.integer(0, 3)], channels = c.shape.c;
  const int64_t columns = std::min(size, channels), m = c.shape.n * c.shape.s;
  const bool with_dy = c.dz, with_weights = c.weights;
  std::vector<double> centers(channels);
  for (int64_t k = 0; k < channels && m > 0; ++k) centers[k] = x.values[c.shape.channels_last ? k : k * c.shape.s];
  auto matrix = [&] {  // with zeros at the end of the rows of a smaller last group
    std::vector<double> values = random.normals(channels * columns);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = 0; j < columns; ++j) values[i * columns + j] *= i / size * size + j < channels;
    }
    return values;
  };
  const Held mean(wide, centers, c.skip), matrices(wide, matrix(), c.skip), of_dy(wide, matrix(), c.skip);
  const Held shift(wide, random.normals(channels), c.skip), weights(wide, in.position_weights, c.skip);

  std::vector<int64_t> at(channels * m);  // where a channel's values are in memory
  in.each([&](int64_t i, int64_t n, int64_t k, int64_t p) { at[k * m + n * c.shape.s + p] = i; });
  auto deviation = [&](int64_t k, int64_t p) { return x.values[at[k * m + p]] - mean.values[k]; };
  auto weight = [&](int64_t p) { return with_weights ? weights.values[p] : 1.0; };
  const double roundings = unit(wide) * kProductRoundings;

  for (const bool of_gradient : {false, true}) {
    auto left = [&](int64_t k, int64_t p) {
      return of_gradient ? dy.values[at[k * m + p]] : weight(p) * deviation(k, p);
    };
    Result products, sums;
    products.resize(channels * columns), sums.resize(channels);
    for (int64_t i = 0; i < channels; ++i) {
      for (int64_t j = -1; j < columns && i / size * size + j < channels; ++j) {
        Sum sum;
        double magnitude = 0.0;
        for (int64_t p = 0; p < m; ++p) {
          const double term = left(i, p) * (j < 0 ? 1.0 : deviation(i / size * size + j, p));
          sum.add(term), magnitude += std::abs(term);
        }
        Result& to = j < 0 ? sums : products;
        const int64_t index = j < 0 ? i : i * columns + j;
        to.value[index] = sum.value(), to.tolerance[index] = roundings * magnitude;
      }
    }
    check(c, of_gradient ? "whiten_products dy" : "whiten_products",
          {{"products", DType::float64, channels * columns, &products}, {"sums", DType::float64, channels, &sums}},
          [&](const Kernels& k, const Threads& threads, const Pointers& out) {
            k.whiten_products(threads, {c.shape, size, x.data(), mean.data(), dy.data(of_gradient),
                                        weights.data(with_weights && !of_gradient), static_cast<double*>(out[0]),
                                        static_cast<double*>(out[1])});
          });
  }

  Result y;
  y.resize(channels * m);
  for (int64_t i = 0; i < channels; ++i) {
    for (int64_t p = 0; p < m; ++p) {
      double value = weight(p) * shift.values[i], magnitude = std::abs(value);
      auto add = [&](double term) { value += term, magnitude += std::abs(term); };
      for (int64_t j = 0; j < columns && i / size * size + j < channels; ++j) {
        const int64_t k = i / size * size + j;
        add(weight(p) * matrices.values[i * columns + j] * deviation(k, p));
        if (with_dy) add(of_dy.values[i * columns + j] * dy.values[at[k * m + p]]);
      }
      y.value[at[i * m + p]] = value, y.tolerance[at[i * m + p]] = roundings * magnitude;
    }
  }
  y.stored_as(c.dtype);
  check(c, "whiten_map", {{"y", c.dtype, channels * m, &y}},
        [&](const Kernels& k, const Threads& threads, const Pointers& out) {
          k.whiten_map(threads, {c.shape, size, x.data(), mean.data(), matrices.data(), shift.data(),
                                 weights.data(with_weights), dy.data(with_dy), of_dy.data(with_dy), out[0]});
        });
}
