// ns_kernels.cuh: the optimizer's matrix work on the GPU: everything between a momentum matrix and its Muon update.
// What Newton-Schulz is, and the iteration itself, stand in dmuon.cuh, section 2; here is its product, D = alpha A
// op(B) + beta C + diag I over a batch of matrices, and what goes before and after.
//
// Of a symmetric result (X X^T, and every polynomial in it) only the tiles on and below the diagonal are computed; each
// is stored twice, the second time transposed.
//
// What to read in which order: product_kernel (tensor cores, bf16 and fp16), product_fp32_kernel (the exact build),
// muon_inverse_norms_kernel and muon_momentum_kernel (gradient -> X), muon_update_kernel (X -> weights), then the
// launchers in struct NsKernels. On Hopper kernels/ns_hopper.cuh takes the place of product_kernel. How both came to
// be, one idea at a time: dev/newton_schulz.cu.
#pragma once
#include <cfloat>
#include <memory>
#include <utility>

#include "common.h"
#include "kernels/cuda_common.cuh"
#include "kernels/mma.cuh"
#include "kernels/ns_hopper.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// D = alpha * A op(B) + beta * C + diag * I in 16 bits, on the tensor cores
//
// A thread block computes one 128 x 128 tile of D of one matrix of the batch: it walks over K in steps of 64, with the
// next steps' tiles of A and B already on their way into shared memory (cp.async, a ring of three stages). Each of its
// four warps owns 64 x 64 of the tile: per 16 of K it loads 64 rows of A and 64 columns of B from shared memory and
// feeds 4 x 8 mma.sync of shape 16 x 8 x 16. A square that large is what the shared memory needs: 4 KiB read per
// 131,072 FLOPs. Its 128 accumulators per thread leave room for two such blocks on an SM, which hide each other's
// starts and ends.

constexpr int kProductThreads = 128;
constexpr int kTile = 128;  // rows and columns of a block's tile of D
constexpr int kTileK = 64;  // step over K
constexpr int kStages = 3;
constexpr int kStageElements = 2 * kTile * kTileK;  // a tile of A, then one of B; or one (128, 128) tile of C and D
constexpr size_t kProductSharedBytes = kStages * kStageElements * 2;  // 96 KiB

// Where element (row, col) of a tile with `cols` columns lies in shared memory. ldmatrix reads eight chunks of 16 bytes
// (8 elements) from eight consecutive rows. Stored plainly they would all lie in the same four banks and be read one by
// one; so the chunks of a row are permuted, by a key that differs among eight consecutive rows.
template <int cols>
__device__ inline int tile_at(int row, int col) {
    return row * cols + ((col / 8) ^ (row % 8)) * 8 + col % 8;
}

// The same for the (128, 128) tile of C and D in the epilogue, whose mirrored store has ldmatrix read rows 0 1 8 9 16
// 17 24 25.
__device__ inline int result_at(int row, int col) {
    int key = (row ^ (row / 8) * 2) % 8;
    return row * kTile + ((col / 8) ^ key) * 8 + col % 8;
}

// Starts copying matrix[row0 .. row0 + rows, col0 .. col0 + cols], a tile of a contiguous (matrix_rows, matrix_cols)
// matrix, to shared memory, element (row, col) to tile[at(row, col)]. What lies outside of the matrix becomes zero and
// adds nothing.
template <int rows, int cols, typename T, typename At>
__device__ inline void load_tile(T* tile, const T* matrix, int matrix_rows, int matrix_cols, int row0, int col0,
                                 At at) {
    constexpr int chunks = cols / 8, rows_at_once = kProductThreads / chunks;
    int row = threadIdx.x / chunks, col = threadIdx.x % chunks * 8;
    const T* from = matrix + size_t(row0 + row) * matrix_cols + col0 + col;
    UNROLL
    for (int i = 0; i < rows; i += rows_at_once) {
        bool inside = row0 + row + i < matrix_rows && col0 + col < matrix_cols;
        cp_async_16(&tile[at(row + i, col)], from + size_t(i) * matrix_cols, inside);
    }
}

// Tile number t of one matrix -> first row and column. Symmetric: the tiles on and below the diagonal, row after row.
template <NsProduct kind>
__device__ inline void tile_origin(int t, int tiles_across, int tile, int* row0, int* col0) {
    int row = 0, col = t;
    if (kind == NsProduct::nn) {
        row = t / tiles_across;
        col = t % tiles_across;
    } else {
        while (col > row) col -= ++row;
    }
    *row0 = row * tile;
    *col0 = col * tile;
}

// What a warp feeds to the tensor cores per 16 of K: 64 rows of A and 64 columns of B, spread over the lanes'
// registers.
struct Fragments {
    uint32_t a[4][4];  // four (16, 16) blocks, one below the other
    uint32_t b[8][2];  // eight (16, 8) blocks, side by side
};

// D (batch, M, N), A (batch, M, K), B (batch, N, K) or (batch, K, N), C (batch, M, N) or null. Grid: batch * tiles
// blocks. With K = 0 only the end happens: D = beta * C + diag * I.
template <typename T, NsProduct kind>
__global__ void __launch_bounds__(kProductThreads, 2)
    product_kernel(T* D, const T* A, const T* B, const T* C, float alpha, float beta, float diag, int M, int N, int K,
                   int tiles) {
    DYNAMIC_SHARED(T, stages);  // (kStages, kStageElements)
    constexpr bool symmetric = kind == NsProduct::symmetric_nt;
    int m0, n0;
    tile_origin<kind>(blockIdx.x % tiles, (N + kTile - 1) / kTile, kTile, &m0, &n0);
    size_t matrix = blockIdx.x / tiles;
    A += matrix * M * K;
    B += matrix * N * K;
    D += matrix * M * N;
    if (C) C += matrix * M * N;

    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int warp_row = warp / 2 * 64, warp_col = warp % 2 * 64;
    int k_tiles = (K + kTileK - 1) / kTileK;

    // Tile k along K goes to stage k of the ring.
    auto stage = [&](int k) { return stages + k % kStages * kStageElements; };
    auto load_stage = [&](int k) {
        T *a = stage(k), *b = a + kTile * kTileK;
        if (k < k_tiles) {
            load_tile<kTile, kTileK>(a, A, M, K, m0, k * kTileK, tile_at<kTileK>);
            if (symmetric) load_tile<kTile, kTileK>(b, B, N, K, n0, k * kTileK, tile_at<kTileK>);
            else load_tile<kTileK, kTile>(b, B, K, N, k * kTileK, n0, tile_at<kTile>);
        }
        cp_async_commit();  // one group per stage, empty ones too, so that cp_async_wait can count stages
    };

    // B's tile is (n, k) for symmetric_nt, which is the layout that mma wants, and (k, n) for nn, which ldmatrix
    // transposes.
    auto load_fragments = [&](Fragments& f, int k, int step) {
        const T *a = stage(k), *b = a + kTile * kTileK;
        UNROLL
        for (int i = 0; i < 4; i++)
            ldmatrix_x4(f.a[i], &a[tile_at<kTileK>(warp_row + i * 16 + lane % 16, step * 16 + lane / 16 * 8)]);
        UNROLL
        for (int j = 0; j < 8; j += 2) {  // one ldmatrix_x4 brings two (16, 8) blocks
            int n = warp_col + j * 8;
            if (symmetric)
                ldmatrix_x4(f.b[j], &b[tile_at<kTileK>(n + lane / 16 * 8 + lane % 8, step * 16 + lane / 8 % 2 * 8)]);
            else ldmatrix_x4_trans(f.b[j], &b[tile_at<kTile>(step * 16 + lane % 16, n + lane / 16 * 8)]);
        }
    };

    for (int k = 0; k < kStages - 1; k++) load_stage(k);
    cp_async_wait<kStages - 2>();
    __syncthreads();

    // Fragments are double buffered: those of the next 16 of K are loaded while the tensor cores work on these.
    float acc[4][8][4] = {};
    Fragments fragments[2];
    if (k_tiles > 0) load_fragments(fragments[0], 0, 0);
    constexpr int steps = kTileK / 16;
    for (int k = 0; k < k_tiles; k++) {
        load_stage(k + kStages - 1);  // where stage k - 1 was, which all warps have left at the barrier below
        UNROLL
        for (int step = 0; step < steps; step++) {
            if (step < steps - 1) {
                load_fragments(fragments[(step + 1) % 2], k, step + 1);
            } else {
                cp_async_wait<kStages - 2>();  // stage k + 1 has arrived: what this thread copied of it,
                __syncthreads();               // and now what the others did
                if (k + 1 < k_tiles) load_fragments(fragments[0], k + 1, 0);
            }
            const Fragments& f = fragments[step % 2];
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int j = 0; j < 8; j++) mma_m16n8k16<T>(acc[i][j], f.a[i], f.b[j]);
            }
        }
    }

    // The next stage of the ring, free by now, becomes the tile of D. C's tile is loaded there, and each of its
    // elements is replaced by D's, rounded once, by the thread that has the accumulator. On a diagonal tile the upper
    // half is a copy of the lower one: D is symmetric to the last bit.
    T* tile = stage(k_tiles);  // (128, 128)
    if (C) load_tile<kTile, kTile>(tile, C, M, N, m0, n0, result_at);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    bool diagonal = symmetric && m0 == n0;
    auto finish = [&](float sum, T c, int row, int col) {
        float value = alpha * sum;
        if (C) value += beta * to_float(c);
        if (m0 + row == n0 + col) value += diag;
        return from_float<T>(value);
    };
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int j = 0; j < 8; j++) {
            UNROLL
            for (int half = 0; half < 2; half++) {  // mma's layout: rows lane/4 and + 8, columns 2*(lane%4) and + 1
                int row = warp_row + i * 16 + half * 8 + lane / 4, col = warp_col + j * 8 + lane % 4 * 2;
                const float* sum = &acc[i][j][half * 2];
                T* at = &tile[result_at(row, col)];
                if (!diagonal) {
                    Pair<T>& pair = *reinterpret_cast<Pair<T>*>(at);
                    pair = {finish(sum[0], pair.x, row, col), finish(sum[1], pair.y, row, col + 1)};
                } else {
                    for (int e = 0; e < 2; e++)
                        if (row >= col + e) at[e] = tile[result_at(col + e, row)] = finish(sum[e], at[e], row, col + e);
                }
            }
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < kTile * kTile / 8; i += kProductThreads) {
        int row = i / (kTile / 8), col = i % (kTile / 8) * 8;
        if (m0 + row < M && n0 + col < N)
            *reinterpret_cast<uint4*>(&D[size_t(m0 + row) * N + n0 + col]) =
                *reinterpret_cast<const uint4*>(&tile[result_at(row, col)]);
    }
    if (!symmetric || diagonal) return;

    // The mirror image. ldmatrix's transpose hands lane l, of each of four (8, 8) blocks, column l/4 in rows 2*(l%4)
    // and the next. So if block q is made of rows 2q and 2q + 1 of each eight, a lane ends up with eight neighbours of
    // one column, 16 bytes of one row of D, and a warp writes eight rows of 64 bytes.
    int row = warp * 32 + lane % 8 / 2 * 8 + lane / 8 * 2 + lane % 2;
    for (int col = 0; col < kTile; col += 8) {
        uint32_t eight[4];
        ldmatrix_x4_trans(eight, &tile[result_at(row, col)]);
        int to_row = n0 + col + lane / 4, to_col = m0 + warp * 32 + lane % 4 * 8;
        if (to_row < N && to_col < M)
            *reinterpret_cast<uint4*>(&D[size_t(to_row) * N + to_col]) = {eight[0], eight[1], eight[2], eight[3]};
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The same in fp32, for --ns_dtype fp32: exact before fast. A block of 256 threads computes a 64 x 64 tile, 4 x 4 per
// thread (rows and columns 16 apart), from 16 columns of A and of B at a time in shared memory.

constexpr int kTile32 = 64;
constexpr int kTile32K = 16;

template <NsProduct kind>
__global__ void __launch_bounds__(256)
    product_fp32_kernel(float* D, const float* A, const float* B, const float* C, float alpha, float beta, float diag,
                        int M, int N, int K, int tiles) {
    __shared__ float a[kTile32K][kTile32 + 1], b[kTile32K][kTile32 + 1];  // k first; + 1 against bank conflicts
    constexpr bool symmetric = kind == NsProduct::symmetric_nt;
    int m0, n0;
    tile_origin<kind>(blockIdx.x % tiles, (N + kTile32 - 1) / kTile32, kTile32, &m0, &n0);
    size_t matrix = blockIdx.x / tiles;
    A += matrix * M * K;
    B += matrix * N * K;
    D += matrix * M * N;
    if (C) C += matrix * M * N;

    int thread_row = threadIdx.x / 16, thread_col = threadIdx.x % 16;
    float acc[4][4] = {};
    for (int k0 = 0; k0 < K; k0 += kTile32K) {
        for (int i = threadIdx.x; i < kTile32 * kTile32K; i += 256) {
            int m = i / kTile32K, k = i % kTile32K;
            bool k_inside = k0 + k < K;
            a[k][m] = k_inside && m0 + m < M ? A[size_t(m0 + m) * K + k0 + k] : 0.0f;
            if (symmetric) b[k][m] = k_inside && n0 + m < N ? B[size_t(n0 + m) * K + k0 + k] : 0.0f;
        }
        if (!symmetric) {
            for (int i = threadIdx.x; i < kTile32K * kTile32; i += 256) {
                int k = i / kTile32, n = i % kTile32;
                b[k][n] = k0 + k < K && n0 + n < N ? B[size_t(k0 + k) * N + n0 + n] : 0.0f;
            }
        }
        __syncthreads();
        UNROLL
        for (int k = 0; k < kTile32K; k++) {
            UNROLL
            for (int i = 0; i < 4; i++) {
                UNROLL
                for (int j = 0; j < 4; j++)
                    acc[i][j] = fmaf(a[k][thread_row + 16 * i], b[k][thread_col + 16 * j], acc[i][j]);
            }
        }
        __syncthreads();
    }
    UNROLL
    for (int i = 0; i < 4; i++) {
        UNROLL
        for (int j = 0; j < 4; j++) {
            int m = m0 + thread_row + 16 * i, n = n0 + thread_col + 16 * j;
            if (m >= M || n >= N || (symmetric && n > m)) continue;
            float value = alpha * acc[i][j];
            if (C) value += beta * C[size_t(m) * N + n];
            if (m == n) value += diag;
            D[size_t(m) * N + n] = value;
            if (symmetric) D[size_t(n) * N + m] = value;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Around Newton-Schulz: gradient and momentum -> X, and X -> weights, each in one pass over memory.
//
// With the clip scale s, Muon's x is mu (mu buf + s g) + s g under Nesterov, else mu buf + s g: in either case
// x = a g + b buf, so |x|^2 = a^2 g.g + 2ab g.buf + b^2 buf.buf. The three sums are taken in double (a gradient of
// 1e-20 has a square that fp32 does not know) in the pass that the clip norm needs anyway, before s is known; so the
// pass that forms x can divide by |x| at once, before it rounds to 16 bits.

constexpr int kInverseNormThreads = 128;

// inverse_norms = 1 / |x|, by a warp for each matrix, in an order that its own blocks alone decide.
__global__ void __launch_bounds__(kInverseNormThreads)
    muon_inverse_norms_kernel(float* inverse_norms /*(count)*/, const double* squares, const double* dots,
                              const MatrixRef* refs /*(count)*/, int count, float mu, bool nesterov,
                              const float* clip) {
    const int matrix = (blockIdx.x * kInverseNormThreads + threadIdx.x) / kWarpSize, lane = threadIdx.x % kWarpSize;
    if (matrix >= count) return;
    const MatrixRef ref = refs[matrix];
    double gg = 0, gb = 0, bb = 0;
    for (int i = ref.first_block + lane; i < ref.first_block + ref.blocks; i += kWarpSize) {
        gg += squares[i];
        gb += dots[2 * size_t(i)];
        bb += dots[2 * size_t(i) + 1];
    }
    gg = warp_sum(gg), gb = warp_sum(gb), bb = warp_sum(bb);
    if (lane != 0) return;
    const double a = nesterov ? (1.0 + mu) * clip[0] : clip[0], b = nesterov ? double(mu) * mu : mu;
    const double positive = a * a * gg + b * b * bb;
    const double squared = fmax(positive + 2 * a * b * gb, kLeastNormSquared * positive);
    inverse_norms[matrix] = squared > 0 ? float(fmin(1 / sqrt(squared), double(FLT_MAX))) : 0.0f;
}

// A thread block of the two kernels below moves 4096 elements of a matrix between its own place and X, a quad per
// thread at a time. Of a matrix that lies down it takes consecutive elements of X; of one that stands up a (64, 64)
// tile, which goes through shared memory, so that both sides are read and written along rows.
constexpr int kMoveTile = 64;
constexpr int kMoveThreads = 256;
constexpr int kTileQuads = kMoveTile / kQuad;                      // across a tile
constexpr int kMoveQuads = kMoveTile * kTileQuads / kMoveThreads;  // of each thread
using MoveTile = float[kMoveTile][kMoveTile + 1];                  // + 1 against bank conflicts

// X, for matrices (m, n): padded to multiples of 8, and how many thread blocks a matrix takes.
struct PaddedShape {
    int mp, np, tiles;
    __host__ __device__ PaddedShape(int m, int n)
        : mp((m + 7) / 8 * 8),
          np((n + 7) / 8 * 8),
          tiles((mp + kMoveTile - 1) / kMoveTile * ((np + kMoveTile - 1) / kMoveTile)) {}
};

class MatrixMove {
  public:
    const MatrixRef ref;
    const PaddedShape shape;
    const size_t x;  // where the matrix begins in X

    __device__ MatrixMove(const MatrixRef* refs, int m, int n)
        : ref(refs[blockIdx.x / PaddedShape(m, n).tiles]),
          shape(m, n),
          x(size_t(blockIdx.x / shape.tiles) * shape.mp * shape.np),
          rows(ref.tall ? n : m),
          cols(ref.tall ? m : n),
          aligned((ref.offset | ref.state | ref.ld | cols) % kQuad == 0) {
        const unsigned tile = blockIdx.x % shape.tiles, across = (shape.np + kMoveTile - 1) / kMoveTile;
        m0 = tile / across * kMoveTile;
        n0 = tile % across * kMoveTile;
        first_quad = tile * (kMoveTile * kTileQuads);
    }

    // The i-th quad of this thread in the matrix; in X at the same row and column if the matrix lies down.
    struct Place {
        int row, col;
        int count;  // of its elements that are the matrix's; the others are padding
    };
    __device__ Place place(int i) const {
        unsigned q = i * kMoveThreads + threadIdx.x;
        Place place;
        if (ref.tall) {
            place.row = n0 + q / kTileQuads;
            place.col = m0 + q % kTileQuads * kQuad;
        } else {
            q += first_quad;
            place.row = q / (shape.np / kQuad);
            place.col = q % (shape.np / kQuad) * kQuad;
        }
        place.count = place.row >= rows || place.col >= cols ? 0 : cols - place.col < kQuad ? cols - place.col : kQuad;
        return place;
    }
    __device__ Quad<float> load(const float* from, Place at) const {
        from += size_t(at.row) * ref.ld + at.col;
        if (aligned && at.count > 0) return Quad<float>::load_once(from);
        Quad<float> quad = {};
        UNROLL  // so that a quad stays in registers
        for (int k = 0; k < kQuad; k++)
            if (k < at.count) quad[k] = from[k];
        return quad;
    }
    __device__ void store_once(float* to, Place at, const Quad<float>& quad) const {
        to += size_t(at.row) * ref.ld + at.col;
        if (aligned && at.count > 0) return quad.store_once(to);
        UNROLL
        for (int k = 0; k < kQuad; k++)
            if (k < at.count) to[k] = quad[k];
    }
    __device__ void store(real* to, Place at, const Quad<real>& quad) const {
        to += size_t(at.row) * ref.ld + at.col;
        if (aligned && at.count > 0) return quad.store(to);
        UNROLL
        for (int k = 0; k < kQuad; k++)
            if (k < at.count) to[k] = quad[k];
    }
    // Its element in the tile, which is kept in the matrix's own orientation.
    __device__ float& in_tile(MoveTile& tile, Place at, int k) const { return tile[at.row - n0][at.col - m0 + k]; }

    // The i-th quad of this thread in X, of a matrix that stands up, and its element in the tile.
    struct PlaceInX {
        int m, n;
        bool inside;
    };
    __device__ PlaceInX place_in_x(int i) const {
        const unsigned q = i * kMoveThreads + threadIdx.x;
        const int m = m0 + q / kTileQuads, n = n0 + q % kTileQuads * kQuad;
        return {m, n, m < shape.mp && n < shape.np};
    }
    __device__ float& in_tile(MoveTile& tile, PlaceInX at, int k) const { return tile[at.n - n0 + k][at.m - m0]; }

  private:
    const int rows, cols;  // of the matrix where it is
    const bool aligned;
    int m0, n0;  // of the tile of X
    unsigned first_quad;
};

// buf = mu buf + s g, X = (s g + mu buf) / |x| (under Nesterov, else buf / |x|). Grid: count * tiles blocks.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads)
    muon_momentum_kernel(T* X /*(count,mp,np)*/, float* momentum, const float* grads, const MatrixRef* refs /*(count)*/,
                         const float* inverse_norms /*(count)*/, int m, int n, float mu, bool nesterov,
                         const float* clip) {
    __shared__ MoveTile tile;
    const float scale = clip[0];
    if (scale == 0.0f) return;  // the gradients were not finite: X is never used
    const MatrixMove move(refs, m, n);
    const float inverse_norm = inverse_norms[blockIdx.x / move.shape.tiles];
    momentum += move.ref.state;
    grads += move.ref.offset;
    X += move.x;
    Quad<float> g[kMoveQuads], buf[kMoveQuads];
    UNROLL
    for (int i = 0; i < kMoveQuads; i++) {
        g[i] = move.load(grads, move.place(i));
        buf[i] = move.load(momentum, move.place(i));
    }
    UNROLL
    for (int i = 0; i < kMoveQuads; i++) {
        const auto at = move.place(i);
        Quad<T> rounded;
        for (int k = 0; k < kQuad; k++) {
            const float clipped = g[i][k] * scale;
            buf[i][k] = mu * buf[i][k] + clipped;
            const float x = (nesterov ? clipped + mu * buf[i][k] : buf[i][k]) * inverse_norm;
            if (move.ref.tall) move.in_tile(tile, at, k) = x;
            rounded[k] = from_float<T>(x);
        }
        move.store_once(momentum, at, buf[i]);
        if (!move.ref.tall && at.row < move.shape.mp) rounded.store(X + size_t(at.row) * move.shape.np + at.col);
    }
    if (!move.ref.tall) return;
    __syncthreads();
    UNROLL
    for (int i = 0; i < kMoveQuads; i++) {
        const auto at = move.place_in_x(i);
        Quad<T> rounded;
        for (int k = 0; k < kQuad; k++) rounded[k] = from_float<T>(move.in_tile(tile, at, k));
        if (at.inside) rounded.store(X + size_t(at.m) * move.shape.np + at.n);
    }
}

// master = decay master - step U, params = master rounded. Grid as above.
template <typename T>
__global__ void __launch_bounds__(kMoveThreads)
    muon_update_kernel(real* params, float* master, const T* U /*(count,mp,np)*/, const MatrixRef* refs /*(count)*/,
                       int m, int n, float decay, float lr, const float* clip) {
    __shared__ MoveTile tile;
    if (clip[0] == 0.0f) return;
    const MatrixMove move(refs, m, n);
    const float step = lr * move.ref.scale;
    params += move.ref.offset;
    master += move.ref.state;
    U += move.x;
    Quad<float> w[kMoveQuads];
    Quad<T> u[kMoveQuads] = {};
    UNROLL
    for (int i = 0; i < kMoveQuads; i++) {
        const auto at = move.place(i);
        const auto in_x = move.place_in_x(i);
        w[i] = move.load(master, at);
        if (move.ref.tall && in_x.inside) u[i] = Quad<T>::load_once(U + size_t(in_x.m) * move.shape.np + in_x.n);
        if (!move.ref.tall && at.count > 0) u[i] = Quad<T>::load_once(U + size_t(at.row) * move.shape.np + at.col);
    }
    if (move.ref.tall) {
        UNROLL
        for (int i = 0; i < kMoveQuads; i++)
            for (int k = 0; k < kQuad; k++) move.in_tile(tile, move.place_in_x(i), k) = to_float(u[i][k]);
        __syncthreads();
    }
    UNROLL
    for (int i = 0; i < kMoveQuads; i++) {
        const auto at = move.place(i);
        Quad<real> rounded;
        for (int k = 0; k < kQuad; k++) {
            w[i][k] = w[i][k] * decay - step * (move.ref.tall ? move.in_tile(tile, at, k) : to_float(u[i][k]));
            rounded[k] = from_float<real>(w[i][k]);
        }
        move.store_once(master, at, w[i]);
        move.store(params, at, rounded);
    }
}

// ---------------------------------------------------------------------------------------------------------------------

struct NsKernels {
    // Where the GPU has kernels for it (ns_hopper.cuh).
    class NsChain {
      public:
        NsChain(int batch, NsType type, int* counters) {
            if (type != NsType::fp32 && hopper_kernels()) chain = new HopperRecorder(type, batch, counters);
        }
        NsChain(const NsChain&) = delete;
        ~NsChain() noexcept(false) {
            if (!chain) return;
            const std::unique_ptr<HopperRecorder> ended(std::exchange(chain, nullptr));
            ended->launch();
        }
    };
    // D (batch, M, N) = alpha * A op(B) + beta * C + diag * I, summed in fp32 and rounded to `type` once. A is (batch,
    // M, K), C is (batch, M, N) or null and may be D. symmetric_nt: op(B) is the transpose of B (batch, N, K), M == N,
    // and the caller knows that the result, and C, are symmetric. nn: op(B) is B (batch, K, N). M, N and K are
    // multiples of 8. The bits of a matrix of D depend on its own operands only, not on the batch it is in.
    static void ns_product(void* D, const void* A, const void* B, const void* C, float alpha, float beta, float diag,
                           int batch, int M, int N, int K, NsProduct kind, NsType type) {
        if (chain) return chain->add(kind, D, A, B, C, alpha, beta, diag, M, N, K);
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            auto run = kind == NsProduct::nn ? product<T, NsProduct::nn> : product<T, NsProduct::symmetric_nt>;
            run(static_cast<T*>(D), static_cast<const T*>(A), static_cast<const T*>(B), static_cast<const T*>(C), alpha,
                beta, diag, batch, M, N, K);
        });
    }

    // 1 / |x| of each of the rank's matrices, from the sums of its blocks (norm_sums); 0 where x is 0.
    static void muon_inverse_norms(float* inverse_norms /*(count)*/, const double* squares, const double* dots,
                                   const MatrixRef* refs /*(count)*/, int count, float mu, bool nesterov,
                                   const float* clip) {
        LAUNCH(muon_inverse_norms_kernel, ceil_div(count * kWarpSize, kInverseNormThreads), kInverseNormThreads, 0,
               inverse_norms, squares, dots, refs, count, mu, nesterov, clip);
    }

    // momentum = mu momentum + s g, and X (count, mp, np) = (type)(x / |x|), lying down, mp and np are m and n rounded
    // up to multiples of 8, the padding is zero. Nothing is written if clip[0] is 0.
    static void muon_momentum(void* X, float* momentum, const float* grads, const MatrixRef* refs,
                              const float* inverse_norms, int count, int m, int n, float mu, bool nesterov, NsType type,
                              const float* clip) {
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            LAUNCH((muon_momentum_kernel<T>), count * PaddedShape(m, n).tiles, kMoveThreads, 0, static_cast<T*>(X),
                   momentum, grads, refs, inverse_norms, m, n, mu, nesterov, clip);
        });
    }

    // master = master * decay - lr * ref.scale * U for each matrix, U (count, mp, np) as muon_momentum lays X out;
    // params = master rounded. Nothing is written if clip[0] is 0.
    static void muon_update(real* params, float* master, const void* U, const MatrixRef* refs, int count, int m, int n,
                            float decay, float lr, NsType type, const float* clip) {
        with_type(type, [&](auto zero) {
            using T = decltype(zero);
            LAUNCH((muon_update_kernel<T>), count * PaddedShape(m, n).tiles, kMoveThreads, 0, params, master,
                   static_cast<const T*>(U), refs, m, n, decay, lr, clip);
        });
    }

  private:
    static inline HopperRecorder* chain = nullptr;
    // Calls body with a value of the C++ type that `type` names.
    template <typename Body>
    static void with_type(NsType type, Body body) {
        if (type == NsType::bf16) body(__nv_bfloat16());
        else if (type == NsType::fp16) body(__half());
        else body(0.0f);
    }

    template <typename T, NsProduct kind>
    static void product(T* D, const T* A, const T* B, const T* C, float alpha, float beta, float diag, int batch, int M,
                        int N, int K) {
        auto count_tiles = [&](int tile) {
            int down = ceil_div(M, tile), across = ceil_div(N, tile);
            return kind == NsProduct::nn ? down * across : down * (down + 1) / 2;
        };
        if constexpr (sizeof(T) == 4) {
            int tiles = count_tiles(kTile32);
            LAUNCH((product_fp32_kernel<kind>), batch * tiles, 256, 0, D, A, B, C, alpha, beta, diag, M, N, K, tiles);
        } else {
            int tiles = count_tiles(kTile);
            LAUNCH((product_kernel<T, kind>), batch * tiles, kProductThreads, kProductSharedBytes, D, A, B, C, alpha,
                   beta, diag, M, N, K, tiles);
        }
    }
};
