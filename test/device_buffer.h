// device_buffer.h (tests only): an array in device memory, or in host memory under -DFIBER, with guard zones on both
// sides. A new buffer holds NaN (all bits set), so that an element that a kernel should have written, and did not, is
// seen. The destructor ends the test program if a guard zone has been written to.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <vector>

#include "../kernels/cuda_common.cuh"

// Large sizes are for a GPU at full speed: not for fibers, and not for compute-sanitizer, which slows a kernel down a
// hundred times (TEST_SMALL=1).
inline bool large_sizes() {
#ifdef FIBER
    return false;
#else
    return std::getenv("TEST_SMALL") == nullptr;
#endif
}

template <class T>
class DeviceBuffer {
  public:
    explicit DeviceBuffer(size_t count) : count_(count) {
        CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&memory_), kGuard + bytes() + kGuard));
        CUDA_CHECK(cudaMemsetAsync(memory_, kPattern, kGuard + bytes() + kGuard, cuda_stream));
        poison();
    }
    DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(values.size()) { upload(values); }
    ~DeviceBuffer() {
        if (std::uncaught_exceptions() == 0 && !guards_intact()) {
            std::fprintf(stderr, "test: a kernel wrote outside of an array of %zu elements\n", count_);
            std::abort();
        }
        cudaFree(memory_);
    }
    DeviceBuffer(const DeviceBuffer&) = delete;
    DeviceBuffer& operator=(const DeviceBuffer&) = delete;

    T* data() const { return reinterpret_cast<T*>(memory_ + kGuard); }
    operator T*() const { return data(); }
    size_t size() const { return count_; }

    void poison() { CUDA_CHECK(cudaMemsetAsync(data(), 0xff, bytes(), cuda_stream)); }

    void upload(const std::vector<T>& values) {
        if (values.size() != count_) fail("test: upload of %zu values into a buffer of %zu", values.size(), count_);
        CUDA_CHECK(cudaMemcpyAsync(data(), values.data(), bytes(), cudaMemcpyHostToDevice, cuda_stream));
        CUDA_CHECK(cudaStreamSynchronize(cuda_stream));
    }

    std::vector<T> download() const {
        std::vector<T> values(count_);
        CUDA_CHECK(cudaMemcpyAsync(values.data(), data(), bytes(), cudaMemcpyDeviceToHost, cuda_stream));
        CUDA_CHECK(cudaStreamSynchronize(cuda_stream));
        return values;
    }

    // Whether nothing has been written just before or behind the array.
    bool guards_intact() const {
        for (unsigned char* zone : {memory_, memory_ + kGuard + bytes()}) {
            unsigned char host[kGuard];
            CUDA_CHECK(cudaMemcpyAsync(host, zone, kGuard, cudaMemcpyDeviceToHost, cuda_stream));
            CUDA_CHECK(cudaStreamSynchronize(cuda_stream));
            for (unsigned char byte : host)
                if (byte != kPattern) return false;
        }
        return true;
    }

  private:
    static constexpr size_t kGuard = 1024;  // keeps data() 256-byte aligned
    static constexpr unsigned char kPattern = 0xa5;
    size_t bytes() const { return count_ * sizeof(T); }
    size_t count_;
    unsigned char* memory_ = nullptr;
};
