// Tests of ns_kernels.cuh: one source, compiled by g++ -DFIBER (kernels on the CPU, small sizes) and by nvcc (the GPU,
// all sizes).
//   1. ns_product against loops in double, against CpuOps, and on a GPU against cuBLAS at the sizes of GPT-2;
//   2. ns_normalize and muon_update against their definitions: tiles of larger matrices, gradients of 1e-20 to 1e+10;
//   3. the same bits in a batch of three as alone;
//   4. the whole Newton-Schulz iteration of dmuon.cuh against the exact polynomial of known singular values.
// Outputs start as NaN with guard zones on both sides (device_buffer.h), so that a store that is missing or astray is
// seen.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "../cpu_backend.h"
#include "../dmuon.cuh"
#include "../ns_kernels.cuh"
#include "device_buffer.h"
#ifndef FIBER
#include <cublas_v2.h>
#endif

namespace test_ns {

using Bytes = std::vector<unsigned char>;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr NsType kTypes[] = {NsType::bf16, NsType::fp16, NsType::fp32};
const char* name_of(NsType type) { return type == NsType::bf16 ? "bf16" : type == NsType::fp16 ? "fp16" : "fp32"; }

// Rounding a number to `type` changes it by at most unit(type) of itself, or by half of fp16's smallest number.
double unit(NsType type) { return std::ldexp(1.0, type == NsType::bf16 ? -8 : type == NsType::fp16 ? -11 : -24); }
double smallest(NsType type) { return type == NsType::fp16 ? std::ldexp(1.0, -25) : 1e-40; }

Floats normal(size_t n, unsigned seed, float scale = 1.0f) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    Floats x(n);
    for (float& value : x) value = distribution(generator) * scale;
    return x;
}

Bytes encode(const Floats& x, NsType type) {
    Bytes bytes(x.size() * ns_type_bytes(type));
    for (size_t i = 0; i < x.size(); i++) CpuOps::store(bytes.data(), i, x[i], type);
    return bytes;
}
Floats decode(const Bytes& bytes, NsType type) {
    Floats x(bytes.size() / ns_type_bytes(type));
    for (size_t i = 0; i < x.size(); i++) x[i] = CpuOps::load(bytes.data(), i, type);
    return x;
}

#ifndef FIBER
cublasHandle_t blas() {
    static cublasHandle_t handle = [] {
        cublasHandle_t created;
        REQUIRE(cublasCreate(&created) == CUBLAS_STATUS_SUCCESS);
        return created;
    }();
    REQUIRE(cublasSetStream(handle, cuda_stream) == CUBLAS_STATUS_SUCCESS);
    return handle;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// ns_product

struct Product {
    NsProduct kind;
    int M, N, K;
    float alpha, beta, diag;  // beta 0: called without C
};

constexpr int kBatch = 3;

// Operands of a batch. symmetric_nt is given a symmetric result with B != A: B is A with its columns scaled by powers
// of two.
struct Operands {
    Floats A, B, C;
    Operands(const Product& p, NsType type) {
        bool symmetric = p.kind == NsProduct::symmetric_nt;
        A = decode(encode(normal(kBatch * size_t(p.M) * p.K, 1), type), type);
        B = decode(encode(normal(kBatch * size_t(p.N) * p.K, 2), type), type);
        if (symmetric)
            for (size_t i = 0; i < B.size(); i++) B[i] = std::ldexp(A[i], int(i % p.K % 3) - 1);
        if (p.beta == 0) return;
        C = decode(encode(normal(kBatch * size_t(p.M) * p.N, 3), type), type);
        for (int b = 0; symmetric && b < kBatch; b++)
            for (int i = 0; i < p.M; i++)
                for (int j = 0; j < i; j++) C[(size_t(b) * p.M + j) * p.M + i] = C[(size_t(b) * p.M + i) * p.M + j];
    }
};

// The product of matrices first .. first + batch - 1, by NsKernels.
Bytes on_device(const Product& p, NsType type, const Operands& x, int first, int batch) {
    auto slice = [&](const Floats& all, size_t matrix) {
        return encode(Floats(all.begin() + first * matrix, all.begin() + (first + batch) * matrix), type);
    };
    size_t size_d = size_t(p.M) * p.N;
    DeviceBuffer<unsigned char> A(slice(x.A, size_t(p.M) * p.K)), B(slice(x.B, size_t(p.N) * p.K));
    DeviceBuffer<unsigned char> C(x.C.empty() ? Bytes() : slice(x.C, size_d)), D(batch * size_d * ns_type_bytes(type));
    NsKernels::ns_product(D, A, B, x.C.empty() ? nullptr : C.data(), p.alpha, p.beta, p.diag, batch, p.M, p.N, p.K,
                          p.kind, type);
    CHECK(D.guards_intact());
    return D.download();
}

// A sum of K products in fp32, in any order and with the truncation that tensor cores apply when they align 16 addends,
// is off by at most about 1.25 K + 8 units of 2^-23 of the sum of magnitudes. Then there is one rounding to `type`.
double product_bound(double exact, double magnitude, int K, NsType type) {
    double sum_error = (1.25 * K + 8) * std::ldexp(magnitude, -23);
    return unit(type) * (std::fabs(exact) + sum_error) + sum_error + smallest(type);
}

void check_product(const Product& p, NsType type) {
    CAPTURE(name_of(type));
    CAPTURE(p.M);
    CAPTURE(p.N);
    CAPTURE(p.K);
    CAPTURE(p.beta);
    bool symmetric = p.kind == NsProduct::symmetric_nt;
    Operands x(p, type);
    Bytes device = on_device(p, type, x, 0, kBatch), cpu(device.size());
    Bytes A = encode(x.A, type), B = encode(x.B, type), C = encode(x.C, type);
    CpuOps::ns_product(cpu.data(), A.data(), B.data(), x.C.empty() ? nullptr : C.data(), p.alpha, p.beta, p.diag,
                       kBatch, p.M, p.N, p.K, p.kind, type);
    Floats got = decode(device, type), peer = decode(cpu, type);

    int outside = 0, outside_peer = 0, asymmetric = 0;
    for (size_t b = 0; b < kBatch; b++) {
        for (int i = 0; i < p.M; i++) {
            for (int j = 0; j < p.N; j++) {
                double sum = 0, magnitude = 0;
                for (int k = 0; k < p.K; k++) {
                    size_t at_b = symmetric ? (b * p.N + j) * p.K + k : (b * p.K + k) * p.N + j;
                    double product = double(x.A[(b * p.M + i) * p.K + k]) * x.B[at_b];
                    sum += product;
                    magnitude += std::fabs(product);
                }
                size_t at = (b * p.M + i) * p.N + j;
                double c = x.C.empty() ? 0.0 : double(p.beta) * x.C[at], diag = i == j ? p.diag : 0.0f;
                double exact = p.alpha * sum + c + diag;
                magnitude = std::fabs(p.alpha) * magnitude + std::fabs(c) + std::fabs(diag);
                double bound = product_bound(exact, magnitude, p.K, type);
                outside += !(std::fabs(got[at] - exact) <= bound);
                outside_peer += !(std::fabs(got[at] - peer[at]) <= 2 * bound);
                if (symmetric) asymmetric += got[at] != got[(b * p.M + j) * p.M + i];
            }
        }
    }
    CHECK(outside == 0);
    CHECK(outside_peer == 0);
    CHECK(asymmetric == 0);

    size_t matrix = device.size() / kBatch;
    for (int b = 0; b < kBatch; b++) {
        Bytes alone = on_device(p, type, x, b, 1);
        CHECK(std::memcmp(alone.data(), &device[b * matrix], matrix) == 0);
    }
}

TEST_CASE("ns_product against sums in double, alone and in a batch") {
    const NsProduct nt = NsProduct::symmetric_nt, nn = NsProduct::nn;
    const Product products[] = {
        {nt, 8, 8, 8, 1, 0, 0},         {nt, 64, 64, 64, 1, 0, 0},           {nt, 80, 80, 136, 1, 0, 0},
        {nt, 136, 136, 264, 1, 0, 0},   {nt, 136, 136, 136, 2.5f, -1.5f, 0}, {nt, 264, 264, 24, 0.5f, 2, 3},
        {nt, 136, 136, 0, 0, 1, 0.75f},  // no inner dimension: the ends alone
        {nn, 8, 8, 8, 1, 0, 0},         {nn, 64, 64, 64, 1, 0, 0},           {nn, 80, 136, 80, 1, 1.5f, 0},
        {nn, 136, 264, 136, 1, -2, 0},  {nn, 136, 8, 200, -1.5f, 0, 0},      {nn, 24, 392, 16, 1, 0.5f, 1.25f},
    };
    for (const Product& p : products)
        for (NsType type : kTypes) check_product(p, type);
}

#ifndef FIBER
// Against cuBLAS with the same 16-bit operands and an fp32 result: both sum in fp32.
TEST_CASE("ns_product against cuBLAS at the sizes of GPT-2") {
    const NsProduct nt = NsProduct::symmetric_nt, nn = NsProduct::nn;
    const Product products[] = {{nt, 768, 768, 768, 1, 0, 0},    {nt, 768, 768, 3072, 1, 0, 0},
                                {nt, 1600, 1600, 1600, 1, 0, 0}, {nn, 768, 768, 768, 1, 0, 0},
                                {nn, 768, 3072, 768, 1, 0, 0},   {nn, 1600, 6400, 1600, 1, 0, 0}};
    for (const Product& p : products) {
        for (NsType type : {NsType::bf16, NsType::fp16}) {
            CAPTURE(name_of(type));
            CAPTURE(p.M);
            CAPTURE(p.N);
            CAPTURE(p.K);
            bool symmetric = p.kind == NsProduct::symmetric_nt;
            Operands x(p, type);
            Floats got = decode(on_device(p, type, x, 0, kBatch), type);
            auto by_cublas = [&](Floats A_values, Floats B_values) {
                DeviceBuffer<unsigned char> A(encode(A_values, type)), B(encode(B_values, type));
                DeviceBuffer<float> D(got.size());
                cudaDataType_t data = type == NsType::bf16 ? CUDA_R_16BF : CUDA_R_16F;
                float one = 1, zero = 0;
                // Column-major: D^T (N, M) = op(B)^T A^T
                cublasStatus_t status = cublasGemmStridedBatchedEx(
                    blas(), symmetric ? CUBLAS_OP_T : CUBLAS_OP_N, CUBLAS_OP_N, p.N, p.M, p.K, &one, B.data(), data,
                    symmetric ? p.K : p.N, (long long)p.N * p.K, A.data(), data, p.K, (long long)p.M * p.K, &zero,
                    D.data(), CUDA_R_32F, p.N, (long long)p.M * p.N, kBatch, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
                REQUIRE(status == CUBLAS_STATUS_SUCCESS);
                return D.download();
            };
            Floats want = by_cublas(x.A, x.B);
            for (float& a : x.A) a = std::fabs(a);
            for (float& b : x.B) b = std::fabs(b);
            Floats magnitude = by_cublas(x.A, x.B);
            size_t outside = 0, asymmetric = 0;
            for (size_t i = 0; i < got.size(); i++) {
                double bound = 2 * product_bound(want[i], magnitude[i], p.K, type);
                outside += !(std::fabs(double(got[i]) - want[i]) <= bound);
                size_t matrix = i / (size_t(p.M) * p.N) * p.M * p.N, row = i / p.N % p.M, col = i % p.N;
                if (symmetric) asymmetric += got[i] != got[matrix + col * p.M + row];
            }
            CHECK(outside == 0);
            CHECK(asymmetric == 0);
        }
    }
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// ns_normalize and muon_update

struct Sizes {
    int rows, cols;
    int m() const { return std::min(rows, cols); }
    int n() const { return std::max(rows, cols); }
    size_t padded() const { return size_t(round_up(m(), 8)) * round_up(n(), 8); }
};

std::vector<Sizes> all_sizes() {
    std::vector<Sizes> sizes = {{8, 8}, {64, 64}, {77, 130}, {130, 77}, {136, 264}, {264, 136}, {3, 200}};
    if (large_sizes()) sizes.insert(sizes.end(), {{768, 768}, {768, 3072}, {3072, 768}});
    return sizes;
}

// kBatch matrices side by side in one arena, as tiles of a larger matrix are: the row stride is larger than cols.
// Between them lie elements that are nobody's. The two offsets of a matrix differ, as they do in the optimizer.
struct Tiles {
    std::vector<MatrixRef> refs;
    size_t elements;
    explicit Tiles(const Sizes& s) {
        int ld = kBatch * (s.cols + 3) + 2;
        for (size_t b = 0; b < kBatch; b++) {
            size_t at = b * (s.cols + 3);
            refs.push_back({at + 5, at + 1, ld});
        }
        elements = size_t(s.rows) * ld + 5;
    }
};

TEST_CASE("ns_normalize: x / |x|, transposed if tall, zero-padded, for gradients of any size") {
    for (Sizes s : all_sizes()) {
        for (float scale : {1e-20f, 1e-10f, 1.0f, 1e10f, 0.0f}) {
            CAPTURE(s.rows);
            CAPTURE(s.cols);
            CAPTURE(scale);
            Tiles tiles(s);
            DeviceBuffer<MatrixRef> refs(tiles.refs);
            Floats values = normal(tiles.elements, 4, scale);
            DeviceBuffer<float> grads(values);
            DeviceBuffer<double> scratch(NsKernels::ns_scratch_doubles(kBatch));
            for (NsType type : kTypes) {
                CAPTURE(name_of(type));
                size_t bytes = s.padded() * ns_type_bytes(type);
                DeviceBuffer<unsigned char> X(kBatch * bytes);
                NsKernels::ns_normalize(X, scratch, grads, refs, kBatch, s.rows, s.cols, type);
                CHECK(X.guards_intact());
                CHECK(scratch.guards_intact());
                Bytes batch = X.download(), cpu(batch.size());
                Doubles cpu_scratch(CpuOps::ns_scratch_doubles(kBatch));
                CpuOps::ns_normalize(cpu.data(), cpu_scratch.data(), values.data(), tiles.refs.data(), kBatch, s.rows,
                                     s.cols, type);
                Floats got = decode(batch, type), peer = decode(cpu, type);

                int outside = 0;
                for (int b = 0; b < kBatch; b++) {
                    const float* x = &values[tiles.refs[b].offset];
                    size_t ld = tiles.refs[b].ld;
                    double squares = 0;
                    for (int i = 0; i < s.rows; i++)
                        for (int j = 0; j < s.cols; j++) squares += double(x[i * ld + j]) * x[i * ld + j];
                    for (size_t at = 0; at < s.padded(); at++) {
                        int np = round_up(s.n(), 8), i = int(at / np), j = int(at % np);
                        bool inside = i < s.m() && j < s.n();
                        double element = !inside ? 0.0 : s.rows > s.cols ? x[j * ld + i] : x[i * ld + j];
                        double exact = scale == 0 ? 0.0 : element / std::sqrt(squares);
                        // one rounding to float, one to `type`
                        double bound = (unit(type) + std::ldexp(1.001, -24)) * std::fabs(exact);
                        if (exact != 0) bound += smallest(type);
                        outside += !(std::fabs(got[b * s.padded() + at] - exact) <= bound);
                        outside += !(std::fabs(got[b * s.padded() + at] - peer[b * s.padded() + at]) <= 2 * bound);
                    }
                    DeviceBuffer<unsigned char> alone(bytes);
                    NsKernels::ns_normalize(alone, scratch, grads, refs + b, 1, s.rows, s.cols, type);
                    CHECK(std::memcmp(alone.download().data(), &batch[b * bytes], bytes) == 0);
                }
                CHECK(outside == 0);
            }
        }
    }
}

TEST_CASE("muon_update: master = master * decay - step * U, transposed back, nothing else touched") {
    const float decay = 0.99f, step = 0.02f;
    for (Sizes s : all_sizes()) {
        CAPTURE(s.rows);
        CAPTURE(s.cols);
        Tiles tiles(s);
        DeviceBuffer<MatrixRef> refs(tiles.refs);
        Floats before = normal(tiles.elements, 5);
        std::vector<real> params_before(tiles.elements);
        std::memset(static_cast<void*>(params_before.data()), 0x11, tiles.elements * sizeof(real));
        for (NsType type : kTypes) {
            CAPTURE(name_of(type));
            Bytes u = encode(normal(kBatch * s.padded(), 6), type);
            Floats U = decode(u, type);
            DeviceBuffer<unsigned char> device_u(u);
            DeviceBuffer<float> master(before), clip(Floats{0.5f, 2.0f}), skip(Floats{0.0f, INFINITY});
            DeviceBuffer<real> params(params_before);
            auto update = [&](const DeviceBuffer<float>& scale, int first, int batch) {
                const unsigned char* u_first = device_u + first * s.padded() * ns_type_bytes(type);
                NsKernels::muon_update(params, master, u_first, refs + first, batch, s.rows, s.cols, decay, step, type,
                                       scale);
            };
            auto same_bits = [](const auto& a, const auto& b) {
                return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
            };

            update(skip, 0, kBatch);  // a clip scale of 0: the gradients were not finite
            CHECK(same_bits(master.download(), before));
            CHECK(same_bits(params.download(), params_before));

            update(clip, 0, kBatch);
            CHECK(master.guards_intact());
            CHECK(params.guards_intact());
            Floats after = master.download();
            std::vector<real> params_after = params.download();
            Doubles want(before.begin(), before.end()), bound(before.size(), 0.0);
            for (size_t b = 0; b < kBatch; b++) {
                for (int i = 0; i < s.rows; i++) {
                    for (int j = 0; j < s.cols; j++) {
                        size_t offset = size_t(i) * tiles.refs[b].ld + j, np = round_up(s.n(), 8);
                        double update = double(step) * U[b * s.padded() + (s.rows > s.cols ? j * np + i : i * np + j)];
                        double kept = double(decay) * before[tiles.refs[b].state + offset];
                        want[tiles.refs[b].state + offset] = kept - update;
                        // two products and a difference in fp32
                        bound[tiles.refs[b].state + offset] = std::ldexp(std::fabs(kept) + std::fabs(update), -23);
                        // params_before becomes what is expected afterwards
                        CpuOps::store(params_before.data(), tiles.refs[b].offset + offset,
                                      after[tiles.refs[b].state + offset],
                                      sizeof(real) == 4 ? NsType::fp32 : NsType::bf16);
                    }
                }
            }
            int outside = 0;
            for (size_t i = 0; i < want.size(); i++) outside += !(std::fabs(after[i] - want[i]) <= bound[i]);
            CHECK(outside == 0);
            CHECK(same_bits(params_after, params_before));

            master.upload(before);
            for (int b = kBatch - 1; b >= 0; b--) update(clip, b, 1);
            CHECK(same_bits(master.download(), after));
            std::memset(static_cast<void*>(params_before.data()), 0x11, tiles.elements * sizeof(real));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The whole iteration. The matrix is made from known singular vectors and values, X = P diag(s) Q^T, so the exact
// answer is P diag(p(s / |s|)) Q^T with the polynomial p applied to numbers in double: no decomposition is needed.

// (size, columns) with orthonormal columns: cosines, which are orthogonal for any size, with random signs against their
// regularity.
Doubles orthonormal_columns(int size, int columns, unsigned seed) {
    std::mt19937 generator(seed);
    Doubles Q(size_t(size) * columns);
    for (int i = 0; i < size; i++) {
        double scale = std::sqrt(2.0 / size) * (generator() % 2 ? 1.0 : -1.0);
        for (int k = 0; k < columns; k++)
            Q[size_t(i) * columns + k] = k == 0 ? scale * M_SQRT1_2 : scale * std::cos(M_PI * (i + 0.5) * k / size);
    }
    return Q;
}

// P diag(s) Q^T with P (rows, r), Q (cols, r)
Doubles assemble(const Doubles& P, const Doubles& s, const Doubles& Q, int rows, int cols) {
    int r = int(s.size());
    Doubles scaled = P, X(size_t(rows) * cols);
    for (size_t i = 0; i < scaled.size(); i++) scaled[i] *= s[i % r];
#ifdef FIBER
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < cols; j++)
            for (int k = 0; k < r; k++) X[size_t(i) * cols + j] += scaled[size_t(i) * r + k] * Q[size_t(j) * r + k];
    return X;
#else
    DeviceBuffer<double> device_p(scaled), device_q(Q), device_x(X);
    double one = 1, zero = 0;
    cublasStatus_t status = cublasDgemm(blas(), CUBLAS_OP_T, CUBLAS_OP_N, cols, rows, r, &one, device_q, r, device_p, r,
                                        &zero, device_x, cols);
    REQUIRE(status == CUBLAS_STATUS_SUCCESS);
    return device_x.download();
#endif
}

// Singular values of a (m, n) gaussian matrix: quantiles of the Marchenko-Pastur law, whose density for s in units of
// sqrt(n) is sqrt((high^2 - s^2)(s^2 - low^2)) / s with low, high = 1 -+ sqrt(m/n).
Doubles gaussian_spectrum(int m, int n) {
    const int grid = 100000;
    double low = 1 - std::sqrt(double(m) / n), high = 1 + std::sqrt(double(m) / n), total = 0;
    Doubles mass(grid), values;
    auto value = [&](int i) { return low + (high - low) * (i + 0.5) / grid; };
    for (int i = 0; i < grid; i++) {
        double s = value(i);
        total += std::sqrt(std::max(0.0, (high * high - s * s) * (s * s - low * low))) / s;
        mass[i] = total;
    }
    for (int i = 0, at = 0; i < m; i++) {
        while (mass[at] < total * (i + 0.5) / m) at++;
        values.push_back(value(at));
    }
    return values;
}

// By power iteration; with close-by values it stops a little below.
double largest_singular_value(const Floats& X, int rows, int cols) {
    Doubles v(cols), u(rows);
    for (int j = 0; j < cols; j++) v[j] = std::sin(1.0 + j);
    double length = 0;
    for (int round = 0; round < 200; round++) {
        std::fill(u.begin(), u.end(), 0.0);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) u[i] += X[size_t(i) * cols + j] * v[j];
        std::fill(v.begin(), v.end(), 0.0);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) v[j] += X[size_t(i) * cols + j] * u[i];
        length = 0;
        for (double x : v) length += x * x;
        length = std::sqrt(length);
        for (double& x : v) x /= length;
    }
    return std::sqrt(length);
}

// One matrix through ns_normalize, newton_schulz and muon_update with decay 1 and step -1, which adds U to a master of
// zeros.
Floats orthogonalise(const Floats& X, int rows, int cols, const NsConfig& config) {
    int mp = round_up(std::min(rows, cols), 8), np = round_up(std::max(rows, cols), 8);
    DeviceBuffer<unsigned char> memory(NsWorkspace::bytes(1, mp, np, config.type));
    DeviceBuffer<double> scratch(NsKernels::ns_scratch_doubles(1));
    DeviceBuffer<MatrixRef> refs(std::vector<MatrixRef>{{0, 0, cols}});
    DeviceBuffer<float> grads(X), master(Floats(X.size(), 0.0f)), clip(Floats{1.0f, 1.0f});
    DeviceBuffer<real> params(X.size());
    NsWorkspace w(memory.data(), 1, mp, np, config.type);
    NsKernels::ns_normalize(w.X, scratch, grads, refs, 1, rows, cols, config.type);
    newton_schulz<NsKernels>(w, 1, mp, np, config);
    NsKernels::muon_update(params, master, w.X, refs, 1, rows, cols, 1.0f, -1.0f, config.type, clip);
    CHECK(memory.guards_intact());
    return master.download();
}

TEST_CASE("Newton-Schulz against the exact map of the same polynomial, polar_express") {
    std::vector<Sizes> sizes = {{64, 64}, {77, 130}, {130, 77}};
    if (large_sizes()) sizes.insert(sizes.end(), {{768, 768}, {768, 3072}, {1600, 1600}});
    for (Sizes size : sizes) {
        int rows = size.rows, cols = size.cols, m = size.m();
        Doubles P = orthonormal_columns(rows, m, 7), Q = orthonormal_columns(cols, m, 8);
        Doubles gaussian = gaussian_spectrum(m, size.n()), power(m), dominated(m), log_uniform(m);
        for (int i = 0; i < m; i++) {
            power[i] = 1.0 / (i + 1);
            dominated[i] = i == 0 ? 1.0 : 0.01 * gaussian[i] / gaussian[m - 1];
            log_uniform[i] = std::pow(10.0, -4.0 * i / (m - 1));
        }
        const std::pair<const char*, Doubles> spectra[] = {{"gaussian", gaussian},
                                                           {"power law", power},
                                                           {"rank-1-dominated", dominated},
                                                           {"log-uniform 1..1e-4", log_uniform}};
        for (const auto& [spectrum, values] : spectra) {
            Doubles X = assemble(P, values, Q, rows, cols), mapped = values;
            double norm = 0, largest = 0;
            for (double s : values) norm += s * s;
            for (double& s : mapped) {
                s /= std::sqrt(norm);
                for (int k = 0; k < 5; k++) {
                    auto [a, b, c] = ns_coefficients("polar_express", k);
                    s = a * s + b * s * s * s + c * s * s * s * s * s;
                }
                largest = std::max(largest, s);
            }
            Doubles want = assemble(P, mapped, Q, rows, cols);
            for (bool gram : {false, true}) {
                for (NsType type : {NsType::bf16, NsType::fp16}) {
                    std::string what = strprintf("%s, %d x %d, %s, %s", spectrum, rows, cols,
                                                 gram ? "gram" : "standard", name_of(type));
                    CAPTURE(what);
                    NsConfig config = {gram, "polar_express", 5, type};
                    Floats got = orthogonalise(Floats(X.begin(), X.end()), rows, cols, config);
                    double dot = 0, got_squares = 0, want_squares = 0;
                    for (size_t i = 0; i < got.size(); i++) {
                        dot += got[i] * want[i];
                        got_squares += double(got[i]) * got[i];
                        want_squares += want[i] * want[i];
                    }
                    double cosine = dot / std::sqrt(got_squares * want_squares);
                    double got_largest = largest_singular_value(got, rows, cols);
                    CAPTURE(cosine);
                    CAPTURE(got_largest);
                    CHECK(cosine >= (type == NsType::bf16 ? 0.99 : 0.999));
                    CHECK(got_largest <= 1.03 * largest);
                }
            }
        }
    }
}

}  // namespace test_ns
