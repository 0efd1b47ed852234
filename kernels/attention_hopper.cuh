// attention_hopper.cuh: the kernels of attention.cuh written for Hopper (sm_90a), for heads of 64 and 128 in bf16. The
// mathematics, the three kernels and what they own are the same; read attention.cuh first. New is who does what.
//
// A block is alone on its multiprocessor and stays there. It has a few warpgroups (4 warps each) that only compute,
// the consumers, and one warp that only copies, the producer:
//
//     producer            own_tiles[2]: what the block owns of one item of work, and of the next
//     (TMA)          ->   passing[stages]: a ring of pairs of tiles, K and V, or Q and dO
//                                | full                                   ^ empty
//                                v                                        |
//     warpgroup 0..W-1    wgmma on the ring, sums in registers, results by way of their own tile to memory (TMA)
//
// Every tile has 64 rows. An item is one block of W tiles of one head: its queries (forward, dQ) or its keys (dK and
// dV). A warpgroup owns one of them. The tiles that the block needs of the other side pass through the ring once and
// serve all its warpgroups; each waits for `full` (the bytes have landed) and says `empty` when it has read, so that
// they need not go in step, and the producer is ahead of them all, also into the next item. Items are handed out by a
// counter, long ones first, a group of heads at a time, so that what they share is still in the L2 cache.
//
//           tiles of keys   0  1  2  3  4  5       A block of 3 tiles of queries, seen by the forward and by dQ.
//     queries  3   w = 0    #  #  #  \  .  .           #  computed whole
//              4   w = 1    #  #  #  #  \  .           \  on the diagonal: computed first, and masked
//              5   w = 2    #  #  #  #  #  \           .  above it: the warpgroup lets the tile pass
//     they pass in order   <------------------         For dK and dV transposed, and they pass downwards.
//
// So the diagonal is the first tile that a warpgroup computes, for keys as for queries, and its loop over the others
// has no mask. In the loop the tensor cores always have work: the scores of the next tile and the sum over this one are
// issued together, and while they run the last scores become weights,
//
//     tensor cores    S1   | S2, P1 V1 | S3, P2 V2 | ..       S = Q K^T, P = exp of it. In the backward S and dP are
//     other units        P1   P2          P3                  issued together, and dQ, or dV and dK, are the sums.
//
// P, P^T and dS are never written to memory: wgmma takes its left operand from the registers in which it left scores.
// The gradient of qkv's bias is the sum of all rows of dQ, dK and dV. Each tile of them is still in shared memory when
// it leaves: there its rows are summed, by a product with ones, and a small kernel then adds up the tiles.
//
// In reading order: HopperTiles (sizes, shared memory), HopperItems (the work), the producer, HopperConsumer (what the
// kernels share), the three kernels, the launchers. No atomics but the counter: an item's results are the same bits
// whoever computes it.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "wgmma.cuh"

constexpr int kTileRows = kAttentionTile;
static_assert(kTileRows == 64, "the rows of wgmma's left operand");

// WARPGROUPS tiles of OWN matrices belong to a block, and pairs of tiles pass through a ring of STAGES.
// OWN_IN_REGISTERS: the own matrices, as left operands, are loaded into registers once; else wgmma reads shared memory.
// AHEAD: the scores of the next tile are issued before the sums over this one.
template <int HD, int WARPGROUPS, int OWN, int STAGES, bool OWN_IN_REGISTERS, bool AHEAD>
struct HopperTiles {
    static constexpr int head_dim = HD, warpgroups = WARPGROUPS, own = OWN, stages = STAGES;
    static constexpr bool own_in_registers = OWN_IN_REGISTERS, ahead = AHEAD;

    // The producer's warpgroup gives its registers to the others. A block has for them what it starts with.
    static constexpr int threads = 128 * (warpgroups + 1);
    static constexpr int start_registers = 65536 / threads / 8 * 8, producer_registers = 24;
    static constexpr int registers = (start_registers * (warpgroups + 1) - producer_registers) / warpgroups / 8 * 8;

    static constexpr int box = kTileRows * kBoxCols;  // elements
    static constexpr int tile = kTileRows * HD;       // HD / 64 boxes, one after the other
    static constexpr int box_bytes = box * int(sizeof(real)), tile_bytes = tile * int(sizeof(real));

    struct Shared {
        real own_tiles[2][warpgroups][own][tile];
        real passing[stages][2][tile];
        float terms[stages][2][kTileRows];  // dK and dV: lse (in units of log2) and delta of the passing queries
        uint64_t own_full[2], own_empty[2], full[stages], empty[stages];
        int item[2];
    };
    static_assert(!ahead || stages > 2, "a warpgroup holds one tile, and the next, when it waits for another");
    static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have");
};

// A matrix of every head: head h of it lies at columns first_col + h*HD.. of a (B, T, columns) tensor.
struct HopperMatrix {
    const CUtensorMap* map;
    int first_col;
};

// The work: B*H heads, each cut into blocks of own tiles.
struct HopperItems {
    int H, heads /*B*H*/, blocks /*of a head*/, warpgroups, tiles /*of T rows*/;
    bool own_queries;                 // else own keys
    unsigned* next;                   // the counter: items handed out
    static constexpr int group = 66;  // heads: 26 MB of q, k, v of 1024 tokens, half of the L2 cache

    struct Item {
        int b, h;
        int first, own;            // own tiles: first.. , `own` of them
        int start, step, passing;  // passing tiles: start, start + step, .., `passing` of them
    };
    __host__ __device__ int count() const { return heads * blocks; }
    __device__ Item at(int i) const {
        const int first_head = i / (group * blocks) * group, within = i % (group * blocks);
        const int heads_of_group = min(group, heads - first_head);
        const int head = first_head + within % heads_of_group, longer_ones = within / heads_of_group;
        Item item;
        item.b = head / H;
        item.h = head % H;
        // Where warpgroups do not divide tiles, a block with fewer of them is the shortest: of the queries the first
        // rows.
        const int before = longer_ones * warpgroups;
        item.own = min(warpgroups, tiles - before);
        item.first = own_queries ? tiles - before - item.own : before;
        item.start = own_queries ? item.first + item.own - 1 : item.first;
        item.step = own_queries ? -1 : 1;
        item.passing = own_queries ? item.start + 1 : tiles - item.start;
        return item;
    }
};

#if HOPPER
template <class Tiles>
__device__ void init_barriers(typename Tiles::Shared& shared) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            mbarrier_init(&shared.own_full[i], 1);
            mbarrier_init(&shared.own_empty[i], 4 * Tiles::warpgroups * kWarpArrivals);
        }
        for (int i = 0; i < Tiles::stages; i++) {
            mbarrier_init(&shared.full[i], kWarpSize);
            mbarrier_init(&shared.empty[i], 4 * Tiles::warpgroups * kWarpArrivals);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
}

// ---------------------------------------------------------------------------------------------------------------------
// The producer. x and y are the matrices whose tiles pass; terms.load(head, tile) reads what goes with the queries of
// a tile, terms.store(to) writes it to shared memory.

template <class Tiles>
__device__ void load_tile(real* tile, HopperMatrix matrix, int b, int h, int tile_row, uint64_t* full) {
    UNROLL
    for (int i = 0; i < Tiles::head_dim / kBoxCols; i++)
        tma_load(tile + i * Tiles::box, matrix.map, b, tile_row * kTileRows,
                 matrix.first_col + h * Tiles::head_dim + i * kBoxCols, full);
}

template <class Tiles, class Terms>
__device__ void produce(typename Tiles::Shared& shared, const HopperItems& items, const HopperMatrix (&own)[Tiles::own],
                        HopperMatrix x, HopperMatrix y, Terms terms) {
    const int lane = threadIdx.x % kWarpSize;
    unsigned n = 0;  // pairs of tiles, over all items
    for (unsigned i = 0;; i++) {
        // The counter starts at 0 again for the next launch: every block ends with one value that is no item.
        int index = 0;
        if (lane == 0) index = atomicInc(items.next, items.count() + gridDim.x - 1);
        index = __shfl_sync(kAllLanes, index, 0);
        const bool end = index >= items.count();
        const auto item = items.at(end ? 0 : index);
        const int slot = i % 2;
        mbarrier_wait(&shared.own_empty[slot], i / 2 % 2 ^ 1);
        if (lane == 0) {
            shared.item[slot] = end ? -1 : index;
            mbarrier_arrive_expect(&shared.own_full[slot], end ? 0 : item.own * Tiles::own * Tiles::tile_bytes);
            for (int w = 0; w < (end ? 0 : item.own); w++)
                for (int m = 0; m < Tiles::own; m++)
                    load_tile<Tiles>(shared.own_tiles[slot][w][m], own[m], item.b, item.h, item.first + w,
                                     &shared.own_full[slot]);
        }
        if (end) return;
        for (int tile = item.start, left = item.passing; left > 0; left--, tile += item.step, n++) {
            const int stage = n % Tiles::stages;
            terms.load(item.b * items.H + item.h, tile);
            mbarrier_wait(&shared.empty[stage], n / Tiles::stages % 2 ^ 1);
            terms.store(shared.terms[stage]);
            if (lane == 0) {
                mbarrier_arrive_expect(&shared.full[stage], 2 * Tiles::tile_bytes);
                load_tile<Tiles>(shared.passing[stage][0], x, item.b, item.h, tile, &shared.full[stage]);
                load_tile<Tiles>(shared.passing[stage][1], y, item.b, item.h, tile, &shared.full[stage]);
            } else {
                mbarrier_arrive(&shared.full[stage]);
            }
        }
    }
}

struct NoTerms {
    __device__ void load(int, int) {}
    __device__ void store(float (&)[2][kTileRows]) {}
};
struct QueryTerms {
    const float *lse, *delta;  // (B*H, T)
    int T;
    float2 terms[2];  // of this lane's queries

    __device__ void load(int head, int tile) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int query = tile * kTileRows + i * kWarpSize + int(threadIdx.x % kWarpSize);
            const size_t at = size_t(head) * T + query;
            // Past the end 0 will do: P is 1, but dO and dS are 0.
            terms[i] = query < T ? make_float2(lse[at] * kLog2e, delta[at]) : make_float2(0.0f, 0.0f);
        }
    }
    __device__ void store(float (&to)[2][kTileRows]) const {
        UNROLL
        for (int i = 0; i < 2; i++) {
            to[0][i * kWarpSize + threadIdx.x % kWarpSize] = terms[i].x;
            to[1][i * kWarpSize + threadIdx.x % kWarpSize] = terms[i].y;
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The consumers

template <class Tiles>
struct HopperConsumer {
    static constexpr int HD = Tiles::head_dim;
    typename Tiles::Shared& shared;
    const HopperItems& items;
    const int index = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    // A lane has two rows of the warpgroup's 64: row and row + 8. Element e of results (64, N) in registers, d[N / 2],
    // is in its row e / 2 % 2, column e / 4 * 8 + column + e % 2.
    const int row = 16 * warp + lane / 4, column = lane % 4 * 2;

    unsigned i = 0;  // items, also those of others
    unsigned n = 0;  // tiles of the ring, also those that were let pass
    int b, h, place /*of the own tile in the block*/, own_tile, tiles /*to compute: the diagonal one, and others*/;

    __device__ HopperConsumer(typename Tiles::Shared& shared_, const HopperItems& items_)
        : shared(shared_), items(items_) {}

    // Waits for the next item in which this warpgroup has a tile, and lets pass what is above the diagonal. Places in
    // the block change from item to item, since the last one of the queries, or the first one of the keys, has most
    // tiles to compute: so the ring, which moves with the slowest warpgroup, is not always held up by the same.
    __device__ bool next_item() {
        for (;; i++) {
            mbarrier_wait(&shared.own_full[i % 2], i / 2 % 2);
            const int number = shared.item[i % 2];
            if (number < 0) break;
            const auto item = items.at(number);
            place = i % 2 ? Tiles::warpgroups - 1 - index : index;
            const bool mine = place < item.own;
            const int above = items.own_queries ? item.own - 1 - place : place;
            for (int pass = mine ? above : item.passing; pass > 0; pass--) {
                wait_tile(0);
                release_tile();
            }
            b = item.b, h = item.h, own_tile = item.first + place, tiles = item.passing - above;
            if (mine) return true;
            free_last_item();
        }
        if (threadIdx.x % 128 == 0) tma_store_wait_read();  // shared memory goes with the block
        return false;
    }
    // Once in an item, when there is something to wait for anyway: the stores of the item before have left shared
    // memory, and its number and own tiles may be overwritten. Each warp for itself: nothing brings the warps of a
    // warpgroup together that has no tile.
    __device__ void free_last_item() const {
        __syncwarp();
        if (lane_arrives(lane) && i > 0) {
            if (lane == 0 && warp == 0) tma_store_wait_read();
            mbarrier_arrive(&shared.own_empty[(i - 1) % 2]);
        }
    }
    __device__ real* own(int matrix) const { return shared.own_tiles[i % 2][place][matrix]; }

    // The tile in use is `ahead` 0, the next one 1. x and y are operands of wgmma, whose descriptors serve both ways of
    // reading them: k_major has no use for the bytes from box to box.
    const uint64_t ring = mn_major(shared.passing[0][0], Tiles::box_bytes);
    __device__ static uint64_t further(uint64_t descriptor, int bytes) {  // the address is in the low word
        return descriptor >> 32 << 32 | (uint32_t(descriptor) + bytes / 16);
    }
    __device__ void wait_tile(int ahead) const {
        mbarrier_wait(&shared.full[(n + ahead) % Tiles::stages], (n + ahead) / Tiles::stages % 2);
    }
    __device__ void release_tile() {
        __syncwarp();
        if (lane_arrives(lane)) mbarrier_arrive(&shared.empty[n % Tiles::stages]);
        n++;
    }
    __device__ uint64_t x(int ahead) const {
        return further(ring, (n + ahead) % Tiles::stages * 2 * Tiles::tile_bytes);
    }
    __device__ uint64_t y(int ahead) const { return further(x(ahead), Tiles::tile_bytes); }
    // lse and delta of the columns `column` and column + 1 of every 8 of the tile
    __device__ const float2* terms(int ahead, int which) const {
        return reinterpret_cast<const float2*>(&shared.terms[(n + ahead) % Tiles::stages][which][column]);
    }

    // A tile (64, HD) of the block as left operand.
    struct Left {
        uint32_t fragments[Tiles::own_in_registers ? HD / 16 : 1][4];
        uint64_t descriptor;

        __device__ explicit Left(const real* tile) {
            if constexpr (Tiles::own_in_registers) {
                const int lane = threadIdx.x % 32, row = threadIdx.x / 32 % 4 * 16 + lane % 16;
                UNROLL
                for (int k = 0; k < HD / 16; k++)
                    ldmatrix_x4(fragments[k], tile + k / 4 * Tiles::box + box_at(row, k % 4 * 16 + lane / 16 * 8));
            } else {
                descriptor = k_major(tile);
            }
        }
        // s (64, 64) = this (64, HD) * passing (64, HD)^T
        __device__ void product(float (&s)[32], uint64_t passing) const {
            UNROLL
            for (int k = 0; k < HD / 16; k++) {  // 32 bytes further in a box, or in the next one
                const int at = k / 4 * Tiles::box_bytes + k % 4 * 32;
                if constexpr (Tiles::own_in_registers)
                    wgmma<real, 64, false>(s, fragments[k], further(passing, at), k > 0);
                else wgmma<real, 64, false, false>(s, further(descriptor, at), further(passing, at), k > 0);
            }
            wgmma_commit();
        }
    };
    // sum (64, HD) += weights (64, 64) * passing (64, HD), without a commit
    __device__ static void add_product(float (&sum)[HD / 2], const uint32_t (&weights)[4][4], uint64_t passing) {
        UNROLL
        for (int k = 0; k < 4; k++)  // 16 rows further
            wgmma<real, HD, true>(sum, weights[k], further(passing, k * 16 * kBoxCols * int(sizeof(real))), true);
    }
    // Results (64, 64) as a left operand: wgmma's layout of the one is its layout of the other.
    __device__ static void pack(uint32_t (&weights)[4][4], const float (&s)[32]) {
        UNROLL
        for (int j = 0; j < 16; j++) weights[j / 4][j % 4] = pack_pair<real>(s[2 * j], s[2 * j + 1]);
    }

    // Results leave by way of the own tiles in shared memory, which are not needed any more. First into own tile m:
    // sums (64, HD), the lane's rows times factor0 and factor1.
    __device__ void stage(int m, const float (&sum)[HD / 2], float factor0, float factor1) const {
        real* staging = own(m);
        UNROLL
        for (int j = 0; j < HD / 8; j += 2) {
            uint32_t r[4];
            UNROLL
            for (int k = 0; k < 4; k++) {
                const float factor = k % 2 ? factor1 : factor0;
                r[k] = pack_pair<real>(sum[4 * j + 2 * k] * factor, sum[4 * j + 2 * k + 1] * factor);
            }
            stmatrix_x4(staging + j / 8 * Tiles::box + box_at(16 * warp + lane % 16, j % 8 * 8 + lane / 16 * 8), r);
        }
    }
    // Then from the own tiles to the item's rows of n matrices. Rows past T are not written.
    template <int n>
    __device__ void store(const HopperMatrix (&to)[n]) const {
        tma_store_fence();
        barrier_sync(1 + index, 128);
        if (threadIdx.x % 128 == 0) {
            UNROLL
            for (int m = 0; m < n; m++) UNROLL
            for (int j = 0; j < HD / kBoxCols; j++)
                tma_store(to[m].map, b, own_tile * kTileRows, to[m].first_col + h * HD + j * kBoxCols,
                          own(m) + j * Tiles::box);
            tma_store_commit();
        }
    }
    // Behind store(): the sum of the staged rows of each matrix, rows past T with them, into row (b, own_tile) of sums
    // (B, ceil(T / 64), columns). It is ones (16, 64) times the tile, and stands in every row of that product; a warp
    // has 16 columns of each box. (By wgmma it would be ones (64, 64), four times the work.)
    template <int n>
    __device__ void store_row_sums(float* sums, int columns, const HopperMatrix (&to)[n]) const {
        const uint32_t one = pack_pair<real>(1.0f, 1.0f), ones[4] = {one, one, one, one};
        float* row_of_sums = sums + (size_t(b) * items.tiles + own_tile) * columns + h * HD;
        UNROLL
        for (int m = 0; m < n; m++) UNROLL
        for (int j = 0; j < HD / kBoxCols; j++) {
            float sum[2][4] = {};  // of 8 columns each
            UNROLL
            for (int k = 0; k < kTileRows / 16; k++) {
                uint32_t rows[4];
                const int at = box_at(16 * k + lane % 16, 16 * warp + lane / 16 * 8);
                ldmatrix_x4_trans(rows, own(m) + j * Tiles::box + at);
                mma_m16n8k16<real>(sum[0], ones, rows);
                mma_m16n8k16<real>(sum[1], ones, rows + 2);
            }
            if (lane >= 8) continue;
            float* place = row_of_sums + to[m].first_col + j * kBoxCols + 16 * warp + lane * 2;
            *reinterpret_cast<float2*>(place) =
                lane < 4 ? make_float2(sum[0][0], sum[0][1]) : make_float2(sum[1][0], sum[1][1]);
        }
    }
};
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Forward. out (B,T,C), lse (B,H,T), qkv (B,T,3C).

template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_forward_kernel(const __grid_constant__ CUtensorMap out, float* lse, const __grid_constant__ CUtensorMap qkv,
                          HopperItems items, int T, int C, float scale) {
#if HOPPER
    DYNAMIC_SHARED(typename Tiles::Shared, shared);
    init_barriers<Tiles>(*shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        const HopperMatrix q[] = {{&qkv, 0}}, k{&qkv, C}, v{&qkv, 2 * C};
        if (threadIdx.x < 128 * Tiles::warpgroups + kWarpSize) produce<Tiles>(*shared, items, q, k, v, NoTerms());
        return;
    }
    take_registers<Tiles::registers>();
    using Consumer = HopperConsumer<Tiles>;
    Consumer my(*shared, items);
    const float scale_log2 = scale * kLog2e;

    while (my.next_item()) {
        const typename Consumer::Left q(my.own(0));
        float s[32], o[Tiles::head_dim / 2] = {};
        uint32_t p[4][4];
        float l[2] = {0.0f, 0.0f};  // of this lane's two rows, and of its columns only

        // m need not be the largest score so far. Within 8 of it (in units of log2) nothing overflows and nothing is
        // lost, since P in bf16 and the sums in fp32 have an exponent: few tiles move m, and only those rescale.
        float m[2], limit[2], shift[2];
        auto set_max = [&](int r, float score) {
            m[r] = score;
            shift[r] = score * scale_log2;
            limit[r] = score + 8.0f / scale_log2;
        };
        auto exponentials = [&] {
            UNROLL
            for (int e = 0; e < 32; e++) {
                s[e] = fast_exp2(s[e] * scale_log2 - shift[e / 2 % 2]);  // from here on s is P, up to exp(m - lse)
                l[e / 2 % 2] += s[e];
            }
            wgmma_keep(s);
        };

        // The tile on the diagonal
        my.wait_tile(0);
        wgmma_begin();
        q.product(s, my.x(0));
        my.free_last_item();
        wgmma_wait<0>();
        wgmma_keep(s);
        float largest[2] = {-INFINITY, -INFINITY};
        UNROLL
        for (int e = 0; e < 32; e++) {
            if (e / 4 * 8 + my.column + e % 2 > my.row + e / 2 % 2 * 8) s[e] = -INFINITY;
            largest[e / 2 % 2] = fmaxf(largest[e / 2 % 2], s[e]);
        }
        UNROLL
        for (int r = 0; r < 2; r++) set_max(r, row_max(largest[r]));
        exponentials();
        Consumer::pack(p, s);

        if (my.tiles > 1) my.wait_tile(1);
        for (int left = my.tiles - 1; left > 0; left--) {
            wgmma_begin();
            q.product(s, my.x(1));
            Consumer::add_product(o, p, my.y(0));
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_keep(s);

            largest[0] = s[0], largest[1] = s[2];
            UNROLL
            for (int e = 1; e < 32; e++) largest[e / 2 % 2] = fmaxf(largest[e / 2 % 2], s[e]);
            const bool rescale = __any_sync(kAllLanes, largest[0] > limit[0] || largest[1] > limit[1]);
            float correction[2];
            if (rescale) {
                UNROLL
                for (int r = 0; r < 2; r++) {
                    const float old = m[r];
                    set_max(r, row_max(fmaxf(old, largest[r])));
                    correction[r] = fast_exp2((old - m[r]) * scale_log2);
                    l[r] *= correction[r];
                }
            }
            exponentials();
            // Between the exponentials and the wait for the sums, so that the compiler cannot exchange those.
            if (left > 1) my.wait_tile(2);
            wgmma_wait<0>();
            wgmma_keep(o);
            my.release_tile();
            if (rescale) {
                UNROLL
                for (int e = 0; e < Tiles::head_dim / 2; e++) o[e] *= correction[e / 2 % 2];
            }
            Consumer::pack(p, s);
        }
        wgmma_begin();
        Consumer::add_product(o, p, my.y(0));
        wgmma_commit();
        UNROLL
        for (int r = 0; r < 2; r++) {
            l[r] = row_sum(l[r]);
            const int query = my.own_tile * kTileRows + my.row + 8 * r;
            if (my.lane % 4 == 0 && query < T)
                lse[(size_t(my.b) * items.H + my.h) * T + query] = m[r] * scale + logf(l[r]);
        }
        wgmma_wait<0>();
        wgmma_keep(o);
        my.release_tile();
        my.stage(0, o, 1.0f / l[0], 1.0f / l[1]);
        my.store({{&out, 0}});
        my.i++;
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// dQ and delta. dqkv (B,T,3C), row_sums (B,ceil(T/64),3C): its rows, 64 at a time, summed; delta (B,H,T), dout and out
// (B,T,C), qkv (B,T,3C), lse (B,H,T).

template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_dq_kernel(const __grid_constant__ CUtensorMap dqkv, float* row_sums, float* delta,
                     const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap qkv, const real* out,
                     const float* lse, HopperItems items, int T, int C, float scale) {
#if HOPPER
    DYNAMIC_SHARED(typename Tiles::Shared, shared);
    init_barriers<Tiles>(*shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        const HopperMatrix own[] = {{&qkv, 0}, {&dout, 0}}, k{&qkv, C}, v{&qkv, 2 * C};
        if (threadIdx.x < 128 * Tiles::warpgroups + kWarpSize) produce<Tiles>(*shared, items, own, k, v, NoTerms());
        return;
    }
    take_registers<Tiles::registers>();
    using Consumer = HopperConsumer<Tiles>;
    Consumer my(*shared, items);
    const float scale_log2 = scale * kLog2e;

    while (my.next_item()) {
        // lse, and O for delta = dO . O: under way while the first scores are made. Of the four lanes that share a row,
        // lane t takes the chunks of 8 channels t, t + 4, ..
        constexpr int chunks = Tiles::head_dim / 32;
        float row_lse[2], row_delta[2] = {0.0f, 0.0f};  // of this lane's two rows; lse in units of log2
        Pack<real> o[2][chunks];
        const int query = my.own_tile * kTileRows + my.row;
        const size_t head = size_t(my.b) * items.H + my.h;
        UNROLL
        for (int r = 0; r < 2; r++) {
            // Past the end Q and dO are 0 and any O will do, but not any lse: of -200 it would make P infinite and dQ
            // no number, which the sum of rows must not meet. Infinity makes both 0.
            const int row = min(query + 8 * r, T - 1);
            row_lse[r] = query + 8 * r < T ? lse[head * T + row] * kLog2e : INFINITY;
            const real* from = out + (size_t(my.b) * T + row) * C + my.h * Tiles::head_dim + my.lane % 4 * 8;
            UNROLL
            for (int j = 0; j < chunks; j++) o[r][j] = Pack<real>::load(from + 32 * j);
        }
        const typename Consumer::Left q(my.own(0)), d_out(my.own(1));
        float s[32], dp[32], dq[Tiles::head_dim / 2] = {};
        uint32_t ds[4][4];
        auto exponentials = [&] {
            UNROLL
            for (int e = 0; e < 32; e++) s[e] = fast_exp2(s[e] * scale_log2 - row_lse[e / 2 % 2]);
        };
        auto differentials = [&] {
            UNROLL
            for (int e = 0; e < 32; e++) s[e] *= dp[e] - row_delta[e / 2 % 2];
            wgmma_keep(s);
        };

        // The tile on the diagonal
        my.wait_tile(0);
        wgmma_begin();
        q.product(s, my.x(0));
        d_out.product(dp, my.y(0));
        my.free_last_item();
        UNROLL
        for (int r = 0; r < 2; r++) {
            UNROLL
            for (int j = 0; j < chunks; j++) {
                const int col = my.lane % 4 * 8 + 32 * j;
                const real* d = my.own(1) + col / kBoxCols * Tiles::box + box_at(my.row + 8 * r, col % kBoxCols);
                const Pack<real> x = Pack<real>::load(d);
                UNROLL
                for (int c = 0; c < 8; c++) row_delta[r] += to_float(x[c]) * to_float(o[r][j][c]);
            }
            row_delta[r] = row_sum(row_delta[r]);
            if (my.lane % 4 == 0 && query + 8 * r < T) delta[head * T + query + 8 * r] = row_delta[r];
        }
        wgmma_wait<1>();
        wgmma_keep(s);
        exponentials();
        UNROLL
        for (int e = 0; e < 32; e++)
            if (e / 4 * 8 + my.column + e % 2 > my.row + e / 2 % 2 * 8) s[e] = 0.0f;
        wgmma_wait<0>();
        wgmma_keep(dp);
        differentials();
        Consumer::pack(ds, s);

        if (my.tiles > 1) my.wait_tile(1);
        for (int left = my.tiles - 1; left > 0; left--) {
            wgmma_begin();
            q.product(s, my.x(1));
            d_out.product(dp, my.y(1));
            Consumer::add_product(dq, ds, my.x(0));
            wgmma_commit();
            wgmma_wait<2>();
            wgmma_keep(s);
            exponentials();
            wgmma_keep(s);
            if (left > 1) my.wait_tile(2);  // here as in the forward
            wgmma_wait<1>();
            wgmma_keep(dp);
            differentials();
            wgmma_wait<0>();
            wgmma_keep(dq);
            my.release_tile();
            Consumer::pack(ds, s);
        }
        wgmma_begin();
        Consumer::add_product(dq, ds, my.x(0));
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(dq);
        my.release_tile();
        const HopperMatrix to[] = {{&dqkv, 0}};
        my.stage(0, dq, scale, scale);
        my.store(to);
        my.store_row_sums(row_sums, 3 * C, to);
        my.i++;
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// dK and dV, with delta from hopper_dq_kernel. Everything is transposed: rows are keys, columns are queries. Keys past
// T are masked for all queries before, and the queries past T have a dO of 0: their dK and dV are 0.

template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_dkv_kernel(const __grid_constant__ CUtensorMap dqkv, float* row_sums, const float* delta,
                      const __grid_constant__ CUtensorMap dout, const __grid_constant__ CUtensorMap qkv,
                      const float* lse, HopperItems items, int T, int C, float scale) {
#if HOPPER
    DYNAMIC_SHARED(typename Tiles::Shared, shared);
    init_barriers<Tiles>(*shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        const HopperMatrix own[] = {{&qkv, C}, {&qkv, 2 * C}}, q{&qkv, 0}, d_out{&dout, 0};
        if (threadIdx.x < 128 * Tiles::warpgroups + kWarpSize)
            produce<Tiles>(*shared, items, own, q, d_out, QueryTerms{lse, delta, T, {}});
        return;
    }
    take_registers<Tiles::registers>();
    using Consumer = HopperConsumer<Tiles>;
    Consumer my(*shared, items);
    const float scale_log2 = scale * kLog2e;

    while (my.next_item()) {
        const typename Consumer::Left k(my.own(0)), v(my.own(1));
        float s[32], dp[32], dk[Tiles::head_dim / 2] = {}, dv[Tiles::head_dim / 2] = {};
        uint32_t p[4][4], ds[4][4];
        auto scores = [&](int ahead) {
            k.product(s, my.x(ahead));
            v.product(dp, my.y(ahead));
        };
        auto add_products = [&] {
            Consumer::add_product(dv, p, my.y(0));
            Consumer::add_product(dk, ds, my.x(0));
            wgmma_commit();
        };
        auto exponentials = [&](int ahead) {
            const float2* lse = my.terms(ahead, 0);
            UNROLL
            for (int e = 0; e < 32; e++) {
                const float2 pair = lse[e / 4 * 4];
                s[e] = fast_exp2(s[e] * scale_log2 - (e % 2 ? pair.y : pair.x));
            }
        };
        auto differentials = [&](int ahead) {
            const float2* delta = my.terms(ahead, 1);
            UNROLL
            for (int e = 0; e < 32; e++) {
                const float2 pair = delta[e / 4 * 4];
                dp[e] = s[e] * (dp[e] - (e % 2 ? pair.y : pair.x));
            }
            wgmma_keep(dp);
        };

        // The tile on the diagonal
        my.wait_tile(0);
        wgmma_begin();
        scores(0);
        my.free_last_item();
        wgmma_wait<1>();
        wgmma_keep(s);
        exponentials(0);
        UNROLL
        for (int e = 0; e < 32; e++)
            if (e / 4 * 8 + my.column + e % 2 < my.row + e / 2 % 2 * 8) s[e] = 0.0f;
        wgmma_wait<0>();
        wgmma_keep(dp);
        differentials(0);
        Consumer::pack(p, s);
        Consumer::pack(ds, dp);

        if (my.tiles > 1) my.wait_tile(1);
        for (int left = my.tiles - 1; left > 0; left--) {
            if constexpr (Tiles::ahead) {
                wgmma_begin();
                scores(1);
                add_products();
                wgmma_wait<2>();
                wgmma_keep(s);
                exponentials(1);
                wgmma_keep(s);
                if (left > 1) my.wait_tile(2);  // here as in the forward
                wgmma_wait<1>();
                wgmma_keep(dp);
                differentials(1);
                wgmma_wait<0>();
            } else {  // s, dp, p and ds do not fit into registers together
                wgmma_begin();
                add_products();
                wgmma_wait<0>();
                wgmma_begin();
                scores(1);
                wgmma_wait<1>();
                wgmma_keep(s);
                exponentials(1);
                wgmma_wait<0>();
                wgmma_keep(dp);
                differentials(1);
                if (left > 1) my.wait_tile(2);
            }
            wgmma_keep(dk);
            wgmma_keep(dv);
            my.release_tile();
            Consumer::pack(p, s);
            Consumer::pack(ds, dp);
        }
        wgmma_begin();
        add_products();
        wgmma_wait<0>();
        wgmma_keep(dk);
        wgmma_keep(dv);
        my.release_tile();
        const HopperMatrix to[] = {{&dqkv, C}, {&dqkv, 2 * C}};
        my.stage(0, dk, scale, scale);
        my.stage(1, dv, 1.0f, 1.0f);
        my.store(to);
        my.store_row_sums(row_sums, 3 * C, to);
        my.i++;
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// The launchers. One kernel of each kind runs at a time, in the order of the one stream: each has its counter of items.

enum HopperCounter { kForwardItems, kDqItems, kDkvItems, kHopperCounters };
static __device__ unsigned hopper_items_taken[kHopperCounters];

template <class Tiles>
HopperItems hopper_items(HopperCounter counter, int B, int T, int H) {
    static unsigned* const taken = [] {
        void* address;
        CUDA_CHECK(cudaGetSymbolAddress(&address, hopper_items_taken));
        return static_cast<unsigned*>(address);
    }();
    const int tiles = ceil_div(T, kTileRows);
    return {
        H, B * H, ceil_div(tiles, Tiles::warpgroups), Tiles::warpgroups, tiles, counter != kDkvItems, taken + counter};
}
inline int hopper_blocks(const HopperItems& items) {  // one for each multiprocessor
    static const int multiprocessors = [] {
        int device, count;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
        return count;
    }();
    return std::min(multiprocessors, items.count());
}
inline CUtensorMap head_tiles(const real* data /*(B,T,columns)*/, int B, int T, int columns) {
    return tensor_map(data, false, columns, T, B, columns, size_t(T) * columns, kTileRows);
}

template <class Tiles>
void launch_hopper_forward(real* out, float* lse, const real* qkv, int B, int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(kForwardItems, B, T, H);
    LAUNCH(hopper_forward_kernel<Tiles>, hopper_blocks(items), Tiles::threads, sizeof(typename Tiles::Shared),
           head_tiles(out, B, T, C), lse, head_tiles(qkv, B, T, 3 * C), items, T, C,
           1.0f / std::sqrt(float(Tiles::head_dim)));
}
template <class Tiles>
void launch_hopper_dq(real* dqkv, float* row_sums, float* delta, const real* dout, const real* qkv, const real* out,
                      const float* lse, int B, int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(kDqItems, B, T, H);
    LAUNCH(hopper_dq_kernel<Tiles>, hopper_blocks(items), Tiles::threads, sizeof(typename Tiles::Shared),
           head_tiles(dqkv, B, T, 3 * C), row_sums, delta, head_tiles(dout, B, T, C), head_tiles(qkv, B, T, 3 * C), out,
           lse, items, T, C, 1.0f / std::sqrt(float(Tiles::head_dim)));
}
template <class Tiles>
void launch_hopper_dkv(real* dqkv, float* row_sums, const float* delta, const real* dout, const real* qkv,
                       const float* lse, int B, int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(kDkvItems, B, T, H);
    LAUNCH(hopper_dkv_kernel<Tiles>, hopper_blocks(items), Tiles::threads, sizeof(typename Tiles::Shared),
           head_tiles(dqkv, B, T, 3 * C), row_sums, delta, head_tiles(dout, B, T, C), head_tiles(qkv, B, T, 3 * C), lse,
           items, T, C, 1.0f / std::sqrt(float(Tiles::head_dim)));
}

template <int HD>
void hopper_forward(real* out, float* lse, const real* qkv, int B, int T, int C, int H) {
    using Tiles =
        std::conditional_t<HD == 64, HopperTiles<64, 4, 1, 8, false, true>, HopperTiles<128, 3, 1, 4, false, true>>;
    launch_hopper_forward<Tiles>(out, lse, qkv, B, T, C, H);
}
template <int HD>
void hopper_backward(real* dqkv, float* row_sums, float* delta, const real* dout, const real* qkv, const real* out,
                     const float* lse, int B, int T, int C, int H) {
    using Queries =
        std::conditional_t<HD == 64, HopperTiles<64, 3, 2, 4, false, true>, HopperTiles<128, 2, 2, 3, false, true>>;
    using Keys =
        std::conditional_t<HD == 64, HopperTiles<64, 2, 2, 8, true, true>, HopperTiles<128, 2, 2, 3, false, false>>;
    launch_hopper_dq<Queries>(dqkv, row_sums, delta, dout, qkv, out, lse, B, T, C, H);
    launch_hopper_dkv<Keys>(dqkv, row_sums, delta, dout, qkv, lse, B, T, C, H);
}
