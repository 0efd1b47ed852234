// test_kernels.cpp: every operation of gpt_kernels.cuh against its twin in cpu_backend.h, on fresh random inputs.
// One source, built four ways: by g++ with -DFIBER (test/fiber.h runs the kernels on the CPU; small sizes) and by nvcc
// (on the GPU; the same and larger sizes), each in bf16 and with -DPRECISION_FP32. TEST_SEED=n repeats a run's inputs.
//
// Inputs are rounded to `real` first, so both sides start from the same numbers. Bounds: kernels compute in fp32, with
// sums of up to some thousand terms in another order than the CPU's: 1e-5 of the root mean square of the row (or of the
// vector) that an element belongs to. A result stored as bf16 is rounded once more, by at most 2^-8 of its magnitude.
// Outputs start as NaN, and guard zones lie around every array (device_buffer.h). Results must be the same bits when an
// operation is repeated; under fibers the repetition runs blocks and threads in another order.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <random>

#include "../cpu_backend.h"
#include "../kernels/gpt_kernels.cuh"
#include "../kernels/mma.cuh"
#include "device_buffer.h"

namespace test_kernels {

using Floats = std::vector<float>;
using Reals = std::vector<real>;
using Ints = std::vector<int>;

static std::mt19937_64 generator;

static Floats normal(size_t n, float scale = 1.0f, float offset = 0.0f) {
    constexpr size_t kPeriod = 100003;  // large arrays repeat: minutes saved. A prime, so that rows differ
    std::normal_distribution<float> distribution(offset, scale);
    Floats x(n);
    for (size_t i = 0; i < n; i++) x[i] = i < kPeriod ? distribution(generator) : x[i - kPeriod];
    return x;
}
static Ints integers(size_t n, int limit) {
    std::uniform_int_distribution<int> distribution(0, limit - 1);
    Ints x(n);
    for (int& value : x) value = distribution(generator);
    return x;
}
static Reals narrow(const Floats& x) {
    Reals y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = from_float<real>(x[i]);
    return y;
}
template <class T>
static Floats widen(const std::vector<T>& x) {
    Floats y(x.size());
    for (size_t i = 0; i < x.size(); i++) y[i] = to_float(x[i]);
    return y;
}
static Floats random_reals(size_t n, float scale = 1.0f, float offset = 0.0f) {
    return widen(narrow(normal(n, scale, offset)));
}

// Relative error of an element: one rounding to bf16; in fp32 what a dozen elementwise operations on either side leave
// (three steps of AdamW), which for an element far above its row's root mean square is more than the bound below.
template <class T>
constexpr double rounding = sizeof(T) == 2 ? 1.0 / 256 : 16.0 / (1 << 24);

// got against want, row by row (`columns` elements each): |difference| <= rounding*|want| + relative*rms(row of want).
// least_rms: for a few sums of terms of that size, which may cancel.
template <class T>
static void check_close(const std::vector<T>& got_values, const Floats& want, size_t columns, double relative = 1e-5,
                        double least_rms = 0) {
    const Floats got = widen(got_values);
    REQUIRE(got.size() == want.size());
    REQUIRE(want.size() % columns == 0);
    size_t wrong = 0, first = 0;
    for (size_t begin = 0; begin < want.size(); begin += columns) {
        double squares = 0;
        for (size_t i = begin; i < begin + columns; i++) squares += double(want[i]) * want[i];
        double row_bound = relative * std::max(least_rms, std::sqrt(squares / columns));
        for (size_t i = begin; i < begin + columns; i++) {
            double bound = rounding<T> * std::fabs(want[i]) + row_bound;
            if (!(std::fabs(double(got[i]) - want[i]) <= bound) && wrong++ == 0) first = i;
        }
    }
    INFO(wrong << " of " << want.size() << " wrong, first at row " << first / columns << " column " << first % columns
               << ": " << got[first] << ", should be " << want[first]);
    CHECK(wrong == 0);
}
template <class T>
static bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Shape {
    int B, T, C;
};
static std::vector<Shape> shapes() {
    std::vector<Shape> all = {{1, 1, 8},   {3, 77, 72},  {1, 77, 8},   {2, 5, 768},
                              {1, 9, 776}, {9, 1, 1600}, {1, 3, 2056}, {1, 2, 8192}};
    if (large_sizes())
        for (Shape large : {Shape{16, 1024, 768}, Shape{3, 1024, 1024}, Shape{3, 1024, 1280}, Shape{5, 1024, 1600},
                            Shape{1, 1027, 4096}, Shape{1, 1000, 8192}})
            all.push_back(large);
    return all;
}

// ---------------------------------------------------------------------------------------------------------------------

TEST_CASE("embedding_forward") {
    for (Shape shape : shapes()) {
        const int B = shape.B, T = shape.T, C = shape.C;
        INFO("B " << B << " T " << T << " C " << C);
        const int V = 300;
        Floats wte = random_reals(size_t(V) * C), wpe = random_reals(size_t(T + 3) * C), want(size_t(B) * T * C);
        Ints tokens = integers(size_t(B) * T, V);
        CpuOps::embedding_forward(want.data(), tokens.data(), wte.data(), wpe.data(), B, T, C);
        DeviceBuffer<real> out(want.size()), device_wte(narrow(wte)), device_wpe(narrow(wpe));
        GptKernels::embedding_forward(out, DeviceBuffer<int>(tokens), device_wte, device_wpe, B, T, C);
        check_close(out.download(), want, C);
    }
}

static void test_embedding_backward(int B, int T, int C, const Ints& tokens, int V, bool accumulate) {
    const size_t N = size_t(B) * T, wte_size = size_t(V) * C, wpe_size = size_t(T + 2) * C;
    Floats dout = random_reals(N * C);
    Ints order(N);
    for (size_t i = 0; i < N; i++) order[i] = int(i);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    Floats wte_before = accumulate ? normal(wte_size) : Floats(wte_size),
           wpe_before = accumulate ? normal(wpe_size) : Floats(wpe_size);
    Floats dwte = wte_before, dwpe = wpe_before;
    CpuOps::embedding_backward(dwte.data(), dwpe.data(), dout.data(), tokens.data(), order.data(), B, T, C);

    DeviceBuffer<real> device_dout(narrow(dout));
    DeviceBuffer<int> device_tokens(tokens), device_order(order);
    Floats first_wte, first_wpe;
    for (int repetition = 0; repetition < 2; repetition++) {
        DeviceBuffer<float> device_dwte(wte_before), device_dwpe(wpe_before);
        GptKernels::embedding_backward(device_dwte, device_dwpe, device_dout, device_tokens, device_order, B, T, C);
        Floats got_wte = device_dwte.download(), got_wpe = device_dwpe.download();
        if (repetition == 0) {
            check_close(got_wte, dwte, C);
            check_close(got_wpe, dwpe, C);
            first_wte = got_wte, first_wpe = got_wpe;
        } else {
            CHECK(same_bits(got_wte, first_wte));
            CHECK(same_bits(got_wpe, first_wpe));
        }
    }
}

TEST_CASE("embedding_backward") {
    for (Shape shape : shapes()) {
        const int B = shape.B, T = shape.T, C = shape.C;
        INFO("B " << B << " T " << T << " C " << C);
        test_embedding_backward(B, T, C, integers(size_t(B) * T, 300), 300, true);
    }
    for (int C : {8, 264}) {
        CAPTURE(C);
        test_embedding_backward(3, 400, C, Ints(1200, 7), 9, true);       // one run, three rounds of 16 pieces
        test_embedding_backward(3, 400, C, integers(1200, 3), 3, false);  // runs of about 400
        test_embedding_backward(2, 300, C, integers(600, 20), 20, true);  // of about 30: around the limit of one warp
        for (int length : {31, 32, 33, 512, 513}) {  // one run at the limits, among single tokens or at the end
            for (int N : {600, 10 + length}) {
                INFO("run of " << length << " among " << N);
                Ints tokens(N);
                for (int i = 0; i < N; i++) tokens[i] = i < 10 ? i : i < 10 + length ? 10 : i;
                std::shuffle(tokens.begin(), tokens.end(), generator);
                test_embedding_backward(1, N, C, tokens, 600, true);
            }
        }
    }
}

TEST_CASE("layernorm_forward and residual_layernorm_forward") {
    for (Shape shape : shapes()) {
        const int B = shape.B, T = shape.T, C = shape.C;
        INFO("B " << B << " T " << T << " C " << C);
        const int N = B * T;
        const size_t n = size_t(N) * C;
        Floats a = random_reals(n, 2.0f, 3.0f), b = random_reals(n), weight = random_reals(C), bias = random_reals(C);
        DeviceBuffer<real> device_a(narrow(a)), device_b(narrow(b)), device_weight(narrow(weight)),
            device_bias(narrow(bias));
        Floats sum(n);
        for (size_t i = 0; i < n; i++) sum[i] = a[i] + b[i];
        const Reals rounded_sum = narrow(sum);
        for (bool add : {false, true}) {
            CAPTURE(add);
            Floats want(n), mean(N), rstd(N), x = add ? widen(rounded_sum) : a;
            CpuOps::layernorm_forward(want.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N,
                                      C);
            DeviceBuffer<real> out(n), residual(n);
            DeviceBuffer<float> device_mean(N), device_rstd(N);
            if (add) {
                GptKernels::residual_layernorm_forward(residual, out, device_mean, device_rstd, device_a, device_b,
                                                       device_weight, device_bias, N, C);
                CHECK(same_bits(residual.download(), rounded_sum));
            } else {
                GptKernels::layernorm_forward(out, device_mean, device_rstd, device_a, device_weight, device_bias, N,
                                              C);
            }
            check_close(out.download(), want, C);
            check_close(device_mean.download(), mean, 1, 1e-5, 1.0);  // of numbers around 3
            check_close(device_rstd.download(), rstd, 1);
        }
    }
}

TEST_CASE("layernorm_backward") {
    std::vector<Shape> sizes = shapes();
    for (Shape more : {Shape{1, 540, 1024}, Shape{1, 540, 2048}, Shape{1, 140, 8192}, Shape{3, 700, 264},
                       Shape{1, 900, 512}, Shape{1, 700, 1280}})
        sizes.push_back(more);
    enum class Before { null, in_place, apart };
    for (Shape shape : sizes) {
        const int B = shape.B, T = shape.T, C = shape.C;
        for (Before where : {Before::null, Before::in_place, Before::apart}) {
            INFO("B " << B << " T " << T << " C " << C << " before " << int(where));
            const int N = B * T;
            const size_t n = size_t(N) * C;
            const bool with_sum = where != Before::apart;
            Floats x = random_reals(n, 2.0f, 1.0f), weight = random_reals(C), bias = random_reals(C),
                   dout = random_reals(n), before = random_reals(n), dx(n);
            Floats out(n), mean(N), rstd(N),
                cpu_scratch(std::max(CpuOps::layernorm_scratch_floats(C), CpuOps::bias_scratch_floats(C)));
            CpuOps::layernorm_forward(out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N, C);
            const Floats dweight_before = normal(C), dbias_before = normal(C), dsum_before = normal(C);
            Floats dweight = dweight_before, dbias = dbias_before, dsum = dsum_before;
            CpuOps::layernorm_backward(dx.data(), dweight.data(), dbias.data(), nullptr,
                                       where == Before::null ? nullptr : before.data(), dout.data(), x.data(),
                                       weight.data(), mean.data(), rstd.data(), N, C, cpu_scratch.data());

            DeviceBuffer<real> device_dout(narrow(dout)), device_x(narrow(x)), device_weight(narrow(weight)),
                device_before(narrow(before));
            DeviceBuffer<float> device_mean(mean), device_rstd(rstd);
            Reals first_dx;
            Floats first_dweight, first_dbias, first_dsum;
            for (int repetition = 0; repetition < 2; repetition++) {
                DeviceBuffer<real> device_dx(n);
                if (where == Before::in_place) device_dx.upload(narrow(before));
                DeviceBuffer<float> device_dweight(dweight_before), device_dbias(dbias_before),
                    device_dsum(dsum_before), scratch(GptKernels::layernorm_scratch_floats(C));
                GptKernels::layernorm_backward(
                    device_dx, device_dweight, device_dbias, with_sum ? device_dsum.data() : nullptr,
                    where == Before::null       ? nullptr
                    : where == Before::in_place ? device_dx.data()
                                                : device_before.data(),
                    device_dout, device_x, device_weight, device_mean, device_rstd, N, C, scratch);
                Reals got_dx = device_dx.download();
                Floats got_dweight = device_dweight.download(), got_dbias = device_dbias.download(),
                       got_dsum = device_dsum.download();
                if (repetition == 0) {
                    // Where dx is the difference of larger numbers its error is theirs: g*rstd, which dout bounds.
                    check_close(got_dx, dx, C, 2e-5);
                    check_close(got_dweight, dweight, C);
                    check_close(got_dbias, dbias, C);
                    // The sums of what was stored: rounded, so not those of the CPU's dx.
                    if (with_sum) CpuOps::bias_backward(dsum.data(), widen(got_dx).data(), N, C, cpu_scratch.data());
                    check_close(got_dsum, dsum, C, 1e-5, with_sum ? std::sqrt(double(N)) : 0);
                    first_dx = got_dx, first_dweight = got_dweight, first_dbias = got_dbias, first_dsum = got_dsum;
                } else {
                    CHECK(same_bits(got_dx, first_dx));
                    CHECK(same_bits(got_dweight, first_dweight));
                    CHECK(same_bits(got_dbias, first_dbias));
                    CHECK(same_bits(got_dsum, first_dsum));
                }
            }
        }
    }
}

TEST_CASE("gelu_forward, gelu_backward") {
    for (size_t n : {8, 72, 2048, 2056, 77 * 776}) {
        CAPTURE(n);
        Floats a = random_reals(n, 3.0f), b = random_reals(n), want(n);
        DeviceBuffer<real> device_a(n), device_b(narrow(b)), out(n);

        // Element by element: x*sigmoid keeps its relative accuracy also where gelu(x) is tiny.
        a[0] = 0, a[1] = -0.0f, a[2] = 12, a[3] = -12, a[4] = -4.5f;
        if (n > 8) a[8] = 100, a[9] = -100;
        a = widen(narrow(a));
        device_a.upload(narrow(a));
        out.poison();
        CpuOps::gelu_forward(want.data(), a.data(), n);
        GptKernels::gelu_forward(out, device_a, n);
        Floats got = widen(out.download());
        for (size_t i = 0; i < n; i++) {  // exp(y) has a relative error of |y|*2^-24; 1e-37: the CPU's exp ends there
            CAPTURE(a[i]);
            REQUIRE(std::fabs(got[i] - want[i]) <= (rounding<real> + 2e-5) * std::fabs(want[i]) + 1e-35);
        }

        CpuOps::gelu_backward(want.data(), b.data(), a.data(), n);
        out.poison();
        GptKernels::gelu_backward(out, device_b, device_a, n);
        const Reals separate = out.download();
        check_close(separate, want, n);
        GptKernels::gelu_backward(device_b, device_b, device_a, n);  // in place
        CHECK(same_bits(device_b.download(), separate));
    }
}

static void test_classifier(int N, int V, int Vp, float scale, float offset) {
    INFO("N " << N << " V " << V << " Vp " << Vp << " logits around " << offset << " +- " << scale);
    const size_t n = size_t(N) * Vp;
    const float dloss = 1.0f / 512;
    Floats logits = random_reals(n, scale, offset), losses(N);
    Ints targets = integers(N, V);
    targets[N - 1] = V - 1;
    logits[targets[0]] = to_float(from_float<real>(offset + 6 * scale + 20));  // a sure prediction
    for (int row = 0; row < N; row++)                                          // masked, whatever is there
        for (int c = V; c < Vp; c++) logits[size_t(row) * Vp + c] = NAN;
    Floats want = logits;
    CpuOps::classifier(losses.data(), want.data(), targets.data(), dloss, N, V, Vp, true);

    DeviceBuffer<real> device_logits(narrow(logits));
    DeviceBuffer<float> device_losses(N);
    DeviceBuffer<int> device_targets(targets);
    GptKernels::classifier(device_losses, device_logits, device_targets, dloss, N, V, Vp, false);
    CHECK(same_bits(device_logits.download(), narrow(logits)));
    Floats evaluated = device_losses.download();
    device_losses.poison();
    GptKernels::classifier(device_losses, device_logits, device_targets, dloss, N, V, Vp, true);
    Floats got_losses = device_losses.download(), got = widen(device_logits.download());
    CHECK(same_bits(evaluated, got_losses));
    for (int row = 0; row < N; row++) {
        // A loss is the difference of numbers as large as the largest logit.
        CAPTURE(row);
        REQUIRE(std::fabs(got_losses[row] - losses[row]) <= 1e-6 * (10 + std::fabs(offset) + 10 * scale));
        size_t wrong = 0, first = 0;
        for (int c = 0; c < Vp; c++) {
            size_t i = size_t(row) * Vp + c;
            // exp(y) in fp32 has a relative error of |y|*2^-24 and more. The target's entry: a difference of size dloss
            double bound = (rounding<real> + 2e-5) * std::fabs(want[i]) + (c == targets[row] ? 2e-6 * dloss : 1e-37);
            if (!(std::fabs(double(got[i]) - want[i]) <= bound) && wrong++ == 0) first = i;
        }
        INFO(wrong << " wrong, first at " << first % Vp << ": " << got[first] << ", should be " << want[first]);
        REQUIRE(wrong == 0);
    }
}

TEST_CASE("classifier") {
    const std::pair<int, int> vocabularies[] = {{1, 8},     {3, 64},      {50, 56},       {256, 256},    {257, 264},
                                                {257, 384}, {4099, 4104}, {50257, 50304}, {50257, 50264}};
    for (std::pair<int, int> sizes : vocabularies) {
        const int V = sizes.first, Vp = sizes.second;
        test_classifier(1, V, Vp, 1.0f, 0.0f);
        test_classifier(3, V, Vp, 4.0f, -50.0f);
    }
    test_classifier(77, 257, 264, 2.0f, 80.0f);
    if (!large_sizes()) return;
    test_classifier(1027, 50257, 50304, 3.0f, 5.0f);
    test_classifier(20001, 257, 320, 3.0f, 5.0f);
}

#ifndef FIBER
TEST_CASE("classifier with more than 2^32 logits") {
    const int V = 50257, Vp = 50304, N = int((size_t(1) << 32) / Vp) + 8;
    const size_t n = size_t(N) * Vp;
    size_t available = 0, total = 0;
    CUDA_CHECK(cudaMemGetInfo(&available, &total));
    if (available < n * sizeof(real) + (size_t(1) << 30)) {
        MESSAGE("SKIPPED: needs " << (n * sizeof(real) >> 30) << " GiB of device memory");
        return;
    }
    DeviceBuffer<real> logits(n);
    CUDA_CHECK(cudaMemsetAsync(logits.data(), 0, n * sizeof(real), cuda_stream));
    DeviceBuffer<float> losses(N);
    DeviceBuffer<int> targets(Ints(N, 3));
    GptKernels::classifier(losses, logits, targets, float(V), N, V, Vp, true);  // softmax*dloss = 1 everywhere
    for (float loss : losses.download()) REQUIRE(loss == doctest::Approx(std::log(double(V))).epsilon(1e-6));
    for (int row : {0, N / 2, N - 1}) {
        Reals got(Vp);
        CUDA_CHECK(cudaMemcpyAsync(got.data(), logits.data() + size_t(row) * Vp, Vp * sizeof(real),
                                   cudaMemcpyDeviceToHost, cuda_stream));
        CUDA_CHECK(cudaStreamSynchronize(cuda_stream));
        Floats want(Vp, 1.0f);
        want[3] -= V;
        std::fill(want.begin() + V, want.end(), 0.0f);
        check_close(got, want, Vp);
    }
}
#endif

TEST_CASE("sum_losses") {
    for (int n : {1, 77, 1024, 5000}) {
        CAPTURE(n);
        Floats losses = normal(n, 1.0f, 4.0f);
        std::vector<double> before(1, 123.25);
        double want = before[0];
        CpuOps::sum_losses(&want, losses.data(), n);
        DeviceBuffer<double> acc(before);
        GptKernels::sum_losses(acc, DeviceBuffer<float>(losses), n);
        CHECK(acc.download()[0] == doctest::Approx(want).epsilon(1e-12));  // double: n * 2^-53
    }
}

TEST_CASE("bias_backward") {
    struct Size {
        int N, OC;
    };
    std::vector<Size> sizes = {{1, 8},    {77, 8},     {1, 776},  {77, 72},    {300, 264},
                               {9, 2304}, {1000, 256}, {3, 6400}, {130, 33792}};
    if (large_sizes())
        for (Size large : {Size{16384, 2304}, Size{65536, 768}, Size{1027, 32768}}) sizes.push_back(large);
    for (Size size : sizes) {
        const int N = size.N, OC = size.OC;
        for (bool accumulate : {false, true}) {
            INFO("N " << N << " OC " << OC << " accumulate " << accumulate);
            Floats dout = random_reals(size_t(N) * OC), before = accumulate ? normal(OC) : Floats(OC), want = before;
            Floats cpu_scratch(CpuOps::bias_scratch_floats(OC)), first;
            CpuOps::bias_backward(want.data(), dout.data(), N, OC, cpu_scratch.data());
            DeviceBuffer<real> device_dout(narrow(dout));
            for (int repetition = 0; repetition < 2; repetition++) {
                DeviceBuffer<float> dbias(before), scratch(GptKernels::bias_scratch_floats(OC));
                GptKernels::bias_backward(dbias, device_dout, N, OC, scratch);
                Floats got = dbias.download();
                if (repetition == 0) check_close(got, want, OC);
                else CHECK(same_bits(got, first));
                first = got;
            }
        }
    }
}

// The gradient alone; with momentum: test_ns.cpp.
TEST_CASE("norm_sums and clip_scale") {
    Floats x = normal(300000);
    for (size_t i = 100000; i < 110000; i++) x[i] *= 1e20f;   // whose squares are beyond fp32
    for (size_t i = 200000; i < 210000; i++) x[i] *= 1e-25f;  // below it
    std::vector<NormBlock> blocks;
    auto add = [&](size_t offset, int count) { blocks.push_back({offset, 0, count, 1, count, false, true}); };
    add(0, 1), add(4, 3), add(8, 65536), add(99999, 4097), add(200000, 10000), add(200001, 9), add(7, 0),
        add(299999, 1);
    for (int i = 0; i < 20; i++) {
        size_t begin = generator() % 290000;
        add(begin, int(1 + generator() % 5000));
    }
    blocks[3].counted = blocks.back().counted = false;  // another rank's
    const int n = int(blocks.size());
    DeviceBuffer<double> sums(n), dots(2 * n);
    DeviceBuffer<float> device_x(x);
    GptKernels::norm_sums(sums, dots, device_x, nullptr, DeviceBuffer<NormBlock>(blocks), n);
    const std::vector<double> got = sums.download();
    for (int i = 0; i < n; i++) {
        CAPTURE(i);
        double want = 0;
        for (int k = 0; k < blocks[i].cols && blocks[i].counted; k++)
            want += double(x[blocks[i].offset + k]) * x[blocks[i].offset + k];
        CHECK(std::fabs(got[i] - want) <= 1e-12 * want);
    }

    const double infinity = INFINITY, nan = NAN;
    for (int count : {1, 5, 1024, 3000}) {
        for (double last : {1.0, 1e-30, 1e80, infinity, nan}) {
            for (float max_norm : {0.0f, 0.5f, 1e6f}) {
                INFO(count << " sums, the last " << last << ", max_norm " << max_norm);
                std::vector<double> values(count, 1e-3);
                values[count - 1] = last;
                Floats want_clip(4);
                int64_t want_t = 7;
                CpuOps::clip_scale(want_clip.data(), &want_t, values.data(), count, max_norm, 0.9, 0.999);
                DeviceBuffer<float> clip(4);
                DeviceBuffer<int64_t> t(std::vector<int64_t>{7});
                GptKernels::clip_scale(clip, t, DeviceBuffer<double>(values), count, max_norm, 0.9, 0.999);
                Floats got_clip = clip.download();
                CHECK(t.download()[0] == want_t);
                CHECK((got_clip[0] == 0) == (want_clip[0] == 0));
                if (want_clip[0] != 0) {
                    CHECK(got_clip[0] == doctest::Approx(want_clip[0]).epsilon(1e-6).scale(0));
                    CHECK(got_clip[2] == doctest::Approx(want_clip[2]).epsilon(1e-6));
                    CHECK(got_clip[3] == doctest::Approx(want_clip[3]).epsilon(1e-4));  // 1 - 0.992: two digits cancel
                }
                CHECK(std::isfinite(got_clip[1]) == std::isfinite(want_clip[1]));
                if (std::isfinite(want_clip[1])) CHECK(got_clip[1] == doctest::Approx(want_clip[1]).epsilon(1e-6));
                else CHECK(got_clip[0] == 0);
            }
        }
    }
}

TEST_CASE("adamw, cast_params") {
    for (size_t n : {1, 3, 4, 5, 1023, 1024, 8 * 72 + 6, 20000}) {
        for (float scale : {1.0f, 0.25f, 0.0f}) {
            INFO("n " << n << " scale " << scale);
            Floats master = normal(n), m = normal(n, 0.1f), v = normal(n, 0.1f), params(n);
            for (float& value : v) value *= value;
            Floats clip = {scale, 1.0f, 0.0f, 0.0f};
            const Floats master_before = master, m_before = m, v_before = v;
            DeviceBuffer<real> device_params(n);
            DeviceBuffer<float> device_master(master), device_m(m), device_v(v);

            GptKernels::cast_params(device_params, device_master, n);
            CHECK(same_bits(device_params.download(), narrow(master)));

            const float lr = 0.3f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, weight_decay = 0.1f;
            for (int step = 1; step <= 3; step++) {
                Floats grads = normal(n, 2.0f);
                clip[2] = 1 - std::pow(beta1, float(step)), clip[3] = 1 - std::pow(beta2, float(step));
                const DeviceBuffer<float> device_clip(clip);
                CpuOps::adamw(params.data(), master.data(), m.data(), v.data(), grads.data(), n, lr, beta1, beta2, eps,
                              weight_decay, clip.data());
                GptKernels::adamw(device_params, device_master, device_m, device_v, DeviceBuffer<float>(grads), n, lr,
                                  beta1, beta2, eps, weight_decay, device_clip);
            }
            check_close(device_master.download(), master, n, 1e-5, 1);
            check_close(device_m.download(), m, n, 1e-5, 0.1);
            check_close(device_v.download(), v, n);
            CHECK(same_bits(device_params.download(), narrow(device_master.download())));

            if (scale == 0) {  // not one bit may change
                CHECK(same_bits(device_master.download(), master_before));
                CHECK(same_bits(device_m.download(), m_before));
                CHECK(same_bits(device_v.download(), v_before));
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// mma.cuh: on a GPU this shows that the fragment layouts written there, and emulated in fiber.h, are the real ones.

// d (16,8) = 2 * a (16,16) b (16,8), once with b from bt (8,16) by ldmatrix and once from b (16,8) by ldmatrix_trans.
template <class T>
__global__ void mma_kernel(float* d, const T* a, const T* bt, const T* b) {
    __shared__ __align__(16) T shared_a[16 * 16], shared_bt[8 * 16], shared_b[16 * 8], zeros[16 * 8];
    int lane = threadIdx.x;
    cp_async_16(shared_a + lane * 8, a + lane * 8, true);
    cp_async_commit();
    if (lane < 16) {
        cp_async_16(shared_bt + lane * 8, bt + lane * 8, true);
        cp_async_16(shared_b + lane * 8, b + lane * 8, true);
        cp_async_16(zeros + lane * 8, b, false);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncwarp();
    uint32_t fragment_a[4], fragment_b[2][2], fragment_z[4];
    ldmatrix_x4(fragment_a, shared_a + lane % 16 * 16 + lane / 16 * 8);
    cp_async_wait<0>();
    __syncwarp();
    ldmatrix_x2(fragment_b[0], shared_bt + lane % 8 * 16 + lane / 8 % 2 * 8);
    ldmatrix_x2_trans(fragment_b[1], shared_b + lane % 16 * 8);
    ldmatrix_x4_trans(fragment_z, zeros + lane % 16 * 8);
    float sum[4] = {};
    for (int i = 0; i < 2; i++) mma_m16n8k16<T>(sum, fragment_a, fragment_b[i]);
    mma_m16n8k16<T>(sum, fragment_a, fragment_z);
    for (int i = 0; i < 4; i++) d[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}

template <class T>
static void test_mma() {
    for (int repetition = 0; repetition < 4; repetition++) {
        std::vector<T> a(16 * 16), b(16 * 8), bt(8 * 16);
        for (T& value : a) value = from_float<T>(normal(1)[0]);
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < 8; n++) b[k * 8 + n] = bt[n * 16 + k] = from_float<T>(normal(1)[0]);
        Floats want(16 * 8);
        for (int m = 0; m < 16; m++)
            for (int n = 0; n < 8; n++)
                for (int k = 0; k < 16; k++) want[m * 8 + n] += 2 * to_float(a[m * 16 + k]) * to_float(b[k * 8 + n]);
        DeviceBuffer<float> d(16 * 8);
        LAUNCH(mma_kernel<T>, 1, 32, 0, d, DeviceBuffer<T>(a), DeviceBuffer<T>(bt), DeviceBuffer<T>(b));
        check_close(d.download(), want, want.size());
    }
}

TEST_CASE("ldmatrix, mma, cp.async") {
    test_mma<__nv_bfloat16>();
    test_mma<__half>();
}

}  // namespace test_kernels

int main(int argc, char** argv) {
    const char* text = std::getenv("TEST_SEED");
    unsigned long long seed = text ? std::strtoull(text, nullptr, 10) : std::random_device()();
    std::printf("test_kernels: TEST_SEED=%llu, %s\n", seed, sizeof(real) == 2 ? "bf16" : "fp32");
    test_kernels::generator.seed(seed);
    return doctest::Context(argc, argv).run();
}
