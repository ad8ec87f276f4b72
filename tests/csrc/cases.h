// The test cases: a table of shapes, dtypes, layouts and options, and random cases.
#pragma once

#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "buffer.h"

inline constexpr DType kAllDTypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};
inline constexpr const char* kDTypeNames[] = {"float64", "float32", "bfloat16", "float16"};

inline Activation activation_at(size_t i) { return static_cast<Activation>(i % kActivations); }
inline DType statistics(DType x) { return x == DType::float64 ? DType::float64 : DType::float32; }

enum class Values { normal, wide, offset, constant };

struct Case {
  Shape shape;
  DType dtype;
  Activation activation = Activation::none;
  Values values = Values::normal;
  double offset = 0.0;
  bool residual = false, y = false, weight = true, bias = true, parameters_as_x = false, dz = false;
  int64_t groups = 0;    // 0: no index
  bool shared = false;   // the statistics of all samples, although there is an index
  bool weights = false;  // some of them zero
  int64_t skip = 0;      // number of values before each tensor's first, which is then not aligned

  std::string name() const {
    std::ostringstream s;
    s << kDTypeNames[static_cast<int>(dtype)] << (shape.channels_last ? " [n, s, c] = [" : " [n, c, s] = [") << shape.n
      << ", " << (shape.channels_last ? shape.s : shape.c) << ", " << (shape.channels_last ? shape.c : shape.s) << "] "
      << kActivationNames[static_cast<int>(activation)];
    if (values != Values::normal) s << " values " << static_cast<int>(values) << " offset " << offset;
    if (residual) s << " residual";
    if (y) s << " y";
    if (!weight) s << " no_weight";
    if (!bias) s << " no_bias";
    if (parameters_as_x) s << " parameters_as_x";
    if (dz) s << " dz";
    if (groups) s << (shared ? " rows " : " groups ") << groups;
    if (weights) s << " weights";
    if (skip) s << " skip " << skip;
    return s.str();
  }
};

struct Random {
  std::mt19937_64 engine;
  double uniform(double low, double high) { return low + (high - low) * static_cast<double>(engine() >> 11) * 0x1p-53; }
  int64_t integer(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1));
  }
  double normal() { return std::sqrt(-2 * std::log(uniform(1e-12, 1))) * std::cos(2 * M_PI * uniform(0, 1)); }
  std::vector<double> normals(int64_t n) {
    std::vector<double> v(static_cast<size_t>(n));
    for (double& e : v) e = normal();
    return v;
  }
  std::vector<double> uniforms(int64_t n, double low, double high) {
    std::vector<double> v(static_cast<size_t>(n));
    for (double& e : v) e = uniform(low, high);
    return v;
  }
};

inline std::vector<Case> table() {
  constexpr int64_t kShapes[][3] = {
      // n, c, s: some rows are shorter than a vector, and some are not a multiple of a vector or of a part
      {16, 5, 1},  {300, 33, 1}, {4, 3, 7},     {3, 5, 49},    {2, 4, 60},   {2, 2, 24},    {1, 6, 45},
      {8, 1, 36},  {9, 1, 1},    {2, 3, 1},     {1, 7, 1},     {1, 1, 1},    {2, 2, 22650}, {1, 1, 40000},
      {3, 17, 45}, {2, 33, 60},  {40000, 1, 1}, {2, 5, 17030}, {700, 2, 25}, {64, 9, 1},    {4, 130, 49},
      {1, 300, 9}, {5, 64, 196}, {0, 3, 16},    {5, 3, 0},     {0, 3, 0},    {33, 16, 64},  {600, 130, 1},
      {5, 3, 2},   {2, 7, 3},    {3, 4, 5},     {1, 2, 16387}, {35, 32, 49}, {3, 64, 33},   {70, 96, 81},
      {7, 1029, 1}, {3, 1100, 3},
  };
  std::vector<Case> cases;
  Random random{std::mt19937_64(7)};
  auto one_in = [&](int64_t n) { return random.integer(1, n) == 1; };
  // If `grouped`, the case has an index, weights or both. Otherwise, it tests the fused passes.
  auto add = [&](const Shape& shape, DType dtype, bool grouped) {
    Case c{shape, dtype, activation_at(cases.size())};
    c.residual = one_in(3), c.weight = !one_in(5), c.bias = !one_in(5), c.dz = one_in(4);
    c.y = one_in(2) && c.activation < Activation::silu;  // the others need z for the derivative
    c.parameters_as_x = one_in(8), c.skip = one_in(2);
    if (grouped) {
      const int64_t which = random.integer(1, 3);
      c.groups = which == 1 ? 0 : one_in(2) ? 3 : 40;
      c.weights = which != 2;
      c.shared = c.groups && one_in(3);
    }
    cases.push_back(c);
  };
  for (const auto& [n, c, s] : kShapes) {
    for (DType dtype : kAllDTypes) {
      for (bool channels_last : {false, true}) {
        for (bool grouped : {false, true}) add({n, c, s, channels_last}, dtype, grouped);
      }
    }
  }
  for (DType dtype : kAllDTypes) {
    for (bool channels_last : {false, true}) {
      const Shape small{3, 5, 45, channels_last}, rows{37, 24, 1, channels_last};
      for (int i = 0; i < 3 * kActivations; ++i) {
        for (const Shape& shape : {small, rows}) {
          Case c{shape, dtype, activation_at(i)};
          c.residual = i / kActivations == 1, c.y = i / kActivations == 2 && c.activation < Activation::silu, c.dz = i % 2;
          cases.push_back(c);
        }
        Case c{small, dtype, activation_at(i), Values::wide};
        cases.push_back(c);
      }
      const bool half = dtype == DType::bfloat16 || dtype == DType::float16;
      for (double offset : {1e2, 1e4, 1e6}) {
        if (offset > 1e3 && half) continue;
        for (const Shape& shape : {Shape{4, 3, 256, channels_last}, Shape{34, 32, 49, channels_last}}) {
          cases.push_back({shape, dtype, {}, Values::offset, offset});
        }
      }
      cases.push_back({{4, 3, 64, channels_last}, dtype, {}, Values::constant});
    }
  }
  for (int i = 0; i < 400; ++i) {  // in separate statements, because compilers evaluate arguments in any order
    const bool flat = one_in(4), channels_last = one_in(2), grouped = one_in(2);
    const int64_t n = random.integer(1, flat ? 200 : 9), c = random.integer(1, 70), longest = one_in(4) ? 400 : 70;
    const int64_t s = flat ? 1 : random.integer(2, longest);
    const DType dtype = kAllDTypes[random.integer(0, 3)];
    add({n, c, s, channels_last}, dtype, grouped);
  }
  return cases;
}
