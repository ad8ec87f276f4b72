// The kernels of one dtype in one instruction set.
// Compiled once per BATCHNORM_CAPABILITY (a name) and BATCHNORM_TYPE (a type of simd.h).

#include "backward.h"
#include "forward.h"
#include "kernels.h"
#include "moments.h"
#include "whitening.h"

namespace BATCHNORM_NAMESPACE {

extern const Kernels BATCHNORM_TABLE;
const Kernels BATCHNORM_TABLE = {train_forward, normalize, moments, backward, whiten_products, whiten_map};

}  // namespace BATCHNORM_NAMESPACE
