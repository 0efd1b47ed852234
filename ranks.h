// ranks.h: the processes of one run: how they find each other, and how the run ends when one of them dies or hangs.
// Read in this order:
//   World, launched_world         who am I, of how many; read from the environment that the launcher left
//   abort_ranks .. wait_until     ending a run with one clear line; deadlines; files that cannot be read
//   stop_signal                   ending a run on request, after its step
//   start_by_mpi, start_children  the two ways to be many: mpirun or srun, and --gpus N (this program starts itself)
//   broadcast_host, gather_host   what one rank knows or does alone, before and between the collectives of comm.h
//   require_same, shared_device   what makes ranks no run: other flags or data than rank 0's, one GPU for two
// A single process does not touch MPI. USE_MPI comes from the Makefile.
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
#include <charconv>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <future>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common.h"
#ifdef USE_MPI
#define OMPI_SKIP_MPICXX 1  // the C interface is all we use; the old C++ one warns and needs a library of its own
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#endif

// ---------------------------------------------------------------------------------------------------------------------
// Who am I

enum class Launcher { none, mpi, self };  // one process; mpirun or srun; our own parent process (--gpus N)

struct World {
    int rank = 0, size = 1;              // over the whole run
    int local_rank = 0, local_size = 1;  // on this machine
    Launcher launcher = Launcher::none;
    double timeout = 300;  // seconds that a rank waits for its peers (--rank_timeout)
};

// The child of our own parent process finds "rank/size/file descriptor of the shared page" in this variable.
constexpr const char* kSelfVariable = "TRAIN_GPT_SELF";

// What the environment says. Each launcher sets a pair (number of ranks, rank); the first pair that is there decides,
// so that mpirun -n 1 inside a Slurm job is one process. SLURM_NTASKS would be the wrong variable: a batch script and
// an interactive shell see it too, with the size of the job; SLURM_STEP_NUM_TASKS counts the tasks that srun started.
inline World launched_world() {
    World found;
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

inline World world = launched_world();  // known before main(), so that even an error in the flags knows its rank

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
    int started = 0, finished = 0, size = 1;
    MPI_Initialized(&started);
    MPI_Finalized(&finished);
    if (started && !finished) MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (size > 1) {                // alone, it would only print lines of its own
        signal(SIGALRM, SIG_DFL);  // should MPI_Abort itself hang, the alarm ends this process
        alarm(5);
        MPI_Abort(MPI_COMM_WORLD, code);
    }
#endif
    _exit(code);
}

// A fault that all ranks meet (a missing file, a lost peer) is said once: each rank lets the lower ones speak first,
// and the first to speak ends the run. Open MPI's mpirun takes a second over that.
inline int turn_to_speak() { return std::min(2 * world.rank, 10); }  // seconds

// Prints the reason as one line and ends the run.
[[noreturn]] inline void fail_ranks(const char* message, int code) {
    alarm(0);                  // of a Deadline: the reason is known
    signal(SIGTERM, SIG_DFL);  // with which mpirun ends the others when one has spoken: noted, it would end nothing
    sleep_seconds(turn_to_speak());
    const std::string who = world.size > 1 ? strprintf("rank %d: ", world.rank) : "";
    fprintf(stderr, "train_gpt: %s%s\n", who.c_str(), one_line(message).c_str());
    if (shared_page) shared_page->explained = true;
    abort_ranks(code);
}

// The same from a signal handler, which may call little: neither MPI_Abort nor printf. The launcher ends the others.
[[noreturn]] inline void end_in_handler(const char* line) {
    const ssize_t written = write(STDERR_FILENO, line, strlen(line));
    (void)written;  // nothing is left to be done about a closed stderr
    if (shared_page) shared_page->explained = true;
    _exit(1);
}

// From here on a mapped file of which a page cannot be read ends the run so. It cannot throw: the handler runs in the
// middle of a memcpy.
inline void end_on_unreadable_files() {
    struct sigaction action = {};
    action.sa_flags = SA_SIGINFO;
    action.sa_sigaction = [](int number, siginfo_t* info, void*) {
        const MappedFile* file = info->si_code == BUS_ADRERR ? MappedFile::at(info->si_addr) : nullptr;
        if (!file) {  // a fault of the program, or somebody's kill: it dies of it when this returns
            signal(number, SIG_DFL);
            raise(number);
            return;
        }
        char line[5 * PATH_MAX];  // of a path, each byte may be shown as four
        char* end = stpcpy(line, "train_gpt: ");
        if (world.size > 1) {
            end = std::to_chars(stpcpy(end, "rank "), line + sizeof line, world.rank).ptr;
            end = stpcpy(end, ": ");
        }
        stpcpy(stpcpy(end, file->unreadable.c_str()), "\n");
        alarm(0);  // these three as in fail_ranks
        signal(SIGTERM, SIG_DFL);
        sleep(unsigned(turn_to_speak()));
        end_in_handler(line);
    };
    sigaction(SIGBUS, &action, nullptr);
}

inline double seconds_now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return double(time.tv_sec) + 1e-9 * double(time.tv_nsec);
}
// A process that comes so late to its own clock had been stopped itself (SIGSTOP, ctrl-Z). That says nothing about the
// others: its time starts anew.
constexpr double kStoppedFor = 0.5;  // seconds

inline std::string deadline_message(double seconds, const char* what) {
    return strprintf(
        "waited %.0f s for %s: another rank has stopped or hangs; ending the run "
        "(--rank_timeout sets this limit)",
        seconds, what);
}

// For calls that block and cannot be polled: if they have not returned in time, an alarm prints the line and ends the
// process. They nest: the time of the outer one starts anew when an inner one, or a wait_until, is over.
class Deadline {
    static inline Deadline* innermost = nullptr;
    static inline double due;
    Deadline* const outer;
    const unsigned granted;  // seconds, a few more than a wait_until of the same limit has
    char line[256];
    void start_clock() const {
        due = seconds_now() + granted;
        alarm(granted);
    }
    static void expired(int) {
        if (seconds_now() > due + kStoppedFor) return innermost->start_clock();
        end_in_handler(innermost->line);
    }

  public:
    Deadline(const char* what, double seconds = world.timeout)
        : outer(innermost), granted(unsigned(seconds) + 3 + turn_to_speak()) {
        snprintf(line, sizeof line, "train_gpt: rank %d: %s\n", world.rank, deadline_message(seconds, what).c_str());
        innermost = this;
        signal(SIGALRM, expired);
        start_clock();
    }
    ~Deadline() {
        alarm(0);
        innermost = outer;
        got_on();
    }
    Deadline(const Deadline&) = delete;
    static void got_on() {
        if (innermost) innermost->start_clock();
    }
};
inline double startup_timeout() { return std::max(world.timeout, 60.0); }  // starting is slower than a step

inline void (*check_peers)() = nullptr;  // fails if a peer is known to be lost; set by CudaComm::start

// Polls done() until it is true. No rank ever blocks in a wait for its peers: past the deadline the run ends here.
template <class Done>
void wait_until(Done done, const char* what) {
    double begin = seconds_now(), last = begin;
    while (!done()) {
        const double now = seconds_now();
        if (now > last + kStoppedFor) begin = now;
        last = now;
        const double seconds = now - begin;
        if (world.size > 1 && seconds > world.timeout) fail_ranks(deadline_message(seconds, what).c_str(), 1);
        if (seconds < 200e-6) {
            sched_yield();  // where ranks share a core, the one that we wait for may need it
        } else {
            if (check_peers) check_peers();
            sleep_seconds(20e-6);
        }
    }
    Deadline::got_on();
}

// Waits, outside of steps, until the device has done all that was enqueued. Collectives may be among it, so this polls
// with the ranks' deadline like every other wait.
template <class Backend>
void finish(const char* what) {
    typename Backend::Event reached;
    reached.record();
    wait_until([&] { return reached.done(); }, what);
}

// ---------------------------------------------------------------------------------------------------------------------
// A run that is asked to stop: kill, Ctrl-C, a lost terminal, Slurm's warning before its time limit

constexpr int kStopSignals[] = {SIGTERM, SIGINT, SIGHUP, SIGUSR1};

inline std::atomic<int> stop_signal{0};  // the first that this process has received

// What was ignored when we started stays so: nohup, and jobs that a script puts in the background.
inline bool is_ignored(int number) {
    struct sigaction before;
    return sigaction(number, nullptr, &before) == 0 && before.sa_handler == SIG_IGN;
}

// From here on the first such signal is noted in stop_signal, and a second one ends the process at once.
inline void note_stop_signals() {
    static std::atomic<int> received{0};
    static const pid_t parent = getppid();
    struct sigaction action = {};
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    action.sa_sigaction = [](int number, siginfo_t* info, void*) {
        int none = 0;
        stop_signal.compare_exchange_strong(none, number);
        // With --gpus, Ctrl-C reaches the ranks and their parent, which hands it on: its word alone counts.
        if (world.launcher == Launcher::self && info->si_pid != parent) return;
        if (received++ > 0) _exit(128 + number);
    };
    for (int number : kStopSignals)
        if (!is_ignored(number)) sigaction(number, &action, nullptr);
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
        Deadline deadline("all ranks to start (MPI_Init)", startup_timeout());
        int provided = 0, size = 0;
        MPI_CHECK(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided));
        MPI_CHECK(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
        MPI_CHECK(MPI_Comm_size(MPI_COMM_WORLD, &size));
        if (size != world.size)
            fail(
                "the launcher started %d ranks but MPI sees %d: this MPI does not understand the launcher. "
                "Use the mpirun of the MPI this program was built with, or srun --mpi=pmix",
                world.size, size);
        MPI_CHECK(MPI_Comm_rank(MPI_COMM_WORLD, &world.rank));
        MPI_Comm machine;
        MPI_CHECK(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &machine));
        MPI_CHECK(MPI_Comm_rank(machine, &world.local_rank));
        MPI_CHECK(MPI_Comm_size(machine, &world.local_size));
        MPI_CHECK(MPI_Comm_free(&machine));
    }
#else
    fail(
        "started as one of %d ranks, but this build has no MPI: install it (apt install libopenmpi-dev) and run make "
        "again, or use --gpus %d on one machine",
        world.size, world.size);
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// --gpus N: this process becomes the parent and starts N copies of itself

// Waits for the children, hands on the first request to stop, and ends them all at the second or when one fails. Does
// not return.
[[noreturn]] inline void watch_children(std::vector<pid_t> children, const sigset_t& signals) {
    using clock = std::chrono::steady_clock;
    const std::chrono::seconds grace(10);  // from a second request to stop to SIGKILL
    clock::time_point kill_time = clock::time_point::max();
    int exit_code = 0, stopped = 0;  // of a rank that failed, of one that has stopped as asked
    int asked = 0;                   // the signal that did
    size_t alive = children.size();
    auto tell_all = [&](int signal_number) {
        for (pid_t child : children) {
            if (child == 0) continue;
            kill(child, signal_number);
            kill(child, SIGCONT);  // a stopped process hears nothing but SIGKILL before it is continued
        }
    };
    while (alive > 0) {
        timespec second = {1, 0};
        const int signal_number = sigtimedwait(&signals, nullptr, &second);
        if (signal_number > 0 && signal_number != SIGCHLD) {
            tell_all(signal_number);  // at the first they finish their step and save, however long that takes
            if (asked) kill_time = clock::now() + grace;
            asked = signal_number;
        }
        int status = 0;
        for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
            const size_t rank = std::find(children.begin(), children.end(), pid) - children.begin();
            if (rank == children.size()) continue;
            children[rank] = 0;
            alive--;
            if (status == 0 || exit_code) continue;
            const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
            const bool as_asked = asked && code == 128 + asked;
            if (as_asked && WIFEXITED(status)) {  // and so will the others
                stopped = code;
                continue;
            }
            exit_code = code;
            if (!as_asked && !shared_page->explained) {
                if (WIFSIGNALED(status))
                    fprintf(stderr, "train_gpt: rank %zu was killed by signal %d (%s); ending the other ranks\n", rank,
                            WTERMSIG(status), strsignal(WTERMSIG(status)));
                else
                    fprintf(stderr, "train_gpt: rank %zu ended with exit code %d; ending the other ranks\n", rank,
                            exit_code);
            }
            tell_all(SIGKILL);  // they would wait for it
        }
        if (alive > 0 && clock::now() > kill_time) tell_all(SIGKILL);
    }
    exit(exit_code ? exit_code : stopped);
}

template <class Check>
[[noreturn]] void start_children(char** argv, int count, Check check) {
    const int fd = memfd_create("train_gpt", 0);  // without CLOEXEC: the children inherit it
    if (fd < 0 || ftruncate(fd, sizeof(SharedPage)) != 0)
        fail("cannot make the shared page of the ranks: %s", strerror(errno));
    void* page = mmap(nullptr, sizeof(SharedPage), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) fail("cannot map the shared page of the ranks: %s", strerror(errno));
    shared_page = static_cast<SharedPage*>(page);  // zeros are its starting state

    // The parent takes these signals one by one in watch_children; the children get the mask we started with.
    sigset_t signals, before;
    sigemptyset(&signals);
    sigaddset(&signals, SIGCHLD);
    for (int number : kStopSignals)
        if (!is_ignored(number)) sigaddset(&signals, number);
    sigprocmask(SIG_BLOCK, &signals, &before);
    check();  // after that: the threads that a driver may start inherit the mask, and leave the signals to us
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
// Start, stop, and exchange that needs no backend

// Called first thing after the flags are read, before any CUDA call. With gpus > 1 it does not return in the parent,
// which calls check() before it starts the ranks: what they lack is then said by one process.
template <class Check>
void start_ranks(char** argv, int gpus, double rank_timeout, Check check) {
    world.timeout = rank_timeout;
    if (world.launcher == Launcher::self) return start_by_self();
    if (world.launcher == Launcher::mpi && gpus > 0)
        usage_fail("--gpus %d starts ranks by itself, but mpirun or srun has already started %d: drop one of the two",
                   gpus, world.size);
    if (world.launcher == Launcher::mpi) return start_by_mpi();
    if (gpus > 1) start_children(argv, gpus, check);
}

inline void stop_ranks() {
#ifdef USE_MPI
    if (world.launcher == Launcher::mpi) {
        Deadline deadline("all ranks to finish (MPI_Finalize)", startup_timeout());
        MPI_CHECK(MPI_Finalize());
    }
#endif
}

// x of every rank becomes that of root. For start-up: it blocks the host.
inline void broadcast_host(void* x, size_t bytes, int root = 0) {
#ifdef USE_MPI
    if (world.launcher == Launcher::mpi) return mpi_broadcast(x, bytes, root);
#endif
    if (world.launcher != Launcher::self) return;
    const std::string what = strprintf("a broadcast from rank %d", root);
    auto barrier = [&] {
        const int round = shared_page->round;
        if (++shared_page->arrived == world.size) {
            shared_page->arrived = 0;
            shared_page->round = round + 1;
        } else {
            wait_until([&] { return shared_page->round != round; }, what.c_str());
        }
    };
    for (size_t at = 0; at < bytes;) {
        const size_t piece = std::min(bytes - at, sizeof shared_page->data);
        char* part = static_cast<char*>(x) + at;
        if (world.rank == root) memcpy(shared_page->data, part, piece);
        barrier();  // the bytes are there
        if (world.rank != root) memcpy(part, shared_page->data, piece);
        barrier();  // everyone has them
        at += piece;
    }
}

// The text of root, everywhere.
inline std::string broadcast_text(std::string text, int root) {
    uint64_t bytes = text.size();
    broadcast_host(&bytes, sizeof bytes, root);
    text.resize(bytes);
    broadcast_host(&text[0], bytes, root);
    return text;
}

// The texts of all ranks, by rank.
inline std::vector<std::string> gather_host(const std::string& mine) {
    std::vector<std::string> texts;
    for (int rank = 0; rank < world.size; rank++) texts.push_back(broadcast_text(mine, rank));
    return texts;
}

// Calls work() on rank 0 alone, in a thread of its own, and returns everywhere when it is over. However long a disk
// takes, the others do not give rank 0 up: it tells them every second that it is still there.
template <class Work>
void while_others_wait(Work work) {
    if (world.size == 1) return work();
    std::future<void> done;
    if (world.rank == 0) done = std::async(std::launch::async, work);
    for (bool over = false; !over;) {
        if (world.rank == 0) over = done.wait_for(std::chrono::seconds(1)) == std::future_status::ready;
        broadcast_host(&over, sizeof over);
    }
    if (world.rank == 0) done.get();  // throws what work() threw
}

// ---------------------------------------------------------------------------------------------------------------------
// What all ranks must have in common, and what no two may

// The first line in which two texts differ, as (a's, b's); "nothing" for a line that one of them lacks.
inline std::pair<std::string, std::string> first_difference(const std::string& a, const std::string& b) {
    std::istringstream lines_a(a), lines_b(b);
    for (;;) {
        std::string line_a, line_b;
        const bool any_a = bool(std::getline(lines_a, line_a)), any_b = bool(std::getline(lines_b, line_b));
        if (!any_a) line_a = "nothing";
        if (!any_b) line_b = "nothing";
        if (line_a != line_b || !(any_a || any_b)) return {line_a, line_b};
    }
}

// Each rank tells what it was given, one fact a line; a rank that was given something else would train a mixture, or
// wait for ever. Ends the run if one was.
inline void require_same(const std::string& facts) {
    const std::string of_rank_0 = broadcast_text(facts, 0);
    const std::vector<std::string> others = gather_host(facts == of_rank_0 ? "" : facts);
    for (int rank = 0; rank < world.size; rank++) {
        if (others[rank].empty()) continue;
        const auto [first, other] = first_difference(of_rank_0, others[rank]);
        usage_fail("rank 0 has %s, rank %d has %s: give all ranks the same flags, program and data", first.c_str(),
                   rank, other.c_str());
    }
}

// devices[r]: the GPU of rank r, as an id without spaces that no other GPU has, then where it is. Says which two ranks
// share one; "" if none do.
inline std::string shared_device(const std::vector<std::string>& devices) {
    std::map<std::string, int> rank_of;
    for (int rank = 0; rank < int(devices.size()); rank++) {
        const auto [found, is_new] = rank_of.emplace(devices[rank].substr(0, devices[rank].find(' ')), rank);
        if (!is_new) return strprintf("ranks %d and %d share GPU %s", found->second, rank, devices[rank].c_str());
    }
    return "";
}
