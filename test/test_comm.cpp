// Tests of comm.h, and of the optimizer over ranks, with real processes and no GPU. Started alone, this program is the
// driver: it starts itself again as workers, by mpirun and by start_ranks(gpus = N), and looks at their exit codes,
// output and time. The workers come first.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cmath>

#include "../comm.h"
#include "../cpu_backend.h"
#include "../dmuon.cuh"

// ---------------------------------------------------------------------------------------------------------------------
// Workers: what one rank does

static void expect(bool good, const char* what) {
    if (!good) fail("wrong result: %s", what);
}

// Values whose sum depends on the order of addition, different on every rank.
template <class T>
T value(int rank, size_t i) {
    uint32_t h = uint32_t(i) * 2654435761u + uint32_t(rank + 1) * 40503u;
    h ^= h >> 15;
    h *= 2246822519u;
    h ^= h >> 13;
    return std::ldexp(T(int(h % 20001) - 10000), int(h >> 16) % 24 - 12);
}

template <class T>
std::vector<T> values(int rank, size_t n) {
    std::vector<T> x(n);
    for (size_t i = 0; i < n; i++) x[i] = value<T>(rank, i);
    return x;
}

// ((x0 + x1) + x2) + ...
template <class T>
std::vector<T> sums_in_rank_order(size_t n) {
    std::vector<T> sum = values<T>(0, n);
    for (int rank = 1; rank < world.size; rank++)
        for (size_t i = 0; i < n; i++) sum[i] += value<T>(rank, i);
    return sum;
}

template <class T>
bool same_bits(const T* a, const T* b, size_t n) {
    return n == 0 || memcmp(a, b, n * sizeof(T)) == 0;
}

template <class T>
void check_all_reduce(size_t n) {
    std::vector<T> x = values<T>(world.rank, n), expected = sums_in_rank_order<T>(n);
    CpuComm::wait(CpuComm::all_reduce(x.data(), n));
    expect(same_bits(x.data(), expected.data(), n), strprintf("all_reduce of %zu", n).c_str());
}

static void check_chunks(size_t chunk) {
    const size_t n = chunk * world.size, mine = chunk * world.rank;
    std::vector<float> x = values<float>(world.rank, n), expected = sums_in_rank_order<float>(n);
    CpuComm::wait(CpuComm::reduce_scatter(x.data(), chunk));
    expect(same_bits(x.data() + mine, expected.data() + mine, chunk), "reduce_scatter: my row is the sum");
    const std::vector<float> before = values<float>(world.rank, n);
    expect(same_bits(x.data(), before.data(), mine), "reduce_scatter: the rows before mine are kept");
    expect(same_bits(x.data() + mine + chunk, before.data() + mine + chunk, n - mine - chunk),
           "reduce_scatter: the rows after mine are kept");
    CpuComm::wait(CpuComm::all_gather(x.data(), chunk));
    expect(same_bits(x.data(), expected.data(), n), "all_gather after reduce_scatter");
    std::vector<float> y = before;
    CpuComm::wait(CpuComm::all_reduce(y.data(), n));
    expect(same_bits(x.data(), y.data(), n), "all_reduce has the bits of reduce_scatter + all_gather");
}

template <class Broadcast>
void check_broadcast(size_t bytes, int root, Broadcast broadcast) {
    std::vector<double> x = values<double>(world.rank, bytes / 8 + 1), expected = x;
    const std::vector<double> of_root = values<double>(root, bytes / 8 + 1);
    if (bytes) memcpy(expected.data(), of_root.data(), bytes);  // and not a byte more
    broadcast(x.data(), bytes, root);
    expect(same_bits(x.data(), expected.data(), x.size()), "broadcast");
}

static void check_collectives() {
    const size_t piece = 1 << 20;  // the longest message, in elements
    for (size_t chunk : {size_t(0), size_t(1), size_t(7), size_t(1000), piece + 3}) check_chunks(chunk);
    for (size_t n : {size_t(0), size_t(1), size_t(2), size_t(3), size_t(4), size_t(11), size_t(1001), 5 * piece + 1})
        check_all_reduce<float>(n);
    for (size_t n : {1, 2, 7, 1003}) check_all_reduce<double>(n);
    for (int root = 0; root < world.size; root++)
        for (size_t bytes : {0, 1, 13, 100000})
            check_broadcast(bytes, root,
                            [](void* x, size_t n, int of) { CpuComm::wait(CpuComm::broadcast(x, n, of)); });
}

static void check_broadcast_host() {
    for (int root = 0; root < world.size; root++)
        for (size_t bytes : {0, 1, 128, 4000, 4001, 100000}) check_broadcast(bytes, root, broadcast_host);
    auto text = [](int rank) { return std::string(rank == 1 ? 0 : 3000 * rank + 1, char('a' + rank)); };
    const std::vector<std::string> texts = gather_host(text(world.rank));
    expect(int(texts.size()) == world.size, "gather_host: as many texts as ranks");
    for (int rank = 0; rank < world.size; rank++) expect(texts[rank] == text(rank), "gather_host");
}

// Ten steps on gradients that do not depend on the number of ranks: of each element one rank holds all, the others
// zero, so every order of addition is exact. The weights must not depend on it either, nor on owners, nor on muon or
// dmuon. Returns a checksum of the weights of all steps.
static uint64_t updated_weights(const char* method, const char* owner, const char* muon_batch = "shape") {
    Options options;
    options.muon_batch = muon_batch;
    options.optimizer = method;
    options.owner = owner;
    std::vector<TensorSpec> specs = {{"wte.weight", TensorKind::token_embedding, 256, 24}};
    specs[0].stored_rows = 250;
    for (int layer = 0; layer < 3; layer++) {
        specs.push_back({"ln.weight", TensorKind::layernorm_weight, 1, 24, layer});
        specs.push_back({"qkv.weight", TensorKind::matrix, 72, 24, layer});
        specs.back().split = 3;
        specs.push_back({"proj.weight", TensorKind::residual_projection, 24, 24, layer});
        specs.push_back({"fc.weight", TensorKind::matrix, 96, 24, layer});
        specs.push_back({"fcproj.weight", TensorKind::residual_projection, 24, 96, layer});
    }
    const int matrices = 18, steps = 10;
    Optimizer<Cpu> optimizer(specs, options);
    const Plan& plan = optimizer.plan;

    double held = 0, total = 0;  // elements of Muon's state: on this rank, of the model
    for (int t = 0; t < int(specs.size()); t++) {
        size_t covered = 0;
        for (const auto& part : optimizer.state_parts(t)) {
            expect(part.begin == covered && part.owner >= 0 && part.owner < world.size, "every element has one owner");
            covered += part.count;
            if (!part.here) continue;
            if (optimizer.plan.is_muon(t)) held += double(part.count);
            for (size_t i = 0; i < part.count; i++)
                optimizer.master[part.state + i] = 0.02f * std::sin(float(part.begin + i + 77 * t));
        }
        expect(covered == specs[t].size(), "every element has an owner");
        if (optimizer.plan.is_muon(t)) total += double(covered);
    }
    CpuComm::wait(CpuComm::all_reduce(&held, 1));
    const int copies = plan.method == Method::muon ? world.size : 1;  // vanilla muon repeats everything on every rank
    expect(held == copies * total, "momentum over the ranks sums to the model's");
    optimizer.publish();

    uint64_t checksum = 0;
    auto add = [&](const float* x, size_t n) {
        for (size_t i = 0; i < n; i++) {
            uint32_t bits;
            memcpy(&bits, x + i, 4);
            checksum = (checksum ^ bits) * 0x9fb21c651e98df25u;
            checksum ^= checksum >> 31;
        }
    };
    for (int step = 0; step < steps; step++) {
        memset(optimizer.grads, 0, plan.arena * sizeof(float));
        for (const Piece& piece : plan.pieces)
            for (size_t i = 0; i < piece.count; i++) {
                const size_t element = piece.begin + i + 1000003 * (piece.tensor + 100 * step);
                const bool here = int(element % world.size) == world.rank;
                if (here) optimizer.grads[piece.offset + i] = value<float>(0, element);
            }
        for (int layer = 2; layer >= 0; layer--) optimizer.layer_is_complete(layer);
        optimizer.step(0.01f, 0.02f, [](Phase) {});
        optimizer.need_flat();
        for (int layer = 0; layer < 3; layer++) optimizer.need_layer(layer);
        add(optimizer.clip, 2);
        for (const Piece& piece : plan.pieces) add(optimizer.params + piece.offset, piece.count);
        uint64_t of_rank_0 = checksum;
        broadcast_host(&of_rank_0, sizeof of_rank_0);
        expect(checksum == of_rank_0, "all ranks have the same weights after a step");
    }
    double orthogonalised = double(optimizer.orthogonalised);
    CpuComm::wait(CpuComm::all_reduce(&orthogonalised, 1));
    const int expected = plan.method == Method::adamw ? 0 : matrices * steps * copies;
    expect(orthogonalised == expected, "Newton-Schulz once per matrix and step");
    expect(plan.ns_matrices * steps == expected, "what the plan says of it");
    return checksum;
}

static void check_updates(bool at_wait) {
    CpuComm::at_wait = at_wait;
    const uint64_t adamw = updated_weights("adamw", "round_robin"), muon = updated_weights("muon", "round_robin"),
                   dmuon = updated_weights("dmuon", "round_robin"), lpt = updated_weights("dmuon", "lpt"),
                   one = updated_weights("muon", "round_robin", "one");
    expect(dmuon == muon, "dmuon has the bits of muon");
    expect(lpt == dmuon, "lpt has the bits of round_robin");
    expect(one == muon, "matrices one after the other have the bits of all of a shape together");
    if (world.rank == 0) printf("weights %016llx %016llx\n", (unsigned long long)adamw, (unsigned long long)muon);
}

// Everyone meets everyone again and again.
static void keep_busy(int rounds) {
    for (int round = 0; round < rounds; round++) {
        double x = 1;
        if (world.launcher == Launcher::mpi) CpuComm::wait(CpuComm::all_reduce(&x, 1));
        else broadcast_host(&x, sizeof x);
        sleep_seconds(0.001);
    }
}

static void work(const std::string& job) {
    const bool chosen = world.rank == world.size - 1;  // the rank that something happens to
    if (job == "collectives") {
        check_collectives();
        check_broadcast_host();
        if (world.rank == 0) printf("good on %d of %d local\n", world.size, world.local_size);
        return;
    }
    if (job == "page") {
        check_broadcast_host();
        if (world.rank == 0) printf("good on %d of %d local\n", world.size, world.local_size);
        return;
    }
    if (job == "updates") return check_updates(false);
    if (job == "updates_at_wait") return check_updates(true);
    if (job == "same" || job == "other_fact" || job == "fewer_facts") {
        std::string facts = "build 1\n--batch 4\n--lr 0.1";
        if (chosen && job == "other_fact") facts = "build 1\n--batch 8\n--lr 0.1";
        if (chosen && job == "fewer_facts") facts = "build 1\n--batch 4";
        require_same(facts);
        if (world.rank == 0) printf("the ranks agree\n");
        return;
    }
    if (job == "slow_disk") {  // longer than the others would wait for a collective
        bool done = false;
        while_others_wait([&] { sleep_seconds(2.5 * world.timeout), done = true; });
        expect(done == (world.rank == 0), "rank 0 alone has done the work");
        if (world.rank == 0) printf("the disk was slow\n");
        while_others_wait([] { fail("the disk is full"); });
    }
    if (job == "stop_signal" || job == "long_step") note_stop_signals();
    keep_busy(100);              // under way
    if (job == "stop_signal") {  // all agree each round, as the trainer does each step
        if (world.rank == 0) printf("parent %d\n", int(getppid())), fflush(stdout);
        for (int stopping = 0; !stopping; sleep_seconds(0.001))
            for (const std::string& text : gather_host(std::to_string(stop_signal))) stopping |= atoi(text.c_str());
        sleep_seconds(1.5);  // saves
        if (world.rank == 0) printf("saved\n"), fflush(stdout);
        stop_ranks();
        exit(128 + SIGUSR1);
    }
    if (job == "long_step") {
        printf("pid %d\n", int(getpid()));
        fflush(stdout);
    }
    if (job == "pids") {
        printf("pid %d\n", int(getpid()));
        fflush(stdout);
    }
    if (chosen && job == "stop") raise(SIGSTOP);
    if (chosen && job == "kill") raise(SIGKILL);
    if (chosen && job == "exit") _exit(3);
    if (chosen && job == "error") fail("the disk is full");
    if (job == "all_error") fail("no such file");
    if (job == "unreadable" || job == "all_unreadable") {
        end_on_unreadable_files();
        FILE* beyond = tmpfile();  // of two pages, mapped, then of none
        const int fd = fileno(beyond);
        expect(ftruncate(fd, 8192) == 0, "a file of two pages");
        const MappedFile file(strprintf("/proc/%d/fd/%d", int(getpid()), fd), "file");
        if (!chosen && job == "unreadable") keep_busy(100000);
        expect(ftruncate(fd, 0) == 0, "a file of none");
        expect(*static_cast<const volatile char*>(file.data) != 0, "not reached");
    }
    if (job == "blocked" || job == "blocked_later" || job == "blocked_and_stopped" || job == "stopped_rank_0") {
        Deadline deadline("a call that never returns");
        if (job == "blocked_later") {
            Deadline("a call that returns");
            keep_busy(100);
        }
        if (chosen && job == "blocked_and_stopped") raise(SIGSTOP);
        if (job == "stopped_rank_0") {
            if (world.rank == 0) raise(SIGSTOP);
            keep_busy(100000);
        }
        for (;;) pause();
    }
    keep_busy(100000);  // until one of the tests ends it
}

// ---------------------------------------------------------------------------------------------------------------------
// Driver

struct Outcome {
    std::string output;
    int code;  // of the shell: 128 + signal if killed
    double seconds;
    bool says(const std::string& text) const { return output.find(text) != std::string::npos; }
    int count(const std::string& text) const {
        int found = 0;
        for (size_t at = 0; (at = output.find(text, at)) != std::string::npos; at++) found++;
        return found;
    }
};

static Outcome shell(const std::string& command) {
    const auto begin = std::chrono::steady_clock::now();
    Outcome outcome;
    FILE* pipe = popen(("{ " + command + "; } 2>&1").c_str(), "r");
    REQUIRE(pipe);
    char part[4096];
    for (size_t n; (n = fread(part, 1, sizeof part, pipe)) > 0;) outcome.output.append(part, n);
    const int status = pclose(pipe);
    outcome.code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    return outcome;
}

static std::string self() {
    char path[4096] = "";
    REQUIRE(readlink("/proc/self/exe", path, sizeof path - 1) > 0);
    return path;
}

static Outcome gpus(int n, const std::string& job, double timeout = 60) {
    return shell(strprintf("timeout 100 %s worker %s %d %g", self().c_str(), job.c_str(), n, timeout));
}

TEST_CASE("the environment says who we are") {
    const char* names[] = {"OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE",     "PMI_RANK",
                           "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",         "SLURM_NTASKS", kSelfVariable};
    struct {
        const char* what;
        const char* values[8];
        Launcher launcher;
        int rank, size;
    } cases[] = {
        {"nothing", {}, Launcher::none, 0, 1},
        {"Open MPI", {"4", "3"}, Launcher::mpi, 3, 4},
        {"mpirun -n 1", {"1", "0"}, Launcher::none, 0, 1},
        {"MPICH", {0, 0, "2", "1"}, Launcher::mpi, 1, 2},
        {"srun", {0, 0, 0, 0, "8", "5", "8"}, Launcher::mpi, 5, 8},
        {"srun -n 1 in a job of 8", {0, 0, 0, 0, "1", "0", "8"}, Launcher::none, 0, 1},
        {"batch script or shell in a job of 8", {0, 0, 0, 0, 0, "0", "8"}, Launcher::none, 0, 1},
        {"mpirun -n 1 under srun", {"1", "0", 0, 0, "8", "5", "8"}, Launcher::none, 0, 1},
        {"mpirun in a job", {"4", "2", 0, 0, 0, "0", "8"}, Launcher::mpi, 2, 4},
        {"child of our own parent", {0, 0, 0, 0, 0, 0, 0, "1/2/9"}, Launcher::self, 1, 2},
    };
    for (auto& c : cases) {
        CAPTURE(c.what);
        for (int i = 0; i < 8; i++) {
            if (c.values[i]) setenv(names[i], c.values[i], 1);
            else unsetenv(names[i]);
        }
        const World found = launched_world();
        CHECK(found.launcher == c.launcher);
        CHECK(found.rank == c.rank);
        CHECK(found.size == c.size);
    }
    for (const char* name : names) unsetenv(name);
}

TEST_CASE("ranks that share a GPU are named, and it; others are not, whatever number it has on their machine") {
    const std::string a = "GPU-0a (0000:17:00.0 on node1)", b = "GPU-0b (0000:18:00.0 on node1)",
                      c = "GPU-0c (0000:17:00.0 on node2)", a_elsewhere = "GPU-0a (0000:01:00.0 on container)";
    CHECK(shared_device({a}) == "");
    CHECK(shared_device({a, b, c}) == "");
    CHECK(shared_device({a, c, b, c}) == "ranks 1 and 3 share GPU " + c);
    CHECK(shared_device({b, b, b}) == "ranks 0 and 1 share GPU " + b);
    CHECK(shared_device({b, a, c, a_elsewhere}) == "ranks 1 and 3 share GPU " + a_elsewhere);
}

TEST_CASE("the first difference of two texts") {
    using Pair = std::pair<std::string, std::string>;
    CHECK(first_difference("a\nb\nc", "a\nx\ny") == Pair("b", "x"));
    CHECK(first_difference("a\nb", "a") == Pair("b", "nothing"));
    CHECK(first_difference("", "a") == Pair("nothing", "a"));
}

TEST_CASE("one process: every collective is a no-op") {
    check_collectives();
    check_broadcast_host();
}

#ifdef USE_MPI
static Outcome mpirun(int n, const std::string& job, double timeout = 60) {
    return shell(strprintf("timeout 100 mpirun --allow-run-as-root --oversubscribe -n %d %s worker %s 0 %g", n,
                           self().c_str(), job.c_str(), timeout));
}

TEST_CASE("collectives on 1 to 5 processes under mpirun") {
    for (int n = 1; n <= 5; n++) {
        const Outcome o = mpirun(n, "collectives");
        INFO(o.output);
        CHECK(o.code == 0);
        CHECK(o.says(strprintf("good on %d of %d local", n, n)));
    }
}

TEST_CASE("the same gradients give the same weights on 1 to 5 ranks") {
    auto weights = [](int n, const char* job = "updates") {  // without what mpirun may have to say about the machine
        const Outcome o = mpirun(n, job);
        INFO(o.output);
        CHECK(o.code == 0);
        const size_t begin = o.output.find("weights ");
        REQUIRE(begin != std::string::npos);
        return o.output.substr(begin, o.output.find('\n', begin) - begin);
    };
    const std::string one = weights(1);
    for (int n = 2; n <= 5; n++) CHECK(weights(n) == one);
    // However late a collective is, up to the wait for its ticket: nobody uses its data before.
    for (int n : {1, 2, 3}) CHECK(weights(n, "updates_at_wait") == one);
}

TEST_CASE("mpirun: a stopped rank ends the run at the deadline, with one line") {
    const Outcome o = mpirun(3, "stop", 2);
    INFO(o.output);
    CHECK(o.code != 0);
    CHECK(o.says("train_gpt: rank 0: waited 2 s for reduce_scatter: another rank has stopped or hangs"));
    CHECK(o.count("waited") == 1);
    CHECK(o.seconds < 30);
}

TEST_CASE("a stopped rank 0 has no word about the others when it is continued to be ended") {
    for (bool by_mpirun : {true, false}) {
        const Outcome o = by_mpirun ? mpirun(3, "stopped_rank_0", 2) : gpus(3, "stopped_rank_0", 2);
        INFO(o.output);
        CHECK(o.code != 0);
        CHECK(o.says("train_gpt: rank 1: waited 2 s for"));
        CHECK(o.count("waited") == 1);
        CHECK(o.seconds < 30);
    }
}

TEST_CASE("mpirun: a killed rank ends the run") {
    const Outcome o = mpirun(3, "kill");
    INFO(o.output);
    CHECK(o.code != 0);
    CHECK(o.seconds < 30);
}

TEST_CASE("mpirun: an error of one rank ends the run, one that all meet is said once") {
    Outcome o = mpirun(3, "error");
    INFO(o.output);
    CHECK(o.code != 0);
    CHECK(o.count("train_gpt: ") == 1);
    CHECK(o.says("train_gpt: rank 2: the disk is full"));
    CHECK(o.seconds < 30);
    o = mpirun(3, "all_error");
    CHECK(o.code != 0);
    CHECK(o.count("no such file") == 1);
}

TEST_CASE("mpirun: a file that cannot be read ends the run; one that no rank can read is said once") {
    for (bool all : {false, true}) {
        const Outcome o = mpirun(3, all ? "all_unreadable" : "unreadable");
        INFO(o.output);
        CHECK(o.code == 1);
        CHECK(o.count("train_gpt: ") == 1);
        CHECK(o.says(strprintf("train_gpt: rank %d: cannot read file /proc/", all ? 0 : 2)));
        CHECK(o.seconds < 30);
    }
}

TEST_CASE("ranks that were given different things are refused, with what and who") {
    for (bool by_mpirun : {true, false}) {
        auto start = [&](const char* job) { return by_mpirun ? mpirun(3, job) : gpus(3, job); };
        CHECK(start("same").output == "the ranks agree\n");
        const Outcome other = start("other_fact"), fewer = start("fewer_facts");
        INFO(other.output, fewer.output);
        CHECK(other.code == 2);
        CHECK(other.says("train_gpt: rank 0: rank 0 has --batch 4, rank 2 has --batch 8: give"));
        CHECK(other.count("train_gpt: ") == 1);
        CHECK(fewer.code == 2);
        CHECK(fewer.says("train_gpt: rank 0: rank 0 has --lr 0.1, rank 2 has nothing: give"));
    }
}

TEST_CASE("mpirun: rank 0 may take long over a disk") {
    const Outcome o = mpirun(3, "slow_disk", 2);
    INFO(o.output);
    CHECK(o.says("the disk was slow"));
    CHECK(o.says("train_gpt: rank 0: the disk is full"));
    CHECK(o.count("train_gpt: ") == 1);
}

TEST_CASE("--gpus under mpirun is refused") {
    const Outcome o = shell(
        strprintf("timeout 100 mpirun --allow-run-as-root --oversubscribe -n 2 %s worker page 2 60", self().c_str()));
    INFO(o.output);
    CHECK(o.code == 2);
    CHECK(o.count("drop one of the two") == 1);
}
#else
TEST_CASE("a build without MPI refuses to be one of several") {
    const std::string environment = "OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_RANK=0 ";
    const Outcome o = shell(environment + self() + " worker page 0 60");
    CHECK(o.code == 1);
    CHECK(o.says("this build has no MPI"));
}
#endif

TEST_CASE("--gpus N starts N processes that share a page") {
    for (int n : {1, 2, 5}) {
        const Outcome o = gpus(n, "page");
        INFO(o.output);
        CHECK(o.code == 0);
        CHECK(o.output == strprintf("good on %d of %d local\n", n, n));
    }
}

TEST_CASE("--gpus: a killed rank ends the run") {
    const Outcome o = gpus(3, "kill");
    CHECK(o.code == 128 + SIGKILL);
    CHECK(o.output == "train_gpt: rank 2 was killed by signal 9 (Killed); ending the other ranks\n");
    CHECK(o.seconds < 15);
}

TEST_CASE("--gpus: a rank that ends with an exit code ends the run") {
    const Outcome o = gpus(3, "exit");
    CHECK(o.code == 3);
    CHECK(o.output == "train_gpt: rank 2 ended with exit code 3; ending the other ranks\n");
}

TEST_CASE("--gpus: an error is said once, by the rank that met it") {
    Outcome o = gpus(3, "error");
    CHECK(o.code == 1);
    CHECK(o.output == "train_gpt: rank 2: the disk is full\n");
    o = gpus(3, "all_error");
    CHECK(o.code == 1);
    CHECK(o.output == "train_gpt: rank 0: no such file\n");
}

TEST_CASE("--gpus: a file that cannot be read ends the run; one that no rank can read is said once") {
    for (bool all : {false, true}) {
        const Outcome o = gpus(3, all ? "all_unreadable" : "unreadable");
        INFO(o.output);
        CHECK(o.code == 1);
        CHECK(o.count("\n") == 1);
        CHECK(o.says(strprintf("train_gpt: rank %d: cannot read file /proc/", all ? 0 : 2)));
        CHECK(o.seconds < 30);
    }
}

TEST_CASE("--gpus: a stopped rank ends the run at the deadline, and is ended itself") {
    const Outcome o = gpus(3, "stop", 2);
    CHECK(o.code == 1);
    CHECK(o.output ==
          "train_gpt: rank 0: waited 2 s for a broadcast from rank 0: another rank has stopped or hangs; "
          "ending the run (--rank_timeout sets this limit)\n");
    CHECK(o.seconds < 30);
}

TEST_CASE("--gpus: a call that blocks for ever is ended by the alarm, whatever is inside it") {
    for (const char* job : {"blocked", "blocked_later", "blocked_and_stopped"}) {
        const Outcome o = gpus(2, job, 2);
        INFO(o.output);
        CHECK(o.code == 1);
        CHECK(o.says("train_gpt: rank 0: waited 2 s for a call that never returns"));
        CHECK(o.count("waited") == 1);
        CHECK(o.seconds < 30);
    }
}

TEST_CASE("a process that was stopped beyond its deadline has its time anew when it goes on") {
    int started[2];
    REQUIRE(pipe(started) == 0);
    const pid_t child = fork();
    if (child == 0) {
        freopen("/dev/null", "w", stderr);
        Deadline deadline("a call that returns in time, not counted what it was stopped", 0);  // 3 s
        const double begin = seconds_now();
        close(started[1]);
        while (seconds_now() < begin + 5) sleep_seconds(0.1);
        _exit(7);
    }
    REQUIRE(child > 0);
    close(started[1]);
    char none;
    CHECK(read(started[0], &none, 1) == 0);  // when the child, too, has closed its end
    close(started[0]);
    kill(child, SIGSTOP);
    sleep_seconds(4);
    kill(child, SIGCONT);  // the alarm of 3 s finds it 1 s late
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 7);
}

TEST_CASE("--gpus: rank 0 may take long over a disk") {
    const Outcome o = gpus(3, "slow_disk", 2);
    INFO(o.output);
    CHECK(o.code == 1);
    CHECK(o.says("the disk was slow\n"));
    CHECK(o.says("train_gpt: rank 0: the disk is full\n"));
    CHECK(o.count("train_gpt: ") == 1);
}

// Processes of the group that are still there, not counting ones that have ended and wait to be reaped.
static bool alive(int pid) {
    FILE* file = fopen(strprintf("/proc/%d/stat", pid).c_str(), "r");
    if (!file) return false;
    char state = 'Z';
    if (fscanf(file, "%*d %*s %c", &state) != 1) state = 'Z';
    fclose(file);
    return state != 'Z';
}

TEST_CASE("--gpus: the ranks end with their parent") {
    for (int signal_number : {SIGINT, SIGTERM, SIGKILL}) {
        CAPTURE(signal_number);
        FILE* pipe = popen(strprintf("exec %s worker pids 3 60", self().c_str()).c_str(), "r");
        REQUIRE(pipe);
        int pids[3] = {};
        for (int& pid : pids) REQUIRE(fscanf(pipe, " pid %d", &pid) == 1);
        FILE* file = fopen(strprintf("/proc/%d/stat", pids[0]).c_str(), "r");
        REQUIRE(file);
        int parent = 0;
        CHECK(fscanf(file, "%*d %*s %*c %d", &parent) == 1);
        fclose(file);
        REQUIRE(kill(parent, signal_number) == 0);
        const int status = pclose(pipe);
        if (signal_number == SIGKILL) CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
        else CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 128 + signal_number));
        for (int wait = 0; wait < 100; wait++)
            if (alive(pids[0]) || alive(pids[1]) || alive(pids[2])) sleep_seconds(0.05);
        for (int pid : pids) CHECK(!alive(pid));
    }
}

TEST_CASE("--gpus: ranks that are asked to stop, by their parent or one alone, have the time to save") {
    for (bool whole_group : {false, true}) {  // Ctrl-C in a terminal reaches parent and ranks: that is one request
        CAPTURE(whole_group);
        FILE* pipe = popen(strprintf("exec setsid %s worker stop_signal 3 60", self().c_str()).c_str(), "r");
        REQUIRE(pipe);
        int parent = 0;
        REQUIRE(fscanf(pipe, " parent %d", &parent) == 1);
        REQUIRE(kill(whole_group ? -parent : parent, SIGUSR1) == 0);
        char said[100] = "";
        CHECK(fscanf(pipe, " %99s", said) == 1);
        CHECK(said == std::string("saved"));
        const int status = pclose(pipe);
        CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGUSR1));
    }
}

TEST_CASE("--gpus: a second request ends the ranks at once") {
    FILE* pipe = popen(strprintf("exec %s worker long_step 2 60", self().c_str()).c_str(), "r");
    REQUIRE(pipe);
    int pids[2] = {};
    for (int& pid : pids) REQUIRE(fscanf(pipe, " pid %d", &pid) == 1);
    FILE* file = fopen(strprintf("/proc/%d/stat", pids[0]).c_str(), "r");
    REQUIRE(file);
    int parent = 0;
    CHECK(fscanf(file, "%*d %*s %*c %d", &parent) == 1);
    fclose(file);
    REQUIRE(kill(parent, SIGTERM) == 0);
    sleep_seconds(1);
    for (int pid : pids) CHECK(alive(pid));
    REQUIRE(kill(parent, SIGTERM) == 0);
    const int status = pclose(pipe);
    CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 128 + SIGTERM));
    for (int pid : pids) CHECK(!alive(pid));
}

int main(int argc, char** argv) {
    if (argc == 5 && argv[1] == std::string("worker")) {  // worker JOB GPUS TIMEOUT
        try {
            start_ranks(argv, atoi(argv[3]), atof(argv[4]), [] {});
            work(argv[2]);
            stop_ranks();
            return 0;
        } catch (const Error& e) {
            fail_ranks(e.what(), e.exit_code);
        }
    }
    for (int number : kStopSignals) signal(number, SIG_DFL);  // a shell may have had us ignore some of them
    setenv("OMP_NUM_THREADS", "1", 0);                        // for the workers: they share few cores
    setenv("OPENBLAS_NUM_THREADS", "1", 0);
    return doctest::Context(argc, argv).run();
}
