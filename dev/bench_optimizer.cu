// bench_optimizer.cu: what an optimizer step costs, by itself, with the program's own Plan and Optimizer (dmuon.cuh) on
// random gradients: AdamW, vanilla Muon and DMuon, on GPT-2's sizes or on the shapes in a file (dev/shapes/).
//
//     build/bench_optimizer [--models d12,d24,d36,d48,FILE...] [--emulate 1,2,4,8,16,32,64] [--only NAME,...]
//                           [--log MODEL=RUN/log.jsonl]... [--json FILE] [--seconds S] [flags of train_gpt]
//
// A single process also emulates: it runs what rank r of N would run, that is r's matrices and its chunks, without the
// communication. Ranks with the same work are run once, and the slowest counts. Started as several ranks (mpirun, or
// --gpus N) it measures those, communication included, with nothing else to hide it behind.
//
// Printed, in Markdown, for each model:
//   ms        median of an optimizer step, as long as nothing else runs: in training the GPU's clock is lower
//   step      with --log: the median of the run's step_ms - optimizer_ms, plus ms
//   floor     bytes / peak bandwidth + FLOPs / peak rate, of a rank if all were divided evenly. AdamW reads gradient,
//             master, m and v of an element and writes master, m, v and the weight; Muon reads gradient, momentum and
//             master and writes momentum, master and the weight, and writes X and reads it. FLOPs: Newton-Schulz with
//             half of each symmetric product.
//   state     master weights and moments of a rank
//   predicted what --print_plan says (an H200), and by how much it is off
// then what the paper compares (arXiv 2606.27153: a step 1.48 to 3.01 times as fast as with vanilla Muon, its optimizer
// 6.85 to 163 times), from matrices one by one on every rank, on the kernels for any GPU, to DMuon, in three factors:
// batching, kernel, ownership; a factor's share is its logarithm over the logarithm of all.
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cu"

// ---------------------------------------------------------------------------------------------------------------------
// Models: named sizes, and files of shapes

struct BenchModel {
    std::string name;
    std::vector<TensorSpec> specs;
};

inline std::vector<std::string> words_of(const std::string& line) {
    std::istringstream stream(line.substr(0, line.find('#')));
    std::vector<std::string> words;
    for (std::string word; stream >> word;) words.push_back(word);
    return words;
}

inline std::vector<std::string> split_list(const std::string& list) {
    std::istringstream stream(list);
    std::vector<std::string> items;
    for (std::string item; std::getline(stream, item, ',');) items.push_back(item);
    return items;
}

inline int positive_int(const std::string& text, const std::string& where, int least = 1) {
    int value = -1;
    const char* end = text.data() + text.size();
    const auto [stop, error] = std::from_chars(text.data(), end, value);
    if (error != std::errc() || stop != end || value < least)
        usage_fail("%s: '%s' is not a whole number from %d on", where.c_str(), text.c_str(), least);
    return value;
}

// The words: dev/shapes/qwen2.5-7b.txt
inline std::vector<TensorSpec> read_shapes(const std::string& path) {
    std::ifstream file(path);
    if (!file) usage_fail("--models: '%s' is none of d6, d12, d24, d36, d48, nor a file of shapes", path.c_str());
    struct Tensor {
        std::string name;
        TensorKind kind;
        int rows, cols;
    };
    std::vector<TensorSpec> specs;
    std::vector<Tensor> block;
    int count = 0, layer = 0, line_number = 0;  // count 0: outside the layers
    auto finish_block = [&] {
        for (int i = 0; i < std::max(count, 1); i++) {
            const int at = count > 0 ? layer++ : -1;
            for (const Tensor& t : block) specs.emplace_back(t.name, t.kind, t.rows, t.cols, at);
        }
        block.clear();
    };
    for (std::string line; std::getline(file, line);) {
        line_number++;
        const std::vector<std::string> words = words_of(line);
        if (words.empty()) continue;
        const std::string where = strprintf("%s, line %d", path.c_str(), line_number);
        auto size = [&](size_t i) { return positive_int(words[i], where); };
        if (words[0] == "layers" && words.size() == 2) {
            finish_block();
            count = positive_int(words[1], where, 0);
        } else if (words[0] == "matrix" && words.size() == 4 && count > 0) {
            block.push_back({words[1], TensorKind::matrix, size(2), size(3)});
        } else if (words[0] == "table" && words.size() == 4) {
            block.push_back({words[1], TensorKind::token_embedding, size(2), size(3)});
        } else if (words[0] == "vector" && words.size() == 3) {
            block.push_back({words[1], TensorKind::bias, 1, size(2)});
        } else {
            usage_fail(
                "%s: expected `layers N`, `matrix NAME ROWS COLS` (inside layers), `table NAME ROWS COLS` or `vector "
                "NAME SIZE`",
                where.c_str());
        }
    }
    finish_block();
    if (specs.empty()) usage_fail("%s has no shapes", path.c_str());
    return specs;
}

inline BenchModel bench_model(const std::string& name) {
    Options options;
    options.model = name;
    if (find_preset(name)) return {name, tensor_specs(model_config(options, 50257))};
    return {std::filesystem::path(name).stem().string(), read_shapes(name)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Backends: memory that is given back after each measurement, and collectives that do nothing

template <class Backend>
struct Bench : Backend {
    static inline std::vector<void*> taken;
    static void* alloc(size_t bytes, const char* what) {
        taken.push_back(Backend::alloc(bytes, what));
        return taken.back();
    }
    static void free_all() {
        Backend::synchronize();
        for (void* memory : taken) {
#ifdef __CUDACC__
            if constexpr (std::is_same_v<Backend, Cuda>) {
                CUDA_CHECK(cudaFree(memory));
                continue;
            }
#endif
            free(memory);
        }
        taken.clear();
    }
    static double peak_bandwidth() {  // bytes/s by the memory's clock and width, 0 if unknown
#ifdef __CUDACC__
        if constexpr (std::is_same_v<Backend, Cuda>) {
            int kilohertz = 0, bits = 0, device = 0;
            CUDA_CHECK(cudaGetDevice(&device));
            CUDA_CHECK(cudaDeviceGetAttribute(&kilohertz, cudaDevAttrMemoryClockRate, device));
            CUDA_CHECK(cudaDeviceGetAttribute(&bits, cudaDevAttrGlobalMemoryBusWidth, device));
            return 2e3 * kilohertz * bits / 8;
        }
#endif
        return 0;
    }
};

template <class Backend>
struct Alone : Bench<Backend> {
    using real = typename Backend::real;
    static Ticket reduce_scatter(float*, size_t) { return Ticket(); }
    static Ticket all_gather(real*, size_t) { return Ticket(); }
    static Ticket all_reduce(float*, size_t) { return Ticket(); }
    static Ticket all_reduce(double*, size_t) { return Ticket(); }
    static Ticket broadcast(void*, size_t, int) { return Ticket(); }
};

// While it lives, this process is rank r of N.
class Pretend {
    const World before = world;

  public:
    Pretend(int rank, int size) { world.rank = rank, world.size = size; }
    ~Pretend() { world = before; }
    Pretend(const Pretend&) = delete;
};

// ---------------------------------------------------------------------------------------------------------------------
// A measurement

struct Measured {
    double ms = 0;
    std::map<std::string, double> phases;  // ms by name, medians
    std::vector<NsBatch> batches;
    std::vector<double> batch_ms;  // of Newton-Schulz
};

inline double median(std::vector<double> values) {
    std::sort(values.begin(), values.end());
    return values.empty() ? NAN : values[values.size() / 2];
}

// Random gradients: normal, the same million all over, which no matrix is a multiple of.
template <class Backend>
void fill_gradients(Optimizer<Backend>& optimizer) {
    std::vector<float> block(std::min<size_t>(1000003, optimizer.plan.arena));
    for (size_t i = 0; i < block.size(); i++) block[i] = normal(7, 0, i);
    Backend::upload(optimizer.grads, block.data(), block.size() * sizeof(float));
    Backend::synchronize();
    for (size_t done = block.size(); done < optimizer.plan.arena;) {
        const size_t more = std::min(done, optimizer.plan.arena - done);
        Backend::copy(optimizer.grads + done, optimizer.grads, more * sizeof(float));
        done += more;
    }
}

// Steps of this rank for about `seconds`, three at least.
template <class Backend>
Measured measure(const std::vector<TensorSpec>& specs, const Options& options, double seconds) {
    Measured result;
    {
        Optimizer<Backend> optimizer(specs, options);
        fill_gradients(optimizer);
        auto step = [&](Timeline<Backend>& timeline) {
            size_t reached = timeline.point();
            auto until_here = [&](const char* name) {
                const size_t begin = std::exchange(reached, timeline.point());
                timeline.span(name, 0, begin, reached);
            };
            optimizer.step(1e-4f, 1e-4f, [&](Phase phase) { until_here(phase_names[phase]); });
            optimizer.need_all();
            until_here("wait");
        };
        auto run = [&](int times, std::deque<Timeline<Backend>>& timelines) {
            timelines.clear();
            for (int i = 0; i < times; i++) step(timelines.emplace_back());
            typename Backend::Event done;
            done.record();
            wait_until([&] { return done.done(); }, "the steps to finish");
        };
        std::deque<Timeline<Backend>> timelines;
        run(1, timelines);  // warms up
        const double begin = seconds_now();
        run(1, timelines);
        // An all-reduce in place multiplies the gradients by the ranks in every step: not so often that they overflow.
        const double most = std::min(50.0, 90 / std::log2(std::max(2, world.size)));
        int times = int(std::min(most, std::max(3.0, seconds / (seconds_now() - begin))));
        broadcast_host(&times, sizeof times);
        fill_gradients(optimizer);
        run(times, timelines);

        result.batches = optimizer.batches;
        std::vector<double> whole;
        std::map<std::string, std::vector<double>> phases;
        std::vector<std::vector<double>> of_batches(optimizer.batches.size());
        for (const Timeline<Backend>& timeline : timelines) {
            const auto& spans = timeline.spans;
            whole.push_back(timeline.ms(spans.front().begin, spans.back().end));
            size_t batch = 0;
            std::map<std::string, double> sums;
            for (const auto& span : spans) {
                const double ms = timeline.ms(span.begin, span.end);
                sums[span.name] += ms;
                if (span.name == std::string("ns")) of_batches[batch++].push_back(ms);
            }
            for (const auto& [name, ms] : sums) phases[name].push_back(ms);
        }
        result.ms = median(whole);
        for (const auto& [name, all] : phases) result.phases[name] = median(all);
        for (const auto& all : of_batches) result.batch_ms.push_back(median(all));
    }
    Backend::free_all();
    return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// What is compared

struct Variant {
    const char *name, *optimizer, *muon_batch;
    int muon_tile;
    bool portable;
};
constexpr Variant kVariants[] = {{"adamw", "adamw", "shape", 0, false},
                                 {"muon_one_portable", "muon", "one", 0, true},
                                 {"muon_one", "muon", "one", 0, false},
                                 {"muon_portable", "muon", "shape", 0, true},
                                 {"muon", "muon", "shape", 0, false},
                                 {"dmuon", "dmuon", "shape", 0, false},
                                 {"dmuon_tile_256", "dmuon", "shape", 256, false}};

struct BenchFlags {
    std::string models = "d12,d24,d36,d48", emulate = "1,2,4,8,16,32,64", only, json;
    std::map<std::string, std::string> logs;  // by model
    double seconds = 0.5;                     // of a measurement
    Options options;                          // what the program's own flags say
};

inline BenchFlags parse_bench_flags(int argc, char** argv) {
    BenchFlags flags;
    for (int i = 1; i < argc; i++) {
        const std::string argument = argv[i];
        if (argument.compare(0, 2, "--") != 0)
            usage_fail("'%s' is no flag: see the head of bench_optimizer.cu", argv[i]);
        if (i + 1 == argc) usage_fail("%s needs a value", argv[i]);
        const std::string name = argument.substr(2), value = argv[++i];
        if (name == "models") flags.models = value;
        else if (name == "emulate") flags.emulate = value;
        else if (name == "only") flags.only = value;
        else if (name == "json") flags.json = value;
        else if (name == "seconds") flags.seconds = atof(value.c_str());
        else if (name == "log") flags.logs[value.substr(0, value.find('='))] = value.substr(value.find('=') + 1);
        else set_flag(flags.options, find_flag(name), value);
    }
    for (const std::string& name : split_list(flags.only)) {
        std::string known;
        for (const Variant& variant : kVariants) known += std::string(" ") + variant.name;
        if ((known + " ").find(" " + name + " ") == std::string::npos)
            usage_fail("--only '%s' is none of%s", name.c_str(), known.c_str());
    }
    return flags;
}

// The median of what a step takes beside its optimizer, from the seventh step on; NAN without such a log.
inline double rest_of_step(const std::string& path) {
    if (path.empty()) return NAN;
    std::ifstream file(path);
    if (!file) usage_fail("--log: cannot read %s", path.c_str());
    std::vector<double> rest;
    int lines = 0;
    for (std::string line; std::getline(file, line);) {
        auto value = [&](const char* key) {
            const size_t at = line.find(std::string("\"") + key + "\": ");
            return at == std::string::npos ? NAN : atof(line.c_str() + at + strlen(key) + 4);
        };
        if (++lines > 6) rest.push_back(value("step_ms") - value("optimizer_ms"));
    }
    if (rest.empty()) usage_fail("--log: %s has no seventh step", path.c_str());
    return median(rest);
}

template <class Backend>
class Benchmark {
    const BenchFlags& flags;
    const BenchModel& model;
    const double rest = rest_of_step(flags.logs.count(model.name) ? flags.logs.at(model.name) : "");
    FILE* const json;
    std::map<std::pair<int, std::string>, double> ms;  // by ranks and variant
    struct BatchLine {
        std::string variant;
        int ranks;
        NsBatch batch;
        double ms, flops, predicted;
    };
    std::vector<BatchLine> batch_lines;

    // One rank for each kind of work that ranks have.
    static std::vector<int> different_ranks(const Plan& plan, const Options& options) {
        std::set<std::vector<int>> seen;
        std::vector<int> ranks;
        for (int r = 0; r < plan.ranks; r++) {
            std::vector<int> work;
            for (const auto& [count, m, n] : ns_batches(plan, options, r)) work.insert(work.end(), {count, m, n});
            if (seen.insert(work).second) ranks.push_back(r);
        }
        return ranks;
    }

    // ms of the floor: see the head of this file. NAN where a peak is not known.
    static double floor_ms(const Plan& plan, const Options& options) {
        const double bandwidth = Bench<Backend>::peak_bandwidth(), rate = Backend::peak_flops();
        if (bandwidth == 0 || rate == 0) return NAN;
        const double element = sizeof(typename Backend::real),
                     of_x = 2.0 * double(ns_type_bytes(ns_config(options, 1, 1).type));
        double bytes = double(plan.adamw_elements()) * (7 * sizeof(float) + element), flops = 0;
        for (const Piece& piece : plan.pieces) {
            if (!plan.is_muon(piece.tensor)) continue;
            bytes += double(piece.count) * (5 * sizeof(float) + of_x + element);
            flops += ns_flops(options, piece, plan.tensors[piece.tensor]);
        }
        return (bytes / bandwidth + flops / rate) / plan.ranks * 1e3;
    }

    static std::string cell(const char* format, double x) { return std::isfinite(x) ? strprintf(format, x) : "n/a"; }

    void line(int ranks, const Variant& variant, const Plan& plan, const Options& options, const Measured& m) {
        const double state = (2.0 * double(plan.state_elements) + double(plan.adamw_state())) * sizeof(float);
        const Prediction prediction = predict(plan, options, sizeof(typename Backend::real));
        const bool alone = world.size == 1, is_gpu = Backend::peak_flops() > 0;
        // The portable kernels have no prediction, nor has a CPU.
        const double predicted = variant.portable ? NAN : prediction.total() - (alone ? prediction.exposed : 0);
        const double error = is_gpu ? 100 * (predicted / m.ms - 1) : NAN, floor = floor_ms(plan, options);
        auto phase = [&](const char* name) { return m.phases.count(name) ? m.phases.at(name) : 0; };
        const double passes = phase("clip") + phase("adamw") + phase("momentum") + phase("update"),
                     waits = phase("reduce") + phase("gather") + phase("wait");
        say("| %d | %s | %.3f | %.3f | %.3f | %.3f | %s | %s | %s | %.2f | %s | %s |\n", ranks, variant.name, m.ms,
            phase("ns"), passes, waits, cell("%.2f", rest + m.ms).c_str(), cell("%.3f", floor).c_str(),
            cell("%.0f%%", 100 * floor / m.ms).c_str(), state / 1048576, cell("%.3f", predicted).c_str(),
            cell("%+.0f%%", error).c_str());
        fflush(stdout);
        ms[{ranks, variant.name}] = m.ms;
        for (size_t b = 0; b < m.batches.size() && options.muon_batch != "one"; b++) {
            const auto& [count, rows, cols] = m.batches[b];
            batch_lines.push_back({variant.name, ranks, m.batches[b], m.batch_ms[b],
                                   count * counted_ns<FlopCounter>(options, rows, cols),
                                   variant.portable ? NAN : ns_seconds(options, m.batches[b]) * 1e3});
        }
        if (!json || world.rank != 0) return;
        auto number_or_null = [](double x) { return json_number("%.6g", x); };
        fprintf(json,
                "{\"model\": \"%s\", \"ranks\": %d, \"emulated\": %s, \"optimizer\": \"%s\", \"ms\": %.6g, \"ns_ms\": "
                "%.6g, "
                "\"passes_ms\": %.6g, \"waits_ms\": %.6g, \"step_ms\": %s, \"floor_ms\": %s, \"state_bytes\": %.0f, "
                "\"predicted_ms\": %s}\n",
                model.name.c_str(), ranks, alone && ranks > 1 ? "true" : "false", variant.name, m.ms, phase("ns"),
                passes, waits, number_or_null(rest + m.ms).c_str(), number_or_null(floor).c_str(), state,
                number_or_null(predicted).c_str());
        fflush(json);
    }

    bool asked(const Variant& variant) const {
        const std::vector<std::string> only = split_list(flags.only);
        return only.empty() || std::find(only.begin(), only.end(), variant.name) != only.end();
    }

    void run(int ranks, const Variant& variant) {
        Options options = flags.options;
        options.optimizer = variant.optimizer;
        options.muon_batch = variant.muon_batch;
        if (variant.muon_tile) options.muon_tile = variant.muon_tile;
        const Plan plan(model.specs, options, ranks);
        size_t need = Optimizer<Backend>::bytes(plan) + (size_t(256) << 20);  // tables, and what the libraries take
        for (const NsBatch& batch : ns_batches(plan, options, 0))
            need = std::max(need, Optimizer<Backend>::bytes(plan) + (size_t(256) << 20) +
                                      NsWorkspace::bytes(batch.count, round_up(batch.m, 8), round_up(batch.n, 8),
                                                         ns_config(options, batch.m, batch.n).type));
        size_t free = Backend::memory_available();
        broadcast_host(&free, sizeof free);  // all leave out the same
        if (need > free) {
            say("| %d | %s | left out: %.1f GiB are needed, %.1f free |\n", ranks, variant.name, double(need) / 0x1p30,
                double(free) / 0x1p30);
            return;
        }
#ifdef __CUDACC__
        portable_kernels = variant.portable || flags.options.kernels == "portable";
#endif
        if (world.size > 1) {
            Measured mine = measure<Bench<Backend>>(model.specs, options, flags.seconds);
            for (const std::string& other : gather_host(std::to_string(mine.ms)))
                mine.ms = std::max(mine.ms, atof(other.c_str()));
            return line(ranks, variant, plan, options, mine);
        }
        Measured slowest;
        for (int r : different_ranks(plan, options)) {
            const Pretend pretend(r, ranks);
            Measured one = measure<Alone<Backend>>(model.specs, options, flags.seconds);
            if (one.ms > slowest.ms) slowest = one;
        }
        line(ranks, variant, plan, options, slowest);
    }

    void print_batches() const {
        if (batch_lines.empty()) return;
        say("\n%s, Newton-Schulz by shape:\n\n| optimizer | ranks | matrices | ms | TFLOP/s | predicted | off by |\n"
            "|---|---|---|---|---|---|---|\n",
            model.name.c_str());
        for (const BatchLine& b : batch_lines)
            say("| %s | %d | %d of %d x %d | %.3f | %.1f | %s | %s |\n", b.variant.c_str(), b.ranks, b.batch.count,
                b.batch.m, b.batch.n, b.ms, b.flops / b.ms / 1e9, cell("%.3f", b.predicted).c_str(),
                Backend::peak_flops() > 0 ? cell("%+.0f%%", 100 * (b.predicted / b.ms - 1)).c_str() : "n/a");
    }

    void print_factors(const std::vector<int>& all_ranks) const {
        say("\n%s, from vanilla Muon one by one (portable kernels) to DMuon:\n\n| ranks | optimizer | batching | "
            "kernel | "
            "ownership | shares | step |\n|---|---|---|---|---|---|---|\n",
            model.name.c_str());
        for (int ranks : all_ranks) {
            auto of = [&](const char* name) {
                const auto found = ms.find({ranks, name});
                return found == ms.end() ? NAN : found->second;
            };
            const double one = of("muon_one_portable"), batched = of("muon_portable"), kernel = of("muon"),
                         dmuon = of("dmuon");
            const double all = one / dmuon, factors[] = {one / batched, batched / kernel, kernel / dmuon};
            auto share = [&](int i) { return cell("%.0f%%", 100 * std::log(factors[i]) / std::log(all)); };
            say("| %d | %s | %s | %s | %s | %s, %s, %s | %s |\n", ranks, cell("%.2fx", all).c_str(),
                cell("%.2fx", factors[0]).c_str(), cell("%.2fx", factors[1]).c_str(), cell("%.2fx", factors[2]).c_str(),
                share(0).c_str(), share(1).c_str(), share(2).c_str(),
                cell("%.2fx", (rest + one) / (rest + dmuon)).c_str());
        }
    }

  public:
    Benchmark(const BenchFlags& flags_, const BenchModel& model_, FILE* json_)
        : flags(flags_), model(model_), json(json_) {}

    void run() {
        std::vector<int> all_ranks = {world.size};
        if (world.size == 1) {
            all_ranks.clear();
            for (const std::string& n : split_list(flags.emulate)) all_ranks.push_back(positive_int(n, "--emulate"));
        }
        size_t hidden = 0;
        for (const TensorSpec& spec : model.specs) hidden += spec.hidden() ? spec.size() : 0;
        say("\n## %s: %.1f M parameters, %.1f M of them in hidden matrices\n\n"
            "| ranks%s | optimizer | ms | Newton-Schulz | passes | waits | step | floor | of it | state MiB | "
            "predicted | off "
            "by |\n|---|---|---|---|---|---|---|---|---|---|---|---|\n",
            model.name.c_str(), double(parameter_count(model.specs)) / 1e6, double(hidden) / 1e6,
            world.size > 1 ? "" : ", emulated");
        for (int ranks : all_ranks)
            for (const Variant& variant : kVariants)
                if (asked(variant)) run(ranks, variant);
        print_factors(all_ranks);
        print_batches();
    }
};

template <class Backend>
void benchmark(const BenchFlags& flags) {
    Backend::start(world);
    FILE* const json = flags.json.empty() || world.rank != 0 ? nullptr : fopen(flags.json.c_str(), "we");
    if (!flags.json.empty() && world.rank == 0 && !json)
        fail("cannot write %s: %s", flags.json.c_str(), strerror(errno));
    auto peak = [](const char* format, double x) { return x > 0 ? strprintf(format, x / 1e12) : "unknown"; };
    say("%s, %d rank%s; peaks for the floor: %s TB/s, %s TFLOP/s\n", Backend::device_name().c_str(), world.size,
        world.size == 1 ? ", communication left out" : "s", peak("%.2f", Bench<Backend>::peak_bandwidth()).c_str(),
        peak("%.0f", Backend::peak_flops()).c_str());
    for (const std::string& name : split_list(flags.models)) Benchmark<Backend>(flags, bench_model(name), json).run();
    if (json && fclose(json) != 0) fail("cannot write %s: %s", flags.json.c_str(), strerror(errno));
    Backend::stop();
}

// A GPU unless --device cpu: no figure of a CPU is taken for one of a GPU.
inline bool on_gpu(const Options& options) {
    if (options.device == "cpu") return false;
#ifdef __CUDACC__
    const std::string why = Cuda::unavailable(std::max(1, options.gpus));
    if (why.empty()) return true;
    fail("no GPU can be used: %s; --device cpu runs without one", why.c_str());
#else
    fail("this build has no CUDA: install the CUDA Toolkit and run make dev again, or pass --device cpu");
#endif
}

int main(int argc, char** argv) {
    try {
        const BenchFlags flags = parse_bench_flags(argc, argv);
        const Options& options = flags.options;
        for (const std::string& name : split_list(flags.models)) bench_model(name);  // before anything starts
        start_ranks(argv, options.gpus, options.rank_timeout, [&] { on_gpu(options); });
#ifdef __CUDACC__
        on_gpu(options) ? benchmark<Cuda>(flags) : benchmark<Cpu>(flags);
#else
        if (!on_gpu(options)) benchmark<Cpu>(flags);
#endif
        stop_ranks();
        return 0;
    } catch (const Error& error) {
        fail_ranks(error.what(), error.exit_code);
    }
}
