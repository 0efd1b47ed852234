// fiber_hopper.h (tests only): the instructions of wgmma.cuh on fibers, under the names they have there. Each does what
// the PTX manual says, in plain loops, as late as it may or at once:
//   mbarriers    lie in shared memory as on the device: what overwrites one is seen, and so is one that nobody has
//                initialised. A wait that can never end is reported with its barrier's state.
//   TMA          a load leaves NaN where it is under way. Loads and stores happen at once, or in every other block when
//                no thread can go on without them (loads) or when a thread waits for them (stores).
//   wgmma        reads shared memory through its descriptors, and registers, when somebody waits for it; until its own
//                wait a thread finds NaN in the sums.
//   setmaxnreg   takes registers from what the block has, and waits for more.
// What the manual forbids, and a GPU does not report, ends the program with a line that says so: sums that were not
// fenced, shared memory written by stmatrix and then stored without a fence between, stores that a thread leaves
// behind, warps of a warpgroup that disagree.
#pragma once
#include <cuda.h>  // CUtensorMap

#include <deque>
#include <memory>

#include "fiber.h"

namespace fiber {

// ---------------------------------------------------------------------------------------------------------------------
// What the threads and blocks have of it

constexpr int kWarpgroup = 128;
constexpr uint32_t kSharedBase = 1024;  // addresses in shared memory start behind what the system keeps

struct Sums {  // of a warpgroup, (64, N), while wgmmas add to them
    int N;
    float* registers[kWarpgroup] = {};
    std::vector<float> values;
};
struct Multiply {  // one wgmma of a warpgroup
    int N;
    bool half, a_mn_major, b_mn_major, add, a_in_registers;
    uint64_t a, b;
    int group;  // the commit that it belongs to, counted by each thread
    std::shared_ptr<Sums> sums;
    const uint32_t* a_registers[kWarpgroup] = {};
    int issued = 0;  // threads
};
struct Warpgroup {
    std::deque<Multiply> multiplies;  // issued by some, not yet done
    size_t done = 0;                  // before them
};

struct Box {  // a TMA store
    CUtensorMap map;
    int matrix, row, col, group;
    const unsigned char* from;
    std::vector<uint16_t> elements;  // once read
    bool written = false;
};

struct HopperThread {
    std::vector<uint32_t> unfenced;  // addresses of 16 bytes that stmatrix has written
    std::vector<Box> stores;
    int store_group = 0;
    bool acquired = false, stored = false;  // a counter, through TMA: since the last proxy_fence

    bool may_multiply = false;
    size_t multiplies = 0;
    int multiply_group = 0;
    struct Using {
        std::shared_ptr<Sums> sums;
        int last_group;
    };
    std::vector<Using> in_use;
};
struct HopperBlock {
    struct NamedBarrier {
        int threads = 0, arrived = 0;
        unsigned phase = 0;
    };
    NamedBarrier barriers[16];
    std::vector<uint64_t*> unfenced_barriers;
    int registers[kMaxThreads / kWarp], free_registers;
};
inline HopperThread hopper_threads[kMultiprocessors * kMaxThreads];
inline HopperBlock hopper_blocks[kMultiprocessors];
inline Warpgroup warpgroups[kMultiprocessors * kMaxThreads / kWarpgroup];

inline HopperThread& hopper_thread() { return hopper_threads[machine.current]; }
inline HopperBlock& hopper_block() { return hopper_blocks[machine.current / kMaxThreads]; }

inline void hopper_start_block(int block) {
    // What ptxas has to go by: registers of an SM, handed out in units of 8 a thread, and an instruction can name 255.
    const int registers = std::min(65536 / machine.count / 8 * 8, 248);
    hopper_blocks[block] = HopperBlock();
    hopper_blocks[block].free_registers = 0;
    std::fill_n(hopper_blocks[block].registers, kMaxThreads / kWarp, registers);
    for (int t = 0; t < machine.count; t++) hopper_threads[block * kMaxThreads + t] = HopperThread();
    for (int w = 0; w < machine.count; w += kWarpgroup)
        warpgroups[(block * kMaxThreads + w) / kWarpgroup] = Warpgroup();
}
inline void write_box(Box& store);
inline std::vector<Box> unwritten;  // by threads that have returned: the end of the launch is soon enough
inline void hopper_end_thread() {
    HopperThread& thread = hopper_thread();
    for (Box& store : thread.stores) {
        if (store.group == thread.store_group) die("returned with a TMA store that it did not commit");
        if (store.elements.empty()) die("returned before its TMA stores had read shared memory");
        if (!store.written) unwritten.push_back(store);
    }
    if (!thread.in_use.empty()) die("returned with a wgmma under way");
}
inline void hopper_end_block(int block) {
    for (const Background& copy : machine.background)
        if (copy.block == block) die("the block ended with a TMA load under way");
}
inline void hopper_end_launch() {
    for (Box& store : unwritten) write_box(store);
    unwritten.clear();
}

// Pointers into the block's shared memory <-> the numbers that instructions and descriptors have for them
inline uint32_t address_in(const void* p, size_t bytes, const char* what) {
    const auto* at = static_cast<const unsigned char*>(p);
    const unsigned char* memory = shared_memory();
    if (at < memory || at + bytes > memory + machine.shared_bytes) die("%s: not in the block's shared memory", what);
    return kSharedBase + uint32_t(at - memory);
}
inline unsigned char* pointer_to(uint32_t address, size_t bytes, const char* what) {
    if (address < kSharedBase || address + bytes > kSharedBase + machine.shared_bytes)
        die("%s: address %u is not in the block's shared memory", what, address);
    return shared_memory() + (address - kSharedBase);
}
// The 128-byte swizzle: of an address, bits 4 to 6 are changed by bits 7 to 9.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// ---------------------------------------------------------------------------------------------------------------------
// mbarriers

struct Mbarrier {
    uint64_t magic : 12, visible_to_tma : 1, phase : 1, arrivals : 12, pending : 12;
    int64_t bytes : 26;
    static constexpr uint64_t kMagic = 0xba1;
};
static_assert(sizeof(Mbarrier) == 8, "as on the device");

inline Mbarrier* mbarrier(uint64_t* barrier, const char* what) {
    const uint32_t address = address_in(barrier, 8, what);
    auto* b = reinterpret_cast<Mbarrier*>(barrier);
    if (b->magic != Mbarrier::kMagic)
        die("%s: at byte %u of shared memory is no barrier that was initialised", what, address - kSharedBase);
    return b;
}
inline void complete(Mbarrier* b) {
    if (b->pending > 0 || b->bytes != 0) return;
    b->phase ^= 1;
    b->pending = b->arrivals;
}
inline void arrive(Mbarrier* b) {
    if (b->pending == 0) die("mbarrier_arrive: more arrivals than the phase has");
    b->pending--;
    complete(b);
    // Whoever waited for this may come first: what the thread does next, it may have done too late.
    bool others_asked = false;
    if (b->pending == b->arrivals && machine.block().reversed)
        wait_until([&] { return std::exchange(others_asked, true); }, [] { return std::string(); });
}

// ---------------------------------------------------------------------------------------------------------------------
// TMA. The driver's 128 bytes are opaque; here they hold this.

struct TensorMap {
    unsigned char* data;
    size_t sizes[3], strides[2] /*bytes*/;
    int box_rows;
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "in its place");

inline TensorMap tensor_of(const CUtensorMap* map) {
    TensorMap tensor;
    std::memcpy(&tensor, map, sizeof tensor);
    return tensor;
}
// A box may end outside of its tensor, but not begin before it: an H200 that was to load one at column -8, and store
// it there, met an illegal instruction.
inline void not_negative(int matrix, int row, int col, const char* what) {
    if (matrix < 0 || row < 0 || col < 0) die("%s: a box at (%d, %d, %d), before the tensor", what, matrix, row, col);
}
// Element i of the box at (matrix, row, col), 64 columns wide; null outside of the tensor.
inline uint16_t* box_element(const TensorMap& tensor, int matrix, int row, int col, int i) {
    row += i / 64, col += i % 64;
    if (size_t(col) >= tensor.sizes[0] || size_t(row) >= tensor.sizes[1] || size_t(matrix) >= tensor.sizes[2])
        return nullptr;
    return reinterpret_cast<uint16_t*>(tensor.data + matrix * tensor.strides[1] + row * tensor.strides[0]) + col;
}
// Where it lies in the shared memory of a box at that address
inline uint32_t in_box(uint32_t box, int i) { return swizzled(box + i * 2); }

inline uint32_t box_address(const void* box, const TensorMap& tensor, const char* what) {
    const uint32_t address = address_in(box, tensor.box_rows * 128, what);
    if (address % 1024 != 0) die("%s: a box at byte %u of shared memory, not a multiple of 1024", what, address);
    return address;
}

inline void read_box(Box& store) {
    if (!store.elements.empty()) return;
    const TensorMap tensor = tensor_of(&store.map);
    const uint32_t address = box_address(store.from, tensor, "tma_store");
    for (int i = 0; i < tensor.box_rows * 64; i++)
        store.elements.push_back(*reinterpret_cast<uint16_t*>(pointer_to(in_box(address, i), 2, "tma_store")));
}
inline void write_box(Box& store) {
    if (store.written) return;
    store.written = true;
    const TensorMap tensor = tensor_of(&store.map);
    for (int i = 0; i < int(store.elements.size()); i++)
        if (uint16_t* to = box_element(tensor, store.matrix, store.row, store.col, i)) *to = store.elements[i];
}

// ---------------------------------------------------------------------------------------------------------------------
// wgmma

// Element (row of A or column of B, k) of a (.., 16) operand in shared memory: the canonical layouts of the manual with
// the 128-byte swizzle, in units of 8 x 16 bytes.
inline uint32_t operand_address(uint64_t descriptor, bool mn_major, int mn, int k) {
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, leading = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                   stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const uint32_t offset = mn_major ? mn / 64 * leading + mn % 64 * 2 + k / 8 * stride + k % 8 * 128
                                     : mn / 8 * stride + mn % 8 * 128 + k * 2;
    return swizzled(start + offset);
}
inline void check_descriptor(uint64_t descriptor) {
    if (descriptor >> 62 != 1) die("wgmma: a descriptor without the 128-byte swizzle");
    if ((descriptor >> 49 & 7) != 0) die("wgmma: a descriptor with a base offset: boxes are 1024-byte aligned");
}
inline float element(uint16_t bits, bool half) {
    if (!half) {
        const uint32_t word = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &word, 4);
        return value;
    }
    static const std::vector<float> table = [] {
        std::vector<float> values;
        for (uint32_t i = 0; i < 65536; i++) values.push_back(element<__half>(i, 0));
        return values;
    }();
    return table[bits];
}
// Calls f(k, mn, element) for all of an operand, eight neighbours at a time.
template <class F>
void for_operand(uint64_t descriptor, bool mn_major, bool half, int rows, F f) {
    for (int i = 0; i < rows * 16; i += 8) {
        const int mn = mn_major ? i % rows : i / 16, k = mn_major ? i / rows : i % 16;
        const auto* from = reinterpret_cast<const uint16_t*>(
            pointer_to(operand_address(descriptor, mn_major, mn, k), 16, "wgmma: an operand"));
        for (int j = 0; j < 8; j++) f(mn_major ? k : k + j, mn_major ? mn + j : mn, element(from[j], half));
    }
}

// Products and sums in fp32, k ascending.
template <int N>
void multiply(const Multiply& m) {
    float a[64][16], b[16][N];
    if (m.a_in_registers) {
        for (int t = 0; t < kWarpgroup; t++) {
            const int row = t / 32 * 16 + t % 32 / 4, col = t % 4 * 2;
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++)
                    a[row + 8 * (i & 1)][col + 8 * (i >> 1) + j] =
                        element(uint16_t(m.a_registers[t][i] >> 16 * j), m.half);
        }
    } else {
        for_operand(m.a, m.a_mn_major, m.half, 64, [&](int k, int row, float value) { a[row][k] = value; });
    }
    for_operand(m.b, m.b_mn_major, m.half, N, [&](int k, int col, float value) { b[k][col] = value; });
    for (int row = 0; row < 64; row++) {
        float* sums = &m.sums->values[row * N];
        if (!m.add) std::fill_n(sums, N, 0.0f);
        for (int k = 0; k < 16; k++)
            for (int col = 0; col < N; col++) sums[col] += a[row][k] * b[k][col];
    }
}

// Register e of thread t of the warpgroup
inline float& sum_of(Sums& sums, int t, int e) {
    const int row = t / 32 * 16 + t % 32 / 4 + e / 2 % 2 * 8, col = e / 4 * 8 + t % 4 * 2 + e % 2;
    return sums.values[row * sums.N + col];
}

inline void issue(const Multiply& mine, float* d, const uint32_t* a_registers) {
    HopperThread& thread = hopper_thread();
    if (!thread.may_multiply) die("wgmma without wgmma_begin since the last wait");
    if (!mine.a_in_registers) check_descriptor(mine.a);
    check_descriptor(mine.b);
    const int t = machine.current % kWarpgroup;
    Warpgroup& warpgroup = warpgroups[machine.current / kWarpgroup];
    HopperThread::Using* use = nullptr;
    for (HopperThread::Using& other : thread.in_use)
        if (other.sums->registers[t] == d) use = &other;
    const size_t index = thread.multiplies++ - warpgroup.done;
    if (index == warpgroup.multiplies.size()) {
        warpgroup.multiplies.push_back(mine);
        Multiply& first = warpgroup.multiplies.back();
        first.group = thread.multiply_group;
        first.sums = use ? use->sums : std::make_shared<Sums>();
        first.sums->N = mine.N;
        first.sums->values.resize(64 * mine.N);
    }
    Multiply& m = warpgroup.multiplies[index];
    if (mine.N != m.N || mine.half != m.half || mine.a_mn_major != m.a_mn_major || mine.b_mn_major != m.b_mn_major ||
        mine.add != m.add || mine.a_in_registers != m.a_in_registers || (!m.a_in_registers && mine.a != m.a) ||
        mine.b != m.b || m.group != thread.multiply_group || (use && use->sums != m.sums) ||
        (!use && m.sums->registers[t]))
        die("wgmma: the threads of a warpgroup do not issue the same");
    m.a_registers[t] = a_registers;
    m.issued++;
    if (!use) {
        m.sums->registers[t] = d;
        for (int e = 0; e < m.N / 2; e++) sum_of(*m.sums, t, e) = d[e];
        std::fill_n(d, m.N / 2, NAN);
        thread.in_use.push_back({m.sums, 0});
        use = &thread.in_use.back();
    }
    use->last_group = thread.multiply_group;
}

inline void wait_multiplies(int newest) {
    HopperThread& thread = hopper_thread();
    Warpgroup& warpgroup = warpgroups[machine.current / kWarpgroup];
    const int end = thread.multiply_group - newest;  // of the groups that must be done
    while (!warpgroup.multiplies.empty() && warpgroup.multiplies.front().group < end) {
        const size_t number = warpgroup.done;
        // Not before all others have gone as far as they can, in every other block.
        bool others_asked = !machine.block().late_copies;
        auto all_there = [&] {
            if (warpgroup.done > number) return true;
            return warpgroup.multiplies.front().issued == kWarpgroup && std::exchange(others_asked, true);
        };
        wait_until(all_there, [&] {
            return "a wgmma that only " + std::to_string(warpgroup.multiplies.front().issued) +
                   " threads of the warpgroup have issued";
        });
        if (warpgroup.done > number) continue;  // done by another thread
        const Multiply& m = warpgroup.multiplies.front();
        if (m.N == 64) multiply<64>(m);
        if (m.N == 128) multiply<128>(m);
        if (m.N == 256) multiply<256>(m);
        warpgroup.multiplies.pop_front();
        warpgroup.done++;
    }
    const int t = machine.current % kWarpgroup;
    for (size_t i = 0; i < thread.in_use.size();) {
        const HopperThread::Using& use = thread.in_use[i];
        if (use.last_group >= end) {
            i++;
            continue;
        }
        for (int e = 0; e < use.sums->N / 2; e++) use.sums->registers[t][e] = sum_of(*use.sums, t, e);
        thread.in_use.erase(thread.in_use.begin() + i);
    }
    thread.may_multiply = false;
}

// ---------------------------------------------------------------------------------------------------------------------
// The rest

template <bool transposed>
void stmatrix(void* row, const uint32_t (&registers)[4]) {
    struct StoreMatrix {
        void* row;
        const uint32_t* registers;
    } mine{row, registers};
    check_aligned(row, 16, "stmatrix: row");
    hopper_thread().unfenced.push_back(address_in(row, 16, "stmatrix: row"));
    warp_collective(transposed ? "stmatrix.trans" : "stmatrix", 0xffffffffu, &mine, [](Thread* lanes, unsigned active) {
        if (active != 0xffffffffu) die("stmatrix needs all 32 lanes");
        for (int i = 0; i < 4; i++) {
            for (int l = 0; l < kWarp; l++) {
                const uint32_t pair = argument<StoreMatrix>(lanes[l]).registers[i];
                for (int half = 0; half < 2; half++) {
                    int r = l / 4, c = l % 4 * 2 + half;
                    if (transposed) std::swap(r, c);
                    static_cast<uint16_t*>(argument<StoreMatrix>(lanes[8 * i + r]).row)[c] =
                        uint16_t(pair >> 16 * half);
                }
            }
        }
    });
}

inline HopperBlock::NamedBarrier& arrive_named(int id, int threads) {
    if (id < 1 || id > 15) die("barrier %d: they are 1 to 15", id);
    if (threads % kWarp != 0) die("barrier %d: %d threads are not whole warps", id, threads);
    HopperBlock::NamedBarrier& barrier = hopper_block().barriers[id];
    if (barrier.arrived > 0 && barrier.threads != threads)
        die("barrier %d: %d threads and %d are to meet", id, barrier.threads, threads);
    barrier.threads = threads;
    if (++barrier.arrived == threads) barrier.arrived = 0, barrier.phase++;
    return barrier;
}

// All lanes together. Registers go to the block's, or come from there when there are enough.
inline void set_registers(int n, bool take) {
    __syncwarp();
    if (n % 8 != 0 || n < 24 || n > 256) die("setmaxnreg: %d is no multiple of 8 from 24 to 256", n);
    HopperBlock& block = hopper_block();
    int& mine = block.registers[machine.current % kMaxThreads / kWarp];
    if (take ? n < mine : n > mine)
        die("setmaxnreg: %d registers, %s %d", n, take ? "taken by a warp that has" : "left to one that has", mine);
    const int change = (n - mine) * kWarp;
    auto enough = [&] { return mine == n || block.free_registers >= change; };
    wait_until(enough, [&] {
        return "take_registers<" + std::to_string(n) + ">: " + std::to_string(change / kWarp) +
               " more for each thread, and the block has " + std::to_string(block.free_registers) + " left";
    });
    if (mine != n) block.free_registers -= change, mine = n;  // by the first lane that comes
}

}  // namespace fiber

// ---------------------------------------------------------------------------------------------------------------------
// The vocabulary of wgmma.cuh, in its order

inline uint32_t shared_address(const void* p) { return fiber::address_in(p, 1, "shared_address"); }

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
    fiber::address_in(barrier, 8, "mbarrier_init");
    fiber::check_aligned(barrier, 8, "mbarrier_init");
    if (arrivals < 1 || arrivals > fiber::kMaxThreads) fiber::die("mbarrier_init: %d arrivals", arrivals);
    auto* b = reinterpret_cast<fiber::Mbarrier*>(barrier);
    std::memset(static_cast<void*>(b), 0, sizeof *b);
    b->magic = fiber::Mbarrier::kMagic;
    b->arrivals = b->pending = unsigned(arrivals) & 0xfff;
    fiber::hopper_block().unfenced_barriers.push_back(barrier);
}
inline void mbarrier_init_fence() {
    for (uint64_t* barrier : fiber::hopper_block().unfenced_barriers)
        fiber::mbarrier(barrier, "mbarrier_init_fence")->visible_to_tma = 1;
    fiber::hopper_block().unfenced_barriers.clear();
}
inline void mbarrier_arrive(uint64_t* barrier) { fiber::arrive(fiber::mbarrier(barrier, "mbarrier_arrive")); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
    fiber::Mbarrier* b = fiber::mbarrier(barrier, "mbarrier_arrive_expect");
    b->bytes += bytes;
    fiber::arrive(b);
}
inline void mbarrier_wait(uint64_t* barrier, int parity) {
    const fiber::Mbarrier* b = fiber::mbarrier(barrier, "mbarrier_wait");
    const uint32_t address = fiber::address_in(barrier, 8, "mbarrier_wait");
    if (parity != 0 && parity != 1) fiber::die("mbarrier_wait: parity %d", parity);
    fiber::wait_until([&] { return b->phase != unsigned(parity); },
                      [&] {
                          return "mbarrier_wait for parity " + std::to_string(parity) + " at byte " +
                                 std::to_string(address - fiber::kSharedBase) + ", which lacks " +
                                 std::to_string(b->pending) + " of " + std::to_string(b->arrivals) + " arrivals and " +
                                 std::to_string(b->bytes) + " bytes";
                      });
}

inline CUtensorMap tensor_map(const void* data, bool, size_t cols, size_t rows, size_t batch, size_t row_stride,
                              size_t batch_stride, int box_rows) {
    fiber::TensorMap tensor = {};
    tensor.data = static_cast<unsigned char*>(const_cast<void*>(data));
    const size_t sizes[3] = {cols, rows, batch}, strides[2] = {row_stride * 2, batch_stride * 2};
    std::copy_n(sizes, 3, tensor.sizes);
    std::copy_n(strides, 2, tensor.strides);
    tensor.box_rows = box_rows;
    // What the driver refuses
    for (size_t size : sizes)
        if (size < 1 || size >= size_t(1) << 32)
            fiber::die("tensor_map: a tensor of %zu x %zu x %zu", batch, rows, cols);
    for (size_t stride : strides)
        if (stride % 16 != 0 || stride >= size_t(1) << 40) fiber::die("tensor_map: a stride of %zu bytes", stride);
    fiber::check_aligned(data, 16, "tensor_map");
    if (box_rows < 1 || box_rows > 256) fiber::die("tensor_map: boxes of %d rows", box_rows);
    CUtensorMap map = {};
    std::memcpy(static_cast<void*>(&map), &tensor, sizeof tensor);
    return map;
}

inline void tma_load(void* box, const CUtensorMap* map, int matrix, int row, int col, uint64_t* barrier) {
    using namespace fiber;
    if (hopper_thread().acquired) die("tma_load of what a counter has announced, without proxy_fence");
    not_negative(matrix, row, col, "tma_load");
    const TensorMap tensor = tensor_of(map);
    const uint32_t address = box_address(box, tensor, "tma_load");
    Mbarrier* b = mbarrier(barrier, "tma_load");
    if (!b->visible_to_tma) die("tma_load: its barrier lacks mbarrier_init_fence");
    unsigned char* memory = shared_memory();
    const auto land = [=] {
        for (int i = 0; i < tensor.box_rows * 64; i++) {
            const uint16_t* from = box_element(tensor, matrix, row, col, i);
            const uint16_t value = from ? *from : 0;
            std::memcpy(memory + (in_box(address, i) - kSharedBase), &value, 2);
        }
        b->bytes -= tensor.box_rows * 128;
        complete(b);
    };
    if (!machine.block().late_copies) return land();
    std::memset(box, 0xff, tensor.box_rows * 128);
    machine.background.push_back({machine.current / kMaxThreads, land});
}
inline void tma_store(const CUtensorMap* map, int matrix, int row, int col, const void* box) {
    using namespace fiber;
    not_negative(matrix, row, col, "tma_store");
    const TensorMap tensor = tensor_of(map);
    const uint32_t address = box_address(box, tensor, "tma_store"), end = address + tensor.box_rows * 128;
    const int first = machine.current / kMaxThreads * kMaxThreads;
    for (int t = 0; t < machine.count; t++)
        for (uint32_t written : hopper_threads[first + t].unfenced)
            if (written >= address && written < end)
                die("tma_store of what thread %d has written without tma_store_fence", t);
    HopperThread& thread = hopper_thread();
    thread.stores.push_back({*map, matrix, row, col, thread.store_group, static_cast<const unsigned char*>(box), {}});
    if (!machine.block().late_copies) read_box(thread.stores.back()), write_box(thread.stores.back());
}
inline void tma_store_fence() { fiber::hopper_thread().unfenced.clear(); }
inline void tma_store_commit() { fiber::hopper_thread().store_group++; }
inline void tma_store_wait_read() {
    fiber::HopperThread& thread = fiber::hopper_thread();
    for (fiber::Box& store : thread.stores)
        if (store.group < thread.store_group) fiber::read_box(store);
}
inline void tma_store_wait() {
    tma_store_wait_read();
    fiber::HopperThread& thread = fiber::hopper_thread();
    std::vector<fiber::Box> left;
    for (fiber::Box& store : thread.stores) {
        if (store.group < thread.store_group) fiber::write_box(store), thread.stored = true;
        else left.push_back(store);
    }
    thread.stores.swap(left);
}
inline void tma_prefetch(const CUtensorMap*) {}

inline void proxy_fence() {
    tma_store_fence();
    fiber::hopper_thread().acquired = fiber::hopper_thread().stored = false;
}
inline void counter_add(int* counter) {
    if (fiber::hopper_thread().stored) fiber::die("counter_add for what TMA has stored, without proxy_fence");
    ++*counter;
}
inline void counter_wait(const int* counter, int value) {
    fiber::wait_until(
        [&] { return *counter >= value; },
        [&] { return "counter_wait for " + std::to_string(value) + ", the counter is " + std::to_string(*counter); });
    fiber::hopper_thread().acquired = true;
}

inline void wgmma_begin() { fiber::hopper_thread().may_multiply = true; }
inline void wgmma_commit() { fiber::hopper_thread().multiply_group++; }
template <int n>
void wgmma_wait() {
    fiber::wait_multiplies(n);
}
template <int n>
void wgmma_keep(float (&)[n]) {}

template <class T, int N, bool a_mn_major, bool b_mn_major>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool add) {
    const bool half = std::is_same<T, __half>::value;
    fiber::issue({N, half, a_mn_major, b_mn_major, add, false, a, b, 0, {}}, d, nullptr);
}
template <class T, int N, bool b_mn_major>
void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, bool add) {
    const bool half = std::is_same<T, __half>::value;
    fiber::issue({N, half, false, b_mn_major, add, true, 0, b, 0, {}}, d, a);
}

inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) { fiber::stmatrix<false>(row, r); }
inline void stmatrix_x4_trans(void* row, const uint32_t (&r)[4]) { fiber::stmatrix<true>(row, r); }

template <int n>
void give_registers() {
    fiber::set_registers(n, false);
}
template <int n>
void take_registers() {
    fiber::set_registers(n, true);
}

inline void barrier_sync(int id, int threads) {
    fiber::HopperBlock::NamedBarrier& barrier = fiber::hopper_block().barriers[id & 15];
    const unsigned phase = barrier.phase;
    fiber::arrive_named(id, threads);
    fiber::wait_until([&] { return barrier.phase != phase; },
                      [&] {
                          return "barrier_sync " + std::to_string(id) + ": " + std::to_string(barrier.arrived) +
                                 " of " + std::to_string(barrier.threads) + " threads";
                      });
}
