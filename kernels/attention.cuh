// attention.cuh: causal self-attention on the GPU, forward and backward, without a (T, T) matrix in memory.
//
// For each head, with Q, K, V of shape (T, hd) and scale = 1/sqrt(hd):
//     S = scale * Q K^T  (T, T), row t sees columns 0..t      P = softmax of the rows of S      O = P V  (T, hd)
// Nothing is kept but O and one number per row, lse[t] = log(sum over s <= t of exp(S[t,s])). This is FlashAttention
// (Dao et al., arXiv 2205.14135) with the loops of FlashAttention-2 (Dao, arXiv 2307.08691). What makes it work:
//
// Online softmax. A row of S is met some columns at a time. m is the largest score so far, l the sum of exp(S - m), and
// o the sum of exp(S - m) V. When new columns raise m to m', l and o are multiplied by exp(m - m'), and the sums go on.
// At the end O = o / l and lse = m + log(l).
//
// Recomputation. The backward computes P = exp(S - lse) anew from Q and K, which is cheaper than reading (T, T):
//     dV = P^T dO     dP = dO V^T     dS = P * (dP - delta)     dQ = scale * dS K     dK = scale * dS^T Q
// where delta[t] = sum over s of P[t,s] dP[t,s], the share of the softmax's denominator, equals dO[t] . O[t]. dQ sums
// over keys, dK and dV over queries, so there is one kernel for each direction. Both compute S and dP (7 products
// instead of 5), and in return no sum is shared between blocks: no atomics, the same bits in every run.
//
// All three kernels have one shape. A warp owns 16 rows and keeps what belongs to them in registers: its rows of the
// inputs, as the left operand of mma.sync, and its sums, as results. Tiles of 64 rows of the other side pass by in
// shared memory, double-buffered with cp.async, and serve all warps of the block as the right operand:
//                              own rows (16 a warp)     passing tiles (64)     sums
//     flash_forward_kernel     queries: Q               keys: K, V             m, l, O
//     flash_dq_kernel          queries: Q, dO           keys: K, V             dQ, delta
//     flash_dkv_kernel         keys: K, V               queries: Q, dO         dK, dV
// Scores never touch shared memory: the registers in which mma.sync leaves a (16, 16) block of P are those from which
// it takes the left operand of P V (and flash_dkv_kernel computes S^T = K Q^T, so that P^T is a left operand too). What
// lies above the diagonal is skipped, blocks on the diagonal are masked.
//
// In reading order: FlashTiles (how a tile lies in shared memory, how a warp reads it), the three tensor-core kernels
// (bf16, hd of 32, 64 or 128; any GPU from sm_80 on), struct Attention (the launchers). For hd of 64 and 128 Hopper has
// the kernels of attention_hopper.cuh instead. attention_scalar.cuh has scalar twins (float, or any hd up to 256).
#pragma once
#include <cmath>
#include <type_traits>

#include "../common.h"
#include "attention_hopper.cuh"
#include "attention_scalar.cuh"
#include "cuda_common.cuh"
#include "gpt_kernels.cuh"
#include "mma.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Tiles

template <int HD, int WARPS>
struct FlashTiles {
    static constexpr int warps = WARPS, threads = 32 * warps;
    static constexpr int own_rows = 16 * warps;  // of a block
    static constexpr int passing_rows = 64;      // of a tile that passes by
    static constexpr int own_elements = own_rows * HD, passing_elements = passing_rows * HD;

    // A tile is (rows, HD) in shared memory. cp.async writes and ldmatrix reads it in chunks of 8 columns (16 bytes),
    // and ldmatrix takes one chunk of each of 8 consecutive rows at a time. Those must lie in different banks (8 chunks
    // fill the 32 banks), so chunk c of a row is stored at place c ^ key, with keys that differ between such rows.
    __device__ static int place(int row, int chunk) {
        int key = HD == 32 ? row / 2 % 4 : row % 8;  // two rows of HD 32 fill the banks
        return row * HD + (chunk ^ key) * 8;
    }

    // Starts copying rows first..first+rows-1 of a (T, HD) matrix with that row stride; rows past the end become zeros.
    template <int rows>
    __device__ static void load(real* tile, const real* matrix, int stride, int first, int T) {
        constexpr int chunks = HD / 8, rows_at_once = threads / chunks;
        int chunk = threadIdx.x % chunks;
        UNROLL
        for (int i = 0; i < rows / rows_at_once; i++) {
            int row = i * rows_at_once + threadIdx.x / chunks;
            bool valid = first + row < T;
            const real* from = matrix + (valid ? (first + row) * stride : 0) + chunk * 8;
            cp_async_16(tile + place(row, chunk), from, valid);
        }
    }
    __device__ static void load_own(real* tile, const real* matrix, int stride, int first, int T) {
        load<own_rows>(tile, matrix, stride, first, T);
    }

    // Two (T, HD) matrices, x and y, that pass by. While tile i is in use, i + 1 is on its way into the other buffers.
    struct Passing {
        real* buffers;  // 2 x {tile of x, tile of y}
        const real *x, *y;
        int x_stride, y_stride, T;

        __device__ real* x_tile(int i) const { return buffers + i % 2 * 2 * passing_elements; }
        __device__ real* y_tile(int i) const { return x_tile(i) + passing_elements; }
        __device__ void load_tile(int i) const {
            load<passing_rows>(x_tile(i), x, x_stride, i * passing_rows, T);
            load<passing_rows>(y_tile(i), y, y_stride, i * passing_rows, T);
            cp_async_commit();
        }
    };

    // Fragments of a tile. Columns 16*k.. are the chunks 2*k and 2*k + 1, and (2*k + half) ^ key = (half ^ key) ^ 2*k,
    // so what depends on the lane is the same for all k.
    // As the left operand of mma: the (16, 16) block of rows row.. and columns 16*k..
    __device__ static void left(uint32_t fragment[4], const real* tile, int row, int k) {
        int lane = threadIdx.x % 32;
        ldmatrix_x4(fragment, tile + row * HD + (place(lane % 16, lane / 16) ^ 16 * k));
    }
    // Right operands for two (16, 8) results side by side, fragment[0..1] and fragment[2..3].
    // Of X * tile^T: result columns are tile rows row.., summed over tile columns 16*k..
    __device__ static void right_transposed(uint32_t fragment[4], const real* tile, int row, int k) {
        int lane = threadIdx.x % 32;
        ldmatrix_x4(fragment, tile + row * HD + (place(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ 16 * k));
    }
    // Of X * tile: result columns are tile columns 16*n.., summed over tile rows row..
    __device__ static void right(uint32_t fragment[4], const real* tile, int row, int n) {
        int lane = threadIdx.x % 32;
        ldmatrix_x4_trans(fragment, tile + row * HD + (place(lane % 16, lane / 16) ^ 16 * n));
    }

    // result (16, 8*blocks) += own (16, HD) * tile[row.. row + 8*blocks]^T
    template <int blocks>
    __device__ static void product_transposed(float (&result)[blocks][4], const uint32_t (&own)[HD / 16][4],
                                              const real* tile, int row) {
        UNROLL
        for (int k = 0; k < HD / 16; k++) {
            UNROLL
            for (int n = 0; n < blocks; n += 2) {
                uint32_t b[4];
                right_transposed(b, tile, row + 8 * n, k);
                mma_m16n8k16<real>(result[n], own[k], b);
                mma_m16n8k16<real>(result[n + 1], own[k], b + 2);
            }
        }
    }
    // sum (16, HD) += weights (16, 8*blocks) * tile[row.. row + 8*blocks], with weights laid out as such a result
    template <int blocks>
    __device__ static void add_product(float (&sum)[HD / 8][4], const float (&weights)[blocks][4], const real* tile,
                                       int row) {
        UNROLL
        for (int k = 0; k < blocks; k += 2) {
            const float *w0 = weights[k], *w1 = weights[k + 1];
            const uint32_t a[4] = {pack_pair<real>(w0[0], w0[1]), pack_pair<real>(w0[2], w0[3]),
                                   pack_pair<real>(w1[0], w1[1]), pack_pair<real>(w1[2], w1[3])};
            UNROLL
            for (int n = 0; n < HD / 16; n++) {
                uint32_t b[4];
                right(b, tile, row + 8 * k, n);
                mma_m16n8k16<real>(sum[2 * n], a, b);
                mma_m16n8k16<real>(sum[2 * n + 1], a, b + 2);
            }
        }
    }

    // Writes a warp's sums (16, HD), the lane's two rows times factor0 and factor1, to rows first.. of a (T, HD)
    // matrix. They go through the warp's own 16 rows of shared memory (`staging`), to leave in pieces of 16 bytes.
    __device__ static void store(real* matrix, int stride, int first, int T, const float (&sum)[HD / 8][4],
                                 float factor0, float factor1, real* staging) {
        int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
        auto stage = [&](int row, int n, float low, float high) {
            *reinterpret_cast<uint32_t*>(staging + place(row, n) + 2 * t) = pack_pair<real>(low, high);
        };
        __syncwarp();
        UNROLL
        for (int n = 0; n < HD / 8; n++) {
            stage(g, n, sum[n][0] * factor0, sum[n][1] * factor0);
            stage(g + 8, n, sum[n][2] * factor1, sum[n][3] * factor1);
        }
        __syncwarp();
        constexpr int chunks = HD / 8, rows_at_once = 32 / chunks;
        UNROLL
        for (int i = 0; i < 16 / rows_at_once; i++) {
            int row = i * rows_at_once + lane / chunks, chunk = lane % chunks;
            if (first + row >= T) break;
            Pack<real>::load(staging + place(row, chunk)).store(matrix + (first + row) * stride + chunk * 8);
        }
    }
};

// How many warps a block has, and how many blocks an SM: what the registers allow (65536 of an SM, 255 of a thread).
template <int HD>
using QueryTiles = FlashTiles<HD, HD <= 64 ? 8 : 4>;
constexpr int kQueryBlocks = 2;  // 128 registers a thread; 255 for HD 128
template <int HD>
using KeyTiles = FlashTiles<HD, 4>;
template <int HD>
constexpr int kKeyBlocks = HD <= 64 ? 3 : 2;  // 168 registers; two sums need more

// ---------------------------------------------------------------------------------------------------------------------
// Forward. out (B,T,C), lse (B,H,T), qkv (B,T,3C). Grid (blocks of own_rows queries, H, B).

template <int HD>
__global__ void __launch_bounds__(QueryTiles<HD>::threads, kQueryBlocks)
    flash_forward_kernel(real* out, float* lse, const real* qkv, int T, int C, float scale) {
    using Tiles = QueryTiles<HD>;
    DYNAMIC_SHARED(real, q_tile);  // (own_rows, HD)

    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y;
    const int first = (gridDim.x - 1 - blockIdx.x) * Tiles::own_rows;  // the last queries, with most keys, start first
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_first = first + 16 * warp;
    const int row0 = warp_first + lane / 4;  // this lane's rows are row0 and row0 + 8
    const real* q = qkv + size_t(b) * T * 3 * C + h * HD;
    const real *k = q + C, *v = q + 2 * C;  // (T, HD), row stride 3C, as q

    const int last = min(first + Tiles::own_rows, T) - 1;
    const int tiles = last / Tiles::passing_rows + 1;
    const typename Tiles::Passing keys{q_tile + Tiles::own_elements, k, v, 3 * C, 3 * C, T};

    Tiles::load_own(q_tile, q, 3 * C, first, T);
    keys.load_tile(0);
    cp_async_wait<0>();
    __syncthreads();
    uint32_t own_q[HD / 16][4];
    UNROLL
    for (int i = 0; i < HD / 16; i++) Tiles::left(own_q[i], q_tile, 16 * warp, i);

    float o[HD / 8][4] = {};
    float m[2] = {-INFINITY, -INFINITY}, l[2] = {0.0f, 0.0f};  // of this lane's two rows; l of this lane's columns only
    const float scale_log2 = scale * kLog2e;

    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) keys.load_tile(tile + 1);
        const int key = tile * Tiles::passing_rows;
        if (key <= warp_first) {  // else these keys are later than the warp's queries
            constexpr int blocks = Tiles::passing_rows / 8;
            float s[blocks][4] = {};
            Tiles::product_transposed(s, own_q, keys.x_tile(tile), 0);
            if (key + Tiles::passing_rows > warp_first) {  // on the diagonal
                UNROLL
                for (int n = 0; n < blocks; n++) UNROLL
                for (int e = 0; e < 4; e++)
                    if (key + 8 * n + lane % 4 * 2 + e % 2 > row0 + e / 2 * 8) s[n][e] = -INFINITY;
            }
            // The first tile has key 0, which every query sees, so m is finite from then on.
            UNROLL
            for (int r = 0; r < 2; r++) {
                float m_new = m[r];
                UNROLL
                for (int n = 0; n < blocks; n++) m_new = fmaxf(m_new, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
                m_new = row_max(m_new);
                const float correction = fast_exp2((m[r] - m_new) * scale_log2);
                const float shift = m_new * scale_log2;
                m[r] = m_new;
                l[r] *= correction;
                UNROLL
                for (int n = 0; n < blocks; n++) UNROLL
                for (int e = 2 * r; e < 2 * r + 2; e++) {
                    s[n][e] = fast_exp2(s[n][e] * scale_log2 - shift);  // from here on s is P, up to exp(m - lse)
                    l[r] += s[n][e];
                }
                UNROLL
                for (int n = 0; n < HD / 8; n++) o[n][2 * r] *= correction, o[n][2 * r + 1] *= correction;
            }
            Tiles::add_product(o, s, keys.y_tile(tile), 0);
        }
        cp_async_wait<0>();
        __syncthreads();  // the next tile is there, and nobody reads this one any more
    }

    l[0] = row_sum(l[0]);
    l[1] = row_sum(l[1]);
    real* out_head = out + size_t(b) * T * C + h * HD;  // (T, HD), row stride C
    Tiles::store(out_head, C, warp_first, T, o, 1.0f / l[0], 1.0f / l[1], q_tile + 16 * warp * HD);
    for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r;
        if (lane % 4 == 0 && row < T) lse[(size_t(b) * H + h) * T + row] = m[r] * scale + logf(l[r]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Backward. There is no softmax to finish before scores can be used, so they are made and used in chunks of 16 columns,
// which take few registers. 16 is also a warp's number of rows: one chunk lies on the diagonal.
constexpr int kChunk = 16;

// dQ and delta. dqkv (B,T,3C), delta (B,H,T), dout and out (B,T,C), lse (B,H,T). Grid as forward.
template <int HD>
__global__ void __launch_bounds__(QueryTiles<HD>::threads, kQueryBlocks)
    flash_dq_kernel(real* dqkv, float* delta, const real* dout, const real* qkv, const real* out, const float* lse,
                    int T, int C, float scale) {
    using Tiles = QueryTiles<HD>;
    DYNAMIC_SHARED(real, q_tile);                    // (own_rows, HD)
    real* dout_tile = q_tile + Tiles::own_elements;  // (own_rows, HD)

    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y;
    const int first = (gridDim.x - 1 - blockIdx.x) * Tiles::own_rows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_first = first + 16 * warp;
    const int row0 = warp_first + lane / 4;
    const size_t head = size_t(b) * T * 3 * C + h * HD, out_head = size_t(b) * T * C + h * HD;
    const real *q = qkv + head, *k = q + C, *v = q + 2 * C;  // (T, HD), row stride 3C
    lse += (size_t(b) * H + h) * T;
    delta += (size_t(b) * H + h) * T;

    const int last = min(first + Tiles::own_rows, T) - 1;
    const int tiles = last / Tiles::passing_rows + 1;
    const typename Tiles::Passing keys{dout_tile + Tiles::own_elements, k, v, 3 * C, 3 * C, T};

    Tiles::load_own(q_tile, q, 3 * C, first, T);
    Tiles::load_own(dout_tile, dout + out_head, C, first, T);
    keys.load_tile(0);

    float row_lse[2], row_delta[2] = {0.0f, 0.0f};  // of this lane's two rows; lse in units of log2
    for (int r = 0; r < 2; r++) row_lse[r] = row0 + 8 * r < T ? lse[row0 + 8 * r] * kLog2e : 0.0f;

    cp_async_wait<0>();
    __syncthreads();
    uint32_t own_q[HD / 16][4], own_dout[HD / 16][4];
    UNROLL
    for (int i = 0; i < HD / 16; i++) {
        Tiles::left(own_q[i], q_tile, 16 * warp, i);
        Tiles::left(own_dout[i], dout_tile, 16 * warp, i);
    }

    // delta = dO . O. Of the four lanes that share a row, lane t takes the chunks t, t + 4, ..
    UNROLL
    for (int r = 0; r < 2; r++) {
        const int row = row0 + 8 * r;
        if (row < T) {
            for (int chunk = lane % 4; chunk < HD / 8; chunk += 4) {
                Pack<real> x = Pack<real>::load(dout_tile + Tiles::place(row - first, chunk));
                Pack<real> y = Pack<real>::load(out + out_head + size_t(row) * C + chunk * 8);
                for (int i = 0; i < 8; i++) row_delta[r] += to_float(x[i]) * to_float(y[i]);
            }
        }
        row_delta[r] = row_sum(row_delta[r]);
        if (lane % 4 == 0 && row < T) delta[row] = row_delta[r];
    }

    float dq[HD / 8][4] = {};
    const float scale_log2 = scale * kLog2e;
    for (int tile = 0; tile < tiles; tile++) {
        if (tile + 1 < tiles) keys.load_tile(tile + 1);
        UNROLL
        for (int chunk = 0; chunk < Tiles::passing_rows; chunk += kChunk) {
            const int key = tile * Tiles::passing_rows + chunk;
            if (key > warp_first) break;  // later than the warp's queries
            float s[kChunk / 8][4] = {}, dp[kChunk / 8][4] = {};
            Tiles::product_transposed(s, own_q, keys.x_tile(tile), chunk);
            Tiles::product_transposed(dp, own_dout, keys.y_tile(tile), chunk);
            if (key == warp_first) {  // on the diagonal
                UNROLL
                for (int n = 0; n < kChunk / 8; n++) UNROLL
                for (int e = 0; e < 4; e++)
                    if (8 * n + lane % 4 * 2 + e % 2 > lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
            }
            UNROLL
            for (int n = 0; n < kChunk / 8; n++) UNROLL
            for (int e = 0; e < 4; e++) {
                const float p = fast_exp2(s[n][e] * scale_log2 - row_lse[e / 2]);
                s[n][e] = p * (dp[n][e] - row_delta[e / 2]);  // dS
            }
            Tiles::add_product(dq, s, keys.x_tile(tile), chunk);
        }
        cp_async_wait<0>();
        __syncthreads();
    }
    Tiles::store(dqkv + head, 3 * C, warp_first, T, dq, scale, scale, q_tile + 16 * warp * HD);
}

// dK and dV, with delta from flash_dq_kernel. Grid (blocks of own_rows keys, H, B): the first keys, which most queries
// see, start first. Everything is transposed: rows are keys, columns are queries.
template <int HD>
__global__ void __launch_bounds__(KeyTiles<HD>::threads, kKeyBlocks<HD>)
    flash_dkv_kernel(real* dqkv, const float* delta, const real* dout, const real* qkv, const float* lse, int T, int C,
                     float scale) {
    using Tiles = KeyTiles<HD>;
    DYNAMIC_SHARED(real, k_tile);                             // (own_rows, HD)
    real* v_tile = k_tile + Tiles::own_elements;              // (own_rows, HD)
    __shared__ float2 passing_terms[2][Tiles::passing_rows];  // lse (in units of log2) and delta of the queries

    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y;
    const int first = blockIdx.x * Tiles::own_rows;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warp_first = first + 16 * warp;
    const size_t head = size_t(b) * T * 3 * C + h * HD;
    const real *q = qkv + head, *k = q + C, *v = q + 2 * C;  // (T, HD), row stride 3C
    dout += size_t(b) * T * C + h * HD;                      // (T, HD), row stride C
    lse += (size_t(b) * H + h) * T;
    delta += (size_t(b) * H + h) * T;

    const typename Tiles::Passing queries{v_tile + Tiles::own_elements, q, dout, 3 * C, C, T};
    // lse and delta of a tile's queries, one query a thread. Past the end 0 will do: P is 1, but dO and dS are 0.
    auto load_terms = [&](int tile) {
        const int row = threadIdx.x, query = tile * Tiles::passing_rows + row;
        if (row >= Tiles::passing_rows || query >= T) return make_float2(0.0f, 0.0f);
        return make_float2(lse[query] * kLog2e, delta[query]);
    };
    auto store_terms = [&](int tile, float2 terms) {
        if (threadIdx.x < Tiles::passing_rows) passing_terms[tile % 2][threadIdx.x] = terms;
    };

    const int first_tile = first / Tiles::passing_rows, tiles = (T - 1) / Tiles::passing_rows + 1;
    Tiles::load_own(k_tile, k, 3 * C, first, T);
    Tiles::load_own(v_tile, v, 3 * C, first, T);
    queries.load_tile(first_tile);
    store_terms(first_tile, load_terms(first_tile));
    cp_async_wait<0>();
    __syncthreads();
    uint32_t own_k[HD / 16][4], own_v[HD / 16][4];
    UNROLL
    for (int i = 0; i < HD / 16; i++) {
        Tiles::left(own_k[i], k_tile, 16 * warp, i);
        Tiles::left(own_v[i], v_tile, 16 * warp, i);
    }

    float dk[HD / 8][4] = {}, dv[HD / 8][4] = {};
    const float scale_log2 = scale * kLog2e;
    for (int tile = first_tile; tile < tiles; tile++) {
        float2 next_terms = {};
        if (tile + 1 < tiles) {
            queries.load_tile(tile + 1);
            next_terms = load_terms(tile + 1);  // under way in a register while this tile is computed
        }
        UNROLL
        for (int chunk = 0; chunk < Tiles::passing_rows; chunk += kChunk) {
            const int query = tile * Tiles::passing_rows + chunk;
            if (query < warp_first) continue;  // earlier than the warp's keys
            float s[kChunk / 8][4] = {}, dp[kChunk / 8][4] = {};
            Tiles::product_transposed(s, own_k, queries.x_tile(tile), chunk);
            Tiles::product_transposed(dp, own_v, queries.y_tile(tile), chunk);
            if (query == warp_first) {  // on the diagonal
                UNROLL
                for (int n = 0; n < kChunk / 8; n++) UNROLL
                for (int e = 0; e < 4; e++)
                    if (8 * n + lane % 4 * 2 + e % 2 < lane / 4 + e / 2 * 8) s[n][e] = -INFINITY;
            }
            UNROLL
            for (int n = 0; n < kChunk / 8; n++) UNROLL
            for (int e = 0; e < 4; e++) {
                const float2 terms = passing_terms[tile % 2][chunk + 8 * n + lane % 4 * 2 + e % 2];
                s[n][e] = fast_exp2(s[n][e] * scale_log2 - terms.x);  // P
                dp[n][e] = s[n][e] * (dp[n][e] - terms.y);            // dS
            }
            Tiles::add_product(dv, s, queries.y_tile(tile), chunk);
            Tiles::add_product(dk, dp, queries.x_tile(tile), chunk);
        }
        if (tile + 1 < tiles) store_terms(tile + 1, next_terms);
        cp_async_wait<0>();
        __syncthreads();
    }
    const size_t own = 16 * warp * HD;
    Tiles::store(dqkv + head + C, 3 * C, warp_first, T, dk, scale, scale, k_tile + own);
    Tiles::store(dqkv + head + 2 * C, 3 * C, warp_first, T, dv, 1.0f, 1.0f, v_tile + own);
}

// ---------------------------------------------------------------------------------------------------------------------

struct Attention {
    // Whether heads of this size are for the kernels of attention_hopper.cuh on this GPU.
    static bool on_hopper(int hd) { return sizeof(real) == 2 && (hd == 64 || hd == 128) && hopper_kernels(); }

    static void attention_forward(real* out /*(B,T,C)*/, float* lse /*(B,H,T)*/,
                                  const real* qkv /*(B,T,3C): q|k|v, head h at columns h*hd*/, int B, int T, int C,
                                  int H) {
        check_sizes(B, T, C, H);
        const int hd = C / H;
        const float scale = 1.0f / std::sqrt(float(hd));
        auto flash = [&](auto head_dim) {
            constexpr int HD = decltype(head_dim)::value;
            if constexpr (HD >= 64)
                if (on_hopper(HD)) return hopper_forward<HD>(out, lse, qkv, B, T, C, H);
            using Tiles = QueryTiles<HD>;
            LAUNCH(flash_forward_kernel<HD>, grid<Tiles::own_rows>(B, T, H), Tiles::threads, flash_bytes<Tiles>(1), out,
                   lse, qkv, T, C, scale);
        };
        auto twin = [&](auto columns) {
            constexpr int COLUMNS = decltype(columns)::value;
            LAUNCH(twin_forward_kernel<COLUMNS>, grid<kTwinTile>(B, T, H), kTwinThreads, twin_bytes(hd), out, lse, qkv,
                   T, C, hd, scale);
        };
        dispatch(hd, flash, twin);
    }

    static size_t attention_scratch_floats(int B, int T, int C, int H) {
        return on_hopper(C / H) ? attention_row_sums(B, T, C) : GptKernels::bias_scratch_floats(3 * C);
    }

    // dbias: the rows of dqkv are summed as they are stored, rounded, on Hopper by the kernels that store them
    static void attention_backward(real* dqkv /*(B,T,3C) overwritten*/, float* dbias /*(3C) +=*/,
                                   float* delta /*(B,H,T) scratch*/, const real* dout /*(B,T,C)*/,
                                   const real* qkv /*(B,T,3C)*/, const real* out /*(B,T,C)*/,
                                   const float* lse /*(B,H,T)*/, int B, int T, int C, int H,
                                   float* scratch /*attention_scratch_floats(B, T, C, H)*/) {
        check_sizes(B, T, C, H);
        const int hd = C / H;
        const float scale = 1.0f / std::sqrt(float(hd));
        auto flash = [&](auto head_dim) {
            constexpr int HD = decltype(head_dim)::value;
            if constexpr (HD >= 64)
                if (on_hopper(HD)) return hopper_backward<HD>(dqkv, scratch, delta, dout, qkv, out, lse, B, T, C, H);
            using Queries = QueryTiles<HD>;
            using Keys = KeyTiles<HD>;
            LAUNCH(flash_dq_kernel<HD>, grid<Queries::own_rows>(B, T, H), Queries::threads, flash_bytes<Queries>(2),
                   dqkv, delta, dout, qkv, out, lse, T, C, scale);
            LAUNCH(flash_dkv_kernel<HD>, grid<Keys::own_rows>(B, T, H), Keys::threads, flash_bytes<Keys>(2), dqkv,
                   delta, dout, qkv, lse, T, C, scale);
        };
        auto twin = [&](auto columns) {
            constexpr int COLUMNS = decltype(columns)::value;
            LAUNCH(twin_dq_kernel<COLUMNS>, grid<kTwinTile>(B, T, H), kTwinThreads, twin_bytes(hd), dqkv, delta, dout,
                   qkv, out, lse, T, C, hd, scale);
            LAUNCH(twin_dkv_kernel<COLUMNS>, grid<kTwinTile>(B, T, H), kTwinThreads, twin_bytes(hd), dqkv, delta, dout,
                   qkv, lse, T, C, hd, scale);
        };
        dispatch(hd, flash, twin);
        if (on_hopper(hd)) GptKernels::add_partials(dbias, scratch, B * ceil_div(T, kAttentionTile), 3 * C);
        else GptKernels::bias_backward(dbias, dqkv, B * T, 3 * C, scratch);
    }

    static void attention_last_row(real* out /*(C)*/, const real* qkv /*(T,3C)*/, int T, int C, int H) {
        check_sizes(1, T, C, H);
        const int hd = C / H;
        with_columns(hd, [&](auto columns) {
            LAUNCH(last_row_kernel<decltype(columns)::value>, H, kLastRowWarps * kWarpSize,
                   kLastRowWarps * hd * sizeof(float), out, qkv, T, C, hd, 1.0f / std::sqrt(float(hd)));
        });
    }

  private:
    template <int n>
    using Constant = std::integral_constant<int, n>;

    // Kernels take offsets within a sequence as int; a grid is (blocks of rows, H, B).
    static void check_sizes(int B, int T, int C, int H) {
        if (C % H != 0 || C / H > kMaxHeadSize)
            fail("attention: %d channels in %d heads: choose --heads that divide them, into at most %d each", C, H,
                 kMaxHeadSize);
        if (size_t(T) * 3 * C > INT32_MAX)
            fail("attention: T = %d times 3 * %d channels is 2^31 or more: use a shorter --seq_len", T, C);
        if (B > 65535) fail("attention: %d sequences at once, at most 65535 fit a launch: use a smaller --batch", B);
    }

    // Calls one of the two with its template argument: the head dimension, or the columns of a head per lane.
    template <class Flash, class Twin>
    static void dispatch(int hd, Flash flash, Twin twin) {
        if constexpr (std::is_same<real, __nv_bfloat16>::value) {
            if (hd == 32) return flash(Constant<32>());
            if (hd == 64) return flash(Constant<64>());
            if (hd == 128) return flash(Constant<128>());
        }
        with_columns(hd, twin);
    }
    template <class F>
    static void with_columns(int hd, F f) {
        if (hd <= 32) f(Constant<1>());
        else if (hd <= 64) f(Constant<2>());
        else if (hd <= 128) f(Constant<4>());
        else f(Constant<8>());
    }
    template <int rows>
    static dim3 grid(int B, int T, int H) {
        return dim3(ceil_div(T, rows), H, B);
    }
    // Dynamic shared memory: `own` matrices of own rows, and two pairs of passing tiles.
    template <class Tiles>
    static size_t flash_bytes(int own) {
        return (own * Tiles::own_elements + 4 * Tiles::passing_elements) * sizeof(real);
    }
    static size_t twin_bytes(int hd) {
        return (2 * kTwinTile * twin_stride(hd) + kTwinWarps * kTwinWeights) * sizeof(float);
    }
};
