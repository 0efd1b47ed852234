// newton_schulz_hopper.cuh: rungs 7 to 10 of newton_schulz.cu, A = X X^T by Hopper's own instructions (sm_90a), one
// idea each, on the way from the trainer's kernel for every GPU (rung 6) to the one for Hopper (rung 11). They compute
// every tile, as cuBLAS does, and no tails: m is a multiple of 256, n of 64. What the instructions do stands in
// kernels/wgmma.cuh; the launchers are at the end.
#pragma once
#include <algorithm>

#include "../kernels/wgmma.cuh"

namespace rungs {

using bf16 = __nv_bfloat16;

constexpr int kRows = 128, kDepth = 64;  // of a tile, and of a step along n
constexpr int kBox = kRows * kDepth;     // elements of a box: 128 rows by 64 columns of X, 16 KiB, swizzled

// sum (64, width) of a warpgroup += `rows` (64, 64) times the transpose of `cols` (width, 64), both in shared memory.
template <int width>
__device__ void multiply_step(float (&sum)[width / 2], const bf16* rows, const bf16* cols, bool first) {
#if HOPPER
    wgmma_begin();
    UNROLL
    for (int step = 0; step < kDepth / 16; step++)
        wgmma<bf16, width, false, false>(sum, k_major_step(k_major(rows), step), k_major_step(k_major(cols), step),
                                         !first || step > 0);
    wgmma_commit();
#endif
}

// The warpgroup's sums -> A, from element (row0, col0) on.
template <int width>
__device__ void store_sums(bf16* A, int m, int row0, int col0, const float (&sum)[width / 2]) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    UNROLL
    for (int j = 0; j < width / 4; j++) {  // a pair; every second one is of the lane's other row
        const int row = row0 + warp * 16 + lane / 4 + j % 2 * 8, col = col0 + j / 2 * 8 + lane % 4 * 2;
        *reinterpret_cast<uint32_t*>(&A[size_t(row) * m + col]) = pack_pair<bf16>(sum[2 * j], sum[2 * j + 1]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7. wgmma. mma.sync takes its operands from registers: each warp first loads them there, 4 KiB for 131,072 operations,
//    and waits for what it issued. wgmma reads both operands from shared memory by itself, once for the four warps of a
//    warpgroup, and runs in the background. Copies by cp.async as before; two warpgroups of 64 x 128.

constexpr int kStages7 = 3;

__global__ void __launch_bounds__(256) xxt_7(bf16* A, const bf16* X, int m, int n) {
#if HOPPER
    DYNAMIC_SHARED(bf16, stages);  // (kStages7, 2, kBox)
    const int row0 = blockIdx.y * kRows, col0 = blockIdx.x * kRows, group = threadIdx.x / 128, steps = n / kDepth;
    A += size_t(blockIdx.z) * m * m;
    X += size_t(blockIdx.z) * m * n;
    auto stage = [&](int k) { return stages + k % kStages7 * 2 * kBox; };
    auto load = [&](int k) {
        for (int i = threadIdx.x; k < steps && i < kBox / 8; i += 256) {
            const int row = i / 8, col = i % 8 * 8;
            const bf16* from = X + size_t(row) * n + k * kDepth + col;
            cp_async_16(stage(k) + box_at(row, col), from + size_t(row0) * n, true);
            cp_async_16(stage(k) + kBox + box_at(row, col), from + size_t(col0) * n, true);
        }
        cp_async_commit();
    };
    load(0);
    load(1);
    float sum[64];
    for (int k = 0; k < steps; k++) {
        cp_async_wait<1>();  // step k has landed: what this thread copied of it,
        tma_store_fence();   // also for wgmma, which reads by another way than threads write,
        __syncthreads();     // and now what the others did. And they have multiplied step k - 1,
        load(k + 2);         // whose place this takes
        multiply_step<128>(sum, stage(k) + group * 64 * kDepth, stage(k) + kBox, k == 0);
        wgmma_wait<0>();
    }
    wgmma_keep(sum);
    store_sums<128>(A, m, row0 + group * 64, col0, sum);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 8. TMA. The copies of rung 7 are 8 instructions of every thread per step, with their addresses. Now one thread asks
//    for two boxes, swizzled on their way, and the bytes that land are counted by a barrier. Copying costs no
//    registers either, and the tensor cores go on while the next step is asked for.

constexpr int kStages8 = 4;

__global__ void __launch_bounds__(256) xxt_8(bf16* A, const __grid_constant__ CUtensorMap X, int m, int n) {
#if HOPPER
    DYNAMIC_SHARED(bf16, stages);  // (kStages8, 2, kBox)
    uint64_t* full = reinterpret_cast<uint64_t*>(stages + kStages8 * 2 * kBox);
    const int row0 = blockIdx.y * kRows, col0 = blockIdx.x * kRows, group = threadIdx.x / 128, steps = n / kDepth;
    auto stage = [&](int k) { return stages + k % kStages8 * 2 * kBox; };
    auto load = [&](int k) {
        if (threadIdx.x != 0 || k >= steps) return;
        mbarrier_arrive_expect(&full[k % kStages8], 2 * kBox * 2);
        tma_load(stage(k), &X, blockIdx.z, row0, k * kDepth, &full[k % kStages8]);
        tma_load(stage(k) + kBox, &X, blockIdx.z, col0, k * kDepth, &full[k % kStages8]);
    };
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages8; i++) mbarrier_init(&full[i], 1);
        mbarrier_init_fence();
    }
    __syncthreads();
    for (int k = 0; k < kStages8 - 1; k++) load(k);
    float sum[64];
    for (int k = 0; k < steps; k++) {
        mbarrier_wait(&full[k % kStages8], k / kStages8 % 2);
        multiply_step<128>(sum, stage(k) + group * 64 * kDepth, stage(k) + kBox, k == 0);
        wgmma_wait<1>();         // step k - 1 has been read,
        __syncthreads();         // by both warpgroups
        load(k + kStages8 - 1);  // where it was
    }
    wgmma_wait<0>();
    wgmma_keep(sum);
    store_sums<128>(A + size_t(blockIdx.z) * m * m, m, row0 + group * 64, col0, sum);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 9. Warps with different work. The __syncthreads of every step made both warpgroups, and the next copy, wait for the
//    slower one. Now one thread only copies, and a second barrier for each stage tells it that a place is free: nobody
//    waits but for data. The producer's warpgroup gives its registers away, so a tile can be 128 x 256: a quarter less
//    from the L2 and from shared memory per operation.

constexpr int kStages9 = 4, kCols = 256;

struct Ring {  // a place in it, and the parity of its barriers' phase
    int stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == kStages9) stage = 0, parity ^= 1;
    }
};
struct Shared9 {
    bf16 stages[kStages9][3][kBox];  // A's rows, and two boxes of columns
    uint64_t full[kStages9], empty[kStages9];
};

__device__ inline void start_ring(Shared9* shared) {
#if HOPPER
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages9; i++) {
            mbarrier_init(&shared->full[i], 1);
            mbarrier_init(&shared->empty[i], 2);  // warpgroups
        }
        mbarrier_init_fence();
    }
    __syncthreads();
#endif
}
// All steps of a tile, by one thread.
__device__ inline void produce_tile(Shared9* shared, Ring& ring, const CUtensorMap* X, int matrix, int row0, int col0,
                                    int steps) {
#if HOPPER
    for (int k = 0; k < steps; k++, ring.next()) {
        uint64_t* full = &shared->full[ring.stage];
        mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);
        mbarrier_arrive_expect(full, 3 * kBox * 2);
        for (int box = 0; box < 3; box++)
            tma_load(shared->stages[ring.stage][box], X, matrix, box == 0 ? row0 : col0 + (box - 1) * kRows, k * kDepth,
                     full);
    }
#endif
}
// Their sums, by a warpgroup.
__device__ inline void consume_tile(Shared9* shared, Ring& ring, float (&sum)[kCols / 2], int group, int steps) {
#if HOPPER
    Ring last = ring;
    auto release = [&] {
        if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared->empty[last.stage]);
    };
    for (int k = 0; k < steps; k++, ring.next()) {
        mbarrier_wait(&shared->full[ring.stage], ring.parity);
        const auto& boxes = shared->stages[ring.stage];
        multiply_step<kCols>(sum, boxes[0] + group * 64 * kDepth, boxes[1], k == 0);
        wgmma_wait<1>();
        if (k > 0) release();  // the step before
        last = ring;
    }
    wgmma_wait<0>();
    wgmma_keep(sum);
    release();
#endif
}

__global__ void __launch_bounds__(384, 1) xxt_9(bf16* A, const __grid_constant__ CUtensorMap X, int m, int n) {
#if HOPPER
    DYNAMIC_SHARED(Shared9, shared);
    start_ring(shared);
    const int row0 = blockIdx.y * kRows, col0 = blockIdx.x * kCols;
    Ring ring;
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0) produce_tile(shared, ring, &X, blockIdx.z, row0, col0, n / kDepth);
        return;
    }
    take_registers<232>();
    const int group = threadIdx.x / 128 - 1;
    float sum[kCols / 2];
    consume_tile(shared, ring, sum, group, n / kDepth);
    store_sums<kCols>(A + size_t(blockIdx.z) * m * m, m, row0 + group * 64, col0, sum);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 10. Persistent. A block of rung 9 has an SM to itself: while it starts, fills its ring and stores its tile, that SM
//     multiplies nothing. Now one block per SM stays and takes every 132nd tile: the producer brings the next tile's
//     first steps while this one is stored.

__global__ void __launch_bounds__(384, 1)
    xxt_10(bf16* A, const __grid_constant__ CUtensorMap X, int m, int n, int tiles) {
#if HOPPER
    DYNAMIC_SHARED(Shared9, shared);
    start_ring(shared);
    const int across = m / kCols, of_matrix = m / kRows * across;
    auto matrix_of = [&](int tile) { return tile / of_matrix; };
    auto row_of = [&](int tile) { return tile % of_matrix / across * kRows; };
    auto col_of = [&](int tile) { return tile % across * kCols; };
    Ring ring;
    if (threadIdx.x < 128) {
        give_registers<40>();
        for (int tile = blockIdx.x; threadIdx.x == 0 && tile < tiles; tile += gridDim.x)
            produce_tile(shared, ring, &X, matrix_of(tile), row_of(tile), col_of(tile), n / kDepth);
        return;
    }
    take_registers<232>();
    const int group = threadIdx.x / 128 - 1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        float sum[kCols / 2];
        consume_tile(shared, ring, sum, group, n / kDepth);
        store_sums<kCols>(A + size_t(matrix_of(tile)) * m * m, m, row_of(tile) + group * 64, col_of(tile), sum);
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// A (batch, m, m) = X X^T, X (batch, m, n)

inline CUtensorMap boxes_of(const bf16* X, int batch, int m, int n) {
    return tensor_map(X, false, n, m, batch, n, size_t(m) * n, kRows);
}
inline void run_7(bf16* A, const bf16* X, int batch, int m, int n) {
    LAUNCH(xxt_7, dim3(m / kRows, m / kRows, batch), 256, kStages7 * 2 * kBox * sizeof(bf16), A, X, m, n);
}
inline void run_8(bf16* A, const bf16* X, int batch, int m, int n) {
    LAUNCH(xxt_8, dim3(m / kRows, m / kRows, batch), 256, kStages8 * (2 * kBox * sizeof(bf16) + sizeof(uint64_t)), A,
           boxes_of(X, batch, m, n), m, n);
}
inline void run_9(bf16* A, const bf16* X, int batch, int m, int n) {
    LAUNCH(xxt_9, dim3(m / kCols, m / kRows, batch), 384, sizeof(Shared9), A, boxes_of(X, batch, m, n), m, n);
}
inline void run_10(bf16* A, const bf16* X, int batch, int m, int n) {
    int device = 0, multiprocessors = 0;
    CUDA_CHECK(cudaGetDevice(&device));
    CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    const int tiles = batch * (m / kRows) * (m / kCols);
    LAUNCH(xxt_10, std::min(tiles, multiprocessors), 384, sizeof(Shared9), A, boxes_of(X, batch, m, n), m, n, tiles);
}

}  // namespace rungs
