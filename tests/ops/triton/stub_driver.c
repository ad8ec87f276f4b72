/* A CUDA driver without a device, as libcuda.so.1: it loads every module, and counts launches instead of starting them.

The attributes are an H200's where Triton reads them, and 0 otherwise. The next load or launch fails after `stub_fail_next`. */

#include <stddef.h>

typedef int result;
typedef void *handle;

enum { SUCCESS = 0, INVALID_VALUE = 1, ILLEGAL_ADDRESS = 700 };

static long launches;
static result next;

long stub_launches(void) { return launches; }
void stub_fail_next(void) { next = ILLEGAL_ADDRESS; }

static result take_next(void) {
  result found = next;
  next = SUCCESS;
  return found;
}

static result launch(void) {
  result found = take_next();
  launches += found == SUCCESS;
  return found;
}

result cuLaunchKernelEx(const void *config, handle function, void **arguments, void **extra) { return launch(); }
result cuLaunchKernel(handle function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y,
                      unsigned block_z, unsigned shared, handle stream, void **arguments, void **extra) {
  return launch();
}

result cuInit(unsigned flags) { return SUCCESS; }
result cuDriverGetVersion(int *version) { return *version = 13000, SUCCESS; }
result cuDeviceGetCount(int *count) { return *count = 1, SUCCESS; }
result cuDeviceGet(int *device, int ordinal) { return *device = 0, SUCCESS; }

result cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;      /* lanes of a warp */
  case 12: *value = 65536; break;   /* registers of a block */
  case 16: *value = 132; break;     /* multiprocessors */
  case 75: *value = 9; break;       /* compute capability, major */
  case 81: *value = 233472; break;  /* shared memory of a multiprocessor */
  case 97: *value = 232448; break;  /* shared memory of a block, at most */
  default: *value = 0;
  }
  return SUCCESS;
}

result cuCtxGetCurrent(handle *context) { return *context = (handle)1, SUCCESS; }
result cuCtxGetDevice(int *device) { return *device = 0, SUCCESS; }
result cuStreamIsCapturing(handle stream, int *status) { return *status = 0, SUCCESS; }
result cuCtxSetCurrent(handle context) { return SUCCESS; }
result cuCtxGetLimit(size_t *value, int limit) { return *value = 0, SUCCESS; }
result cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
result cuDevicePrimaryCtxRetain(handle *context, int device) { return *context = (handle)1, SUCCESS; }

result cuModuleLoadData(handle *module, const void *image) { return *module = (handle)1, take_next(); }
result cuModuleGetFunction(handle *function, handle module, const char *name) {
  return *function = (handle)1, SUCCESS;
}
result cuModuleUnload(handle module) { return SUCCESS; }

result cuFuncGetAttribute(int *value, int attribute, handle function) {
  return *value = attribute == 0 ? 1024 : 0, SUCCESS; /* threads of a block, at most */
}
result cuFuncSetAttribute(handle function, int attribute, int value) { return SUCCESS; }
result cuFuncSetCacheConfig(handle function, int config) { return SUCCESS; }
result cuOccupancyMaxActiveClusters(int *clusters, handle function, const void *config) {
  return *clusters = 1, SUCCESS;
}

result cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;
  return SUCCESS;
}

result cuGetErrorString(result error, const char **text) {
  *text = error == ILLEGAL_ADDRESS ? "an illegal memory access was encountered" : "invalid argument";
  return SUCCESS;
}

result cuTensorMapEncodeTiled(void) { return INVALID_VALUE; }
result cuTensorMapEncodeIm2col(void) { return INVALID_VALUE; }
