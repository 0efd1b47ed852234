// attention.h: what the two attention ladders share. The problem (a layer of GPT-2 124M: 64 sequences of 1024 tokens,
// 12 heads of 64 channels), inputs, and the definition in double for single heads.
#pragma once
#include "../kernels/attention.cuh"
#include "bench.h"

using bf16 = __nv_bfloat16;
constexpr int kB = 64, kT = 1024, kH = 12, kHD = 64, kC = kH * kHD;
const float kScale = 1 / std::sqrt(float(kHD));

// Multiplications and additions of one product of (T, T) by HD for all heads; the causal half of it is what counts.
constexpr double kProduct = 2.0 * kB * kH * kHD * double(kT) * kT / 2;

// q, k, v, dout of head h of sequence b, and from them by definition the results, all (T, HD).
struct HeadTruth {
    std::vector<double> q, k, v, dout, out, dq, dk, dv;

    HeadTruth(const std::vector<uint16_t>& qkv, const std::vector<uint16_t>& dout_all, int b, int h)
        : q(column(qkv, 3, 0, b, h)),
          k(column(qkv, 3, 1, b, h)),
          v(column(qkv, 3, 2, b, h)),
          dout(column(dout_all, 1, 0, b, h)),
          out(kT * kHD),
          dq(kT * kHD),
          dk(kT * kHD),
          dv(kT * kHD) {
        std::vector<double> p(kT), dp(kT);
        for (int t = 0; t < kT; t++) {
            double sum = 0, delta = 0;
            for (int s = 0; s <= t; s++) sum += p[s] = std::exp(kScale * dot(q, t, k, s));
            for (int s = 0; s <= t; s++) {
                p[s] /= sum;
                dp[s] = dot(dout, t, v, s);
                delta += p[s] * dp[s];
            }
            for (int s = 0; s <= t; s++) {
                const double ds = kScale * p[s] * (dp[s] - delta);
                for (int d = 0; d < kHD; d++) {
                    out[t * kHD + d] += p[s] * v[s * kHD + d];
                    dv[s * kHD + d] += p[s] * dout[t * kHD + d];
                    dq[t * kHD + d] += ds * k[s * kHD + d];
                    dk[s * kHD + d] += ds * q[t * kHD + d];
                }
            }
        }
    }

    // Head h of the matrix `part` of `parts` beside each other, of sequence b: (T, HD) out of (B, T, parts * C).
    static std::vector<double> column(const std::vector<uint16_t>& x, int parts, int part, int b, int h) {
        std::vector<double> y(kT * kHD);
        for (int t = 0; t < kT; t++)
            for (int d = 0; d < kHD; d++)
                y[t * kHD + d] = CpuOps::from_bf16(x[((size_t(b) * kT + t) * parts + part) * kC + h * kHD + d]);
        return y;
    }
    static double dot(const std::vector<double>& x, int row_x, const std::vector<double>& y, int row_y) {
        double sum = 0;
        for (int d = 0; d < kHD; d++) sum += x[row_x * kHD + d] * y[row_y * kHD + d];
        return sum;
    }
};

// The norm of got - want over the norm of want.
inline double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
    double errors = 0, squares = 0;
    for (size_t i = 0; i < want.size(); i++) {
        errors += (got[i] - want[i]) * (got[i] - want[i]);
        squares += want[i] * want[i];
    }
    return std::sqrt(errors / squares);
}

// Results are bf16, and so are P and dS on their way into the tensor cores: errors up to 2^-8 each, and random.
constexpr double kLimit = 5e-3;
