// comm.h: ranks. How the processes of one run find each other, how they exchange data, and how the run ends when one of
// them dies or hangs. Read in this order:
//   Ranks, launched_ranks         who am I, of how many; read from the environment that the launcher left
//   abort_ranks .. wait_until     ending a run with one clear line; deadlines
//   start_by_mpi, start_children  the two ways to be many: mpirun or srun, and --gpus N (this program starts itself)
//   broadcast_host, ..            what rank 0 knows or does alone, before and between the collectives
//   CpuComm, CudaComm             the collectives of the two backends: MPI on host memory, NCCL on cuda_stream
// A single process touches neither MPI nor NCCL. USE_MPI and USE_NCCL come from the Makefile.
#pragma once
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <future>
#include <optional>
#include <vector>

#include "common.h"
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1  // the C interface is all we use; the old C++ one warns and needs a library of its own
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif
#ifdef __CUDACC__
#include "cuda_common.cuh"
#ifdef USE_NCCL
#include <nccl.h>
#endif
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Who am I

enum class Launcher { none, mpi, self };  // one process; mpirun or srun; our own parent process (--gpus N)

struct Ranks {
    int rank = 0, size = 1;              // over the whole run
    int local_rank = 0, local_size = 1;  // on this machine: rank local_rank uses GPU local_rank
    Launcher launcher = Launcher::none;
    double timeout = 300;  // seconds that a rank waits for its peers (--rank_timeout)
};

// The child of our own parent process finds "rank/size/file descriptor of the shared page" in this variable.
constexpr const char* kSelfVariable = "TRAIN_GPT_SELF";

// What the environment says. Each launcher sets a pair (number of ranks, rank); the first pair that is there decides,
// so that mpirun -n 1 inside a Slurm job is one process. SLURM_NTASKS would be the wrong variable: a batch script and
// an interactive shell see it too, with the size of the job; SLURM_STEP_NUM_TASKS counts the tasks that srun started.
inline Ranks launched_ranks() {
    Ranks found;
    if (const char* self = getenv(kSelfVariable)) {
        if (sscanf(self, "%d/%d/", &found.rank, &found.size) == 2) found.launcher = Launcher::self;
        found.local_rank = found.rank;
        found.local_size = found.size;
        return found;
    }
    const struct {
        const char *size, *rank;
    } launchers[] = {
        {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},  // Open MPI's mpirun
        {"PMI_SIZE", "PMI_RANK"},                          // mpirun of MPICH and Intel MPI, srun --mpi=pmi2
        {"SLURM_STEP_NUM_TASKS", "SLURM_PROCID"},          // srun
    };
    for (auto& names : launchers) {
        const char *size = getenv(names.size), *rank = getenv(names.rank);
        if (!size || !rank) continue;
        if (atoi(size) > 1) {
            found.rank = atoi(rank);
            found.size = atoi(size);
            found.launcher = Launcher::mpi;
        }
        break;
    }
    return found;
}

inline Ranks ranks = launched_ranks();  // known before main(), so that even an error in the flags knows its rank

// Memory that the parent process shares with the ranks it started.
struct SharedPage {
    std::atomic<int> arrived, round;  // a barrier: how many have come to this round of it
    std::atomic<bool> explained;      // a rank has printed why it ends: the parent need not guess
    char data[4000];                  // broadcast_host passes its bytes through here
};
inline SharedPage* shared_page = nullptr;

// ---------------------------------------------------------------------------------------------------------------------
// How a run ends early

inline void sleep_seconds(double seconds) {
    timespec time = {time_t(seconds), long((seconds - double(time_t(seconds))) * 1e9)};
    nanosleep(&time, nullptr);
}

// Ends this process, and through its launcher all the others. No destructors and no atexit: they might wait for a
// collective that will never finish.
[[noreturn]] inline void abort_ranks(int code) {
    fflush(nullptr);
#ifdef USE_MPI
    int started = 0, finished = 0;
    MPI_Initialized(&started);
    MPI_Finalized(&finished);
    if (started && !finished) {
        signal(SIGALRM, SIG_DFL);  // should MPI_Abort itself hang, the alarm ends this process
        alarm(5);
        MPI_Abort(MPI_COMM_WORLD, code);
    }
#endif
    _exit(code);
}

// A fault that all ranks meet (a missing file, a lost peer) is said once: each rank lets the lower ones speak first,
// and the first to speak ends the run. Open MPI's mpirun takes a second over that.
inline int turn_to_speak() { return std::min(2 * ranks.rank, 10); }  // seconds

// Prints the reason as one line and ends the run.
[[noreturn]] inline void fail_ranks(const char* message, int code) {
    alarm(0);  // of a BlockingCall: the reason is known
    sleep_seconds(turn_to_speak());
    if (ranks.size > 1) fprintf(stderr, "train_gpt: rank %d: %s\n", ranks.rank, message);
    else fprintf(stderr, "train_gpt: %s\n", message);
    if (shared_page) shared_page->explained = true;
    abort_ranks(code);
}

inline double seconds_now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}
// A process that comes so late to its own clock had been stopped itself (SIGSTOP, ctrl-Z). That says nothing about the
// others: its time starts anew.
constexpr double stopped_for = 0.5;  // seconds

inline std::string deadline_message(double seconds, const char* what) {
    return strprintf(
        "waited %.0f s for %s: another rank has stopped or hangs; ending the run "
        "(--rank_timeout sets this limit)",
        seconds, what);
}

// For calls that block and cannot be polled: if they have not returned in time, an alarm prints the line and ends the
// process. They nest: the time of the outer one starts anew when an inner one, or a wait_until, is over.
class BlockingCall {
    static inline BlockingCall* innermost = nullptr;
    static inline double due;
    BlockingCall* const outer;
    const unsigned granted;  // seconds, a few more than a wait_until of the same limit has
    char line[256];
    void start_clock() const {
        due = seconds_now() + granted;
        alarm(granted);
    }
    static void expired(int) {
        if (seconds_now() > due + stopped_for) return innermost->start_clock();
        ssize_t written = write(STDERR_FILENO, innermost->line, strlen(innermost->line));
        (void)written;  // nothing is left to be done about a closed stderr
        if (shared_page) shared_page->explained = true;
        _exit(1);
    }

  public:
    BlockingCall(const char* what, double seconds = ranks.timeout)
        : outer(innermost), granted(unsigned(seconds) + 3 + turn_to_speak()) {
        snprintf(line, sizeof line, "train_gpt: rank %d: %s\n", ranks.rank, deadline_message(seconds, what).c_str());
        innermost = this;
        signal(SIGALRM, expired);
        start_clock();
    }
    ~BlockingCall() {
        alarm(0);
        innermost = outer;
        got_on();
    }
    BlockingCall(const BlockingCall&) = delete;
    static void got_on() {
        if (innermost) innermost->start_clock();
    }
};
inline double startup_timeout() { return std::max(ranks.timeout, 60.0); }  // starting is slower than a step

inline void (*check_peers)() = nullptr;  // fails if a peer is known to be lost; set by CudaComm::start

// Polls done() until it is true. No rank ever blocks in a wait for its peers: past the deadline the run ends here.
template <class Done>
void wait_until(Done done, const char* what) {
    double begin = seconds_now(), last = begin;
    while (!done()) {
        const double now = seconds_now();
        if (now > last + stopped_for) begin = now;
        last = now;
        const double seconds = now - begin;
        if (ranks.size > 1 && seconds > ranks.timeout) fail_ranks(deadline_message(seconds, what).c_str(), 1);
        if (seconds < 200e-6) {
            sched_yield();  // where ranks share a core, the one that we wait for may need it
        } else {
            if (check_peers) check_peers();
            sleep_seconds(20e-6);
        }
    }
    BlockingCall::got_on();
}

// ---------------------------------------------------------------------------------------------------------------------
// MPI: mpirun, srun

#ifdef USE_MPI
#define MPI_CHECK(call) mpi_check(call, #call)
inline void mpi_check(int status, const char* call) {
    if (status == MPI_SUCCESS) return;
    char text[MPI_MAX_ERROR_STRING] = "";
    int length = 0;
    MPI_Error_string(status, text, &length);
    fail_ranks(strprintf("%s: %s. Another rank or the network has failed; resume from the last checkpoint", call, text)
                   .c_str(),
               1);
}

// x of every rank becomes that of root.
inline void mpi_broadcast(void* x, size_t bytes, int root) {
    for (size_t at = 0; at < bytes;) {
        const size_t piece = std::min(bytes - at, size_t(1) << 30);  // MPI counts in int
        MPI_Request request;
        MPI_CHECK(MPI_Ibcast(static_cast<char*>(x) + at, int(piece), MPI_BYTE, root, MPI_COMM_WORLD, &request));
        auto done = [&] {
            int flag = 0;
            MPI_CHECK(MPI_Test(&request, &flag, MPI_STATUS_IGNORE));
            return flag != 0;
        };
        wait_until(done, "broadcast");
        at += piece;
    }
}
#endif

inline void start_by_mpi() {
#ifdef USE_MPI
    {
        BlockingCall limit("all ranks to start (MPI_Init)", startup_timeout());
        int provided = 0, size = 0;
        MPI_CHECK(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided));
        MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
        MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &size));
        if (size != ranks.size)
            fail(
                "the launcher started %d ranks but MPI sees %d: this MPI does not understand the launcher. "
                "Use the mpirun of the MPI this program was built with, or srun --mpi=pmix",
                ranks.size, size);
        MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &ranks.rank));
        MPI_Comm machine;
        MPI_CHECK(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine));
        MPI_CHECK(MPI_Comm_rank(machine, &ranks.local_rank));
        MPI_CHECK(MPI_Comm_size(machine, &ranks.local_size));
        MPI_CHECK(MPI_Comm_free(&machine));
    }
#else
    fail(
        "started as one of %d ranks, but this build has no MPI: install it (apt install libopenmpi-dev) and run make "
        "again, or use --gpus %d on one machine",
        ranks.size, ranks.size);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// --gpus N: this process becomes the parent and starts N copies of itself

// Waits for the children; when one fails, or the user stops the run, ends the others. Does not return.
[[noreturn]] inline void watch_children(std::vector<pid_t> children, const sigset_t& signals) {
    using clock = std::chrono::steady_clock;
    const std::chrono::seconds kGrace(10);  // from asking (SIGTERM) to ending (SIGKILL works on a stopped one too)
    clock::time_point kill_time = clock::time_point::max();
    int exit_code = 0;
    size_t alive = children.size();
    auto end_all = [&](int signal_number) {
        for (pid_t child : children) {
            if (child == 0) continue;
            kill(child, signal_number);
            kill(child, SIGCONT);  // a stopped process hears nothing but SIGKILL before it is continued
        }
        kill_time = clock::now() + kGrace;
    };
    while (alive > 0) {
        timespec second = {1, 0};
        const int signal_number = sigtimedwait(&signals, nullptr, &second);
        if (signal_number > 0 && signal_number != SIGCHLD) {
            if (!exit_code) exit_code = 128 + signal_number;
            end_all(signal_number);
        }
        int status = 0;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
            const size_t rank = std::find(children.begin(), children.end(), pid) - children.begin();
            if (rank == children.size()) continue;
            children[rank] = 0;
            alive--;
            if (status == 0 || exit_code) continue;
            exit_code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
            if (!shared_page->explained) {
                if (WIFSIGNALED(status))
                    fprintf(stderr, "train_gpt: rank %zu was killed by signal %d (%s); ending the other ranks\n", rank,
                            WTERMSIG(status), strsignal(WTERMSIG(status)));
                else
                    fprintf(stderr, "train_gpt: rank %zu ended with exit code %d; ending the other ranks\n", rank,
                            exit_code);
            }
            end_all(SIGTERM);
        }
        if (alive > 0 && clock::now() > kill_time) end_all(SIGKILL);
    }
    exit(exit_code);
}

[[noreturn]] inline void start_children(char** argv, int count) {
    const int fd = memfd_create("train_gpt", 0);  // without CLOEXEC: the children inherit it
    if (fd < 0 || ftruncate(fd, sizeof(SharedPage)) != 0)
        fail("cannot make the shared page of the ranks: %s", strerror(errno));
    void* page = mmap(nullptr, sizeof(SharedPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) fail("cannot map the shared page of the ranks: %s", strerror(errno));
    shared_page = static_cast<SharedPage*>(page);  // zeros are its starting state

    // The parent takes these signals one by one in watch_children; the children get the mask we started with.
    sigset_t signals, before;
    sigemptyset(&signals);
    for (int number : {SIGCHLD, SIGINT, SIGTERM, SIGHUP}) sigaddset(&signals, number);
    sigprocmask(SIG_BLOCK, &signals, &before);
    const pid_t parent = getpid();
    std::vector<pid_t> children;
    for (int rank = 0; rank < count; rank++) {
        setenv(kSelfVariable, strprintf("%d/%d/%d", rank, count, fd).c_str(), 1);
        const pid_t pid = fork();
        if (pid < 0) {
            const int error = errno;
            for (pid_t child : children) kill(child, SIGKILL);
            fail("cannot start rank %d of %d: fork: %s", rank, count, strerror(error));
        }
        if (pid == 0) {                        // only calls that are safe between fork and exec
            prctl(PR_SET_PDEATHSIG, SIGKILL);  // never outlive the parent, however it ends
            if (getppid() != parent) _exit(1);
            sigprocmask(SIG_SETMASK, &before, nullptr);
            execv("/proc/self/exe", argv);
            _exit(127);
        }
        children.push_back(pid);
    }
    watch_children(std::move(children), signals);
}

inline void start_by_self() {
    int rank, size, fd;
    if (sscanf(getenv(kSelfVariable), "%d/%d/%d", &rank, &size, &fd) != 3)
        fail("%s is set by train_gpt --gpus for its own processes: unset it", kSelfVariable);
    void* page = mmap(nullptr, sizeof(SharedPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) fail("cannot map the page shared with the parent process: %s", strerror(errno));
    close(fd);
    shared_page = static_cast<SharedPage*>(page);
}

// ---------------------------------------------------------------------------------------------------------------------
// Start, stop, and a broadcast that needs no backend

// Called first thing after the flags are read, before any CUDA call. With gpus > 1 it does not return in the parent.
inline void start_ranks(char** argv, int gpus, double rank_timeout) {
    ranks.timeout = rank_timeout;
    if (ranks.launcher == Launcher::self) return start_by_self();
    if (ranks.launcher == Launcher::mpi && gpus > 0)
        usage_fail("--gpus %d starts ranks by itself, but mpirun or srun has already started %d: drop one of the two",
                   gpus, ranks.size);
    if (ranks.launcher == Launcher::mpi) return start_by_mpi();
    if (gpus > 1) start_children(argv, gpus);
}

inline void stop_ranks() {
#ifdef USE_MPI
    if (ranks.launcher == Launcher::mpi) {
        BlockingCall limit("all ranks to finish (MPI_Finalize)", startup_timeout());
        MPI_CHECK(MPI_Finalize());
    }
#endif
}

// x of every rank becomes that of rank 0. For start-up: it blocks the host.
inline void broadcast_host(void* x, size_t bytes) {
#ifdef USE_MPI
    if (ranks.launcher == Launcher::mpi) return mpi_broadcast(x, bytes, 0);
#endif
    if (ranks.launcher != Launcher::self) return;
    auto barrier = [] {
        const int round = shared_page->round;
        if (++shared_page->arrived == ranks.size) {
            shared_page->arrived = 0;
            shared_page->round = round + 1;
        } else {
            wait_until([&] { return shared_page->round != round; }, "a broadcast from rank 0");
        }
    };
    for (size_t at = 0; at < bytes;) {
        const size_t piece = std::min(bytes - at, sizeof shared_page->data);
        char* part = static_cast<char*>(x) + at;
        if (ranks.rank == 0) memcpy(shared_page->data, part, piece);
        barrier();  // the bytes are there
        if (ranks.rank != 0) memcpy(part, shared_page->data, piece);
        barrier();  // everyone has them
        at += piece;
    }
}

// Calls work() on rank 0 alone, in a thread of its own, and returns everywhere when it is over. However long a disk
// takes, the others do not give rank 0 up: it tells them every second that it is still there.
template <class Work>
void while_others_wait(Work work) {
    if (ranks.size == 1) return work();
    std::future<void> done;
    if (ranks.rank == 0) done = std::async(std::launch::async, work);
    for (bool over = false; !over;) {
        if (ranks.rank == 0) over = done.wait_for(std::chrono::seconds(1)) == std::future_status::ready;
        broadcast_host(&over, sizeof over);
    }
    if (ranks.rank == 0) done.get();  // throws what work() threw
}

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on host memory. Sums are taken in rank order, ((x0 + x1) + x2) + ..., whichever rank takes them: so they
// do not depend on who owns what, and all_reduce gives the bits of reduce_scatter followed by all_gather.

struct CpuComm {
    static void start() {}
    static void stop() {}
    struct Group {
        Group() {}  // nothing to gain by waiting
    };
    struct Enqueueing {
        Enqueueing() {}  // nothing is enqueued: every wait for a peer polls
    };
    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static void reduce_scatter(float* chunks, size_t chunk) { reduce_parts(chunks, chunk * ranks.size, chunk); }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static void all_gather(float* chunks, size_t chunk) { gather_parts(chunks, chunk * ranks.size, chunk); }
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
        const size_t part = ceil_div(n, size_t(ranks.size));
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
        if (ranks.size == 1) return;
        const Parts<T> parts = {x, n, part};
        const int me = ranks.rank;
        const size_t row = std::min(part, kPiece);
        static std::vector<T> scratch;  // (ranks, row): each rank's piece of my part
        if (scratch.size() < ranks.size * row) scratch.resize(ranks.size * row);
        Messages messages;
        for (size_t offset = 0; offset < part; offset += kPiece) {
            const size_t count = parts.piece(me, offset);
            T* sum = parts.begin(me) + offset;
            for (int peer = 0; peer < ranks.size; peer++) {
                if (peer == me) continue;
                messages.receive(&scratch[peer * row], count, peer);
                messages.send(parts.begin(peer) + offset, parts.piece(peer, offset), peer);
            }
            if (count > 0) memcpy(&scratch[me * row], sum, count * sizeof(T));
            messages.wait("reduce_scatter");
            if (count > 0) memcpy(sum, &scratch[0], count * sizeof(T));
            for (int peer = 1; peer < ranks.size; peer++)
                for (size_t i = 0; i < count; i++) sum[i] += scratch[peer * row + i];
        }
    }

    template <class T>
    static void gather_parts(T* x, size_t n, size_t part) {
        if (ranks.size == 1) return;
        const Parts<T> parts = {x, n, part};
        const int me = ranks.rank;
        Messages messages;
        for (size_t offset = 0; offset < part; offset += kPiece) {
            for (int peer = 0; peer < ranks.size; peer++) {
                if (peer == me) continue;
                messages.receive(parts.begin(peer) + offset, parts.piece(peer, offset), peer);
                messages.send(parts.begin(me) + offset, parts.piece(me, offset), peer);
            }
            messages.wait("all_gather");
        }
    }

    static void broadcast_bytes(void* x, size_t bytes, int root) {
        if (ranks.size > 1) mpi_broadcast(x, bytes, root);
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
        if (ranks.size > 1) fail("several ranks on the CPU need MPI: install it and run make again");
    }
#endif
};

// ---------------------------------------------------------------------------------------------------------------------
// Collectives on device memory, in the order of cuda_stream: nothing else orders them against the kernels.

#ifdef __CUDACC__
#ifdef USE_NCCL
struct CudaComm {
    static inline ncclComm_t comm = nullptr;  // null for a single process

    // After cudaSetDevice(ranks.local_rank).
    static void start() {
        if (ranks.size == 1) return;
        ncclUniqueId id = {};
        if (ranks.rank == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
        broadcast_host(&id, sizeof id);
        BlockingCall limit("all ranks to start (ncclCommInitRank)", startup_timeout());
        check(ncclCommInitRank(&comm, ranks.size, id, ranks.rank), "ncclCommInitRank");
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
        BlockingCall limit("all ranks to finish (ncclCommDestroy)", startup_timeout());
        check(ncclCommFinalize(comm), "ncclCommFinalize");
        check(ncclCommDestroy(comm), "ncclCommDestroy");
        comm = nullptr;
    }

    // Behind a collective that hangs, the queue of the device fills up (with about a thousand launches), and the next
    // launch blocks. While an Enqueueing lives, that has a deadline too.
    struct Enqueueing {
        std::optional<BlockingCall> limit;
        Enqueueing() {
            if (comm) limit.emplace("the device to take more work");
        }
    };

    // The collectives called while a Group lives start together when it ends, as one launch.
    struct Group {
        Group() {
            if (comm) check(ncclGroupStart(), "ncclGroupStart");
        }
        ~Group() {
            if (!comm) return;
            BlockingCall limit("a group of collectives");
            check(ncclGroupEnd(), "ncclGroupEnd");
        }
    };

    // chunks is (ranks, chunk): row r of rank r becomes the sum of row r over the ranks.
    static void reduce_scatter(float* chunks, size_t chunk) {
        if (!comm) return;
        BlockingCall limit("reduce_scatter");  // queueing can block too: the first collective connects the ranks
        check(ncclReduceScatter(chunks, chunks + ranks.rank * chunk, chunk, ncclFloat, ncclSum, comm, cuda_stream),
              "ncclReduceScatter");
    }
    // chunks is (ranks, chunk): row r becomes that of rank r.
    static void all_gather(real* chunks, size_t chunk) {
        if (!comm) return;
        BlockingCall limit("all_gather");
        check(ncclAllGather(chunks + ranks.rank * chunk, chunks, chunk * sizeof(real), ncclUint8, comm, cuda_stream),
              "ncclAllGather");
    }
    static void all_reduce(float* x, size_t n) { sum(x, n, ncclFloat); }
    static void all_reduce(double* x, size_t n) { sum(x, n, ncclDouble); }
    static void broadcast(void* x, size_t bytes, int root) {
        if (!comm) return;
        BlockingCall limit("broadcast");
        check(ncclBroadcast(x, x, bytes, ncclUint8, root, comm, cuda_stream), "ncclBroadcast");
    }

  private:
    static void sum(void* x, size_t n, ncclDataType_t type) {
        if (!comm) return;
        BlockingCall limit("all_reduce");
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
        if (ranks.size > 1) fail("several GPUs need NCCL: install it (apt install libnccl-dev) and run make again");
    }
    static void stop() {}
    struct Group {
        Group() {}
    };
    struct Enqueueing {
        Enqueueing() {}
    };
    static void reduce_scatter(float*, size_t) {}
    static void all_gather(real*, size_t) {}
    static void all_reduce(float*, size_t) {}
    static void all_reduce(double*, size_t) {}
    static void broadcast(void*, size_t, int) {}
};
#endif
#endif
