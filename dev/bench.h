// bench.h: what the ladders share. Device arrays, random inputs, timing by events, and one printed line per rung.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../cpu_backend.h"
#include "../kernels/cuda_common.cuh"

// An array in device memory.
template <class T>
class DeviceArray {
  public:
    explicit DeviceArray(size_t count) : count_(count) { CUDA_CHECK(cudaMalloc(&data_, count * sizeof(T))); }
    explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
        CUDA_CHECK(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice));
    }
    ~DeviceArray() { cudaFree(data_); }
    DeviceArray(const DeviceArray&) = delete;
    DeviceArray& operator=(const DeviceArray&) = delete;
    operator T*() const { return data_; }
    template <class U>
    U* as() const {
        return reinterpret_cast<U*>(data_);
    }  // bf16, which the host keeps as uint16_t
    size_t bytes() const { return count_ * sizeof(T); }

    // The first `count` elements.
    std::vector<T> download(size_t count) const {
        std::vector<T> values(count);
        CUDA_CHECK(cudaMemcpy(values.data(), data_, count * sizeof(T), cudaMemcpyDeviceToHost));
        return values;
    }

  private:
    T* data_ = nullptr;
    size_t count_;
};

// Normal random numbers; they repeat with a large prime period, which is faster than drawing hundreds of millions of
// them.
inline std::vector<float> normal(size_t count, unsigned seed) {
    const size_t period = 1000003;
    std::mt19937 generator(seed);
    std::normal_distribution<float> distribution;
    std::vector<float> values(count);
    for (size_t i = 0; i < count; i++) values[i] = i < period ? distribution(generator) : values[i - period];
    return values;
}

// bf16 as its 16 bits, in which CpuOps and the device agree.
inline std::vector<uint16_t> to_bf16(const std::vector<float>& x) {
    std::vector<uint16_t> bits(x.size());
    std::transform(x.begin(), x.end(), bits.begin(), CpuOps::to_bf16);
    return bits;
}
inline std::vector<float> from_bf16(const std::vector<uint16_t>& bits) {
    std::vector<float> x(bits.size());
    std::transform(bits.begin(), bits.end(), x.begin(), CpuOps::from_bf16);
    return x;
}

// Median time in milliseconds of run(i), i = 0, 1, 2, ...; run uses i to walk over inputs that do not all fit into the
// L2 cache, as they never do in training. before(i), outside the time, puts back what run overwrites.
template <class Run, class Before>
float median_ms(Run run, Before before) {
    const int warm_up = 3, repetitions = 21;
    cudaEvent_t begin, end;
    CUDA_CHECK(cudaEventCreate(&begin));
    CUDA_CHECK(cudaEventCreate(&end));
    std::vector<float> times;
    for (int i = 0; i < warm_up + repetitions; i++) {
        before(i);
        CUDA_CHECK(cudaEventRecord(begin, cuda_stream));
        run(i);
        CUDA_CHECK(cudaEventRecord(end, cuda_stream));
        CUDA_CHECK(cudaEventSynchronize(end));
        float ms;
        CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end));
        if (i >= warm_up) times.push_back(ms);
    }
    CUDA_CHECK(cudaEventDestroy(begin));
    CUDA_CHECK(cudaEventDestroy(end));
    std::sort(times.begin(), times.end());
    return times[repetitions / 2];
}
template <class Run>
float median_ms(Run run) {
    return median_ms(run, [](int) {});
}

// The bandwidth in GB/s at which this GPU copies: the roof over every kernel that is bound by memory.
inline double copy_bandwidth() {
    DeviceArray<char> from(size_t(1) << 30), to(size_t(1) << 30);
    CUDA_CHECK(cudaMemset(from, 1, from.bytes()));
    float ms = median_ms(
        [&](int) { CUDA_CHECK(cudaMemcpyAsync(to, from, from.bytes(), cudaMemcpyDeviceToDevice, cuda_stream)); });
    return 2.0 * from.bytes() / ms * 1e-6;
}

// One rung. work / ms in `unit` (GB/s: work = bytes, TFLOP/s: work = operations); error against the truth, which must
// be below limit. Returns whether it is.
inline bool print_rung(const char* name, float ms, double work, const char* unit, double error, double limit) {
    bool right = error <= limit;  // false for NaN
    double rate = work / ms * (unit[0] == 'G' ? 1e-6 : 1e-9);
    printf("%-60s %9.3f ms %8.1f %s   error %.1e %s\n", name, ms, rate, unit, error, right ? "ok" : "WRONG");
    return right;
}

// The body of main: runs the ladder on the first GPU. The exit code is 0 if every rung gave the right answer.
template <class Ladder>
int run_ladder(Ladder ladder) {
    try {
        cudaDeviceProp device;
        CUDA_CHECK(cudaGetDeviceProperties(&device, 0));
        printf("%s, %d SMs, L2 %.0f MiB\n", device.name, device.multiProcessorCount, device.l2CacheSize / 1048576.0);
        return ladder() ? 0 : 1;
    } catch (const Error& error) {
        fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
