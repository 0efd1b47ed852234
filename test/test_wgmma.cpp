// Tests of kernels/wgmma.cuh, instruction by instruction, against what the PTX manual says of each: one source,
// compiled by g++ -DFIBER, where it tests the emulation (fiber_hopper.h), and by nvcc, where it tests that the GPU
// agrees. Numbers are small integers, so that every sum is exact.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../kernels/wgmma.cuh"
#include "device_buffer.h"

namespace test_wgmma {

using bf16 = __nv_bfloat16;

template <class T>
std::vector<T> integers(size_t n, unsigned seed) {
    std::mt19937 generator(seed);
    std::vector<T> x(n);
    for (T& value : x) value = from_float<T>(float(int(generator() % 17) - 8));
    return x;
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA and mbarriers: a box of one tensor -> `plain` (box_rows, 64), by way of box_at; then the same box, each element
// plus one, to the same place of another tensor.

constexpr int kBoxRows = 24;

__global__ void box_kernel(bf16* plain, const __grid_constant__ CUtensorMap from,
                           const __grid_constant__ CUtensorMap to, int matrix, int row, int col) {
#if HOPPER
    DYNAMIC_SHARED(bf16, box);
    uint64_t* landed = reinterpret_cast<uint64_t*>(box + kBoxRows * kBoxCols);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        mbarrier_arrive_expect(landed, kBoxRows * kBoxCols * 2);
        tma_load(box, &from, matrix, row, col, landed);
    }
    mbarrier_wait(landed, 0);
    for (int i = threadIdx.x; i < kBoxRows * kBoxCols; i += blockDim.x) {
        bf16& element = box[box_at(i / kBoxCols, i % kBoxCols)];
        plain[i] = element;
        element = from_float<bf16>(to_float(element) + 1.0f);
    }
    tma_store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(&to, matrix, row, col, box);
        tma_store_commit();
        tma_store_wait();
    }
#endif
}

TEST_CASE("wgmma.cuh: boxes of TMA, their swizzle, and what lies outside of the tensor") {
    if (!hopper_kernels()) return;
    const int cols = 88, rows = 37, batch = 3;  // of the tensor, a part of a larger one
    const size_t row_stride = 96, batch_stride = 40 * row_stride;
    const std::vector<bf16> values = integers<bf16>(batch * batch_stride, 1);
    const DeviceBuffer<bf16> from(values);
    for (int matrix : {0, 2})
        for (int row : {0, 5, 24, 36})
            for (int col : {0, 24, 64}) {
                CAPTURE(matrix);
                CAPTURE(row);
                CAPTURE(col);
                const DeviceBuffer<bf16> to(values), plain(kBoxRows * kBoxCols);
                auto map = [&](const bf16* data) {
                    return tensor_map(data, false, cols, rows, batch, row_stride, batch_stride, kBoxRows);
                };
                LAUNCH(box_kernel, 1, 64, kBoxRows * kBoxCols * 2 + 8, plain, map(from), map(to), matrix, row, col);
                const std::vector<bf16> got = plain.download(), stored = to.download();
                std::vector<bf16> want = values;
                int wrong = 0;
                for (int r = 0; r < kBoxRows; r++)
                    for (int c = 0; c < kBoxCols; c++) {
                        const bool inside = row + r < rows && col + c < cols;
                        const size_t at = matrix * batch_stride + (row + r) * row_stride + col + c;
                        wrong += to_float(got[r * kBoxCols + c]) != (inside ? to_float(values[at]) : 0.0f);
                        if (inside) want[at] = from_float<bf16>(to_float(values[at]) + 1.0f);
                    }
                CHECK(wrong == 0);
                CHECK(std::memcmp(want.data(), stored.data(), want.size() * sizeof(bf16)) == 0);
            }
}

// A warp fills a ring of two places, another one empties it: `count` numbers, each place used in both phases.
__global__ void ring_kernel(int* out, int count) {
#if HOPPER
    DYNAMIC_SHARED(uint64_t, barriers);
    uint64_t *full = barriers, *empty = barriers + 2;
    int* places = reinterpret_cast<int*>(barriers + 4);  // (2, 32)
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 2) {
        mbarrier_init(&full[threadIdx.x], 32);
        mbarrier_init(&empty[threadIdx.x], kWarpArrivals);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int i = 0; i < count; i++) {
        const int place = i % 2, parity = i / 2 % 2;
        if (threadIdx.x < 32) {
            mbarrier_wait(&empty[place], parity ^ 1);
            places[place * 32 + lane] = 100 * i + lane;
            mbarrier_arrive(&full[place]);
        } else {
            mbarrier_wait(&full[place], parity);
            out[i * 32 + lane] = places[place * 32 + (lane + 1) % 32];
            __syncwarp();
            if (lane_arrives(lane)) mbarrier_arrive(&empty[place]);
        }
    }
#endif
}

TEST_CASE("wgmma.cuh: mbarriers count arrivals and phases") {
    if (!hopper_kernels()) return;
    for (int launch = 0; launch < 4; launch++) {
        const int count = 7;
        const DeviceBuffer<int> out(count * 32);
        LAUNCH(ring_kernel, 1, 64, 4 * 8 + 64 * 4, out, count);
        const std::vector<int> got = out.download();
        int wrong = 0;
        for (int i = 0; i < count * 32; i++) wrong += got[i] != i / 32 * 100 + (i + 1) % 32;
        CHECK(wrong == 0);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: out (64, N) = start + A B, A (64, 64) and B (64, N), in the order of memory that the operands' majors ask for.
// Sums start from `start` = row - column, or anew.

constexpr int kDepth = 64;

template <class T, int N, bool a_mn_major, bool b_mn_major, bool a_in_registers>
__global__ void __launch_bounds__(128)
    product_kernel(float* out, const T* plain_a, const __grid_constant__ CUtensorMap a_map,
                   const __grid_constant__ CUtensorMap b_map, bool add) {
#if HOPPER
    DYNAMIC_SHARED(T, a);  // boxes of 64 rows, of k_major two, of which the second one is A
    T* b = a + 2 * 64 * kBoxCols;
    uint64_t* landed = reinterpret_cast<uint64_t*>(b + N * kDepth);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, 1);
        mbarrier_init_fence();
        mbarrier_arrive_expect(landed, (2 * 64 + N) * kDepth * 2);
        for (int box = 0; box < 2; box++)
            tma_load(a + box * 64 * kBoxCols, &a_map, 0, a_mn_major ? 0 : box * 64, a_mn_major ? box * 64 : 0, landed);
        for (int box = 0; box < N / 64; box++)
            tma_load(b + box * 64 * kBoxCols, &b_map, 0, b_mn_major ? 0 : box * 64, b_mn_major ? box * 64 : 0, landed);
    }
    __syncthreads();
    mbarrier_wait(landed, 0);
    const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    float d[N / 2];
    auto row_of = [&](int e) { return 16 * warp + g + e / 2 % 2 * 8; };
    auto col_of = [&](int e) { return e / 4 * 8 + 2 * t + e % 2; };
    UNROLL
    for (int e = 0; e < N / 2; e++) d[e] = float(row_of(e) - col_of(e));
    uint32_t fragments[kDepth / 16][4];
    for (int k = 0; k < kDepth / 16; k++)
        for (int i = 0; i < 4; i++)
            fragments[k][i] = *reinterpret_cast<const uint32_t*>(
                &plain_a[(64 + 16 * warp + g + i % 2 * 8) * kDepth + k * 16 + i / 2 * 8 + 2 * t]);
    const T* used = a + 64 * kBoxCols;
    const uint64_t a_rows = a_mn_major ? mn_major(used, 64 * kBoxCols * 2) : k_major(used);
    const uint64_t b_cols = b_mn_major ? mn_major(b, 64 * kBoxCols * 2) : k_major(b);
    wgmma_keep(d);
    wgmma_begin();
    UNROLL
    for (int k = 0; k < kDepth / 16; k++) {
        const uint64_t b_step = b_mn_major ? mn_major_step(b_cols, k) : k_major_step(b_cols, k);
        if constexpr (a_in_registers) wgmma<T, N, b_mn_major>(d, fragments[k], b_step, add || k > 0);
        else
            wgmma<T, N, a_mn_major, b_mn_major>(d, a_mn_major ? mn_major_step(a_rows, k) : k_major_step(a_rows, k),
                                                b_step, add || k > 0);
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_keep(d);
    UNROLL
    for (int e = 0; e < N / 2; e++) out[row_of(e) * N + col_of(e)] = d[e];
#endif
}

template <class T, int N, bool a_mn_major, bool b_mn_major, bool a_in_registers = false>
void check_wgmma() {
    CAPTURE(N);
    CAPTURE(a_mn_major);
    CAPTURE(b_mn_major);
    CAPTURE(a_in_registers);
    const bool half = std::is_same<T, __half>::value;
    const std::vector<T> A = integers<T>(128 * kDepth, 1), B = integers<T>(N * kDepth, 2);  // (128, k), (k, N)
    auto transpose = [](const std::vector<T>& x, int rows) {
        std::vector<T> y(x.size());
        const int cols = int(x.size()) / rows;
        for (int i = 0; i < int(x.size()); i++) y[i % cols * rows + i / cols] = x[i];
        return y;
    };
    const DeviceBuffer<T> plain_a(A), a(a_mn_major ? transpose(A, 128) : A), b(b_mn_major ? B : transpose(B, kDepth));
    auto map = [&](const T* data, int rows, int cols) {
        return tensor_map(data, half, cols, rows, 1, cols, size_t(rows) * cols, 64);
    };
    for (bool add : {false, true}) {
        const DeviceBuffer<float> out(64 * N);
        LAUNCH((product_kernel<T, N, a_mn_major, b_mn_major, a_in_registers>), 1, 128, (128 + N) * kDepth * 2 + 8, out,
               plain_a, a_mn_major ? map(a, kDepth, 128) : map(a, 128, kDepth),
               b_mn_major ? map(b, kDepth, N) : map(b, N, kDepth), add);
        const std::vector<float> got = out.download();
        int wrong = 0;
        for (int row = 0; row < 64; row++)
            for (int col = 0; col < N; col++) {
                float want = add ? float(row - col) : 0.0f;
                for (int k = 0; k < kDepth; k++)
                    want += to_float(A[(64 + row) * kDepth + k]) * to_float(B[k * N + col]);
                wrong += got[row * N + col] != want;
            }
        CHECK(wrong == 0);
    }
}

TEST_CASE("wgmma.cuh: products through descriptors of both kinds, and of registers") {
    if (!hopper_kernels()) return;
    check_wgmma<bf16, 64, false, false>();
    check_wgmma<bf16, 64, true, false>();
    check_wgmma<bf16, 128, false, true>();
    check_wgmma<bf16, 256, true, true>();
    check_wgmma<bf16, 256, false, false>();
    check_wgmma<__half, 64, false, true>();
    check_wgmma<__half, 128, false, false>();
    check_wgmma<__half, 256, false, true>();
    check_wgmma<bf16, 64, false, false, true>();
    check_wgmma<bf16, 128, false, true, true>();
}

// ---------------------------------------------------------------------------------------------------------------------
// stmatrix, named barriers, registers, and blocks that wait for each other

__global__ void stmatrix_kernel(uint16_t* out /*(2, 4, 8, 8): plain, then transposed*/) {
#if HOPPER
    DYNAMIC_SHARED(uint16_t, matrices);  // as out
    const int lane = threadIdx.x;
    uint32_t r[4];
    for (int i = 0; i < 4; i++) r[i] = uint32_t(i * 64 + lane * 2) | uint32_t(i * 64 + lane * 2 + 1) << 16;
    stmatrix_x4(&matrices[lane * 8], r);
    stmatrix_x4_trans(&matrices[256 + lane * 8], r);
    __syncwarp();
    for (int i = lane; i < 512; i += 32) out[i] = matrices[i];
#endif
}

// The first warp hands numbers to the others through shared memory: `there` (barrier 1) and `taken` (barrier 2).
__global__ void __launch_bounds__(384, 1) barrier_kernel(int* out /*(3, 384)*/) {
#if HOPPER
    DYNAMIC_SHARED(int, number);
    if (threadIdx.x < 128) give_registers<40>();
    else take_registers<232>();
    const int half = threadIdx.x / 192;
    for (int i = 0; i < 3; i++) {
        if (threadIdx.x % 192 == 0) number[half] = 7 + i + 10 * half;
        barrier_sync(1 + half, 192);
        out[i * 384 + threadIdx.x] = number[half];
        barrier_sync(1 + half, 192);
    }
#endif
}

// Blocks add one to a box of numbers, in turns: block b waits until b others are done.
__global__ void relay_kernel(const __grid_constant__ CUtensorMap numbers, int* counter) {
#if HOPPER
    DYNAMIC_SHARED(bf16, box);
    uint64_t* landed = reinterpret_cast<uint64_t*>(box + 8 * kBoxCols);
    if (threadIdx.x == 0) {
        mbarrier_init(landed, 1);
        mbarrier_init_fence();
        counter_wait(counter, blockIdx.x);
        proxy_fence();
        mbarrier_arrive_expect(landed, 8 * kBoxCols * 2);
        tma_load(box, &numbers, 0, 0, 0, landed);
    }
    __syncthreads();
    mbarrier_wait(landed, 0);
    for (int i = threadIdx.x; i < 8 * kBoxCols; i += blockDim.x) box[i] = from_float<bf16>(to_float(box[i]) + 1.0f);
    tma_store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        tma_store(&numbers, 0, 0, 0, box);
        tma_store_commit();
        tma_store_wait();
        proxy_fence();
        counter_add(counter);
    }
#endif
}

TEST_CASE("wgmma.cuh: stmatrix, barriers of some warps, registers, counters between blocks") {
    if (!hopper_kernels()) return;
    const DeviceBuffer<uint16_t> matrices(512);
    LAUNCH(stmatrix_kernel, 1, 32, 1024, matrices);
    const std::vector<uint16_t> stored = matrices.download();
    int wrong = 0;
    for (int i = 0; i < 4; i++)
        for (int row = 0; row < 8; row++)
            for (int col = 0; col < 8; col++) {  // lane 4 row + col / 2 has the pair
                wrong += stored[i * 64 + row * 8 + col] != i * 64 + row * 8 + col;
                wrong += stored[256 + i * 64 + col * 8 + row] != i * 64 + row * 8 + col;
            }
    CHECK(wrong == 0);

    for (int launch = 0; launch < 2; launch++) {
        const DeviceBuffer<int> out(3 * 384);
        LAUNCH(barrier_kernel, 1, 384, 8, out);
        const std::vector<int> got = out.download();
        for (int i = 0; i < 3 * 384; i++) wrong += got[i] != 7 + i / 384 + i % 384 / 192 * 10;
        CHECK(wrong == 0);

        const std::vector<bf16> start = integers<bf16>(8 * 64, 3);
        const DeviceBuffer<bf16> numbers(start);
        const DeviceBuffer<int> counter(std::vector<int>{0});
        LAUNCH(relay_kernel, 3, 64, 120 * 1024, tensor_map(numbers, false, 64, 8, 1, 64, 512, 8), counter);
        const std::vector<bf16> after = numbers.download();
        for (int i = 0; i < 8 * 64; i++) wrong += to_float(after[i]) != to_float(start[i]) + 3;
        CHECK(wrong == 0);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What the emulation reports. Each fault runs in a process of its own, which must end with these words.

#ifdef FIBER
std::string last_words(const std::function<void()>& run) {
    int ends[2];
    REQUIRE(pipe(ends) == 0);
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        std::signal(SIGABRT, SIG_DFL);
        dup2(ends[1], STDERR_FILENO);
        run();
        _exit(0);
    }
    close(ends[1]);
    std::string words;
    char buffer[1024];
    for (ssize_t n; (n = read(ends[0], buffer, sizeof buffer)) > 0;) words.append(buffer, n);
    close(ends[0]);
    int status = 0;
    waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? words : "it went through";
}

enum class Fault {
    none,
    no_init_fence,
    wait_for_nothing,
    too_many_arrivals,
    unfenced_store,
    uncommitted_store,
    unread_store,
    no_begin,
    three_warps,
    no_commit,
    registers,
    unfenced_load,
    half_a_barrier,
    load_before_tensor,
    store_before_tensor,
};

// Does what a kernel does with every instruction, but for one fault.
__global__ void faulty_kernel(const CUtensorMap map, int* counter, Fault fault) {
    DYNAMIC_SHARED(bf16, box);
    uint64_t* barrier = reinterpret_cast<uint64_t*>(box + 64 * kBoxCols);
    const bool first = threadIdx.x == 0;
    if (first) {
        mbarrier_init(barrier, 2);
        if (fault != Fault::no_init_fence) mbarrier_init_fence();
    }
    __syncthreads();
    if (fault == Fault::registers) take_registers<256>();
    if (fault == Fault::half_a_barrier && threadIdx.x < 96) barrier_sync(1, 128);
    if (first) {
        counter_wait(counter, 0);
        if (fault != Fault::unfenced_load) proxy_fence();
        mbarrier_arrive_expect(barrier, 64 * kBoxCols * 2);
        if (fault != Fault::wait_for_nothing) mbarrier_arrive(barrier);
        if (fault == Fault::too_many_arrivals) mbarrier_arrive(barrier);
        tma_load(box, &map, 0, 0, fault == Fault::load_before_tensor ? -8 : 0, barrier);
    }
    mbarrier_wait(barrier, 0);
    float d[32] = {};
    if (fault != Fault::no_begin) wgmma_begin();
    if (fault != Fault::three_warps || threadIdx.x < 96)
        wgmma<bf16, 64, false, false>(d, k_major(box), k_major(box), true);
    if (fault != Fault::no_commit) wgmma_commit();
    wgmma_wait<0>();
    const uint32_t r[4] = {};
    stmatrix_x4(box + threadIdx.x * 8, r);
    if (fault != Fault::unfenced_store) tma_store_fence();
    __syncthreads();
    if (first) {
        tma_store(&map, 0, fault == Fault::store_before_tensor ? -3 : 0, 0, box);
        if (fault != Fault::uncommitted_store) tma_store_commit();
        if (fault != Fault::unread_store) tma_store_wait_read();
    }
}

TEST_CASE("fiber_hopper.h: each fault is reported") {
    const DeviceBuffer<bf16> data(64 * kBoxCols);
    const DeviceBuffer<int> counter(std::vector<int>{0});
    const CUtensorMap map = tensor_map(data, false, 64, 64, 1, 64, 64 * 64, 64);
    auto words = [&](Fault fault) {
        std::string all;
        for (int launch = 0; launch < 4; launch++) {  // copies land early and late
            fiber::machine.launches++;
            all += last_words([&] { LAUNCH(faulty_kernel, 1, 128, 64 * kBoxCols * 2 + 8, map, counter, fault); });
        }
        return all;
    };
    auto reports = [&](Fault fault, const char* what) { return words(fault).find(what) != std::string::npos; };
    CHECK(words(Fault::none) == "it went throughit went throughit went throughit went through");
    CHECK(reports(Fault::no_init_fence, "lacks mbarrier_init_fence"));
    CHECK(
        reports(Fault::wait_for_nothing, "32 at mbarrier_wait for parity 0 at byte 8192, which lacks 1 of 2 arrivals"));
    CHECK(reports(Fault::too_many_arrivals, "more arrivals than the phase has"));
    CHECK(reports(Fault::unfenced_store, "has written without tma_store_fence"));
    CHECK(reports(Fault::uncommitted_store, "did not commit"));
    CHECK(reports(Fault::unread_store, "before its TMA stores had read"));
    CHECK(reports(Fault::no_begin, "wgmma without wgmma_begin"));
    CHECK(reports(Fault::three_warps, "a wgmma that only 96 threads"));
    CHECK(reports(Fault::no_commit, "with a wgmma under way"));
    CHECK(reports(Fault::registers, "take_registers<256>: 8 more for each thread, and the block has 0 left"));
    CHECK(reports(Fault::unfenced_load, "without proxy_fence"));
    CHECK(reports(Fault::half_a_barrier, "barrier_sync 1: 96 of 128 threads"));
    CHECK(reports(Fault::load_before_tensor, "tma_load: a box at (0, 0, -8), before the tensor"));
    CHECK(reports(Fault::store_before_tensor, "tma_store: a box at (0, -3, 0), before the tensor"));
}
#endif

}  // namespace test_wgmma
