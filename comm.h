// comm.h: the collectives, how the ranks of a run exchange data: CpuComm, MPI on host memory; CudaComm, NCCL on
// cuda_stream. The two have the same functions, and are part of the backends that the program is a template over. A
// single process touches neither MPI nor NCCL. USE_MPI and USE_NCCL come from the Makefile.
#pragma once
#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

#include "ranks.h"
#ifdef __CUDACC__
#include "kernels/cuda_common.cuh"
#ifdef USE_NCCL
#include <nccl.h>
#endif
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on host memory. Sums are taken in rank order, ((x0 + x1) + x2) + ..., whichever rank takes them: so they
// do not depend on who owns what, and all_reduce gives the bits of reduce_scatter followed by all_gather.

struct CpuComm {
    static void start() {}
    static void stop() {}
    struct CollectiveGroup {
        CollectiveGroup() {}  // nothing to gain by waiting
    };
    struct EnqueueDeadline {
        EnqueueDeadline() {}  // nothing is enqueued: every wait for a peer polls
    };
    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static void reduce_scatter(float* chunks, size_t chunk) { reduce_parts(chunks, chunk * world.size, chunk); }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static void all_gather(float* chunks, size_t chunk) { gather_parts(chunks, chunk * world.size, chunk); }
    static void all_reduce(float* x, size_t n) { reduce_then_gather(x, n); }
    static void all_reduce(double* x, size_t n) { reduce_then_gather(x, n); }
    static void broadcast(void* x, size_t bytes, int root) { broadcast_bytes(x, bytes, root); }

  private:
    static constexpr size_t kPiece = 1 << 20;  // elements per message: bounds the scratch to 4 or 8 MiB per rank

    // Part r of the n elements of x is [r*part, (r+1)*part), cut off at n: the last parts may be short or empty.
    template <class T>
    struct Parts {
        T* x;
        size_t n, part;
        T* begin(int r) const { return x + std::min(n, r * part); }
        size_t length(int r) const { return std::min(n, (r + 1) * part) - std::min(n, r * part); }
        // elements of the piece of part r that starts at offset
        size_t piece(int r, size_t offset) const {
            return offset < length(r) ? std::min(kPiece, length(r) - offset) : 0;
        }
    };

    template <class T>
    static void reduce_then_gather(T* x, size_t n) {
        const size_t part = ceil_div(n, size_t(world.size));
        reduce_parts(x, n, part);
        gather_parts(x, n, part);
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
    static void reduce_parts(T* x, size_t n, size_t part) {
        if (world.size == 1) return;
        const Parts<T> parts = {x, n, part};
        const int me = world.rank;
        const size_t row = std::min(part, kPiece);
        static std::vector<T> scratch;  // (ranks, row): each rank's piece of my part
        if (scratch.size() < world.size * row) scratch.resize(world.size * row);
        Messages messages;
        for (size_t offset = 0; offset < part; offset += kPiece) {
            const size_t count = parts.piece(me, offset);
            T* sum = parts.begin(me) + offset;
            for (int peer = 0; peer < world.size; peer++) {
                if (peer == me) continue;
                messages.receive(&scratch[peer * row], count, peer);
                messages.send(parts.begin(peer) + offset, parts.piece(peer, offset), peer);
            }
            if (count > 0) memcpy(&scratch[me * row], sum, count * sizeof(T));
            messages.wait("reduce_scatter");
            if (count > 0) memcpy(sum, &scratch[0], count * sizeof(T));
            for (int peer = 1; peer < world.size; peer++)
                for (size_t i = 0; i < count; i++) sum[i] += scratch[peer * row + i];
        }
    }

    template <class T>
    static void gather_parts(T* x, size_t n, size_t part) {
        if (world.size == 1) return;
        const Parts<T> parts = {x, n, part};
        const int me = world.rank;
        Messages messages;
        for (size_t offset = 0; offset < part; offset += kPiece) {
            for (int peer = 0; peer < world.size; peer++) {
                if (peer == me) continue;
                messages.receive(parts.begin(peer) + offset, parts.piece(peer, offset), peer);
                messages.send(parts.begin(me) + offset, parts.piece(me, offset), peer);
            }
            messages.wait("all_gather");
        }
    }

    static void broadcast_bytes(void* x, size_t bytes, int root) {
        if (world.size > 1) mpi_broadcast(x, bytes, root);
    }
#else
    template <class T>
    static void reduce_parts(T*, size_t, size_t) {
        need_mpi();
    }
    template <class T>
    static void gather_parts(T*, size_t, size_t) {
        need_mpi();
    }
    static void broadcast_bytes(void*, size_t, int) { need_mpi(); }
    static void need_mpi() {
        if (world.size > 1) fail("several ranks on the CPU need MPI: install it and run make again");
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on device memory, in the order of cuda_stream: nothing else orders them against the kernels.

#ifdef __CUDACC__
#ifdef USE_NCCL
struct CudaComm {
    static inline ncclComm_t comm = nullptr;  // null for a single process

    // After cudaSetDevice(world.local_rank).
    static void start() {
        if (world.size == 1) return;
        ncclUniqueId id = {};
        if (world.rank == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        broadcast_host(&id, sizeof id);
        Deadline deadline("all ranks to start (ncclCommInitRank)", startup_timeout());
        check(ncclCommInitRank(&comm, world.size, id, world.rank), "ncclCommInitRank");
        check_peers = [] {
            ncclResult_t state = ncclSuccess;
            check(ncclCommGetAsyncError(comm, &state), "ncclCommGetAsyncError");
            check(state, "a collective under way");
        };
    }

    // After the last collective has finished (synchronize).
    static void stop() {
        if (!comm) return;
        check_peers = nullptr;
        Deadline deadline("all ranks to finish (ncclCommDestroy)", startup_timeout());
        check(ncclCommFinalize(comm), "ncclCommFinalize");
        check(ncclCommDestroy(comm), "ncclCommDestroy");
        comm = nullptr;
    }

    // Behind a collective that hangs, the queue of the device fills up (with about a thousand launches), and the next
    // launch blocks. While an EnqueueDeadline lives, that has a deadline too.
    struct EnqueueDeadline {
        std::optional<Deadline> limit;
        EnqueueDeadline() {
            if (comm) limit.emplace("the device to take more work");
        }
    };

    // The collectives called while a CollectiveGroup lives start together when it ends, as one launch.
    struct CollectiveGroup {
        CollectiveGroup() {
            if (comm) check(ncclGroupStart(), "ncclGroupStart");
        }
        ~CollectiveGroup() {
            if (!comm) return;
            Deadline deadline("a group of collectives");
            check(ncclGroupEnd(), "ncclGroupEnd");
        }
    };

    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static void reduce_scatter(float* chunks, size_t chunk) {
        if (!comm) return;
        Deadline deadline("reduce_scatter");  // queueing can block too: the first collective connects the ranks
        check(ncclReduceScatter(chunks, chunks + world.rank * chunk, chunk, ncclFloat, ncclSum, comm, cuda_stream),
              "ncclReduceScatter");
    }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static void all_gather(real* chunks, size_t chunk) {
        if (!comm) return;
        Deadline deadline("all_gather");
        check(ncclAllGather(chunks + world.rank * chunk, chunks, chunk * sizeof(real), ncclUint8, comm, cuda_stream),
              "ncclAllGather");
    }
    static void all_reduce(float* x, size_t n) { sum(x, n, ncclFloat); }
    static void all_reduce(double* x, size_t n) { sum(x, n, ncclDouble); }
    static void broadcast(void* x, size_t bytes, int root) {
        if (!comm) return;
        Deadline deadline("broadcast");
        check(ncclBroadcast(x, x, bytes, ncclUint8, root, comm, cuda_stream), "ncclBroadcast");
    }

  private:
    static void sum(void* x, size_t n, ncclDataType_t type) {
        if (!comm) return;
        Deadline deadline("all_reduce");
        check(ncclAllReduce(x, x, n, type, ncclSum, comm, cuda_stream), "ncclAllReduce");
    }
    // Ends the run on the spot: unwinding would free device memory, which waits for a collective that never finishes.
    static void check(ncclResult_t status, const char* what) {
        if (status == ncclSuccess || status == ncclInProgress) return;
        fail_ranks(strprintf("%s: %s (%s). If another rank has ended, resume from the last checkpoint; "
                             "else NCCL_DEBUG=INFO says more",
                             what, ncclGetErrorString(status), ncclGetLastError(comm))
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
    struct CollectiveGroup {
        CollectiveGroup() {}
    };
    struct EnqueueDeadline {
        EnqueueDeadline() {}
    };
    static void reduce_scatter(float*, size_t) {}
    static void all_gather(real*, size_t) {}
    static void all_reduce(float*, size_t) {}
    static void all_reduce(double*, size_t) {}
    static void broadcast(void*, size_t, int) {}
};
#endif
#endif
