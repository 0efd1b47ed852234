// Tests of ns_kernels.cuh: one source, compiled by g++ -DFIBER (kernels on the CPU, small sizes) and by nvcc (the GPU,
// all sizes).
//   1. ns_product against loops in double, against CpuOps, and on a GPU against cuBLAS at the sizes of GPT-2;
//   2. norm_sums, muon_inverse_norms, muon_momentum and muon_update against their definitions in double: tiles of
//   larger
//      matrices, lying and standing, gradients of 1e-20 to 1e+10, gradient and momentum that cancel;
//   3. the same bits in a batch of three as alone; more products in a chain than a launch takes;
//   4. the whole Newton-Schulz iteration of dmuon.cuh against the exact polynomial of known singular values.
// Outputs start as NaN with guard zones on both sides (device_buffer.h), so that a store that is missing or astray is
// seen.
#include <doctest/doctest.h>

#include <cmath>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "../cpu_backend.h"
#include "../dmuon.cuh"
#include "../kernels/gpt_kernels.cuh"
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
    bool same = false;        // B is A, in the same place
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
            for (size_t i = 0; i < B.size(); i++) B[i] = p.same ? A[i] : std::ldexp(A[i], int(i % p.K % 3) - 1);
        if (p.beta == 0) return;
        C = decode(encode(normal(kBatch * size_t(p.M) * p.N, 3), type), type);
        for (int b = 0; symmetric && b < kBatch; b++)
            for (int i = 0; i < p.M; i++)
                for (int j = 0; j < i; j++) C[(size_t(b) * p.M + j) * p.M + i] = C[(size_t(b) * p.M + i) * p.M + j];
    }
};

// A product by itself takes the portable kernel; one of a chain, where the GPU has it, that of ns_hopper.cuh.
enum class Path { alone, chain };
const std::vector<Path> kPaths = {Path::alone, Path::chain};

// The product of matrices first .. first + batch - 1, by NsKernels.
Bytes on_device(const Product& p, NsType type, const Operands& x, int first, int batch, Path path) {
    auto slice = [&](const Floats& all, size_t matrix) {
        return encode(Floats(all.begin() + first * matrix, all.begin() + (first + batch) * matrix), type);
    };
    size_t size_d = size_t(p.M) * p.N;
    DeviceBuffer<unsigned char> A(slice(x.A, size_t(p.M) * p.K)), B(slice(x.B, size_t(p.N) * p.K));
    DeviceBuffer<unsigned char> C(x.C.empty() ? Bytes() : slice(x.C, size_d)), D(batch * size_d * ns_type_bytes(type));
    DeviceBuffer<int> counters(ns_chain_counters(batch));
    {
        std::optional<NsKernels::NsChain> chain;
        if (path == Path::chain) chain.emplace(batch, type, counters.data());
        NsKernels::ns_product(D, A, p.same ? A.data() : B.data(), x.C.empty() ? nullptr : C.data(), p.alpha, p.beta,
                              p.diag, batch, p.M, p.N, p.K, p.kind, type);
    }
    CHECK(counters.guards_intact());
    CHECK(D.guards_intact());
    return D.download();
}

// A sum of K products in fp32, in any order and with the truncation that tensor cores apply when they align 16 addends,
// is off by at most about 1.25 K + 8 units of 2^-23 of the sum of magnitudes. Then there is one rounding to `type`.
double product_bound(double exact, double magnitude, int K, NsType type) {
    double sum_error = (1.25 * K + 8) * std::ldexp(magnitude, -23);
    return unit(type) * (std::fabs(exact) + sum_error) + sum_error + smallest(type);
}

void check_product(const Product& p, NsType type, Path path) {
    CAPTURE(path == Path::chain);
    CAPTURE(name_of(type));
    CAPTURE(p.M);
    CAPTURE(p.N);
    CAPTURE(p.K);
    CAPTURE(p.beta);
    bool symmetric = p.kind == NsProduct::symmetric_nt;
    Operands x(p, type);
    Bytes device = on_device(p, type, x, 0, kBatch, path), cpu(device.size());
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
        Bytes alone = on_device(p, type, x, b, 1, path);
        CHECK(std::memcmp(alone.data(), &device[b * matrix], matrix) == 0);
    }
}

TEST_CASE("ns_product against sums in double, alone and in a batch") {
    const NsProduct nt = NsProduct::symmetric_nt, nn = NsProduct::nn;
    const Product products[] = {
        {nt, 8, 8, 8, 1, 0, 0},
        {nt, 64, 64, 64, 1, 0, 0},
        {nt, 80, 80, 136, 1, 0, 0},
        {nt, 136, 136, 264, 1, 0, 0},
        {nt, 136, 136, 136, 2.5f, -1.5f, 0},
        {nt, 264, 264, 24, 0.5f, 2, 3},
        {nt, 136, 136, 0, 0, 1, 0.75f},  // no inner dimension: the ends alone
        {nn, 8, 8, 8, 1, 0, 0},
        {nn, 64, 64, 64, 1, 0, 0},
        {nn, 80, 136, 80, 1, 1.5f, 0},
        {nn, 136, 264, 136, 1, -2, 0},
        {nn, 136, 8, 200, -1.5f, 0, 0},
        {nn, 24, 392, 16, 1, 0.5f, 0},
        {nt, 136, 136, 72, 1, 0, 0, true},
        {nt, 264, 264, 264, 1.5f, -0.5f, 0.25f, true},
        {nt, 400, 400, 80, 1, 1, 0, true},
    };
    for (const Product& p : products)
        for (NsType type : kTypes)
            for (Path path : kPaths) check_product(p, type, path);
}

// X_{k+1} = P X_k, with P the matrix that moves rows up by one: exact, and a product that sees what its predecessor has
// not stored yet is off by a row for good.
TEST_CASE("a chain of more products than a launch takes") {
    const int M = 136, N = 72, batch = 2, products = 2 * kNsChainProducts + 3;
    const size_t matrix = size_t(M) * N;
    for (NsType type : {NsType::bf16, NsType::fp16}) {
        CAPTURE(name_of(type));
        Floats P(batch * size_t(M) * M, 0.0f);
        for (int i = 0; i < batch * M; i++) P[size_t(i) * M + (i % M + 1) % M] = 1;
        const Bytes start = encode(normal(batch * matrix, 2), type);
        const DeviceBuffer<unsigned char> device_p(encode(P, type)), first(start), other(start.size());
        const DeviceBuffer<int> counters(ns_chain_counters(batch));
        {
            NsKernels::NsChain chain(batch, type, counters);
            for (int k = 0; k < products; k++)
                NsKernels::ns_product(k % 2 ? first : other, device_p, k % 2 ? other : first, nullptr, 1, 0, 0, batch,
                                      M, N, M, NsProduct::nn, type);
        }
        const Floats got = decode((products % 2 ? other : first).download(), type), x0 = decode(start, type);
        int wrong = 0;
        for (int b = 0; b < batch; b++)
            for (int i = 0; i < M; i++)
                for (int c = 0; c < N; c++)
                    wrong += got[b * matrix + i * N + c] != x0[b * matrix + ((i + products) % M) * size_t(N) + c];
        CHECK(wrong == 0);
        CHECK(counters.guards_intact());
    }
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
            std::vector<Floats> by_path;
            for (Path path : kPaths) by_path.push_back(decode(on_device(p, type, x, 0, kBatch, path), type));
            auto by_cublas = [&](Floats A_values, Floats B_values) {
                DeviceBuffer<unsigned char> A(encode(A_values, type)), B(encode(B_values, type));
                DeviceBuffer<float> D(by_path[0].size());
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
            for (const Floats& got : by_path) {
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
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// norm_sums, muon_inverse_norms, muon_momentum and muon_update

struct Sizes {
    int m, n;  // lying down
    size_t padded() const { return size_t(round_up(m, 8)) * round_up(n, 8); }
};

std::vector<Sizes> all_sizes() {
    std::vector<Sizes> sizes = {{8, 8}, {64, 64}, {77, 130}, {136, 264}, {3, 200}, {67, 96}};
    if (large_sizes()) sizes.insert(sizes.end(), {{768, 768}, {768, 3072}, {50, 1600}});
    return sizes;
}

// kBatch matrices one after the other in one arena, every second one standing up, each a tile of a larger one: the row
// stride is larger than its columns. Between them lie elements that are nobody's. The two offsets of a matrix differ,
// as they do in the optimizer. Not aligned: 16-byte accesses are not allowed. Each matrix is three blocks of the norm;
// others stand before and behind.
struct Layout {
    std::vector<MatrixRef> refs;
    std::vector<NormBlock> blocks;
    size_t elements = 0;
    Layout(const Sizes& s, bool aligned) {
        blocks.push_back({4, 0, 7, 1, 7, false, true});  // a flat one, which ends within 16 bytes
        blocks.push_back({0, 0, 8, 0, 8, true, true});   // another rank's
        for (int b = 0; b < kBatch; b++) {
            const bool tall = b % 2 == 1;
            const int rows = tall ? s.n : s.m, cols = tall ? s.m : s.n, ld = aligned ? round_up(cols, 4) + 4 : cols + 3;
            const size_t offset = elements + (aligned ? 8 : 5), state = elements + (aligned ? 4 : 1);
            refs.push_back({offset, state, ld, tall, 0.5f + float(b), int(blocks.size()), 0});
            const int height = ceil_div(rows, 3);
            for (int r = 0; r < rows; r += height, refs.back().blocks++)
                blocks.push_back({offset + size_t(r) * ld, state + size_t(r) * ld, ld, std::min(height, rows - r), cols,
                                  true, b != 2});  // the last matrix counts elsewhere
            elements += size_t(rows) * ld + 16;
        }
        blocks.push_back({12, 0, 5, 1, 5, false, true});
    }
    static size_t element(const MatrixRef& ref, int i, int j) {  // (i, j) of the matrix lying down
        return ref.tall ? size_t(j) * ref.ld + i : size_t(i) * ref.ld + j;
    }
};

template <class A, class B>
bool same_bits(const A& a, const B& b) {
    return std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
}

// One way of a step from gradients and momentum to X, on a backend's operations.
struct Momentum {
    float mu = 0.95f;
    bool nesterov = true;
    float scale = 1.0f;
    double a() const { return nesterov ? (1.0 + double(mu)) * scale : double(scale); }  // x = a g + b buf
    double b() const { return nesterov ? double(mu) * mu : double(mu); }
};

void check_momentum(const Sizes& s, const Layout& layout, const Floats& grads, const Floats& momentum,
                    const Momentum& way) {
    CAPTURE(s.m);
    CAPTURE(s.n);
    CAPTURE(way.nesterov);
    CAPTURE(way.scale);
    const int n = int(layout.blocks.size());
    const DeviceBuffer<NormBlock> blocks(layout.blocks);
    const DeviceBuffer<MatrixRef> refs(layout.refs);
    const DeviceBuffer<float> device_grads(grads), clip(Floats{way.scale, 1, 0, 0}), skip(Floats{0, INFINITY, 0, 0});
    DeviceBuffer<float> device_momentum(momentum), inverse(kBatch);
    DeviceBuffer<double> squares(n), dots(2 * n);

    GptKernels::norm_sums(squares, dots, device_grads, device_momentum, blocks, n);
    const Doubles got_squares = squares.download(), got_dots = dots.download();
    Doubles cpu_squares(n), cpu_dots(2 * n);
    CpuOps::norm_sums(cpu_squares.data(), cpu_dots.data(), grads.data(), momentum.data(), layout.blocks.data(), n);
    for (int i = 0; i < n; i++) {
        CAPTURE(i);
        const NormBlock& block = layout.blocks[i];
        long double gg = 0, gb = 0, bb = 0, both = 0;  // so that the bound is that of the kernels' sums
        for (int r = 0; r < block.rows; r++) {
            for (int c = 0; c < block.cols; c++) {
                const double x = grads[block.offset + size_t(r) * block.ld + c],
                             y = block.muon ? momentum[block.state + size_t(r) * block.ld + c] : 0.0f;
                gg += x * x, gb += x * y, bb += y * y, both += std::fabs(x * y);
            }
        }
        if (!block.counted) gg = 0;
        const double most = 1e-13;  // taken in parts: at most some hundred roundings of 1.1e-16 in a row
        auto check = [&](const Doubles& sums, const Doubles& products) {
            CHECK(std::fabs(sums[i] - gg) <= most * gg);
            if (!block.muon) return;
            CHECK(std::fabs(products[2 * i] - gb) <= most * both);
            CHECK(std::fabs(products[2 * i + 1] - bb) <= most * bb);
        };
        check(got_squares, got_dots);
        check(cpu_squares, cpu_dots);
    }
    // On one GPU every matrix counts.
    Doubles all_squares = got_squares;
    for (int i = 0; i < n; i++) {
        NormBlock block = layout.blocks[i];
        block.counted = true;
        double dot[2];
        CpuOps::norm_sums(&all_squares[i], dot, grads.data(), momentum.data(), &block, 1);
    }
    squares.upload(all_squares);

    NsKernels::muon_inverse_norms(inverse, squares, dots, refs, kBatch, way.mu, way.nesterov, clip);
    const Floats got_inverse = inverse.download();
    Floats cpu_inverse(kBatch);
    CpuOps::muon_inverse_norms(cpu_inverse.data(), all_squares.data(), cpu_dots.data(), layout.refs.data(), kBatch,
                               way.mu, way.nesterov, clip.download().data());
    Doubles exact_inverse(kBatch), inverse_error(kBatch);  // the latter relative
    for (int b = 0; b < kBatch; b++) {
        const MatrixRef& ref = layout.refs[b];
        double squared = 0, positive = 0;
        for (int i = 0; i < s.m; i++) {
            for (int j = 0; j < s.n; j++) {
                const double g = way.a() * grads[ref.offset + Layout::element(ref, i, j)],
                             buf = way.b() * momentum[ref.state + Layout::element(ref, i, j)];
                squared += (g + buf) * (g + buf), positive += g * g + buf * buf;
            }
        }
        const double least = std::max(squared, kLeastNormSquared * positive);
        exact_inverse[b] = least > 0 ? 1 / std::sqrt(least) : 0;
        // rounded to float; what the form loses is of `positive`
        inverse_error[b] = least > 0 ? std::ldexp(1.001, -24) + 1e-13 * positive / least : 0;
        const double most = inverse_error[b] * exact_inverse[b];
        CHECK(std::fabs(got_inverse[b] - exact_inverse[b]) <= most);
        CHECK(std::fabs(cpu_inverse[b] - exact_inverse[b]) <= most);
    }

    for (NsType type : kTypes) {
        CAPTURE(name_of(type));
        const size_t bytes = s.padded() * ns_type_bytes(type);
        DeviceBuffer<unsigned char> X(kBatch * bytes);
        const Bytes nothing = X.download();
        auto run = [&](const DeviceBuffer<float>& with, const unsigned char* to, int first, int count) {
            NsKernels::muon_momentum(const_cast<unsigned char*>(to), device_momentum, device_grads, refs + first,
                                     inverse + first, count, s.m, s.n, way.mu, way.nesterov, type, with);
        };
        device_momentum.upload(momentum);
        run(skip, X, 0, kBatch);  // a clip scale of 0: not one bit may change
        CHECK(same_bits(X.download(), nothing));
        CHECK(same_bits(device_momentum.download(), momentum));
        run(clip, X, 0, kBatch);
        CHECK(X.guards_intact());
        CHECK(device_momentum.guards_intact());
        const Bytes batch = X.download();
        const Floats got = decode(batch, type), after = device_momentum.download();
        Bytes cpu(batch.size());
        Floats cpu_after = momentum;
        CpuOps::muon_momentum(cpu.data(), cpu_after.data(), grads.data(), layout.refs.data(), cpu_inverse.data(),
                              kBatch, s.m, s.n, way.mu, way.nesterov, type, clip.download().data());
        const Floats peer = decode(cpu, type);

        int outside = 0;
        size_t written = 0, changed = 0;
        for (int b = 0; b < kBatch; b++) {
            const MatrixRef& ref = layout.refs[b];
            double length = 0;
            for (size_t at = 0; at < s.padded(); at++) {
                const int np = round_up(s.n, 8), i = int(at / np), j = int(at % np);
                const float x = got[b * s.padded() + at], of_cpu = peer[b * s.padded() + at];
                length += double(x) * x;
                if (i >= s.m || j >= s.n) {  // padding
                    outside += x != 0 || of_cpu != 0;
                    continue;
                }
                const size_t element = Layout::element(ref, i, j);
                const double g = grads[ref.offset + element], buf = momentum[ref.state + element];
                const double want_buf = way.mu * buf + way.scale * g;
                const double terms = std::fabs(way.mu * buf) + std::fabs(way.scale * g);
                // scaling, product and sum in fp32
                for (float value : {after[ref.state + element], cpu_after[ref.state + element]})
                    outside += !(std::fabs(value - want_buf) <= std::ldexp(terms, -23));
                written++;
                // two more such operations for x, one for its division, then one rounding
                const double want = (way.a() * g + way.b() * buf) * exact_inverse[b];
                const double error =
                    3 * std::ldexp(terms, -23) * exact_inverse[b] + 2 * inverse_error[b] * std::fabs(want);
                const double bound = unit(type) * (std::fabs(want) + error) + error + (want != 0 ? smallest(type) : 0);
                outside += !(std::fabs(x - want) <= bound);
                outside += !(std::fabs(of_cpu - want) <= bound);
            }
            CHECK(std::sqrt(length) <= 1.015 + unit(type));
            device_momentum.upload(momentum);
            DeviceBuffer<unsigned char> alone(bytes);
            run(clip, alone, b, 1);
            CHECK(std::memcmp(alone.download().data(), &batch[b * bytes], bytes) == 0);
        }
        CHECK(outside == 0);
        for (size_t i = 0; i < momentum.size(); i++) changed += after[i] != momentum[i];
        CHECK(changed <= written);  // nobody's elements are as they were
    }
}

TEST_CASE("gradient and momentum to X: tall and wide at once, tiles, zero padding, sizes from 1e-20 to 1e+10") {
    for (Sizes s : all_sizes()) {
        for (bool aligned : {true, false}) {
            const Layout layout(s, aligned);
            for (float size : {1e-20f, 1e-10f, 1.0f, 1e10f, 0.0f}) {
                if (s.m > 200 && size != 1.0f) continue;  // the truth, in double on one thread, takes its time
                CAPTURE(size);
                const Floats grads = normal(layout.elements, 4, size), momentum = normal(layout.elements, 5, 3 * size);
                check_momentum(s, layout, grads, momentum, {0.95f, size != 1e-10f, size == 1.0f ? 0.25f : 1.0f});
            }
        }
    }
}

// g = -(b/a) buf but for 1e-3, 1e-6 or rounding alone: |x| comes from digits that are left over.
TEST_CASE("gradient and momentum that cancel") {
    for (Sizes s : {Sizes{64, 64}, Sizes{77, 130}}) {
        const Layout layout(s, true);
        for (bool nesterov : {true, false}) {
            for (double left : {1e-3, 1e-6, 0.0}) {
                CAPTURE(left);
                const Momentum way = {0.95f, nesterov, 0.25f};
                const Floats momentum = normal(layout.elements, 6), noise = normal(layout.elements, 7);
                Floats grads(layout.elements);
                for (int b = 0; b < kBatch; b++) {
                    const MatrixRef& ref = layout.refs[b];
                    for (int i = 0; i < s.m; i++)
                        for (int j = 0; j < s.n; j++) {
                            const size_t at = Layout::element(ref, i, j);
                            grads[ref.offset + at] =
                                float(-way.b() / way.a() * momentum[ref.state + at] + left * noise[ref.offset + at]);
                        }
                }
                check_momentum(s, layout, grads, momentum, way);
            }
        }
    }
}

TEST_CASE("muon_update: master = master * decay - step * U, standing up again, nothing else touched") {
    const float decay = 0.99f, lr = 0.02f;
    for (Sizes s : all_sizes()) {
        for (bool aligned : {true, false}) {
            CAPTURE(s.m);
            CAPTURE(s.n);
            CAPTURE(aligned);
            const Layout layout(s, aligned);
            const DeviceBuffer<MatrixRef> refs(layout.refs);
            const Floats before = normal(layout.elements, 8);
            std::vector<real> params_before(layout.elements);
            std::memset(static_cast<void*>(params_before.data()), 0x11, layout.elements * sizeof(real));
            for (NsType type : kTypes) {
                CAPTURE(name_of(type));
                const Bytes u = encode(normal(kBatch * s.padded(), 9), type);
                const Floats U = decode(u, type);
                const DeviceBuffer<unsigned char> device_u(u);
                const DeviceBuffer<float> clip(Floats{0.5f, 2, 0, 0}), skip(Floats{0, INFINITY, 0, 0});
                DeviceBuffer<float> master(before);
                DeviceBuffer<real> params(params_before);
                auto update = [&](const DeviceBuffer<float>& scale, int first, int count) {
                    const unsigned char* u_first = device_u + first * s.padded() * ns_type_bytes(type);
                    NsKernels::muon_update(params, master, u_first, refs + first, count, s.m, s.n, decay, lr, type,
                                           scale);
                };
                update(skip, 0, kBatch);  // a clip scale of 0: the gradients were not finite
                CHECK(same_bits(master.download(), before));
                CHECK(same_bits(params.download(), params_before));

                update(clip, 0, kBatch);
                CHECK(master.guards_intact());
                CHECK(params.guards_intact());
                const Floats after = master.download();
                std::vector<real> want_params = params_before;
                Doubles want(before.begin(), before.end()), bound(before.size(), 0.0);
                for (int b = 0; b < kBatch; b++) {
                    const MatrixRef& ref = layout.refs[b];
                    for (int i = 0; i < s.m; i++) {
                        for (int j = 0; j < s.n; j++) {
                            const size_t element = Layout::element(ref, i, j), at = ref.state + element;
                            const double kept = double(decay) * before[at];
                            const double change =
                                double(lr) * ref.scale * U[b * s.padded() + size_t(i) * round_up(s.n, 8) + j];
                            want[at] = kept - change;
                            // the step, two products and a difference in fp32
                            bound[at] = 1.5 * std::ldexp(std::fabs(kept) + std::fabs(change), -23);
                            CpuOps::store(want_params.data(), ref.offset + element, after[at],
                                          sizeof(real) == 4 ? NsType::fp32 : NsType::bf16);
                        }
                    }
                }
                Floats cpu = before, cpu_params(before.size());
                CpuOps::muon_update(cpu_params.data(), cpu.data(), u.data(), layout.refs.data(), kBatch, s.m, s.n,
                                    decay, lr, type, clip.download().data());
                int outside = 0;
                for (size_t i = 0; i < want.size(); i++) {
                    outside += !(std::fabs(after[i] - want[i]) <= bound[i]);
                    outside += !(std::fabs(cpu[i] - want[i]) <= bound[i]);
                }
                CHECK(outside == 0);
                CHECK(same_bits(params.download(), want_params));

                master.upload(before);
                for (int b = kBatch - 1; b >= 0; b--) update(clip, b, 1);
                CHECK(same_bits(master.download(), after));
            }
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

// One matrix through newton_schulz and what is around it. Without momentum (mu = 0) x is the gradient; a step of -1
// adds U to a master of zeros.
Floats orthogonalise(const Floats& gradient, int rows, int cols, const NsConfig& config) {
    const int m = std::min(rows, cols), n = std::max(rows, cols), mp = round_up(m, 8), np = round_up(n, 8);
    DeviceBuffer<unsigned char> memory(NsWorkspace::bytes(1, mp, np, config.type));
    DeviceBuffer<double> squares(1), dots(2);
    const DeviceBuffer<NormBlock> block(std::vector<NormBlock>{{0, 0, cols, rows, cols, true, true}});
    const DeviceBuffer<MatrixRef> ref(std::vector<MatrixRef>{{0, 0, cols, rows > cols, 1.0f, 0, 1}});
    const Floats zeros(gradient.size(), 0.0f);
    DeviceBuffer<float> grads(gradient), momentum(zeros), master(zeros), clip(Floats{1, 1, 0, 0}), inverse(1);
    DeviceBuffer<real> params(gradient.size());
    NsWorkspace w(memory.data(), 1, mp, np, config.type);
    GptKernels::norm_sums(squares, dots, grads, momentum, block, 1);
    NsKernels::muon_inverse_norms(inverse, squares, dots, ref, 1, 0.0f, false, clip);
    NsKernels::muon_momentum(w.X, momentum, grads, ref, inverse, 1, m, n, 0.0f, false, config.type, clip);
    newton_schulz<NsKernels>(w, 1, mp, np, config);
    NsKernels::muon_update(params, master, w.X, ref, 1, m, n, 1.0f, -1.0f, config.type, clip);
    CHECK(memory.guards_intact());
    return master.download();
}

TEST_CASE("Newton-Schulz against the exact map of the same polynomial, polar_express") {
    std::vector<std::pair<int, int>> sizes = {{64, 64}, {77, 130}, {130, 77}};
    if (large_sizes()) sizes.insert(sizes.end(), {{768, 768}, {768, 3072}, {1600, 1600}});
    for (auto [rows, cols] : sizes) {
        const int m = std::min(rows, cols), n = std::max(rows, cols);
        Doubles P = orthonormal_columns(rows, m, 7), Q = orthonormal_columns(cols, m, 8);
        Doubles gaussian = gaussian_spectrum(m, n), power(m), dominated(m), log_uniform(m);
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
