// cuda_common.cuh: what every CUDA kernel of this program builds on.
// In reading order: the element type `real`, the one stream and the checks, LAUNCH, packs of 16 bytes, warp and block
// sums. With -DFIBER a host compiler builds the kernels against test/fiber.h, which runs them on the CPU (tests only).
#pragma once
#ifdef FIBER
#include "../test/fiber.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <type_traits>

#include "../common.h"

// Parameters, activations and their gradients on the GPU. Gradients of parameters are float in either build.
#ifdef PRECISION_FP32
using real = float;
#else
using real = __nv_bfloat16;
#endif

// All device work of a rank is ordered by this one stream.
inline cudaStream_t cuda_stream = nullptr;

// ---------------------------------------------------------------------------------------------------------------------
// Checks and launches

inline void cuda_check(cudaError_t error, const char* what, const char* file, int line) {
    if (error != cudaSuccess) fail("CUDA: %s: %s (%s:%d)", what, cudaGetErrorString(error), file, line);
}
#define CUDA_CHECK(expression) cuda_check((expression), #expression, __FILE__, __LINE__)

// LAUNCH(kernel, grid, block, dynamic shared bytes, arguments...) on cuda_stream. A template instance goes in
// parentheses: LAUNCH((kernel<64>), ...).
#define LAUNCH(kernel, grid, block, shared_bytes, ...) \
    launch_kernel(#kernel, __FILE__, __LINE__, kernel, grid, block, shared_bytes, ##__VA_ARGS__)

template <class... Parameters, class... Arguments>
void launch_kernel(const char* name, const char* file, int line, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, const Arguments&... arguments) {
#ifdef FIBER
    (void)file, (void)line;
    fiber::launch(name, grid, block, shared_bytes, [&] { kernel(arguments...); });
#else
    if (shared_bytes > 32 * 1024)  // over 48 KiB, the kernel's static arrays included, has to be asked for
        cuda_check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name,
                   file, line);
    kernel<<<grid, block, shared_bytes, cuda_stream>>>(arguments...);
    cuda_check(cudaGetLastError(), name, file, line);
#endif
}

// In front of a loop. (`#pragma unroll` in a macro: clang-format leaves these where the loop is.)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY(n) UNROLL_PRAGMA(unroll n)
#define UNROLL_PRAGMA(text) _Pragma(#text)

// DYNAMIC_SHARED(float, buffer); in a kernel declares float* buffer, the dynamic shared memory of the block.
#ifndef FIBER
#define DYNAMIC_SHARED(type, name)                                    \
    extern __shared__ __align__(1024) unsigned char dynamic_shared[]; \
    type* name = reinterpret_cast<type*>(dynamic_shared)
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Conversions and 16-byte access. Kernels compute in float and round once, to nearest even, at the store.

__host__ __device__ inline float to_float(float x) { return x; }
__host__ __device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__host__ __device__ inline float to_float(__half x) { return __half2float(x); }

template <class T>
__host__ __device__ T from_float(float x);
template <>
__host__ __device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
    return __float2bfloat16(x);
}
template <>
__host__ __device__ inline __half from_float<__half>(float x) {
    return __float2half(x);
}

// n elements that one access moves: 16 bytes (8 bf16, 4 float), or 8 where n says so. Addresses are multiples of that.
template <class T, int n = 16 / int(sizeof(T))>
struct __align__(n * sizeof(T)) Pack {
    static constexpr int size = n;
    T values[n];

    __device__ T& operator[](int i) { return values[i]; }
    __device__ const T& operator[](int i) const { return values[i]; }

    __device__ static Pack load(const T* from) { return unpack(*aligned(from)); }
    __device__ void store(T * to) const { *aligned(to) = bits(); }
    // The same for data that is not needed again soon: first to leave the cache.
    __device__ static Pack load_once(const T* from) { return unpack(__ldcs(aligned(from))); }
    __device__ void store_once(T * to) const { __stcs(aligned(to), bits()); }

  private:
    static_assert(n * sizeof(T) == 16 || n * sizeof(T) == 8, "one load or store");
    using Bits = std::conditional_t<n * sizeof(T) == 16, int4, int2>;
    __device__ Bits bits() const { return *reinterpret_cast<const Bits*>(values); }
    __device__ static Pack unpack(Bits bits) {
        Pack pack;
        *reinterpret_cast<Bits*>(pack.values) = bits;
        return pack;
    }
    __device__ static const Bits* aligned(const T* p) { return aligned(const_cast<T*>(p)); }
    __device__ static Bits* aligned(T * p) {
#ifdef FIBER
        fiber::check_aligned(p, sizeof(Bits), "Pack");
#endif
        return reinterpret_cast<Bits*>(p);
    }
};

// Two neighbours, moved by one access.
template <typename T>
struct alignas(2 * sizeof(T)) Pair {
    T x, y;
};

// Four: the optimizer's, 16 bytes of each float array.
constexpr int kQuad = 4;
template <class T>
using Quad = Pack<T, kQuad>;

// ---------------------------------------------------------------------------------------------------------------------
// Sums and maxima over a warp or a block; every thread receives the same bits. The order of additions is fixed.

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class T>
__device__ T warp_sum(T x) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x += __shfl_xor_sync(kAllLanes, x, bits);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int bits = kWarpSize / 2; bits > 0; bits /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, bits));
    return x;
}

// The next three are for one-dimensional blocks of whole warps; all threads must call them.
template <int n, class T>
__device__ void block_sums(T (&x)[n]) {  // n sums for the price of two barriers
    __shared__ T of_warps[n][kWarpSize];
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    UNROLL
    for (int i = 0; i < n; i++) {
        x[i] = warp_sum(x[i]);
        if (lane == 0) of_warps[i][warp] = x[i];
    }
    __syncthreads();
    UNROLL
    for (int i = 0; i < n; i++) x[i] = warp_sum(lane < warps ? of_warps[i][lane] : T(0));
    __syncthreads();  // of_warps is free for the next call
}
template <class T>
__device__ T block_sum(T x) {
    T sums[1] = {x};
    block_sums(sums);
    return sums[0];
}
__device__ inline float block_max(float x) {
    __shared__ float of_warps[kWarpSize];
    int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
    x = warp_max(x);
    if (lane == 0) of_warps[warp] = x;
    __syncthreads();
    x = warp_max(of_warps[lane < warps ? lane : 0]);
    __syncthreads();
    return x;
}
