// ns_hopper.cuh: the products of Newton-Schulz on Hopper (sm_90a): D = alpha * A op(B) + beta * C + diag * I (the last
// for a symmetric D), batched, in 16 bits with fp32 sums. What they are for, and why only the tiles on and below the
// diagonal of a symmetric result, stands in ns_kernels.cuh, whose mma.sync kernel serves every other GPU; here is how
// Hopper does it.
//
// One launch walks a whole chain of products, say the fifteen of five Newton-Schulz steps. One block of 384 threads per
// SM, there for the whole launch, takes tile after tile, 128 rows by 256 columns of a D:
//
//     warp 0         loads     takes the next tile of the chain, waits until the matrix is through the product before,
//                              brings A (128, 64) and B (64, 256), step after step along K, into a ring of three stages
//     warps 4..11    multiply  two warpgroups, 64 rows of the tile each: 128 fp32 sums per thread; 4 wgmma a stage
//     warps 1..3     store     D from `staging`, and its mirror image; count the tile; bring the next tile's C there
//
// so that nobody waits for memory: while a tile is multiplied, the one before leaves and the one after arrives. Who
// waits for whom within a block:
//
//     full[stage]    loads -> multiply   a stage has landed          staging_in   store -> multiply   C is there (or
//     nothing) empty[stage]   multiply -> loads   a stage has been read       staging_out  multiply -> store   D is
//     there tile_full[i], tile_empty[i]        which tile is next, for all: two places, used in turn
//
// and between blocks: tiles are taken in one order, product after product, so what a tile waits for was taken before
// it, by a block that runs: it will be done. Other matrices' tiles lie between, so the wait is short; and no product
// ends with SMs that have nothing to do, nor begins with a launch.
//
// Why 128 x 256: a step of 64 along K takes 1024 clocks of the tensor cores and 48 KiB from the L2; tiles of 128 x 128
// would ask for a third more per FLOP, of the L2 and of shared memory. A row of tiles of a symmetric result ends with
// one half as wide where the diagonal would leave half of it unneeded.
//
// The bits of a matrix depend on its operands and its shape alone. The mma.sync kernel adds up the same products in
// another order within 64 of K: both round the fp32 sum to 16 bits once.
#pragma once
#include "../common.h"
#include "wgmma.cuh"

constexpr int kHopperRows = 128, kHopperCols = 256, kHopperDepth = 64;  // of a tile, and of a step along K
constexpr int kHopperStages = 3;
constexpr int kHopperMultiplyThreads = 256, kHopperStoreThreads = 96, kHopperThreads = 384;
constexpr int kHopperBox = kHopperRows * kBoxCols;  // elements of a box of A, C or D: 16 KiB
constexpr int kHopperStageElements = (kHopperRows + kHopperCols) * kHopperDepth;  // 48 KiB
constexpr int kHopperStagingElements = kHopperRows * kHopperCols;                 // 64 KiB, four boxes side by side
constexpr size_t kHopperSharedBytes = (kHopperStages * kHopperStageElements + kHopperStagingElements) * 2 + 256;

// A product of the chain. Of each matrix `wide` tiles of 256 columns and `narrow` of 128.
struct HopperProduct {
    NsProduct kind;
    int a, b, c, d;  // its tensor maps; c < 0: none
    float alpha, beta, diag;
    int M, N, K;
    bool same;  // B is A: on the diagonal one box serves as both
    int wide, narrow, wide_across;
    __host__ __device__ int tiles() const { return wide + narrow; }
};

struct HopperChain {
    static constexpr int kMaps = 16;
    CUtensorMap maps[kMaps];
    HopperProduct products[kNsChainProducts];
    int product_count, batch;
    int tiles_per_matrix;  // of all products
    int* counters;         // the next tile; then (product, batch): tiles done
};

struct HopperTile {
    int product, matrix, row, col;  // of its first element; product < 0: there are no more
    bool narrow;
    bool on_diagonal;  // of a symmetric result: its last 128 columns are
};

__device__ inline HopperTile hopper_tile(const HopperChain& chain, int t) {
    HopperTile tile;
    if (t >= chain.batch * chain.tiles_per_matrix) {
        tile.product = -1;
        return tile;
    }
    for (tile.product = 0; t >= chain.batch * chain.products[tile.product].tiles(); tile.product++)
        t -= chain.batch * chain.products[tile.product].tiles();
    const HopperProduct& p = chain.products[tile.product];
    tile.matrix = t / p.tiles();
    t %= p.tiles();
    tile.narrow = t >= p.wide;
    if (tile.narrow) t -= p.wide;
    if (p.kind == NsProduct::nn) {
        tile.row = (tile.narrow ? t : t / p.wide_across) * kHopperRows;
        tile.col = (tile.narrow ? p.wide_across : t % p.wide_across) * kHopperCols;
        tile.on_diagonal = false;
    } else if (tile.narrow) {  // every second row of tiles ends with a narrow one
        tile.row = tile.col = t * 2 * kHopperRows;
        tile.on_diagonal = true;
    } else {
        int row = 1;
        while (t >= (row + 1) / 2) t -= (row++ + 1) / 2;
        tile.row = row * kHopperRows;
        tile.col = t * kHopperCols;
        tile.on_diagonal = tile.col + kHopperRows == tile.row;
    }
    return tile;
}

#if HOPPER
struct HopperShared {
    uint64_t full[kHopperStages], empty[kHopperStages], staging_in, staging_out, tile_full[2], tile_empty[2];
    HopperTile tiles[2];
};
static_assert(sizeof(HopperShared) <= 256, "as kHopperSharedBytes counts it");

// A place in the ring, and the parity of its barriers' phase.
struct HopperRing {
    int stage = 0, parity = 0;
    __device__ void next() {
        if (++stage == kHopperStages) stage = 0, parity ^= 1;
    }
};

// The i-th tile of this block, for those who did not take it.
__device__ inline HopperTile hopper_next_tile(HopperShared* shared, int i) {
    mbarrier_wait(&shared->tile_full[i % 2], i / 2 % 2);
    const HopperTile tile = shared->tiles[i % 2];
    mbarrier_arrive(&shared->tile_empty[i % 2]);
    return tile;
}

// One tile's sums by a warpgroup, from the ring to `staging`. width: 256, or 128 of a narrow tile.
template <class T, NsProduct kind, int width>
__device__ inline void hopper_multiply(HopperRing& ring, T* stages, T* staging, HopperShared* shared,
                                       const HopperProduct& product, const HopperTile& tile, int tile_parity) {
    constexpr bool transposed_b = kind == NsProduct::nn;  // B is (K, N)
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int k_steps = (product.K + kHopperDepth - 1) / kHopperDepth;
    float sums[width / 2];
    if (k_steps == 0) {
        UNROLL
        for (float& sum : sums) sum = 0;
    }
    HopperRing last = ring;
    for (int k = 0; k < k_steps; k++) {
        T *a = stages + ring.stage * kHopperStageElements, *b = a + kHopperBox;
        if (product.same && tile.on_diagonal) a = b + (width - kHopperRows) * kHopperDepth;  // B's last rows are A's
        mbarrier_wait(&shared->full[ring.stage], ring.parity);
        const uint64_t a_rows = k_major(a + group * 64 * kBoxCols);
        const uint64_t b_cols = transposed_b ? mn_major(b, kHopperDepth * kBoxCols * 2) : k_major(b);
        wgmma_begin();
        UNROLL
        for (int step = 0; step < kHopperDepth / 16; step++)
            wgmma<T, width, false, transposed_b>(
                sums, k_major_step(a_rows, step),
                transposed_b ? mn_major_step(b_cols, step) : k_major_step(b_cols, step), k > 0 || step > 0);
        wgmma_commit();
        wgmma_wait<1>();  // the stage before this one has been read
        if (k > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(&shared->empty[last.stage]);
        last = ring;
        ring.next();
    }
    wgmma_wait<0>();
    wgmma_keep(sums);
    if (k_steps > 0 && threadIdx.x % 128 == 0) mbarrier_arrive(&shared->empty[last.stage]);

    // Sums -> staging, (16, 16) at a time, in the place where C lies. `place`: this lane's row of the four 8 x 8
    // matrices that ldmatrix and stmatrix move; with 16 columns more a bit of its swizzled address changes.
    mbarrier_wait(&shared->staging_in, tile_parity);
    const float alpha = product.alpha, beta = product.beta;
    const int row0 = group * 64 + warp * 16, place = box_at(row0 + lane % 16, lane / 16 * 8);
    UNROLL
    for (int j = 0; j < width / 16; j++) {
        // Column of the diagonal half, if this is in one: the last 128 columns of the tile.
        const int half_col = j * 16 - (width - kHopperRows);
        const bool on_diagonal = kind == NsProduct::symmetric_nt && half_col >= 0 && tile.on_diagonal;
        if (on_diagonal && half_col > row0) continue;  // above the diagonal: somebody's mirror image
        T* at = staging + j / 4 * kHopperBox + (place ^ 16 * (j % 4));
        float value[8];  // [2i], [2i + 1]: 8 x 8 matrix i
        UNROLL
        for (int i = 0; i < 8; i++) value[i] = alpha * sums[8 * j + i];
        if (product.c >= 0) {
            uint32_t c[4];
            ldmatrix_x4(c, at);
            UNROLL
            for (int i = 0; i < 4; i++) {
                const Pair<T>& pair = reinterpret_cast<const Pair<T>&>(c[i]);
                value[2 * i] += beta * to_float(pair.x), value[2 * i + 1] += beta * to_float(pair.y);
            }
        }
        uint32_t d[4];
        UNROLL
        for (int i = 0; i < 4; i++) d[i] = pack_pair<T>(value[2 * i], value[2 * i + 1]);
        if (!on_diagonal || half_col < row0) stmatrix_x4(at, d);
        if (on_diagonal) {
            T* half = staging + (width - kHopperRows) * kHopperRows;
            auto in_half = [&](int row, int col) {
                return half + col / kBoxCols * kHopperBox + box_at(row, col % kBoxCols);
            };
            if (half_col < row0) {
                stmatrix_x4_trans(in_half(half_col + lane / 16 * 8 + lane % 8, row0 + lane / 8 % 2 * 8), d);
            } else {  // these 256 elements lie across the diagonal: the upper ones are copies of the lower ones
                __syncwarp();  // every lane has its C
                UNROLL
                for (int i = 0; i < 8; i++) {
                    const int row = half_col + lane / 4 + i / 2 % 2 * 8,
                              col = half_col + lane % 4 * 2 + i / 4 * 8 + i % 2;
                    if (row == col) value[i] += product.diag;
                    if (row >= col) *in_half(row, col) = *in_half(col, row) = from_float<T>(value[i]);
                }
            }
        }
    }
    tma_store_fence();
    __syncwarp();
    if (lane_arrives(lane)) mbarrier_arrive(&shared->staging_out);
}

// A (128, 128) half of `staging`, two boxes, becomes its transpose: (16, 16) blocks change places with the block on the
// other side of the diagonal, by the warps 0, 1, 2.
template <class T>
__device__ inline void hopper_transpose(T* half, int warp) {
    const int lane = threadIdx.x % 32;
    auto at = [&](int row, int col) { return half + col / kBoxCols * kHopperBox + box_at(row, col % kBoxCols); };
    int pair = warp;
    for (int i = 0; i < kHopperRows / 16; i++) {
        for (; pair <= i; pair += kHopperStoreThreads / 32) {  // block (i, j), j <= i
            const int row = i * 16, col = pair * 16, to_row = lane / 16 * 8 + lane % 8, to_col = lane / 8 % 2 * 8;
            uint32_t lower[4], upper[4];
            ldmatrix_x4_trans(lower, at(row + lane % 16, col + lane / 16 * 8));
            ldmatrix_x4_trans(upper, at(col + lane % 16, row + lane / 16 * 8));
            __syncwarp();  // of a block on the diagonal all is read before any is written
            stmatrix_x4(at(col + to_row, row + to_col), lower);
            if (i != pair) stmatrix_x4(at(row + to_row, col + to_col), upper);
        }
        pair -= i + 1;  // of the next row of blocks
    }
}

// The counters of the chain, by one thread of a block each: what one has stored and counted, another that has seen the
// count may load.
__device__ inline void hopper_count(int* counter) {
    proxy_fence();
    counter_add(counter);
}
__device__ inline void hopper_wait_for(const int* counter, int value) {
    counter_wait(counter, value);
    proxy_fence();
}
#endif

// Grid: at most one block per SM, so that all run at once.
template <class T>
__global__ void __launch_bounds__(kHopperThreads, 1) hopper_chain_kernel(const __grid_constant__ HopperChain chain) {
#if HOPPER
    DYNAMIC_SHARED(T, stages);
    T* staging = stages + kHopperStages * kHopperStageElements;
    HopperShared* shared = reinterpret_cast<HopperShared*>(staging + kHopperStagingElements);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kHopperStages; stage++) {
            mbarrier_init(&shared->full[stage], 1);
            mbarrier_init(&shared->empty[stage], 2);  // the two warpgroups
        }
        mbarrier_init(&shared->staging_in, kEveryLaneArrives ? kHopperStoreThreads : 1);
        mbarrier_init(&shared->staging_out, kHopperMultiplyThreads / 32 * kWarpArrivals);
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&shared->tile_full[i], 1);
            mbarrier_init(&shared->tile_empty[i], kHopperMultiplyThreads + kHopperStoreThreads);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x >= 128) {  // multiply
        take_registers<232>();
        HopperRing ring;
        for (int i = 0;; i++) {
            const HopperTile tile = hopper_next_tile(shared, i);
            if (tile.product < 0) return;
            const HopperProduct& product = chain.products[tile.product];
            auto multiply = [&](auto kind, auto width) {
                hopper_multiply<T, kind, width>(ring, stages, staging, shared, product, tile, i % 2);
            };
            using Wide = std::integral_constant<int, kHopperCols>;
            using Narrow = std::integral_constant<int, kHopperRows>;
            if (product.kind == NsProduct::nn) {
                const std::integral_constant<NsProduct, NsProduct::nn> nn;
                tile.narrow ? multiply(nn, Narrow()) : multiply(nn, Wide());
            } else {
                const std::integral_constant<NsProduct, NsProduct::symmetric_nt> symmetric;
                tile.narrow ? multiply(symmetric, Narrow()) : multiply(symmetric, Wide());
            }
        }
    }
    give_registers<40>();

    if (threadIdx.x < 32) {  // loads
        if (threadIdx.x != 0) return;
        HopperRing ring;
        int next = atomicAdd(chain.counters, 1);
        for (int i = 0;; i++) {
            const HopperTile tile = hopper_tile(chain, next);
            if (tile.product > 0)
                hopper_wait_for(chain.counters + 1 + (tile.product - 1) * chain.batch + tile.matrix,
                                chain.products[tile.product - 1].tiles());
            if (i >= 2) mbarrier_wait(&shared->tile_empty[i % 2], i / 2 % 2 ^ 1);
            shared->tiles[i % 2] = tile;
            mbarrier_arrive(&shared->tile_full[i % 2]);
            if (tile.product < 0) return;
            next = atomicAdd(chain.counters, 1);
            const HopperProduct& product = chain.products[tile.product];
            const CUtensorMap *a_map = &chain.maps[product.a], *b_map = &chain.maps[product.b];
            const int width = tile.narrow ? kHopperRows : kHopperCols;
            const bool one_box = product.same && tile.on_diagonal;
            for (int k = 0; k < product.K; k += kHopperDepth, ring.next()) {
                T *a = stages + ring.stage * kHopperStageElements, *b = a + kHopperBox;
                uint64_t* full = &shared->full[ring.stage];
                mbarrier_wait(&shared->empty[ring.stage], ring.parity ^ 1);
                mbarrier_arrive_expect(full, ((one_box ? 0 : kHopperRows) + width) * kHopperDepth * 2);
                if (!one_box) tma_load(a, a_map, tile.matrix, tile.row, k, full);
                if (product.kind == NsProduct::symmetric_nt) {
                    for (int col = 0; col < width; col += kHopperRows)
                        tma_load(b + col * kBoxCols, b_map, tile.matrix, tile.col + col, k, full);
                } else {
                    for (int col = 0; col < width; col += kBoxCols)
                        tma_load(b + col * kHopperDepth, b_map, tile.matrix, k, tile.col + col, full);
                }
            }
        }
    }

    const int thread = threadIdx.x - 32;  // store
    for (int i = 0;; i++) {
        const HopperTile tile = hopper_next_tile(shared, i);
        if (tile.product < 0) return;
        const HopperProduct& product = chain.products[tile.product];
        const CUtensorMap* d_map = &chain.maps[product.d];
        const int width = tile.narrow ? kHopperRows : kHopperCols;
        if (thread == 0) {
            if (product.c < 0) {
                mbarrier_arrive(&shared->staging_in);
            } else {
                proxy_fence();
                mbarrier_arrive_expect(&shared->staging_in, kHopperRows * width * 2);
                for (int col = 0; col < width; col += kBoxCols)
                    tma_load(staging + col * kHopperRows, &chain.maps[product.c], tile.matrix, tile.row, tile.col + col,
                             &shared->staging_in);
            }
        } else if (kEveryLaneArrives) {
            mbarrier_arrive(&shared->staging_in);
        }
        mbarrier_wait(&shared->staging_out, i % 2);
        if (thread == 0) {
            for (int col = 0; col < width && tile.col + col < product.N; col += kBoxCols)
                tma_store(d_map, tile.matrix, tile.row, tile.col + col, staging + col * kHopperRows);
            tma_store_commit();
        }
        if (product.kind == NsProduct::symmetric_nt) {  // the mirror image of what is below the diagonal
            const int mirrored = width - (tile.on_diagonal ? kHopperRows : 0);  // columns
            if (thread == 0) tma_store_wait_read();
            barrier_sync(1, kHopperStoreThreads);  // D has left
            for (int col = 0; col < mirrored; col += kHopperRows)
                hopper_transpose(staging + col * kHopperRows, thread / 32);
            tma_store_fence();
            barrier_sync(1, kHopperStoreThreads);
            if (thread == 0) {
                for (int col = 0; col < mirrored; col += kHopperRows)
                    for (int row = 0; row < kHopperRows && tile.row + row < product.M; row += kBoxCols)
                        tma_store(d_map, tile.matrix, tile.col + col, tile.row + row,
                                  staging + (col + row) * kHopperRows);
                tma_store_commit();
            }
        }
        if (thread == 0) {
            tma_store_wait();
            hopper_count(chain.counters + 1 + tile.product * chain.batch + tile.matrix);
        }
    }
#endif
}

// Collects products, with the contract of NsKernels::ns_product, and launches them as one chain: each may use what the
// ones before it have made of the same matrix. counters: ns_chain_counters(batch).
class HopperRecorder {
    const NsType type;
    HopperChain chain = {};
    int map_count = 0;
    struct Mapped {
        const void* data;
        int rows, cols, box_rows;
    } mapped[HopperChain::kMaps];

    int map(const void* data, int rows, int cols, int box_rows) {
        for (int i = 0; i < map_count; i++)
            if (mapped[i].data == data && mapped[i].rows == rows && mapped[i].cols == cols &&
                mapped[i].box_rows == box_rows)
                return i;
        if (map_count == HopperChain::kMaps) fail("internal: a chain of products over too many matrices");
        mapped[map_count] = {data, rows, cols, box_rows};
        chain.maps[map_count] =
            tensor_map(data, type == NsType::fp16, cols, rows, chain.batch, cols, size_t(rows) * cols, box_rows);
        return map_count++;
    }

  public:
    HopperRecorder(NsType type_, int batch, int* counters) : type(type_) {
        chain.batch = batch;
        chain.counters = counters;
    }
    void add(NsProduct kind, void* D, const void* A, const void* B, const void* C, float alpha, float beta, float diag,
             int M, int N, int K) {
        if (chain.product_count == kNsChainProducts) launch();  // many --ns_steps: the rest is another launch
        HopperProduct& p = chain.products[chain.product_count++];
        p = {};
        p.kind = kind;
        p.d = map(D, M, N, kHopperRows);
        p.a = K > 0 ? map(A, M, K, kHopperRows) : 0;
        p.b = K == 0 ? 0 : kind == NsProduct::nn ? map(B, K, N, kHopperDepth) : map(B, N, K, kHopperRows);
        p.c = C ? map(C, M, N, kHopperRows) : -1;
        p.alpha = alpha, p.beta = beta, p.diag = diag;
        p.M = M, p.N = N, p.K = K;
        p.same = A == B;
        const int down = ceil_div(M, kHopperRows), halves = ceil_div(N, kHopperRows);
        if (kind == NsProduct::nn) {
            p.wide_across = halves / 2;
            p.wide = down * p.wide_across;
            p.narrow = down * (halves % 2);
        } else {
            for (int row = 0; row < down; row++) p.wide += (row + 1) / 2;
            p.narrow = (down + 1) / 2;
        }
        chain.tiles_per_matrix += p.tiles();
    }
    void launch() {
        static const int multiprocessors = [] {
            int device = 0, count = 0;
            CUDA_CHECK(cudaGetDevice(&device));
            CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
            return count;
        }();
        CUDA_CHECK(cudaMemsetAsync(chain.counters, 0, (1 + size_t(chain.product_count) * chain.batch) * sizeof(int),
                                   cuda_stream));
        const int blocks = std::min(chain.batch * chain.tiles_per_matrix, multiprocessors);
        const auto kernel = type == NsType::fp16 ? hopper_chain_kernel<__half> : hopper_chain_kernel<__nv_bfloat16>;
        LAUNCH(kernel, blocks, kHopperThreads, kHopperSharedBytes, chain);
        chain.product_count = chain.tiles_per_matrix = 0;
    }
};
