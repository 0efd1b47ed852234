// cpu_backend.h: every operation of the model and of the optimizer in plain C++: fp32, OpenMP over work that is
// independent, a BLAS for the matrix products (or a kernel of our own where none is installed). It trains small models
// on a machine without a GPU, and is the truth that the CUDA kernels are tested against, so it is clear before it is
// fast.
//
//   1. The machine    threads, memory and its limits, events
//   2. Foundations    sums, exp, matrix products
//   3. The model      products; then from the embedding to the classifier, each forward beside its backward
//   4. The optimizer  AdamW, then what surrounds and makes Newton-Schulz; struct Cpu
//
// Sections 3 and 4 are what a backend computes; 1 and 2 can be left for when they are asked for.
//
// Results do not depend on the number of threads. Work is cut into tiles and slices (the words of dmuon.cuh) by shapes
// alone, each is computed by one thread, and sums over slices are taken in a fixed order. Sums inside a slice are
// written as partial sums (lanes) in the source: the compiler may then vectorise them without being allowed to reorder
// anything. So one binary gives the same bits on one type of machine, every time. Elsewhere they may differ by
// rounding: a compiler for another machine contracts other products and sums to fused ones, and a BLAS chooses its
// kernels by the machine (one other than OpenBLAS may also bring threads of its own).
//
// Letters, shapes and what each operation computes: backend.h.
#pragma once
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

#include "backend.h"
#include "comm.h"
#include "common.h"

#ifdef HAVE_CBLAS
#include <cblas.h>
// Present in OpenBLAS only; weak, so that another BLAS links as well.
extern "C" __attribute__((weak)) void openblas_set_num_threads(int threads);
#endif

struct CpuOps {
    using real = float;

    // ----------------------------------------------------------------------------------------------------------------
    // 1. The machine

    // The ranks of one machine share its cores, unless OMP_NUM_THREADS says otherwise.
    static void start(int local_ranks) {
#ifdef _OPENMP
        const int cores = int(sysconf(_SC_NPROCESSORS_ONLN)), asked = omp_get_max_threads();
        const char* wanted = getenv("OMP_NUM_THREADS");
        if (!wanted) {
            const int allowed = omp_get_num_procs();  // fewer where a launcher bound this rank to some cores
            omp_set_num_threads(std::max(1, std::min(allowed, cores / local_ranks)));
        } else if (asked < 1 || asked > std::max(64, 4 * cores)) {  // below 1: more than an int holds
            usage_fail("OMP_NUM_THREADS asks for %s threads on %d cores: lower it", wanted, cores);
        }
#else
        (void)local_ranks;
#endif
#ifdef HAVE_CBLAS
        // Threads inside the BLAS would fight with ours, and cut a product differently for each thread count.
        if (openblas_set_num_threads) openblas_set_num_threads(1);
#endif
        if (process_memory_left() == 0) fail("out of memory: a limit of this process (ulimit -v, -d) leaves none");
    }

    static std::string device_name() {
        static const std::string name = [] {
            std::ifstream cpuinfo("/proc/cpuinfo");
            for (std::string line; std::getline(cpuinfo, line);) {
                const size_t colon = line.find(": ");
                if (line.compare(0, 10, "model name") == 0 && colon != std::string::npos) return line.substr(colon + 2);
            }
            return std::string("CPU");
        }();
        return name;
    }

    static std::string kernels_name() { return "plain C++"; }
    static double peak_flops() { return 0; }  // unknown: utilisation is then printed as n/a

    // The number after `key` in a file of lines like "MemAvailable: 1234 kB", times `unit`; SIZE_MAX if it has none.
    static size_t value_in(const std::string& path, const std::string& key, size_t unit) {
        std::ifstream file(path);
        for (std::string line; std::getline(file, line);)
            if (line.compare(0, key.size(), key) == 0) return strtoull(line.c_str() + key.size(), nullptr, 10) * unit;
        return SIZE_MAX;
    }

    // Bytes left to the processes of a control group (a container, a Slurm job) under its limit and those of the groups
    // around it; SIZE_MAX without one. What files occupy of the page cache can be had.
    // groups: /proc/self/cgroup, with lines "4:memory:/group" (version 1) or "0::/group" (2); root: /sys/fs/cgroup
    static size_t group_memory_left(const std::string& groups, const std::string& root) {
        size_t least = SIZE_MAX;
        std::ifstream file(groups);
        for (std::string line; std::getline(file, line);) {
            const bool first = line.find(":memory:/") != std::string::npos, second = line.compare(0, 4, "0::/") == 0;
            if (!first && !second) continue;
            std::string group = line.substr(line.find('/'));
            for (;; group.resize(group.rfind('/'))) {
                const std::string directory = root + (first ? "/memory" : "") + group + "/";
                size_t limit, used;
                if (std::ifstream(directory + (first ? "memory.limit_in_bytes" : "memory.max")) >> limit &&
                    std::ifstream(directory + (first ? "memory.usage_in_bytes" : "memory.current")) >> used) {
                    for (const char* key : {"inactive_file", "active_file"}) {
                        const size_t cache =
                            value_in(directory + "memory.stat", (first ? "total_" : "") + std::string(key), 1);
                        if (cache != SIZE_MAX) used -= std::min(used, cache);
                    }
                    least = std::min(least, limit - std::min(limit, used));
                }
                if (group.empty()) break;
            }
        }
        return least;
    }

    // Bytes that this process may still allocate under its own limits (ulimit -v, -d); SIZE_MAX without one. OpenBLAS
    // takes 128 MiB for each thread that multiplies, at its first product, and asks for ever if it cannot have them: so
    // these are kept free, and a bit more for stacks.
    static size_t process_memory_left() {
        size_t least = SIZE_MAX;
        const std::pair<int, const char*> limits[] = {{RLIMIT_AS, "VmSize:"}, {RLIMIT_DATA, "VmData:"}};
        for (const auto& [limit, used_name] : limits) {
            rlimit set;
            if (getrlimit(limit, &set) != 0 || set.rlim_cur == RLIM_INFINITY) continue;
            size_t used = value_in("/proc/self/status", used_name, 1024);
#ifdef HAVE_CBLAS
            int threads = 1;
#ifdef _OPENMP
            threads = omp_get_max_threads();
#endif
            if (openblas_set_num_threads) used += threads * (size_t(144) << 20);
#endif
            least = std::min(least, set.rlim_cur - std::min<size_t>(set.rlim_cur, used));
        }
        return least;
    }

    // Bytes that the machine can still give without swapping, to all processes together; SIZE_MAX where it does not
    // say.
    static size_t machine_memory_left() {
        return std::min(value_in("/proc/meminfo", "MemAvailable:", 1024),
                        group_memory_left("/proc/self/cgroup", "/sys/fs/cgroup"));
    }

    // Linux hands out more memory than it has and kills the process later: ask first, so that we can say it in words.
    static void* alloc(size_t bytes, const char* what) {
        const size_t rounded = round_up<size_t>(std::max<size_t>(bytes, 1), 256);
        const bool fits = rounded <= std::min(machine_memory_left(), process_memory_left());
        void* memory = fits ? std::aligned_alloc(256, rounded) : nullptr;
        if (!memory) {
            fail("out of memory: %s needs %.1f MiB of host memory; choose a smaller --batch or a smaller model", what,
                 double(bytes) / (1 << 20));
        }
        memset(memory, 0, rounded);
        return memory;
    }
    static void* alloc_host(size_t bytes) { return alloc(bytes, "a host buffer"); }
    static void upload(void* dst, const void* src, size_t bytes) { memcpy(dst, src, bytes); }
    static void download(void* dst, const void* src, size_t bytes) { memcpy(dst, src, bytes); }
    static void copy(void* dst, const void* src, size_t bytes) { memcpy(dst, src, bytes); }
    static void zero(void* dst, size_t bytes) { memset(dst, 0, bytes); }
    static void synchronize() {}  // every operation here has finished when it returns

    struct Event {
        std::chrono::steady_clock::time_point time;
        void record() { time = std::chrono::steady_clock::now(); }
        void record_beside() { record(); }
        bool done() const { return true; }
        static float ms(const Event& a, const Event& b) {
            return std::chrono::duration<float, std::milli>(b.time - a.time).count();
        }
    };

    struct Graph {
        void run(const std::function<void()>& work) { work(); }
    };

    struct Range {
        explicit Range(const char*, int = -1) {}
        ~Range() {}  // or the variable would seem unused
    };

    // ----------------------------------------------------------------------------------------------------------------
    // 2. Foundations

    // sum of term(i) over i < n: kLanes partial sums, then one after the other.
    static constexpr int kLanes = 16;
    template <class Sum = float, class Term>
    static Sum sum(size_t n, Term term) {
        Sum lanes[kLanes] = {};
        const size_t whole = n - n % kLanes;
        for (size_t i = 0; i < whole; i += kLanes) {
            for (int lane = 0; lane < kLanes; lane++) lanes[lane] += term(i + lane);
        }
        for (size_t i = whole; i < n; i++) lanes[i % kLanes] += term(i);
        Sum total = 0;
        for (int lane = 0; lane < kLanes; lane++) total += lanes[lane];
        return total;
    }

    static float maximum(const float* x, size_t n) {
        float lanes[kLanes];
        std::fill(lanes, lanes + kLanes, -INFINITY);
        const size_t whole = n - n % kLanes;
        for (size_t i = 0; i < whole; i += kLanes) {
            for (int lane = 0; lane < kLanes; lane++)
                lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
        }
        for (size_t i = whole; i < n; i++) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
        return *std::max_element(lanes, lanes + kLanes);
    }

    // e^x to about one unit in the last place, without a call or a branch, so that loops over it vectorise (loops over
    // std::exp do not). x = n ln2 + r with |r| <= ln2/2; e^r by its Taylor series, 2^n by writing the exponent's bits.
    // A NaN stays one.
    static inline float exponential(float x) {
        x = x < -87.0f ? -87.0f : x;  // e^-87 = 1.6e-38 and e^88 = 1.7e38: near the ends of fp32's range
        x = x > 88.0f ? 88.0f : x;
        const float magic = 12582912.0f;  // 1.5 * 2^23: added, it leaves no bits for a fraction: the sum is rounded,
        const float rounded = x * 1.44269504f + magic;  // and its lowest bits are n
        const float n = rounded - magic;
        const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln2 in two parts; n times the first is exact
        float p = 1.0f / 5040;
        p = p * r + 1.0f / 720;
        p = p * r + 1.0f / 120;
        p = p * r + 1.0f / 24;
        p = p * r + 1.0f / 6;
        p = p * r + 0.5f;
        p = p * r + 1.0f;
        p = p * r + 1.0f;
        uint32_t power_bits;
        memcpy(&power_bits, &rounded, sizeof(power_bits));
        power_bits = (power_bits + 127) << 23;
        float power;
        memcpy(&power, &power_bits, sizeof(power));
        return p * power;
    }

    // C (M,N) = alpha * op(A) op(B) + beta * C on one thread; op(A) is (M,K), op(B) is (K,N), op may transpose.
    static void gemm(bool transpose_a, bool transpose_b, int M, int N, int K, float alpha, const float* A, int lda,
                     const float* B, int ldb, float beta, float* C, int ldc) {
#ifdef HAVE_CBLAS
        // A BLAS refuses row strides of 0, which matrices with K = 0 have.
        cblas_sgemm(CblasRowMajor, transpose_a ? CblasTrans : CblasNoTrans, transpose_b ? CblasTrans : CblasNoTrans, M,
                    N, K, alpha, A, std::max(lda, 1), B, std::max(ldb, 1), beta, C, ldc);
#else
        packed_gemm(transpose_a, transpose_b, M, N, K, alpha, A, lda, B, ldb, beta, C, ldc);
#endif
    }

    // The same without a BLAS. A processor multiplies and adds whole vector registers, two at a time, but loads only
    // about as many: so a tile of kRows x kColumns of C stays in registers while k runs, and each step needs two
    // vectors of B and kRows numbers of A for 2 kRows multiplications of vectors. Both are first copied into panels, in
    // the order in which they are needed: strided rows share few places in the cache. kDepth of K at a time: then a
    // panel of B stays in the first cache, those of A in the second. An element of C is one sum over k, whatever tile
    // it is in, rounded to C after each kDepth.
#if defined(__AVX512F__)
    static constexpr int kWidth = 16, kRows = 12;  // floats in a vector; 24 of 32 registers hold the tile
#elif defined(__AVX__)
    static constexpr int kWidth = 8, kRows = 6;  // 12 of 16
#else
    static constexpr int kWidth = 4, kRows = 6;
#endif
    static constexpr int kColumns = 2 * kWidth, kDepth = 256;
    using Vector __attribute__((vector_size(kWidth * sizeof(float)))) = float;

    static void packed_gemm(bool transpose_a, bool transpose_b, int M, int N, int K, float alpha, const float* A,
                            int lda, const float* B, int ldb, float beta, float* C, int ldc) {
        const size_t row_a = transpose_a ? 1 : lda, column_a = transpose_a ? lda : 1;  // strides of op(A) and op(B)
        const size_t row_b = transpose_b ? 1 : ldb, column_b = transpose_b ? ldb : 1;
        static thread_local std::vector<float> panels_a, panel_b;  // (M/kRows,depth,kRows), (depth,kColumns)
        panels_a.resize(size_t(round_up(M, kRows)) * kDepth);
        panel_b.resize(size_t(kColumns) * kDepth);
        for (int k0 = 0; k0 == 0 || k0 < K; k0 += kDepth) {
            const int depth = std::min(kDepth, K - k0);
            for (int i0 = 0; i0 < M; i0 += kRows) {
                pack(&panels_a[size_t(i0) * depth], kRows, A + i0 * row_a + k0 * column_a, row_a, column_a,
                     std::min(kRows, M - i0), depth);
            }
            for (int j0 = 0; j0 < N; j0 += kColumns) {
                const int columns = std::min(kColumns, N - j0);
                pack(panel_b.data(), kColumns, B + k0 * row_b + j0 * column_b, column_b, row_b, columns, depth);
                for (int i0 = 0; i0 < M; i0 += kRows) {
                    float tile[kRows][kColumns];
                    tile_product(tile[0], &panels_a[size_t(i0) * depth], panel_b.data(), depth);
                    for (int i = 0; i < std::min(kRows, M - i0); i++) {
                        float* c = C + size_t(i0 + i) * ldc + j0;
                        if (k0 == 0 && beta == 0) {  // C may hold anything
                            for (int j = 0; j < columns; j++) c[j] = alpha * tile[i][j];
                        } else {
                            const float keep = k0 == 0 ? beta : 1.0f;
                            for (int j = 0; j < columns; j++) c[j] = keep * c[j] + alpha * tile[i][j];
                        }
                    }
                }
            }
        }
    }

    // panel (depth,width) = `count` rows of x, transposed and filled up with zeros to `width`.
    static void pack(float* panel, int width, const float* x /*(count,depth)*/, size_t row_stride, size_t stride,
                     int count, int depth) {
        if (count < width) std::fill(panel, panel + size_t(depth) * width, 0.0f);
        if (row_stride == 1) {
            for (int k = 0; k < depth; k++) {
                for (int i = 0; i < count; i++) panel[size_t(k) * width + i] = x[k * stride + i];
            }
        } else {
            for (int i = 0; i < count; i++) {
                for (int k = 0; k < depth; k++) panel[size_t(k) * width + i] = x[i * row_stride + k * stride];
            }
        }
    }

    static void tile_product(float* tile /*(kRows,kColumns)*/, const float* a /*(depth,kRows)*/,
                             const float* b /*(depth,kColumns)*/, int depth) {
        Vector sums[kRows][2] = {};
        for (int k = 0; k < depth; k++, a += kRows, b += kColumns) {
            Vector left, right;
            memcpy(&left, b, sizeof(left));
            memcpy(&right, b + kWidth, sizeof(right));
            for (int i = 0; i < kRows; i++) {
                sums[i][0] += a[i] * left;
                sums[i][1] += a[i] * right;
            }
        }
        memcpy(tile, sums, sizeof(sums));
    }

    // C (M,N) = op(A) op(B) + beta * C, or + bias (N) in each row, on all threads: tiles of 128 x 128 (smaller ones
    // give more threads work, but repack more often). A tile is the same call of gemm whoever computes it.
    static constexpr int kGemmTile = 128;
    static void parallel_gemm(bool transpose_a, bool transpose_b, int M, int N, int K, const float* A, int lda,
                              const float* B, int ldb, float beta, float* C, int ldc, const float* bias = nullptr) {
#pragma omp parallel for collapse(2) schedule(dynamic)
        for (int i = 0; i < M; i += kGemmTile) {
            for (int j = 0; j < N; j += kGemmTile) {
                const int rows = std::min(kGemmTile, M - i), columns = std::min(kGemmTile, N - j);
                float* tile = C + size_t(i) * ldc + j;
                if (bias) {
                    for (int row = 0; row < rows; row++)
                        memcpy(tile + size_t(row) * ldc, bias + j, columns * sizeof(float));
                }
                gemm(transpose_a, transpose_b, rows, columns, K, 1.0f, A + size_t(i) * (transpose_a ? 1 : lda), lda,
                     B + size_t(j) * (transpose_b ? ldb : 1), ldb, bias ? 1.0f : beta, tile, ldc);
            }
        }
    }

    // ----------------------------------------------------------------------------------------------------------------
    // 3. The model: its products, then the rest in the order in which a forward pass meets it

    static void matmul_forward(real* out /*(N,OC), row stride ldo*/, int ldo, const real* inp /*(N,C)*/,
                               const real* weight /*(OC,C)*/, const real* bias /*(OC) or null*/, int N, int C, int OC) {
        // Of one row, as generation has it, each weight is read once. A gemm copies them first, for rows that are not
        // there: OpenBLAS took 2 to 5 times as long, the loops above 7 to 15 times (768 x 3072 and its like).
        if (N > 1) return parallel_gemm(false, true, N, OC, C, inp, C, weight, C, 0.0f, out, ldo, bias);
#pragma omp parallel for
        for (int o = 0; o < OC; o++) {
            const real* row = weight + size_t(o) * C;
            out[o] = sum(C, [&](size_t i) { return inp[i] * row[i]; }) + (bias ? bias[o] : 0.0f);
        }
    }
    static void matmul_backward_input(real* dinp /*(N,C)*/, const real* dout /*(N,OC)*/, const real* weight /*(OC,C)*/,
                                      int N, int C, int OC) {
        parallel_gemm(false, false, N, C, OC, dout, OC, weight, C, 0.0f, dinp, C);
    }
    static void matmul_backward_weight(float* dweight /*(OC,C), += with accumulate*/,
                                       const real* dout /*(N,OC), row stride ldo*/, int ldo, const real* inp /*(N,C)*/,
                                       int N, int C, int OC, bool accumulate) {
        parallel_gemm(true, false, OC, C, N, dout, ldo, inp, C, accumulate ? 1.0f : 0.0f, dweight, C);
    }

    static void matmul_gelu_forward(real* out /*(N,OC)*/, real* pre /*(N,OC)*/, const real* inp /*(N,C)*/,
                                    const real* weight /*(OC,C)*/, const real* bias /*(OC)*/, int N, int C, int OC) {
        matmul_forward(pre, OC, inp, weight, bias, N, C, OC);
        gelu_forward(out, pre, size_t(N) * OC);
    }
    static void matmul_backward_input_gelu(real* dpre /*(N,C)*/, const real* dout /*(N,OC)*/,
                                           const real* weight /*(OC,C)*/, const real* pre /*(N,C)*/, int N, int C,
                                           int OC) {
        matmul_backward_input(dpre, dout, weight, N, C, OC);
        gelu_backward(dpre, dpre, pre, size_t(N) * C);
    }

    static void tune(const std::function<void()>&) {}  // there is one algorithm

    // Sums over rows are taken in kSlices slices, each by one thread into its own partial sums.
    static constexpr int kSlices = 32;
    static int slice_begin(int N, int slice) { return int(int64_t(N) * slice / kSlices); }
    static void add_partials(float* dst /*(n) +=*/, const float* partials /*(kSlices,n), row stride ld*/, int ld,
                             int n) {
#pragma omp parallel for
        for (int i = 0; i < n; i++) {
            float total = 0;
            for (int slice = 0; slice < kSlices; slice++) total += partials[size_t(slice) * ld + i];
            dst[i] += total;
        }
    }

    static size_t bias_scratch_floats(int OC) { return size_t(kSlices) * OC; }
    static void bias_backward(float* dbias /*(OC) +=*/, const real* dout /*(N,OC)*/, int N, int OC,
                              float* scratch /*(kSlices,OC)*/) {
#pragma omp parallel for
        for (int slice = 0; slice < kSlices; slice++) {
            float* partial = scratch + size_t(slice) * OC;
            std::fill(partial, partial + OC, 0.0f);
            for (int n = slice_begin(N, slice); n < slice_begin(N, slice + 1); n++) {
                for (int i = 0; i < OC; i++) partial[i] += dout[size_t(n) * OC + i];
            }
        }
        add_partials(dbias, scratch, OC, OC);
    }

    static void embedding_forward(real* out /*(B,T,C)*/, const int* tokens /*(B,T)*/, const real* wte /*(Vp,C)*/,
                                  const real* wpe /*(maxT,C)*/, int B, int T, int C) {
#pragma omp parallel for
        for (int n = 0; n < B * T; n++) {
            const real* token = wte + size_t(tokens[n]) * C;
            const real* position = wpe + size_t(n % T) * C;
            for (int i = 0; i < C; i++) out[size_t(n) * C + i] = token[i] + position[i];
        }
    }

    static void embedding_backward(float* dwte /*(Vp,C) +=*/, float* dwpe /*(maxT,C) +=*/, const real* dout /*(B,T,C)*/,
                                   const int* tokens /*(B,T)*/, const int* order /*(B*T)*/, int B, int T, int C) {
        const int N = B * T;
#pragma omp parallel for schedule(dynamic, 16)
        for (int first = 0; first < N; first++) {
            const int token = tokens[order[first]];
            if (first > 0 && tokens[order[first - 1]] == token) continue;  // inside a run: done by its first position
            float* row = dwte + size_t(token) * C;
            for (int k = first; k < N && tokens[order[k]] == token; k++) {
                const real* d = dout + size_t(order[k]) * C;
                for (int i = 0; i < C; i++) row[i] += d[i];
            }
        }
#pragma omp parallel for
        for (int t = 0; t < T; t++) {
            for (int b = 0; b < B; b++) {
                const real* d = dout + (size_t(b) * T + t) * C;
                for (int i = 0; i < C; i++) dwpe[size_t(t) * C + i] += d[i];
            }
        }
    }

    static void residual_forward(real* out, const real* a, const real* b, size_t n) {
#pragma omp parallel for simd
        for (size_t i = 0; i < n; i++) out[i] = a[i] + b[i];
    }

    static void layernorm_forward(real* out /*(N,C)*/, float* mean /*(N)*/, float* rstd /*(N)*/,
                                  const real* x /*(N,C)*/, const real* weight /*(C)*/, const real* bias /*(C)*/, int N,
                                  int C) {
#pragma omp parallel for
        for (int n = 0; n < N; n++) {
            const real* row = x + size_t(n) * C;
            const float m = sum(C, [&](size_t i) { return row[i]; }) / C;
            const float variance = sum(C, [&](size_t i) { return (row[i] - m) * (row[i] - m); }) / C;
            const float r = 1.0f / std::sqrt(variance + kLayerNormEpsilon);
            real* o = out + size_t(n) * C;
#pragma omp simd
            for (int i = 0; i < C; i++) o[i] = (row[i] - m) * r * weight[i] + bias[i];
            mean[n] = m;
            rstd[n] = r;
        }
    }

    static void residual_layernorm_forward(real* residual /*(N,C)*/, real* out /*(N,C)*/, float* mean, float* rstd,
                                           const real* a, const real* b, const real* weight, const real* bias, int N,
                                           int C) {
        residual_forward(residual, a, b, size_t(N) * C);
        layernorm_forward(out, mean, rstd, residual, weight, bias, N, C);
    }

    static size_t layernorm_scratch_floats(int C) { return size_t(kSlices) * 2 * C; }
    // With y = (x - mean) * rstd and g = dout * weight:  dx = before + rstd * (g - mean(g) - y * mean(g * y)).
    static void layernorm_backward(real* dx /*(N,C)*/, float* dweight /*(C) +=*/, float* dbias /*(C) +=*/,
                                   float* dsum /*(C) +=, or null*/,
                                   const real* before /*(N,C), may be dx; null: zeros*/, const real* dout /*(N,C)*/,
                                   const real* x /*(N,C)*/, const real* weight /*(C)*/, const float* mean /*(N)*/,
                                   const float* rstd /*(N)*/, int N, int C, float* scratch /*(kSlices,2,C)*/) {
#pragma omp parallel for
        for (int slice = 0; slice < kSlices; slice++) {
            float* dweight_partial = scratch + size_t(slice) * 2 * C;
            float* dbias_partial = dweight_partial + C;
            std::fill(dweight_partial, dweight_partial + 2 * C, 0.0f);
            for (int n = slice_begin(N, slice); n < slice_begin(N, slice + 1); n++) {
                const float m = mean[n], r = rstd[n];
                const real* d = dout + size_t(n) * C;
                const real* row = x + size_t(n) * C;
                const float mean_g = sum(C, [&](size_t i) { return d[i] * weight[i]; }) / C;
                const float mean_gy = sum(C, [&](size_t i) { return d[i] * weight[i] * ((row[i] - m) * r); }) / C;
                real* o = dx + size_t(n) * C;
                if (!before) std::fill(o, o + C, 0.0f);
                else if (before != dx) std::copy(before + size_t(n) * C, before + size_t(n + 1) * C, o);
#pragma omp simd
                for (int i = 0; i < C; i++) {
                    const float y = (row[i] - m) * r;
                    o[i] += r * (d[i] * weight[i] - mean_g - y * mean_gy);
                    dweight_partial[i] += d[i] * y;
                    dbias_partial[i] += d[i];
                }
            }
        }
        add_partials(dweight, scratch, 2 * C, C);
        add_partials(dbias, scratch + C, 2 * C, C);
        if (dsum) bias_backward(dsum, dx, N, C, scratch);
    }

    // Causal attention, one head of one sequence at a time: kQueries queries against all keys up to the last of these
    // queries, so that no more than (kQueries, T) scores exist at once. lse[t], the logarithm of the sum of
    // exp(score), is all that the backward needs to compute the probabilities again.
    static constexpr int kQueries = 64;
    static void attention_forward(real* out /*(B,T,C)*/, float* lse /*(B,H,T)*/,
                                  const real* qkv /*(B,T,3C): q|k|v, head h at columns h*hd*/, int B, int T, int C,
                                  int H) {
        const int hd = C / H;
        const float scale = 1.0f / std::sqrt(float(hd));
#pragma omp parallel for collapse(2) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < H; h++) {
                static thread_local std::vector<float> scores;  // (kQueries, keys)
                scores.resize(size_t(kQueries) * T);
                const real* q = qkv + size_t(b) * T * 3 * C + h * hd;  // (T,hd), row stride 3C; so are k and v
                const real *k = q + C, *v = q + 2 * C;
                for (int t0 = 0; t0 < T; t0 += kQueries) {
                    const int rows = std::min(kQueries, T - t0), keys = t0 + rows;
                    gemm(false, true, rows, keys, hd, scale, q + size_t(t0) * 3 * C, 3 * C, k, 3 * C, 0.0f,
                         scores.data(), keys);
                    for (int row = 0; row < rows; row++) {
                        float* p = scores.data() + size_t(row) * keys;
                        const int visible = t0 + row + 1;
                        const float largest = maximum(p, visible);
                        for (int s = 0; s < visible; s++) p[s] = exponential(p[s] - largest);
                        const float total = sum(visible, [&](size_t s) { return p[s]; });
                        for (int s = 0; s < visible; s++) p[s] *= 1.0f / total;
                        std::fill(p + visible, p + keys, 0.0f);
                        lse[(size_t(b) * H + h) * T + t0 + row] = largest + std::log(total);
                    }
                    gemm(false, false, rows, hd, keys, 1.0f, scores.data(), keys, v, 3 * C, 0.0f,
                         out + (size_t(b) * T + t0) * C + h * hd, C);
                }
            }
        }
    }

    static void attention_last_row(real* out /*(C)*/, const real* qkv /*(T,3C)*/, int T, int C, int H) {
        const int hd = C / H;
        const float scale = 1.0f / std::sqrt(float(hd));
#pragma omp parallel for
        for (int h = 0; h < H; h++) {
            static thread_local std::vector<float> p;  // (T)
            p.resize(T);
            const real *q = qkv + size_t(T - 1) * 3 * C + h * hd, *k = qkv + C + h * hd, *v = k + C;
            for (int s = 0; s < T; s++) {
                const real* key = k + size_t(s) * 3 * C;
                p[s] = scale * sum(hd, [&](size_t i) { return q[i] * key[i]; });
            }
            const float largest = maximum(p.data(), T);
            for (int s = 0; s < T; s++) p[s] = exponential(p[s] - largest);
            const float total = sum(T, [&](size_t s) { return p[s]; });
            real* o = out + h * hd;
            std::fill(o, o + hd, 0.0f);
            for (int s = 0; s < T; s++) {
                const real* value = v + size_t(s) * 3 * C;
                const float weight = p[s] / total;
                for (int i = 0; i < hd; i++) o[i] += weight * value[i];
            }
        }
    }

    static size_t attention_scratch_floats(int, int, int C, int) { return bias_scratch_floats(3 * C); }

    // P = exp(scale*QK^T - lse), O = PV.  dV = P^T dO;  dP = dO V^T;  dS = scale * P * (dP - delta), where
    // delta[t] = sum over s of P[t,s] dP[t,s] = dO[t] . O[t];  dQ = dS K;  dK = dS^T Q.
    static void attention_backward(real* dqkv /*(B,T,3C)*/, float* dbias /*(3C) +=*/, float* delta /*(B,H,T)*/,
                                   const real* dout /*(B,T,C)*/, const real* qkv /*(B,T,3C)*/,
                                   const real* out /*(B,T,C)*/, const float* lse /*(B,H,T)*/, int B, int T, int C,
                                   int H, float* scratch /*(kSlices,3C)*/) {
        const int hd = C / H;
        const float scale = 1.0f / std::sqrt(float(hd));
#pragma omp parallel for collapse(2) schedule(dynamic)
        for (int b = 0; b < B; b++) {
            for (int h = 0; h < H; h++) {
                static thread_local std::vector<float> probabilities, dscores;  // (kQueries, keys)
                probabilities.resize(size_t(kQueries) * T);
                dscores.resize(size_t(kQueries) * T);
                const size_t qkv_offset = size_t(b) * T * 3 * C + h * hd, head_row = (size_t(b) * H + h) * T;
                const real *q = qkv + qkv_offset, *k = q + C, *v = q + 2 * C;  // (T,hd), row stride 3C
                real *dq = dqkv + qkv_offset, *dk = dq + C, *dv = dq + 2 * C;
                for (int t = 0; t < T; t++) {
                    std::fill(dk + size_t(t) * 3 * C, dk + size_t(t) * 3 * C + hd, 0.0f);
                    std::fill(dv + size_t(t) * 3 * C, dv + size_t(t) * 3 * C + hd, 0.0f);
                }
                for (int t0 = 0; t0 < T; t0 += kQueries) {
                    const int rows = std::min(kQueries, T - t0), keys = t0 + rows;
                    const real* own_q = q + size_t(t0) * 3 * C;
                    const real* own_out = out + (size_t(b) * T + t0) * C + h * hd;    // (rows,hd), row stride C
                    const real* own_dout = dout + (size_t(b) * T + t0) * C + h * hd;  // (rows,hd), row stride C
                    float *p = probabilities.data(), *ds = dscores.data();
                    gemm(false, true, rows, keys, hd, scale, own_q, 3 * C, k, 3 * C, 0.0f, p, keys);
                    gemm(false, true, rows, keys, hd, 1.0f, own_dout, C, v, 3 * C, 0.0f, ds, keys);
                    for (int row = 0; row < rows; row++) {
                        const real *o = own_out + size_t(row) * C, *d_o = own_dout + size_t(row) * C;
                        const float d = sum(hd, [&](size_t i) { return d_o[i] * o[i]; });
                        const float l = lse[head_row + t0 + row];
                        delta[head_row + t0 + row] = d;
                        float *p_row = p + size_t(row) * keys, *ds_row = ds + size_t(row) * keys;
                        const int visible = t0 + row + 1;
#pragma omp simd
                        for (int s = 0; s < visible; s++) {
                            p_row[s] = exponential(p_row[s] - l);
                            ds_row[s] = scale * p_row[s] * (ds_row[s] - d);
                        }
                        std::fill(p_row + visible, p_row + keys, 0.0f);
                        std::fill(ds_row + visible, ds_row + keys, 0.0f);
                    }
                    gemm(true, false, keys, hd, rows, 1.0f, p, keys, own_dout, C, 1.0f, dv, 3 * C);
                    gemm(true, false, keys, hd, rows, 1.0f, ds, keys, own_q, 3 * C, 1.0f, dk, 3 * C);
                    gemm(false, false, rows, hd, keys, 1.0f, ds, keys, k, 3 * C, 0.0f, dq + size_t(t0) * 3 * C, 3 * C);
                }
            }
        }
        bias_backward(dbias, dqkv, B * T, 3 * C, scratch);
    }

    static inline float gelu_sigmoid(float x) {
        return 1.0f / (1.0f + exponential(-2.0f * kGeluScale * (x + kGeluCubic * x * x * x)));
    }
    static void gelu_forward(real* out, const real* x, size_t n) {
#pragma omp parallel for simd
        for (size_t i = 0; i < n; i++) out[i] = x[i] * gelu_sigmoid(x[i]);
    }
    static void gelu_backward(real* dx /*may be dout*/, const real* dout, const real* x, size_t n) {
#pragma omp parallel for simd
        for (size_t i = 0; i < n; i++) {
            const float s = gelu_sigmoid(x[i]);
            const float slope = 2.0f * kGeluScale * (1.0f + 3.0f * kGeluCubic * x[i] * x[i]);
            dx[i] = dout[i] * (s + x[i] * s * (1.0f - s) * slope);
        }
    }

    static void classifier(float* losses /*(N)*/, real* logits /*(N,Vp) in: logits, out: dlogits*/,
                           const int* targets /*(N)*/, float dloss, int N, int V, int Vp, bool write_dlogits) {
#pragma omp parallel for
        for (int n = 0; n < N; n++) {
            real* row = logits + size_t(n) * Vp;
            const float largest = maximum(row, V), target_logit = row[targets[n]];
            const float total = sum(V, [&](size_t i) { return exponential(row[i] - largest); });
            losses[n] = largest + std::log(total) - target_logit;
            if (!write_dlogits) continue;
            const float scale = dloss / total;
#pragma omp simd
            for (int i = 0; i < V; i++) row[i] = exponential(row[i] - largest) * scale;
            row[targets[n]] -= dloss;
            std::fill(row + V, row + Vp, 0.0f);
        }
    }

    static void sum_losses(double* acc /*(1) +=*/, const float* losses /*(n)*/, int n) {
        *acc += sum<double>(n, [&](size_t i) { return double(losses[i]); });
    }

    // ----------------------------------------------------------------------------------------------------------------
    // 4. The optimizer

    static void norm_sums(double* squares /*(n)*/, double* dots /*(n,2)*/, const float* grads, const float* momentum,
                          const NormBlock* blocks /*(n)*/, int n) {
#pragma omp parallel for schedule(dynamic)
        for (int i = 0; i < n; i++) {
            const NormBlock& block = blocks[i];
            double gg = 0, gb = 0, bb = 0;
            for (int r = 0; r < block.rows; r++) {
                const float *g = grads + block.offset + size_t(r) * block.ld,
                            *buf = momentum + block.state + size_t(r) * block.ld;
                gg += sum<double>(block.cols, [&](size_t c) { return double(g[c]) * double(g[c]); });
                if (!block.muon) continue;
                gb += sum<double>(block.cols, [&](size_t c) { return double(g[c]) * double(buf[c]); });
                bb += sum<double>(block.cols, [&](size_t c) { return double(buf[c]) * double(buf[c]); });
            }
            squares[i] = block.counted ? gg : 0.0;
            dots[2 * i] = gb, dots[2 * i + 1] = bb;
        }
    }

    static void clip_scale(float* clip /*(4)*/, int64_t* t /*(1)*/, const double* squares /*(n)*/, int n,
                           float max_norm, double beta1, double beta2) {
        double total = 0;
        for (int i = 0; i < n; i++) total += squares[i];
        const float norm = float(std::sqrt(total));
        clip[0] = !std::isfinite(norm) ? 0.0f : max_norm > 0 && norm > max_norm ? max_norm / norm : 1.0f;
        clip[1] = norm;
        if (clip[0] == 0) return;
        ++*t;
        clip[2] = 1.0f - float(std::pow(beta1, double(*t)));
        clip[3] = 1.0f - float(std::pow(beta2, double(*t)));
    }

    static void adamw(real* params, float* master, float* m, float* v, const float* grads, size_t n, float lr,
                      float beta1, float beta2, float eps, float weight_decay, const float* clip /*(4)*/) {
        const float scale = clip[0], correction1 = clip[2], correction2 = clip[3];
        if (scale == 0) return;
#pragma omp parallel for simd
        for (size_t i = 0; i < n; i++) {
            const float g = grads[i] * scale;
            m[i] = beta1 * m[i] + (1 - beta1) * g;
            v[i] = beta2 * v[i] + (1 - beta2) * g * g;
            const float update = (m[i] / correction1) / (std::sqrt(v[i] / correction2) + eps);
            master[i] = master[i] * (1 - lr * weight_decay) - lr * update;
            params[i] = master[i];
        }
    }

    static void cast_params(real* params, const float* master, size_t n) { memmove(params, master, n * sizeof(float)); }

    // The iterate of Newton-Schulz is stored in 16 bits, like the GPU's: every product rounds its result to nearest,
    // ties to even. bf16 is the upper half of an fp32; rounding may carry into the exponent, rightly.
    static inline uint16_t to_bf16(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof(bits));
        const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
        return uint16_t(nan ? (bits >> 16) | 0x40u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
    static inline float from_bf16(uint16_t h) {
        const uint32_t bits = uint32_t(h) << 16;
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x;
    }
    // fp16: 5 bits of exponent (bias 15, fp32's is 127), 10 of mantissa. Below 2^-14 it counts in units of 2^-24, the
    // last place of an fp32 in [0.5, 1): adding 0.5 lets the adder do that rounding.
    static inline uint16_t to_fp16(float x) {
        uint32_t bits, small_bits;
        memcpy(&bits, &x, sizeof(bits));
        const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        const float small = std::fabs(x) + 0.5f;
        memcpy(&small_bits, &small, sizeof(small_bits));
        const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN or infinity
        const uint32_t rounded = magnitude < (113u << 23)    ? small_bits - 0x3f000000u
                                 : magnitude >= (143u << 23) ? huge
                                                             : normal;
        return uint16_t(sign | rounded);
    }
    static inline float from_fp16(uint16_t h) {
        const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
        const uint32_t special = magnitude >= 0x7c00u ? 0x7f800000u : 0u;  // infinity and NaN stay what they are
        const uint32_t bits = sign | special | magnitude << 13;
        float x;
        memcpy(&x, &bits, sizeof(x));
        return x * 0x1p112f;  // the difference of the two biases; exact, also where h counts in units of 2^-24
    }
    static inline float load(const void* x, size_t i, NsType type) {
        return type == NsType::bf16   ? from_bf16(static_cast<const uint16_t*>(x)[i])
               : type == NsType::fp16 ? from_fp16(static_cast<const uint16_t*>(x)[i])
                                      : static_cast<const float*>(x)[i];
    }
    static inline void store(void* x, size_t i, float value, NsType type) {
        if (type == NsType::bf16) static_cast<uint16_t*>(x)[i] = to_bf16(value);
        if (type == NsType::fp16) static_cast<uint16_t*>(x)[i] = to_fp16(value);
        if (type == NsType::fp32) static_cast<float*>(x)[i] = value;
    }

    // x = a g + b momentum, so |x|^2 follows from the three sums of its blocks.
    static void muon_inverse_norms(float* inverse_norms /*(count)*/, const double* squares, const double* dots,
                                   const MatrixRef* refs /*(count)*/, int count, float mu, bool nesterov,
                                   const float* clip) {
        const double a = nesterov ? (1.0 + mu) * clip[0] : clip[0], b = nesterov ? double(mu) * mu : mu;
        for (int i = 0; i < count; i++) {
            double gg = 0, gb = 0, bb = 0;
            for (int block = refs[i].first_block; block < refs[i].first_block + refs[i].blocks; block++)
                gg += squares[block], gb += dots[2 * block], bb += dots[2 * block + 1];
            const double positive = a * a * gg + b * b * bb;
            const double squared = std::max(positive + 2 * a * b * gb, kLeastNormSquared * positive);
            inverse_norms[i] = squared > 0 ? float(std::min(1 / std::sqrt(squared), double(FLT_MAX))) : 0.0f;
        }
    }

    // Of the matrix that `ref` describes: the element that (i, j) of the iterate is, from its first one.
    static size_t element(const MatrixRef& ref, int i, int j) {
        return ref.tall ? size_t(j) * ref.ld + i : size_t(i) * ref.ld + j;
    }

    // X is divided by its norm before it is rounded: gradients of 1e-20 or 1e+10 come out the same.
    static void muon_momentum(void* X /*(count,mp,np)*/, float* momentum, const float* grads,
                              const MatrixRef* refs /*(count)*/, const float* inverse_norms /*(count)*/, int count,
                              int m, int n, float mu, bool nesterov, NsType type, const float* clip) {
        const float scale = clip[0];
        if (scale == 0) return;
        const int mp = round_up(m, 8), np = round_up(n, 8);
#pragma omp parallel for collapse(2)
        for (int b = 0; b < count; b++) {
            for (int i = 0; i < mp; i++) {
                for (int j = 0; j < np; j++) {
                    float x = 0;
                    if (i < m && j < n) {
                        const size_t at = element(refs[b], i, j);
                        const float g = grads[refs[b].offset + at] * scale;
                        float& buf = momentum[refs[b].state + at];
                        buf = mu * buf + g;
                        x = (nesterov ? g + mu * buf : buf) * inverse_norms[b];
                    }
                    store(X, (size_t(b) * mp + i) * np + j, x, type);
                }
            }
        }
    }

    // A (rows,cols) tile that begins at element `begin` of a matrix with row stride ld, as floats: where it lies if it
    // is fp32, else converted into buffer. Products of two 16-bit numbers are exact in fp32: gemm only rounds sums.
    struct FloatTile {
        const float* data;
        int ld;
    };
    static FloatTile as_floats(const void* x, size_t begin, int rows, int cols, int ld, NsType type,
                               std::vector<float>& buffer) {
        if (type == NsType::fp32) return {static_cast<const float*>(x) + begin, ld};
        buffer.resize(size_t(rows) * cols);
        for (int i = 0; i < rows; i++) {
            const uint16_t* src = static_cast<const uint16_t*>(x) + begin + size_t(i) * ld;
            float* dst = buffer.data() + size_t(i) * cols;
            for (int j = 0; j < cols; j++) dst[j] = type == NsType::bf16 ? from_bf16(src[j]) : from_fp16(src[j]);
        }
        return {buffer.data(), cols};
    }

    struct NsChain {
        NsChain(int, NsType, int*) {}  // every product is done when its call returns
    };

    // Of a symmetric result the lower triangle is computed and mirrored. A tile's bits depend on its own rows and
    // columns, not on the matrices beside it.
    static void ns_product(void* D /*(count,M,N)*/, const void* A /*(count,M,K)*/, const void* B,
                           const void* C /*(count,M,N) or null*/, float alpha, float beta, float diag, int count, int M,
                           int N, int K, NsProduct kind, NsType type) {
        const bool symmetric = kind == NsProduct::symmetric_nt;
#pragma omp parallel for collapse(3) schedule(dynamic)
        for (int b = 0; b < count; b++) {
            for (int i0 = 0; i0 < M; i0 += kGemmTile) {
                for (int j0 = 0; j0 < N; j0 += kGemmTile) {
                    if (symmetric && j0 > i0) continue;
                    static thread_local std::vector<float> buffer_a, buffer_b;
                    float tile[kGemmTile * kGemmTile];
                    const int rows = std::min(kGemmTile, M - i0), columns = std::min(kGemmTile, N - j0);
                    const size_t matrix_b = size_t(b) * N * K;
                    const FloatTile a = as_floats(A, (size_t(b) * M + i0) * K, rows, K, K, type, buffer_a);
                    const FloatTile bt = symmetric
                                             ? as_floats(B, matrix_b + size_t(j0) * K, columns, K, K, type, buffer_b)
                                             : as_floats(B, matrix_b + j0, K, columns, N, type, buffer_b);
                    gemm(false, symmetric, rows, columns, K, alpha, a.data, a.ld, bt.data, bt.ld, 0.0f, tile, columns);
                    for (int i = i0; i < i0 + rows; i++) {
                        const int end = symmetric ? std::min(j0 + columns, i + 1) : j0 + columns;
                        for (int j = j0; j < end; j++) {
                            const size_t at = (size_t(b) * M + i) * N + j;
                            float value = tile[(i - i0) * columns + j - j0] + (i == j ? diag : 0.0f);
                            if (C) value += beta * load(C, at, type);
                            store(D, at, value, type);
                            if (symmetric) store(D, (size_t(b) * M + j) * N + i, value, type);
                        }
                    }
                }
            }
        }
    }

    static void muon_update(real* params, float* master, const void* U /*(count,mp,np)*/,
                            const MatrixRef* refs /*(count)*/, int count, int m, int n, float decay /*1-lr*wd*/,
                            float lr, NsType type, const float* clip) {
        if (clip[0] == 0) return;
        const int mp = round_up(m, 8), np = round_up(n, 8);
#pragma omp parallel for collapse(2)
        for (int b = 0; b < count; b++) {
            for (int i = 0; i < m; i++) {
                const float step = lr * refs[b].scale;
                for (int j = 0; j < n; j++) {
                    const size_t at = element(refs[b], i, j);
                    float& w = master[refs[b].state + at];
                    w = w * decay - step * load(U, (size_t(b) * mp + i) * np + j, type);
                    params[refs[b].offset + at] = w;
                }
            }
        }
    }
};

// The backend: the operations above, and the collectives of comm.h.
struct Cpu : CpuOps, CpuComm {
    static constexpr const char* kBackendName = "cpu fp32";
    static size_t memory_available() {  // a rank's share, and what it may take of it
        return std::min(machine_memory_left() / world.local_size, process_memory_left());
    }
    static void start(const World& r) {
        CpuOps::start(r.local_size);
        CpuComm::start();
    }
    static void stop() { CpuComm::stop(); }
};
static_assert(is_backend<Cpu>());
