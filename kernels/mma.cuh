// mma.cuh: the tensor-core instructions of sm_80 and later that the kernels use, one thin function each:
// ldmatrix (shared memory -> fragments), mma (fragments -> fragments), cp.async (global -> shared memory in the
// background). With -DFIBER the same functions come from the emulation in test/fiber.h, where the fragment layouts are
// also written down.
#pragma once
#include "cuda_common.cuh"

// The address of a variable in shared memory, as PTX instructions take it.
#ifndef FIBER
__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#endif

// Loads two or four 8x8 matrices of 16-bit elements. Lane l passes the address of row l%8 of matrix l/8 (16 bytes,
// aligned; for x2 the lanes 16..31 pass any valid address). Lane l receives of matrix i, in r[i], row l/4, columns
// 2(l%4) and 2(l%4)+1 (low half first); with _trans those of the transposed matrix.
__device__ inline void ldmatrix_x4(uint32_t r[4], const void* row) {
#ifdef FIBER
    fiber::ldmatrix<4, false>(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
__device__ inline void ldmatrix_x4_trans(uint32_t r[4], const void* row) {
#ifdef FIBER
    fiber::ldmatrix<4, true>(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
__device__ inline void ldmatrix_x2(uint32_t r[2], const void* row) {
#ifdef FIBER
    fiber::ldmatrix<2, false>(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}
__device__ inline void ldmatrix_x2_trans(uint32_t r[2], const void* row) {
#ifdef FIBER
    fiber::ldmatrix<2, true>(r, row);
#else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(row))
                 : "memory");
#endif
}

// d (16,8) += a (16,16) * b (16,8) by one warp; T is __nv_bfloat16 or __half, sums are fp32. g = lane/4, t = lane%4:
// a[0] = (g, 2t), (g, 2t+1)   a[1] = row g+8   a[2] = columns +8   a[3] = row g+8, columns +8     (low half first)
// b[0] = (2t, g), (2t+1, g)   b[1] = rows +8;   d[0], d[1] = (g, 2t), (g, 2t+1)   d[2], d[3] = row g+8
// So ldmatrix_x4 on row-major a gives a; ldmatrix_x2 on b stored as (n, k) rows, or _trans on (k, n) rows, gives b.
template <class T>
__device__ void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]);

#ifdef FIBER
template <class T>
void mma_m16n8k16(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    fiber::mma_m16n8k16<T>(d, a, b);
}
#else
template <>
__device__ inline void mma_m16n8k16<__nv_bfloat16>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_m16n8k16<__half>(float d[4], const uint32_t a[4], const uint32_t b[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// Two floats, each rounded to T, as one register of a fragment (low half first).
template <class T>
__device__ uint32_t pack_pair(float low, float high);
template <>
__device__ inline uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}
template <>
__device__ inline uint32_t pack_pair<__half>(float low, float high) {
    __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint32_t*>(&pair);
}

// Copies 16 bytes from global to shared memory in the background; writes zeros, and reads nothing, where !valid. Copies
// are committed in groups; cp_async_wait<n> returns when all but the newest n groups of this thread have landed.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid) {
#ifdef FIBER
    fiber::cp_async_16(shared, global, valid);
#else
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
                 "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
                 : "memory");
#endif
}
__device__ inline void cp_async_commit() {
#ifdef FIBER
    fiber::cp_async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int newest>
__device__ void cp_async_wait() {
#ifdef FIBER
    fiber::cp_async_wait(newest);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory");
#endif
}

// Results of mma lie in registers as float x[n][4], n counting blocks of 8 columns. With g = lane / 4, t = lane % 4:
// x[n][0..1] = row g, columns 8n + 2t and 8n + 2t + 1; x[n][2..3] = row g + 8, the same columns. So a lane has two
// rows, element e is in the lane's row e / 2, and four neighbouring lanes share a row:
__device__ inline float row_sum(float x) {
    x += __shfl_xor_sync(kAllLanes, x, 1);
    return x + __shfl_xor_sync(kAllLanes, x, 2);
}
__device__ inline float row_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
    return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// The instruction for exponentials is a power of two: exp(x) = exp2(x * kLog2e).
constexpr float kLog2e = 1.4426950408889634f;
__device__ inline float fast_exp2(float x) {
#ifdef FIBER
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // exp2f() adds three instructions for denormal results
    return y;
#endif
}
