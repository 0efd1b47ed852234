// comm.h: the collectives, how the ranks of a run exchange data: CpuComm, MPI on host memory; CudaComm, NCCL on a
// stream of its own. The two have the same functions, and are part of the backends that the program is a template
// over. A single process touches neither MPI nor NCCL. USE_MPI and USE_NCCL come from the Makefile.
//
// A collective starts when what was enqueued before it is done, and runs beside what is enqueued after it. It returns a
// Ticket; whoever uses its data next hands the ticket to wait().
#pragma once
#include <algorithm>
#include <cstring>
#include <exception>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "ranks.h"
#ifdef __CUDACC__
#include "kernels/cuda_common.cuh"
#ifdef USE_NCCL
#include <nccl.h>
#endif
#endif

// A collective under way. It is handed to wait() once: one that is dropped is data used too early, or never.
class [[nodiscard]] Ticket {
    void* event_;                 // of CudaComm: when it is done
    std::function<void()> late_;  // of CpuComm::at_wait: what is left to do
    bool held_ = true;

  public:
    explicit Ticket(void* event = nullptr, std::function<void()> late = nullptr)
        : event_(event), late_(std::move(late)) {}
    Ticket(Ticket&& other)
        : event_(other.event_), late_(std::move(other.late_)), held_(std::exchange(other.held_, false)) {}
    Ticket& operator=(Ticket&& other) {
        std::swap(event_, other.event_), std::swap(late_, other.late_), std::swap(held_, other.held_);
        return *this;
    }
    ~Ticket() {
        if (held_ && std::uncaught_exceptions() == 0)
            fail_ranks("internal: a collective was started and nothing waits for it", 1);
    }
    void* take() {
        held_ = false;
        if (late_) late_();
        return event_;
    }
};

// For tests, set in the environment: every collective comes up to so many microseconds late, each rank's by another
// time. What looks at its data before it has waited then finds those of before; what a rank does that dies meanwhile is
// seen as well.
constexpr const char* kDelayVariable = "TRAIN_GPT_TEST_DELAY_US";

inline double collective_delay() {  // seconds
    static const long most = getenv(kDelayVariable) ? atol(getenv(kDelayVariable)) : 0;
    static uint64_t calls = 0;
    if (most <= 0) return 0;
    const uint64_t hash = (++calls * 64 + uint64_t(world.rank)) * 0x9e3779b97f4a7c15u;
    return 1e-6 * double((hash >> 32) % uint64_t(most));
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on host memory. Sums are taken in rank order, ((x0 + x1) + x2) + ..., whichever rank takes them: so they
// do not depend on who owns what, and all_reduce gives the bits of reduce_scatter followed by all_gather.

struct CpuComm {
    static void start() {}
    static void stop() {}
    struct EnqueueDeadline {
        EnqueueDeadline() {}  // nothing is enqueued: every wait for a peer polls
    };
    // Done when the call returns; or, to show what uses data before it has waited, only when its ticket is waited for,
    // and until then the data are NaN.
    static inline bool at_wait = false;

    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static Ticket reduce_scatter(float* chunks, size_t chunk) {
        return start(chunks, chunk * world.size * sizeof(float),
                     [=] { reduce_shares(chunks, chunk * world.size, chunk); });
    }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static Ticket all_gather(float* chunks, size_t chunk) {
        return start(chunks, chunk * world.size * sizeof(float),
                     [=] { gather_shares(chunks, chunk * world.size, chunk); });
    }
    static Ticket all_reduce(float* x, size_t n) {
        return start(x, n * sizeof *x, [=] { reduce_then_gather(x, n); });
    }
    static Ticket all_reduce(double* x, size_t n) {
        return start(x, n * sizeof *x, [=] { reduce_then_gather(x, n); });
    }
    static Ticket broadcast(void* x, size_t bytes, int root) {
        return start(x, bytes, [=] { broadcast_bytes(x, bytes, root); });
    }
    static void wait(Ticket ticket) { ticket.take(); }

  private:
    template <class Work>
    static Ticket start(void* x, size_t bytes, Work work) {
        static const bool delayed = getenv(kDelayVariable) != nullptr;
        if (!at_wait && !delayed) return work(), Ticket();
        const std::string data(static_cast<const char*>(x), bytes);
        memset(x, 0xff, bytes);
        return Ticket(nullptr, [=] {
            sleep_seconds(collective_delay());
            memcpy(x, data.data(), bytes);
            work();
        });
    }

    static constexpr size_t kMessage = 1 << 20;  // elements per message: bounds the scratch to 4 or 8 MiB per rank

    // Share r of the n elements of x is [r*share, (r+1)*share), cut off at n: the last shares may be short or empty.
    template <class T>
    struct Shares {
        T* x;
        size_t n, share;
        T* begin(int r) const { return x + std::min(n, r * share); }
        size_t length(int r) const { return std::min(n, (r + 1) * share) - std::min(n, r * share); }
        // elements of share r's message that starts at offset
        size_t message(int r, size_t offset) const {
            return offset < length(r) ? std::min(kMessage, length(r) - offset) : 0;
        }
    };

    template <class T>
    static void reduce_then_gather(T* x, size_t n) {
        const size_t share = ceil_div(n, size_t(world.size));
        reduce_shares(x, n, share);
        gather_shares(x, n, share);
    }

#ifdef USE_MPI
    // Messages between pairs of ranks, all under way at once. MPI keeps the order of messages within a pair, so one tag
    // serves them all.
    struct Messages {
        std::vector<MPI_Request> requests;
        template <class T>
        void send(const T* x, size_t count, int peer) {
            if (count == 0) return;
            requests.emplace_back();
            MPI_CHECK(MPI_Isend(x, int(count * sizeof(T)), MPI_BYTE, peer, 0, MPI_COMM_WORLD, &requests.back()));
        }
        template <class T>
        void receive(T* x, size_t count, int peer) {
            if (count == 0) return;
            requests.emplace_back();
            MPI_CHECK(MPI_Irecv(x, int(count * sizeof(T)), MPI_BYTE, peer, 0, MPI_COMM_WORLD, &requests.back()));
        }
        void wait(const char* what) {
            auto done = [&] {
                int flag = 0;
                MPI_CHECK(MPI_Testall(int(requests.size()), requests.data(), &flag, MPI_STATUSES_IGNORE));
                return flag != 0;
            };
            wait_until(done, what);
            requests.clear();
        }
    };

    template <class T>
    static void reduce_shares(T* x, size_t n, size_t share) {
        if (world.size == 1) return;
        const Shares<T> shares = {x, n, share};
        const int me = world.rank;
        const size_t row = std::min(share, kMessage);
        static std::vector<T> scratch;  // (ranks, row): each rank's message of my share
        if (scratch.size() < world.size * row) scratch.resize(world.size * row);
        Messages messages;
        for (size_t offset = 0; offset < share; offset += kMessage) {
            const size_t count = shares.message(me, offset);
            T* sum = shares.begin(me) + offset;
            for (int peer = 0; peer < world.size; peer++) {
                if (peer == me) continue;
                messages.receive(&scratch[peer * row], count, peer);
                messages.send(shares.begin(peer) + offset, shares.message(peer, offset), peer);
            }
            if (count > 0) memcpy(&scratch[me * row], sum, count * sizeof(T));
            messages.wait("reduce_scatter");
            if (count > 0) memcpy(sum, &scratch[0], count * sizeof(T));
            for (int peer = 1; peer < world.size; peer++)
                for (size_t i = 0; i < count; i++) sum[i] += scratch[peer * row + i];
        }
    }

    template <class T>
    static void gather_shares(T* x, size_t n, size_t share) {
        if (world.size == 1) return;
        const Shares<T> shares = {x, n, share};
        const int me = world.rank;
        Messages messages;
        for (size_t offset = 0; offset < share; offset += kMessage) {
            for (int peer = 0; peer < world.size; peer++) {
                if (peer == me) continue;
                messages.receive(shares.begin(peer) + offset, shares.message(peer, offset), peer);
                messages.send(shares.begin(me) + offset, shares.message(me, offset), peer);
            }
            messages.wait("all_gather");
        }
    }

    static void broadcast_bytes(void* x, size_t bytes, int root) {
        if (world.size > 1) mpi_broadcast(x, bytes, root);
    }
#else
    template <class T>
    static void reduce_shares(T*, size_t, size_t) {
        need_mpi();
    }
    template <class T>
    static void gather_shares(T*, size_t, size_t) {
        need_mpi();
    }
    static void broadcast_bytes(void*, size_t, int) { need_mpi(); }
    static void need_mpi() {
        if (world.size > 1) fail("several ranks on the CPU need MPI: install it and run make again");
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on device memory, on a stream of their own, all of them in the order of the calls (which is the same on
// every rank). It has the higher priority: what it does is little, and others wait for it.

#ifdef __CUDACC__
#ifdef USE_NCCL
static __global__ void spin_kernel(unsigned long long ns) {  // of collective_delay
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
    } while (now - begin < ns);
}

struct CudaComm {
    static inline ncclComm_t comm = nullptr;  // null for a single process
    static inline cudaStream_t stream = nullptr;

    // After cudaSetDevice(world.local_rank).
    static void start() {
        if (world.size == 1) return;
        ncclUniqueId id = {};
        if (world.rank == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        broadcast_host(&id, sizeof id);
        int least = 0, greatest = 0;
        CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
        CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
        Deadline deadline("all ranks to start (ncclCommInitRank)", startup_timeout());
        check(ncclCommInitRank(&comm, world.size, id, world.rank), "ncclCommInitRank");
        check_peers = [] {
            ncclResult_t state = ncclSuccess;
            check(ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError");
            check(state, "a collective under way");
        };
    }

    static void stop() {
        if (!comm) return;
        check_peers = nullptr;
        Deadline deadline("all ranks to finish (ncclCommDestroy)", startup_timeout());
        check(ncclCommFinalize(comm), "ncclCommFinalize");  // waits for the last step's weights, which nobody needs
        check(ncclCommDestroy(comm), "ncclCommDestroy");
        comm = nullptr;
        CUDA_CHECK(cudaStreamDestroy(stream));
    }

    // Behind a collective that hangs, the queue of the device fills up (with about a thousand launches), and the next
    // launch blocks. While an EnqueueDeadline lives, that has a deadline too.
    struct EnqueueDeadline {
        std::optional<Deadline> limit;
        EnqueueDeadline() {
            if (comm) limit.emplace("the device to take more work");
        }
    };

    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static Ticket reduce_scatter(float* chunks, size_t chunk) {
        return start("reduce_scatter", [&] {
            return ncclReduceScatter(chunks, chunks + world.rank * chunk, chunk, ncclFloat, ncclSum, comm, stream);
        });
    }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static Ticket all_gather(real* chunks, size_t chunk) {
        return start("all_gather", [&] {
            return ncclAllGather(chunks + world.rank * chunk, chunks, chunk * sizeof(real), ncclUint8, comm, stream);
        });
    }
    static Ticket all_reduce(float* x, size_t n) {
        return start("all_reduce", [&] { return ncclAllReduce(x, x, n, ncclFloat, ncclSum, comm, stream); });
    }
    static Ticket all_reduce(double* x, size_t n) {
        return start("all_reduce", [&] { return ncclAllReduce(x, x, n, ncclDouble, ncclSum, comm, stream); });
    }
    static Ticket broadcast(void* x, size_t bytes, int root) {
        return start("broadcast", [&] { return ncclBroadcast(x, x, bytes, ncclUint8, root, comm, stream); });
    }
    // A point on the collectives' stream, after what has been enqueued so far on either.
    static void record(cudaEvent_t event) {
        CUDA_CHECK(cudaEventRecord(event, cuda_stream));
        if (!comm) return;
        CUDA_CHECK(cudaStreamWaitEvent(stream, event));
        CUDA_CHECK(cudaEventRecord(event, stream));
    }
    // What is enqueued on cuda_stream from here on comes after the collective.
    static void wait(Ticket ticket) {
        cudaEvent_t done = static_cast<cudaEvent_t>(ticket.take());
        if (!done) return;
        CUDA_CHECK(cudaStreamWaitEvent(cuda_stream, done));
        idle_events.push_back(done);
    }

  private:
    static inline std::vector<cudaEvent_t> idle_events;

    static cudaEvent_t new_event() {
        cudaEvent_t event;
        if (idle_events.empty()) {
            CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
        } else {
            event = idle_events.back();
            idle_events.pop_back();
        }
        return event;
    }

    template <class Collective>
    static Ticket start(const char* what, Collective collective) {
        if (!comm) return Ticket();
        cudaEvent_t event = new_event();
        CUDA_CHECK(cudaEventRecord(event, cuda_stream));  // what has been enqueued so far: the data
        CUDA_CHECK(cudaStreamWaitEvent(stream, event));
        if (const double seconds = collective_delay()) {
            spin_kernel<<<1, 1, 0, stream>>>((unsigned long long)(seconds * 1e9));
            CUDA_CHECK(cudaGetLastError());
        }
        {
            Deadline deadline(what);  // queueing can block too: the first collective connects the ranks
            check(collective(), what);
        }
        CUDA_CHECK(cudaEventRecord(event, stream));
        return Ticket(event);
    }

    // Ends the run on the spot: unwinding would free device memory, which waits for a collective that never finishes.
    static void check(ncclResult_t status, const char* what) {
        if (status == ncclSuccess || status == ncclInProgress) return;
        const char* detail = ncclGetLastError(comm);  // "" if it has none
        fail_ranks(strprintf("%s: %s%s%s; %s", what, ncclGetErrorString(status), *detail ? ": " : "", detail,
                             comm ? "if another rank has ended, resume from the last checkpoint; else NCCL_DEBUG=INFO "
                                    "says more"
                                  : "NCCL has not started: NCCL_DEBUG=INFO says more, and one GPU does without it")
                       .c_str(),
                   1);
    }
};
#else
struct CudaComm {
    static void start() {
        if (world.size > 1) fail("several GPUs need NCCL: install it (apt install libnccl-dev) and run make again");
    }
    static void stop() {}
    struct EnqueueDeadline {
        EnqueueDeadline() {}
    };
    static Ticket reduce_scatter(float*, size_t) { return Ticket(); }
    static Ticket all_gather(real*, size_t) { return Ticket(); }
    static Ticket all_reduce(float*, size_t) { return Ticket(); }
    static Ticket all_reduce(double*, size_t) { return Ticket(); }
    static Ticket broadcast(void*, size_t, int) { return Ticket(); }
    static void record(cudaEvent_t event) { CUDA_CHECK(cudaEventRecord(event, cuda_stream)); }
    static void wait(Ticket ticket) { ticket.take(); }
};
#endif
#endif
