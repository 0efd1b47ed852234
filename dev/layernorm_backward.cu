// layernorm_backward.cu: five versions of one kernel, one idea each. The last one is the trainer's.
//
// With xhat = (x - mean) * rstd, g = weight * dout, and means over the C channels of a row:
//
//     dx      += (g - mean(g) - xhat * mean(g * xhat)) * rstd        dx is the residual stream's gradient
//     dweight += sum over rows of dout * xhat
//     dbias   += sum over rows of dout
//
// All tensors (N, C) are bf16. There is little arithmetic: a perfect kernel reads dout, x and dx once and writes dx
// once. Every version is judged by those 8 N C bytes per second, beside the bandwidth of a copy. What makes it harder
// than the forward is that it needs sums in both directions: along the rows, before a row can be written, and down the
// columns, over all rows. "Measured" is (65536, 768) on one H200, on which a copy of these bytes takes 0.095 ms
// (results/ladders_h200.log).
#include "../kernels/gpt_kernels.cuh"
#include "bench.h"

struct Inputs {
    real* dx;  // (N,C) +=
    const real *dout, *x, *weight;
    const float *mean, *rstd;
    int N, C;
};

// 1. The definition as it stands: one thread per row for dx, then one thread per column for the sums. In the first, a
//    warp's lanes are whole rows apart: 32 cache lines for 2 bytes each. In the second they are neighbours, but there
//    are only C threads, each with N rows to walk. Measured: 15.8 ms.
__global__ void rows_1(Inputs in) {
    int row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= in.N) return;
    const real *dout = in.dout + size_t(row) * in.C, *x = in.x + size_t(row) * in.C;
    real* dx = in.dx + size_t(row) * in.C;
    float m = in.mean[row], s = in.rstd[row], mean_g = 0, mean_gx = 0;
    for (int c = 0; c < in.C; c++) {
        float g = to_float(in.weight[c]) * to_float(dout[c]);
        mean_g += g / in.C;
        mean_gx += g * (to_float(x[c]) - m) * s / in.C;
    }
    for (int c = 0; c < in.C; c++) {
        float g = to_float(in.weight[c]) * to_float(dout[c]), xhat = (to_float(x[c]) - m) * s;
        dx[c] = from_float<real>(to_float(dx[c]) + (g - mean_g - xhat * mean_gx) * s);
    }
}
__global__ void columns_1(float* dweight, float* dbias, Inputs in) {
    int c = blockIdx.x * blockDim.x + threadIdx.x;
    if (c >= in.C) return;
    float sum_dout = 0, sum_dout_xhat = 0;
    for (int row = 0; row < in.N; row++) {
        float d = to_float(in.dout[size_t(row) * in.C + c]);
        sum_dout += d;
        sum_dout_xhat += d * (to_float(in.x[size_t(row) * in.C + c]) - in.mean[row]) * in.rstd[row];
    }
    dweight[c] += sum_dout_xhat;
    dbias[c] += sum_dout;
}

// 2. One warp per row, 16 bytes per access, for dx; and for the columns many blocks with some rows each, which leave
//    partial sums that a second kernel adds (no atomics: the same bits in every run). Fast passes, but dout and x are
//    read by both: 12 bytes an element instead of 8. Measured: 0.173 ms.
__global__ void rows_2(Inputs in) {
    using P = Pack<real>;
    int row = (blockIdx.x * blockDim.x + threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (row >= in.N) return;
    size_t begin = size_t(row) * in.C;
    float m = in.mean[row], s = in.rstd[row], sum_g = 0, sum_gx = 0;
    for (int c = lane * P::size; c < in.C; c += 32 * P::size) {
        P d = P::load(in.dout + begin + c), v = P::load(in.x + begin + c), w = P::load(in.weight + c);
        for (int k = 0; k < P::size; k++) {
            float g = to_float(w[k]) * to_float(d[k]);
            sum_g += g;
            sum_gx += g * (to_float(v[k]) - m) * s;
        }
    }
    float mean_g = warp_sum(sum_g) / in.C, mean_gx = warp_sum(sum_gx) / in.C;
    for (int c = lane * P::size; c < in.C; c += 32 * P::size) {
        P d = P::load(in.dout + begin + c), v = P::load(in.x + begin + c), w = P::load(in.weight + c);
        P out = P::load(in.dx + begin + c);
        for (int k = 0; k < P::size; k++) {
            float g = to_float(w[k]) * to_float(d[k]), xhat = (to_float(v[k]) - m) * s;
            out[k] = from_float<real>(to_float(out[k]) + (g - mean_g - xhat * mean_gx) * s);
        }
        out.store(in.dx + begin + c);
    }
}
__global__ void columns_2(float* partials /*(gridDim.y,3,C)*/, Inputs in) {  // a thread keeps one pack of columns
    using P = Pack<real>;
    int c = (blockIdx.x * blockDim.x + threadIdx.x) * P::size;
    if (c >= in.C) return;
    float sum_dout[P::size] = {}, sum_dout_xhat[P::size] = {};
    UNROLL_BY(4)
    for (int row = blockIdx.y; row < in.N; row += gridDim.y) {
        P d = P::load(in.dout + size_t(row) * in.C + c), v = P::load(in.x + size_t(row) * in.C + c);
        float m = in.mean[row], s = in.rstd[row];
        for (int k = 0; k < P::size; k++) {
            sum_dout[k] += to_float(d[k]);
            sum_dout_xhat[k] += to_float(d[k]) * (to_float(v[k]) - m) * s;
        }
    }
    float* partial = partials + size_t(blockIdx.y) * 3 * in.C + c;
    for (int k = 0; k < P::size; k++) partial[k] = sum_dout_xhat[k], partial[in.C + k] = sum_dout[k];
}

// 3. One pass. A block takes whole rows and many of them, so that a thread keeps the same columns throughout: both
//    column sums stay in its registers. The row sums go over the block, two rows at a time to share the barriers. What
//    is in the way now: between the loads of two rows and their store everyone waits, twice. Measured: 0.142 ms.
constexpr int kRows3 = 2;
__global__ void __launch_bounds__(96, 6) layernorm_3(float* partials /*(gridDim.x,3,C)*/, Inputs in) {
    using P = Pack<real>;
    int c = threadIdx.x * P::size;
    P w = P::load(in.weight + c);
    float sum_dout[P::size] = {}, sum_dout_xhat[P::size] = {};
    for (int row0 = blockIdx.x * kRows3; row0 < in.N; row0 += gridDim.x * kRows3) {
        P d[kRows3], v[kRows3], out[kRows3];
        float m[kRows3], s[kRows3], sums[2 * kRows3] = {};
        UNROLL
        for (int r = 0; r < kRows3; r++) {
            size_t at = size_t(row0 + r) * in.C + c;
            d[r] = P::load_once(in.dout + at), v[r] = P::load_once(in.x + at), out[r] = P::load(in.dx + at);
            m[r] = in.mean[row0 + r], s[r] = in.rstd[row0 + r];
        }
        UNROLL
        for (int r = 0; r < kRows3; r++) {
            for (int k = 0; k < P::size; k++) {
                float dk = to_float(d[r][k]), g = to_float(w[k]) * dk, xhat = (to_float(v[r][k]) - m[r]) * s[r];
                sum_dout_xhat[k] += dk * xhat;
                sum_dout[k] += dk;
                sums[2 * r] += g;
                sums[2 * r + 1] += g * xhat;
            }
        }
        block_sums(sums);
        UNROLL
        for (int r = 0; r < kRows3; r++) {
            for (int k = 0; k < P::size; k++) {
                float g = to_float(w[k]) * to_float(d[r][k]), xhat = (to_float(v[r][k]) - m[r]) * s[r];
                out[r][k] = from_float<real>(to_float(out[r][k]) +
                                             (g - sums[2 * r] / in.C - xhat * sums[2 * r + 1] / in.C) * s[r]);
            }
            out[r].store(in.dx + size_t(row0 + r) * in.C + c);
        }
    }
    float* partial = partials + size_t(blockIdx.x) * 3 * in.C + c;
    for (int k = 0; k < P::size; k++) partial[k] = sum_dout_xhat[k], partial[in.C + k] = sum_dout[k];
}

// 4. No barriers: one warp per row, and each warp keeps the column sums of its rows. Rows now pass independently of
//    each other, but a lane has three packs of every tensor, and with them 48 sums: registers leave room for few warps,
//    and each still waits for its loads before it can go on. Measured: 0.124 ms.
__global__ void __launch_bounds__(128, 3) layernorm_4(float* partials /*(4*gridDim.x,3,C)*/, Inputs in) {
    using P = Pack<real>;
    constexpr int packs = 3;
    int lane = threadIdx.x % 32, warp = (blockIdx.x * blockDim.x + threadIdx.x) / 32, warps = gridDim.x * 4;
    P w[packs];
    float sum_dout[packs][P::size] = {}, sum_dout_xhat[packs][P::size] = {};
    UNROLL
    for (int p = 0; p < packs; p++) w[p] = P::load(in.weight + (p * 32 + lane) * P::size);
    for (int row = warp; row < in.N; row += warps) {
        P d[packs], v[packs], out[packs];
        float m = in.mean[row], s = in.rstd[row], sum_g = 0, sum_gx = 0;
        UNROLL
        for (int p = 0; p < packs; p++) {
            size_t at = size_t(row) * in.C + (p * 32 + lane) * P::size;
            d[p] = P::load_once(in.dout + at), v[p] = P::load_once(in.x + at), out[p] = P::load(in.dx + at);
        }
        UNROLL
        for (int p = 0; p < packs; p++) {
            for (int k = 0; k < P::size; k++) {
                float dk = to_float(d[p][k]), g = to_float(w[p][k]) * dk, xhat = (to_float(v[p][k]) - m) * s;
                sum_dout_xhat[p][k] += dk * xhat;
                sum_dout[p][k] += dk;
                sum_g += g;
                sum_gx += g * xhat;
            }
        }
        float mean_g = warp_sum(sum_g) / in.C, mean_gx = warp_sum(sum_gx) / in.C;
        UNROLL
        for (int p = 0; p < packs; p++) {
            for (int k = 0; k < P::size; k++) {
                float g = to_float(w[p][k]) * to_float(d[p][k]), xhat = (to_float(v[p][k]) - m) * s;
                out[p][k] = from_float<real>(to_float(out[p][k]) + (g - mean_g - xhat * mean_gx) * s);
            }
            out[p].store(in.dx + size_t(row) * in.C + (p * 32 + lane) * P::size);
        }
    }
    UNROLL
    for (int p = 0; p < packs; p++) {
        float* partial = partials + size_t(warp) * 3 * in.C + (p * 32 + lane) * P::size;
        for (int k = 0; k < P::size; k++) partial[k] = sum_dout_xhat[p][k], partial[in.C + k] = sum_dout[p][k];
    }
}

// 5. The trainer's, in ../kernels/gpt_kernels.cuh: as 3, with four rows of a block that share the barriers, while
//    cp.async brings the next four into shared memory. What is on its way then needs neither registers nor a waiting
//    warp. It also sums the columns of dx, which is the bias gradient of the projection before (a pass of its own over
//    2 N C bytes until then), and takes any C. Expected: 0.85 of a copy. Measured: 0.129 ms, 0.74 of it, with a sum
//    more than 4 has.

static bool ladder() {
    // 64 sequences of GPT-2 124M: 96 MiB per tensor.
    const int N = 64 * 1024, C = 768;
    printf("LayerNorm backward, (%d, %d); a copy runs at %.0f GB/s\n", N, C, copy_bandwidth());

    const size_t n = size_t(N) * C;
    std::vector<uint16_t> x = to_bf16(normal(n, 1)), dout = to_bf16(normal(n, 2)), before = to_bf16(normal(n, 3));
    std::vector<uint16_t> weight = to_bf16(normal(C, 4)), zeros(C);
    std::vector<float> want = from_bf16(before), want_sums(3 * C), mean(N), rstd(N), unused(n);
    std::vector<float> host_scratch(CpuOps::layernorm_scratch_floats(C));
    const std::vector<float> x_values = from_bf16(x), weights = from_bf16(weight);
    CpuOps::layernorm_forward(unused.data(), mean.data(), rstd.data(), x_values.data(), weights.data(),
                              from_bf16(zeros).data(), N, C);
    CpuOps::layernorm_backward(want.data(), want_sums.data(), want_sums.data() + C, nullptr, want.data(),
                               from_bf16(dout).data(), x_values.data(), weights.data(), mean.data(), rstd.data(), N, C,
                               host_scratch.data());

    DeviceArray<uint16_t> device_x(x), device_dout(dout), device_weight(weight), device_dx(n);
    DeviceArray<float> device_mean(mean), device_rstd(rstd), sums(3 * C), scratch(size_t(4) * 1024 * 3 * C);
    const Inputs in = {device_dx.as<real>(),
                       device_dout.as<real>(),
                       device_x.as<real>(),
                       device_weight.as<real>(),
                       device_mean,
                       device_rstd,
                       N,
                       C};
    float *dweight = sums, *dbias = sums + C, *dsum = sums + 2 * C;
    bool right = true;
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemcpy(device_dx, before.data(), device_dx.bytes(), cudaMemcpyHostToDevice));
        CUDA_CHECK(cudaMemset(sums, 0, sums.bytes()));
        run();
        CUDA_CHECK(cudaDeviceSynchronize());
        const std::vector<float> got = from_bf16(device_dx.download(n)), got_sums = sums.download(2 * C);
        double error = 0;
        auto compare = [&](double got, double want, double scale) {
            double e = std::fabs(got - want) / (scale + std::fabs(want));
            error = e <= error ? error : e;  // keeps a NaN
        };
        for (size_t i = 0; i < n; i++) compare(got[i], want[i], 1);
        for (int i = 0; i < 2 * C; i++) compare(got_sums[i], want_sums[i], std::sqrt(double(N)));
        float ms = median_ms([&](int) { run(); });
        // rounding to bf16 changes a number by at most 2^-8 of it; sums in fp32 are far below
        right &= print_rung(name, ms, 4.0 * n * sizeof(real), "GB/s", error, std::ldexp(1.01, -8));
    };
    auto add = [&](int partials) {
        LAUNCH(add_partials_kernel, dim3(ceil_div(C, 32), 3), 1024, 0, dweight, dbias, static_cast<float*>(nullptr),
               static_cast<const float*>(scratch), partials, C);
    };
    rung("1  one thread per row, then one per column", [&] {
        LAUNCH(rows_1, ceil_div(N, 128), 128, 0, in);
        LAUNCH(columns_1, ceil_div(C, 128), 128, 0, dweight, dbias, in);
    });
    rung("2  one warp per row, 16 bytes per access; partial sums", [&] {
        LAUNCH(rows_2, ceil_div(N, 4), 128, 0, in);
        LAUNCH(columns_2, dim3(1, 1024), 96, 0, scratch, in);
        add(1024);
    });
    rung("3  one pass: a thread keeps its columns for many rows", [&] {
        LAUNCH(layernorm_3, 6 * kMultiprocessors, 96, 0, scratch, in);
        add(6 * kMultiprocessors);
    });
    rung("4  no barriers: a warp keeps its row", [&] {
        LAUNCH(layernorm_4, 3 * kMultiprocessors, 128, 0, scratch, in);
        add(12 * kMultiprocessors);
    });
    rung("5  the trainer's: the next rows on their way; sums of dx too", [&] {
        GptKernels::layernorm_backward(in.dx, dweight, dbias, dsum, in.dx, in.dout, in.x, in.weight, in.mean, in.rstd,
                                       N, C, scratch);
    });
    return right;
}

int main() { return run_ladder(ladder); }
