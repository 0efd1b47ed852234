// attention_scalar.cuh: causal self-attention without tensor cores: float arithmetic, `real` of either kind, heads of
// any hd up to 256. It serves the exact fp32 build and the head sizes that the tensor-core kernels of attention.cuh do
// not know. The mathematics and the three kernels (forward, dQ, dK and dV) are explained there. Last comes the kernel
// of one query, for generation, in either build.
//
// The division of labour is that of attention.cuh with lanes in place of fragments: a warp owns 4 rows, tiles of 32
// rows pass by. For products with tile^T (scores) a lane takes one row of the tile; for sums over the tile's rows it
// takes the columns lane, lane + 32, .. (COLUMNS of them). In between, the weights change hands through shared memory.
#pragma once
#include "../common.h"
#include "cuda_common.cuh"

constexpr int kTwinWarps = 8;
constexpr int kTwinThreads = kWarpSize * kTwinWarps;
constexpr int kTwinRows = 4;                         // of a warp
constexpr int kTwinTile = kTwinWarps * kTwinRows;    // rows of a block, and of a passing tile
constexpr int kTwinWeights = kTwinTile * kTwinRows;  // of a warp: (row of the tile, row of the warp)
static_assert(kTwinTile == kWarpSize, "a lane for each row of a tile");

// Rows of a tile are an odd number of floats apart, so that 32 rows at the same column are in 32 banks.
constexpr __host__ __device__ int twin_stride(int hd) { return hd | 1; }

// Rows first..first+31 of a (T, hd) matrix with row stride `stride`; zeros past the end.
__device__ inline void twin_load(float* tile, const real* matrix, int stride, int first, int T, int hd) {
    for (int i = threadIdx.x; i < kTwinTile * hd; i += kTwinThreads) {
        const int row = i / hd, column = i % hd;
        const bool valid = first + row < T;
        tile[row * twin_stride(hd) + column] = valid ? to_float(matrix[(first + row) * stride + column]) : 0.0f;
    }
}

// A warp's 4 rows of a (T, hd) matrix. Past the end they are the last row again, computed and not stored.
struct TwinRows {
    const real* row[kTwinRows];
    __device__ TwinRows(const real* matrix, int stride, int first, int T) {
        for (int r = 0; r < kTwinRows; r++) row[r] = matrix + min(first + r, T - 1) * stride;
    }
    // dots[r] = row r . tile row `lane`
    __device__ void dot(float (&dots)[kTwinRows], const float* tile, int hd) const {
        const float* tile_row = tile + threadIdx.x % kWarpSize * twin_stride(hd);
        for (int r = 0; r < kTwinRows; r++) dots[r] = 0.0f;
        for (int d = 0; d < hd; d++)
            for (int r = 0; r < kTwinRows; r++) dots[r] += to_float(row[r][d]) * tile_row[d];
    }
};

// sum[r] += sum over rows j of the tile of weights[j][r] * tile[j]
template <int COLUMNS>
__device__ void twin_add(float (&sum)[kTwinRows][COLUMNS], const float* weights, const float* tile, int hd) {
    for (int j = 0; j < kTwinTile; j++) {
        UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            const int column = threadIdx.x % kWarpSize + kWarpSize * c;
            const float x = tile[j * twin_stride(hd) + min(column, hd - 1)];  // columns past the end are not stored
            UNROLL
            for (int r = 0; r < kTwinRows; r++) sum[r][c] += weights[j * kTwinRows + r] * x;
        }
    }
}
template <int COLUMNS>
__device__ void twin_store(real* matrix, int stride, int first, int T, int hd, const float (&sum)[kTwinRows][COLUMNS]) {
    UNROLL
    for (int r = 0; r < kTwinRows; r++) UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        const int column = threadIdx.x % kWarpSize + kWarpSize * c;
        if (first + r < T && column < hd) matrix[(first + r) * stride + column] = from_float<real>(sum[r][c]);
    }
}

// Shapes and grids are those of the tensor-core kernels, with blocks of kTwinTile rows.
template <int COLUMNS>
__global__ void twin_forward_kernel(real* out, float* lse, const real* qkv, int T, int C, int hd, float scale) {
    DYNAMIC_SHARED(float, k_tile);                         // (kTwinTile, hd)
    float* v_tile = k_tile + kTwinTile * twin_stride(hd);  // (kTwinTile, hd)
    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y, first = (gridDim.x - 1 - blockIdx.x) * kTwinTile;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row0 = first + kTwinRows * warp;
    float* weights = v_tile + kTwinTile * twin_stride(hd) + warp * kTwinWeights;
    const real* q = qkv + size_t(b) * T * 3 * C + h * hd;
    const real *k = q + C, *v = q + 2 * C;
    const TwinRows own_q(q, 3 * C, row0, T);

    float o[kTwinRows][COLUMNS] = {}, m[kTwinRows], l[kTwinRows] = {};
    for (float& x : m) x = -INFINITY;
    for (int key = 0; key <= first; key += kTwinTile) {
        __syncthreads();
        twin_load(k_tile, k, 3 * C, key, T, hd);
        twin_load(v_tile, v, 3 * C, key, T, hd);
        __syncthreads();
        float s[kTwinRows];
        own_q.dot(s, k_tile, hd);
        UNROLL
        for (int r = 0; r < kTwinRows; r++) {
            s[r] = key + lane <= row0 + r ? s[r] * scale : -INFINITY;
            const float m_new = fmaxf(m[r], warp_max(s[r])), correction = expf(m[r] - m_new), p = expf(s[r] - m_new);
            m[r] = m_new;
            l[r] = l[r] * correction + warp_sum(p);
            for (float& x : o[r]) x *= correction;
            weights[lane * kTwinRows + r] = p;
        }
        __syncwarp();
        twin_add(o, weights, v_tile, hd);
        __syncwarp();
    }
    UNROLL
    for (int r = 0; r < kTwinRows; r++) {
        for (float& x : o[r]) x /= l[r];
        if (lane == 0 && row0 + r < T) lse[(size_t(b) * H + h) * T + row0 + r] = m[r] + logf(l[r]);
    }
    twin_store(out + size_t(b) * T * C + h * hd, C, row0, T, hd, o);
}

template <int COLUMNS>
__global__ void twin_dq_kernel(real* dqkv, float* delta, const real* dout, const real* qkv, const real* out,
                               const float* lse, int T, int C, int hd, float scale) {
    DYNAMIC_SHARED(float, k_tile);                         // (kTwinTile, hd)
    float* v_tile = k_tile + kTwinTile * twin_stride(hd);  // (kTwinTile, hd)
    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y, first = (gridDim.x - 1 - blockIdx.x) * kTwinTile;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row0 = first + kTwinRows * warp;
    float* weights = v_tile + kTwinTile * twin_stride(hd) + warp * kTwinWeights;
    const size_t head = size_t(b) * T * 3 * C + h * hd, out_head = size_t(b) * T * C + h * hd;
    const real *q = qkv + head, *k = q + C, *v = q + 2 * C;
    const TwinRows own_q(q, 3 * C, row0, T), own_dout(dout + out_head, C, row0, T), own_out(out + out_head, C, row0, T);
    lse += (size_t(b) * H + h) * T;
    delta += (size_t(b) * H + h) * T;

    float row_lse[kTwinRows], row_delta[kTwinRows] = {}, dq[kTwinRows][COLUMNS] = {};
    UNROLL
    for (int r = 0; r < kTwinRows; r++) {
        const real *row_dout = own_dout.row[r], *row_out = own_out.row[r];
        for (int d = lane; d < hd; d += kWarpSize) row_delta[r] += to_float(row_dout[d]) * to_float(row_out[d]);
        row_delta[r] = warp_sum(row_delta[r]);
        row_lse[r] = lse[min(row0 + r, T - 1)];
        if (lane == 0 && row0 + r < T) delta[row0 + r] = row_delta[r];
    }
    for (int key = 0; key <= first; key += kTwinTile) {
        __syncthreads();
        twin_load(k_tile, k, 3 * C, key, T, hd);
        twin_load(v_tile, v, 3 * C, key, T, hd);
        __syncthreads();
        float s[kTwinRows], dp[kTwinRows];
        own_q.dot(s, k_tile, hd);
        own_dout.dot(dp, v_tile, hd);
        UNROLL
        for (int r = 0; r < kTwinRows; r++) {
            const float p = key + lane <= row0 + r ? expf(s[r] * scale - row_lse[r]) : 0.0f;
            weights[lane * kTwinRows + r] = scale * p * (dp[r] - row_delta[r]);
        }
        __syncwarp();
        twin_add(dq, weights, k_tile, hd);
        __syncwarp();
    }
    twin_store(dqkv + head, 3 * C, row0, T, hd, dq);
}

// Rows are keys, the tiles that pass by are queries, from the diagonal on.
template <int COLUMNS>
__global__ void twin_dkv_kernel(real* dqkv, const float* delta, const real* dout, const real* qkv, const float* lse,
                                int T, int C, int hd, float scale) {
    DYNAMIC_SHARED(float, q_tile);                            // (kTwinTile, hd)
    float* dout_tile = q_tile + kTwinTile * twin_stride(hd);  // (kTwinTile, hd)
    const int b = blockIdx.z, h = blockIdx.y, H = gridDim.y, first = blockIdx.x * kTwinTile;
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, row0 = first + kTwinRows * warp;
    float* weights = dout_tile + kTwinTile * twin_stride(hd) + warp * kTwinWeights;
    const size_t head = size_t(b) * T * 3 * C + h * hd;
    const real *q = qkv + head, *k = q + C, *v = q + 2 * C;
    lse += (size_t(b) * H + h) * T;
    delta += (size_t(b) * H + h) * T;
    dout += size_t(b) * T * C + h * hd;
    const TwinRows own_k(k, 3 * C, row0, T), own_v(v, 3 * C, row0, T);

    float dk[kTwinRows][COLUMNS] = {}, dv[kTwinRows][COLUMNS] = {};
    for (int query = first; query < T; query += kTwinTile) {
        __syncthreads();
        twin_load(q_tile, q, 3 * C, query, T, hd);
        twin_load(dout_tile, dout, C, query, T, hd);
        __syncthreads();
        float s[kTwinRows], dp[kTwinRows];
        own_k.dot(s, q_tile, hd);
        own_v.dot(dp, dout_tile, hd);
        const int row = query + lane;
        const float row_lse = row < T ? lse[row] : 0.0f, row_delta = row < T ? delta[row] : 0.0f;
        UNROLL
        for (int r = 0; r < kTwinRows; r++) {
            s[r] = row >= row0 + r ? expf(s[r] * scale - row_lse) : 0.0f;
            weights[lane * kTwinRows + r] = s[r];
        }
        __syncwarp();
        twin_add(dv, weights, dout_tile, hd);
        __syncwarp();
        UNROLL
        for (int r = 0; r < kTwinRows; r++) weights[lane * kTwinRows + r] = scale * s[r] * (dp[r] - row_delta);
        __syncwarp();
        twin_add(dk, weights, q_tile, hd);
        __syncwarp();
    }
    twin_store(dqkv + head + C, 3 * C, row0, T, hd, dk);
    twin_store(dqkv + head + 2 * C, 3 * C, row0, T, hd, dv);
}

// ---------------------------------------------------------------------------------------------------------------------
// The last row alone, for generation: one query against T keys. A block has a head; its warps take the keys in turn, a
// lane the columns lane, lane + 32, .. of q, k and v. Each warp has an online softmax of its own (attention.cuh), and
// at the end these are joined in the order of the warps.

constexpr int kLastRowWarps = 32;

template <int COLUMNS>
__global__ void __launch_bounds__(kLastRowWarps* kWarpSize)
    last_row_kernel(real* out, const real* qkv, int T, int C, int hd, float scale) {
    __shared__ float largest[kLastRowWarps], totals[kLastRowWarps];
    DYNAMIC_SHARED(float, sums);  // (kLastRowWarps, hd)
    const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, head = blockIdx.x * hd;
    const real *k = qkv + C + head, *v = k + C;

    float q[COLUMNS], o[COLUMNS] = {}, m = -INFINITY, l = 0;
    UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        const int column = lane + kWarpSize * c;
        q[c] = column < hd ? to_float(qkv[(T - 1) * 3 * C + head + column]) * scale : 0.0f;
    }
    UNROLL_BY(4)  // the loads of the next keys need not wait for the sums of this one
    for (int key = warp; key < T; key += kLastRowWarps) {
        float dot = 0, value[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c++) {
            const int column = min(lane + kWarpSize * c, hd - 1);  // q is 0 past the end, and sums there are not stored
            dot += q[c] * to_float(k[key * 3 * C + column]);
            value[c] = to_float(v[key * 3 * C + column]);
        }
        const float s = warp_sum(dot), m_new = fmaxf(m, s), correction = expf(m - m_new), p = expf(s - m_new);
        m = m_new;
        l = l * correction + p;
        UNROLL
        for (int c = 0; c < COLUMNS; c++) o[c] = o[c] * correction + p * value[c];
    }
    if (lane == 0) largest[warp] = m, totals[warp] = l;
    UNROLL
    for (int c = 0; c < COLUMNS; c++) {
        const int column = lane + kWarpSize * c;
        if (column < hd) sums[warp * hd + column] = o[c];
    }
    __syncthreads();
    if (int(threadIdx.x) >= hd) return;
    float of_all = -INFINITY, total = 0, sum = 0;
    for (float of_warp : largest) of_all = fmaxf(of_all, of_warp);
    for (int w = 0; w < kLastRowWarps; w++) {
        const float share = expf(largest[w] - of_all);  // 0 for a warp without a key
        total += totals[w] * share;
        sum += sums[w * hd + threadIdx.x] * share;
    }
    out[head + threadIdx.x] = from_float<real>(sum / total);
}
