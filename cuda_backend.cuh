// cuda_backend.cuh: struct Cuda, the GPU half of the seam. What is here: memory, events, ranges, the device, and the
// model's matrix products on cuBLASLt. What it inherits: the hand-written kernels (gpt_kernels.cuh, attention.cuh,
// ns_kernels.cuh) and the collectives (comm.h). Everything is enqueued on the one stream `cuda_stream`; only
// synchronize() waits for it. Every operation, with its shapes: backend.h; its twin is struct Cpu (cpu_backend.h).
#pragma once
#include <cublasLt.h>
#include <nvtx3/nvToolsExt.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
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

// memset of elements of 1, 2 or 4 bytes, for a few of them
constexpr int kMemsetThreads = 256;
constexpr size_t kMemsetBytes = 1 << 16;  // at most
__global__ void memset_kernel(unsigned char* bytes, unsigned value, unsigned element, size_t size) {
    const size_t i = size_t(blockIdx.x) * kMemsetThreads + threadIdx.x;
    if (i < size) bytes[i] = static_cast<unsigned char>(value >> 8 * (i % element));
}

struct CudaRuntime {
    using real = ::real;
    static constexpr const char* kBackendName = sizeof(real) == 4 ? "cuda fp32" : "cuda bf16";

    // What an error at the start means to whoever started this.
    static std::string why(cudaError_t error) {
        const auto version = [](int number) { return strprintf("%d.%d", number / 1000, number % 1000 / 10); };
        int driver = 0;  // the newest CUDA that it knows; 0: there is none
        switch (error) {
            case cudaErrorInsufficientDriver:
                if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0)
                    return "there is no NVIDIA driver here";
                return strprintf("the NVIDIA driver knows CUDA %s and this program needs %s: update the driver",
                                 version(driver).c_str(), version(CUDART_VERSION).c_str());
            case cudaErrorNoDevice:
                if (!getenv("CUDA_VISIBLE_DEVICES")) return "there is none that the NVIDIA driver knows";
                return strprintf("CUDA_VISIBLE_DEVICES='%s' leaves none", getenv("CUDA_VISIBLE_DEVICES"));
            case cudaErrorDevicesUnavailable:
                return "another process has it for itself (nvidia-smi shows which), or its compute mode forbids it";
            case cudaErrorMemoryAllocation:
                return "its memory is full (nvidia-smi shows of what)";
            case cudaErrorNoKernelImageForDevice:
            case cudaErrorInvalidDeviceFunction:
                return "this program was built for other GPUs: run make here, or name its architecture in GPU_ARCH";
            case cudaErrorSystemNotReady:
                return "its driver is not ready (is nvidia-fabricmanager running?)";
            default:
                return cudaGetErrorString(error);
        }
    }

    // An empty string if as many GPUs can be used, else why not. cudaGetDeviceCount leaves its argument untouched
    // without a driver, so the return code decides.
    static std::string unavailable(int wanted) {
        int devices = 0;
        cudaError_t error = cudaGetDeviceCount(&devices);
        if (error != cudaSuccess) return why(error);
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
        if (properties().major < 8)
            fail(
                "%s is of compute capability %d.%d: this program needs 8.0 (Ampere) or newer; --device cpu trains "
                "without",
                properties().name, properties().major, properties().minor);
        cudaFuncAttributes any_kernel;
        cudaError_t error = cudaSetDevice(device);
        if (error == cudaSuccess) error = cudaFuncGetAttributes(&any_kernel, gelu_forward_kernel);
        if (error != cudaSuccess) fail("GPU %d (%s) cannot be used: %s", device, properties().name, why(error).c_str());
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
    static std::string kernels_name() {
        return sizeof(real) == 4 ? "exact, fp32" : hopper_kernels() ? "wgmma and TMA" : "mma.sync";
    }

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
        void record_beside() { CudaComm::record(event); }
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

    // In a graph the device loses 4 to 7 us around a memset and next to nothing between kernels
    // (dev/results/base_step.md); some of cuBLASLt's products come with one. So each small memset becomes a kernel in
    // the same place.
    static void kernels_for_memsets(cudaGraph_t graph) {
        size_t count = 0;
        CUDA_CHECK(cudaGraphGetNodes(graph, nullptr, &count));
        std::vector<cudaGraphNode_t> nodes(count);
        CUDA_CHECK(cudaGraphGetNodes(graph, nodes.data(), &count));
        for (cudaGraphNode_t node : nodes) {
            cudaGraphNodeType type;
            CUDA_CHECK(cudaGraphNodeGetType(node, &type));
            if (type != cudaGraphNodeTypeMemset) continue;
            cudaMemsetParams set;
            CUDA_CHECK(cudaGraphMemsetNodeGetParams(node, &set));
            size_t size = set.width * set.elementSize;
            if (set.height != 1 || size > kMemsetBytes) continue;
            auto neighbours = [&](auto get) {
                size_t edges = 0;
                CUDA_CHECK(get(node, nullptr, nullptr, &edges));
                std::vector<cudaGraphNode_t> all(edges);
                std::vector<cudaGraphEdgeData> kinds(edges);
                if (edges > 0) CUDA_CHECK(get(node, all.data(), kinds.data(), &edges));
                return std::make_pair(all, kinds);
            };
            const auto [before, kinds_before] = neighbours(cudaGraphNodeGetDependencies);
            const auto [after, kinds_after] = neighbours(cudaGraphNodeGetDependentNodes);
            auto* bytes = static_cast<unsigned char*>(set.dst);
            void* arguments[] = {&bytes, &set.value, &set.elementSize, &size};
            cudaKernelNodeParams kernel = {};
            kernel.func = reinterpret_cast<void*>(memset_kernel);
            kernel.gridDim = dim3(unsigned(ceil_div(size, size_t(kMemsetThreads))));
            kernel.blockDim = dim3(kMemsetThreads);
            kernel.kernelParams = arguments;
            CUDA_CHECK(cudaGraphDestroyNode(node));
            cudaGraphNode_t made;
            CUDA_CHECK(cudaGraphAddKernelNode(&made, graph, nullptr, 0, &kernel));
            const std::vector<cudaGraphNode_t> here(std::max(before.size(), after.size()), made);
            CUDA_CHECK(cudaGraphAddDependencies(graph, before.data(), here.data(), kinds_before.data(), before.size()));
            CUDA_CHECK(cudaGraphAddDependencies(graph, here.data(), after.data(), kinds_after.data(), after.size()));
        }
    }

    // The first call loads the kernels and finds the products' algorithms, the second records, this and all later ones
    // launch what was recorded: the device goes from kernel to kernel without asking the host.
    class Graph {
        cudaGraphExec_t recorded = nullptr;
        bool warm = false;

      public:
        Graph() = default;
        Graph(const Graph&) = delete;
        ~Graph() {
            if (recorded) cudaGraphExecDestroy(recorded);
        }
        void run(const std::function<void()>& work) {
            if (!warm) {
                warm = true;
                return work();
            }
            if (!recorded) {
                cudaGraph_t graph;
                CUDA_CHECK(cudaStreamBeginCapture(cuda_stream, cudaStreamCaptureModeThreadLocal));
                work();
                CUDA_CHECK(cudaStreamEndCapture(cuda_stream, &graph));
                kernels_for_memsets(graph);
                CUDA_CHECK(cudaGraphInstantiate(&recorded, graph, 0));
                CUDA_CHECK(cudaGraphDestroy(graph));
            }
            CUDA_CHECK(cudaGraphLaunch(recorded, cuda_stream));
        }
    };

    // Without a profiler the library's calls return at once.
    struct Range {
        explicit Range(const char* name, int number = -1) {
            char text[32];
            if (number >= 0) snprintf(text, sizeof text, "%s %d", name, number);
            nvtxRangePushA(number >= 0 ? text : name);
        }
        Range(const Range&) = delete;
        ~Range() { nvtxRangePop(); }
    };
};

// ---------------------------------------------------------------------------------------------------------------------
// The model's matrix products, cuBLASLt. It thinks in column-major matrices: a row-major (R,S) tensor is its (S,R)
// matrix, so every product below is written for the transposed tensors. A plan (layouts and algorithm) is made at the
// first use of a shape and kept.
//
// Which algorithm: the library's heuristic names several, best first by its own model. That model is off by 3 to 7 % of
// a step's products on an H200 (dev/results/base_step.md), so tune() times the candidates once per GPU and shape, and a
// file keeps the answer: a resumed run takes the same algorithms and repeats the same bits.

struct CudaMatmul {
    // out (N,OC) with row stride ldo = inp (N,C) weight(OC,C)^T + bias(OC)
    static void matmul_forward(real* out, int ldo, const real* inp, const real* weight, const real* bias, int N, int C,
                               int OC) {
        product({true, false, OC, N, C, C, C, ldo, false, bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT},
                out, weight, inp, bias, nullptr, 0.0f);
    }

    // Whether GELU is part of the products beside it: where the library has true epilogues. Before sm_90 it runs a
    // second kernel, slower than ours; the exact build keeps our formula.
    static bool gelu_is_fused() { return sizeof(real) == 2 && CudaRuntime::properties().major >= 9; }

    // out (N,OC) = gelu(pre), pre (N,OC) = inp (N,C) weight(OC,C)^T + bias(OC). Fused, gelu sees pre before rounding.
    static void matmul_gelu_forward(real* out, real* pre, const real* inp, const real* weight, const real* bias, int N,
                                    int C, int OC) {
        if (gelu_is_fused()) {
            product({true, false, OC, N, C, C, C, OC, false, CUBLASLT_EPILOGUE_GELU_AUX_BIAS}, out, weight, inp, bias,
                    pre, 0.0f);
        } else {
            matmul_forward(pre, OC, inp, weight, bias, N, C, OC);
            GptKernels::gelu_forward(out, pre, size_t(N) * OC);
        }
    }

    // dinp (N,C) = dout (N,OC) weight (OC,C)
    static void matmul_backward_input(real* dinp, const real* dout, const real* weight, int N, int C, int OC) {
        product({false, false, C, N, OC, C, OC, C, false, CUBLASLT_EPILOGUE_DEFAULT}, dinp, weight, dout, nullptr,
                nullptr, 0.0f);
    }

    // dpre (N,C) = dout (N,OC) weight (OC,C) * gelu'(pre (N,C)), where gelu(pre) was the input of the product
    static void matmul_backward_input_gelu(real* dpre, const real* dout, const real* weight, const real* pre, int N,
                                           int C, int OC) {
        if (gelu_is_fused()) {
            product({false, false, C, N, OC, C, OC, C, false, CUBLASLT_EPILOGUE_DGELU}, dpre, weight, dout, nullptr,
                    const_cast<real*>(pre), 0.0f);
        } else {
            matmul_backward_input(dpre, dout, weight, N, C, OC);
            GptKernels::gelu_backward(dpre, dpre, pre, size_t(N) * C);
        }
    }

    // dweight (OC,C) = dout(N,OC)^T inp (N,C), or += with accumulate; dout has row stride ldo, the sum over micro-steps
    // is fp32
    static void matmul_backward_weight(float* dweight, const real* dout, int ldo, const real* inp, int N, int C, int OC,
                                       bool accumulate) {
        product({false, true, C, OC, N, C, ldo, C, true, CUBLASLT_EPILOGUE_DEFAULT}, dweight, inp, dout, nullptr,
                nullptr, accumulate ? 1.0f : 0.0f);
    }

    // Runs micro_step, a forward and backward pass that does not accumulate, and takes for every product in it that has
    // no plan yet the algorithm that is fastest on its operands. Rank 0 decides for all ranks. What it measured is read
    // from, and added to, a file that belongs to this GPU, driver and library.
    static void tune(const std::function<void()>& micro_step) {
        const std::string path = choices_path();
        if (world.rank == 0) read_choices(path);
        const size_t known = choices().size();
        tuning() = true;
        micro_step();
        tuning() = false;
        if (choices().size() > known) write_choices(path);
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
        choices().clear();
    }

  private:
    // D (m,n) = op(A) op(B) + beta D, k the inner dimension, everything column-major; then the epilogue
    struct Key {
        bool trans_a, trans_b;
        int m, n, k, lda, ldb, ldd;
        bool float_output;
        cublasLtEpilogue_t epilogue;
        bool operator<(const Key& o) const { return tie() < o.tie(); }
        std::tuple<bool, bool, int, int, int, int, int, int, bool, int> tie() const {
            return {trans_a, trans_b, m, n, k, lda, ldb, ldd, float_output, int(epilogue)};
        }
        std::string text() const {
            return strprintf("%s%s%c%c m %d n %d k %d ld %d %d %d epilogue %d", sizeof(real) == 4 ? "fp32" : "bf16",
                             float_output ? "->fp32 " : " ", "NT"[trans_a], "NT"[trans_b], m, n, k, lda, ldb, ldd,
                             int(epilogue));
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

    static cublasStatus_t run(const MatmulPlan& plan, const cublasLtMatmulAlgo_t& algorithm, void* d, const real* a,
                              const real* b, float beta) {
        const float alpha = 1.0f;
        return cublasLtMatmul(handle(), plan.operation, &alpha, a, plan.a, b, plan.b, &beta, d, plan.d, d, plan.d,
                              &algorithm, workspace(), kWorkspaceBytes, cuda_stream);
    }

    template <class T>
    static void set(const MatmulPlan& plan, cublasLtMatmulDescAttributes_t attribute, T value) {
        CUBLAS_CHECK(cublasLtMatmulDescSetAttribute(plan.operation, attribute, &value, sizeof(value)));
    }

    static void product(const Key& key, void* d, const real* a, const real* b, const real* bias, real* aux,
                        float beta) {
        auto found = plans().find(key);
        const bool is_new = found == plans().end();
        if (is_new) found = plans().emplace(key, describe(key)).first;
        MatmulPlan& plan = found->second;
        if (bias) set(plan, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
        if (aux) set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
        if (is_new) plan.algorithm = choose(key, plan, d, a, b);
        CUBLAS_CHECK(run(plan, plan.algorithm, d, a, b, beta));
    }

    // A plan but for its algorithm
    static MatmulPlan describe(const Key& key) {
        const cudaDataType_t real_type = sizeof(real) == 4 ? CUDA_R_32F : CUDA_R_16BF;
        const cudaDataType_t output_type = key.float_output ? CUDA_R_32F : real_type;
        MatmulPlan plan;
        CUBLAS_CHECK(cublasLtMatmulDescCreate(&plan.operation, CUBLAS_COMPUTE_32F, CUDA_R_32F));
        set(plan, CUBLASLT_MATMUL_DESC_TRANSA, key.trans_a ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan, CUBLASLT_MATMUL_DESC_TRANSB, key.trans_b ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE, key.epilogue);
        const bool gelu = key.epilogue == CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                   dgelu = key.epilogue == CUBLASLT_EPILOGUE_DGELU;
        if (gelu || key.epilogue == CUBLASLT_EPILOGUE_BIAS) set(plan, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, real_type);
        if (gelu || dgelu) {
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, int64_t(key.ldd));
            set(plan, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE, real_type);
        }
        auto layout = [](cublasLtMatrixLayout_t* l, cudaDataType_t type, bool trans, int rows, int cols, int ld) {
            CUBLAS_CHECK(cublasLtMatrixLayoutCreate(l, type, trans ? cols : rows, trans ? rows : cols, ld));
        };
        layout(&plan.a, real_type, key.trans_a, key.m, key.k, key.lda);
        layout(&plan.b, real_type, key.trans_b, key.k, key.n, key.ldb);
        layout(&plan.d, output_type, false, key.m, key.n, key.ldd);
        return plan;
    }

    // -----------------------------------------------------------------------------------------------------------------
    // Choosing algorithms

    using Algorithms = std::vector<cublasLtMatmulAlgo_t>;
    static constexpr int kCandidates = 8;

    static bool& tuning() {
        static bool now = false;
        return now;
    }
    // What tune() measured, in this run and before, by Key::text(). NVIDIA allows an algorithm to be stored as its
    // bytes and used again with the same version of the library.
    static std::map<std::string, cublasLtMatmulAlgo_t>& choices() {
        static std::map<std::string, cublasLtMatmulAlgo_t> all;
        return all;
    }

    // The heuristic's first, or under tune() the fastest of its first kCandidates, by rank 0's file or clock.
    static cublasLtMatmulAlgo_t choose(const Key& key, const MatmulPlan& plan, void* d, const real* a, const real* b) {
        if (!tuning()) return candidates(key, plan, 1)[0];
        cublasLtMatmulAlgo_t best;
        if (world.rank == 0) {
            const auto known = choices().find(key.text());
            if (known != choices().end() && can_run(plan, known->second)) best = known->second;
            else choices()[key.text()] = best = fastest(plan, candidates(key, plan, kCandidates), d, a, b);
        }
        broadcast_host(&best, sizeof best);
        if (!can_run(plan, best))
            fail("rank %d: %s cannot run the algorithm that rank 0 has chosen for %s: pass --tune 0", world.rank,
                 CudaRuntime::properties().name, key.text().c_str());
        return best;
    }

    static bool can_run(const MatmulPlan& plan, const cublasLtMatmulAlgo_t& algorithm) {
        cublasLtMatmulHeuristicResult_t result;
        return cublasLtMatmulAlgoCheck(handle(), plan.operation, plan.a, plan.b, plan.d, plan.d, &algorithm, &result) ==
                   CUBLAS_STATUS_SUCCESS &&
               result.workspaceSize <= kWorkspaceBytes;
    }

    static Algorithms candidates(const Key& key, const MatmulPlan& plan, int most) {
        cublasLtMatmulPreference_t preference;
        CUBLAS_CHECK(cublasLtMatmulPreferenceCreate(&preference));
        CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                                          &kWorkspaceBytes, sizeof(kWorkspaceBytes)));
        // Q, K and V are column slices: rows start at multiples of 8 elements, not of 256 bytes.
        const uint32_t alignment = 16;
        for (auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                               CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            CUBLAS_CHECK(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &alignment, sizeof(alignment)));
        std::vector<cublasLtMatmulHeuristicResult_t> found(most);
        int count = 0;
        CUBLAS_CHECK(cublasLtMatmulAlgoGetHeuristic(handle(), plan.operation, plan.a, plan.b, plan.d, plan.d,
                                                    preference, most, found.data(), &count));
        CUBLAS_CHECK(cublasLtMatmulPreferenceDestroy(preference));
        if (count == 0)
            fail("cuBLASLt has no algorithm for the product %s on %s", key.text().c_str(),
                 CudaRuntime::properties().name);
        Algorithms algorithms;
        for (int i = 0; i < count; i++) algorithms.push_back(found[i].algo);
        return algorithms;
    }

    // Times whole rounds over the candidates, so that a change of clock meets all alike, and takes each one's best. The
    // heuristic's first stays unless another is 1 % faster. Not in a training step: waits for the device.
    static cublasLtMatmulAlgo_t fastest(const MatmulPlan& plan, const Algorithms& algorithms, void* d, const real* a,
                                        const real* b) {
        constexpr int kRounds = 4;       // the first one warms up
        constexpr float kEnough = 0.2f;  // ms: shorter products are repeated
        std::vector<float> best(algorithms.size(), INFINITY);
        CudaRuntime::Event begin, end;
        int repetitions = 1;
        for (int round = 0; round < kRounds; round++) {
            for (size_t i = 0; i < algorithms.size(); i++) {
                bool runs = true;
                begin.record();
                for (int r = 0; r < repetitions && runs; r++)
                    runs = run(plan, algorithms[i], d, a, b, 0.0f) == CUBLAS_STATUS_SUCCESS;
                end.record();
                CudaRuntime::synchronize();
                const float ms = CudaRuntime::Event::ms(begin, end) / repetitions;
                if (runs && round > 0) best[i] = std::min(best[i], ms);
                if (round == 0 && i + 1 == algorithms.size()) repetitions = std::clamp(int(kEnough / ms), 1, 20);
            }
        }
        const size_t winner = std::min_element(best.begin(), best.end()) - best.begin();
        return algorithms[best[winner] < 0.99f * best[0] ? winner : 0];
    }

    // "580.159.04", from a line like "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Wed ..."; where the
    // kernel does not say it (WSL), the newest CUDA that the driver knows.
    static std::string driver_version() {
        std::ifstream file("/proc/driver/nvidia/version");
        for (std::string word; file >> word;)
            if (word[0] >= '0' && word[0] <= '9' && word.find('.') != std::string::npos) return word;
        int newest = 0;
        CUDA_CHECK(cudaDriverGetVersion(&newest));
        return std::to_string(newest);
    }

    // ~/.cache/train_gpt/products_GPU_driver_library.txt by the XDG rules, or "" where there is no place for it
    static std::string choices_path() {
        const char *cache = getenv("XDG_CACHE_HOME"), *home = getenv("HOME");
        std::string directory = cache && cache[0] == '/' ? cache : home && *home ? std::string(home) + "/.cache" : "";
        if (directory.empty()) return "";
        std::string name = strprintf("products_%s_%s_%zu.txt", CudaRuntime::properties().name, driver_version().c_str(),
                                     cublasLtGetVersion());
        for (char& c : name)
            if (c == ' ' || c == '/') c = '_';
        return directory + "/train_gpt/" + name;
    }

    // A line per product: the algorithm's bytes in hexadecimal, a space, Key::text(). Lines that are not such are left
    // out, and their products timed again.
    static void read_choices(const std::string& path) {
        std::ifstream file(path);
        for (std::string line; std::getline(file, line);) {
            cublasLtMatmulAlgo_t algorithm;
            auto* bytes = reinterpret_cast<unsigned char*>(&algorithm);
            bool good = line.size() > 2 * sizeof(algorithm) && line[2 * sizeof(algorithm)] == ' ';
            for (size_t i = 0; i < sizeof(algorithm) && good; i++) {
                const char* digits = line.data() + 2 * i;
                good = std::from_chars(digits, digits + 2, bytes[i], 16).ptr == digits + 2;
            }
            if (good) choices()[line.substr(2 * sizeof(algorithm) + 1)] = algorithm;
        }
    }

    // Whole or not at all: another run may be reading.
    static void write_choices(const std::string& path) {
        const std::string temporary = path + "." + std::to_string(getpid());
        bool written = false;
        if (!path.empty()) {
            std::error_code error;
            std::filesystem::create_directories(std::filesystem::path(path).parent_path(), error);
            std::ofstream file(temporary);
            for (const auto& [text, algorithm] : choices()) {
                for (size_t i = 0; i < sizeof(algorithm); i++)
                    file << strprintf("%02x", reinterpret_cast<const unsigned char*>(&algorithm)[i]);
                file << ' ' << text << '\n';
            }
            file.close();
            written = file && rename(temporary.c_str(), path.c_str()) == 0;
        }
        if (!written)
            fprintf(stderr,
                    "note: cannot write %s: each start will time the products again, and a resumed run may differ in "
                    "its last bits\n",
                    path.empty() ? "a cache, as HOME is not set" : one_line(path).c_str());
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
