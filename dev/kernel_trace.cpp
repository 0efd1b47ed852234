// When each kernel of a run began and how long it took, as the GPU's clock saw it: a library that the CUDA driver loads
// into
// ./train_gpt. scripts/profile_kernels.py run builds it, names it to the driver (CUDA_INJECTION64_PATH) and reads what
// it writes: KERNEL_TRACE, a CSV with the columns of `nsys stats --report cuda_gpu_trace`, whose format this shares.
//
// CUPTI collects the records while the program runs, at its own speed and clocks; of a CUDA graph, one for each kernel
// in it. https://docs.nvidia.com/cupti/ (activity API)
#include <cupti.h>
#include <cxxabi.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>

#define CUPTI_CHECK(call)                                           \
    do {                                                            \
        CUptiResult result_ = (call);                               \
        const char* why_ = "";                                      \
        if (result_ != CUPTI_SUCCESS) {                             \
            cuptiGetResultString(result_, &why_);                   \
            fprintf(stderr, "kernel_trace: %s: %s\n", #call, why_); \
            _exit(1);                                               \
        }                                                           \
    } while (0)

static FILE* out;
static std::mutex writing;  // buffers are handed back by a thread of CUPTI's, and by flush()

static void write(uint64_t start, uint64_t end, const std::string& name) {
    fprintf(out, "%llu,%llu,\"%s\"\n", (unsigned long long)start, (unsigned long long)(end - start), name.c_str());
}

static void CUPTIAPI request(uint8_t** buffer, size_t* bytes, size_t* most_records) {
    *bytes = size_t(8) << 20;
    *buffer = static_cast<uint8_t*>(aligned_alloc(8, *bytes));
    *most_records = 0;  // as many as fit
}

static void CUPTIAPI complete(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t bytes) {
    std::lock_guard<std::mutex> lock(writing);
    CUpti_Activity* record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, bytes, &record) == CUPTI_SUCCESS) {
        if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
            // The oldest layout that has these members at the places of all later ones
            const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
            int status = 0;
            char* plain = abi::__cxa_demangle(kernel->name, nullptr, nullptr, &status);
            write(kernel->start, kernel->end, status == 0 ? plain : kernel->name);
            free(plain);
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
            const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
            write(copy->start, copy->end, "[CUDA memcpy]");
        } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
            const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
            write(set->start, set->end, "[CUDA memset]");
        }
    }
    size_t dropped = 0;
    CUPTI_CHECK(cuptiActivityGetNumDroppedRecords(nullptr, 0, &dropped));
    if (dropped > 0) fprintf(stderr, "kernel_trace: %zu records were lost: the sums are too small\n", dropped);
    free(buffer);
}

static void flush() {
    CUPTI_CHECK(cuptiActivityFlushAll(0));
    std::lock_guard<std::mutex> lock(writing);
    if (fclose(out) != 0) perror("kernel_trace: KERNEL_TRACE");
}

extern "C" int InitializeInjection() {
    const char* path = getenv("KERNEL_TRACE");
    out = path ? fopen(path, "w") : nullptr;
    if (!out) {
        perror("kernel_trace: KERNEL_TRACE");
        _exit(1);
    }
    fprintf(out, "Start (ns),Duration (ns),Name\n");
    CUPTI_CHECK(cuptiActivityRegisterCallbacks(request, complete));
    for (CUpti_ActivityKind kind :
         {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL, CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET})
        CUPTI_CHECK(cuptiActivityEnable(kind));
    atexit(flush);
    return 1;
}
