// layernorm_forward.cu: five versions of one kernel, one idea each. The last one is the trainer's.
//
//     out[row] = (x[row] - mean) * rstd * weight + bias
//
// with the mean, and rstd = 1 / sqrt(variance + 1e-5), over the C channels of the row.
//
// x and out are (N, C) in bf16. There is next to no arithmetic: a perfect kernel reads x once, writes out once, and so
// runs as fast as a copy. Every version is therefore judged by bytes per second (those that must move, not those that
// it moves), beside the bandwidth of a copy on the same GPU.
#include "../kernels/gpt_kernels.cuh"
#include "bench.h"

// 1. One thread per row, the definition as it stands: three walks over the row. Neighbouring threads are a whole row
//    apart, so each of a warp's loads touches 32 different cache lines for 2 bytes each.
__global__ void layernorm_1(real* out, float* mean, float* rstd, const real* x, const real* weight, const real* bias,
                            int N, int C) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= N) return;
    x += size_t(row) * C;
    out += size_t(row) * C;
    float m = 0, v = 0;
    for (int c = 0; c < C; c++) m += to_float(x[c]);
    m /= C;
    for (int c = 0; c < C; c++) v += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    float s = rsqrtf(v / C + kLayerNormEpsilon);
    for (int c = 0; c < C; c++)
        out[c] = from_float<real>((to_float(x[c]) - m) * s * to_float(weight[c]) + to_float(bias[c]));
    mean[row] = m;
    rstd[row] = s;
}

// 2. One warp per row: lane l takes channels l, l + 32, ...: the lanes of a load are neighbours (coalescing). Sums go
//    over the warp by shuffles. The row is still walked over three times, but the second and third time it comes from
//    the L1 cache.
__global__ void layernorm_2(real* out, float* mean, float* rstd, const real* x, const real* weight, const real* bias,
                            int N, int C) {
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= N) return;
    x += size_t(row) * C;
    out += size_t(row) * C;
    float m = 0, v = 0;
    for (int c = lane; c < C; c += 32) m += to_float(x[c]);
    m = warp_sum(m) / C;
    for (int c = lane; c < C; c += 32) v += (to_float(x[c]) - m) * (to_float(x[c]) - m);
    float s = rsqrtf(warp_sum(v) / C + kLayerNormEpsilon);
    for (int c = lane; c < C; c += 32)
        out[c] = from_float<real>((to_float(x[c]) - m) * s * to_float(weight[c]) + to_float(bias[c]));
    if (lane == 0) mean[row] = m, rstd[row] = s;
}

// 3. 16 bytes per access (eight bf16): an eighth of the load and store instructions, and eight times the bytes under
//    way for each.
__global__ void layernorm_3(real* out, float* mean, float* rstd, const real* x, const real* weight, const real* bias,
                            int N, int C) {
    using P = Pack<real>;
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= N) return;
    x += size_t(row) * C;
    out += size_t(row) * C;
    float m = 0, v = 0;
    for (int c = lane * P::size; c < C; c += 32 * P::size) {
        P values = P::load(x + c);
        for (int k = 0; k < P::size; k++) m += to_float(values[k]);
    }
    m = warp_sum(m) / C;
    for (int c = lane * P::size; c < C; c += 32 * P::size) {
        P values = P::load(x + c);
        for (int k = 0; k < P::size; k++) v += (to_float(values[k]) - m) * (to_float(values[k]) - m);
    }
    float s = rsqrtf(warp_sum(v) / C + kLayerNormEpsilon);
    for (int c = lane * P::size; c < C; c += 32 * P::size) {
        P values = P::load(x + c), w = P::load(weight + c), b = P::load(bias + c);
        for (int k = 0; k < P::size; k++)
            values[k] = from_float<real>((to_float(values[k]) - m) * s * to_float(w[k]) + to_float(b[k]));
        values.store(out + c);
    }
    if (lane == 0) mean[row] = m, rstd[row] = s;
}

// 4. The row stays in registers: one walk. The number of packs per lane must be a constant, or the array would lie in
//    local memory; and as all loads are known before the first is used, they are all under way at once.
template <int packs>
__global__ void layernorm_4(real* out, float* mean, float* rstd, const real* x, const real* weight, const real* bias,
                            int N, int C) {
    using P = Pack<real>;
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= N) return;
    x += size_t(row) * C;
    out += size_t(row) * C;
    P values[packs];
    float m = 0, v = 0;
    UNROLL
    for (int p = 0; p < packs; p++) values[p] = P::load(x + (p * 32 + lane) * P::size);
    UNROLL
    for (int p = 0; p < packs; p++)
        for (int k = 0; k < P::size; k++) m += to_float(values[p][k]);
    m = warp_sum(m) / C;
    UNROLL
    for (int p = 0; p < packs; p++)
        for (int k = 0; k < P::size; k++) v += (to_float(values[p][k]) - m) * (to_float(values[p][k]) - m);
    float s = rsqrtf(warp_sum(v) / C + kLayerNormEpsilon);
    UNROLL
    for (int p = 0; p < packs; p++) {
        int c = (p * 32 + lane) * P::size;
        P w = P::load(weight + c), b = P::load(bias + c);
        for (int k = 0; k < P::size; k++)
            values[p][k] = from_float<real>((to_float(values[p][k]) - m) * s * to_float(w[k]) + to_float(b[k]));
        values[p].store(out + c);
    }
    if (lane == 0) mean[row] = m, rstd[row] = s;
}

// 5. The trainer's, in ../gpt_kernels.cuh: as 4, for any C that is a multiple of 8, with the residual addition fused in
//    where there is one; x is loaded with the hint that it is not needed again, so that it pushes nothing else out of
//    the cache.

static bool ladder() {
    // 64 sequences of GPT-2 124M: 96 MiB in, 96 MiB out, each twice an H100's L2; and x alternates between two buffers.
    const int N = 64 * 1024, C = 768, threads = 128, copies = 2;
    printf("LayerNorm forward, (%d, %d); a copy runs at %.0f GB/s\n", N, C, copy_bandwidth());

    std::vector<uint16_t> x = to_bf16(normal(size_t(N) * C, 1));
    std::vector<uint16_t> weight = to_bf16(normal(C, 2)), bias = to_bf16(normal(C, 3));
    std::vector<float> want(size_t(N) * C), want_mean(N), want_rstd(N);
    CpuOps::layernorm_forward(want.data(), want_mean.data(), want_rstd.data(), from_bf16(x).data(),
                              from_bf16(weight).data(), from_bf16(bias).data(), N, C);

    DeviceArray<uint16_t> x_0(x), x_1(x), device_weight(weight), device_bias(bias), device_out(x.size());
    const real* xs[copies] = {x_0.as<real>(), x_1.as<real>()};
    const real *w = device_weight.as<real>(), *b = device_bias.as<real>();
    real* out = device_out.as<real>();
    DeviceArray<float> mean(N), rstd(N);
    bool right = true;
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemset(device_out, 0xff, device_out.bytes()));  // NaN: what is not written is seen
        float ms = median_ms([&](int i) { run(xs[i % copies]); });
        std::vector<float> got = from_bf16(device_out.download(want.size()));
        double error = 0;
        for (size_t i = 0; i < want.size(); i++) {
            double e = std::fabs(got[i] - want[i]) / (1 + std::fabs(want[i]));
            error = e <= error ? error : e;  // keeps a NaN
        }
        // rounding to bf16 changes a number by at most 2^-8 of it; sums in fp32 are far below
        right &= print_rung(name, ms, 2.0 * N * C * sizeof(real), "GB/s", error, std::ldexp(1.01, -8));
    };
    rung("1  one thread per row",
         [&](const real* x) { LAUNCH(layernorm_1, ceil_div(N, threads), threads, 0, out, mean, rstd, x, w, b, N, C); });
    rung("2  one warp per row: coalesced, sums by shuffles", [&](const real* x) {
        LAUNCH(layernorm_2, ceil_div(N * 32, threads), threads, 0, out, mean, rstd, x, w, b, N, C);
    });
    rung("3  16 bytes per access", [&](const real* x) {
        LAUNCH(layernorm_3, ceil_div(N * 32, threads), threads, 0, out, mean, rstd, x, w, b, N, C);
    });
    rung("4  the row stays in registers", [&](const real* x) {
        constexpr int packs = C / (32 * Pack<real>::size);
        LAUNCH((layernorm_4<packs>), ceil_div(N * 32, threads), threads, 0, out, mean, rstd, x, w, b, N, C);
    });
    rung("5  the trainer's: any C, residual fused where there is one",
         [&](const real* x) { GptKernels::layernorm_forward(out, mean, rstd, x, w, b, N, C); });
    return right;
}

int main() { return run_ladder(ladder); }
