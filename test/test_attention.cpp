// Tests of attention.cuh against its definition in double: one source, compiled by g++ -DFIBER (kernels on the CPU,
// small sizes) and by nvcc (the GPU), in bf16 and with -DPRECISION_FP32.
//
// Inputs are random (TEST_SEED=n repeats a run) and rounded to `real` first, so both sides start from the same numbers.
// Every output element has its own bound, derived in Truth below from what the kernels round; beyond it, the norm of a
// whole result's error is held to a typical, much smaller bound. Outputs start as NaN with guard zones around them,
// every operation runs twice and must give the same bits (under fibers the second run takes blocks and threads in
// another order).
#include <doctest/doctest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../kernels/attention.cuh"
#include "device_buffer.h"

namespace test_attention {

using Doubles = std::vector<double>;
using Reals = std::vector<real>;

unsigned long long seed() {
    static const unsigned long long value = [] {
        const char* text = std::getenv("TEST_SEED");
        unsigned long long chosen = text ? std::strtoull(text, nullptr, 10) : std::random_device()();
        std::printf("test_attention: TEST_SEED=%llu, %s\n", chosen, sizeof(real) == 2 ? "bf16" : "fp32");
        return chosen;
    }();
    return value;
}

Reals normal(size_t n, unsigned stream, double scale = 1) {
    std::mt19937_64 generator(seed() * 1000 + stream);
    std::normal_distribution<double> distribution(0, scale);
    Reals x(n);
    for (real& value : x) value = from_float<real>(float(distribution(generator)));
    return x;
}

// Rounding to `real` moves a number by at most kUnit of itself (fp32: part of the terms below); rounding to fp32 by
// kUnit32, doubled because tensor cores truncate.
constexpr double kUnit = sizeof(real) == 2 ? 1.0 / 256 : 0;
constexpr double kUnit32 = 1.0 / (1 << 23);

// The results by definition, and for each element how far a kernel may be off:
//   s = scale * q.k        off by ds = (hd + 4) * kUnit32 * scale * |q|.|k|, the worst case of a sum of hd terms
//   p = exp(s - lse)       off by 2 ds of itself (ds in the exponent, ds in lse), and rounded to `real`: a relative
//                          error of e_p, which also covers the fp32 sums over T
//   out = p V              off by e_p * p |V|, and rounded to `real`
//   delta = dO . out       off by |dO| . (error of out), plus the error of a sum of hd terms
//   dS = p (dp - delta)    off by e_p |dS| + p * (errors of delta and of dp = dO . v)
//   dV, dQ, dK             sums of these errors, and rounded to `real`
struct Truth {
    Doubles out, lse, dqkv;  // (B,T,C), (B,H,T), (B,T,3C)
    Doubles out_bound, lse_bound, dqkv_bound;

    Truth(const Reals& qkv_values, const Reals& dout_values, int B, int T, int C, int H)
        : out(size_t(B) * T * C),
          lse(size_t(B) * H * T),
          dqkv(3 * out.size()),
          out_bound(out.size()),
          lse_bound(lse.size()),
          dqkv_bound(dqkv.size()) {
        const int hd = C / H;
        const double scale = 1 / std::sqrt(double(hd)), tiny = 1e-30;
        const Doubles qkv = widen(qkv_values), dout = widen(dout_values);
        Doubles p(T), ds_bound(T);
        for (int b = 0; b < B; b++)
            for (int h = 0; h < H; h++) {
                auto q_at = [&](int t) { return (size_t(b) * T + t) * 3 * C + h * hd; };
                auto out_at = [&](int t) { return (size_t(b) * T + t) * C + h * hd; };
                for (int t = 0; t < T; t++) {
                    const double *q = &qkv[q_at(t)], *d_out = &dout[out_at(t)];
                    double *o = &out[out_at(t)], *o_bound = &out_bound[out_at(t)];
                    double *dq = &dqkv[q_at(t)], *dq_bound = &dqkv_bound[q_at(t)];
                    double largest = -INFINITY, score_bound = 0, total = 0;
                    for (int s = 0; s <= t; s++) {
                        const double* k = &qkv[q_at(s) + C];
                        double sum = 0, magnitude = 0;
                        for (int d = 0; d < hd; d++) sum += q[d] * k[d], magnitude += std::fabs(q[d] * k[d]);
                        p[s] = scale * sum;
                        largest = std::max(largest, p[s]);
                        score_bound = std::max(score_bound, (hd + 4) * kUnit32 * scale * magnitude);
                    }
                    for (int s = 0; s <= t; s++) total += p[s] = std::exp(p[s] - largest);
                    const double l = largest + std::log(total), sums = (T + 10) * kUnit32;
                    const double e_p = kUnit + std::expm1(2 * score_bound) + sums;
                    lse[(size_t(b) * H + h) * T + t] = l;
                    lse_bound[(size_t(b) * H + h) * T + t] = score_bound + sums + 4 * kUnit32 * std::fabs(l);
                    for (int s = 0; s <= t; s++) {
                        p[s] /= total;
                        const double* v = &qkv[q_at(s) + 2 * C];
                        for (int d = 0; d < hd; d++) o[d] += p[s] * v[d], o_bound[d] += e_p * p[s] * std::fabs(v[d]);
                    }
                    double delta = 0, delta_bound = 0;
                    for (int d = 0; d < hd; d++) {
                        o_bound[d] += kUnit * (std::fabs(o[d]) + o_bound[d]) + tiny;
                        delta += d_out[d] * o[d];
                        delta_bound += std::fabs(d_out[d]) * (o_bound[d] + hd * kUnit32 * std::fabs(o[d]));
                    }
                    for (int s = 0; s <= t; s++) {
                        const double *k = &qkv[q_at(s) + C], *v = k + C;
                        double *dk = &dqkv[q_at(s) + C], *dk_bound = &dqkv_bound[q_at(s) + C];
                        double *dv = dk + C, *dv_bound = dk_bound + C;
                        double dp = 0, dp_bound = 0;
                        for (int d = 0; d < hd; d++) {
                            dp += d_out[d] * v[d];
                            dp_bound += hd * kUnit32 * std::fabs(d_out[d] * v[d]);
                            dv[d] += p[s] * d_out[d];
                            dv_bound[d] += e_p * p[s] * std::fabs(d_out[d]);
                        }
                        const double ds = scale * p[s] * (dp - delta);
                        const double bound = e_p * std::fabs(ds) + (1 + e_p) * scale * p[s] * (dp_bound + delta_bound);
                        for (int d = 0; d < hd; d++) {
                            dq[d] += ds * k[d], dq_bound[d] += bound * std::fabs(k[d]);
                            dk[d] += ds * q[d], dk_bound[d] += bound * std::fabs(q[d]);
                        }
                    }
                }
            }
        for (size_t i = 0; i < dqkv.size(); i++) dqkv_bound[i] += kUnit * (std::fabs(dqkv[i]) + dqkv_bound[i]) + tiny;
    }

    template <class T>
    static Doubles widen(const std::vector<T>& x) {
        Doubles y(x.size());
        for (size_t i = 0; i < x.size(); i++) y[i] = to_float(x[i]);
        return y;
    }
};

// Each element within its bound, and the norm of the error within `relative` of the norm of the result (0: not
// checked).
template <class T>
void check(const char* what, const std::vector<T>& values, const Doubles& want, const Doubles& bound, double relative) {
    const Doubles got = Truth::widen(values);
    REQUIRE(got.size() == want.size());
    size_t wrong = 0, first = 0;
    double errors = 0, squares = 0;
    for (size_t i = 0; i < want.size(); i++) {
        if (!(std::fabs(got[i] - want[i]) <= bound[i]) && wrong++ == 0) first = i;
        errors += (got[i] - want[i]) * (got[i] - want[i]);
        squares += want[i] * want[i];
    }
    INFO(what << ": " << wrong << " of " << want.size() << " out of bounds, first " << first << ": " << got[first]
              << ", should be " << want[first] << " +- " << bound[first]);
    CHECK(wrong == 0);
    const double error = std::sqrt(errors / squares);
    INFO(what << ": norm of the error " << error << " of the result's, allowed " << relative);
    if (relative > 0) CHECK(error <= relative);
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// bf16: rounding errors of P, dS and the results are up to 1/256 each and random. fp32: sums of T terms.
constexpr double kTypical = sizeof(real) == 2 ? 5e-3 : 1e-5;

// dbias = before + the sum of the rows of dqkv as they are stored, which check() has held against the truth: only the
// rounding of fp32 sums is left. No number goes through more additions than the 63 of a tile, those of one thread, at
// most N / 256 as many threads share the rows, and some that bring a block's threads together.
void check_dbias(const std::vector<float>& dbias, const std::vector<float>& before, const Reals& dqkv) {
    const size_t columns = before.size(), N = dqkv.size() / columns;
    Doubles want(before.begin(), before.end()), bound(columns);
    for (size_t i = 0; i < dqkv.size(); i++) {
        want[i % columns] += to_float(dqkv[i]);
        bound[i % columns] += (80 + double(N) / 256) * kUnit32 * std::fabs(to_float(dqkv[i]));
    }
    for (size_t i = 0; i < columns; i++) bound[i] += kUnit32 * (std::fabs(before[i]) + std::fabs(want[i]));
    check("dbias", dbias, want, bound, 0);
}

// The kernels that struct Attention launches against the truth, and against themselves in a second run.
void test_kernels(const Truth& truth, const Reals& qkv, const Reals& dout, int B, int T, int C, int H, bool ordinary) {
    const size_t N = size_t(B) * T;
    const DeviceBuffer<real> device_qkv(qkv), device_dout(dout);
    const DeviceBuffer<real> out(N * C), dqkv(N * 3 * C);
    const size_t scratch_floats = Attention::attention_scratch_floats(B, T, C, H);
    const DeviceBuffer<float> lse(N * H), delta(N * H), scratch(scratch_floats);
    const Reals before_reals = normal(size_t(3) * C, 3);
    const std::vector<float> before(before_reals.begin(), before_reals.end());
    const DeviceBuffer<float> dbias(before);
    Attention::attention_forward(out, lse, device_qkv, B, T, C, H);
    Attention::attention_backward(dqkv, dbias, delta, device_dout, device_qkv, out, lse, B, T, C, H, scratch);

    check("out", out.download(), truth.out, truth.out_bound, ordinary ? kTypical : 0);
    check("lse", lse.download(), truth.lse, truth.lse_bound, ordinary && T >= 16 ? 1e-5 : 0);
    // With few keys, or one that takes all, dP - delta is the difference of nearly equal numbers: its bounds are all
    // there is.
    check("dqkv", dqkv.download(), truth.dqkv, truth.dqkv_bound, ordinary && T >= 16 ? kTypical : 0);
    check_dbias(dbias.download(), before, dqkv.download());

    const DeviceBuffer<real> out_again(N * C), dqkv_again(N * 3 * C);
    const DeviceBuffer<float> lse_again(N * H), delta_again(N * H), scratch_again(scratch_floats), dbias_again(before);
    Attention::attention_forward(out_again, lse_again, device_qkv, B, T, C, H);
    Attention::attention_backward(dqkv_again, dbias_again, delta_again, device_dout, device_qkv, out_again, lse_again,
                                  B, T, C, H, scratch_again);
    CHECK(same_bits(out.download(), out_again.download()));
    CHECK(same_bits(lse.download(), lse_again.download()));
    CHECK(same_bits(dqkv.download(), dqkv_again.download()));
    CHECK(same_bits(dbias.download(), dbias_again.download()));

    CHECK(same_bits(device_qkv.download(), qkv));
    CHECK(same_bits(device_dout.download(), dout));
    for (const DeviceBuffer<real>* buffer : {&device_qkv, &device_dout, &out, &dqkv, &out_again, &dqkv_again})
        CHECK(buffer->guards_intact());
    for (const DeviceBuffer<float>* buffer :
         {&lse, &delta, &scratch, &dbias, &lse_again, &delta_again, &scratch_again, &dbias_again})
        CHECK(buffer->guards_intact());
}

// The kernel of one query, against the last row of a sequence's truth.
void test_last_row(const Truth& truth, const Reals& qkv, int T, int C, int H, bool ordinary) {
    auto last = [&](const Doubles& rows) {
        return Doubles(rows.begin() + long(T - 1) * C, rows.begin() + long(T) * C);
    };
    const Reals first(qkv.begin(), qkv.begin() + long(T) * 3 * C);  // of the sequences
    const DeviceBuffer<real> device_qkv(first), out(C), again(C);
    Attention::attention_last_row(out, device_qkv, T, C, H);
    check("last row", out.download(), last(truth.out), last(truth.out_bound), ordinary ? kTypical : 0);
    Attention::attention_last_row(again, device_qkv, T, C, H);
    CHECK(same_bits(out.download(), again.download()));
    for (const DeviceBuffer<real>* buffer : {&device_qkv, &out, &again}) CHECK(buffer->guards_intact());
}

// While one exists, the portable kernels are launched.
struct PortableKernels {
    PortableKernels() { portable_kernels = true; }
    ~PortableKernels() { portable_kernels = false; }
};

// Q and K are normal with standard deviation `amplitude`, V and dO with 1; `apart` is added to one channel of each head
// of Q and taken from it in K, so that all scores are lower by its square over sqrt(hd). Where there are kernels of
// attention_hopper.cuh for this head size, they and the portable ones take the same test.
void test(int B, int T, int H, int hd, double amplitude = 1, float apart = 0) {
    CAPTURE(B);
    CAPTURE(T);
    CAPTURE(H);
    CAPTURE(hd);
    CAPTURE(amplitude);
    CAPTURE(apart);
    CAPTURE(seed());
    const int C = H * hd;
    const size_t N = size_t(B) * T;
    Reals qkv = normal(N * 3 * C, 1), dout = normal(N * C, 2);
    for (size_t i = 0; i < qkv.size(); i++)
        if (i % (3 * C) < 2 * size_t(C)) {
            const float shift = i % hd > 0 ? 0 : i % (3 * C) < size_t(C) ? apart : -apart;
            qkv[i] = from_float<real>(float(to_float(qkv[i]) * amplitude) + shift);
        }
    const Truth truth(qkv, dout, B, T, C, H);
    const bool ordinary = amplitude == 1 && apart == 0;  // softmax that no single key takes all of, and small numbers

    if (Attention::on_hopper(hd)) {
        INFO("kernels of attention_hopper.cuh");
        test_kernels(truth, qkv, dout, B, T, C, H, ordinary);
    }
    const PortableKernels portable;
    test_kernels(truth, qkv, dout, B, T, C, H, ordinary);
    test_last_row(truth, qkv, T, C, H, ordinary);
}

TEST_CASE("attention: heads of 64") {
    for (int T : {1, 2, 63, 64, 65, 77, 128, 129, 200}) test(1, T, 1, 64);
    test(2, 77, 3, 64);   // batches and heads
    test(1, 500, 4, 64);  // more tiles for a block than its ring has places
}

TEST_CASE("attention: heads of 32 and 128") {
    for (int T : {1, 2, 63, 64, 65, 77, 128, 129, 200}) {
        test(1, T, 1, 32);
        test(1, T, 1, 128);
    }
    test(2, 66, 2, 32);
    test(2, 66, 2, 128);
    test(3, 130, 4, 128);
}

TEST_CASE("attention: heads that only the scalar kernels have") {
    for (int T : {1, 2, 31, 32, 33, 63, 64, 65, 77, 128, 129, 200}) test(1, T, 2, 24);
    test(2, 40, 8, 1);
    test(2, 40, 8, 5);
    test(1, 40, 1, 72);
    test(2, 40, 2, 160);
    test(1, 70, 1, 256);
}

// Q and K of 30 times the usual size: scores of some thousands, whose exponentials overflow unless the largest goes
// first.
TEST_CASE("attention: large scores") {
    test(1, 130, 1, 64, 30);
    test(1, 65, 2, 32, 30);
    test(1, 65, 1, 128, 30);
    test(1, 70, 1, 24, 30);
}

// lse below -350: exp(0 - lse), which a kernel may come upon in rows past T, overflows, and must not reach any sum.
TEST_CASE("attention: scores far below zero") {
    for (int hd : {24, 32, 64, 128}) {
        test(1, 1, 1, hd, 1, 64);
        test(2, 77, 2, hd, 1, 64);
    }
}

TEST_CASE("attention: sizes that the kernels lack are refused") {
    const DeviceBuffer<real> x(1);
    const DeviceBuffer<float> y(1);
    CHECK_THROWS_AS(Attention::attention_forward(x, y, x, 1, 1, 264, 1), Error);
    CHECK_THROWS_AS(Attention::attention_forward(x, y, x, 1, 1, 64, 3), Error);
    CHECK_THROWS_AS(Attention::attention_backward(x, y, y, x, x, x, y, 1, 1 << 20, 1024, 16, y), Error);
    CHECK_THROWS_AS(Attention::attention_last_row(x, x, 1, 264, 1), Error);
}

#ifndef FIBER
TEST_CASE("attention: sizes of a GPU") {
    // On both sides of what a block of attention_hopper.cuh owns: 2, 3 or 4 tiles of 64.
    for (int T : {191, 192, 193, 255, 256, 257, 320, 385}) {
        test(2, T, 2, 64);
        test(1, T, 2, 128);
    }
    test(1, 1024, 3, 128);
    test(40, 130, 12, 64);  // more heads than are under way at once
    test(2, 1024, 12, 64);
    test(1, 1000, 12, 64);
    test(3, 1, 25, 64);
    test(1, 4099, 1, 64);
    test(1, 1000, 2, 32);
    test(1, 1000, 2, 128);
    test(1, 1000, 2, 80);
    test(1, 1000, 2, 64, 30);
}
#endif

}  // namespace test_attention
