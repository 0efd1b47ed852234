// newton_schulz.cu: A = X X^T, the product that Newton-Schulz spends its time in, in eleven versions of one idea each.
// Two of them are the trainer's: rung 6, ns_product (../ns_kernels.cuh) for every GPU, and the last one, for Hopper
// (../kernels/ns_hopper.cuh). Beside them stands cuBLAS; then whole Newton-Schulz iterations are timed, over all hidden
// matrices of a GPT-2, by themselves and as a chain in one launch.
//
// The ladder runs on 48 matrices of (768, 768) in bf16, the squares of GPT-2 124M. Every version is judged by 2 m^2 n
// operations per matrix, also those that use the symmetry and compute little more than half of them: what counts is the
// time to the result.
#include <cublas_v2.h>

#include "../dmuon.cuh"
#include "../ns_kernels.cuh"
#include "bench.h"
#include "newton_schulz_hopper.cuh"

using bf16 = __nv_bfloat16;

// 1. One thread per element of A. Each loads a row of X and another one, all 2 n numbers of them, for one result.
__global__ void xxt_1(bf16* A, const bf16* X, int m, int n) {
    int col = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y * blockDim.y + threadIdx.y;
    if (row >= m || col >= m) return;
    float sum = 0;
    for (int k = 0; k < n; k++) sum += to_float(X[size_t(row) * n + k]) * to_float(X[size_t(col) * n + k]);
    A[size_t(row) * m + col] = from_float<bf16>(sum);
}

// 2. Shared memory: a block computes 32 x 32 elements of A from 32 columns of X at a time. Each number that it loads is
//    used 32 times. Here and below m and n are multiples of the tile: the tails are in the trainer's version.
__global__ void xxt_2(bf16* A, const bf16* X, int m, int n) {
    __shared__ float a[32][33], b[32][33];  // 33: the 32 rows of a column in 32 different banks
    int row0 = blockIdx.y * 32, col0 = blockIdx.x * 32, i = threadIdx.y, j = threadIdx.x;
    float sum = 0;
    for (int k0 = 0; k0 < n; k0 += 32) {
        a[i][j] = to_float(X[size_t(row0 + i) * n + k0 + j]);
        b[i][j] = to_float(X[size_t(col0 + i) * n + k0 + j]);
        __syncthreads();
        for (int k = 0; k < 32; k++) sum += a[i][k] * b[j][k];
        __syncthreads();
    }
    A[size_t(row0 + i) * m + col0 + j] = from_float<bf16>(sum);
}

// 3. Tensor cores. Four warps compute 64 x 64, each 32 x 32 of it: two (16, 16) blocks of a and four (16, 8) blocks of
//    b in registers make eight mma.sync, each worth 2048 multiplications and additions.
__global__ void xxt_3(bf16* A, const bf16* X, int m, int n) {
    constexpr int pitch = 32 + 8;  // 80 bytes from row to row: eight rows of 16 bytes in 32 different banks
    __shared__ __align__(16) bf16 a[64 * pitch], b[64 * pitch];
    int row0 = blockIdx.y * 64, col0 = blockIdx.x * 64, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_row = warp / 2 * 32, warp_col = warp % 2 * 32;
    float sum[2][4][4] = {};
    for (int k0 = 0; k0 < n; k0 += 32) {
        for (int i = threadIdx.x; i < 64 * 4; i += 128) {  // 64 rows of four 16-byte chunks
            int row = i / 4, chunk = i % 4 * 8;
            *reinterpret_cast<uint4*>(&a[row * pitch + chunk]) =
                *reinterpret_cast<const uint4*>(&X[size_t(row0 + row) * n + k0 + chunk]);
            *reinterpret_cast<uint4*>(&b[row * pitch + chunk]) =
                *reinterpret_cast<const uint4*>(&X[size_t(col0 + row) * n + k0 + chunk]);
        }
        __syncthreads();
        for (int k = 0; k < 32; k += 16) {
            uint32_t fa[2][4], fb[4][2];
            for (int i = 0; i < 2; i++)
                ldmatrix_x4(fa[i], &a[(warp_row + i * 16 + lane % 16) * pitch + k + lane / 16 * 8]);
            for (int j = 0; j < 4; j++)
                ldmatrix_x2(fb[j], &b[(warp_col + j * 8 + lane % 8) * pitch + k + lane / 8 % 2 * 8]);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++) mma_m16n8k16<bf16>(sum[i][j], fa[i], fb[j]);
        }
        __syncthreads();
    }
    for (int i = 0; i < 2; i++) {
        for (int j = 0; j < 4; j++) {
            for (int e = 0; e < 4; e++) {
                int row = row0 + warp_row + i * 16 + e / 2 * 8 + lane / 4;
                int col = col0 + warp_col + j * 8 + lane % 4 * 2 + e % 2;
                A[size_t(row) * m + col] = from_float<bf16>(sum[i][j][e]);
            }
        }
    }
}

// 4. The trainer's kernel, used as for any product A B with B = X^T: tiles of 128 x 128, 64 x 64 per warp, and copies
//    of the next tiles
//    under way (cp.async) while the tensor cores work.
// 5. The same kernel told of the symmetry: 21 of 36 tiles, mirrored.
// 6. All 48 matrices in one launch: one 768 x 768 product has 21 tiles, an H100 has room for 264.
// 7 to 10. Hopper's own instructions, again with every tile computed: newton_schulz_hopper.cuh.
// 11. All of it: the lower tiles, mirrored by warps that only store, while others multiply the next tile; a chain of
//     products in one launch.

// ---------------------------------------------------------------------------------------------------------------------

static cublasHandle_t blas;

// D (batch, M, N) = A B^T (symmetric_nt) or A B (nn); column-major for cuBLAS: D^T = op(B) A^T.
static void cublas_product(bf16* D, const bf16* A, const bf16* B, int batch, int M, int N, int K, NsProduct kind) {
    bool nt = kind == NsProduct::symmetric_nt;
    float one = 1, zero = 0;
    cublasStatus_t status =
        cublasGemmStridedBatchedEx(blas, nt ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, N, M, K, &one, B, CUDA_R_16BF,
                                   nt ? K : N, (long long)N * K, A, CUDA_R_16BF, K, (long long)M * K, &zero, D,
                                   CUDA_R_16BF, N, (long long)M * N, batch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
    if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLAS: %s", cublasGetStatusString(status));
}

// The largest error of 20,000 random elements of D against sums in double, in units of the largest of them.
static double product_error(const std::vector<uint16_t>& D, const std::vector<uint16_t>& A,
                            const std::vector<uint16_t>& B, int batch, int M, int N, int K, NsProduct kind) {
    double error = 0, largest = 0;
    std::mt19937_64 generator(1);
    for (int sample = 0; sample < 20000; sample++) {
        size_t matrix = generator() % batch, row = generator() % M, col = generator() % N;
        double exact = 0;
        for (size_t k = 0; k < size_t(K); k++) {
            size_t at_b = kind == NsProduct::nn ? (matrix * K + k) * N + col : (matrix * N + col) * K + k;
            exact += double(CpuOps::from_bf16(A[(matrix * M + row) * K + k])) * CpuOps::from_bf16(B[at_b]);
        }
        double e = std::fabs(CpuOps::from_bf16(D[(matrix * M + row) * N + col]) - exact);
        largest = std::max(largest, std::fabs(exact));
        error = e <= error ? error : e;  // keeps a NaN
    }
    return error / largest;
}

// Rounding to bf16 changes a number by at most 2^-8 of it; sums in fp32 are far below.
const double kLimit = std::ldexp(1.01, -8);

static bool ladder() {
    const int m = 768, n = 768, batch = 48;
    const size_t matrix = size_t(m) * n, square = size_t(m) * m;
    const double flops = 2.0 * m * m * n * batch;
    std::vector<uint16_t> x = to_bf16(normal(batch * matrix, 1)), transposed(x.size());
    for (size_t b = 0; b < size_t(batch); b++)
        for (int i = 0; i < m; i++)
            for (int j = 0; j < n; j++) transposed[b * matrix + size_t(j) * m + i] = x[b * matrix + size_t(i) * n + j];
    DeviceArray<uint16_t> device_x(x), device_t(transposed), device_a(batch * square);
    bf16 *X = device_x.as<bf16>(), *XT = device_t.as<bf16>(), *A = device_a.as<bf16>();
    bool right = true;
    printf("\nX X^T, %d matrices of %d x %d\n", batch, m, n);
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemset(device_a, 0xff, device_a.bytes()));
        float ms = median_ms([&](int) { run(); });
        double error = product_error(device_a.download(batch * square), x, x, batch, m, m, n, NsProduct::symmetric_nt);
        right &= print_rung(name, ms, flops, "TFLOP/s", error, kLimit);
    };
    auto one_by_one = [&](auto run) {
        return [=] {
            for (int b = 0; b < batch; b++) run(A + b * square, X + b * matrix, XT + b * matrix);
        };
    };
    rung("1  one thread per element", one_by_one([=](bf16* A, const bf16* X, const bf16*) {
             LAUNCH(xxt_1, dim3(m / 32, m / 8), dim3(32, 8), 0, A, X, m, n);
         }));
    rung("2  shared memory", one_by_one([=](bf16* A, const bf16* X, const bf16*) {
             LAUNCH(xxt_2, dim3(m / 32, m / 32), dim3(32, 32), 0, A, X, m, n);
         }));
    rung("3  tensor cores: mma.sync", one_by_one([=](bf16* A, const bf16* X, const bf16*) {
             LAUNCH(xxt_3, dim3(m / 64, m / 64), 128, 0, A, X, m, n);
         }));
    rung("4  128 x 128 tiles, the next under way: cp.async", one_by_one([=](bf16* A, const bf16* X, const bf16* XT) {
             NsKernels::ns_product(A, X, XT, nullptr, 1, 0, 0, 1, m, m, n, NsProduct::nn, NsType::bf16);
         }));
    rung("5  lower tiles, mirrored", one_by_one([=](bf16* A, const bf16* X, const bf16*) {
             NsKernels::ns_product(A, X, X, nullptr, 1, 0, 0, 1, m, m, n, NsProduct::symmetric_nt, NsType::bf16);
         }));
    rung("6  batched: the trainer's", [=] {
        NsKernels::ns_product(A, X, X, nullptr, 1, 0, 0, batch, m, m, n, NsProduct::symmetric_nt, NsType::bf16);
    });
    DeviceArray<int> counters(ns_chain_counters(batch));
    if (hopper_kernels()) {
        rung("7  wgmma, every tile", [=] { rungs::run_7(A, X, batch, m, n); });
        rung("8  TMA", [=] { rungs::run_8(A, X, batch, m, n); });
        rung("9  warps with different work, 128 x 256 tiles", [=] { rungs::run_9(A, X, batch, m, n); });
        rung("10 persistent", [=] { rungs::run_10(A, X, batch, m, n); });
        rung("11 lower tiles, mirrored by warps of their own: the trainer's", [&] {
            NsKernels::NsChain one(batch, NsType::bf16, counters);
            NsKernels::ns_product(A, X, X, nullptr, 1, 0, 0, batch, m, m, n, NsProduct::symmetric_nt, NsType::bf16);
        });
    }
    rung("   cuBLAS, one by one", one_by_one([=](bf16* A, const bf16* X, const bf16*) {
             cublas_product(A, X, X, 1, m, m, n, NsProduct::symmetric_nt);
         }));
    rung("   cuBLAS, batched", [=] { cublas_product(A, X, X, batch, m, m, n, NsProduct::symmetric_nt); });
    return right;
}

// Each product of the iteration at the sizes of three models, ours beside cuBLAS's (which always computes all tiles).
static bool products() {
    struct Case {
        NsProduct kind;
        int batch, M, N, K;
    };
    const NsProduct nt = NsProduct::symmetric_nt, nn = NsProduct::nn;
    const Case cases[] = {{nn, 48, 768, 768, 768},    {nt, 24, 768, 768, 3072},   {nn, 24, 768, 3072, 768},
                          {nt, 96, 1024, 1024, 1024}, {nn, 96, 1024, 1024, 1024}, {nt, 48, 1024, 1024, 4096},
                          {nn, 48, 1024, 4096, 1024}, {nt, 48, 1600, 1600, 1600}, {nn, 48, 1600, 1600, 1600},
                          {nn, 1, 8192, 8192, 8192}};
    bool right = true;
    printf("\nProducts, batched (symmetric: counted in full)\n");
    for (const Case& c : cases) {
        size_t size_a = size_t(c.batch) * c.M * c.K, size_b = size_t(c.batch) * c.N * c.K;
        std::vector<uint16_t> a = to_bf16(normal(size_a, 1)), b = c.kind == nt ? a : to_bf16(normal(size_b, 2));
        DeviceArray<uint16_t> device_a(a), device_b(b), device_d(size_t(c.batch) * c.M * c.N);
        bf16 *A = device_a.as<bf16>(), *B = device_b.as<bf16>(), *D = device_d.as<bf16>();
        auto rung = [&](const char* by, auto run) {
            CUDA_CHECK(cudaMemset(device_d, 0xff, device_d.bytes()));
            float ms = median_ms([&](int) { run(); });
            std::vector<uint16_t> d = device_d.download(size_t(c.batch) * c.M * c.N);
            double error = product_error(d, a, b, c.batch, c.M, c.N, c.K, c.kind);
            const char* kind = c.kind == nt ? "symmetric" : "general  ";
            std::string name = strprintf("%s %2d x (%d, %d, %d), %s", kind, c.batch, c.M, c.N, c.K, by);
            right &= print_rung(name.c_str(), ms, 2.0 * c.batch * c.M * c.N * c.K, "TFLOP/s", error, kLimit);
        };
        DeviceArray<int> counters(ns_chain_counters(c.batch));
        auto product = [&] {
            NsKernels::ns_product(D, A, B, nullptr, 1, 0, 0, c.batch, c.M, c.N, c.K, c.kind, NsType::bf16);
        };
        rung("mma.sync", product);
        if (hopper_kernels())
            rung("wgmma", [&] {
                NsKernels::NsChain one(c.batch, NsType::bf16, counters);
                product();
            });
        rung("cuBLAS", [&] { cublas_product(D, A, B, c.batch, c.M, c.N, c.K, c.kind); });
    }
    return right;
}

// All hidden matrices of a GPT-2 with split Q, K, V: four squares (C, C) and two rectangles (4C, C), (C, 4C) per layer,
// which go through together.
struct HiddenMatrices {
    struct Shape {
        int count, m, n;
        DeviceArray<MatrixRef> refs;
        DeviceArray<float> inverse_norms;
        DeviceArray<char> memory;
        Shape(int count_, int m_, int n_, size_t offset)
            : count(count_),
              m(m_),
              n(n_),
              refs(make_refs(count_, m_, n_, offset)),
              inverse_norms(std::vector<float>(count_, 1.0f / std::sqrt(float(m_) * n_))),
              memory(NsWorkspace::bytes(count_, m_, n_, NsType::bf16)) {}
        static std::vector<MatrixRef> make_refs(int count, int m, int n, size_t offset) {
            std::vector<MatrixRef> all;
            for (int i = 0; i < count; i++, offset += size_t(m) * n) {
                const bool tall = m < n && i % 2 == 0;
                all.push_back({offset, offset, tall ? m : n, tall});
            }
            return all;
        }
    };
    Shape squares, rectangles;
    DeviceArray<float> grads, momentum, master, clip;
    DeviceArray<real> params;
    HiddenMatrices(int layers, size_t C)
        : squares(4 * layers, C, C, 0),
          rectangles(2 * layers, C, 4 * C, 4 * layers * C * C),
          grads(normal(12 * layers * C * C, 1)),
          momentum(normal(12 * layers * C * C, 3)),
          master(normal(12 * layers * C * C, 2)),
          clip(std::vector<float>{1, 1, 0, 0}),
          params(12 * layers * C * C) {}

    // What the optimizer does with those of some shapes, up to and including `last`. mu = 0: x is the gradient.
    enum Stage { form, iterate, update };
    void run(const std::vector<Shape*>& shapes, Stage last, bool gram, NsType type) {
        for (Shape* s : shapes) {
            NsWorkspace w(static_cast<char*>(s->memory), s->count, s->m, s->n, type);
            NsKernels::muon_momentum(w.X, momentum, grads, s->refs, s->inverse_norms, s->count, s->m, s->n, 0, true,
                                     type, clip);
            if (last >= iterate) newton_schulz<NsKernels>(w, s->count, s->m, s->n, {gram, "polar_express", 5, type});
            if (last >= update)
                NsKernels::muon_update(params, master, w.X, s->refs, s->count, s->m, s->n, 1, 1e-3f, type, clip);
        }
    }
};

static void whole_iterations() {
    printf("\nFive steps over the hidden matrices: milliseconds\n%-42s %10s %14s %10s %16s\n", "", "momentum",
           "Newton-Schulz", "update", "TFLOP/s (NS)");
    struct Model {
        const char* name;
        int layers, C;
    };
    for (Model model : {Model{"124M", 12, 768}, Model{"350M", 24, 1024}}) {
        printf("%s\n", hopper_kernels() ? "wgmma, each chain of products in one launch" : "mma.sync");
        HiddenMatrices matrices(model.layers, model.C);
        struct Part {
            std::string name;
            std::vector<HiddenMatrices::Shape*> shapes;
            int flops;  // of a standard step with half of each symmetric product, (2 * 1.5 r + 1) m^3, in layers C^3
        };
        const std::vector<Part> parts = {
            {strprintf("%d of %d x %d", 4 * model.layers, model.C, model.C), {&matrices.squares}, 4 * 4},
            {strprintf("%d of %d x %d", 2 * model.layers, model.C, 4 * model.C), {&matrices.rectangles}, 2 * 13},
            {"all", {&matrices.squares, &matrices.rectangles}, 4 * 4 + 2 * 13}};
        for (const Part& part : parts) {
            for (NsType type : {NsType::bf16, NsType::fp16}) {
                for (bool gram : {false, true}) {
                    float ms[3];
                    for (auto stage : {HiddenMatrices::form, HiddenMatrices::iterate, HiddenMatrices::update})
                        ms[stage] = median_ms([&](int) { matrices.run(part.shapes, stage, gram, type); });
                    double flops = 5.0 * part.flops * model.layers * std::pow(model.C, 3);
                    printf("%-5s %-19s %s %-8s %13.3f %14.3f %10.3f %16.1f\n", model.name, part.name.c_str(),
                           type == NsType::bf16 ? "bf16" : "fp16", gram ? "gram" : "standard", ms[0], ms[1] - ms[0],
                           ms[2] - ms[1], flops / (ms[1] - ms[0]) * 1e-9);
                }
            }
        }
    }
}

int main() {
    return run_ladder([] {
        if (cublasCreate(&blas) != CUBLAS_STATUS_SUCCESS) fail("cuBLAS does not start on this GPU");
        bool right = ladder();
        right &= products();
        whole_iterations();
        if (hopper_kernels()) {
            portable_kernels = true;
            whole_iterations();
        }
        return right;
    });
}
