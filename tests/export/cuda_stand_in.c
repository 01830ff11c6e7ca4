/* CUDA's libraries without a GPU, as far as ONNX Runtime needs them to load its CUDA provider and to place a graph.
 *
 * Device memory is host memory, and kernels do nothing. Compiled together with an empty, weak function for every other
 * name that the provider asks for (test_cuda_placement.py), and found under the names of the real libraries.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { MAJOR = 9, MINOR = 0, MULTIPROCESSORS = 132 };
static const size_t memory = (size_t)80 << 30;
static uintptr_t handles = 0x1000;

static void *new_handle(void) { return (void *)(handles += 16); }

int cudaGetDeviceCount(int *count) { return *count = 1, 0; }
int cudaGetDevice(int *device) { return *device = 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaDriverGetVersion(int *version) { return *version = 13000, 0; }
int cudaRuntimeGetVersion(int *version) { return *version = 13000, 0; }

int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  switch (attribute) {
    case 1: *value = 1024; break;                         /* threads of a block */
    case 8: *value = 48 << 10; break;                     /* shared memory of a block */
    case 10: *value = 32; break;                          /* warp */
    case 16: *value = MULTIPROCESSORS; break;
    case 39: *value = 2048; break;                        /* threads of a multiprocessor */
    case 75: *value = MAJOR; break;
    case 76: *value = MINOR; break;
    case 81: case 97: *value = 227 << 10; break;          /* shared memory: multiprocessor, block that asks for it */
    default: *value = 1;
  }
  return 0;
}

int cudaMemGetInfo(size_t *free_bytes, size_t *total) { return *free_bytes = memory, *total = memory, 0; }
int cudaMalloc(void **at, size_t size) { return (*at = calloc(1, size + 256)) ? 0 : 2; }
int cudaMallocHost(void **at, size_t size) { return cudaMalloc(at, size); }
int cudaHostAlloc(void **at, size_t size, unsigned flags) { return (void)flags, cudaMalloc(at, size); }
int cudaFree(void *at) { return free(at), 0; }
int cudaFreeHost(void *at) { return free(at), 0; }
int cudaMemcpy(void *to, const void *from, size_t size, int kind) { return (void)kind, memcpy(to, from, size), 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
  return (void)stream, cudaMemcpy(to, from, size, kind);
}
int cudaMemset(void *at, int value, size_t size) { return memset(at, value, size), 0; }
int cudaMemsetAsync(void *at, int value, size_t size, void *stream) { return (void)stream, cudaMemset(at, value, size); }

int cudaStreamCreate(void **stream) { return *stream = new_handle(), 0; }
int cudaStreamCreateWithFlags(void **stream, unsigned flags) { return (void)flags, cudaStreamCreate(stream); }
int cudaStreamIsCapturing(void *stream, int *status) { return (void)stream, *status = 0; }
int cudaEventCreate(void **event) { return *event = new_handle(), 0; }
int cudaEventCreateWithFlags(void **event, unsigned flags) { return (void)flags, cudaEventCreate(event); }
const char *cudaGetErrorName(int error) { return (void)error, "none"; }
const char *cudaGetErrorString(int error) { return (void)error, "none"; }

void **__cudaRegisterFatBinary(void *code) {
  static void *registered[4];
  return (void)code, registered;
}
int __cudaGetKernel(void **kernel, void *function) { return *kernel = function, 0; }

int cublasCreate_v2(void **handle) { return *handle = new_handle(), 0; }
int cublasLtCreate(void **handle) { return *handle = new_handle(), 0; }
int cudnnCreate(void **handle) { return *handle = new_handle(), 0; }
size_t cudnnGetVersion(void) { return 91400; }
