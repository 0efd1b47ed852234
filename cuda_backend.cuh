// cuda_backend.cuh: struct Cuda, the GPU half of the seam. What is here: memory, events, the device, and the model's
// matrix products on cuBLASLt. What it inherits: the hand-written kernels (gpt_kernels.cuh, attention.cuh,
// ns_kernels.cuh) and the collectives (comm.h). Everything is enqueued on the one stream `cuda_stream`; only
// synchronize() waits for it. Every operation, with its shapes: backend.h; its twin is struct Cpu (cpu_backend.h).
#pragma once
#include <cublasLt.h>

#include <cstring>
#include <map>
#include <tuple>

#include "backend.h"
#include "comm.h"
#include "common.h"
#include "kernels/attention.cuh"
#include "kernels/cuda_common.cuh"
#include "kernels/gpt_kernels.cuh"
#include "ns_kernels.cuh"

#define CUBLAS_CHECK(call)                                                                      \
    do {                                                                                        \
        cublasStatus_t status_ = (call);                                                        \
        if (status_ != CUBLAS_STATUS_SUCCESS)                                                   \
            fail("%s:%d: %s: %s", __FILE__, __LINE__, #call, cublasLtGetStatusString(status_)); \
    } while (0)

// ---------------------------------------------------------------------------------------------------------------------
// Memory, events, the device

struct CudaRuntime {
    using real = ::real;
    static constexpr const char* kBackendName = sizeof(real) == 4 ? "cuda fp32" : "cuda bf16";

    // An empty string if as many GPUs can be used, else why not. cudaGetDeviceCount leaves its argument untouched
    // without a driver, so the return code decides.
    static std::string unavailable(int wanted) {
        int devices = 0;
        cudaError_t error = cudaGetDeviceCount(&devices);
        if (error != cudaSuccess) return cudaGetErrorString(error);
        if (devices == 0) return "no CUDA device";
        return devices >= wanted ? "" : strprintf("%d are wanted and %d are here", wanted, devices);
    }

    // A rank sees all GPUs of its machine, or (Slurm's --gpus-per-task, CUDA_VISIBLE_DEVICES) its own alone. Numbers
    // say nothing then: ranks share a GPU if its UUID is the same.
    static void start(const World& r) {
        int devices = 0;
        CUDA_CHECK(cudaGetDeviceCount(&devices));
        const int device = r.local_rank % devices;
        CUDA_CHECK(cudaGetDeviceProperties(&properties(), device));
        const std::string shared = shared_device(gather_host(device_id(device)));
        if (!shared.empty()) fail("%s: start at most one rank per GPU", shared.c_str());
        CUDA_CHECK(cudaSetDevice(device));
        CUDA_CHECK(cudaStreamCreateWithFlags(&cuda_stream, cudaStreamNonBlocking));
    }

    // "GPU-1b9f... (0000:17:00.0 on node7)"
    static std::string device_id(int device) {
        char bus[32] = "", host[256] = "";
        CUDA_CHECK(cudaDeviceGetPCIBusId(bus, sizeof bus, device));
        gethostname(host, sizeof host - 1);
        std::string id = "GPU-";
        for (char byte : properties().uuid.bytes) id += strprintf("%02x", unsigned(uint8_t(byte)));
        return strprintf("%s (%s on %s)", id.c_str(), bus, host);
    }

    static void stop() {
        CUDA_CHECK(cudaStreamDestroy(cuda_stream));
        cuda_stream = nullptr;
    }

    static cudaDeviceProp& properties() {
        static cudaDeviceProp device_properties;
        return device_properties;
    }
    static std::string device_name() { return properties().name; }

    // Dense peak of the tensor cores in FLOP/s (vendors' datasheets, bf16 with fp32 accumulation); 0 if unknown. In the
    // fp32 build no tensor core runs, so no utilisation is reported.
    static double peak_flops() {
#ifndef PRECISION_FP32
        static const std::pair<const char*, double> known[] = {
            {"H100 PCIe", 756e12}, {"H100 NVL", 835e12}, {"H100", 989e12},     {"H200", 989e12},    {"A100", 312e12},
            {"A800", 312e12},      {"L40S", 362e12},     {"RTX 4090", 165e12}, {"RTX 3090", 71e12},
        };
        for (auto& [name, flops] : known)
            if (strstr(properties().name, name)) return flops;
#endif
        return 0;
    }

    static size_t memory_available() {
        size_t free = 0, total = 0;
        CUDA_CHECK(cudaMemGetInfo(&free, &total));
        return free;
    }

    static void* alloc(size_t bytes, const char* what) {
        void* memory = nullptr;
        cudaError_t error = cudaMalloc(&memory, bytes > 0 ? bytes : 1);
        if (error != cudaSuccess)
            fail("no GPU memory for %s (%.1f MiB, %.1f MiB free): %s", what, bytes / 1048576.0,
                 memory_available() / 1048576.0, cudaGetErrorString(error));
        zero(memory, bytes);
        return memory;
    }

    static void* alloc_host(size_t bytes) {
        void* memory = nullptr;
        CUDA_CHECK(cudaMallocHost(&memory, bytes > 0 ? bytes : 1));
        memset(memory, 0, bytes);
        return memory;
    }

    static void upload(void* dst, const void* src, size_t bytes) {
        CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, cuda_stream));
    }
    static void download(void* dst, const void* src, size_t bytes) {
        CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, cuda_stream));
    }
    static void copy(void* dst, const void* src, size_t bytes) {
        CUDA_CHECK(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, cuda_stream));
    }
    static void zero(void* dst, size_t bytes) { CUDA_CHECK(cudaMemsetAsync(dst, 0, bytes, cuda_stream)); }
    static void synchronize() { CUDA_CHECK(cudaStreamSynchronize(cuda_stream)); }

    // A point in the stream: done() says whether the device has passed it, ms(a, b) the device time between two of
    // them.
    struct Event {
        cudaEvent_t event;
        Event() { CUDA_CHECK(cudaEventCreate(&event)); }
        Event(const Event&) = delete;
        ~Event() { cudaEventDestroy(event); }
        void record() { CUDA_CHECK(cudaEventRecord(event, cuda_stream)); }
        bool done() const {
            cudaError_t error = cudaEventQuery(event);
            if (error == cudaErrorNotReady) return false;
            CUDA_CHECK(error);
            return true;
        }
        static float ms(const Event& a, const Event& b) {
            float elapsed = 0;
            CUDA_CHECK(cudaEventElapsedTime(&elapsed, a.event, b.event));
            return elapsed;
        }
    };
};

// ---------------------------------------------------------------------------------------------------------------------
// The model's matrix products, cuBLASLt. It thinks in column-major matrices: a row-major (R,S) tensor is its (S,R)
// matrix, so every product below is written for the transposed tensors. A plan (layouts and algorithm) is made at the
// first use of a shape and kept.

struct CudaMatmul {
    // out (N,OC) with row stride ldo = inp (N,C) weight(OC,C)^T + bias(OC)
    static void matmul_forward(real* out, int ldo, const real* inp, const real* weight, const real* bias, int N, int C,
                               int OC) {
        product({true, false, OC, N, C, C, C, ldo, false, bias != nullptr}, out, weight, inp, bias, 0.0f);
    }

    // dinp (N,C) = dout (N,OC) weight (OC,C)
    static void matmul_backward_input(real* dinp, const real* dout, const real* weight, int N, int C, int OC) {
        product({false, false, C, N, OC, C, OC, C, false, false}, dinp, weight, dout, nullptr, 0.0f);
    }

    // dweight (OC,C) += dout(N,OC)^T inp (N,C); dout has row stride ldo, the sum over micro-steps is fp32
    static void matmul_backward_weight(float* dweight, const real* dout, int ldo, const real* inp, int N, int C,
                                       int OC) {
        product({false, true, C, OC, N, C, ldo, C, true, false}, dweight, inp, dout, nullptr, 1.0f);
    }

    // Before the first step, so that nothing is allocated in it but the plans.
    static void start() {
        handle();
        workspace();
    }
    static void stop() {
        for (auto& [key, plan] : plans()) {
            cublasLtMatmulDescDestroy(plan.operation);
            for (cublasLtMatrixLayout_t layout : {plan.a, plan.b, plan.d}) cublasLtMatrixLayoutDestroy(layout);
        }
        plans().clear();
    }

  private:
    // D (m,n) = op(A) op(B) + beta D (+ bias), k the inner dimension, everything column-major
    struct Key {
        bool trans_a, trans_b;
        int m, n, k, lda, ldb, ldd;
        bool float_output, with_bias;
        bool operator<(const Key& o) const { return tie() < o.tie(); }
        std::tuple<bool, bool, int, int, int, int, int, int, bool, bool> tie() const {
            return {trans_a, trans_b, m, n, k, lda, ldb, ldd, float_output, with_bias};
        }
    };
    struct MatmulPlan {
        cublasLtMatmulDesc_t operation;
        cublasLtMatrixLayout_t a, b, d;
        cublasLtMatmulAlgo_t algorithm;
    };
    static constexpr size_t kWorkspaceBytes = 32 << 20;  // what NVIDIA recommends for Hopper

    static std::map<Key, MatmulPlan>& plans() {
        static std::map<Key, MatmulPlan> all;
        return all;
    }
    static cublasLtHandle_t handle() {
        static cublasLtHandle_t lt = [] {
            cublasLtHandle_t created;
            CUBLAS_CHECK(cublasLtCreate(&created));
            return created;
        }();
        return lt;
    }
    static void* workspace() {
        static void* memory = CudaRuntime::alloc(kWorkspaceBytes, "the cuBLASLt workspace");
        return memory;
    }

    static MatmulPlan make_plan(const Key& key) {
        const cudaDataType_t real_type = sizeof(real) == 4 ? CUDA_R_32F : CUDA_R_16BF;
        const cudaDataType_t output_type = key.float_output ? CUDA_R_32F : real_type;
        MatmulPlan plan;
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        auto set = [&](cublasLtMatmulDescAttributes_t attribute, auto value) {
            CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof(value)));
        };
        set(CUBLASLT_MATMUL_DESC_TRANSA, key.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(CUBLASLT_MATMUL_DESC_TRANSB, key.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        if (key.with_bias) {
            set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
            set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, real_type);
        }
        auto layout = [](cublasLtMatrixLayout_t* l, cudaDataType_t type, bool trans, int rows, int cols, int ld) {
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(l, type, trans ? cols : rows, trans ? rows : cols, ld));
        };
        layout(&plan.a, real_type, key.trans_a, key.m, key.k, key.lda);
        layout(&plan.b, real_type, key.trans_b, key.k, key.n, key.ldb);
        layout(&plan.d, output_type, false, key.m, key.n, key.ldd);

        cublasLtMatmulPreference_t preference;
        CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &kWorkspaceBytes, sizeof(kWorkspaceBytes)));
        // Q, K and V are column slices: rows start at multiples of 8 elements, not of 256 bytes.
        const uint32_t alignment = 16;
        for (auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof(alignment)));
        cublasLtMatmulHeuristicResult_t found;
        int count = 0;
        CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(handle(), plan.operation, plan.a, plan.b, plan.d, plan.d,
                                                    preference, 1, &found, &count));
        CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
        if (count == 0)
            fail("cuBLASLt has no algorithm for a %d x %d x %d product on %s", key.m, key.n, key.k,
                 CudaRuntime::properties().name);
        plan.algorithm = found.algo;
        return plan;
    }

    static void product(const Key& key, void* d, const real* a, const real* b, const real* bias, float beta) {
        auto found = plans().find(key);
        if (found == plans().end()) found = plans().emplace(key, make_plan(key)).first;
        MatmulPlan& plan = found->second;
        if (bias)
            CUBLAS_CHECK(
                cublasLtMatmulDescSetAttribute(plan.operation, CUBLASLT_MATMUL_DESC_BIAS_POINTER, &bias, sizeof(bias)));
        const float alpha = 1.0f;
        CUBLAS_CHECK(cublasLtMatmul(handle(), plan.operation, &alpha, a, plan.a, b, plan.b, &beta, d, plan.d, d, plan.d,
                                    &plan.algorithm, workspace(), kWorkspaceBytes, cuda_stream));
    }
};

struct Cuda : CudaRuntime, CudaMatmul, GptKernels, Attention, NsKernels, CudaComm {
    static void start(const World& r) {
        CudaRuntime::start(r);
        CudaMatmul::start();
        CudaComm::start();
    }
    static void stop() {
        CudaComm::stop();
        CudaMatmul::stop();
        CudaRuntime::stop();
    }
};
static_assert(is_backend<Cuda>());
