/* A CUDA without a GPU, put before NVIDIA's libraries by LD_PRELOAD: fake.py builds it and says what for.
 *
 * There is one device, as FAKE_GPU_* in the environment describe it. Its memory is address space that is
 * never touched, so that torch's allocator counts and runs out as on a real one. Launches do nothing, and
 * copies to the host give zeros. Of what torch needs and isn't here, fake.py adds functions that return 0.
 */
#define _GNU_SOURCE
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
typedef cudaError_t E;
typedef cudaStream_t Stream;

static double number(const char *name) { return atof(getenv(name)); }
static size_t total(void) { return (size_t)(number("FAKE_GPU_GB") * (1ul << 30)); }
static int sm(void) { return (int)number("FAKE_GPU_SM"); }
static int shared(void) { return (int)number("FAKE_GPU_SHARED"); } /* of a block, at most */

/* ---- memory */
#define BLOCKS 65536
static struct { char *start; size_t size; } blocks[BLOCKS];
static int n_blocks;
static size_t used;

static int find(const void *p) {
    for (int i = 0; i < n_blocks; i++)
        if (blocks[i].start && (char *)p >= blocks[i].start && (char *)p < blocks[i].start + blocks[i].size)
            return i;
    return -1;
}

E cudaMalloc(void **p, size_t n) {
    int i = 0;
    n = n ? (n + 4095) & ~4095ul : 4096;
    while (i < n_blocks && blocks[i].start) i++;
    if (used + n > total() || i == BLOCKS) return cudaErrorMemoryAllocation;
    *p = mmap(0, n, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
    if (i == n_blocks) n_blocks++;
    blocks[i].start = *p;
    blocks[i].size = n;
    used += n;
    return 0;
}

E cudaFree(void *p) {
    int i = p ? find(p) : -1;
    if (i < 0) return 0;
    munmap(blocks[i].start, blocks[i].size);
    used -= blocks[i].size;
    blocks[i].start = 0;
    return 0;
}

E cudaMallocAsync(void **p, size_t n, Stream s) { return cudaMalloc(p, n); }
E cudaFreeAsync(void *p, Stream s) { return cudaFree(p); }
E cudaMemGetInfo(size_t *left, size_t *all) { *all = total(); *left = *all - used; return 0; }
E cudaHostAlloc(void **p, size_t n, unsigned flags) { *p = calloc(1, n ? n : 1); return 0; }
E cudaFreeHost(void *p) { free(p); return 0; }
E cudaMemset(void *p, int value, size_t n) { return 0; }
E cudaMemsetAsync(void *p, int value, size_t n, Stream s) { return 0; }
E cudaGetSymbolAddress(void **p, const void *symbol) { static char zeros[1 << 20]; *p = zeros; return 0; }

E cudaMemcpy(void *to, const void *from, size_t n, enum cudaMemcpyKind kind) {
    int on_device = find(to) >= 0;
    if (find(from) < 0) memcpy(to, from, n);
    else if (!on_device) memset(to, 0, n); /* nothing was computed */
    return 0;
}

E cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind k, Stream s) {
    return cudaMemcpy(to, from, n, k);
}

E cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    int on_device = find(p) >= 0;
    memset(a, 0, sizeof *a);
    a->type = on_device ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
    *(on_device ? &a->devicePointer : &a->hostPointer) = (void *)p;
    return 0;
}

/* ---- the device: numbers of attributes as in cuda.h */
static int attribute(int a) {
    switch (a) {
    case 1: return 1024; /* threads of a block */
    case 5: return 2147483647; /* blocks of a grid */
    case 8: return 49152; /* shared memory of a block, without asking for more */
    case 10: return 32; /* threads of a warp */
    case 12: case 82: return 65536; /* registers */
    case 16: return (int)number("FAKE_GPU_SMS");
    case 37: return 5120; /* bits of the memory's bus */
    case 38: return (sm() >= 90 ? 50 : 40) << 20; /* level 2 cache */
    case 39: return 2048; /* threads of a multiprocessor */
    case 75: return sm() / 10;
    case 76: return sm() % 10;
    case 81: return shared() + 1024; /* shared memory of a multiprocessor */
    case 97: return shared();
    default: return 0;
    }
}

E cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int device) { *value = attribute(a); return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = attribute(a); return 0; }

E cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    memset(p, 0, sizeof *p);
    strncpy(p->name, getenv("FAKE_GPU_NAME"), 255);
    p->major = sm() / 10;
    p->minor = sm() % 10;
    p->multiProcessorCount = attribute(16);
    p->totalGlobalMem = total();
    p->warpSize = 32;
    p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = attribute(5);
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->maxThreadsPerMultiProcessor = 2048;
    p->regsPerBlock = p->regsPerMultiprocessor = attribute(12);
    p->sharedMemPerBlock = attribute(8);
    p->sharedMemPerBlockOptin = shared();
    p->sharedMemPerMultiprocessor = attribute(81);
    p->l2CacheSize = attribute(38);
    p->memoryBusWidth = attribute(37);
    return 0;
}

/* ---- functions that only answer with a number in their first (0) or second (1) argument, or with a handle
 * that is never looked at; by another name in C, since the headers know what else they take */
#define ANSWER(name, arguments, answer) \
    int fake_##name arguments __asm__(#name); \
    int fake_##name arguments { answer; return 0; }
#define FIRST(name, number) ANSWER(name, (int *a), *a = number)
#define SECOND(name, number) ANSWER(name, (void *a, int *b), *b = number)
#define HANDLE(name) ANSWER(name, (void **a), *a = (void *)(next += 16))
static long next = 4096;

FIRST(cudaGetDeviceCount, 1) FIRST(cuDeviceGetCount, 1) FIRST(cudaGetDevice, 0) FIRST(cuDeviceGet, 0)
FIRST(cuCtxGetDevice, 0) FIRST(cudaDriverGetVersion, 13000) FIRST(cuDriverGetVersion, 13000)
FIRST(cudaDeviceCanAccessPeer, 0) FIRST(cuOccupancyMaxActiveBlocksPerMultiprocessor, 2)
FIRST(cudaOccupancyMaxActiveBlocksPerMultiprocessor, 2)
FIRST(cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags, 2)
SECOND(cudaStreamGetPriority, 0) SECOND(cudaStreamIsCapturing, 0) SECOND(cudaStreamGetCaptureInfo, 0)
SECOND(cublasGetMathMode, 0) SECOND(cublasGetPointerMode_v2, 0)
HANDLE(cudaStreamCreate) HANDLE(cudaStreamCreateWithPriority) HANDLE(cudaEventCreate)
HANDLE(cudaEventCreateWithFlags) HANDLE(cuCtxGetCurrent) HANDLE(cuDevicePrimaryCtxRetain) HANDLE(cuModuleLoad)
HANDLE(cuModuleLoadData) HANDLE(cuModuleLoadDataEx) HANDLE(cuModuleGetFunction) HANDLE(cublasCreate_v2)
HANDLE(cublasLtCreate) HANDLE(cudnnCreate) HANDLE(cublasLtMatmulDescCreate)
HANDLE(cublasLtMatmulPreferenceCreate) HANDLE(cublasLtMatrixLayoutCreate)
ANSWER(cudaDeviceGetStreamPriorityRange, (int *least, int *most), *least = 0; *most = -5)
ANSWER(cudaDeviceGetPCIBusId, (char *id, int n), snprintf(id, n, "0000:00:00.0"))
ANSWER(cuDevicePrimaryCtxGetState, (int d, unsigned *flags, int *active), *active = 1)
ANSWER(cudaEventElapsedTime, (float *ms), *ms = 1)
ANSWER(cudaLaunchHostFunc, (void *s, void (*f)(void *), void *data), f(data))
ANSWER(cudaStreamAddCallback, (void *s, void (*f)(void *, int, void *), void *data), f(s, 0, data))
ANSWER(__cudaGetKernel, (const void **kernel, const void *f), *kernel = f)
ANSWER(cuFuncGetAttribute, (int *value, int a), *value = a ? 0 : 1024)
ANSWER(cuPointerGetAttribute, (void **value, int a, void *p), *value = p)
ANSWER(cuGetErrorString, (int e, const char **text), *text = "no GPU")

E cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = sm();
    a->maxDynamicSharedSizeBytes = shared();
    return 0;
}

static int nothing(void) { return 0; }
E cudaGetDriverEntryPointByVersion(const char *name, void **f, unsigned version, unsigned long long flags,
                                   enum cudaDriverEntryPointQueryResult *result) {
    *f = dlsym(RTLD_DEFAULT, name);
    if (!*f) *f = (void *)nothing;
    if (result) *result = 0;
    return 0;
}

/* one way to multiply any matrices */
typedef struct { long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *l, void *d, void *A, void *B, void *C, void *D, void *preference,
                                   int asked, Heuristic *found, int *n) {
    memset(found, 0, sizeof *found);
    *n = 1;
    return 0;
}
