// The instruction sets of the processor. Each needs all that its compiler options allow (CMakeLists.txt).
#pragma once

#if defined(__x86_64__) || defined(_M_X64)
namespace batchnorm::processor {

inline bool avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

inline bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("fma");
}

inline bool avx512_bf16() { return __builtin_cpu_supports("avx512bf16") && avx512(); }

}  // namespace batchnorm::processor
#endif
