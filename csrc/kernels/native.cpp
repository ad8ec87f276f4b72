// Prints what BATCHNORM_CAPABILITIES=native stands for: the best instruction set of the processor that runs this
// program, and those that it takes kernels from. CMake runs it on x86-64.

#include <cstdio>

#include "processor.h"

int main() {
  using namespace batchnorm::processor;
  std::fputs(avx512_bf16() ? "avx512;avx512_bf16" : avx512() ? "avx512" : avx2() ? "avx2" : "baseline", stdout);
}
