// attention_backward.cu: causal attention, backward, in four versions of one idea each. The last two are the trainer's:
// flash_dq_kernel and flash_dkv_kernel (../kernels/attention.cuh), and on a GPU of sm_90 hopper_dq_kernel and
// hopper_dkv_kernel (../kernels/attention_hopper.cuh). All recompute P from the lse that the forward kept; the forward
// itself is not timed.
//
// Every version is judged by the five products over the lower triangle that a backward needs (S, dP, dV, dQ, dK). All
// of these do seven: S and dP once for dQ and once for dK and dV, so that no block adds to what another one writes. The
// same bits in every run come free with it. "Measured" is one H200 and the gain over the rung before.
#include "attention.h"

// delta[t] = dO[t] . O[t], one warp per row (rungs 1 and 2; the trainer's dQ kernels do it on the way).
__global__ void row_deltas(float* delta, const bf16* dout, const bf16* out, int T, int C) {
    const size_t row = size_t(blockIdx.x) * blockDim.y + threadIdx.y;  // (b * H + h) * T + t
    const int H = C / kHD;
    const size_t at = (row / T / H * T + row % T) * C + row / T % H * kHD;
    float sum = 0;
    for (int d = threadIdx.x; d < kHD; d += kWarpSize) sum += to_float(dout[at + d]) * to_float(out[at + d]);
    sum = warp_sum(sum);
    if (threadIdx.x == 0) delta[row] = sum;
}

// 1. A thread per query makes a row of dQ, then a thread per key makes a row of dK and of dV. Own rows and sums live in
//    registers, the other side is met row by row, from L1: 32 lanes read the same row at the same time.
//    Measured: 61 ms.
__global__ void __launch_bounds__(128) dq_1(bf16* dqkv, const float* delta, const bf16* dout, const bf16* qkv,
                                            const float* lse, int T, int C, float scale) {
    const int head = blockIdx.y, H = C / kHD, t = (gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x;
    const size_t at = size_t(head / H) * T * 3 * C + head % H * kHD;
    float q[kHD], d_out[kHD], dq[kHD] = {};
    for (int d = 0; d < kHD; d++) {
        q[d] = to_float(qkv[at + size_t(t) * 3 * C + d]) * scale;
        d_out[d] = to_float(dout[(size_t(head / H) * T + t) * C + head % H * kHD + d]);
    }
    const float row_lse = lse[size_t(head) * T + t], row_delta = delta[size_t(head) * T + t];
    for (int s = 0; s <= t; s++) {
        const bf16 *k = qkv + at + size_t(s) * 3 * C + C, *v = k + C;
        float score = 0, dp = 0;
        UNROLL
        for (int d = 0; d < kHD; d++) score += q[d] * to_float(k[d]), dp += d_out[d] * to_float(v[d]);
        const float ds = __expf(score - row_lse) * (dp - row_delta);
        UNROLL
        for (int d = 0; d < kHD; d++) dq[d] += ds * to_float(k[d]);
    }
    for (int d = 0; d < kHD; d++) dqkv[at + size_t(t) * 3 * C + d] = from_float<bf16>(dq[d] * scale);
}
__global__ void __launch_bounds__(128) dkv_1(bf16* dqkv, const float* delta, const bf16* dout, const bf16* qkv,
                                             const float* lse, int T, int C, float scale) {
    const int head = blockIdx.y, H = C / kHD, s = blockIdx.x * blockDim.x + threadIdx.x;
    const size_t at = size_t(head / H) * T * 3 * C + head % H * kHD;
    const bf16 *k = qkv + at + size_t(s) * 3 * C + C, *v = k + C;  // read again and again: four rows of floats do not
    float dk[kHD] = {}, dv[kHD] = {};                              // fit into 255 registers
    for (int t = blockIdx.x * blockDim.x; t < T; t++) {
        const bf16 *q = qkv + at + size_t(t) * 3 * C, *d_out = dout + (size_t(head / H) * T + t) * C + head % H * kHD;
        float score = 0, dp = 0;
        UNROLL
        for (int d = 0; d < kHD; d += 8) {
            const Pack<bf16> x = Pack<bf16>::load(k + d), y = Pack<bf16>::load(v + d);
            for (int j = 0; j < 8; j++) {
                score += to_float(x[j]) * to_float(q[d + j]);
                dp += to_float(y[j]) * to_float(d_out[d + j]);
            }
        }
        const float p = s <= t ? __expf(score * scale - lse[size_t(head) * T + t]) : 0;
        const float ds = p * (dp - delta[size_t(head) * T + t]);
        UNROLL
        for (int d = 0; d < kHD; d++) dv[d] += p * to_float(d_out[d]), dk[d] += ds * to_float(q[d]);
    }
    for (int d = 0; d < kHD; d++) {
        dqkv[at + size_t(s) * 3 * C + C + d] = from_float<bf16>(dk[d] * scale);
        dqkv[at + size_t(s) * 3 * C + 2 * C + d] = from_float<bf16>(dv[d]);
    }
}

// 2. The rows that pass by come in tiles of 32, through shared memory and as float, read four channels at a time.
//    Expected: no conversions and a quarter of the loads in the inner loops; what is left is bound by the fp32 units.
//    Measured: 21.7 ms, 2.8 times as fast.
constexpr int kRows = 32;
__device__ void load_tile(float4 (*x)[kHD / 4], const bf16* from, int stride) {
    for (int i = threadIdx.x; i < kRows * kHD / 8; i += blockDim.x) {
        const Pack<bf16> pack = Pack<bf16>::load(from + size_t(i / (kHD / 8)) * stride + i % (kHD / 8) * 8);
        float* to = &x[0][0].x + i * 8;
        for (int j = 0; j < 8; j++) to[j] = to_float(pack[j]);
    }
}
__device__ float dot(const float (&x)[kHD], const float4 (&y)[kHD / 4]) {
    float sum = 0;
    UNROLL
    for (int d = 0; d < kHD / 4; d++) {
        const float4 z = y[d];
        sum += x[4 * d] * z.x + x[4 * d + 1] * z.y + x[4 * d + 2] * z.z + x[4 * d + 3] * z.w;
    }
    return sum;
}
__device__ void add(float (&sum)[kHD], float factor, const float4 (&x)[kHD / 4]) {
    UNROLL
    for (int d = 0; d < kHD / 4; d++) {
        const float4 z = x[d];
        sum[4 * d] += factor * z.x, sum[4 * d + 1] += factor * z.y;
        sum[4 * d + 2] += factor * z.z, sum[4 * d + 3] += factor * z.w;
    }
}
__global__ void __launch_bounds__(128) dq_2(bf16* dqkv, const float* delta, const bf16* dout, const bf16* qkv,
                                            const float* lse, int T, int C, float scale) {
    __shared__ float4 k[kRows][kHD / 4], v[kRows][kHD / 4];
    const int head = blockIdx.y, H = C / kHD, first = (gridDim.x - 1 - blockIdx.x) * blockDim.x;
    const int t = first + threadIdx.x;
    const size_t at = size_t(head / H) * T * 3 * C + head % H * kHD;
    float q[kHD], d_out[kHD], dq[kHD] = {};
    for (int d = 0; d < kHD; d++) {
        q[d] = to_float(qkv[at + size_t(t) * 3 * C + d]) * scale;
        d_out[d] = to_float(dout[(size_t(head / H) * T + t) * C + head % H * kHD + d]);
    }
    const float row_lse = lse[size_t(head) * T + t], row_delta = delta[size_t(head) * T + t];
    for (int tile = 0; tile < first + int(blockDim.x); tile += kRows) {
        __syncthreads();
        load_tile(k, qkv + at + size_t(tile) * 3 * C + C, 3 * C);
        load_tile(v, qkv + at + size_t(tile) * 3 * C + 2 * C, 3 * C);
        __syncthreads();
        for (int s = 0; s < kRows; s++) {
            const float p = tile + s <= t ? __expf(dot(q, k[s]) - row_lse) : 0;
            add(dq, p * (dot(d_out, v[s]) - row_delta), k[s]);
        }
    }
    for (int d = 0; d < kHD; d++) dqkv[at + size_t(t) * 3 * C + d] = from_float<bf16>(dq[d] * scale);
}
// Two threads per key, each with half the channels of dK and dV, so that all of it fits into registers.
__global__ void __launch_bounds__(128) dkv_2(bf16* dqkv, const float* delta, const bf16* dout, const bf16* qkv,
                                             const float* lse, int T, int C, float scale) {
    constexpr int half = kHD / 2;
    __shared__ float4 q[kRows][kHD / 4], d_out[kRows][kHD / 4];
    const int head = blockIdx.y, H = C / kHD, first = blockIdx.x * blockDim.x / 2;
    const int s = first + threadIdx.x / 2, part = threadIdx.x % 2;
    const size_t at = size_t(head / H) * T * 3 * C + head % H * kHD;
    const bf16* own = qkv + at + size_t(s) * 3 * C + C + part * half;
    float k[half], v[half], dk[half] = {}, dv[half] = {};
    for (int d = 0; d < half; d++) k[d] = to_float(own[d]), v[d] = to_float(own[C + d]);
    for (int tile = first / kRows * kRows; tile < T; tile += kRows) {
        __syncthreads();
        load_tile(q, qkv + at + size_t(tile) * 3 * C, 3 * C);
        load_tile(d_out, dout + (size_t(head / H) * T + tile) * C + head % H * kHD, C);
        __syncthreads();
        for (int t = 0; t < kRows; t++) {
            const float4 *x = q[t] + part * half / 4, *y = d_out[t] + part * half / 4;
            float score = 0, dp = 0;
            UNROLL
            for (int d = 0; d < half / 4; d++) {
                score += k[4 * d] * x[d].x + k[4 * d + 1] * x[d].y + k[4 * d + 2] * x[d].z + k[4 * d + 3] * x[d].w;
                dp += v[4 * d] * y[d].x + v[4 * d + 1] * y[d].y + v[4 * d + 2] * y[d].z + v[4 * d + 3] * y[d].w;
            }
            score += __shfl_xor_sync(kAllLanes, score, 1);
            dp += __shfl_xor_sync(kAllLanes, dp, 1);
            const size_t row = size_t(head) * T + tile + t;
            const float p = s <= tile + t ? __expf(score * scale - lse[row]) : 0, ds = p * (dp - delta[row]);
            UNROLL
            for (int d = 0; d < half / 4; d++) {
                dv[4 * d] += p * y[d].x, dv[4 * d + 1] += p * y[d].y;
                dv[4 * d + 2] += p * y[d].z, dv[4 * d + 3] += p * y[d].w;
                dk[4 * d] += ds * x[d].x, dk[4 * d + 1] += ds * x[d].y;
                dk[4 * d + 2] += ds * x[d].z, dk[4 * d + 3] += ds * x[d].w;
            }
        }
    }
    bf16* to = dqkv + at + size_t(s) * 3 * C + C + part * half;
    for (int d = 0; d < half; d++) to[d] = from_float<bf16>(dk[d] * scale), to[C + d] = from_float<bf16>(dv[d]);
}

// 3. Tensor cores by mma.sync: the trainer's kernels for all GPUs. A warp owns 16 rows; P and dS go from the registers
//    of one product to those of the next. Expected: tensor cores at half of their peak, kept waiting by ldmatrix.
//    Measured: 1.26 ms, 17 times as fast, 205 TFLOP/s of the five products, 287 of the seven.
// 4. wgmma and TMA: the trainer's kernels for Hopper. A warpgroup owns 64 rows, operands come straight from shared
//    memory, the next two products are issued before the sums over this tile. Expected: 0.95 ms; at the peak of the
//    tensor cores 0.42. Measured: 0.78 ms, 1.6 times as fast.

static bool ladder() {
    const size_t tokens = size_t(kB) * kT;
    const std::vector<uint16_t> inputs = to_bf16(normal(tokens * 3 * kC, 1)),
                                gradients = to_bf16(normal(tokens * kC, 2));
    DeviceArray<uint16_t> device_qkv(inputs), device_dout(gradients), device_out(tokens * kC),
        device_dqkv(tokens * 3 * kC);
    DeviceArray<float> lse(size_t(kB) * kH * kT), delta(size_t(kB) * kH * kT);
    bf16 *qkv = device_qkv.as<bf16>(), *dout = device_dout.as<bf16>(), *out = device_out.as<bf16>();
    bf16* dqkv = device_dqkv.as<bf16>();
    const HeadTruth first(inputs, gradients, 0, 0), last(inputs, gradients, kB - 1, kH - 1);
    Attention::attention_forward(out, lse, qkv, kB, kT, kC, kH);

    bool right = true;
    printf("\nattention backward, B %d, T %d, %d heads of %d\n", kB, kT, kH, kHD);
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemset(device_dqkv, 0xff, device_dqkv.bytes()));
        const float ms = median_ms([&](int) { run(); });
        const auto got = device_dqkv.download(tokens * 3 * kC);
        double error = 0;
        for (int part = 0; part < 3; part++) {
            auto of = [&](const HeadTruth& head) { return part == 0 ? head.dq : part == 1 ? head.dk : head.dv; };
            error = std::max({error, relative_error(HeadTruth::column(got, 3, part, 0, 0), of(first)),
                              relative_error(HeadTruth::column(got, 3, part, kB - 1, kH - 1), of(last))});
        }
        right &= print_rung(name, ms, 5 * kProduct, "TFLOP/s", error, kLimit);
    };
    auto deltas = [&] { LAUNCH(row_deltas, kB * kH * kT / 4, dim3(32, 4), 0, delta, dout, out, kT, kC); };
    rung("1  a thread per row", [&] {
        deltas();
        LAUNCH(dq_1, dim3(kT / 128, kB * kH), 128, 0, dqkv, delta, dout, qkv, lse, kT, kC, kScale);
        LAUNCH(dkv_1, dim3(kT / 128, kB * kH), 128, 0, dqkv, delta, dout, qkv, lse, kT, kC, kScale);
    });
    rung("2  tiles of 32 rows in shared memory", [&] {
        deltas();
        LAUNCH(dq_2, dim3(kT / 128, kB * kH), 128, 0, dqkv, delta, dout, qkv, lse, kT, kC, kScale);
        LAUNCH(dkv_2, dim3(kT / 64, kB * kH), 128, 0, dqkv, delta, dout, qkv, lse, kT, kC, kScale);
    });
    // These two also sum the rows of dqkv, which the figures above do not contain.
    portable_kernels = true;
    DeviceArray<float> dbias(3 * kC),
        scratch(std::max(Attention::attention_scratch_floats(kB, kT, kC, kH), attention_row_sums(kB, kT, kC)));
    auto trainer = [&] {
        Attention::attention_backward(dqkv, dbias, delta, dout, qkv, out, lse, kB, kT, kC, kH, scratch);
    };
    rung("3  mma.sync, the trainer's on any GPU", trainer);
    portable_kernels = false;
    if (Attention::on_hopper(kHD)) rung("4  wgmma and TMA, the trainer's on sm_90", trainer);
    return right;
}

int main() { return run_ladder(ladder); }
