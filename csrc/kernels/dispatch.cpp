// Chooses the instruction set at load: the best one of build and processor, or BATCHNORM_CPU_CAPABILITY.
// The build defines BATCHNORM_WITH_<instruction set> for each one that it contains.

#include <cstdlib>
#include <cstring>
#include <string>

#include "export.h"
#include "kernels.h"
#include "processor.h"

namespace batchnorm {

#define BATCHNORM_DECLARE(capability)    \
  namespace capability {                 \
  extern const Kernels float64_kernels;  \
  extern const Kernels float32_kernels;  \
  extern const Kernels bfloat16_kernels; \
  extern const Kernels float16_kernels;  \
  }
BATCHNORM_DECLARE(avx512_bf16)
BATCHNORM_DECLARE(avx512)
BATCHNORM_DECLARE(avx2)
BATCHNORM_DECLARE(neon)
BATCHNORM_DECLARE(baseline)

namespace {

struct Set {
  const char* name;
  bool (*supported)();
  const Kernels* tables[kDTypes];
};

#define BATCHNORM_TABLES(capability)                                                           \
  {                                                                                            \
    &capability::float64_kernels, &capability::float32_kernels, &capability::bfloat16_kernels, \
        &capability::float16_kernels                                                           \
  }

// Best first.
const Set kSets[] = {
#if defined(BATCHNORM_WITH_avx512_bf16)
    {"avx512_bf16",
     processor::avx512_bf16,
     {&avx512::float64_kernels, &avx512::float32_kernels, &avx512_bf16::bfloat16_kernels, &avx512::float16_kernels}},
#endif
#if defined(BATCHNORM_WITH_avx512)
    {"avx512", processor::avx512, BATCHNORM_TABLES(avx512)},
#endif
#if defined(BATCHNORM_WITH_avx2)
    {"avx2", processor::avx2, BATCHNORM_TABLES(avx2)},
#endif
#if defined(BATCHNORM_WITH_neon)
    {"neon", [] { return true; }, BATCHNORM_TABLES(neon)},
#endif
#if defined(BATCHNORM_WITH_baseline)
    {"baseline", [] { return true; }, BATCHNORM_TABLES(baseline)},
#endif
};

struct Choice {
  const Set* set = nullptr;  // null: the build contains none that the processor has
  std::string available, problem;

  Choice() {
    std::string built;
    for (const Set& s : kSets) {
      built.append(built.empty() ? "" : ", ").append(s.name);
      if (!s.supported()) continue;
      if (!set) set = &s;
      available.append(available.empty() ? "" : " ").append(s.name);
    }
    if (!set) {
      problem.append("they are built for ").append(built).append(", which this processor does not have");
      return;
    }
    const char* wanted = std::getenv("BATCHNORM_CPU_CAPABILITY");
    if (wanted && *wanted && !choose(wanted)) {
      problem.append("BATCHNORM_CPU_CAPABILITY must name an instruction set that this build and this processor have (")
          .append(available)
          .append("), got '")
          .append(wanted)
          .append("'. Using ")
          .append(set->name)
          .append(".");
    }
  }
  bool choose(const char* name) {
    for (const Set& s : kSets) {
      if (std::strcmp(s.name, name) == 0 && s.supported()) {
        set = &s;
        return true;
      }
    }
    return false;
  }
};

Choice& choice() {
  static Choice chosen;
  return chosen;
}

}  // namespace

BATCHNORM_VISIBLE const Kernels& kernels(DType dtype) { return *choice().set->tables[static_cast<int>(dtype)]; }
const char* capability() { return choice().set ? choice().set->name : nullptr; }
bool set_capability(const char* name) { return choice().choose(name); }
const char* capabilities() { return choice().available.c_str(); }
const char* capability_problem() { return choice().problem.empty() ? nullptr : choice().problem.c_str(); }

}  // namespace batchnorm

// Called from Python: batchnorm/compiled.py.
BATCHNORM_EXPORT const char* batchnorm_capability() { return batchnorm::capability(); }
BATCHNORM_EXPORT const char* batchnorm_capabilities() { return batchnorm::capabilities(); }
BATCHNORM_EXPORT const char* batchnorm_capability_problem() { return batchnorm::capability_problem(); }
BATCHNORM_EXPORT int batchnorm_set_capability(const char* name) { return batchnorm::set_capability(name); }
