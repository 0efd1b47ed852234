// fiber.h (tests only): runs CUDA kernels on the CPU, one fiber per CUDA thread. For a host compiler, with -DFIBER.
//
// It tests semantics: indexing, tails, barriers, reductions, rounding, alignment. It does not test timing or memory
// races, though it makes both easier to see: between two barriers a thread runs as far as it can before the next one
// starts, and the order of blocks and threads and the moment at which copies in the background land alternate from
// launch to launch.
//
// The GPU that it makes believe is a Hopper of four multiprocessors. Blocks with more dynamic shared memory than would
// leave room for a second one run four at once, and may wait for each other. All others run one after the other, so
// that __shared__ is a static variable.
//
// In reading order: the switch between fibers, the scheduler, barriers and warp collectives, the launch, the vocabulary
// of CUDA (threadIdx, shuffles, intrinsics, the few runtime calls), and the instructions that mma.cuh wraps. Those of
// wgmma.cuh are in fiber_hopper.h.
// Compile with: g++ -std=c++17 -O2 -DFIBER -fno-strict-aliasing -Wno-unknown-pragmas -I <toolkit>/include
#pragma once
#include <cuda_bf16.h>  // the toolkit's bf16 and half types have host code, with round to nearest even
#include <cuda_fp16.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace fiber {

constexpr int kWarp = 32, kMaxThreads = 1024 /*of a block*/, kMultiprocessors = 4;
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kSharedBytes = 227 * 1024;  // what one block may ask for on sm_90

[[noreturn]] inline void die(const char* format, ...) __attribute__((format(printf, 1, 2)));

// ---------------------------------------------------------------------------------------------------------------------
// The switch: saves the registers that a call must preserve on the running stack, and continues on the other stack.

#if defined(__x86_64__)
using Context = void*;  // a stack pointer
__attribute__((naked, noinline)) inline void switch_context(Context* /*save: rdi*/, Context* /*load: rsi*/) {
    asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq (%rsi), %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret");
}
inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
    // As if entry's caller had just called switch_context: six registers and the return address. Above them one slot
    // keeps the stack misaligned by 8, as a function finds it on entry.
    void** top = reinterpret_cast<void**>(stack + bytes) - 8;
    std::memset(top, 0, 8 * sizeof(void*));
    top[6] = reinterpret_cast<void*>(entry);
    *context = top;
}
#else
}  // namespace fiber
#include <ucontext.h>
namespace fiber {
using Context = ucontext_t;
inline void switch_context(Context* save, Context* load) { swapcontext(save, load); }
inline void make_context(Context* context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(context);
    context->uc_stack.ss_sp = stack;
    context->uc_stack.ss_size = bytes;
    makecontext(context, entry, 0);
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// The blocks that run and their threads, and a stack of those that can go on.

enum class Wait { none, block_barrier, warp_collective, condition, done };

struct PendingCopy {  // cp.async that has not landed yet
    void* to;
    const void* from;  // null: zeros
    int group;
};

struct Thread;
struct Collective {              // what a thread hands in when it reaches a warp-wide instruction
    const char* name = nullptr;  // two lanes must meet at the same one
    unsigned mask = 0;
    void* arguments = nullptr;  // on the stack of the waiting thread
    void (*run)(Thread* lanes, unsigned active) = nullptr;
};

struct Condition {  // what a thread waits for that no other thread of its warp or block reports
    bool (*holds)(const void*) = nullptr;
    std::string (*describe)(const void*) = nullptr;
    const void* arguments = nullptr;  // on the stack of the waiting thread
};

struct Thread {
    Context context;
    uint3 index{};
    Wait wait = Wait::done;
    Collective collective;
    Condition condition;
    std::vector<PendingCopy> copies;
    int copy_group = 0;
};

struct Warp {
    unsigned live = 0, arrived = 0;  // bit masks of lanes
};

// One that runs, on "multiprocessor" i: its threads are number i * kMaxThreads and the following.
struct Block {
    uint3 index{};
    int live = 0, at_barrier = 0;  // threads
    bool reversed = false, late_copies = false;
};

struct Background {  // a copy by TMA that has not landed yet
    int block;
    std::function<void()> land;
};

struct Machine {
    Thread threads[kMultiprocessors * kMaxThreads];
    Warp warps[kMultiprocessors * kMaxThreads / kWarp];
    Block blocks[kMultiprocessors];
    Context scheduler;
    std::vector<int> ready;  // the last one runs next: a warp whose lanes have met goes on before other warps start
    std::vector<Background> background;
    int current = 0, count = 0 /*threads of a block*/, running = 0 /*blocks, at most*/, made[kMultiprocessors] = {};
    size_t shared_bytes = 0;
    const std::function<void()>* body = nullptr;
    const char* kernel = "";
    unsigned launches = 0;

    Thread& thread() { return threads[current]; }
    Block& block() { return blocks[current / kMaxThreads]; }
};
inline Machine machine;
alignas(1024) inline unsigned char dynamic_shared[kMultiprocessors][kSharedBytes];
inline unsigned char* shared_memory() { return dynamic_shared[machine.current / kMaxThreads]; }

// fiber_hopper.h: when a block starts, when a thread of it and when the whole block has ended, when all have.
inline void hopper_start_block(int block);
inline void hopper_end_thread();
inline void hopper_end_block(int block);
inline void hopper_end_launch();

}  // namespace fiber

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace fiber {

inline void die(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::fprintf(stderr, "fiber: kernel %s, block (%u,%u,%u), thread (%u,%u,%u): ", machine.kernel, blockIdx.x,
                 blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    std::vfprintf(stderr, format, args);
    std::fprintf(stderr, "\n");
    va_end(args);
    std::abort();
}

[[noreturn]] inline void report_deadlock() {
    std::fprintf(stderr, "fiber: no thread can go on: they wait at different places, or for what never comes\n");
    for (int b = 0; b < machine.running; b++) {
        if (machine.blocks[b].live == 0) continue;
        for (int first = 0; first < machine.count; first += kWarp) {
            std::map<std::string, int> waits;
            for (int i = first; i < std::min(machine.count, first + kWarp); i++) {
                const Thread& thread = machine.threads[b * kMaxThreads + i];
                waits[thread.wait == Wait::block_barrier ? "at __syncthreads"
                      : thread.wait == Wait::warp_collective
                          ? std::string("at a warp collective ") + thread.collective.name
                      : thread.wait == Wait::condition ? "at " + thread.condition.describe(thread.condition.arguments)
                                                       : "returned"]++;
            }
            std::fprintf(stderr, "  block %u, warp %d:", machine.blocks[b].index.x, first / kWarp);
            for (const auto& [what, threads] : waits) std::fprintf(stderr, " %d %s;", threads, what.c_str());
            std::fprintf(stderr, "\n");
        }
    }
    die("deadlock");
}

inline void make_ready(int t) {
    machine.threads[t].wait = Wait::none;
    machine.ready.push_back(t);
}

// The next thread that can go on becomes the current one.
inline Context* take_next() {
    const int to = machine.ready.back();
    machine.ready.pop_back();
    machine.current = to;
    threadIdx = machine.threads[to].index;
    blockIdx = machine.block().index;
    return &machine.threads[to].context;
}

// Leaves the running thread, which has said what it waits for, and continues the next one that can run; where there is
// none, the scheduler.
inline void run_next() {
    const int from = machine.current;
    Context* to = machine.ready.empty() ? &machine.scheduler : take_next();
    if (to != &machine.threads[from].context) switch_context(&machine.threads[from].context, to);
}

// Waits until holds(), which must not ask who the current thread is. It is asked again when nobody else can go on.
template <class Holds, class Describe>
void wait_until(const Holds& holds, const Describe& describe) {
    using Both = std::pair<const Holds&, const Describe&>;
    const Both both(holds, describe);
    while (!holds()) {
        Thread& thread = machine.thread();
        thread.wait = Wait::condition;
        thread.condition = {[](const void* of) { return static_cast<const Both*>(of)->first(); },
                            [](const void* of) { return static_cast<const Both*>(of)->second(); }, &both};
        run_next();
    }
}

// Nobody can go on: whose condition holds by now can; else the next copy in the background lands.
inline bool make_progress() {
    for (int b = 0; b < machine.running; b++) {
        for (int i = 0; machine.blocks[b].live > 0 && i < machine.count; i++) {
            const int t = b * kMaxThreads + (machine.blocks[b].reversed ? i : machine.count - 1 - i);
            const Thread& thread = machine.threads[t];
            if (thread.wait == Wait::condition && thread.condition.holds(thread.condition.arguments)) make_ready(t);
        }
    }
    if (!machine.ready.empty()) return true;
    if (machine.background.empty()) return false;
    // In no order that could be relied upon: the first one, or the last one.
    const size_t which = machine.launches & 4 ? 0 : machine.background.size() - 1;
    const Background next = machine.background[which];
    machine.background.erase(machine.background.begin() + which);
    next.land();
    return true;
}

inline void release_block_barrier() {
    Block& block = machine.block();
    if (block.at_barrier == 0 || block.at_barrier < block.live) return;
    block.at_barrier = 0;
    const int first = machine.current / kMaxThreads * kMaxThreads;
    for (int i = 0; i < machine.count; i++) {
        int t = first + (block.reversed ? i : machine.count - 1 - i);
        if (machine.threads[t].wait == Wait::block_barrier) make_ready(t);
    }
}

inline void block_barrier() {
    machine.thread().wait = Wait::block_barrier;
    machine.block().at_barrier++;
    release_block_barrier();
    run_next();
}

// If all lanes that thread t waits for are there, the instruction happens for all of them at this one moment, as on the
// device, and those that waited can go on.
inline bool complete_collective(int t) {
    int w = t / kWarp;
    Warp& warp = machine.warps[w];
    const Collective& collective = machine.threads[t].collective;
    unsigned expected = collective.mask & warp.live;
    if ((warp.arrived & expected) != expected) return false;
    Thread* lanes = &machine.threads[w * kWarp];
    for (int l = 0; l < kWarp; l++) {
        const Collective& other = lanes[l].collective;
        if ((expected >> l & 1) && (std::strcmp(other.name, collective.name) != 0 || other.mask != collective.mask))
            die("two lanes should meet: lane %d is at %s (mask %08x), lane %d at %s (mask %08x)", l, other.name,
                other.mask, t % kWarp, collective.name, collective.mask);
    }
    collective.run(lanes, expected);
    warp.arrived &= ~expected;
    for (int l = 0; l < kWarp; l++)
        if ((expected >> l & 1) && lanes[l].wait == Wait::warp_collective) make_ready(w * kWarp + l);
    return true;
}

// All lanes of `mask` that have not returned meet here.
inline void warp_collective(const char* name, unsigned mask, void* arguments,
                            void (*run)(Thread* lanes, unsigned active)) {
    int t = machine.current;
    if (!(mask >> t % kWarp & 1)) die("%s: the mask %08x lacks the calling lane", name, mask);
    machine.threads[t].collective = {name, mask, arguments, run};
    machine.warps[t / kWarp].arrived |= 1u << t % kWarp;
    if (complete_collective(t)) return;
    machine.threads[t].wait = Wait::warp_collective;
    run_next();
}

inline void thread_main() {
    for (;;) {  // one round per block
        (*machine.body)();
        int t = machine.current;
        Warp& warp = machine.warps[t / kWarp];
        hopper_end_thread();
        machine.threads[t].copies.clear();
        machine.threads[t].wait = Wait::done;
        machine.block().live--;
        warp.live &= ~(1u << t % kWarp);
        release_block_barrier();  // nobody waits for a thread that has returned
        for (int l = 0; l < kWarp; l++)
            if (warp.arrived >> l & 1) complete_collective(t / kWarp * kWarp + l);
        run_next();
    }
}

template <class T>
T& argument(Thread& lane) {
    return *static_cast<T*>(lane.collective.arguments);
}

inline void check_aligned(const void* pointer, size_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0)
        die("%s at %p needs %zu-byte alignment", what, pointer, bytes);
}

// ---------------------------------------------------------------------------------------------------------------------
// The launch

inline void make_threads(int block, int count) {
    // Stacks are kept for the life of the process. The odd stride spreads their tops over the sets of the CPU's cache.
    constexpr size_t stride = kStackBytes + 4096 + 192;
    static char* stacks = nullptr;
    if (!stacks) {
        void* memory = mmap(nullptr, kMultiprocessors * kMaxThreads * stride, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) die("no memory for the stacks");
        stacks = static_cast<char*>(memory);
    }
    for (int& made = machine.made[block]; made < count; made++) {
        const int t = block * kMaxThreads + made;
        make_context(&machine.threads[t].context, stacks + t * stride, kStackBytes, thread_main);
    }
}

// The order of blocks and threads and the copies alternate from launch to launch, so that tests meet each of them.
inline void start_block(int b, size_t order, size_t blocks) {
    const unsigned variant = machine.launches;
    const size_t number = variant & 1 ? blocks - 1 - order : order;
    Block& block = machine.blocks[b];
    block.index = {unsigned(number % gridDim.x), unsigned(number / gridDim.x % gridDim.y),
                   unsigned(number / gridDim.x / gridDim.y)};
    block.live = machine.count;
    block.at_barrier = 0;
    block.late_copies = (variant >> 1 ^ order) & 1;
    block.reversed = (variant ^ order >> 1) & 1;
    std::memset(dynamic_shared[b], 0xff, machine.shared_bytes);  // NaN: shared memory starts undefined
    const int first = b * kMaxThreads;
    for (int w = 0; w * kWarp < machine.count; w++) machine.warps[first / kWarp + w] = Warp{};
    hopper_start_block(b);
    for (int i = 0; i < machine.count; i++) {
        const unsigned t = block.reversed ? i : machine.count - 1 - i;
        machine.threads[first + t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
        machine.warps[(first + t) / kWarp].live |= 1u << t % kWarp;
        make_ready(first + int(t));
    }
}

inline void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
    machine.kernel = kernel;
    machine.count = block.x * block.y * block.z;
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    if (machine.count < 1 || machine.count > kMaxThreads) die("%d threads in a block", machine.count);
    if (blocks < 1 || grid.y > 65535 || grid.z > 65535) die("grid (%u,%u,%u)", grid.x, grid.y, grid.z);
    if (shared_bytes > kSharedBytes)
        die("%zu bytes of dynamic shared memory; a block may have %zu", shared_bytes, kSharedBytes);
    machine.running = shared_bytes > kSharedBytes / 2 ? int(std::min(blocks, size_t(kMultiprocessors))) : 1;
    for (int b = 0; b < machine.running; b++) make_threads(b, machine.count);
    machine.body = &body;
    machine.shared_bytes = shared_bytes;
    blockDim = block;
    gridDim = grid;
    std::vector<bool> under_way(machine.running, false);
    for (size_t started = 0, ended = 0; ended < blocks;) {
        for (int b = 0; b < machine.running; b++) {
            if (machine.blocks[b].live > 0) continue;
            if (under_way[b]) {
                ended++;
                hopper_end_block(b);
            }
            under_way[b] = started < blocks;
            if (under_way[b]) start_block(b, started++, blocks);
        }
        if (ended == blocks) break;
        if (machine.ready.empty() && !make_progress()) report_deadlock();
        if (!machine.ready.empty()) switch_context(&machine.scheduler, take_next());
    }
    hopper_end_launch();
    machine.launches++;
}

// ---------------------------------------------------------------------------------------------------------------------
// Shuffles and votes

template <class T>
struct Shuffle {
    T value, result;
    int source;
};
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
    Shuffle<T> mine{value, value, source};
    warp_collective(name, mask, &mine, [](Thread* lanes, unsigned active) {
        for (int l = 0; l < kWarp; l++) {
            if (!(active >> l & 1)) continue;
            Shuffle<T>& to = argument<Shuffle<T>>(lanes[l]);
            if (active >> to.source & 1) to.result = argument<Shuffle<T>>(lanes[to.source]).value;
            else std::memset(static_cast<void*>(&to.result), 0xff, sizeof(T));  // undefined on the device: poison
        }
    });
    return mine.result;
}
inline int lane() { return machine.current % kWarp; }

inline unsigned ballot(const char* name, unsigned mask, bool predicate) {
    struct Vote {
        bool predicate;
        unsigned result;
    } mine{predicate, 0};
    warp_collective(name, mask, &mine, [](Thread* lanes, unsigned active) {
        unsigned result = 0;
        for (int l = 0; l < kWarp; l++)
            if ((active >> l & 1) && argument<Vote>(lanes[l]).predicate) result |= 1u << l;
        for (int l = 0; l < kWarp; l++)
            if (active >> l & 1) argument<Vote>(lanes[l]).result = result;
    });
    return mine.result;
}

}  // namespace fiber

// ---------------------------------------------------------------------------------------------------------------------
// The vocabulary of CUDA, as far as the kernels use it

#undef __shared__
#define __shared__ static
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(fiber::shared_memory())

inline void __syncthreads() { fiber::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    fiber::warp_collective("__syncwarp", mask, nullptr, [](fiber::Thread*, unsigned) {});
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
    int lane = fiber::lane();
    return fiber::shuffle("__shfl_sync", mask, value, (lane & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize) {
    int lane = fiber::lane(), source = lane ^ bits;
    return fiber::shuffle("__shfl_xor_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = warpSize) {
    int lane = fiber::lane(), source = lane + delta;
    return fiber::shuffle("__shfl_down_sync", mask, value, source > (lane | (width - 1)) ? lane : source);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = warpSize) {
    int lane = fiber::lane(), source = lane - delta;
    return fiber::shuffle("__shfl_up_sync", mask, value, source < (lane & ~(width - 1)) ? lane : source);
}
inline unsigned __ballot_sync(unsigned mask, bool p) { return fiber::ballot("__ballot_sync", mask, p); }
inline int __any_sync(unsigned mask, bool p) { return fiber::ballot("__any_sync", mask, p) != 0; }

inline int atomicAdd(int* p, int value) { return std::exchange(*p, *p + value); }
inline unsigned atomicInc(unsigned* p, unsigned last) { return std::exchange(*p, *p >= last ? 0 : *p + 1); }

template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcs(const T* p) {
    return *p;
}
template <class T>
void __stcs(T* p, T value) {
    *p = value;
}

using std::isfinite;
using std::isnan;
using std::max;
using std::min;
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }

// The runtime calls that tests and launchers make, on host memory. The toolkit's headers declare them.
extern "C" {
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
    *p = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* p) {
    std::free(p);
    return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    std::memmove(to, from, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
    std::memset(p, value, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
    *value = fiber::kMultiprocessors;
    return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "out of memory" : "no error";
}
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
    *address = &symbol;
    return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// What mma.cuh wraps. Fragment layouts are those of the PTX manual; g = lane/4, t = lane%4.

namespace fiber {

// Matrix i (8x8 of 16 bits) has its rows at the addresses that lanes 8i..8i+7 pass. Lane l receives, in register i,
// elements (g, 2t) and (g, 2t+1); transposed, (2t, g) and (2t+1, g).
struct LoadMatrix {
    const void* row;
    uint32_t* registers;
};
template <int matrices, bool transposed>
void ldmatrix(uint32_t* registers, const void* row) {
    LoadMatrix mine{row, registers};
    if (lane() < 8 * matrices) check_aligned(row, 16, "ldmatrix: row");
    warp_collective(transposed ? "ldmatrix.trans" : "ldmatrix", 0xffffffffu, &mine, [](Thread* lanes, unsigned active) {
        if (active != 0xffffffffu) die("ldmatrix needs all 32 lanes");
        for (int i = 0; i < matrices; i++) {
            const uint16_t* rows[8];
            for (int r = 0; r < 8; r++)
                rows[r] = static_cast<const uint16_t*>(argument<LoadMatrix>(lanes[8 * i + r]).row);
            for (int l = 0; l < kWarp; l++) {
                int g = l / 4, t = l % 4;
                uint32_t low = transposed ? rows[2 * t][g] : rows[g][2 * t];
                uint32_t high = transposed ? rows[2 * t + 1][g] : rows[g][2 * t + 1];
                argument<LoadMatrix>(lanes[l]).registers[i] = low | high << 16;
            }
        }
    });
}

// d (16x8) += a (16x16) b (16x8). Registers: a0 (g, 2t..), a1 (g+8, 2t..), a2 (g, 2t+8..), a3 (g+8, 2t+8..);
// b0 (2t.., g), b1 (2t+8.., g); d0,d1 (g, 2t..), d2,d3 (g+8, 2t..). Products and sums in fp32, k ascending.
struct MatrixMultiply {
    float* d;
    const uint32_t *a, *b;
};
template <class T>
float element(uint32_t pair, int half) {
    uint16_t bits = uint16_t(pair >> 16 * half);
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, 2);
    return float(value);
}
template <class T>
void mma_m16n8k16(float* d, const uint32_t* a, const uint32_t* b) {
    MatrixMultiply mine{d, a, b};
    const char* name = std::is_same<T, __half>::value ? "mma.f16" : "mma.bf16";
    warp_collective(name, 0xffffffffu, &mine, [](Thread* lanes, unsigned active) {
        if (active != 0xffffffffu) die("mma needs all 32 lanes");
        float A[16][16], B[16][8], D[16][8];
        for (int l = 0; l < kWarp; l++) {
            int g = l / 4, t = l % 4;
            const MatrixMultiply& of = argument<MatrixMultiply>(lanes[l]);
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) A[g + 8 * (i & 1)][2 * t + 8 * (i >> 1) + j] = element<T>(of.a[i], j);
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 2; j++) B[2 * t + 8 * i + j][g] = element<T>(of.b[i], j);
            for (int i = 0; i < 4; i++) D[g + 8 * (i >> 1)][2 * t + (i & 1)] = of.d[i];
        }
        for (int k = 0; k < 16; k++)
            for (int m = 0; m < 16; m++)
                for (int n = 0; n < 8; n++) D[m][n] += A[m][k] * B[k][n];
        for (int l = 0; l < kWarp; l++)
            for (int i = 0; i < 4; i++)
                argument<MatrixMultiply>(lanes[l]).d[i] = D[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
    });
}

// cp.async lands at once or, in every other block, only when the thread waits for it: a missing wait then reads old
// data, a buffer that is refilled too early is overwritten too early.
inline void land(const PendingCopy& copy) {
    if (copy.from) std::memcpy(copy.to, copy.from, 16);
    else std::memset(copy.to, 0, 16);
}
inline void cp_async_16(void* shared, const void* global, bool valid) {
    check_aligned(shared, 16, "cp.async: shared address");
    if (valid) check_aligned(global, 16, "cp.async: global address");
    Thread& thread = machine.thread();
    PendingCopy copy{shared, valid ? global : nullptr, thread.copy_group};
    if (machine.block().late_copies) thread.copies.push_back(copy);
    else land(copy);
}
inline void cp_async_commit() { machine.thread().copy_group++; }
inline void cp_async_wait(int newest) {  // all but the `newest` last committed groups have landed
    Thread& thread = machine.thread();
    size_t landed = 0;
    while (landed < thread.copies.size() && thread.copies[landed].group < thread.copy_group - newest)
        land(thread.copies[landed++]);
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + landed);
}

}  // namespace fiber

#include "fiber_hopper.h"
