// wgmma.cuh: the instructions that Hopper (sm_90a) adds, one thin function each, for kernels in which some warps only
// move data and others only multiply. In reading order:
//   mbarriers         how the two wait for each other, in shared memory
//   TMA               tiles of a 3-dimensional tensor <-> shared memory, by one thread, in the background
//   wgmma             products of tiles in shared memory by a warpgroup (4 warps, the first a multiple of 4)
//   the rest          stmatrix, registers handed from one warpgroup to another, barriers of some warps
// Kernels that use them have their bodies between #if HOPPER and #endif, so that other architectures compile; where
// hopper_kernels() is false the launchers take the mma.sync kernels. With -DFIBER the same functions come from the
// emulation in test/fiber_hopper.h. Sources: PTX ISA 8.x, sections on mbarrier, cp.async.bulk.tensor and wgmma (the
// layouts of its operands in shared memory).
#pragma once
#include <cuda.h>  // CUtensorMap; the library itself is not linked

#include "cuda_common.cuh"
#include "mma.cuh"

// sm_90a alone has these instructions: the "a" says that no later architecture need have them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FIBER)
#define HOPPER 1
#else
#define HOPPER 0
#endif

// ---------------------------------------------------------------------------------------------------------------------
// mbarriers. A barrier completes a phase when `arrivals` threads have arrived and all the bytes that were announced
// have landed; then the next phase begins. A wait names the parity of the phase that it waits for: 0, 1, 0, ..

#ifndef FIBER
__device__ inline void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// After the inits, before a __syncthreads: TMA sees them too.
__device__ inline void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and announces bytes that copies will bring.
__device__ inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ inline void mbarrier_wait(uint64_t* barrier, int parity) {
    uint32_t done;
    do {
        asm volatile(
            "{\n.reg .pred p;\n"
            "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!done);
}
#endif

// Where one lane arrives for its warp, behind a __syncwarp(), racecheck (compute-sanitizer) takes what the other lanes
// have read and written before for a race; with -DEVERY_LANE_ARRIVES each arrives for itself, so that racecheck sees
// what else there is (scripts/gpu_check.sh sanitize).
#ifdef EVERY_LANE_ARRIVES
constexpr bool kEveryLaneArrives = true;
#else
constexpr bool kEveryLaneArrives = false;
#endif
constexpr int kWarpArrivals = kEveryLaneArrives ? kWarpSize : 1;
__device__ inline bool lane_arrives(int lane) { return kEveryLaneArrives || lane == 0; }

// ---------------------------------------------------------------------------------------------------------------------
// TMA. A tensor is (batch, rows, cols) of 16-bit elements, a box 64 columns (128 bytes) by box_rows rows of one matrix.
// In shared memory a box is box_rows x 128 bytes, 1024-byte aligned, with the 16-byte chunks of each row permuted so
// that eight rows at one chunk lie in different banks (the 128-byte swizzle): element (row, col) is at element
// box_at(row, col). What lies outside of the tensor is read as zero and not written.

constexpr int kBoxCols = 64;
__host__ __device__ constexpr int box_at(int row, int col) {
    return row * kBoxCols + (((col / 8) ^ (row % 8)) * 8 + col % 8);
}

#ifndef FIBER
// Strides in elements; the address and the strides in bytes must be multiples of 16.
inline CUtensorMap tensor_map(const void* data, bool half /*fp16, else bf16*/, size_t cols, size_t rows, size_t batch,
                              size_t row_stride, size_t batch_stride, int box_rows) {
    using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static Encode* const encode = [] {  // from the driver, which is loaded already
        void* function = nullptr;
        cudaDriverEntryPointQueryResult found;
        CUDA_CHECK(
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
        if (found != cudaDriverEntryPointSuccess) fail("the GPU driver has no cuTensorMapEncodeTiled: it is too old");
        return reinterpret_cast<Encode*>(function);
    }();
    CUtensorMap map;
    const cuuint64_t sizes[3] = {cols, rows, batch}, strides[2] = {row_stride * 2, batch_stride * 2};
    const cuuint32_t box[3] = {kBoxCols, cuuint32_t(box_rows), 1}, steps[3] = {1, 1, 1};
    const CUresult status =
        encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3,
               const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (status != CUDA_SUCCESS)
        fail("internal: no tensor map for %zu x %zu x %zu, strides %zu and %zu (error %d)", batch, rows, cols,
             row_stride, batch_stride, int(status));
    return map;
}

// Box at (matrix, row, col), none of them negative -> shared memory; its box_rows * 128 bytes count towards the
// barrier's, inside or not.
__device__ inline void tma_load(void* box, const CUtensorMap* map, int matrix, int row, int col, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::
            "r"(shared_address(box)),
        "l"(map), "r"(col), "r"(row), "r"(matrix), "r"(shared_address(barrier))
        : "memory");
}
// Shared memory -> box. Before it: tma_store_fence by the threads that wrote the shared memory, then a barrier.
__device__ inline void tma_store(const CUtensorMap* map, int matrix, int row, int col, const void* box) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map), "r"(col),
                 "r"(row), "r"(matrix), "r"(shared_address(box))
                 : "memory");
}
__device__ inline void tma_store_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Until all stores that this thread has committed have read their shared memory; until they are done.
__device__ inline void tma_store_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void tma_store_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ inline void tma_prefetch(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Between global memory that TMA reads or writes and ordinary accesses: behind a wait for TMA's stores and before the
// word is passed on, and behind the word and before TMA's loads. Blocks pass it on by counters:
__device__ inline void proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ inline void counter_add(int* counter) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ inline void counter_wait(const int* counter, int value) {
    int seen;
    do {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < value);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// wgmma: d (64, N) += A (64, 16) B (16, N) by a warpgroup, T bf16 or fp16, sums fp32. Warp w of it has rows
// 16w..16w+15, laid out as mma.sync's results: with g = lane/4 and t = lane%4, d[4j + 0, 1] = (g, 8j + 2t and + 1),
// d[4j + 2, 3] = row g+8.
//
// Operands in shared memory are boxes as TMA leaves them, named by a 64-bit descriptor:
//   k_major   rows are rows of A (columns of B), 64 of K beside each other: a step of 16 along K is 32 bytes further.
//   Boxes
//             that follow each other along the rows continue the tile.
//   mn_major  rows are K, 64 rows of A (columns of B) beside each other: a step of 16 along K is 16 rows, 2048 bytes,
//   further.
//             N > 64 takes N/64 boxes, box_bytes apart.

__device__ inline uint64_t wgmma_descriptor(const void* box, int leading_bytes, int stride_bytes) {
    auto field = [](uint32_t bytes) { return uint64_t((bytes & 0x3ffff) >> 4); };
    const uint64_t swizzle_128 = uint64_t(1) << 62;
    return swizzle_128 | field(stride_bytes) << 32 | field(leading_bytes) << 16 | field(shared_address(box));
}
__device__ inline uint64_t k_major(const void* box) { return wgmma_descriptor(box, 16, 1024); }
__device__ inline uint64_t mn_major(const void* box, int box_bytes) { return wgmma_descriptor(box, box_bytes, 1024); }
// The same operand `steps` times 16 further along K.
__device__ inline uint64_t k_major_step(uint64_t descriptor, int steps) { return descriptor + steps * 32 / 16; }
__device__ inline uint64_t mn_major_step(uint64_t descriptor, int steps) { return descriptor + steps * 2048 / 16; }

// A wgmma runs in the background: wgmma_begin before the first of a series (after the registers in it were written),
// wgmma_commit behind the last, and nothing touches its registers or shared memory before wgmma_wait<n> says that all
// but the newest n committed series are done.
#ifndef FIBER
__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int n>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
}
// The compiler keeps what stands before and after apart for these registers: for results that are used after a wait.
template <int n>
__device__ inline void wgmma_keep(float (&d)[n]) {
    UNROLL
    for (int i = 0; i < n; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define WGMMA_NAMES_32                                                                                               \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_NAMES_64                                                                                            \
    WGMMA_NAMES_32                                                                                                \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
    "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_NAMES_128                                                                                               \
    WGMMA_NAMES_64                                                                                                    \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, "     \
    "%85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, " \
    "%106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, "    \
    "%124, %125, %126, %127"
#define WGMMA_SUMS_8(i)                                                                                         \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
        "+f"(d[i + 7])
#define WGMMA_SUMS_32(i) WGMMA_SUMS_8(i), WGMMA_SUMS_8(i + 8), WGMMA_SUMS_8(i + 16), WGMMA_SUMS_8(i + 24)
#define WGMMA_SUMS_64(i) WGMMA_SUMS_32(i), WGMMA_SUMS_32(i + 32)
#define WGMMA_SUMS_128(i) WGMMA_SUMS_64(i), WGMMA_SUMS_64(i + 64)

// A and B in shared memory; a0..a4 number the operands behind the sums.
#define WGMMA_SHARED(N, TYPE, NAMES, SUMS, a0, a1, a2, a3, a4)                                                         \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, %" #a0 ", %" #a1 ", p, 1, 1, %" #a3 ", %" #a4 ";\n}"                          \
                 : SUMS(0)                                                                                             \
                 : "l"(a), "l"(b), "r"(int(add)), "n"(int(a_mn_major)), "n"(int(b_mn_major)))
// A in registers: the fragment of mma.sync's left operand, each warp its 16 rows.
#define WGMMA_REGISTERS(N, TYPE, NAMES, SUMS, a0, a1, a2, a3, a4, a5, a6)                                              \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #a5 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE \
                 "." TYPE " {" NAMES "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #a4 ", p, 1, 1, %" #a6 ";\n}"    \
                 : SUMS(0)                                                                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(int(b_mn_major)))

// add: false starts the sums anew.
template <class T, int N, bool a_mn_major, bool b_mn_major>
__device__ inline void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    static_assert(N == 64 || N == 128 || N == 256, "the widths that are spelled out below");
    if constexpr (std::is_same_v<T, __half>) {
        if constexpr (N == 64) WGMMA_SHARED(64, "f16", WGMMA_NAMES_32, WGMMA_SUMS_32, 32, 33, 34, 35, 36);
        if constexpr (N == 128) WGMMA_SHARED(128, "f16", WGMMA_NAMES_64, WGMMA_SUMS_64, 64, 65, 66, 67, 68);
        if constexpr (N == 256) WGMMA_SHARED(256, "f16", WGMMA_NAMES_128, WGMMA_SUMS_128, 128, 129, 130, 131, 132);
    } else {
        if constexpr (N == 64) WGMMA_SHARED(64, "bf16", WGMMA_NAMES_32, WGMMA_SUMS_32, 32, 33, 34, 35, 36);
        if constexpr (N == 128) WGMMA_SHARED(128, "bf16", WGMMA_NAMES_64, WGMMA_SUMS_64, 64, 65, 66, 67, 68);
        if constexpr (N == 256) WGMMA_SHARED(256, "bf16", WGMMA_NAMES_128, WGMMA_SUMS_128, 128, 129, 130, 131, 132);
    }
}
template <class T, int N, bool b_mn_major>
__device__ inline void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    static_assert(std::is_same_v<T, __nv_bfloat16> && (N == 64 || N == 128), "what attention needs");
    if constexpr (N == 64) WGMMA_REGISTERS(64, "bf16", WGMMA_NAMES_32, WGMMA_SUMS_32, 32, 33, 34, 35, 36, 37, 38);
    if constexpr (N == 128) WGMMA_REGISTERS(128, "bf16", WGMMA_NAMES_64, WGMMA_SUMS_64, 64, 65, 66, 67, 68, 69, 70);
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// The rest

#ifndef FIBER
// The counterparts of ldmatrix_x4 and ldmatrix_x4_trans: lane l passes the address of row l%8 of matrix l/8.
__device__ inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}
__device__ inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// By whole warpgroups, of a kernel with __launch_bounds__(threads, 1): those who give registers back, and those who
// then take them. A block has what it starts with, threads x (65536 / threads, rounded down to a multiple of 8), also
// where that is less than the 65536 of the SM: who takes more waits for ever. n is a multiple of 8.
template <int n>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
}
template <int n>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
}

// A __syncthreads of `threads` threads; id 1..15 (0 is __syncthreads).
__device__ inline void barrier_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

// Whether kernels written with these instructions run here: on a GPU of sm_90, in a build for sm_90a (PTX of an older
// architecture, compiled by the driver, has empty bodies in their place), and not under --kernels portable.
inline bool portable_kernels = false;
#ifdef FIBER
inline bool hopper_kernels() { return !portable_kernels; }
#else
__global__ void hopper_probe_kernel() {}
inline bool hopper_kernels() {
    static const bool can_run = [] {
        int device = 0, major = 0, minor = 0;
        cudaFuncAttributes attributes;
        if (cudaGetDevice(&device) != cudaSuccess ||
            cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
            cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
            cudaFuncGetAttributes(&attributes, hopper_probe_kernel) != cudaSuccess)
            return false;
        return major == 9 && minor == 0 && attributes.ptxVersion >= 90;
    }();
    return can_run && !portable_kernels;
}
#endif
