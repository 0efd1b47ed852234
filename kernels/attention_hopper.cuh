// attention_hopper.cuh: the three kernels of attention.cuh for sm_90a.
#pragma once
#include "wgmma.cuh"

template <int HD_, int WARPGROUPS, int OWN, int STAGES, bool OWN_IN_REGISTERS, bool AHEAD>
struct HopperTiles {
    static constexpr int HD = HD_, warpgroups = WARPGROUPS, own = OWN, stages = STAGES;
    static constexpr bool own_in_registers = OWN_IN_REGISTERS, ahead = AHEAD;
    static constexpr int threads = 128 * (warpgroups + 1);
    // Of a thread, in multiples of 8: what a block starts with is what its warpgroups can share out again.
    static constexpr int start_registers = 65536 / threads / 8 * 8, producer_registers = 24;
    static constexpr int registers = (start_registers * (warpgroups + 1) - producer_registers) / warpgroups / 8 * 8;
    static constexpr int rows = 64;              // of a tile
    static constexpr int box = rows * kBoxCols;  // elements
    static constexpr int tile = rows * HD;

    struct Shared {
        real own_tiles[2][warpgroups][own][tile];
        real passing[stages][2][tile];
        float terms[stages][2][rows];
        uint64_t own_full[2], own_empty[2], full[stages], empty[stages];
        int items[2];
    };
    static_assert(!ahead || stages > 2, "a warpgroup holds one tile, and the next, when it waits for another");
    static_assert(sizeof(Shared) <= 227 * 1024, "what a block may have");
};

// Where a matrix of a head lies: in columns first_col + h*HD.. of a tensor.
struct HopperMatrix {
    const CUtensorMap* map;
    int first_col;
};

// What there is to do: heads x blocks items.
struct HopperItems {
    int H, heads /*B*H*/, blocks, tiles /*of T*/, group /*heads*/;
    bool queries;  // own rows are queries
    unsigned* next;

    __device__ int count() const { return heads * blocks; }
    struct Item {
        int b, h, block;
    };
    __device__ Item at(int i) const {
        const int of_group = i / (group * blocks), within = i % (group * blocks);
        const int g = min(group, heads - of_group * group);
        const int head = of_group * group + within % g, rank = within / g;
        return {head / H, head % H, queries ? blocks - 1 - rank : rank};
    }
};

#if HOPPER
template <class Tiles>
struct HopperPipeline {
    using Shared = typename Tiles::Shared;
    static constexpr int W = Tiles::warpgroups, HD = Tiles::HD;

    __device__ static void init(Shared& shared) {
        if (threadIdx.x == 0) {
            for (int i = 0; i < 2; i++) {
                mbarrier_init(&shared.own_full[i], 1);
                mbarrier_init(&shared.own_empty[i], W);
            }
            for (int i = 0; i < Tiles::stages; i++) {
                mbarrier_init(&shared.full[i], 32);
                mbarrier_init(&shared.empty[i], 4 * W);
            }
            mbarrier_init_fence();
        }
        __syncthreads();
    }

    __device__ static void load_tile(real* tile, HopperMatrix matrix, int b, int h, int row, uint64_t* barrier) {
        UNROLL
        for (int c = 0; c < HD; c += kBoxCols)
            tma_load(tile + c / kBoxCols * Tiles::box, matrix.map, b, row, matrix.first_col + h * HD + c, barrier);
    }

    // The last warp.
    template <class Terms>
    __device__ static void produce(Shared& shared, const HopperItems& items, const HopperMatrix (&own)[Tiles::own],
                                   HopperMatrix x, HopperMatrix y, Terms terms) {
        const int lane = threadIdx.x % 32;
        unsigned n = 0;
        for (unsigned i = 0;; i++) {
            const int slot = i % 2;
            int index = 0;
            if (lane == 0) index = atomicInc(items.next, items.count() + gridDim.x - 1);
            index = __shfl_sync(kAllLanes, index, 0);
            mbarrier_wait(&shared.own_empty[slot], i / 2 % 2 ^ 1);
            if (lane == 0) shared.items[slot] = index;
            if (index >= items.count()) {
                if (lane == 0) mbarrier_arrive(&shared.own_full[slot]);
                break;
            }
            const auto item = items.at(index);
            if (lane == 0) {
                mbarrier_arrive_expect(&shared.own_full[slot], W * Tiles::own * Tiles::tile * int(sizeof(real)));
                for (int m = 0; m < Tiles::own; m++)
                    for (int w = 0; w < W; w++)
                        load_tile(shared.own_tiles[slot][w][m], own[m], item.b, item.h,
                                  (item.block * W + w) * Tiles::rows, &shared.own_full[slot]);
            }
            const int first = item.block * W, last = min(first + W, items.tiles) - 1;
            int tile = items.queries ? last : first;
            const int passing = items.queries ? last + 1 : items.tiles - first, step = items.queries ? -1 : 1;
            for (int t = 0; t < passing; t++, n++, tile += step) {
                const int stage = n % Tiles::stages;
                terms.load(item.b * items.H + item.h, tile);
                mbarrier_wait(&shared.empty[stage], n / Tiles::stages % 2 ^ 1);
                terms.store(shared.terms[stage]);
                if (lane == 0) {
                    mbarrier_arrive_expect(&shared.full[stage], 2 * Tiles::tile * int(sizeof(real)));
                    load_tile(shared.passing[stage][0], x, item.b, item.h, tile * Tiles::rows, &shared.full[stage]);
                    load_tile(shared.passing[stage][1], y, item.b, item.h, tile * Tiles::rows, &shared.full[stage]);
                } else {
                    mbarrier_arrive(&shared.full[stage]);
                }
            }
        }
    }

    // Consumers.
    __device__ static void wait_tile(Shared& shared, unsigned n) {
        mbarrier_wait(&shared.full[n % Tiles::stages], n / Tiles::stages % 2);
    }
    __device__ static void release_tile(Shared& shared, unsigned n) {
        if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.empty[n % Tiles::stages]);
    }

    // s (64, 64) = own (64, HD) passing (64, HD)^T
    struct Own {
        uint32_t fragments[Tiles::own_in_registers ? HD / 16 : 1][4];
        uint64_t descriptor;

        __device__ void load(const real* tile) {
            if constexpr (Tiles::own_in_registers) {
                const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
                UNROLL
                for (int k = 0; k < HD / 16; k++)
                    ldmatrix_x4(fragments[k], tile + k / 4 * Tiles::box + box_at(row, k % 4 * 16 + lane / 16 * 8));
            } else {
                descriptor = k_major(tile);
            }
        }
        __device__ void product(float (&s)[32], const real* passing) const {
            const uint64_t b = k_major(passing);
            UNROLL
            for (int k = 0; k < HD / 16; k++) {
                const int at = k / 4 * Tiles::box * int(sizeof(real)) / 16 + k % 4 * 2;
                if constexpr (Tiles::own_in_registers) wgmma<real, 64, false>(s, fragments[k], b + at, k > 0);
                else wgmma<real, 64, false, false>(s, descriptor + at, b + at, k > 0);
            }
        }
    };
    // sum (64, HD) += weights (64, 64) passing (64, HD)
    __device__ static void add_product(float (&sum)[HD / 2], const uint32_t (&weights)[4][4], const real* passing) {
        const uint64_t b = mn_major(passing, Tiles::box * int(sizeof(real)));
        UNROLL
        for (int k = 0; k < 4; k++) wgmma<real, HD, true>(sum, weights[k], mn_major_step(b, k), true);
    }
    __device__ static void pack(uint32_t (&weights)[4][4], const float (&s)[32]) {
        UNROLL
        for (int i = 0; i < 16; i++) weights[i / 4][i % 4] = pack_pair<real>(s[2 * i], s[2 * i + 1]);
    }

    // Stores sums (64, HD) by way of a tile in shared memory that nobody reads any more.
    __device__ static void store(HopperMatrix to, int b, int h, int row, const float (&sum)[HD / 2], float factor0,
                                 float factor1, real* staging) {
        const int lane = threadIdx.x % 32, warp_row = threadIdx.x % 128 / 32 * 16;
        UNROLL
        for (int n = 0; n < HD / 8; n += 2) {
            uint32_t r[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                const float factor = i % 2 ? factor1 : factor0;
                r[i] = pack_pair<real>(sum[4 * n + 2 * i] * factor, sum[4 * n + 2 * i + 1] * factor);
            }
            stmatrix_x4(staging + n / 8 * Tiles::box + box_at(warp_row + lane % 16, n % 8 * 8 + lane / 16 * 8), r);
        }
        tma_store_fence();
        const int warpgroup = threadIdx.x / 128;
        barrier_sync(1 + warpgroup, 128);
        if (threadIdx.x % 128 == 0) {
            UNROLL
            for (int c = 0; c < HD; c += kBoxCols)
                tma_store(to.map, b, row, to.first_col + h * HD + c, staging + c / kBoxCols * Tiles::box);
            tma_store_commit();
        }
    }
};
#endif

struct NoTerms {
    __device__ void load(int, int) {}
    __device__ void store(float (*)[64]) {}
};

// Forward
template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_forward_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap out, float* lse,
                          HopperItems items, int T, int C, float scale) {
#if HOPPER
    using Pipeline = HopperPipeline<Tiles>;
    DYNAMIC_SHARED(typename Tiles::Shared, shared_memory);
    auto& shared = *shared_memory;
    Pipeline::init(shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        if (threadIdx.x >= 128 * Tiles::warpgroups + 32) return;
        const HopperMatrix own[1] = {{&qkv, 0}};
        Pipeline::produce(shared, items, own, {&qkv, C}, {&qkv, 2 * C}, NoTerms());
        return;
    }
    take_registers<Tiles::registers>();
    const int w = threadIdx.x / 128, lane = threadIdx.x % 32;
    const float scale_log2 = scale * kLog2e;
    unsigned n = 0;
    for (unsigned i = 0;; i++) {
        const int slot = i % 2;
        mbarrier_wait(&shared.own_full[slot], i / 2 % 2);
        const int index = shared.items[slot];
        if (index >= items.count()) break;
        const auto item = items.at(index);
        const int last = min(item.block * Tiles::warpgroups + Tiles::warpgroups, items.tiles) - 1;
        const int own_tile = item.block * Tiles::warpgroups + w;
        if (own_tile > last) {
            for (int t = last; t >= 0; t--, n++) Pipeline::wait_tile(shared, n), Pipeline::release_tile(shared, n);
            if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.own_empty[slot]);
            continue;
        }
        for (int t = last; t > own_tile; t--, n++) Pipeline::wait_tile(shared, n), Pipeline::release_tile(shared, n);

        real* q_tile = shared.own_tiles[slot][w][0];
        typename Pipeline::Own q;
        q.load(q_tile);

        float s[32], o[Tiles::HD / 2];
        uint32_t p[4][4];
        UNROLL
        for (float& x : o) x = 0.0f;

        // diagonal
        Pipeline::wait_tile(shared, n);
        wgmma_begin();
        q.product(s, shared.passing[n % Tiles::stages][0]);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(s);
        const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        UNROLL
        for (int e = 0; e < 32; e++)
            if (e / 4 * 8 + lane % 4 * 2 + e % 2 > row + e / 2 % 2 * 8) s[e] = -INFINITY;
        float m[2], limit[2], shift[2], l[2] = {0.0f, 0.0f};
        auto set_max = [&](int r, float x) {
            m[r] = x;
            limit[r] = x + 8.0f / scale_log2;
            shift[r] = x * scale_log2;
        };
        UNROLL
        for (int r = 0; r < 2; r++) {
            float x = s[2 * r];
            UNROLL
            for (int e = 0; e < 16; e++) x = fmaxf(x, s[e / 2 * 4 + 2 * r + e % 2]);
            set_max(r, row_max(x));
        }
        UNROLL
        for (int e = 0; e < 32; e++) {
            s[e] = fast_exp2(s[e] * scale_log2 - shift[e / 2 % 2]);
            l[e / 2 % 2] += s[e];
        }
        Pipeline::pack(p, s);

        if (own_tile > 0) Pipeline::wait_tile(shared, n + 1);
        for (int t = own_tile; t > 0; t--, n++) {
            wgmma_begin();
            q.product(s, shared.passing[(n + 1) % Tiles::stages][0]);
            wgmma_commit();
            Pipeline::add_product(o, p, shared.passing[n % Tiles::stages][1]);
            wgmma_commit();
            wgmma_wait<1>();
            wgmma_keep(s);
            float x[2] = {s[0], s[2]};
            UNROLL
            for (int e = 0; e < 32; e++) x[e / 2 % 2] = fmaxf(x[e / 2 % 2], s[e]);
            const bool rescale = __any_sync(kAllLanes, x[0] > limit[0] || x[1] > limit[1]);
            float correction[2];
            if (rescale) {
                UNROLL
                for (int r = 0; r < 2; r++) {
                    x[r] = row_max(fmaxf(m[r], x[r]));
                    correction[r] = fast_exp2((m[r] - x[r]) * scale_log2);
                    l[r] *= correction[r];
                    set_max(r, x[r]);
                }
            }
            UNROLL
            for (int e = 0; e < 32; e++) {
                s[e] = fast_exp2(s[e] * scale_log2 - shift[e / 2 % 2]);
                l[e / 2 % 2] += s[e];
            }
            wgmma_keep(s);
            if (t > 1) Pipeline::wait_tile(shared, n + 2);
            wgmma_wait<0>();
            wgmma_keep(o);
            Pipeline::release_tile(shared, n);
            if (rescale) {
                UNROLL
                for (int e = 0; e < Tiles::HD / 2; e++) o[e] *= correction[e / 2 % 2];
            }
            Pipeline::pack(p, s);
        }
        wgmma_begin();
        Pipeline::add_product(o, p, shared.passing[n % Tiles::stages][1]);
        wgmma_commit();
        l[0] = row_sum(l[0]);
        l[1] = row_sum(l[1]);
        const int query = own_tile * 64 + row;
        UNROLL
        for (int r = 0; r < 2; r++)
            if (lane % 4 == 0 && query + 8 * r < T)
                lse[size_t(item.b * items.H + item.h) * T + query + 8 * r] = m[r] * scale + logf(l[r]);
        wgmma_wait<0>();
        wgmma_keep(o);
        Pipeline::release_tile(shared, n);
        n++;
        Pipeline::store({&out, 0}, item.b, item.h, own_tile * 64, o, 1.0f / l[0], 1.0f / l[1], q_tile);
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read();
            mbarrier_arrive(&shared.own_empty[slot]);
        }
    }
#endif
}

// dQ and delta
template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_dq_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                     const __grid_constant__ CUtensorMap dqkv, float* delta, const real* out, const float* lse,
                     HopperItems items, int T, int C, float scale) {
#if HOPPER
    using Pipeline = HopperPipeline<Tiles>;
    DYNAMIC_SHARED(typename Tiles::Shared, shared_memory);
    auto& shared = *shared_memory;
    Pipeline::init(shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        if (threadIdx.x >= 128 * Tiles::warpgroups + 32) return;
        const HopperMatrix own[2] = {{&qkv, 0}, {&dout, 0}};
        Pipeline::produce(shared, items, own, {&qkv, C}, {&qkv, 2 * C}, NoTerms());
        return;
    }
    take_registers<Tiles::registers>();
    const int w = threadIdx.x / 128, lane = threadIdx.x % 32;
    const float scale_log2 = scale * kLog2e;
    unsigned n = 0;
    for (unsigned i = 0;; i++) {
        const int slot = i % 2;
        mbarrier_wait(&shared.own_full[slot], i / 2 % 2);
        const int index = shared.items[slot];
        if (index >= items.count()) break;
        const auto item = items.at(index);
        const int last = min(item.block * Tiles::warpgroups + Tiles::warpgroups, items.tiles) - 1;
        const int own_tile = item.block * Tiles::warpgroups + w;
        if (own_tile > last) {
            for (int t = last; t >= 0; t--, n++) Pipeline::wait_tile(shared, n), Pipeline::release_tile(shared, n);
            if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.own_empty[slot]);
            continue;
        }
        real *q_tile = shared.own_tiles[slot][w][0], *dout_tile = shared.own_tiles[slot][w][1];
        const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        const size_t head = size_t(item.b * items.H + item.h) * T;
        float row_lse[2], row_delta[2] = {0.0f, 0.0f};
        UNROLL
        for (int r = 0; r < 2; r++) {
            const int query = own_tile * 64 + row + 8 * r;
            row_lse[r] = query < T ? lse[head + query] * kLog2e : 0.0f;
            if (query < T) {
                const real* o = out + (size_t(item.b) * T + query) * C + item.h * Tiles::HD;
                UNROLL
                for (int chunk = lane % 4; chunk < Tiles::HD / 8; chunk += 4) {
                    Pack<real> x =
                        Pack<real>::load(dout_tile + chunk / 8 * Tiles::box + box_at(row + 8 * r, chunk % 8 * 8));
                    Pack<real> y = Pack<real>::load(o + chunk * 8);
                    UNROLL
                    for (int j = 0; j < 8; j++) row_delta[r] += to_float(x[j]) * to_float(y[j]);
                }
            }
            row_delta[r] = row_sum(row_delta[r]);
            if (lane % 4 == 0 && query < T) delta[head + query] = row_delta[r];
        }
        typename Pipeline::Own q, d;
        q.load(q_tile);
        d.load(dout_tile);

        for (int t = last; t > own_tile; t--, n++) Pipeline::wait_tile(shared, n), Pipeline::release_tile(shared, n);

        float s[32], dp[32], dq[Tiles::HD / 2];
        uint32_t ds[4][4];
        UNROLL
        for (float& x : dq) x = 0.0f;

        // diagonal
        Pipeline::wait_tile(shared, n);
        wgmma_begin();
        q.product(s, shared.passing[n % Tiles::stages][0]);
        wgmma_commit();
        d.product(dp, shared.passing[n % Tiles::stages][1]);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_keep(s);
        UNROLL
        for (int e = 0; e < 32; e++) {
            s[e] = fast_exp2(s[e] * scale_log2 - row_lse[e / 2 % 2]);
            if (e / 4 * 8 + lane % 4 * 2 + e % 2 > row + e / 2 % 2 * 8) s[e] = 0.0f;
        }
        wgmma_wait<0>();
        wgmma_keep(dp);
        UNROLL
        for (int e = 0; e < 32; e++) s[e] *= dp[e] - row_delta[e / 2 % 2];
        Pipeline::pack(ds, s);

        if (own_tile > 0) Pipeline::wait_tile(shared, n + 1);
        for (int t = own_tile; t > 0; t--, n++) {
            wgmma_begin();
            q.product(s, shared.passing[(n + 1) % Tiles::stages][0]);
            wgmma_commit();
            d.product(dp, shared.passing[(n + 1) % Tiles::stages][1]);
            wgmma_commit();
            Pipeline::add_product(dq, ds, shared.passing[n % Tiles::stages][0]);
            wgmma_commit();
            wgmma_wait<2>();
            wgmma_keep(s);
            UNROLL
            for (int e = 0; e < 32; e++) s[e] = fast_exp2(s[e] * scale_log2 - row_lse[e / 2 % 2]);
            wgmma_keep(s);
            if (t > 1) Pipeline::wait_tile(shared, n + 2);
            wgmma_wait<1>();
            wgmma_keep(dp);
            UNROLL
            for (int e = 0; e < 32; e++) s[e] *= dp[e] - row_delta[e / 2 % 2];
            wgmma_keep(s);
            wgmma_wait<0>();
            wgmma_keep(dq);
            Pipeline::release_tile(shared, n);
            Pipeline::pack(ds, s);
        }
        wgmma_begin();
        Pipeline::add_product(dq, ds, shared.passing[n % Tiles::stages][0]);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_keep(dq);
        Pipeline::release_tile(shared, n);
        n++;
        Pipeline::store({&dqkv, 0}, item.b, item.h, own_tile * 64, dq, scale, scale, q_tile);
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read();
            mbarrier_arrive(&shared.own_empty[slot]);
        }
    }
#endif
}

// dK and dV
struct QueryTerms {
    const float *lse, *delta;  // (B*H, T)
    int T;
    float2 terms[2];

    __device__ void load(int head, int tile) {
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int query = tile * 64 + 32 * i + int(threadIdx.x % 32);
            const size_t at = size_t(head) * T + query;
            terms[i] = query < T ? make_float2(lse[at] * kLog2e, delta[at]) : make_float2(0.0f, 0.0f);
        }
    }
    __device__ void store(float (*to)[64]) const {
        UNROLL
        for (int i = 0; i < 2; i++) {
            to[0][32 * i + threadIdx.x % 32] = terms[i].x;
            to[1][32 * i + threadIdx.x % 32] = terms[i].y;
        }
    }
};

template <class Tiles>
__global__ void __launch_bounds__(Tiles::threads, 1)
    hopper_dkv_kernel(const __grid_constant__ CUtensorMap qkv, const __grid_constant__ CUtensorMap dout,
                      const __grid_constant__ CUtensorMap dqkv, const float* delta, const float* lse, HopperItems items,
                      int T, int C, float scale) {
#if HOPPER
    using Pipeline = HopperPipeline<Tiles>;
    DYNAMIC_SHARED(typename Tiles::Shared, shared_memory);
    auto& shared = *shared_memory;
    Pipeline::init(shared);
    if (threadIdx.x >= 128 * Tiles::warpgroups) {
        give_registers<Tiles::producer_registers>();
        if (threadIdx.x >= 128 * Tiles::warpgroups + 32) return;
        const HopperMatrix own[2] = {{&qkv, C}, {&qkv, 2 * C}};
        Pipeline::produce(shared, items, own, {&qkv, 0}, {&dout, 0}, QueryTerms{lse, delta, T, {}});
        return;
    }
    take_registers<Tiles::registers>();
    const int w = threadIdx.x / 128, lane = threadIdx.x % 32;
    const float scale_log2 = scale * kLog2e;
    unsigned n = 0;
    for (unsigned i = 0;; i++) {
        const int slot = i % 2;
        mbarrier_wait(&shared.own_full[slot], i / 2 % 2);
        const int index = shared.items[slot];
        if (index >= items.count()) break;
        const auto item = items.at(index);
        const int first = item.block * Tiles::warpgroups, own_tile = first + w;
        for (int t = first; t < min(own_tile, items.tiles); t++, n++)
            Pipeline::wait_tile(shared, n), Pipeline::release_tile(shared, n);
        if (own_tile >= items.tiles) {
            if (threadIdx.x % 128 == 0) mbarrier_arrive(&shared.own_empty[slot]);
            continue;
        }
        real *k_tile = shared.own_tiles[slot][w][0], *v_tile = shared.own_tiles[slot][w][1];
        const int row = threadIdx.x % 128 / 32 * 16 + lane / 4;
        typename Pipeline::Own k, v;
        k.load(k_tile);
        v.load(v_tile);

        float s[32], dp[32], dk[Tiles::HD / 2], dv[Tiles::HD / 2];
        uint32_t p[4][4], ds[4][4];
        UNROLL
        for (int e = 0; e < Tiles::HD / 2; e++) dk[e] = dv[e] = 0.0f;

        auto scores = [&](unsigned n) {
            k.product(s, shared.passing[n % Tiles::stages][0]);
            wgmma_commit();
            v.product(dp, shared.passing[n % Tiles::stages][1]);
            wgmma_commit();
        };
        auto sums = [&](unsigned n) {
            Pipeline::add_product(dv, p, shared.passing[n % Tiles::stages][1]);
            Pipeline::add_product(dk, ds, shared.passing[n % Tiles::stages][0]);
            wgmma_commit();
        };
        auto weights = [&](unsigned n, auto diagonal, auto wait_s, auto wait_dp) {
            wait_s();
            wgmma_keep(s);
            const float2* row_lse = reinterpret_cast<const float2*>(shared.terms[n % Tiles::stages][0]) + lane % 4;
            const float2* row_delta = reinterpret_cast<const float2*>(shared.terms[n % Tiles::stages][1]) + lane % 4;
            UNROLL
            for (int j = 0; j < 8; j++) {
                const float2 lse = row_lse[4 * j];
                UNROLL
                for (int e = 4 * j; e < 4 * j + 4; e++) {
                    s[e] = fast_exp2(s[e] * scale_log2 - (e % 2 ? lse.y : lse.x));
                    if (diagonal && j * 8 + lane % 4 * 2 + e % 2 < row + e / 2 % 2 * 8) s[e] = 0.0f;
                }
            }
            wgmma_keep(s);
            wait_dp();
            wgmma_keep(dp);
            UNROLL
            for (int j = 0; j < 8; j++) {
                const float2 delta = row_delta[4 * j];
                UNROLL
                for (int e = 4 * j; e < 4 * j + 4; e++) dp[e] = s[e] * (dp[e] - (e % 2 ? delta.y : delta.x));
            }
            wgmma_keep(dp);
        };

        Pipeline::wait_tile(shared, n);
        wgmma_begin();
        scores(n);
        weights(n, true, wgmma_wait<1>, wgmma_wait<0>);
        Pipeline::pack(p, s);
        Pipeline::pack(ds, dp);
        if (Tiles::ahead && own_tile + 1 < items.tiles) Pipeline::wait_tile(shared, n + 1);
        for (int t = own_tile + 1; t < items.tiles; t++, n++) {
            if constexpr (Tiles::ahead) {
                wgmma_begin();
                scores(n + 1);
                sums(n);
                weights(n + 1, false, wgmma_wait<2>, [&] {
                    if (t + 1 < items.tiles) Pipeline::wait_tile(shared, n + 2);
                    wgmma_wait<1>();
                });
                wgmma_wait<0>();
            } else {
                wgmma_begin();
                sums(n);
                wgmma_wait<0>();
                Pipeline::wait_tile(shared, n + 1);
                wgmma_begin();
                scores(n + 1);
                weights(n + 1, false, wgmma_wait<1>, wgmma_wait<0>);
            }
            wgmma_keep(dk);
            wgmma_keep(dv);
            Pipeline::release_tile(shared, n);
            Pipeline::pack(p, s);
            Pipeline::pack(ds, dp);
        }
        wgmma_begin();
        sums(n);
        wgmma_wait<0>();
        wgmma_keep(dk);
        wgmma_keep(dv);
        Pipeline::release_tile(shared, n);
        n++;
        Pipeline::store({&dqkv, C}, item.b, item.h, own_tile * 64, dk, scale, scale, k_tile);
        Pipeline::store({&dqkv, 2 * C}, item.b, item.h, own_tile * 64, dv, 1.0f, 1.0f, v_tile);
        if (threadIdx.x % 128 == 0) {
            tma_store_wait_read();
            mbarrier_arrive(&shared.own_empty[slot]);
        }
    }
#endif
}

// ---------------------------------------------------------------------------------------------------------------------

static __device__ unsigned hopper_next_item[3];

template <class Tiles>
HopperItems hopper_items(int B, int T, int H, bool queries, int kernel) {
    static unsigned* const next = [] {
        void* address;
        CUDA_CHECK(cudaGetSymbolAddress(&address, hopper_next_item));
        return static_cast<unsigned*>(address);
    }();
    HopperItems items;
    items.H = H, items.heads = B * H;
    items.tiles = ceil_div(T, Tiles::rows), items.blocks = ceil_div(items.tiles, Tiles::warpgroups);
    items.group = 33, items.queries = queries, items.next = next + kernel;
    return items;
}
inline int multiprocessors() {
    static const int count = [] {
        int device, n;
        CUDA_CHECK(cudaGetDevice(&device));
        CUDA_CHECK(cudaDeviceGetAttribute(&n, cudaDevAttrMultiProcessorCount, device));
        return n;
    }();
    return count;
}
inline CUtensorMap head_map(const real* data, int B, int T, int columns) {
    return tensor_map(data, false, columns, T, B, columns, size_t(T) * columns, 64);
}

template <class Tiles>
void launch_hopper_forward(real* out, float* lse, const real* qkv, int B, int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(B, T, H, true, 0);
    const int blocks = std::min(multiprocessors(), items.heads * items.blocks);
    LAUNCH(hopper_forward_kernel<Tiles>, blocks, Tiles::threads, sizeof(typename Tiles::Shared),
           head_map(qkv, B, T, 3 * C), head_map(out, B, T, C), lse, items, T, C, 1.0f / std::sqrt(float(Tiles::HD)));
}
template <class Tiles>
void launch_hopper_dq(real* dqkv, float* delta, const real* dout, const real* qkv, const real* out, const float* lse,
                      int B, int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(B, T, H, true, 1);
    const int blocks = std::min(multiprocessors(), items.heads * items.blocks);
    LAUNCH(hopper_dq_kernel<Tiles>, blocks, Tiles::threads, sizeof(typename Tiles::Shared), head_map(qkv, B, T, 3 * C),
           head_map(dout, B, T, C), head_map(dqkv, B, T, 3 * C), delta, out, lse, items, T, C,
           1.0f / std::sqrt(float(Tiles::HD)));
}
template <class Tiles>
void launch_hopper_dkv(real* dqkv, const float* delta, const real* dout, const real* qkv, const float* lse, int B,
                       int T, int C, int H) {
    const HopperItems items = hopper_items<Tiles>(B, T, H, false, 2);
    const int blocks = std::min(multiprocessors(), items.heads * items.blocks);
    LAUNCH(hopper_dkv_kernel<Tiles>, blocks, Tiles::threads, sizeof(typename Tiles::Shared), head_map(qkv, B, T, 3 * C),
           head_map(dout, B, T, C), head_map(dqkv, B, T, 3 * C), delta, lse, items, T, C,
           1.0f / std::sqrt(float(Tiles::HD)));
}

template <int HD>
void hopper_forward(real* out, float* lse, const real* qkv, int B, int T, int C, int H) {
    using Tiles =
        std::conditional_t<HD == 64, HopperTiles<64, 4, 1, 8, false, true>, HopperTiles<128, 3, 1, 4, false, true>>;
    launch_hopper_forward<Tiles>(out, lse, qkv, B, T, C, H);
}
template <int HD>
void hopper_backward(real* dqkv, float* delta, const real* dout, const real* qkv, const real* out, const float* lse,
                     int B, int T, int C, int H) {
    using Queries =
        std::conditional_t<HD == 64, HopperTiles<64, 3, 2, 4, false, true>, HopperTiles<128, 2, 2, 3, false, true>>;
    using Keys =
        std::conditional_t<HD == 64, HopperTiles<64, 2, 2, 4, true, true>, HopperTiles<128, 2, 2, 3, false, false>>;
    launch_hopper_dq<Queries>(dqkv, delta, dout, qkv, out, lse, B, T, C, H);
    launch_hopper_dkv<Keys>(dqkv, delta, dout, qkv, lse, B, T, C, H);
}
