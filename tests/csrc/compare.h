// Calls a kernel in every instruction set that this processor has, with one thread and with three, whose results must
// have the same bits. Compares the results with the oracle.
#pragma once

#include <algorithm>
#include <cstdio>
#include <functional>
#include <sstream>
#include <string>
#include <thread>

#include "cases.h"
#include "oracle.h"

// Divides a loop as torch does: one part per thread, none smaller than the grain.
template <int threads>
void run(int64_t begin, int64_t end, int64_t grain, Threads::Body body, void* context) {
  const int64_t part = std::max<int64_t>((end - begin + threads - 1) / threads, std::max<int64_t>(grain, 1));
  std::vector<std::thread> others;
  for (int64_t b = begin + part; b < end; b += part) {
    others.emplace_back([=] { body(b, std::min(b + part, end), context); });
  }
  body(begin, std::min(begin + part, end), context);
  for (std::thread& other : others) other.join();
}
inline constexpr Threads kThreads[] = {{run<1>, 1}, {run<3>, 3}};

inline int64_t passed = 0, failed = 0;
inline double worst = 0.0;
inline std::string worst_where;

inline void judge(const std::string& where, const std::string& problem) {
  if (problem.empty()) {
    ++passed;
  } else if (++failed <= 50) {
    std::printf("FAILED %s: %s\n", where.c_str(), problem.c_str());
  }
}

inline std::string compare(const std::string& where, const char* name, const std::vector<double>& got,
                           const Result& expected) {
  int64_t wrong = 0, first = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(got[i] - expected.value[i]);
    if (error > 0.0 && error / expected.tolerance[i] > worst) {
      worst = error / expected.tolerance[i], worst_where = where + " " + name;
    }
    if (error <= expected.tolerance[i]) continue;  // false for NaN
    if (wrong++ == 0) first = static_cast<int64_t>(i);
  }
  if (wrong == 0) return "";
  char text[256];
  std::snprintf(text, sizeof text, "%s[%lld] is %.17g, expected %.17g within %.3g; %lld of %lld wrong", name,
                static_cast<long long>(first), got[first], expected.value[first], expected.tolerance[first],
                static_cast<long long>(wrong), static_cast<long long>(got.size()));
  return text;
}

struct Output {
  const char* name;
  DType dtype;
  int64_t count;
  const Result* expected;  // null: this is the low part of the previous output, and their sum is compared
};

using Pointers = std::vector<void*>;
using Call = std::function<void(const Kernels&, const Threads&, const Pointers&)>;

inline std::vector<std::string> capability_names() {
  std::istringstream all(capabilities());
  std::vector<std::string> names;
  for (std::string name; all >> name;) names.push_back(name);
  return names;
}

// Calls a kernel with every instruction set and number of threads, and compares its results. If `chosen` is given, only
// these values are compared.
inline void check(const Case& c, const char* kernel, const std::vector<Output>& outputs, const Call& call,
                  const std::vector<int64_t>* chosen = nullptr) {
  for (const std::string& capability : capability_names()) {
    set_capability(capability.c_str());
    const std::string where = capability + " " + kernel + " " + c.name();
    std::vector<std::vector<Buffer>> written;
    for (const Threads& threads : kThreads) {
      std::vector<Buffer>& buffers = written.emplace_back();
      Pointers pointers;
      for (const Output& output : outputs) {
        buffers.emplace_back(output.dtype, output.count, c.skip).poison();
        pointers.push_back(buffers.back().data());
      }
      call(kernels(c.dtype), threads, pointers);
    }
    std::string problem;
    for (size_t o = 0; o < outputs.size() && problem.empty(); ++o) {
      if (!written[0][o].same_bits(written[1][o])) problem = std::string(outputs[o].name) + " depends on the threads";
      if (!outputs[o].expected || !problem.empty()) continue;
      std::vector<double> got;
      if (chosen && outputs[o].count == c.shape.numel()) {
        for (int64_t i : *chosen) got.push_back(written[0][o].get(i));
      } else {
        got = written[0][o].values();
      }
      if (o + 1 < outputs.size() && !outputs[o + 1].expected) {
        for (size_t i = 0; i < got.size(); ++i) {
          if (got[i] != rounded(c.dtype, got[i])) problem = std::string(outputs[o].name) + " is not of x's precision";
          got[i] += written[0][o + 1].get(static_cast<int64_t>(i));
        }
      }
      if (problem.empty()) problem = compare(where, outputs[o].name, got, *outputs[o].expected);
    }
    judge(where, problem);
  }
}
