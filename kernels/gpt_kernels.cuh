// gpt_kernels.cuh: the kernels of the model and of the optimizer that are neither a matrix product nor attention. All
// of them are bound by memory: each reads its inputs once, 16 bytes per access, computes in fp32, and rounds once at
// the store.
// Read in this order: embedding, LayerNorm and residual, GELU, classifier and loss, column sums (bias), optimizer, and
// at the end struct GptKernels, the launchers that the program calls.
//
// Results are the same bits in every run and on every GPU: no atomics, and the order of a sum depends on shapes only.
// Letters: B sequences of T positions, N = B*T rows, C channels (a multiple of 8), V vocabulary, Vp the same padded.
#pragma once
#include <algorithm>
#include <cfloat>

#include "cuda_common.cuh"
#include "mma.cuh"

// Kernels that sum over rows run as many blocks as fill this many multiprocessors (an H100's). Other GPUs work too,
// with a less even last wave; a fixed number keeps results independent of the device.
constexpr int kMultiprocessors = 132;

// ---------------------------------------------------------------------------------------------------------------------
// Embedding

// One block per row.
__global__ void embedding_forward_kernel(real* out /*(N,C)*/, const int* tokens /*(N)*/,
                                         const real* __restrict__ wte /*(Vp,C)*/,
                                         const real* __restrict__ wpe /*(maxT,C)*/, int T, int C) {
    using P = Pack<real>;
    size_t row = blockIdx.x;
    const real* token = wte + size_t(tokens[row]) * C;
    const real* position = wpe + (row % T) * C;
    for (int c = threadIdx.x * P::size; c < C; c += blockDim.x * P::size) {
        P a = P::load(token + c), b = P::load(position + c), sum;
        for (int k = 0; k < P::size; k++) sum[k] = from_float<real>(to_float(a[k]) + to_float(b[k]));
        sum.store(out + row * C + c);
    }
}

// dwpe[t] += sum over the sequences of dout[b,t]. One thread per pack of (T,C).
__global__ void position_backward_kernel(float* dwpe /*(maxT,C) +=*/, const real* __restrict__ dout /*(B,T,C)*/, int B,
                                         int T, int C) {
    using P = Pack<real>;
    size_t TC = size_t(T) * C, i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * P::size;
    if (i >= TC) return;
    float sum[P::size] = {};
    UNROLL_BY(4)
    for (int b = 0; b < B; b++) {
        P d = P::load(dout + b * TC + i);
        for (int k = 0; k < P::size; k++) sum[k] += to_float(d[k]);
    }
    for (int k = 0; k < P::size; k++) dwpe[i + k] += sum[k];
}

constexpr int kTokenWarps = 16;
constexpr int kTokenColumns = kWarpSize * Pack<real>::size;  // of one warp

// sum += dout[order[i]] for the entries i = first.. that hold `token`, at most 32. Returns how many there were.
__device__ inline int add_token_rows(float (&sum)[Pack<real>::size], const real* __restrict__ dout,
                                     const int* __restrict__ tokens, const int* __restrict__ order, int token,
                                     int first, int N, int C, int column) {
    using P = Pack<real>;
    int lane = threadIdx.x % kWarpSize;
    int row = first + lane < N ? order[first + lane] : -1;
    unsigned others = __ballot_sync(kAllLanes, row < 0 || tokens[row] != token);
    int count = others ? __ffs(others) - 1 : kWarpSize;
    UNROLL_BY(4)
    for (int i = 0; i < count; i++) {
        size_t from = __shfl_sync(kAllLanes, row, i);
        if (column >= C) continue;
        P d = P::load(dout + from * C + column);
        for (int k = 0; k < P::size; k++) sum[k] += to_float(d[k]);
    }
    return count;
}

// dwte[token] += sum of dout over the positions that hold the token. `order` lists the positions by token, so each
// token is a run. A block looks at kTokenWarps entries of order, one per warp, and at kTokenColumns columns
// (blockIdx.y). A warp at the first entry of a run of up to 32 sums it alone. Of longer runs at most one, the last,
// begins in these few entries. All warps sum it together: pieces of 32, dealt out in turn, then one sum per warp,
// added in order.
__global__ void token_backward_kernel(float* dwte /*(Vp,C) +=*/, const real* __restrict__ dout /*(N,C)*/,
                                      const int* __restrict__ tokens /*(N)*/, const int* __restrict__ order /*(N)*/,
                                      int N, int C) {
    using P = Pack<real>;
    __shared__ float of_warps[kTokenWarps][kTokenColumns];
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int column = blockIdx.y * kTokenColumns + lane * P::size;
    int begin = blockIdx.x * kTokenWarps, i = begin + lane;

    bool starts = lane < kTokenWarps && i < N && (i == 0 || tokens[order[i]] != tokens[order[i - 1]]);
    unsigned run_starts = __ballot_sync(kAllLanes, starts);
    if (run_starts == 0) return;
    int last = begin + kWarpSize - 1 - __clz(run_starts);
    int last_token = tokens[order[last]];
    bool long_run = last + kWarpSize < N && tokens[order[last + kWarpSize]] == last_token;

    int first = begin + warp;
    if ((run_starts >> warp & 1) && !(long_run && first == last)) {
        int token = tokens[order[first]];
        float sum[P::size] = {};
        add_token_rows(sum, dout, tokens, order, token, first, N, C, column);
        if (column < C)
            for (int k = 0; k < P::size; k++) dwte[size_t(token) * C + column + k] += sum[k];
    }

    if (!long_run) return;
    float sum[P::size] = {};
    for (int piece = last + warp * kWarpSize; piece < N; piece += kTokenWarps * kWarpSize)
        if (add_token_rows(sum, dout, tokens, order, last_token, piece, N, C, column) < kWarpSize) break;
    for (int k = 0; k < P::size; k++) of_warps[warp][lane * P::size + k] = sum[k];
    __syncthreads();
    column = blockIdx.y * kTokenColumns + threadIdx.x;
    if (threadIdx.x >= kTokenColumns || column >= C) return;
    float total = 0;
    for (int w = 0; w < kTokenWarps; w++) total += of_warps[w][threadIdx.x];
    dwte[size_t(last_token) * C + column] += total;
}

// ---------------------------------------------------------------------------------------------------------------------
// LayerNorm and residual

constexpr int kLayerNormWarps = 4;  // of a block of the forward

// One warp per row, the row in registers (above 4096 channels a little spills), `packs` of them in each lane. With add,
// x = a + b, also written to residual; else x = a. Mean and variance take two passes over the registers: no
// cancellation.
template <int packs, bool add>
__global__ void layernorm_forward_kernel(real* residual /*(N,C)*/, real* out /*(N,C)*/, float* mean /*(N)*/,
                                         float* rstd /*(N)*/, const real* a /*(N,C)*/, const real* b /*(N,C)*/,
                                         const real* __restrict__ weight /*(C)*/, const real* __restrict__ bias /*(C)*/,
                                         int N, int C) {
    using P = Pack<real>;
    int lane = threadIdx.x % kWarpSize, row = blockIdx.x * kLayerNormWarps + threadIdx.x / kWarpSize;
    if (row >= N) return;
    size_t offset = size_t(row) * C;

    P x[packs];
    float sum = 0;
    UNROLL
    for (int p = 0; p < packs; p++) {
        int c = (p * kWarpSize + lane) * P::size;
        if (c >= C) continue;
        x[p] = P::load_once(a + offset + c);
        if (add) {
            P y = P::load_once(b + offset + c);
            for (int k = 0; k < P::size; k++) x[p][k] = from_float<real>(to_float(x[p][k]) + to_float(y[k]));
            x[p].store(residual + offset + c);
        }
        for (int k = 0; k < P::size; k++) sum += to_float(x[p][k]);
    }
    float m = warp_sum(sum) / C;

    float squares = 0;
    UNROLL
    for (int p = 0; p < packs; p++) {
        if ((p * kWarpSize + lane) * P::size >= C) continue;
        for (int k = 0; k < P::size; k++) {
            float d = to_float(x[p][k]) - m;
            squares += d * d;
        }
    }
    float s = rsqrtf(warp_sum(squares) / C + kLayerNormEpsilon);

    UNROLL
    for (int p = 0; p < packs; p++) {
        int c = (p * kWarpSize + lane) * P::size;
        if (c >= C) continue;
        P w = P::load(weight + c), shift = P::load(bias + c), y;
        for (int k = 0; k < P::size; k++)
            y[k] = from_float<real>((to_float(x[p][k]) - m) * s * to_float(w[k]) + to_float(shift[k]));
        y.store(out + offset + c);
    }
    if (lane == 0) {
        mean[row] = m;
        rstd[row] = s;
    }
}

// With xhat = (x - mean)*rstd and g = weight*dout:  dx = before + (g - mean_c(g) - xhat*mean_c(g*xhat)) * rstd, and
// three sums over rows: of dout*xhat (dweight), of dout (dbias) and of dx as it is stored, which is the bias gradient
// of the projection whose output was added to the residual stream there.
//
// Three reads and a write per element: the kernel is as fast as its loads overlap with its sums. A block takes `rows`
// rows at a time, which share the barriers of the sums along them. While it computes, cp.async brings the next ones
// into shared memory, where each thread reads back just what it copied itself: no barrier for that, and no registers
// for what is on its way. These hold the three sums over rows: a thread keeps the same columns for all rows of its
// block. At the end add_partials_kernel adds the blocks.
constexpr int kLayerNormThreads = 256;  // at most, of a block whose threads have one pack of a row each

template <int packs /*of a row, per thread*/, int rows>
__global__ void __launch_bounds__(packs == 1 ? kLayerNormThreads : kMaxChannels / Pack<real>::size / packs)
    layernorm_backward_kernel(real* dx /*(N,C)*/, float* partials /*(gridDim.x,3,C)*/,
                              const real* before /*(N,C), may be dx; null: zeros*/, const real* dout /*(N,C)*/,
                              const real* x /*(N,C)*/, const real* __restrict__ weight /*(C)*/,
                              const float* __restrict__ mean /*(N)*/, const float* __restrict__ rstd /*(N)*/, int N,
                              int C) {
    using P = Pack<real>;
    DYNAMIC_SHARED(P, ring);  // (2, rows, {dout, x, before}, packs, blockDim.x)
    auto column = [&](int p) { return (p * int(blockDim.x) + int(threadIdx.x)) * P::size; };
    auto place = [&](int stage, int row, int input, int p) {
        return ring + (((stage * rows + row) * 3 + input) * packs + p) * blockDim.x + threadIdx.x;
    };
    P w[packs];
    float sum_dout_xhat[packs][P::size] = {}, sum_dout[packs][P::size] = {}, sum_dx[packs][P::size] = {};
    UNROLL
    for (int p = 0; p < packs; p++) w[p] = column(p) < C ? P::load(weight + column(p)) : P{};

    // Past the last column and the last row zeros arrive, which add nothing to any sum.
    float next_mean[rows], next_rstd[rows];
    auto fetch = [&](int row0, int stage) {
        UNROLL
        for (int r = 0; r < rows; r++) {
            bool valid = row0 + r < N;
            next_mean[r] = valid ? mean[row0 + r] : 0.0f;
            next_rstd[r] = valid ? rstd[row0 + r] : 0.0f;
            UNROLL
            for (int p = 0; p < packs; p++) {
                bool here = valid && column(p) < C;
                size_t at = here ? size_t(row0 + r) * C + column(p) : 0;
                cp_async_16(place(stage, r, 0, p), dout + at, here);
                cp_async_16(place(stage, r, 1, p), x + at, here);
                cp_async_16(place(stage, r, 2, p), before ? before + at : x, here && before);
            }
        }
        cp_async_commit();
    };

    const int stride = gridDim.x * rows;
    int row0 = blockIdx.x * rows, stage = 0;
    fetch(row0, stage);
    for (; row0 < N; row0 += stride, stage ^= 1) {
        float m[rows], s[rows], sums[2 * rows] = {};  // of g and of g*xhat, for each row
        UNROLL
        for (int r = 0; r < rows; r++) m[r] = next_mean[r], s[r] = next_rstd[r];
        fetch(row0 + stride, stage ^ 1);
        cp_async_wait<1>();
        UNROLL
        for (int r = 0; r < rows; r++) {
            UNROLL
            for (int p = 0; p < packs; p++) {
                P d = *place(stage, r, 0, p), v = *place(stage, r, 1, p);
                for (int k = 0; k < P::size; k++) {
                    float dk = to_float(d[k]), g = to_float(w[p][k]) * dk, xhat = (to_float(v[k]) - m[r]) * s[r];
                    sum_dout_xhat[p][k] += dk * xhat;
                    sum_dout[p][k] += dk;
                    sums[2 * r] += g;
                    sums[2 * r + 1] += g * xhat;
                }
            }
        }
        block_sums(sums);
        UNROLL
        for (int r = 0; r < rows; r++) {
            float mean_g = sums[2 * r] / C, mean_gx = sums[2 * r + 1] / C;
            UNROLL
            for (int p = 0; p < packs; p++) {
                if (row0 + r >= N || column(p) >= C) continue;
                P d = *place(stage, r, 0, p), v = *place(stage, r, 1, p), out = *place(stage, r, 2, p);
                for (int k = 0; k < P::size; k++) {
                    float xhat = (to_float(v[k]) - m[r]) * s[r], g = to_float(w[p][k]) * to_float(d[k]);
                    out[k] = from_float<real>(to_float(out[k]) + (g - mean_g - xhat * mean_gx) * s[r]);
                    sum_dx[p][k] += to_float(out[k]);
                }
                out.store(dx + size_t(row0 + r) * C + column(p));
            }
        }
    }

    float* partial = partials + size_t(blockIdx.x) * 3 * C;
    UNROLL
    for (int p = 0; p < packs; p++) {
        if (column(p) >= C) continue;
        for (int k = 0; k < P::size; k++) {
            partial[column(p) + k] = sum_dout_xhat[p][k];
            partial[C + column(p) + k] = sum_dout[p][k];
            partial[2 * C + column(p) + k] = sum_dx[p][k];
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// GELU: the formulas are at its constants, in common.h.

__device__ inline float gelu_sigmoid(float x) {
    float u = kGeluScale * (x + kGeluCubic * x * x * x);
    return __fdividef(1.0f, 1.0f + expf(-2.0f * u));
}

__global__ void gelu_forward_kernel(real* out, const real* x, size_t n) {
    using P = Pack<real>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * P::size;
    if (i >= n) return;
    P v = P::load_once(x + i), y;
    for (int k = 0; k < P::size; k++) y[k] = from_float<real>(to_float(v[k]) * gelu_sigmoid(to_float(v[k])));
    y.store(out + i);
}

__global__ void gelu_backward_kernel(real* dx /*may be dout*/, const real* dout, const real* x, size_t n) {
    using P = Pack<real>;
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * P::size;
    if (i >= n) return;
    P d = P::load(dout + i), v = P::load_once(x + i), y;
    for (int k = 0; k < P::size; k++) {
        float xk = to_float(v[k]), s = gelu_sigmoid(xk);
        float slope = 2.0f * kGeluScale * (1.0f + 3.0f * kGeluCubic * xk * xk);
        y[k] = from_float<real>(to_float(d[k]) * (s + xk * s * (1.0f - s) * slope));
    }
    y.store(dx + i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Classifier: softmax and cross-entropy, forward and backward in one kernel. One block per row, two passes: the second
// goes backwards over what the first has just left in the caches, so that most of the row is fetched only once.

__device__ inline Pack<real> load_logits(const real* row, int c, int V) {  // masked: -infinity from column V on
    using P = Pack<real>;
    P x = P::load(row + c);
    if (c + P::size > V)
        for (int k = 0; k < P::size; k++)
            if (c + k >= V) x[k] = from_float<real>(-INFINITY);
    return x;
}

// loss = log(sum_i exp(x_i)) - x_target;  dlogits = (softmax - onehot) * dloss, in the place of the logits.
__global__ void __launch_bounds__(1024, 2)
    classifier_kernel(float* losses /*(N)*/, real* logits /*(N,Vp)*/, const int* targets /*(N)*/, float dloss, int V,
                      int Vp, bool write_dlogits) {
    using P = Pack<real>;
    real* row = logits + size_t(blockIdx.x) * Vp;
    int stride = blockDim.x * P::size, target = targets[blockIdx.x];
    float target_logit = to_float(row[target]);

    // Each thread keeps the largest x so far and the sum of exp(x - largest), and rescales the sum when it meets a
    // larger. Not -infinity, so that the difference of two of them is a number, as is kLog2e times the first one. The
    // next pack is on its way while one is worked on. Differences are taken before kLog2e comes in: it would round by
    // the size of x.
    float largest = -FLT_MAX / 2, sum = 0;
    int last = threadIdx.x * P::size;
    P next = {};
    if (last < Vp) next = load_logits(row, last, V);
    for (int c = last; c < Vp; c += stride) {
        const P x = next;
        if (c + stride < Vp) next = load_logits(row, c + stride, V);
        const float before = largest;
        for (int k = 0; k < P::size; k++) largest = fmaxf(largest, to_float(x[k]));
        sum *= fast_exp2((before - largest) * kLog2e);
        for (int k = 0; k < P::size; k++) sum += fast_exp2((to_float(x[k]) - largest) * kLog2e);
        last = c;
    }
    const float row_largest = block_max(largest);
    const float row_sum = block_sum(sum * fast_exp2((largest - row_largest) * kLog2e));
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(row_sum) + row_largest - target_logit;

    if (!write_dlogits) return;
    const float scale = dloss / row_sum;
    if (last < Vp) next = load_logits(row, last, V);
    for (int c = last; c >= 0 && c < Vp; c -= stride) {
        const P x = next;
        if (c - stride >= 0) next = load_logits(row, c - stride, V);
        auto softmax = [&](int k) { return fast_exp2((to_float(x[k]) - row_largest) * kLog2e) * scale; };
        P d;
        for (int k = 0; k < P::size; k++) d[k] = from_float<real>(softmax(k));
        if (target >= c && target < c + P::size)
            for (int k = 0; k < P::size; k++)
                if (c + k == target) d[k] = from_float<real>(softmax(k) - dloss);
        d.store_once(row + c);
    }
}

// One block. Losses are summed in double, in a fixed order.
__global__ void sum_losses_kernel(double* acc, const float* losses /*(n)*/, int n) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += losses[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *acc += sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Column sums in two stages: many blocks each sum some rows, then one kernel adds the blocks.

constexpr int kBiasWarps = 8;
constexpr int kBiasColumns = kWarpSize * Pack<real>::size;  // of one block

// First stage of the bias gradient: a block takes kBiasColumns columns of every gridDim.y-th group of rows.
__global__ void bias_backward_kernel(float* partials /*(gridDim.y,OC)*/, const real* __restrict__ dout /*(N,OC)*/,
                                     int N, int OC) {
    using P = Pack<real>;
    __shared__ float of_warps[kBiasWarps][kBiasColumns];
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int column = blockIdx.x * kBiasColumns + lane * P::size;
    float sum[P::size] = {};
    if (column < OC) {
        UNROLL_BY(4)
        for (int row = blockIdx.y * kBiasWarps + warp; row < N; row += gridDim.y * kBiasWarps) {
            P d = P::load(dout + size_t(row) * OC + column);
            for (int k = 0; k < P::size; k++) sum[k] += to_float(d[k]);
        }
    }
    for (int k = 0; k < P::size; k++) of_warps[warp][lane * P::size + k] = sum[k];
    __syncthreads();
    column = blockIdx.x * kBiasColumns + threadIdx.x;
    if (threadIdx.x >= kBiasColumns || column >= OC) return;
    float total = 0;
    for (int w = 0; w < kBiasWarps; w++) total += of_warps[w][threadIdx.x];
    partials[size_t(blockIdx.y) * OC + column] = total;
}

// Second stage: out[c] += sum over p of partials[p,j,c], where j = blockIdx.y chooses out among three; null: not
// wanted. A block of 32 warps takes 32 columns; its warps share the partials, then each warp adds up one column.
__global__ void add_partials_kernel(float* first /*(C) +=*/, float* second /*(C) +=*/, float* third /*(C) +=*/,
                                    const float* __restrict__ partials /*(P,gridDim.y,C)*/, int P, int C) {
    float* out = blockIdx.y == 0 ? first : blockIdx.y == 1 ? second : third;
    if (out == nullptr) return;
    __shared__ float of_warps[kWarpSize][kWarpSize + 1];  // + 1: columns then lie in different banks
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    int column = blockIdx.x * kWarpSize + lane;
    float sum = 0;
    if (column < C) {
        UNROLL_BY(4)
        for (int p = warp; p < P; p += kWarpSize) sum += partials[(size_t(p) * gridDim.y + blockIdx.y) * C + column];
    }
    of_warps[warp][lane] = sum;
    __syncthreads();
    float total = warp_sum(of_warps[lane][warp]);
    column = blockIdx.x * kWarpSize + warp;
    if (lane == 0 && column < C) out[column] += total;
}

// ---------------------------------------------------------------------------------------------------------------------
// Optimizer. Four elements per thread at a time; the last few of n one by one.

constexpr int kNormThreads = 256;

// Of each block: squares = g.g, and of Muon's blocks dots = g.buf, buf.buf, in double.
__global__ void __launch_bounds__(kNormThreads)
    norm_sums_kernel(double* squares /*(n)*/, double* dots /*(n,2)*/, const float* __restrict__ grads,
                     const float* __restrict__ momentum, const NormBlock* __restrict__ blocks /*(n)*/) {
    const NormBlock block = blocks[blockIdx.x];
    const float *g = grads + block.offset, *buf = momentum + block.state;
    double sums[3] = {};  // g.g, g.buf, buf.buf
    auto add = [&](float g_element, float buf_element) {
        const double x = g_element, y = buf_element;
        sums[0] += x * x;
        sums[1] += x * y;
        sums[2] += y * y;
    };
    const bool aligned = (block.offset | block.state | block.ld) % kQuad == 0;
    const int quads = aligned ? block.cols / kQuad : 0;  // of a row
    if (block.muon) {
        UNROLL_BY(4)
        for (int i = threadIdx.x; i < block.rows * quads; i += kNormThreads) {
            const size_t at = size_t(i / quads) * block.ld + i % quads * kQuad;
            const Quad<float> g4 = Quad<float>::load(g + at), buf4 = Quad<float>::load(buf + at);
            for (int k = 0; k < kQuad; k++) add(g4[k], buf4[k]);
        }
    } else {
        UNROLL_BY(4)
        for (int i = threadIdx.x; i < block.rows * quads; i += kNormThreads) {
            const Quad<float> g4 = Quad<float>::load(g + size_t(i / quads) * block.ld + i % quads * kQuad);
            for (int k = 0; k < kQuad; k++) sums[0] += double(g4[k]) * double(g4[k]);
        }
    }
    const int rest = block.cols - quads * kQuad;  // of a row
    for (int i = threadIdx.x; i < block.rows * rest; i += kNormThreads) {
        const size_t at = size_t(i / rest) * block.ld + quads * kQuad + i % rest;
        add(g[at], block.muon ? buf[at] : 0.0f);
    }
    block_sums(sums);
    if (threadIdx.x != 0) return;
    squares[blockIdx.x] = block.counted ? sums[0] : 0.0;
    dots[2 * blockIdx.x] = sums[1];
    dots[2 * blockIdx.x + 1] = sums[2];
}

// One block. clip[0] = 0 tells the update kernels below to leave everything as it is; t counts the steps in which they
// do not, for AdamW's bias corrections.
__global__ void clip_scale_kernel(float* clip /*(4): scale, norm, 1 - beta1^t, 1 - beta2^t*/, int64_t* t /*(1)*/,
                                  const double* __restrict__ sums /*(n)*/, int n, float max_norm, double beta1,
                                  double beta2) {
    double sum = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) sum += sums[i];
    sum = block_sum(sum);
    if (threadIdx.x != 0) return;
    float norm = float(sqrt(sum));
    clip[0] = !isfinite(norm) ? 0.0f : max_norm > 0 && norm > max_norm ? max_norm / norm : 1.0f;
    clip[1] = norm;
    if (clip[0] == 0) return;
    const double updates = double(++*t);
    clip[2] = 1.0f - float(pow(beta1, updates));
    clip[3] = 1.0f - float(pow(beta2, updates));
}

struct AdamW {
    float lr, beta1, beta2, eps, weight_decay;
};

__device__ inline void adamw_element(float& master, float& m, float& v, float g, const AdamW& h, float correction1,
                                     float correction2) {
    m = h.beta1 * m + (1.0f - h.beta1) * g;
    v = h.beta2 * v + (1.0f - h.beta2) * g * g;
    master = master * (1.0f - h.lr * h.weight_decay) - h.lr * (m / correction1) / (sqrtf(v / correction2) + h.eps);
}

__global__ void adamw_kernel(real* params, float* master, float* m, float* v, const float* __restrict__ grads, size_t n,
                             AdamW h, const float* __restrict__ clip /*(4)*/) {
    const float scale = clip[0], correction1 = clip[2], correction2 = clip[3];
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kQuad;
    if (scale == 0 || i >= n) return;
    if (i + kQuad <= n) {
        Quad<float> w4 = Quad<float>::load(master + i), m4 = Quad<float>::load(m + i), v4 = Quad<float>::load(v + i);
        Quad<float> g4 = Quad<float>::load(grads + i);
        Quad<real> p4;
        for (int k = 0; k < kQuad; k++) {
            adamw_element(w4[k], m4[k], v4[k], g4[k] * scale, h, correction1, correction2);
            p4[k] = from_float<real>(w4[k]);
        }
        w4.store(master + i);
        m4.store(m + i);
        v4.store(v + i);
        p4.store(params + i);
    } else {
        for (; i < n; i++) {
            adamw_element(master[i], m[i], v[i], grads[i] * scale, h, correction1, correction2);
            params[i] = from_float<real>(master[i]);
        }
    }
}

__global__ void cast_params_kernel(real* params, const float* master, size_t n) {
    size_t i = (size_t(blockIdx.x) * blockDim.x + threadIdx.x) * kQuad;
    if (i + kQuad <= n) {
        Quad<float> w = Quad<float>::load(master + i);
        Quad<real> p;
        for (int k = 0; k < kQuad; k++) p[k] = from_float<real>(w[k]);
        p.store(params + i);
    } else {
        for (; i < n; i++) params[i] = from_float<real>(master[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// The launchers

struct GptKernels {
    static void embedding_forward(real* out /*(B,T,C)*/, const int* tokens /*(B,T)*/, const real* wte /*(Vp,C)*/,
                                  const real* wpe /*(maxT,C)*/, int B, int T, int C) {
        LAUNCH(embedding_forward_kernel, B * T, std::min(threads_for(C), 256), 0, out, tokens, wte, wpe, T, C);
    }

    static void embedding_backward(float* dwte /*(Vp,C) +=*/, float* dwpe /*(maxT,C) +=*/, const real* dout /*(B,T,C)*/,
                                   const int* tokens /*(B,T)*/, const int* order /*(B*T) positions sorted by token*/,
                                   int B, int T, int C) {
        LAUNCH(position_backward_kernel, pack_blocks(size_t(T) * C), kThreads, 0, dwpe, dout, B, T, C);
        dim3 grid(ceil_div(B * T, kTokenWarps), ceil_div(C, kTokenColumns));
        LAUNCH(token_backward_kernel, grid, kTokenWarps * kWarpSize, 0, dwte, dout, tokens, order, B * T, C);
    }

    static void layernorm_forward(real* out /*(N,C)*/, float* mean /*(N)*/, float* rstd /*(N)*/,
                                  const real* x /*(N,C)*/, const real* weight /*(C)*/, const real* bias /*(C)*/, int N,
                                  int C) {
        with_packs_per_lane(C, [&](auto packs) {
            LAUNCH((layernorm_forward_kernel<packs, false>), ceil_div(N, kLayerNormWarps), kLayerNormWarps * kWarpSize,
                   0, nullptr, out, mean, rstd, x, nullptr, weight, bias, N, C);
        });
    }

    // residual = a + b, rounded to real; out = LayerNorm(residual)
    static void residual_layernorm_forward(real* residual /*(N,C)*/, real* out /*(N,C)*/, float* mean /*(N)*/,
                                           float* rstd /*(N)*/, const real* a /*(N,C)*/, const real* b /*(N,C)*/,
                                           const real* weight /*(C)*/, const real* bias /*(C)*/, int N, int C) {
        with_packs_per_lane(C, [&](auto packs) {
            LAUNCH((layernorm_forward_kernel<packs, true>), ceil_div(N, kLayerNormWarps), kLayerNormWarps * kWarpSize,
                   0, residual, out, mean, rstd, a, b, weight, bias, N, C);
        });
    }

    static size_t layernorm_scratch_floats(int C) { return size_t(layernorm_backward_blocks(C)) * 3 * C; }

    // dx = before + the gradient of x; dsum += the sum of dx's rows
    static void layernorm_backward(real* dx /*(N,C)*/, float* dweight /*(C) +=*/, float* dbias /*(C) +=*/,
                                   float* dsum /*(C) +=, or null*/,
                                   const real* before /*(N,C), may be dx; null: zeros*/, const real* dout /*(N,C)*/,
                                   const real* x /*(N,C)*/, const real* weight /*(C)*/, const float* mean /*(N)*/,
                                   const float* rstd /*(N)*/, int N, int C,
                                   float* scratch /*layernorm_scratch_floats(C)*/) {
        check_channels(C);
        const bool narrow = threads_for(C) <= kLayerNormThreads;
        auto kernel = narrow ? layernorm_backward_kernel<1, 4> : layernorm_backward_kernel<4, 1>;
        const int blocks = std::min(layernorm_backward_blocks(C), ceil_div(N, narrow ? 4 : 1));
        LAUNCH(kernel, blocks, layernorm_backward_threads(C), layernorm_backward_ring(C), dx, scratch, before, dout, x,
               weight, mean, rstd, N, C);
        LAUNCH(add_partials_kernel, dim3(ceil_div(C, kWarpSize), 3), kWarpSize * kWarpSize, 0, dweight, dbias, dsum,
               scratch, blocks, C);
    }

    static void gelu_forward(real* out, const real* x, size_t n) {
        LAUNCH(gelu_forward_kernel, pack_blocks(n), kThreads, 0, out, x, n);
    }

    static void gelu_backward(real* dx /*may be dout*/, const real* dout, const real* x, size_t n) {
        LAUNCH(gelu_backward_kernel, pack_blocks(n), kThreads, 0, dx, dout, x, n);
    }

    // Columns V..Vp are masked; with write_dlogits the logits become (softmax - onehot)*dloss.
    static void classifier(float* losses /*(N)*/, real* logits /*(N,Vp)*/, const int* targets /*(N)*/, float dloss,
                           int N, int V, int Vp, bool write_dlogits) {
        int threads = std::min(1024, threads_for(ceil_div(Vp, 4)));  // four packs or more per thread
        LAUNCH(classifier_kernel, N, threads, 0, losses, logits, targets, dloss, V, Vp, write_dlogits);
    }

    static void sum_losses(double* acc /*+=*/, const float* losses /*(n)*/, int n) {
        LAUNCH(sum_losses_kernel, 1, 1024, 0, acc, losses, n);
    }

    static size_t bias_scratch_floats(int OC) { return size_t(bias_backward_slices(OC)) * OC; }

    static void bias_backward(float* dbias /*(OC) +=*/, const real* dout /*(N,OC)*/, int N, int OC,
                              float* scratch /*bias_scratch_floats(OC)*/) {
        int slices = std::min(bias_backward_slices(OC), ceil_div(N, kBiasWarps));
        LAUNCH(bias_backward_kernel, dim3(ceil_div(OC, kBiasColumns), slices), kBiasWarps * kWarpSize, 0, scratch, dout,
               N, OC);
        add_partials(dbias, scratch, slices, OC);
    }
    static void add_partials(float* out /*(n) +=*/, const float* partials /*(rows,n)*/, int rows, int n) {
        LAUNCH(add_partials_kernel, ceil_div(n, kWarpSize), kWarpSize * kWarpSize, 0, out, nullptr, nullptr, partials,
               rows, n);
    }

    static void norm_sums(double* squares /*(n)*/, double* dots /*(n,2)*/, const float* grads, const float* momentum,
                          const NormBlock* blocks /*(n), device*/, int n) {
        LAUNCH(norm_sums_kernel, n, kNormThreads, 0, squares, dots, grads, momentum, blocks);
    }

    static void clip_scale(float* clip /*(4)*/, int64_t* t /*(1)*/, const double* sums /*(n)*/, int n, float max_norm,
                           double beta1, double beta2) {
        LAUNCH(clip_scale_kernel, 1, 1024, 0, clip, t, sums, n, max_norm, beta1, beta2);
    }

    static void adamw(real* params, float* master, float* m, float* v, const float* grads, size_t n, float lr,
                      float beta1, float beta2, float eps, float weight_decay, const float* clip /*(4)*/) {
        AdamW h{lr, beta1, beta2, eps, weight_decay};
        if (n > 0) LAUNCH(adamw_kernel, quad_blocks(n), kThreads, 0, params, master, m, v, grads, n, h, clip);
    }

    static void cast_params(real* params, const float* master, size_t n) {
        if (n > 0) LAUNCH(cast_params_kernel, quad_blocks(n), kThreads, 0, params, master, n);
    }

  private:
    static constexpr int kThreads = 256;

    // Threads for one pack each of a row of C elements, in whole warps.
    static int threads_for(int C) { return round_up(ceil_div(C, Pack<real>::size), kWarpSize); }

    static unsigned pack_blocks(size_t n) {
        if (n == 0 || n % Pack<real>::size != 0)
            fail("%zu elements do not divide into packs; sizes must be multiples of 8", n);
        return unsigned(ceil_div(n, size_t(kThreads) * Pack<real>::size));
    }
    static unsigned quad_blocks(size_t n) { return unsigned(ceil_div(n, size_t(kThreads) * kQuad)); }

    static void check_channels(int C) {
        if (C % 8 != 0 || C > kMaxChannels)
            fail("%d channels: LayerNorm handles multiples of 8 up to %d", C, kMaxChannels);
    }

    // Calls f with the number of packs of a row that each lane of a warp holds, as a compile-time constant.
    template <class F>
    static void with_packs_per_lane(int C, F f) {
        check_channels(C);
        int packs = ceil_div(C, kWarpSize * Pack<real>::size);
        if (packs <= 2) f(std::integral_constant<int, 2>());
        else if (packs <= 3) f(std::integral_constant<int, 3>());  // bf16: C = 768
        else if (packs <= 4) f(std::integral_constant<int, 4>());  // 1024
        else if (packs <= 5) f(std::integral_constant<int, 5>());  // 1280
        else if (packs <= 7) f(std::integral_constant<int, 7>());  // 1600
        else if (packs <= 16) f(std::integral_constant<int, 16>());
        else f(std::integral_constant<int, kMaxChannels / kWarpSize / Pack<real>::size>());
    }

    static int layernorm_backward_threads(int C) {
        return threads_for(C) <= kLayerNormThreads ? threads_for(C) : threads_for(ceil_div(C, 4));
    }
    // Bytes: two stages of dout, x and before, of each four packs per thread
    static size_t layernorm_backward_ring(int C) {
        return size_t(2 * 3 * 4) * layernorm_backward_threads(C) * sizeof(Pack<real>);
    }
    // As many as an H100's shared memory holds at once, at most 16 on each multiprocessor.
    static int layernorm_backward_blocks(int C) {
        return kMultiprocessors * int(std::clamp<size_t>((224 << 10) / (layernorm_backward_ring(C) + 2048), 1, 16));
    }
    // Eight blocks of 256 threads on each multiprocessor, spread over the columns first.
    static int bias_backward_slices(int OC) { return std::max(1, kMultiprocessors * 8 / ceil_div(OC, kBiasColumns)); }
};
