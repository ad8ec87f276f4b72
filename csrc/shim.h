// Common code of the shims for torch and XLA: dtypes, activations by name, and a hint about memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string_view>

#include "kernels/kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace batchnorm {

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

inline DType statistics_of(DType x) { return x == DType::float64 ? DType::float64 : DType::float32; }

// Calls f with the values of statistics, which are float64 or float32.
template <class F>
auto with_statistics(DType dtype, void* data, const F& f) {
  return dtype == DType::float64 ? f(static_cast<double*>(data)) : f(static_cast<float*>(data));
}

inline bool all_finite(DType dtype, void* statistics, int64_t n) {
  return with_statistics(dtype, statistics, [n](const auto* values) {
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) finite &= std::isfinite(values[i]);
    return finite;
  });
}

inline std::optional<Activation> find_activation(std::string_view name) {
  for (int i = 0; i < kActivations; ++i) {
    if (name == kActivationNames[i]) return static_cast<Activation>(i);
  }
  return std::nullopt;
}

// Requests huge pages for a large result, so that new memory is faulted in 2 MB at a time. With 4 KB at a time, page
// faults would take longer than the computation. The request is only a hint, which the system may ignore.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < int64_t{8} << 20) return;
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge,
                  last = (begin + static_cast<uintptr_t>(bytes)) / kHuge * kHuge;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace batchnorm
