// The kernels' interface: raw pointers and sizes, no torch.
//
// The same sources are compiled once per instruction set. `kernels()` returns the kernels of the set chosen at load.
#pragma once

#include <cstdint>

namespace batchnorm {

enum class DType : int { float64, float32, bfloat16, float16 };
inline constexpr int kDTypes = 4;

// The activations: X(name, the struct of activations.h that computes it).
#define BATCHNORM_ACTIVATIONS(X) \
  X(none, None)                  \
  X(relu, Relu)                  \
  X(relu6, Relu6)                \
  X(leaky_relu, LeakyRelu)       \
  X(silu, Silu)                  \
  X(gelu, Gelu)                  \
  X(hardswish, Hardswish)        \
  X(mish, Mish)                  \
  X(hardsigmoid, Hardsigmoid)    \
  X(tanh, Tanh)                  \
  X(sigmoid, Sigmoid)            \
  X(elu, Elu)

#define BATCHNORM_ENUMERATOR(name, type) name,
#define BATCHNORM_NAME(name, type) #name,
enum class Activation : int { BATCHNORM_ACTIVATIONS(BATCHNORM_ENUMERATOR) };
inline constexpr const char* kActivationNames[] = {BATCHNORM_ACTIVATIONS(BATCHNORM_NAME)};
inline constexpr int kActivations = sizeof kActivationNames / sizeof *kActivationNames;
#undef BATCHNORM_ENUMERATOR
#undef BATCHNORM_NAME

// The shape of x: n samples, c channels, s positions; dense in memory as [n, c, s], or [n, s, c] if channels_last.
struct Shape {
  int64_t n, c, s;
  bool channels_last;
  int64_t numel() const { return n * c * s; }
};

// A vector [c] (rows = 1), or rows [rows, c], from which `index` selects one per sample. data is null if it is absent.
struct Vector {
  const void* data = nullptr;
  DType dtype = DType::float32;
  int64_t rows = 1;
};

// The caller's thread pool. `run(begin, end, grain, body, context)` calls body(b, e, context) on parts.
struct Threads {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*run)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
  int64_t count;
};

// The affine map from x to z, and the activation, whose argument is z.
struct Normalization {
  Vector mean, mean_low, var, weight, bias;
  const int64_t* index = nullptr;  // [n]
  double eps = 0.0;
  Activation activation = Activation::none;
  double parameter = 0.0;  // negative_slope or alpha, if the activation has one
};

// Results are named as in the operator's schema. Statistics and sums are float64 for float64 x, else float32. Other
// tensors have x's dtype, unless a comment gives another.
struct TrainForward {
  Shape shape;
  const void* x;
  const void* residual;         // may be null
  Normalization normalization;  // weight and bias; the statistics are this operator's result
  void* y;
  void *mean, *mean_low, *var;  // [c], or [groups, c]
  int64_t groups = 0;              // 0: the statistics of all samples; otherwise, the index selects a sample's group
  const void* weights = nullptr;   // [n, s] in the statistics' dtype; x must then be finite
  double* count = nullptr;         // [2, groups]: Σ w and Σ w²; required with an index or weights, else null
};

struct Normalize {
  Shape shape;
  const void* x;
  const void* residual;  // may be null
  Normalization normalization;
  void* y;
};

struct Moments {
  Shape shape;
  const void* x;
  const int64_t* index;  // may be null
  const void* weights;   // [n, s] in the statistics' dtype; may be null
  int64_t groups;
  double* count;               // [groups]
  void *mean, *mean_low, *m2;  // [groups, c]
};

// All operators of the backward pass. The sums are computed if sum_dz is given, dx if dx is given.
struct Backward {
  Shape shape;
  const void* dy;
  const void* x;
  const void* residual;  // may be null
  const void* y;         // may be null; otherwise it determines the activation's derivative
  Normalization normalization;
  int64_t groups;                      // rows of the sums
  void *sum_dz, *sum_dz_xhat;          // [groups, c], or both null
  void* dx;                            // may be null
  void* dz;                            // may be null
  bool through_batch;                  // dx through the batch's statistics; its means are computed from the sums
  const double* count = nullptr;       // for these means: [rows of mean], Σ w; if null, that of the weights, or all
  Vector mean_dxhat, mean_dxhat_xhat;  // given means, if not through_batch; absent: the statistics are constants
  const void* weights;                 // [n, s] in the statistics' dtype, factors of the means; may be null
};

// Whitening: the channels are in groups of `size`, of which the last may be smaller. Matrices are [c, min(size, c)]: the
// rows of the groups' matrices; those of a smaller last group end in zeros.
struct WhitenProducts {
  Shape shape;
  int64_t size;
  const void* x;
  const void* mean;     // [c] in the statistics' dtype; may be null
  const void* dy;       // may be null
  const void* weights;  // [n, s] in the statistics' dtype; may be null, and must be with dy
  double* products;     // Σ left·(x - mean)ᵀ over positions, for left = dy, or otherwise weights·(x - mean)
  double* sums;         // [c]: Σ left
};

// y = weights·(matrices·(x - mean) + shift) + dy_matrices·dy
struct WhitenMap {
  Shape shape;
  int64_t size;
  const void* x;
  const void *mean, *matrices, *shift;  // in the statistics' dtype, as the weights and dy_matrices; mean may be null
  const void* weights;                  // [n, s]; may be null
  const void *dy, *dy_matrices;         // may both be null
  void* y;
};

struct Kernels {
  void (*train_forward)(const Threads&, const TrainForward&);
  void (*normalize)(const Threads&, const Normalize&);
  void (*moments)(const Threads&, const Moments&);
  void (*backward)(const Threads&, const Backward&);
  void (*whiten_products)(const Threads&, const WhitenProducts&);
  void (*whiten_map)(const Threads&, const WhitenMap&);
};

// Returns the kernels for x's dtype in the chosen instruction set.
const Kernels& kernels(DType dtype);

// Returns the name of the chosen instruction set, such as "avx2" or "baseline". Null if this build contains none that
// this processor has; the other functions must then not be called, except `capability_problem`.
const char* capability();

// Chooses an instruction set by name. Returns false if this build or this processor does not have it.
bool set_capability(const char* name);

// Returns the instruction sets that both this build and this processor have, best first, separated by spaces.
const char* capabilities();

// Returns why BATCHNORM_CPU_CAPABILITY was ignored, or why there is no instruction set; null if nothing is wrong.
const char* capability_problem();

}  // namespace batchnorm
