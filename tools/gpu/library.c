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

E cudaMemcpyAsync(void *to, const void *from, size_t n, enum cudaMemcpyKind kind, Stream s) {
    return cudaMemcpy(to, from, n, kind);
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
    case 1: case 2: case 3: return 1024; /* threads of a block */
    case 4: return 64;
    case 5: return 2147483647;
    case 6: case 7: return 65535;
    case 8: return 49152; /* shared memory of a block, without asking for more */
    case 9: case 12: case 82: return 65536; /* registers */
    case 10: case 95: case 106: return a == 95 ? 1 : 32;
    case 13: return 1600000; /* kHz */
    case 14: return 512;
    case 16: return (int)number("FAKE_GPU_SMS");
    case 37: return 5120; /* bits of the memory's bus */
    case 38: return (sm() >= 90 ? 50 : 40) << 20; /* level 2 cache */
    case 39: return 2048; /* threads of a multiprocessor */
    case 41: return 1;
    case 75: return sm() / 10;
    case 76: return sm() % 10;
    case 81: return shared() + 1024;
    case 97: return shared();
    default: return 0;
    }
}

E cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr a, int device) { *value = attribute(a); return 0; }
E cudaGetDeviceCount(int *n) { *n = 1; return 0; }
E cudaGetDevice(int *device) { *device = 0; return 0; }
E cudaDriverGetVersion(int *version) { *version = 13000; return 0; }
E cudaDeviceGetStreamPriorityRange(int *least, int *most) { *least = 0; *most = -5; return 0; }
E cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return 0; }
E cudaDeviceGetPCIBusId(char *id, int n, int device) { snprintf(id, n, "0000:00:00.0"); return 0; }

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
    p->maxBlocksPerMultiProcessor = 32;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = attribute(8);
    p->sharedMemPerBlockOptin = shared();
    p->sharedMemPerMultiprocessor = attribute(81);
    p->l2CacheSize = attribute(38);
    p->totalConstMem = 65536;
    p->memoryBusWidth = attribute(37);
    p->textureAlignment = 512;
    p->unifiedAddressing = p->concurrentKernels = p->managedMemory = 1;
    return 0;
}

/* ---- handles of streams, events, modules and libraries: numbers that are never looked at */
static void *handle(void) { static long next = 4096; return (void *)(next += 16); }
E cudaStreamCreate(Stream *s) { *s = handle(); return 0; }
E cudaStreamCreateWithPriority(Stream *s, unsigned flags, int priority) { *s = handle(); return 0; }
E cudaStreamGetPriority(Stream s, int *priority) { *priority = 0; return 0; }
E cudaStreamIsCapturing(Stream s, enum cudaStreamCaptureStatus *status) { *status = 0; return 0; }
E cudaStreamGetCaptureInfo(Stream s, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                           cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                           size_t *n) {
    *status = 0;
    return 0;
}
E cudaEventCreate(cudaEvent_t *e) { *e = handle(); return 0; }
E cudaEventCreateWithFlags(cudaEvent_t *e, unsigned flags) { *e = handle(); return 0; }
E cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) { *ms = 1; return 0; }
E cudaLaunchHostFunc(Stream s, cudaHostFn_t f, void *data) { f(data); return 0; }
E cudaStreamAddCallback(Stream s, cudaStreamCallback_t f, void *data, unsigned n) { f(s, 0, data); return 0; }
E __cudaGetKernel(void **kernel, const void *f) { *kernel = (void *)f; return 0; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int b, size_t s) { *n = 2; return 0; }
E cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *f, int b, size_t s, unsigned x) {
    *n = 2;
    return 0;
}

E cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 64;
    a->ptxVersion = a->binaryVersion = sm();
    a->maxDynamicSharedSizeBytes = shared();
    return 0;
}

/* ---- the driver */
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return 0; }
CUresult cuDeviceGetCount(int *n) { *n = 1; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = attribute(a); return 0; }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned *flags, int *active) {
    if (flags) *flags = 0;
    *active = 1;
    return 0;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)16; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)16; return 0; }
CUresult cuCtxGetDevice(CUdevice *d) { *d = 0; return 0; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
CUresult cuModuleLoad(CUmodule *m, const char *file) { *m = handle(); return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = handle(); return 0; }
CUresult cuModuleLoadDataEx(CUmodule *m, const void *i, unsigned n, CUjit_option *o, void **v) {
    *m = handle();
    return 0;
}
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = handle(); return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = a ? 0 : 1024; return 0; }
CUresult cuPointerGetAttribute(void *v, CUpointer_attribute a, CUdeviceptr p) {
    *(CUdeviceptr *)v = p;
    return 0;
}
CUresult cuGetErrorString(CUresult e, const char **text) { *text = "no GPU"; return 0; }
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, CUfunction f, int b, size_t s) {
    *n = 2;
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

/* ---- cuBLAS and cuDNN: plans that say yes to everything */
int cublasCreate_v2(void **p) { *p = handle(); return 0; }
int cublasLtCreate(void **p) { *p = handle(); return 0; }
int cudnnCreate(void **p) { *p = handle(); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasLtMatmulDescCreate(void **p, int compute) { *p = handle(); return 0; }
int cublasLtMatmulPreferenceCreate(void **p) { *p = handle(); return 0; }
int cublasLtMatrixLayoutCreate(void **p, int type) { *p = handle(); return 0; }
typedef struct { long algorithm[8]; size_t workspace; int state; float waves; int reserved[4]; } Heuristic;
int cublasLtMatmulAlgoGetHeuristic(void *l, void *d, void *A, void *B, void *C, void *D, void *preference,
                                   int asked, Heuristic *found, int *n) {
    memset(found, 0, sizeof *found);
    *n = 1;
    return 0;
}
