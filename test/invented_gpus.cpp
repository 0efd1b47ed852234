// Two GPUs that no machine has, and an NCCL that does not start: loaded before the CUDA runtime and NCCL (LD_PRELOAD),
// this library answers the questions of Cuda::start in their place, as the environment says. test_train.py has what
// follows.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

static int number(const char* name) { return getenv(name) ? atoi(getenv(name)) : 0; }
static cudaError_t error(const char* name) { return cudaError_t(number(name)); }

extern "C" {
cudaError_t cudaGetDeviceCount(int* count) { return *count = 2, cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int device) {
    memset(properties, 0, sizeof *properties);
    strcpy(properties->name, "Invented GPU");
    properties->uuid.bytes[0] = char(number("INVENTED_UUID") ? 1 : device);
    properties->major = number("INVENTED_MAJOR"), properties->minor = 5;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int, int) { return strcpy(id, "0000:17:00.0"), cudaSuccess; }
cudaError_t cudaSetDevice(int) { return error("INVENTED_CONTEXT"); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) { return error("INVENTED_KERNEL"); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t*, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t*, unsigned, int) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int*, int*) { return cudaSuccess; }
cudaError_t cudaMalloc(void**, size_t) { return error("INVENTED_MALLOC"); }
cudaError_t cudaMemGetInfo(size_t* available, size_t* total) { return *available = *total = 0, cudaSuccess; }
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }
int cublasLtCreate(void**) { return 0; }
struct NcclId {
    char bytes[128];
};
int ncclGetUniqueId(NcclId*) { return number("INVENTED_NCCL_ID"); }
// Rank 0 waits in it for the rank that has failed, as in the real one.
int ncclCommInitRank(void**, int, NcclId, int rank) {
    if (rank == 0 && getenv("INVENTED_NCCL_WAIT"))
        for (;;) pause();
    return number("INVENTED_NCCL_INIT");
}
}
