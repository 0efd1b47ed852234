// Tests of cpu_backend.h, the truth that the CUDA kernels are tested against; so it needs a truth of its own:
//   1. forward operations against the definition, written as plain loops in double;
//   2. backward operations against central differences of those loops (error about 1e-9: the bounds below are fp32's),
//      the linear ones (embedding, products, bias) against sums written out in double;
//   3. the optimizer against a transcription in double, Newton-Schulz against a singular value decomposition;
//   4. the same bits on 1, 2 and 3 threads;
//   5. the prediction of --print_plan against logs of dev/results.
// At the end the whole program, on this backend, against PyTorch: test_golden.cpp.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <functional>
#include <limits>
#include <numeric>
#include <random>

#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cu"

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

static std::mt19937 generator(1337);

static Floats random_normal(size_t n, float scale = 1.0f) {
    std::normal_distribution<float> distribution(0.0f, scale);
    Floats x(n);
    for (float& value : x) value = distribution(generator);
    return x;
}

static std::vector<int> integers(size_t n, int below) {
    std::uniform_int_distribution<int> distribution(0, below - 1);
    std::vector<int> x(n);
    for (int& value : x) value = distribution(generator);
    return x;
}

static Doubles doubles(const Floats& x) { return Doubles(x.begin(), x.end()); }

static double dot(const Doubles& a, const Doubles& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); }

// The largest difference, relative to the largest expected value.
static double error(const Floats& got, const Doubles& want) {
    REQUIRE(got.size() == want.size());
    double largest = 1e-30, difference = 0;
    for (size_t i = 0; i < got.size(); i++) {
        largest = std::max(largest, std::fabs(want[i]));
        const double d = std::fabs(got[i] - want[i]);
        difference = d <= difference ? difference : d;  // keeps a NaN
    }
    return difference / largest;
}

// d f / d x by central differences.
static Doubles differences(const std::function<double(const Doubles&)>& f, Doubles x) {
    const double h = 1e-5;
    Doubles gradient(x.size());
    for (size_t i = 0; i < x.size(); i++) {
        const double here = x[i];
        x[i] = here + h;
        const double above = f(x);
        x[i] = here - h;
        gradient[i] = (above - f(x)) / (2 * h);
        x[i] = here;
    }
    return gradient;
}

// What a backward that adds must hold: `before` plus the gradient.
static Doubles plus(const Floats& before, Doubles gradient) {
    for (size_t i = 0; i < gradient.size(); i++) gradient[i] += before[i];
    return gradient;
}

// --------------------------------------------------------------------------------------------------------------------
// The model's operations by definition, in double

namespace truth {

Doubles layernorm(const Doubles& x, const Doubles& weight, const Doubles& bias, int N, int C) {
    Doubles out(x.size());
    for (int n = 0; n < N; n++) {
        double mean = 0, variance = 0;
        for (int i = 0; i < C; i++) mean += x[n * C + i] / C;
        for (int i = 0; i < C; i++) variance += (x[n * C + i] - mean) * (x[n * C + i] - mean) / C;
        for (int i = 0; i < C; i++) {
            out[n * C + i] = (x[n * C + i] - mean) / std::sqrt(variance + 1e-5) * weight[i] + bias[i];
        }
    }
    return out;
}

Doubles gelu(Doubles x) {
    for (double& v : x) v = 0.5 * v * (1 + std::tanh(std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
    return x;
}

// qkv (B,T,3C) -> out (B,T,C), lse (B,H,T)
Doubles attention(const Doubles& qkv, int B, int T, int C, int H, Doubles* lse = nullptr) {
    const int hd = C / H;
    Doubles out(size_t(B) * T * C), p(T);
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int t = 0; t < T; t++) {
                auto at = [&](int s, int part) { return qkv.data() + (size_t(b) * T + s) * 3 * C + part * C + h * hd; };
                double total = 0;
                for (int s = 0; s <= t; s++) {
                    double score = 0;
                    for (int i = 0; i < hd; i++) score += at(t, 0)[i] * at(s, 1)[i];
                    p[s] = std::exp(score / std::sqrt(hd));
                    total += p[s];
                }
                for (int s = 0; s <= t; s++) {
                    for (int i = 0; i < hd; i++)
                        out[(size_t(b) * T + t) * C + h * hd + i] += p[s] / total * at(s, 2)[i];
                }
                if (lse) (*lse)[(size_t(b) * H + h) * T + t] = std::log(total);
            }
        }
    }
    return out;
}

// logits (N,Vp) -> losses (N) over the first V columns
Doubles losses(const Doubles& logits, const std::vector<int>& targets, int N, int V, int Vp) {
    Doubles out(N);
    for (int n = 0; n < N; n++) {
        double total = 0;
        for (int i = 0; i < V; i++) total += std::exp(logits[size_t(n) * Vp + i]);
        out[n] = std::log(total) - logits[size_t(n) * Vp + targets[n]];
    }
    return out;
}

// out (M,N) = op(A) op(B), op(A) (M,K), op(B) (K,N), each with its row stride
Doubles matmul(bool ta, bool tb, int M, int N, int K, const Floats& A, int lda, const Floats& B, int ldb) {
    Doubles out(size_t(M) * N);
    for (int i = 0; i < M; i++) {
        for (int j = 0; j < N; j++) {
            for (int k = 0; k < K; k++) {
                out[size_t(i) * N + j] +=
                    double(ta ? A[k * lda + i] : A[i * lda + k]) * (tb ? B[j * ldb + k] : B[k * ldb + j]);
            }
        }
    }
    return out;
}

}  // namespace truth

TEST_CASE("exponential agrees with std::exp over fp32's range") {
    double worst = 0;
    for (float x = -86.9f; x < 87.9f; x += 0.0137f) {
        worst = std::max(worst, std::fabs(CpuOps::exponential(x) / std::exp(double(x)) - 1));
    }
    CHECK(worst < 2.5e-7);
    CHECK(CpuOps::exponential(0.0f) == 1.0f);
    CHECK(CpuOps::exponential(-INFINITY) < 2e-38f);
    CHECK(std::isnan(CpuOps::exponential(NAN)));
}

TEST_CASE("memory: zero-filled, aligned, and a refusal in words") {
    char* memory = static_cast<char*>(CpuOps::alloc(1000, "a test"));
    CHECK((uintptr_t)memory % 256 == 0);
    CHECK(std::all_of(memory, memory + 1000, [](char c) { return c == 0; }));
    free(memory);
    CHECK_THROWS_WITH_AS(CpuOps::alloc(1ull << 50, "the moon"), doctest::Contains("the moon needs 1073741824.0 MiB"),
                         Error);
}

TEST_CASE("memory: limits of control groups count, those above too; the page cache can be had") {
    namespace fs = std::filesystem;
    const fs::path root = fs::temp_directory_path() / strprintf("test_cpu_%d", int(getpid()));
    auto write = [&](const std::string& path, const std::string& text) {
        fs::create_directories((root / path).parent_path());
        std::ofstream(root / path) << text;
    };
    auto left = [&](const std::string& group) {
        write("groups", "9:name=systemd:/x\n" + group + "\n");
        return CpuOps::group_memory_left(root / "groups", root);
    };
    const size_t none = SIZE_MAX;
    CHECK(left("0::/") == none);
    write("a/memory.max", "1000\n");
    write("a/memory.current", "300\n");
    write("a/memory.stat", "anon 1\ninactive_anon 9\ninactive_file 20\nactive_file 30\n");
    write("a/b/memory.max", "max\n");
    write("a/b/memory.current", "100\n");
    CHECK(left("0::/a") == 1000 - 300 + 20 + 30);
    CHECK(left("0::/a/b") == 750);
    CHECK(left("0::/a/not_here") == 750);
    write("a/b/memory.max", "600\n");
    CHECK(left("0::/a/b") == 500);
    write("a/b/memory.current", "700\n");
    CHECK(left("0::/a/b") == 0);
    CHECK(left("0::/c") == none);
    write("memory/j/memory.limit_in_bytes", "5000\n");
    write("memory/j/memory.usage_in_bytes", "4000\n");
    write("memory/j/memory.stat", "inactive_file 1\ntotal_inactive_file 50\ntotal_active_file 60\n");
    CHECK(left("4:memory:/j/k") == 1110);
    fs::remove_all(root);
}

TEST_CASE("embedding") {
    const int B = 3, T = 7, C = 24, V = 5;
    std::vector<int> tokens = integers(B * T, V), order(B * T);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    const Floats wte = random_normal(V * C), wpe = random_normal((T + 2) * C), dout = random_normal(B * T * C);
    Floats out(B * T * C), dwte = random_normal(V * C), dwpe = random_normal((T + 2) * C);
    Doubles want(B * T * C), want_dwte = doubles(dwte), want_dwpe = doubles(dwpe);
    for (int n = 0; n < B * T; n++) {
        for (int i = 0; i < C; i++) {
            want[n * C + i] = double(wte[tokens[n] * C + i]) + wpe[n % T * C + i];
            want_dwte[tokens[n] * C + i] += dout[n * C + i];
            want_dwpe[n % T * C + i] += dout[n * C + i];
        }
    }
    CpuOps::embedding_forward(out.data(), tokens.data(), wte.data(), wpe.data(), B, T, C);
    CpuOps::embedding_backward(dwte.data(), dwpe.data(), dout.data(), tokens.data(), order.data(), B, T, C);
    CHECK(error(out, want) < 1e-6);
    CHECK(error(dwte, want_dwte) < 1e-6);
    CHECK(error(dwpe, want_dwpe) < 1e-6);
}

TEST_CASE("layernorm, alone and behind the residual") {
    for (auto [N, C] : {std::pair(1, 8), std::pair(35, 12), std::pair(3, 77)}) {
        CAPTURE(N);
        CAPTURE(C);
        const Floats a = random_normal(N * C), b = random_normal(N * C, 2), weight = random_normal(C),
                     bias = random_normal(C), dout = random_normal(N * C);
        Floats x(N * C), out(N * C), fused(N * C), residual(N * C), mean(N), rstd(N);
        CpuOps::residual_forward(x.data(), a.data(), b.data(), x.size());
        for (int i = 0; i < N * C; i++) CHECK(x[i] == a[i] + b[i]);
        CpuOps::layernorm_forward(out.data(), mean.data(), rstd.data(), x.data(), weight.data(), bias.data(), N, C);
        CHECK(error(out, truth::layernorm(doubles(x), doubles(weight), doubles(bias), N, C)) < 2e-6);
        CpuOps::residual_layernorm_forward(residual.data(), fused.data(), mean.data(), rstd.data(), a.data(), b.data(),
                                           weight.data(), bias.data(), N, C);
        CHECK(residual == x);
        CHECK(fused == out);

        const Floats dx0 = random_normal(N * C), dweight0 = random_normal(C), dbias0 = random_normal(C),
                     dsum0 = random_normal(C);
        Floats dx = dx0, dweight = dweight0, dbias = dbias0, dsum = dsum0;
        Floats scratch(CpuOps::layernorm_scratch_floats(C), NAN);
        CpuOps::layernorm_backward(dx.data(), dweight.data(), dbias.data(), dsum.data(), dx.data(), dout.data(),
                                   x.data(), weight.data(), mean.data(), rstd.data(), N, C, scratch.data());
        Floats apart(N * C, NAN), alone(N * C, NAN), unused(C), zeros(N * C);
        CpuOps::layernorm_backward(apart.data(), unused.data(), unused.data(), nullptr, dx0.data(), dout.data(),
                                   x.data(), weight.data(), mean.data(), rstd.data(), N, C, scratch.data());
        CHECK(apart == dx);
        CpuOps::layernorm_backward(alone.data(), unused.data(), unused.data(), nullptr, nullptr, dout.data(), x.data(),
                                   weight.data(), mean.data(), rstd.data(), N, C, scratch.data());
        CpuOps::layernorm_backward(zeros.data(), unused.data(), unused.data(), nullptr, zeros.data(), dout.data(),
                                   x.data(), weight.data(), mean.data(), rstd.data(), N, C, scratch.data());
        CHECK(alone == zeros);
        const Doubles column_sums = truth::matmul(true, false, C, 1, N, dx, C, Floats(N, 1.0f), 1);
        CHECK(error(dsum, plus(dsum0, column_sums)) < 2e-6);
        auto objective = [&, N = N, C = C](const Doubles& x, const Doubles& weight, const Doubles& bias) {
            return dot(doubles(dout), truth::layernorm(x, weight, bias, N, C));
        };
        const Doubles x64 = doubles(x), weight64 = doubles(weight), bias64 = doubles(bias);
        auto in_x = [&](const Doubles& v) { return objective(v, weight64, bias64); };
        auto in_weight = [&](const Doubles& v) { return objective(x64, v, bias64); };
        auto in_bias = [&](const Doubles& v) { return objective(x64, weight64, v); };
        CHECK(error(dx, plus(dx0, differences(in_x, x64))) < 3e-6);
        CHECK(error(dweight, plus(dweight0, differences(in_weight, weight64))) < 3e-6);
        CHECK(error(dbias, plus(dbias0, differences(in_bias, bias64))) < 3e-6);
    }
}

TEST_CASE("gelu, also where tanh saturates, and in place") {
    Floats x = random_normal(1001, 3);
    x.insert(x.end(), {0.0f, -0.0f, 20.0f, -20.0f, 1e4f, -1e4f});
    const size_t n = x.size();
    Floats out(n), dout = random_normal(n), dx(n), in_place = dout;
    CpuOps::gelu_forward(out.data(), x.data(), n);
    const Doubles want = truth::gelu(doubles(x));
    for (size_t i = 0; i < n; i++) CHECK(std::fabs(out[i] - want[i]) <= 1e-6 * (std::fabs(want[i]) + 0.1));
    CpuOps::gelu_backward(dx.data(), dout.data(), x.data(), n);
    CpuOps::gelu_backward(in_place.data(), in_place.data(), x.data(), n);
    CHECK(in_place == dx);
    for (size_t i = 0; i < n; i++) {
        auto f = [&](const Doubles& v) { return dout[i] * truth::gelu(v)[0]; };
        CHECK(std::fabs(dx[i] - differences(f, {x[i]})[0]) < 2e-6 * (std::fabs(dout[i]) + 0.1));
    }
}

TEST_CASE("matrix products: bias, row strides, tails of every tile") {
    for (auto [N, C, OC] : {std::tuple(1, 8, 24), std::tuple(1, 257, 133), std::tuple(5, 24, 61), std::tuple(77, 16, 7),
                            std::tuple(130, 257, 133)}) {
        CAPTURE(N);
        CAPTURE(OC);
        const int ldo = OC + 3;
        const Floats inp = random_normal(N * C), weight = random_normal(OC * C), bias = random_normal(OC),
                     dout = random_normal(N * ldo), dout_tight = random_normal(N * OC);
        Floats out(N * ldo, 7.0f), without_bias(N * OC), dinp(N * C, NAN), dweight = random_normal(OC * C),
                                                                           dbias = random_normal(OC);
        CpuOps::matmul_forward(out.data(), ldo, inp.data(), weight.data(), bias.data(), N, C, OC);
        CpuOps::matmul_forward(without_bias.data(), OC, inp.data(), weight.data(), nullptr, N, C, OC);
        Doubles want = truth::matmul(false, true, N, OC, C, inp, C, weight, C), want_strided(N * ldo, 7.0);
        CHECK(error(without_bias, want) < 2e-6);
        for (int n = 0; n < N; n++) {
            for (int i = 0; i < OC; i++) want_strided[n * ldo + i] = want[n * OC + i] + bias[i];
        }
        CHECK(error(out, want_strided) < 2e-6);  // and the gap between rows keeps its sevens

        CpuOps::matmul_backward_input(dinp.data(), dout_tight.data(), weight.data(), N, C, OC);
        CHECK(error(dinp, truth::matmul(false, false, N, C, OC, dout_tight, OC, weight, C)) < 2e-6);

        const Doubles want_dweight = plus(dweight, truth::matmul(true, false, OC, C, N, dout, ldo, inp, C));
        CpuOps::matmul_backward_weight(dweight.data(), dout.data(), ldo, inp.data(), N, C, OC, true);
        CHECK(error(dweight, want_dweight) < 2e-6);

        const Doubles want_dbias =
            plus(dbias, truth::matmul(true, false, OC, 1, N, dout_tight, OC, Floats(N, 1.0f), 1));
        Floats scratch(CpuOps::bias_scratch_floats(OC), NAN);
        CpuOps::bias_backward(dbias.data(), dout_tight.data(), N, OC, scratch.data());
        CHECK(error(dbias, want_dbias) < 2e-6);
    }
}

// gemm is this where there is no BLAS, and parallel_gemm calls it on tiles of its own. 2e-6 of the largest element:
// sums of up to 2 kDepth + 3 products, each rounded to 6e-8.
TEST_CASE("packed_gemm: all transpositions, tails of tiles and panels, strides, alpha and beta") {
    const int rows = CpuOps::kRows, columns = CpuOps::kColumns, depth = CpuOps::kDepth;
    struct Shape {
        int M, N, K;
    };
    for (auto [M, N, K] : {Shape{1, 1, 1}, Shape{rows - 1, columns + 1, 7}, Shape{2 * rows + 1, 3 * columns - 1, 33},
                           Shape{rows, columns, depth}, Shape{5, columns + 3, depth + 1}, Shape{rows + 2, 3, 0},
                           Shape{3 * rows, columns / 2 + 1, 2 * depth + 3}, Shape{128, 61, depth - 1}}) {
        for (int transposed = 0; transposed < 4; transposed++) {
            const bool ta = transposed & 1, tb = transposed & 2;
            CAPTURE(M);
            CAPTURE(N);
            CAPTURE(K);
            CAPTURE(transposed);
            const int lda = (ta ? M : K) + 3, ldb = (tb ? K : N) + 1, ldc = N + 5;
            const Floats A = random_normal(size_t(ta ? K : M) * lda), B = random_normal(size_t(tb ? N : K) * ldb);
            const Doubles product = truth::matmul(ta, tb, M, N, K, A, lda, B, ldb);
            for (float beta : {0.0f, 1.0f, -0.7f}) {
                const float alpha = 1.3f;
                // What lies between the rows of C stays; with beta 0 so does nothing of C itself.
                const Floats before = random_normal(size_t(M) * ldc);
                Floats C = before;
                Doubles want = doubles(before);
                for (int i = 0; i < M; i++) {
                    for (int j = 0; j < N; j++) {
                        want[i * ldc + j] = double(alpha) * product[i * N + j] + double(beta) * before[i * ldc + j];
                        if (beta == 0) C[i * ldc + j] = NAN;
                    }
                }
                CpuOps::packed_gemm(ta, tb, M, N, K, alpha, A.data(), lda, B.data(), ldb, beta, C.data(), ldc);
                CHECK(error(C, want) < 2e-6);
                for (int i = 0; i < M; i++) {
                    for (int j = N; j < ldc; j++) REQUIRE(C[i * ldc + j] == before[i * ldc + j]);
                }
            }
            // An element has the same bits in whatever tile it is computed.
            Floats whole(M * N), alone(1);
            CpuOps::packed_gemm(ta, tb, M, N, K, 1.0f, A.data(), lda, B.data(), ldb, 0.0f, whole.data(), N);
            for (int i = 0; i < M; i += 1 + M / 7) {
                for (int j = 0; j < N; j += 1 + N / 7) {
                    CpuOps::packed_gemm(ta, tb, 1, 1, K, 1.0f, A.data() + (ta ? i : i * lda), lda,
                                        B.data() + (tb ? j * ldb : j), ldb, 0.0f, alone.data(), 1);
                    REQUIRE(alone[0] == whole[i * N + j]);
                }
            }
        }
    }
}

TEST_CASE("attention") {
    struct Shape {
        int B, T, C, H;
    };
    for (auto [B, T, C, H] : {Shape{2, 1, 8, 2}, Shape{2, 13, 24, 3}, Shape{1, 70, 6, 2}}) {
        CAPTURE(T);
        const Floats qkv = random_normal(B * T * 3 * C), dout = random_normal(B * T * C);
        Floats out(B * T * C), lse(B * H * T), dqkv(B * T * 3 * C, NAN), delta(B * H * T);
        CpuOps::attention_forward(out.data(), lse.data(), qkv.data(), B, T, C, H);
        Doubles want_lse(lse.size());
        CHECK(error(out, truth::attention(doubles(qkv), B, T, C, H, &want_lse)) < 2e-6);
        CHECK(error(lse, want_lse) < 2e-6);
        Floats last(C, NAN);
        CpuOps::attention_last_row(last.data(), qkv.data(), T, C, H);
        CHECK(error(last, doubles(Floats(&out[(T - 1) * C], &out[(T - 1) * C] + C))) < 2e-6);
        Floats dbias = random_normal(3 * C), scratch(CpuOps::attention_scratch_floats(B, T, C, H), NAN);
        Doubles want_dbias = doubles(dbias);
        CpuOps::attention_backward(dqkv.data(), dbias.data(), delta.data(), dout.data(), qkv.data(), out.data(),
                                   lse.data(), B, T, C, H, scratch.data());
        for (int i = 0; i < B * T * 3 * C; i++) want_dbias[i % (3 * C)] += dqkv[i];
        CHECK(error(dbias, want_dbias) < 2e-6);
        auto objective = [&, B = B, T = T, C = C, H = H](const Doubles& qkv) {
            return dot(doubles(dout), truth::attention(qkv, B, T, C, H));
        };
        CHECK(error(dqkv, differences(objective, doubles(qkv))) < 5e-6);
    }
    SUBCASE("scores far beyond what exp can hold") {  // queries and keys of 30 times the usual length
        const int T = 77, C = 16;
        Floats qkv = random_normal(T * 3 * C), out(T * C), lse(T);
        for (int t = 0; t < T; t++) {
            for (int i = 0; i < 2 * C; i++) qkv[t * 3 * C + i] *= 30;
        }
        CpuOps::attention_forward(out.data(), lse.data(), qkv.data(), 1, T, C, 1);
        CHECK(std::all_of(out.begin(), out.end(), [](float x) { return std::fabs(x) < 10; }));
        CHECK(*std::max_element(lse.begin(), lse.end()) > 1000);
        Floats last(C, NAN);
        CpuOps::attention_last_row(last.data(), qkv.data(), T, C, 1);
        CHECK(error(last, doubles(Floats(&out[(T - 1) * C], &out[0] + T * C))) < 1e-4);  // scores of 1000 in fp32
    }
}

TEST_CASE("classifier: any vocabulary, padding masked") {
    for (auto [N, V, Vp] :
         {std::tuple(5, 61, 64), std::tuple(3, 256, 256), std::tuple(3, 257, 384), std::tuple(2, 50257, 50304)}) {
        CAPTURE(V);
        const float dloss = 0.37f;
        Floats logits = random_normal(N * Vp, 3), losses(N);
        for (int n = 0; n < N; n++)
            std::fill(&logits[n * Vp + V], &logits[n * Vp] + Vp, 1e9f);  // padding holds rubbish
        std::vector<int> targets = integers(N, V);
        targets[0] = V - 1;
        Floats dlogits = logits;
        CpuOps::classifier(losses.data(), dlogits.data(), targets.data(), dloss, N, V, Vp, false);
        CHECK(dlogits == logits);
        const Doubles want = truth::losses(doubles(logits), targets, N, V, Vp);
        CHECK(error(losses, want) < 1e-6);
        double mean = 1;
        CpuOps::sum_losses(&mean, losses.data(), N);
        CHECK(mean == doctest::Approx(1 + std::accumulate(want.begin(), want.end(), 0.0)).epsilon(1e-6));

        CpuOps::classifier(losses.data(), dlogits.data(), targets.data(), dloss, N, V, Vp, true);
        for (int n = 0; n < N; n++) {
            const Doubles row(&logits[n * Vp], &logits[n * Vp] + Vp);
            const Floats drow(&dlogits[n * Vp], &dlogits[n * Vp] + Vp);
            auto objective = [&, V = V, Vp = Vp](const Doubles& x) {
                return dloss * truth::losses(x, {targets[n]}, 1, V, Vp)[0];
            };
            if (V < 300) CHECK(error(drow, differences(objective, row)) < 1e-6);
            CHECK(std::fabs(std::accumulate(drow.begin(), drow.end(), 0.0)) < 1e-6);
            CHECK(drow[targets[n]] == doctest::Approx(dloss * (std::exp(-want[n]) - 1)).epsilon(1e-6).scale(0));
        }
    }
    SUBCASE("a NaN among the logits is a NaN loss") {
        Floats logits = random_normal(64), loss(1);
        logits[17] = NAN;
        const int target = 3;
        CpuOps::classifier(loss.data(), logits.data(), &target, 1.0f, 1, 64, 64, true);
        CHECK(std::isnan(loss[0]));
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The optimizer

TEST_CASE("global norm and clip scale") {
    const Floats x = random_normal(10000);
    auto run_of = [](size_t begin, int count) { return NormBlock{begin, 0, count, 1, count, false, true}; };
    std::vector<NormBlock> blocks = {run_of(0, 5000),   run_of(5000, 1), {5001, 0, 1000, 4, 1000, false, true},
                                     run_of(9001, 999), run_of(777, 0),  run_of(0, 100)};
    blocks[5].counted = false;
    const int n = int(blocks.size());
    Doubles sums(n, NAN), dots(2 * n);
    CpuOps::norm_sums(sums.data(), dots.data(), x.data(), nullptr, blocks.data(), n);
    const double norm = std::sqrt(dot(doubles(x), doubles(x)));
    CHECK(sums[4] == 0);
    CHECK(sums[5] == 0);
    float clip[4] = {};
    int64_t t = 6;
    auto clip_scale = [&](float max_norm) { CpuOps::clip_scale(clip, &t, sums.data(), n, max_norm, 0.9, 0.95); };
    clip_scale(1.0f);
    CHECK(clip[1] == doctest::Approx(norm).epsilon(1e-6));
    CHECK(clip[0] == doctest::Approx(1 / norm).epsilon(1e-6).scale(0));
    CHECK(t == 7);
    CHECK(clip[2] == 1.0f - float(std::pow(0.9, 7)));
    CHECK(clip[3] == 1.0f - float(std::pow(0.95, 7)));
    clip_scale(1e6f);
    CHECK(clip[0] == 1.0f);
    clip_scale(0.0f);  // clipping off
    CHECK(clip[0] == 1.0f);
    sums[1] = INFINITY;
    clip_scale(1.0f);
    CHECK(clip[0] == 0.0f);
    sums[1] = NAN;
    clip_scale(1.0f);
    CHECK(clip[0] == 0.0f);
    CHECK(t == 9);  // the two that were skipped are not counted, nor do they change the corrections
    CHECK(clip[2] == 1.0f - float(std::pow(0.9, 9)));

    SUBCASE("the place in the arena does not change a bit") {
        Floats shifted(x.size() + 16);
        for (int shift = 0; shift < 16; shift++) {
            std::copy(x.begin(), x.end(), shifted.begin() + shift);
            const NormBlock run = run_of(shift, 9999), first = run_of(0, 9999);
            double a, b;
            CpuOps::norm_sums(&a, dots.data(), shifted.data(), nullptr, &run, 1);
            CpuOps::norm_sums(&b, dots.data(), x.data(), nullptr, &first, 1);
            CHECK(a == b);
        }
    }
}

TEST_CASE("adamw, ten steps") {
    const size_t n = 1003;
    const float lr = 1e-2f, beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f, decay = 0.1f;
    Floats params(n), master = random_normal(n), m(n), v(n);
    Doubles w64 = doubles(master), m64(n), v64(n);
    for (int t = 1; t <= 10; t++) {
        const Floats grads = random_normal(n, 1e-3f);
        const double c1 = 1 - std::pow(double(beta1), t), c2 = 1 - std::pow(double(beta2), t);
        const float clip[4] = {0.5f, 2.0f, float(c1), float(c2)};
        CpuOps::adamw(params.data(), master.data(), m.data(), v.data(), grads.data(), n, lr, beta1, beta2, eps, decay,
                      clip);
        for (size_t i = 0; i < n; i++) {
            const double g = double(grads[i]) * clip[0];
            m64[i] = double(beta1) * m64[i] + (1.0 - beta1) * g;
            v64[i] = double(beta2) * v64[i] + (1.0 - beta2) * g * g;
            w64[i] = w64[i] * (1.0 - double(lr) * decay) - lr * (m64[i] / c1) / (std::sqrt(v64[i] / c2) + eps);
        }
    }
    CHECK(error(master, w64) < 1e-6);
    CHECK(params == master);
    CHECK(error(m, m64) < 2e-6);
    CHECK(error(v, v64) < 2e-6);
}

TEST_CASE("a norm that is not finite skips every update") {
    const float clip[4] = {0.0f, NAN, 0.1f, 0.05f};
    const Floats before = random_normal(64);
    Floats params = before, master = before, m = before, v = before, grads(64, NAN);
    CpuOps::adamw(params.data(), master.data(), m.data(), v.data(), grads.data(), 64, 0.1f, 0.9f, 0.95f, 1e-8f, 0.1f,
                  clip);
    const Floats U(64, NAN);
    Floats X = before;
    const MatrixRef ref = {0, 0, 8};
    const float inverse_norm = NAN;
    CpuOps::muon_momentum(X.data(), m.data(), grads.data(), &ref, &inverse_norm, 1, 8, 8, 0.95f, true, NsType::fp32,
                          clip);
    CpuOps::muon_update(params.data(), master.data(), U.data(), &ref, 1, 8, 8, 0.9f, 0.1f, NsType::fp32, clip);
    CHECK(X == before);
    CHECK(params == before);
    CHECK(master == before);
    CHECK(m == before);
    CHECK(v == before);
}

// x rounded to a format with `mantissa` bits after the point, smallest normal 2^minimum and largest finite `largest`.
static double nearest(double x, int mantissa, int minimum, double largest) {
    if (x == 0 || !std::isfinite(x)) return x;
    const double unit = std::ldexp(1.0, std::max(std::ilogb(x), minimum) - mantissa);
    const double rounded = std::nearbyint(x / unit) * unit;  // to even on ties, the default rounding
    return std::fabs(rounded) > largest ? std::copysign(INFINITY, x) : rounded;
}
static double nearest(double x, NsType type) {
    return type == NsType::bf16   ? nearest(x, 7, -126, 0x1.FEp127)
           : type == NsType::fp16 ? nearest(x, 10, -14, 65504)
                                  : nearest(x, 23, -126, 0x1.FFFFFEp127);
}

TEST_CASE("bf16 and fp16 round to nearest, ties to even") {
    for (uint32_t bits = 0; bits < 65536; bits++) {  // every number of the format, and the midpoints between neighbours
        for (NsType type : {NsType::bf16, NsType::fp16}) {
            const auto decode = type == NsType::bf16 ? CpuOps::from_bf16 : CpuOps::from_fp16;
            const auto encode = type == NsType::bf16 ? CpuOps::to_bf16 : CpuOps::to_fp16;
            const float value = decode(uint16_t(bits)), above = decode(uint16_t(bits + 1));
            if (std::isnan(value)) {
                CHECK(std::isnan(decode(encode(value))));
                continue;
            }
            REQUIRE(encode(value) == bits);
            const float middle = 0.5f * value + 0.5f * above;
            if (!std::isfinite(middle)) continue;
            for (float x : {middle, std::nextafterf(middle, value), std::nextafterf(middle, above)}) {
                REQUIRE(double(decode(encode(x))) == nearest(x, type));
            }
        }
    }
    for (float x : {65519.99f, 65520.0f, 1e10f, -3e38f, 1e-30f, -1e-42f, INFINITY, -INFINITY, 0.0f}) {
        CHECK(double(CpuOps::from_fp16(CpuOps::to_fp16(x))) == nearest(x, NsType::fp16));
        CHECK(double(CpuOps::from_bf16(CpuOps::to_bf16(x))) == nearest(x, NsType::bf16));
    }
}

static const NsType kTypes[] = {NsType::bf16, NsType::fp16, NsType::fp32};
static double half_unit(NsType type) {
    return type == NsType::bf16 ? 0x1p-8 : type == NsType::fp16 ? 0x1p-11 : 0x1p-24;
}

static Floats unpack(const std::vector<char>& x, size_t n, NsType type) {
    Floats out(n);
    for (size_t i = 0; i < n; i++) out[i] = CpuOps::load(x.data(), i, type);
    return out;
}
static std::vector<char> pack(const Floats& x, NsType type) {
    std::vector<char> out(x.size() * ns_type_bytes(type));
    for (size_t i = 0; i < x.size(); i++) CpuOps::store(out.data(), i, x[i], type);
    return out;
}

// Two matrices in rows of 50 elements, the second standing up, and the block of the norm that each is.
struct TwoMatrices {
    static constexpr int ld = 50;
    std::vector<MatrixRef> refs;
    std::vector<NormBlock> blocks;
    size_t elements;
    TwoMatrices(int m, int n)
        : refs({{3, 1, ld, false, 2.0f, 0, 1}, {0, 0, ld, true, 0.5f, 1, 1}}), elements(ld * (m + n + 2)) {
        refs[1].offset = size_t(ld) * (m + 1), refs[1].state = refs[1].offset + 2;
        for (const MatrixRef& ref : refs)
            blocks.push_back({ref.offset, ref.state, ld, ref.tall ? n : m, ref.tall ? m : n, true, true});
    }
};

TEST_CASE("muon_momentum: x / |x|, lying down, padded, tiles, gradients from 1e-20 to 1e+10") {
    const float mu = 0.95f, clip[4] = {0.25f, 4, 0, 0};
    for (auto [m, n] : {std::pair(13, 29), std::pair(7, 41), std::pair(16, 16)}) {
        const TwoMatrices two(m, n);
        const int mp = round_up(m, 8), np = round_up(n, 8);
        for (NsType type : kTypes) {
            for (bool nesterov : {false, true}) {
                for (float magnitude : {1e-20f, 1.0f, 1e10f}) {
                    CAPTURE(m);
                    CAPTURE(magnitude);
                    const Floats grads = random_normal(two.elements, magnitude),
                                 before = random_normal(two.elements, magnitude);
                    Floats momentum = before, inverse_norms(2);
                    Doubles squares(2), dots(4), want(2 * mp * np), want_momentum = doubles(before);
                    std::vector<char> X(want.size() * ns_type_bytes(type), 0x55);
                    CpuOps::norm_sums(squares.data(), dots.data(), grads.data(), momentum.data(), two.blocks.data(), 2);
                    CpuOps::muon_inverse_norms(inverse_norms.data(), squares.data(), dots.data(), two.refs.data(), 2,
                                               mu, nesterov, clip);
                    CpuOps::muon_momentum(X.data(), momentum.data(), grads.data(), two.refs.data(),
                                          inverse_norms.data(), 2, m, n, mu, nesterov, type, clip);
                    for (int b = 0; b < 2; b++) {
                        const MatrixRef& ref = two.refs[b];
                        double length = 0;
                        for (int i = 0; i < m; i++) {
                            for (int j = 0; j < n; j++) {
                                const size_t at = ref.tall ? j * ref.ld + i : i * ref.ld + j;
                                const double g = 0.25 * grads[ref.offset + at];
                                double& buf = want_momentum[ref.state + at];
                                buf = double(mu) * buf + g;
                                const double x = nesterov ? g + double(mu) * buf : buf;
                                want[(size_t(b) * mp + i) * np + j] = x;
                                length += x * x;
                            }
                        }
                        for (int i = 0; i < mp * np; i++) want[size_t(b) * mp * np + i] /= std::sqrt(length);
                    }
                    const Floats got = unpack(X, want.size(), type);
                    CHECK(error(got, want) <= half_unit(type) + 1e-6);
                    CHECK(error(momentum, want_momentum) < 1e-6);
                    for (size_t i = 0; i < got.size(); i++)
                        if (want[i] == 0) REQUIRE(got[i] == 0);
                }
            }
        }
    }
    SUBCASE("zeros stay zeros") {
        const Floats grads(64);
        const MatrixRef ref = {0, 0, 8, false, 1, 0, 1};
        Floats X(64, 1.0f), momentum(64);
        const double squares = 0, dots[2] = {};
        float inverse_norm = NAN;
        CpuOps::muon_inverse_norms(&inverse_norm, &squares, dots, &ref, 1, mu, true, clip);
        CpuOps::muon_momentum(X.data(), momentum.data(), grads.data(), &ref, &inverse_norm, 1, 8, 8, mu, true,
                              NsType::fp32, clip);
        CHECK(X == grads);
    }
}

TEST_CASE("ns_product: both kinds, epilogue, exact symmetry, no dependence on the batch") {
    struct Shape {
        int M, N, K;
    };
    const int batch = 3;
    const float alpha = 0.7f, beta = -1.3f, diag = 2.5f;
    for (NsType type : kTypes) {
        for (auto [M, N, K] :
             {Shape{8, 8, 16}, Shape{64, 136, 64}, Shape{136, 136, 200}, Shape{136, 264, 136}, Shape{24, 24, 0}}) {
            for (bool symmetric : {false, true}) {
                if (symmetric && M != N) continue;
                CAPTURE(M);
                CAPTURE(K);
                const NsProduct kind = symmetric ? NsProduct::symmetric_nt : NsProduct::nn;
                const std::vector<char> A = pack(random_normal(size_t(batch) * M * K), type);
                const std::vector<char> B = symmetric ? A : pack(random_normal(size_t(batch) * K * N), type);
                Floats c = random_normal(size_t(batch) * M * N);
                if (symmetric) {
                    for (int b = 0; b < batch; b++) {
                        for (int i = 0; i < M; i++) {
                            for (int j = 0; j < i; j++) c[(size_t(b) * M + j) * N + i] = c[(size_t(b) * M + i) * N + j];
                        }
                    }
                }
                const std::vector<char> C = pack(c, type);
                std::vector<char> D(C.size()), plain(C.size()), alone(C.size());
                CpuOps::ns_product(D.data(), A.data(), B.data(), C.data(), alpha, beta, diag, batch, M, N, K, kind,
                                   type);
                CpuOps::ns_product(plain.data(), A.data(), B.data(), nullptr, 1, 0, 0, batch, M, N, K, kind, type);
                const size_t bytes = ns_type_bytes(type);
                for (size_t b = 0; b < batch; b++) {
                    CpuOps::ns_product(alone.data() + b * M * N * bytes, A.data() + b * M * K * bytes,
                                       B.data() + b * N * K * bytes, C.data() + b * M * N * bytes, alpha, beta, diag, 1,
                                       M, N, K, kind, type);
                }
                CHECK(alone == D);

                const Floats a = unpack(A, size_t(batch) * M * K, type), b = unpack(B, size_t(batch) * N * K, type);
                c = unpack(C, c.size(), type);
                Doubles want, want_plain;
                for (int matrix = 0; matrix < batch; matrix++) {
                    const Floats a1(a.data() + size_t(matrix) * M * K, a.data() + size_t(matrix + 1) * M * K);
                    const Floats b1(b.data() + size_t(matrix) * N * K, b.data() + size_t(matrix + 1) * N * K);
                    const Doubles product = truth::matmul(false, symmetric, M, N, K, a1, K, b1, symmetric ? K : N);
                    want_plain.insert(want_plain.end(), product.begin(), product.end());
                    for (int i = 0; i < M * N; i++) {
                        want.push_back(double(alpha) * product[i] + double(beta) * c[size_t(matrix) * M * N + i] +
                                       (i / N == i % N ? diag : 0));
                    }
                }
                const Floats got = unpack(D, c.size(), type);
                CHECK(error(got, want) < half_unit(type) + 2e-6);
                CHECK(error(unpack(plain, c.size(), type), want_plain) < half_unit(type) + 2e-6);
                for (int i = 0; symmetric && i < M; i++) {
                    for (int j = 0; j < i; j++) REQUIRE(got[size_t(i) * N + j] == got[size_t(j) * N + i]);
                }
            }
        }
    }
}

TEST_CASE("muon_update: tiles, transposition, the parameters follow the masters") {
    const float clip[4] = {1, 1, 0, 0}, decay = 0.99f, lr = 0.02f;
    for (auto [m, n] : {std::pair(13, 29), std::pair(7, 41)}) {
        const TwoMatrices two(m, n);
        const int mp = round_up(m, 8), np = round_up(n, 8);
        for (NsType type : kTypes) {
            const Floats master0 = random_normal(two.elements), params0 = random_normal(two.elements),
                         u = unpack(pack(random_normal(2 * mp * np), type), 2 * mp * np, type);
            Floats master = master0, params = params0;
            Doubles want = doubles(master0), want_params = doubles(params0);
            CpuOps::muon_update(params.data(), master.data(), pack(u, type).data(), two.refs.data(), 2, m, n, decay, lr,
                                type, clip);
            for (int b = 0; b < 2; b++) {
                const MatrixRef& ref = two.refs[b];
                for (int i = 0; i < m; i++) {
                    for (int j = 0; j < n; j++) {
                        const size_t at = ref.tall ? j * ref.ld + i : i * ref.ld + j;
                        want[ref.state + at] = want_params[ref.offset + at] =
                            double(decay) * master0[ref.state + at] -
                            double(lr) * ref.scale * u[(size_t(b) * mp + i) * np + j];
                    }
                }
            }
            CHECK(error(master, want) < 1e-6);
            CHECK(error(params, want_params) < 1e-6);
        }
    }
}

// --------------------------------------------------------------------------------------------------------------------
// The same bits on any number of threads

#ifdef _OPENMP
TEST_CASE("results do not depend on the number of threads") {
    const int B = 3, T = 77, C = 48, H = 3, N = B * T, V = 257, Vp = 264;
    const Floats x = random_normal(N * C), weight = random_normal(3 * C * C), gain = random_normal(C),
                 dout = random_normal(N * 3 * C), logits = random_normal(N * Vp);
    const std::vector<int> tokens = integers(N, V);
    std::vector<int> order(N);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return tokens[a] < tokens[b]; });
    const MatrixRef ref = {0, 0, C, true, 1, 0, 2};  // N > C
    const std::vector<NormBlock> blocks = {{0, 0, C, 100, C, true, true},
                                           {100 * C, 100 * C, C, N - 100, C, true, true}};

    auto run = [&](int threads) {
        omp_set_num_threads(threads);
        std::vector<Floats> results;
        auto result = [&](size_t n) {
            results.emplace_back(n);
            return results.back().data();
        };
        results.reserve(64);  // pointers stay valid
        float *mean = result(N), *rstd = result(N), *lse = result(B * H * T), *delta = result(B * H * T);
        float *qkv = result(N * 3 * C), *out = result(N * C), *d = result(N * C);
        float* scratch = result(std::max(CpuOps::layernorm_scratch_floats(C), CpuOps::bias_scratch_floats(3 * C)));
        CpuOps::embedding_backward(result(V * C), result(T * C), x.data(), tokens.data(), order.data(), B, T, C);
        CpuOps::layernorm_forward(result(N * C), mean, rstd, x.data(), gain.data(), gain.data(), N, C);
        CpuOps::layernorm_backward(d, result(C), result(C), result(C), nullptr, out, x.data(), gain.data(), mean, rstd,
                                   N, C, scratch);
        CpuOps::matmul_forward(qkv, 3 * C, x.data(), weight.data(), nullptr, N, C, 3 * C);
        CpuOps::matmul_backward_input(result(N * C), dout.data(), weight.data(), N, C, 3 * C);
        CpuOps::matmul_backward_weight(result(3 * C * C), dout.data(), 3 * C, x.data(), N, C, 3 * C, true);
        CpuOps::bias_backward(result(3 * C), dout.data(), N, 3 * C, scratch);
        CpuOps::matmul_forward(result(3 * C), 3 * C, x.data(), weight.data(), nullptr, 1, C, 3 * C);
        CpuOps::attention_last_row(result(C), qkv, T, C, H);
        CpuOps::attention_forward(out, lse, qkv, B, T, C, H);
        CpuOps::attention_backward(result(N * 3 * C), result(3 * C), delta, x.data(), qkv, out, lse, B, T, C, H,
                                   scratch);
        CpuOps::gelu_forward(result(N * C), x.data(), N * C);
        CpuOps::gelu_backward(result(N * C), dout.data(), x.data(), N * C);
        float* dlogits = result(N * Vp);
        std::copy(logits.begin(), logits.end(), dlogits);
        CpuOps::classifier(result(N), dlogits, tokens.data(), 1.0f / N, N, V, Vp, true);
        for (NsType type : kTypes) {
            Doubles squares(2), dots(4);
            float *X = result(N * (C + 8)), *A = result(C * C), *Y = result(N * (C + 8)), *momentum = result(N * C);
            const float clip[4] = {1, 1, 0, 0};
            const int np = round_up(N, 8);
            CpuOps::norm_sums(squares.data(), dots.data(), x.data(), momentum, blocks.data(), 2);
            float* inverse_norm = result(1);
            CpuOps::muon_inverse_norms(inverse_norm, squares.data(), dots.data(), &ref, 1, 0.95f, true, clip);
            CpuOps::muon_momentum(X, momentum, x.data(), &ref, inverse_norm, 1, C, N, 0.95f, true, type, clip);
            CpuOps::ns_product(A, X, X, nullptr, 1, 0, 0, 1, C, C, np, NsProduct::symmetric_nt, type);
            CpuOps::ns_product(Y, A, X, X, 1, 1, 0, 1, C, np, C, NsProduct::nn, type);
        }
        return results;
    };
    const int threads = omp_get_max_threads();
    const auto one = run(1);
    for (int n : {2, 3}) {
        const auto many = run(n);
        for (size_t i = 0; i < one.size(); i++)
            CHECK(memcmp(one[i].data(), many[i].data(), one[i].size() * sizeof(float)) == 0);
    }
    omp_set_num_threads(threads);
}
#endif

// --------------------------------------------------------------------------------------------------------------------
// Newton-Schulz against the same polynomials applied to the singular values

struct Svd {
    int m, n;
    Doubles U, s, V;  // A (m,n) = U (m,m) diag(s) V (m,n), m <= n; V has orthonormal rows
    Doubles with(const Doubles& values) const {
        Doubles A(size_t(m) * n);
        for (int i = 0; i < m; i++) {
            for (int k = 0; k < m; k++) {
                for (int j = 0; j < n; j++) A[i * n + j] += U[i * m + k] * values[k] * V[k * n + j];
            }
        }
        return A;
    }
};

// One-sided Jacobi: rotate pairs of rows until all are orthogonal; their lengths are then the singular values.
static Svd svd(const Doubles& A, int m, int n) {
    Svd r{m, n, Doubles(m * m), Doubles(m), A};
    for (int i = 0; i < m; i++) r.U[i * m + i] = 1;
    for (double off = 1; off > 1e-14;) {
        off = 0;
        for (int p = 0; p < m; p++) {
            for (int q = p + 1; q < m; q++) {
                double *x = &r.V[p * n], *y = &r.V[q * n];
                double xx = 0, yy = 0, xy = 0;
                for (int j = 0; j < n; j++) xx += x[j] * x[j], yy += y[j] * y[j], xy += x[j] * y[j];
                if (std::fabs(xy) <= 1e-15 * std::sqrt(xx * yy)) continue;
                off = std::max(off, std::fabs(xy) / std::sqrt(xx * yy));
                const double tau = (yy - xx) / (2 * xy),
                             t = std::copysign(1 / (std::fabs(tau) + std::hypot(1, tau)), tau);
                const double c = 1 / std::hypot(1, t), s = c * t;
                auto rotate = [&](double& a, double& b) {
                    const double a0 = a;
                    a = c * a0 - s * b;
                    b = s * a0 + c * b;
                };
                for (int j = 0; j < n; j++) rotate(x[j], y[j]);
                for (int i = 0; i < m; i++) rotate(r.U[i * m + p], r.U[i * m + q]);
            }
        }
    }
    for (int k = 0; k < m; k++) {
        double* v = &r.V[k * n];
        r.s[k] = std::sqrt(std::inner_product(v, v + n, v, 0.0));
        for (int j = 0; j < n; j++) v[j] /= r.s[k];
    }
    return r;
}

// One matrix through newton_schulz and what is around it. Without momentum (mu = 0) x is the gradient; a step of -1
// leaves U in place of zeros.
static Floats orthogonalise(const Floats& grads, int rows, int cols, const NsConfig& config) {
    const int m = std::min(rows, cols), n = std::max(rows, cols), mp = round_up(m, 8), np = round_up(n, 8);
    std::vector<char> memory(NsWorkspace::bytes(1, mp, np, config.type));
    NsWorkspace w(memory.data(), 1, mp, np, config.type);
    const MatrixRef ref = {0, 0, cols, rows > cols, 1, 0, 1};
    const NormBlock block = {0, 0, cols, rows, cols, true, true};
    const float clip[4] = {1, 1, 0, 0};
    Floats params(grads.size()), master(grads.size()), momentum(grads.size());
    double squares, dots[2];
    float inverse_norm;
    CpuOps::norm_sums(&squares, dots, grads.data(), momentum.data(), &block, 1);
    CpuOps::muon_inverse_norms(&inverse_norm, &squares, dots, &ref, 1, 0, false, clip);
    CpuOps::muon_momentum(w.X, momentum.data(), grads.data(), &ref, &inverse_norm, 1, m, n, 0, false, config.type,
                          clip);
    newton_schulz<CpuOps>(w, 1, mp, np, config);
    CpuOps::muon_update(params.data(), master.data(), w.X, &ref, 1, m, n, 1.0f, -1.0f, config.type, clip);
    return params;
}

TEST_CASE("initial values: their deviations, independent of each other, the same in any pieces") {
    const ModelConfig config = {3, 2, 48, 40, 500};
    const auto specs = tensor_specs(config);
    std::vector<std::vector<float>> all;
    for (int t = 0; t < int(specs.size()); t++) {
        const TensorSpec& spec = specs[t];
        CAPTURE(spec.name);
        std::vector<float> x(spec.size()), pieces(spec.size());
        initial_values(x.data(), spec, t, 0, x.size(), 7, config.layers);
        for (size_t at = 0; at < x.size(); at += 1001)
            initial_values(&pieces[at], spec, t, at, std::min<size_t>(1001, x.size() - at), 7, config.layers);
        CHECK(x == pieces);
        for (size_t i = spec.stored_size(); i < x.size(); i++) REQUIRE(x[i] == 0.0f);
        if (!spec.decays()) {
            for (float value : x) REQUIRE(value == (spec.kind == TensorKind::bias ? 0.0f : 1.0f));
            continue;
        }
        // GPT-2's: 0.02, over sqrt(2L) into the residual stream. Bounds: 5 standard errors.
        const double n = double(spec.stored_size()),
                     wanted = spec.name.find("proj") == std::string::npos ? 0.02 : 0.02 / std::sqrt(6);
        double sum = 0, squares = 0, beyond = 0;
        for (size_t i = 0; i < size_t(n); i++)
            sum += x[i], squares += double(x[i]) * x[i], beyond += std::fabs(x[i]) > 2 * wanted;
        CHECK(std::fabs(sum / n) < 5 * wanted / std::sqrt(n));
        CHECK(std::fabs(std::sqrt(squares / n) / wanted - 1) < 5 / std::sqrt(2 * n));
        CHECK(std::fabs(beyond / n - 0.0455) < 5 * std::sqrt(0.0455 / n));  // of a normal distribution
        for (const auto& other : all) {
            const size_t common = std::min(other.size(), size_t(n));
            double dot = 0, other_squares = 0, own_squares = 0;
            for (size_t i = 0; i < common; i++)
                dot += double(x[i]) * other[i], other_squares += double(other[i]) * other[i],
                    own_squares += double(x[i]) * x[i];
            CHECK(std::fabs(dot) < 6 * std::sqrt(own_squares * other_squares / double(common)));
        }
        all.push_back(x);
        all.back().resize(size_t(n));
    }
    CHECK(all.size() == 2 + 4 * 3);
}

TEST_CASE("Newton-Schulz: singular vectors kept, singular values mapped") {
    for (auto [m, n] : {std::pair(64, 64), std::pair(77, 130)}) {
        const Svd random = svd(doubles(random_normal(m * n)), m, n);
        Doubles power(m), dominated(m), log_uniform(m);
        for (int i = 0; i < m; i++) {
            power[i] = 1.0 / (i + 1);
            dominated[i] = i == 0 ? 1.0 : 0.01 * random.s[i] / random.s[0];
            log_uniform[i] = std::pow(10.0, -4.0 * i / (m - 1));
        }
        const std::pair<const char*, Doubles> spectra[] = {{"gaussian", random.s},
                                                           {"power law", power},
                                                           {"rank-1-dominated", dominated},
                                                           {"log-uniform 1..1e-4", log_uniform}};
        for (const auto& [name, values] : spectra) {
            const Doubles exact = random.with(values);
            const Floats G(exact.begin(), exact.end());
            const Svd decomposed = svd(doubles(G), m, n);
            const double norm = std::sqrt(dot(decomposed.s, decomposed.s));
            for (const char* coefficients : {"keller", "polar_express", "you"}) {
                Doubles mapped = decomposed.s;
                for (double& s : mapped) {
                    s /= norm;
                    for (int k = 0; k < 5; k++) {
                        const auto [a, b, c] = ns_coefficients(coefficients, k);
                        s = a * s + b * s * s * s + c * s * s * s * s * s;
                    }
                }
                const Doubles want = decomposed.with(mapped);
                const double largest = *std::max_element(mapped.begin(), mapped.end());
                if (std::string(coefficients) == "polar_express") CHECK(largest < 1.1245);
                for (bool gram : {false, true}) {
                    for (NsType type : kTypes) {
                        const std::string what =
                            strprintf("%s, %d x %d, %s, %s, %s", name, m, n, coefficients, gram ? "gram" : "standard",
                                      type == NsType::bf16   ? "bf16"
                                      : type == NsType::fp16 ? "fp16"
                                                             : "fp32");
                        CAPTURE(what);
                        const Doubles got = doubles(orthogonalise(G, m, n, {gram, coefficients, 5, type}));
                        const double cosine = dot(got, want) / std::sqrt(dot(got, got) * dot(want, want));
                        const double got_largest = [&, m = m, n = n] {
                            const Doubles s = svd(got, m, n).s;
                            return *std::max_element(s.begin(), s.end());
                        }();
                        CHECK(cosine >= (type == NsType::bf16 ? 0.99 : type == NsType::fp16 ? 0.999 : 0.999999));
                        CHECK(got_largest <= 1.03 * largest);
                    }
                }
            }
        }
    }
}

TEST_CASE("Newton-Schulz of a tall matrix is the transposed result") {
    const int m = 77, n = 130;
    const Floats G = random_normal(m * n);
    Floats tall(m * n);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) tall[j * m + i] = G[i * n + j];
    }
    const NsConfig config = {false, "keller", 5, NsType::fp32};
    const Floats lying = orthogonalise(G, m, n, config), standing = orthogonalise(tall, n, m, config);
    Doubles want(m * n);
    for (int i = 0; i < m; i++) {
        for (int j = 0; j < n; j++) want[j * m + i] = lying[i * n + j];
    }
    CHECK(error(standing, want) < 1e-4);  // the norm is summed in another order
}

// --------------------------------------------------------------------------------------------------------------------
// Generation: how a token is drawn. The model that it is drawn from: test_golden.cpp

TEST_CASE("next_token: every token has its share of the coins") {
    const int V = 37, coins = 20000;
    const Floats logits = random_normal(V + 3, 2);  // the last three are no tokens
    for (double temperature : {0.3, 1.0, 5.0}) {
        for (int top_k : {0, 1, 11, V, 99}) {
            CAPTURE(temperature);
            CAPTURE(top_k);
            Doubles want(V), counts(V);
            double total = 0;
            for (int v = 0; v < V; v++) {
                const auto above = std::count_if(&logits[0], &logits[V], [&](float x) { return x > logits[v]; });
                if (top_k == 0 || above < top_k) total += want[v] = std::exp(logits[v] / temperature);
            }
            for (int i = 0; i < coins; i++) counts[next_token(logits, {V, temperature, top_k, 0}, (i + 0.5) / coins)]++;
            // Coins evenly spaced: a token's count is its share of them, give or take one.
            for (int v = 0; v < V; v++) CHECK(std::fabs(counts[v] - want[v] / total * coins) < 1.001);
        }
    }
}

TEST_CASE("next_token: ties, and logits that are no numbers") {
    const Floats level(5, 2.5f);
    std::set<int> drawn;
    for (double coin : {0.0, 0.3, 0.6, 0.999999}) drawn.insert(next_token(level, {5, 1, 3, 0}, coin));
    CHECK(drawn == std::set<int>{0, 1, 2});
    const float nan = NAN, infinity = INFINITY;
    const Floats odd = {nan, -infinity, 1, 3, infinity, 3, nan};
    for (double temperature : {0.0, 1e-9}) CHECK(next_token(odd, {7, temperature, 1, 0}, 0.9) == 3);
    drawn.clear();
    for (int i = 0; i < 1000; i++) drawn.insert(next_token(odd, {7, 9, 0, 0}, i / 1000.0));
    CHECK(drawn == std::set<int>{2, 3, 5});
    for (double temperature : {0.0, 1.0}) CHECK(next_token({nan, infinity}, {2, temperature, 0, 0}, 0.5) == -1);
}

TEST_CASE("read_prompt: token numbers, the last of them kept") {
    auto read = [](std::string text, size_t most) {
        FILE* file = fmemopen(&text[0], text.size(), "r");
        std::unique_ptr<FILE, int (*)(FILE*)> closed(file, fclose);
        return read_prompt(file, 300, most);
    };
    CHECK(read("7", 4).tokens == std::vector<int>{7});
    CHECK(read("\n 007\t299\r\n0 ", 4).tokens == std::vector<int>{7, 299, 0});
    std::string many;
    for (int i = 0; i < 1000; i++) many += std::to_string(i % 300) + "\n";
    for (size_t most : {1, 2, 3, 999, 1000, 5000}) {
        const Prompt prompt = read(many, most);
        CHECK(prompt.length == 1000);
        REQUIRE(prompt.tokens.size() == std::min<size_t>(most, 1000));
        for (size_t i = 0; i < prompt.tokens.size(); i++)
            CHECK(prompt.tokens[i] == int(1000 - prompt.tokens.size() + i) % 300);
    }
    CHECK_THROWS_WITH_AS(read("5 300 x", 4), doctest::Contains("token 300, outside the checkpoint's vocabulary of 300"),
                         Error);
    CHECK_THROWS_WITH_AS(read("99999999999999999999", 4), doctest::Contains("outside"), Error);
    for (std::string text : {"-1", "5,6", "5x", "\xff", "1e2"})
        CHECK_THROWS_WITH_AS(read(text, 4), doctest::Contains("byte 0x"), Error);
    CHECK_THROWS_WITH_AS(read(std::string("5 \0 6", 5), 4), doctest::Contains("byte 0x00"), Error);
    for (const char* text : {" ", "\n\n"}) CHECK_THROWS_WITH_AS(read(text, 4), doctest::Contains("empty"), Error);
}

// --------------------------------------------------------------------------------------------------------------------
// The prediction of --print_plan against recorded measurements: no time is taken here. A constant of the model, or a
// log, that changes must leave it within what dmuon.cuh states.

// NAME of bench_optimizer.log (dev/bench_optimizer.cu: kVariants), or of the end of step_time.log.
static Options measured_options(const std::string& model, const std::string& name) {
    Options options;
    options.model = model;
    options.optimizer = name.substr(0, name.find('_'));
    if (name.find("_one") != std::string::npos) options.muon_batch = "one";
    if (name.find("_tile_256") != std::string::npos) options.muon_tile = 256;
    if (name.find("_fp16") != std::string::npos) options.ns_dtype = "fp16", options.ns = "auto";
    return options;
}

static Prediction predicted_for(const Options& options, int ranks) {
    return predict(Plan(tensor_specs(model_config(options, 50257)), options, ranks), options, 2);  // bf16
}

TEST_CASE("print_plan: the prediction meets what was measured") {
    const std::string source = __FILE__, results = source.substr(0, source.rfind('/') + 1) + "../dev/results/";
    std::string line, model;
    char name[32] = "", of_model[32] = "";
    int ranks, count, m, n, steps = 0, batches = 0, runs = 0;
    double ms;
    std::map<std::string, double> adamw_alone;  // by model: ms as one of two ranks, without the other
    std::ifstream alone(results + "bench_optimizer.log");
    REQUIRE(alone);
    while (std::getline(alone, line)) {
        CAPTURE(line);
        if (sscanf(line.c_str(), "## %31[^:]:", name) == 1) model = name;
        if (line.find("_portable") != std::string::npos) continue;
        if (sscanf(line.c_str(), "| %d | %31[a-z0-9_] | %lf |", &ranks, name, &ms) == 3) {
            const Prediction prediction = predicted_for(measured_options(model, name), ranks);
            CHECK(std::fabs((prediction.total() - prediction.exposed) / ms - 1) < 0.10);
            if (ranks == 2 && name == std::string("adamw")) adamw_alone[model] = ms;
            steps++;
        }
        if (sscanf(line.c_str(), "| %31[a-z0-9_] | %d | %d of %d x %d | %lf |", name, &ranks, &count, &m, &n, &ms) ==
            6) {
            CHECK(std::fabs(1e3 * ns_seconds(measured_options(model, name), {count, m, n}) / ms - 1) < 0.15);
            batches++;
        }
    }
    CHECK(steps >= 2 * 7 * 5);  // models, ranks, optimizers
    CHECK(batches >= 90);

    // In training: "d12_64_dmuon_2gpu step N ms optimizer N ..."
    std::ifstream training(results + "step_time.log");
    REQUIRE(training);
    while (std::getline(training, line)) {
        CAPTURE(line);
        if (line.find("_portable") != std::string::npos) continue;
        if (sscanf(line.c_str(), "%31[d0-9]_%*d_%31s step %*f ms optimizer %lf", of_model, name, &ms) != 3) continue;
        const bool two = std::string(name).find("_2gpu") != std::string::npos;
        const Prediction prediction = predicted_for(measured_options(of_model, name), two ? 2 : 1);
        CHECK(ms / prediction.total() > 0.94);
        CHECK(ms / prediction.total() < 1.20);
        if (name == std::string("adamw_2gpu"))
            CHECK(std::fabs(prediction.exposed / (ms - adamw_alone.at(of_model)) - 1) < 0.15);
        runs++;
    }
    CHECK(runs >= 15);
}

// --------------------------------------------------------------------------------------------------------------------
// The whole model and optimizer against PyTorch

#include "test_golden.cpp"

int main(int argc, char** argv) {
    CpuOps::start(1);
    return doctest::Context(argc, argv).run();
}
