// attention_forward.cu: causal attention, forward, in five versions of one idea each. The last two are the trainer's:
// flash_forward_kernel (../kernels/attention.cuh), and on a GPU of sm_90 hopper_forward_kernel
// (../kernels/attention_hopper.cuh).
//
// Every version is judged by the two products over the lower triangle, 2 * 2 B H HD T^2 / 2 operations: what it
// computes above the diagonal does not count. "Measured" is one H200 and the gain over the rung before.
#include "attention.h"

// 1. The definition, with scores in memory. One thread per score; then one warp per row for the softmax; then one
//    thread per element of the result. S is (B, H, T, T) in fp32: 1.6 GB under the diagonal, written twice and read
//    four times, where q, k, v are 0.3; and every thread loads two numbers for two operations. Measured: 123 ms.
__global__ void scores_1(float* S, const bf16* qkv, int T, int C, float scale) {
    const int s = blockIdx.x * blockDim.x + threadIdx.x, t = blockIdx.y, head = blockIdx.z, H = C / kHD;
    if (s > t) return;
    const bf16* q = qkv + (size_t(head / H) * T + t) * 3 * C + head % H * kHD;
    const bf16* k = qkv + (size_t(head / H) * T + s) * 3 * C + C + head % H * kHD;
    float sum = 0;
    for (int d = 0; d < kHD; d++) sum += to_float(q[d]) * to_float(k[d]);
    S[(size_t(head) * T + t) * T + s] = scale * sum;
}
__global__ void softmax_1(float* S, float* lse, int T) {
    const size_t row = size_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const int columns = row % T + 1;
    float* x = S + row * T;
    float largest = -INFINITY, sum = 0;
    for (int s = threadIdx.x; s < columns; s += kWarpSize) largest = fmaxf(largest, x[s]);
    largest = warp_max(largest);
    for (int s = threadIdx.x; s < columns; s += kWarpSize) sum += __expf(x[s] - largest);
    sum = warp_sum(sum);
    for (int s = threadIdx.x; s < columns; s += kWarpSize) x[s] = __expf(x[s] - largest) / sum;
    if (threadIdx.x == 0) lse[row] = largest + logf(sum);
}
__global__ void output_1(bf16* out, const float* P, const bf16* qkv, int T, int C) {
    const int d = threadIdx.x, t = blockIdx.x * blockDim.y + threadIdx.y, head = blockIdx.y, H = C / kHD;
    const bf16* v = qkv + size_t(head / H) * T * 3 * C + 2 * C + head % H * kHD + d;
    float sum = 0;
    for (int s = 0; s <= t; s++) sum += P[(size_t(head) * T + t) * T + s] * to_float(v[size_t(s) * 3 * C]);
    out[(size_t(head / H) * T + t) * C + head % H * kHD + d] = from_float<bf16>(sum);
}

// 2. No scores in memory: a thread owns a query and meets its keys one by one, with the online softmax (attention.cuh
//    says how), q and the sum in registers. Expected: no S, and the 32 queries of a warp read the same key at the same
//    time, one load for 64 operations.
//    Measured: 20.2 ms, 6.1 times as fast.
__global__ void __launch_bounds__(128) forward_2(bf16* out, float* lse, const bf16* qkv, int T, int C, float scale) {
    const int head = blockIdx.y, H = C / kHD, t = (gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x;
    const bf16* of_head = qkv + size_t(head / H) * T * 3 * C + head % H * kHD;
    float q[kHD], o[kHD] = {}, m = -INFINITY, l = 0;
    for (int d = 0; d < kHD; d++) q[d] = to_float(of_head[size_t(t) * 3 * C + d]) * scale;
    for (int s = 0; s <= t; s++) {
        const bf16 *k = of_head + size_t(s) * 3 * C + C, *v = k + C;
        float score = 0;
        UNROLL
        for (int d = 0; d < kHD; d++) score += q[d] * to_float(k[d]);
        const float m_new = fmaxf(m, score), correction = __expf(m - m_new), p = __expf(score - m_new);
        m = m_new;
        l = l * correction + p;
        UNROLL
        for (int d = 0; d < kHD; d++) o[d] = o[d] * correction + p * to_float(v[d]);
    }
    for (int d = 0; d < kHD; d++) out[(size_t(head / H) * T + t) * C + head % H * kHD + d] = from_float<bf16>(o[d] / l);
    lse[size_t(head) * T + t] = m + logf(l);
}

// 3. Tiles of 32 keys in shared memory, as float, for the 128 queries of a block, read four channels at a time (the
//    same address for all lanes: a broadcast), and the largest score of a tile found before its exponentials, so that
//    the sum is rescaled once per tile instead of once per key. Expected: bound by the fp32 units, 67 TFLOP/s at best.
//    Measured: 7.0 ms, 2.9 times as fast, a fifth of that bound.
__global__ void __launch_bounds__(128) forward_3(bf16* out, float* lse, const bf16* qkv, int T, int C, float scale) {
    constexpr int keys = 32;
    __shared__ float4 k[keys][kHD / 4], v[keys][kHD / 4];
    const int head = blockIdx.y, H = C / kHD, first = (gridDim.x - 1 - blockIdx.x) * blockDim.x;
    const int t = first + threadIdx.x;
    const bf16* of_head = qkv + size_t(head / H) * T * 3 * C + head % H * kHD;
    float q[kHD], o[kHD] = {}, m = -INFINITY, l = 0;
    for (int d = 0; d < kHD; d++) q[d] = to_float(of_head[size_t(t) * 3 * C + d]) * scale;
    for (int tile = 0; tile < first + int(blockDim.x); tile += keys) {
        __syncthreads();
        for (int i = threadIdx.x; i < keys * kHD / 8; i += blockDim.x) {
            const bf16* from = of_head + size_t(tile + i / (kHD / 8)) * 3 * C + C + i % (kHD / 8) * 8;
            const Pack<bf16> x = Pack<bf16>::load(from), y = Pack<bf16>::load(from + C);
            float *k_to = &k[0][0].x + i * 8, *v_to = &v[0][0].x + i * 8;
            for (int j = 0; j < 8; j++) k_to[j] = to_float(x[j]), v_to[j] = to_float(y[j]);
        }
        __syncthreads();
        float p[keys], m_new = m;
        UNROLL
        for (int s = 0; s < keys; s++) {
            float score = 0;
            UNROLL
            for (int d = 0; d < kHD / 4; d++) {
                const float4 x = k[s][d];
                score += q[4 * d] * x.x + q[4 * d + 1] * x.y + q[4 * d + 2] * x.z + q[4 * d + 3] * x.w;
            }
            p[s] = tile + s <= t ? score : -INFINITY;
            m_new = fmaxf(m_new, p[s]);
        }
        const float correction = __expf(m - m_new);
        m = m_new;
        l *= correction;
        for (int d = 0; d < kHD; d++) o[d] *= correction;
        UNROLL
        for (int s = 0; s < keys; s++) {
            p[s] = __expf(p[s] - m);
            l += p[s];
            UNROLL
            for (int d = 0; d < kHD / 4; d++) {
                const float4 x = v[s][d];
                o[4 * d] += p[s] * x.x, o[4 * d + 1] += p[s] * x.y;
                o[4 * d + 2] += p[s] * x.z, o[4 * d + 3] += p[s] * x.w;
            }
        }
    }
    for (int d = 0; d < kHD; d++) out[(size_t(head / H) * T + t) * C + head % H * kHD + d] = from_float<bf16>(o[d] / l);
    lse[size_t(head) * T + t] = m + logf(l);
}

// 4. Tensor cores by mma.sync: FlashAttention-2, the trainer's kernel for all GPUs. A warp owns 16 queries; tiles come
//    by cp.async while the last one is computed; scores stay in registers from the first product to the second.
//    Expected: at best 60% of what wgmma can reach, less the time in which tensor cores wait for exponentials.
//    Measured: 0.43 ms, 16 times as fast, 240 TFLOP/s.
// 5. wgmma and TMA: the trainer's kernel for Hopper. A warpgroup owns 64 queries and multiplies with tiles straight
//    from shared memory; one warp only copies; several warpgroups of a multiprocessor, and two products under way in
//    each, overlap exponentials with products. Expected: 0.28 ms; with everything overlapped 0.13, since one
//    multiprocessor makes 16 exponentials a clock, and needs 1 for 256 operations of its tensor cores, which do 4096.
//    Measured: 0.27 ms, 1.6 times as fast. ../dev/results/attention.md says what it waits for.

static bool ladder() {
    const size_t tokens = size_t(kB) * kT;
    const std::vector<uint16_t> inputs = to_bf16(normal(tokens * 3 * kC, 1)), dout(tokens * kC);
    DeviceArray<uint16_t> device_qkv(inputs), device_out(tokens * kC);
    DeviceArray<float> lse(size_t(kB) * kH * kT);
    bf16 *qkv = device_qkv.as<bf16>(), *out = device_out.as<bf16>();
    const HeadTruth first(inputs, dout, 0, 0), last(inputs, dout, kB - 1, kH - 1);

    bool right = true;
    printf("\nattention forward, B %d, T %d, %d heads of %d\n", kB, kT, kH, kHD);
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemset(device_out, 0xff, device_out.bytes()));
        const float ms = median_ms([&](int) { run(); });
        const auto got = device_out.download(tokens * kC);
        const double error = std::max(relative_error(HeadTruth::column(got, 1, 0, 0, 0), first.out),
                                      relative_error(HeadTruth::column(got, 1, 0, kB - 1, kH - 1), last.out));
        right &= print_rung(name, ms, 2 * kProduct, "TFLOP/s", error, kLimit);
    };
    {
        DeviceArray<float> S(size_t(kB) * kH * kT * kT);
        rung("1  scores in memory", [&] {
            LAUNCH(scores_1, dim3(kT / 128, kT, kB * kH), 128, 0, S, qkv, kT, kC, kScale);
            LAUNCH(softmax_1, kB * kH * kT / 4, dim3(32, 4), 0, S, lse, kT);
            LAUNCH(output_1, dim3(kT / 4, kB * kH), dim3(kHD, 4), 0, out, S, qkv, kT, kC);
        });
    }
    rung("2  online softmax, a thread per query",
         [&] { LAUNCH(forward_2, dim3(kT / 128, kB * kH), 128, 0, out, lse, qkv, kT, kC, kScale); });
    rung("3  tiles of 32 keys in shared memory",
         [&] { LAUNCH(forward_3, dim3(kT / 128, kB * kH), 128, 0, out, lse, qkv, kT, kC, kScale); });
    portable_kernels = true;
    rung("4  mma.sync, the trainer's on any GPU", [&] { Attention::attention_forward(out, lse, qkv, kB, kT, kC, kH); });
    portable_kernels = false;
    if (Attention::on_hopper(kHD))
        rung("5  wgmma and TMA, the trainer's on sm_90",
             [&] { Attention::attention_forward(out, lse, qkv, kB, kT, kC, kH); });
    return right;
}

int main() { return run_ladder(ladder); }
