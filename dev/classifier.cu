// classifier.cu: three versions of one kernel, one idea each. The last one is the trainer's.
//
// Softmax and cross-entropy of a row of logits x, forward and backward in one:
//
//     loss = log(sum of exp(x[c])) - x[target]
//     x[c] = (exp(x[c]) / sum of exp - (c == target)) * dloss        the gradient, in the place of the logits
//
// The logits are (N, Vp) in bf16: V tokens of the vocabulary, then padding, whose gradient is 0 whatever lies there. A
// perfect kernel reads them once and writes them once. Every version is judged by those 4 N Vp bytes per second, beside
// the bandwidth of a copy. What makes it harder than a copy: a row must have been seen whole before anything of it can
// be written, and its 98 KiB are too many for registers. Each version fetches it more than once, and lives on what the
// caches still have of it; and with two or more exponentials for 4 bytes, instructions take about as long as memory.
#include "../kernels/gpt_kernels.cuh"
#include "bench.h"

struct Inputs {
    float* losses;       // (N)
    real* logits;        // (N,Vp), overwritten
    const int* targets;  // (N)
    float dloss;
    int V, Vp;
};

// 1. The definition as it stands: one block per row, three passes (the largest, so that no exponential overflows; the
//    sum; the gradient), 2 bytes per access. Neighbouring threads have neighbouring columns, and two rows at a time,
//    196 KiB, are about what the caches of a multiprocessor hold: memory is not what it waits for. Expected: 57
//    instructions per column (sm_90: 10, 20 and 27 of the three loops) are 6.4 ms of an H200's issue slots at 1.75 GHz
//    for 65536 rows, twice the 3.1 of the bytes; never are all used, so 7 to 10.
__global__ void __launch_bounds__(1024, 2) classifier_1(Inputs in) {
    real* row = in.logits + size_t(blockIdx.x) * in.Vp;
    const int target = in.targets[blockIdx.x];
    const float target_logit = to_float(row[target]);
    float largest = -FLT_MAX, sum = 0;
    for (int c = threadIdx.x; c < in.V; c += blockDim.x) largest = fmaxf(largest, to_float(row[c]));
    largest = block_max(largest);
    for (int c = threadIdx.x; c < in.V; c += blockDim.x) sum += expf(to_float(row[c]) - largest);
    sum = block_sum(sum);
    if (threadIdx.x == 0) in.losses[blockIdx.x] = logf(sum) + largest - target_logit;
    const float scale = in.dloss / sum;
    for (int c = threadIdx.x; c < in.Vp; c += blockDim.x) {
        const float softmax = c < in.V ? expf(to_float(row[c]) - largest) * scale : 0.0f;
        row[c] = from_float<real>(c == target ? softmax - in.dloss : softmax);
    }
}

// 2. Online softmax: a thread keeps the largest x so far and the sum of exp(x - largest), and multiplies the sum by
//    exp(old - new) when it meets a larger, so one pass finds both. 16 bytes per access, and __expf, which is the
//    instruction for powers of two and little else. The second pass goes backwards: what the first fetched last is what
//    the caches still have. Expected: 27 instructions per column are 3.0 ms of issue slots, the bytes take 3.1, and the
//    two overlap only as far as one block computes while the other waits. Measured while it was the trainer's, in a
//    step on an H200 and with the kernel that sums the losses: 4.60 ms (results/base_step.md). What is in the way now:
//    every pack is waited for before it is worked on; __expf compares its argument with -126 and scales twice, for
//    results too small for a sum to feel; and each column is compared with the target.
__global__ void __launch_bounds__(1024, 2) classifier_2(Inputs in) {
    using P = Pack<real>;
    real* row = in.logits + size_t(blockIdx.x) * in.Vp;
    const int stride = blockDim.x * P::size, target = in.targets[blockIdx.x];
    const float target_logit = to_float(row[target]);
    float largest = -FLT_MAX, sum = 0;  // not -infinity, which minus itself is no number
    int end = threadIdx.x * P::size;
    for (; end < in.Vp; end += stride) {
        const P x = load_logits(row, end, in.V);
        const float before = largest;
        for (int k = 0; k < P::size; k++) largest = fmaxf(largest, to_float(x[k]));
        sum *= __expf(before - largest);
        for (int k = 0; k < P::size; k++) sum += __expf(to_float(x[k]) - largest);
    }
    const float row_largest = block_max(largest);
    const float row_sum = block_sum(sum * __expf(largest - row_largest));
    if (threadIdx.x == 0) in.losses[blockIdx.x] = logf(row_sum) + row_largest - target_logit;
    const float scale = in.dloss / row_sum;
    for (int c = end - stride; c >= 0; c -= stride) {
        P x = load_logits(row, c, in.V);
        for (int k = 0; k < P::size; k++) {
            const float softmax = __expf(to_float(x[k]) - row_largest) * scale;
            x[k] = from_float<real>(c + k == target ? softmax - in.dloss : softmax);
        }
        x.store_once(row + c);
    }
}

// 3. The trainer's, in ../kernels/gpt_kernels.cuh: the next pack is on its way while one is worked on; exponentials are
//    fast_exp2, the bare instruction, which gives 0 where __expf would give a denormal; and a pack is looked at column
//    by column for the target only where it contains it. Expected: 21 instructions per column, 2.3 ms of issue slots,
//    and fewer waits: 0.3 to 0.6 ms less. Measured: 4.21 ms where rung 2 took 4.60; the bytes take 3.1.

// Bounds. Rounding to bf16, with its 8 significant bits, changes a number by at most half a unit of the last: 2^-8 of
// it. What fp32 leaves before that, in units of 2^-24: x - largest, above -32 here, is rounded three times on its way
// into an exponential (the difference, kLog2e, their product), which adds 4 of its own: 100. A sum has as much, 5 from
// each of up to 8 times that it is rescaled (whose differences are parts of the same 32), and up to 66 additions (56 of
// a thread, 10 over the block): 206. A gradient has both, and 3 from its quotient, product and difference: 309, 1.9e-5.
constexpr double kBf16 = 1.0 / 256, kFp32 = 2e-5;
// A loss has the sum's error, and three roundings (of the logarithm, of both sums) of numbers below 32.
constexpr double kLoss = kFp32 + 3 * 32.0 / (1 << 24);

// A row's logits, and by the definition in double what its losses and gradients come from.
struct Row {
    std::vector<float> x;
    double largest, sum;

    Row(const uint16_t* bits, int V) : x(V), sum(0) {
        std::transform(bits, bits + V, x.begin(), CpuOps::from_bf16);
        largest = *std::max_element(x.begin(), x.end());
        for (float xc : x) sum += std::exp(xc - largest);
    }
    double softmax(int c) const { return std::exp(x[c] - largest) / sum; }
    double loss(int target) const { return std::log(sum) + largest - x[target]; }
};

static bool ladder(int N, int V, int Vp, double bandwidth) {
    const size_t n = size_t(N) * Vp;
    const double bytes = 2.0 * n * sizeof(real);
    printf("\nclassifier, (%d, %d of %d); a copy runs at %.0f GB/s, for these bytes %.3f ms\n", N, V, Vp, bandwidth,
           bytes / bandwidth * 1e-6);

    // Logits of standard deviation 3, NaN in the padding. The host makes 61 rows, which repeat; each row has a target
    // of its own, the last one the last column.
    const int distinct = 61, checked = 64;
    std::vector<float> values = normal(size_t(distinct) * Vp, 1);
    for (float& x : values) x *= 3;
    for (int row = 0; row < distinct; row++) std::fill_n(&values[size_t(row) * Vp + V], Vp - V, NAN);
    const std::vector<uint16_t> rows = to_bf16(values);
    std::vector<Row> truth;
    for (int row = 0; row < distinct; row++) truth.emplace_back(&rows[size_t(row) * Vp], V);
    std::mt19937 generator(2);
    std::vector<int> targets(N);
    for (int& target : targets) target = int(generator() % V);
    targets[N - 1] = V - 1;

    DeviceArray<uint16_t> device_rows(rows), device_logits(n);
    DeviceArray<int> device_targets(targets);
    DeviceArray<float> losses(N);
    const float dloss = 1.0f / float(N);
    const Inputs in = {losses, device_logits.as<real>(), device_targets, dloss, V, Vp};

    bool right = true;
    auto restore = [&](int) {
        for (int row = 0; row < N; row += distinct)
            CUDA_CHECK(cudaMemcpyAsync(device_logits + size_t(row) * Vp, device_rows,
                                       size_t(std::min(distinct, N - row)) * Vp * sizeof(uint16_t),
                                       cudaMemcpyDeviceToDevice, cuda_stream));
    };
    auto rung = [&](const char* name, auto run) {
        CUDA_CHECK(cudaMemset(losses, 0xff, losses.bytes()));  // NaN: what is not written is seen
        // Each timed run finds the logits restored, and what the last one leaves is checked.
        const float ms = median_ms([&](int) { run(); }, restore);
        double error = 0;  // in shares of the bound, of which one is shown as 2^-8
        auto compare = [&](double got, double want, double bound) {
            const double e = kBf16 * std::fabs(got - want) / bound;
            error = e <= error ? error : e;  // keeps a NaN
        };
        const std::vector<float> got_losses = losses.download(N);
        for (int row = 0; row < N; row++) compare(got_losses[row], truth[row % distinct].loss(targets[row]), kLoss);
        std::vector<uint16_t> got(Vp);
        for (int i = 0; i < checked; i++) {  // from the first row to the last
            const int row = int(int64_t(i) * (N - 1) / (checked - 1));
            CUDA_CHECK(cudaMemcpy(got.data(), device_logits + size_t(row) * Vp, Vp * sizeof(uint16_t),
                                  cudaMemcpyDeviceToHost));
            for (int c = 0; c < Vp; c++) {
                const double softmax = c < V ? truth[row % distinct].softmax(c) : 0, one = c == targets[row];
                const double want = (softmax - one) * dloss;
                // fp32 rounds the terms of the target's difference; 1e-37 for the padding, which must be 0
                compare(CpuOps::from_bf16(got[c]), want,
                        kBf16 * std::fabs(want) + kFp32 * (softmax + one) * dloss + 1e-37);
            }
        }
        right &= print_rung(name, ms, bytes, "GB/s", error, kBf16);
    };
    rung("1  three passes, 2 bytes per access", [&] { LAUNCH(classifier_1, N, 1024, 0, in); });
    rung("2  two passes (online softmax), 16 bytes, second backwards", [&] { LAUNCH(classifier_2, N, 1024, 0, in); });
    rung("3  the trainer's: next pack on its way, bare powers of two",
         [&] { GptKernels::classifier(losses, in.logits, in.targets, dloss, N, V, Vp, true); });
    return right;
}

int main() {
    return run_ladder([] {
        const double bandwidth = copy_bandwidth();
        const int V = 50257, Vp = 50304;  // GPT-2's
        // 64 sequences of 1024 tokens: 6.6 GB of logits; and 4: 0.4 GB, still seven times an H200's L2.
        bool right = true;
        for (int N : {64 * 1024, 4 * 1024}) right &= ladder(N, V, Vp, bandwidth);
        return right;
    });
}
