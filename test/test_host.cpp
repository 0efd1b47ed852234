// test_host.cpp: the rooms that know no GPU: flags.h, dataloader.h, evaluate.h, checkpoint.h. Meant to run under
// AddressSanitizer and UBSan as well. All files are made in a temporary directory and removed.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <set>

#include "../checkpoint.h"
#include "../dataloader.h"
#include "../evaluate.h"
#include "../flags.h"

namespace fs = std::filesystem;

struct TempDir {
    std::string path;
    TempDir() {
        std::string name = (fs::temp_directory_path() / "train_gpt_test_XXXXXX").string();
        REQUIRE(mkdtemp(&name[0]) != nullptr);
        path = name;
    }
    ~TempDir() { fs::remove_all(path); }
    std::string operator/(const std::string& name) const { return path + "/" + name; }
};

static void write_file(const std::string& path, const std::string& content) {
    std::ofstream file(path, std::ios::binary | std::ios::trunc);
    file.write(content.data(), (std::streamsize)content.size());
    file.close();
    REQUIRE(file.good());
}

static std::string read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    REQUIRE(file.good());
    return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

// The message of the Error that body throws, with its exit code in front: "1: ...". "" if it throws none.
static std::string error_of(const std::function<void()>& body) {
    try {
        body();
    } catch (const Error& error) {
        const std::string message = error.what();
        CHECK(message.find('\n') == std::string::npos);  // one line
        return std::to_string(error.exit_code) + ": " + message;
    }
    return "";
}

static bool mentions(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// ----------------------------------------------------------------------------------------------------
// flags.h

using Args = std::vector<std::string>;

static Options parse(const Args& args) {
    std::vector<std::string> copy = {"train_gpt"};
    copy.insert(copy.end(), args.begin(), args.end());
    std::vector<char*> argv;
    for (std::string& arg : copy) argv.push_back(&arg[0]);
    return parse_flags(int(argv.size()), argv.data());
}

static Args words(const std::string& line) {
    std::istringstream in(line);
    Args args;
    for (std::string word; in >> word;) args.push_back(word);
    return args;
}

static std::string joined(const Args& args) {
    std::string line;
    for (const std::string& arg : args) line += arg + " ";
    return line;
}

static std::string parse_error(const Args& args) {
    return error_of([&] { parse(args); });
}

static bool is_number(const Flag& flag) { return flag.max > flag.min; }
static bool is_bool(const Flag& flag) { return std::holds_alternative<bool Options::*>(flag.member); }

// A legal value that is not the default.
static std::string other_value(const Flag& flag) {
    const std::string value = flag_value(flag, Options());
    if (is_bool(flag)) return value == "1" ? "0" : "1";
    if (is_number(flag)) {
        for (double number : {flag.min, flag.max}) {
            if (strprintf("%.0f", number) != value) return strprintf("%.0f", number);
        }
    }
    for (const std::string& word : split_choices(flag.values)) {
        if (word != value) return word;
    }
    FAIL("no other value for " << flag.name);
    return "";
}

// Under these flags every other one has an effect, so that none is refused for having none.
static Args with_context(const std::string& name, const Args& more) {
    Args args = words(
        "--train t --val v --optimizer dmuon --ns_coefficients keller --schedule wsd --decay_frac 0 "
        "--out o --sample_every 7 --resume auto --print_plan --total_batch 0 --steps 1000000000000000");
    if (name == "layers" || name == "heads" || name == "channels") {
        for (const char* flag : {"--layers", "--heads", "--channels"}) args.insert(args.end(), {flag, "64"});
    }
    if (name == "generate") args = words("--model /proc/self/exe");  // any file
    if (name == "final_lr_frac") args.insert(args.end(), {"--decay_frac", "0.5"});
    args.insert(args.end(), more.begin(), more.end());
    return args;
}

TEST_CASE("flags: the rows of the table are sound") {
    std::set<std::string> names;
    for (const Flag& flag : flag_table()) {
        CAPTURE(flag.name);
        CHECK(names.insert(flag.name).second);
        const std::string value = flag_value(flag, Options());
        Options options;
        if (!value.empty()) set_flag(options, flag, value);  // the default is a legal value
        CHECK(flag_value(flag, options) == value);

        set_flag(options, flag, other_value(flag));  // two rows don't share a member
        for (const Flag& other : flag_table()) {
            const bool changed = flag_value(other, options) != flag_value(other, Options());
            CHECK(changed == (&other == &flag));
        }
        const std::vector<std::string> shown = non_default_flags(options);
        REQUIRE(shown.size() == 1);
        CHECK(shown[0] == std::string("--") + flag.name + " " + flag_value(flag, options));
    }
    CHECK(non_default_flags(Options()).empty());
}

TEST_CASE("flags: nothing said means the defaults") {
    const Options options = parse({"--train", "t"});
    for (const Flag& flag : flag_table()) {
        CAPTURE(flag.name);
        const bool is_train = std::string(flag.name) == "train";
        CHECK(flag_value(flag, options) == (is_train ? "t" : flag_value(flag, Options())));
    }
}

TEST_CASE("flags: every row takes its values in both forms, and the last wins") {
    for (const Flag& flag : flag_table()) {
        const std::string name = flag.name, dashed = "--" + name;
        CAPTURE(name);
        if (name == "help") continue;  // tested below
        Args values = {other_value(flag)};
        if (!flag_value(flag, Options()).empty()) values.push_back(flag_value(flag, Options()));
        if (name == "train" || name == "val" || name == "out") values.push_back("a=b c");
        if (name == "print_plan") values = {"1"};  // the context needs it
        if (name == "layers" || name == "heads" || name == "channels") values = {"64"};
        if (name == "steps") values = {"1000000"};
        if (name == "model" || name == "resume") values = {split_choices(flag.values)[0]};
        if (name == "schedule") values = {"wsd"};
        if (name == "optimizer") values = {"muon", "dmuon"};
        if (name == "total_batch") values = {"819200", "0"};
        if (name == "sample_every") values = {"1", "1000000000000000"};
        if (name == "generate") values = {"1", "1000000000"};
        for (const std::string& value : values) {
            CAPTURE(value);
            Options expected;
            set_flag(expected, flag, value);
            const std::string other = other_value(flag);
            for (const Args& form :
                 {Args{dashed, value}, Args{dashed + "=" + value}, Args{dashed, other, dashed, value},
                  Args{dashed + "=" + other, dashed + "=" + value}}) {
                CHECK(flag_value(flag, parse(with_context(name, form))) == flag_value(flag, expected));
            }
        }
        if (is_bool(flag)) {
            for (const Args& form :
                 {Args{dashed}, Args{dashed, "--seed", "1"}, Args{dashed, "true"}, Args{dashed + "=true"}}) {
                CHECK(flag_value(flag, parse(with_context(name, form))) == "1");
            }
            Options options;
            set_flag(options, flag, "false");
            CHECK(flag_value(flag, options) == "0");
        }
    }
}

TEST_CASE("flags: every row refuses what it can't take, with exit code 2 and its name") {
    auto refused = [](const Flag& flag, const Args& args) {
        const std::string message = parse_error(args);
        CAPTURE(joined(args));
        CHECK(message.substr(0, 3) == "2: ");
        CHECK(mentions(message, std::string("--") + flag.name));
    };
    for (const Flag& flag : flag_table()) {
        const std::string dashed = std::string("--") + flag.name;
        const bool is_help = dashed == "--help";  // by itself it is obeyed, whatever follows
        CAPTURE(dashed);
        refused(flag, {dashed + "="});  // missing values
        if (!is_help) refused(flag, {dashed, ""});
        if (!is_bool(flag)) {
            refused(flag, {dashed});
            refused(flag, {dashed, "--seed", "1"});
        }
        Args bad;
        if (is_number(flag)) {
            bad = words("x 1x x1 + - . 1e nan inf -inf 0x1 1,5 1_0 1e999 --1 99999999999999999999");
            bad.insert(bad.end(), {"-99999999999999999999", "1 ", " 1"});
            bad.push_back(strprintf("%.0f", flag.min - 1));
            bad.push_back(strprintf("%.0f", flag.max + 1));
            const bool whole = !std::holds_alternative<double Options::*>(flag.member);
            if (whole) bad.insert(bad.end(), {"1.5", "1e2", "4294967297000000000"});
            const std::string above = strprintf("%.17g", std::nextafter(flag.max, 1e300));
            if (!whole) bad.insert(bad.end(), {above, "1.2.3", "-1e-300"});
            if (dashed == "--muon_weight_decay") bad.back() = "-0.5", bad.push_back("-1.01");
        } else if (is_bool(flag)) {
            bad = {"2", "yes", "True", "00", "x"};
        } else if (split_choices(flag.values).size() > 1 && !isupper(split_choices(flag.values).back()[0])) {
            bad = {"x", "Adamw", "cosine|linear", flag.values, split_choices(flag.values)[0] + "x", "CAPITALS"};
        }
        for (const std::string& value : bad) {
            CAPTURE(value);
            if (value.compare(0, 2, "--") != 0 && !is_help) refused(flag, with_context(flag.name, {dashed, value}));
            refused(flag, with_context(flag.name, {dashed + "=" + value}));
        }
    }
}

TEST_CASE("flags: what a checkpoint keeps of them") {
    std::set<std::string> kept;
    for (const Flag& flag : flag_table()) {
        if (shapes_run(flag)) kept.insert(flag.name);
    }
    CHECK(
        kept ==
        std::set<std::string>{
            "steps",      "lr",       "warmup",    "schedule", "decay_frac",      "final_lr_frac", "weight_decay",
            "beta1",      "beta2",    "grad_clip", "muon_lr",  "muon_momentum",   "nesterov",      "muon_weight_decay",
            "muon_scale", "muon_qkv", "muon_tile", "ns",       "ns_coefficients", "ns_steps",      "ns_dtype"});
    CHECK(!parse({"--train", "t"}).seq_len_given);
    CHECK(parse({"--train", "t", "--seq_len", "1024"}).seq_len_given);
}

TEST_CASE("flags: whole numbers keep 64 bits") {
    CHECK(parse({"--train", "t", "--steps", "999999999999999"}).steps == 999999999999999);
    CHECK(parse({"--train", "t", "--seed", "3000000000"}).seed == 3000000000);
}

TEST_CASE("flags: help is made of the table") {
    char* memory = nullptr;
    size_t size = 0;
    FILE* file = open_memstream(&memory, &size);
    print_help(file);
    fclose(file);
    const std::string help(memory, size);
    free(memory);
    std::istringstream words_of(help);
    std::string flat;  // with single spaces, as lines are broken anywhere
    for (std::string word; words_of >> word;) flat += word + " ";
    for (const Flag& flag : flag_table()) {
        CAPTURE(flag.name);
        std::string row = std::string("--") + flag.name + " " + flag.values + " " + flag.help;
        if (is_number(flag)) row += strprintf(" (%.15g to %.15g)", flag.min, flag.max);
        const std::string value = flag_value(flag, Options());
        if (!value.empty()) row += " [" + value + "]";
        CHECK(mentions(flat, row + " "));
        CHECK(mentions(help, std::string("\n") + flag.group + "\n"));
    }
    std::istringstream lines(help);
    for (std::string line; std::getline(lines, line);) {
        CAPTURE(line);
        CHECK(line.size() <= 112);
        CHECK((line.empty() || line.back() != ' '));
    }
    CHECK(parse({"--help"}).help);
    CHECK(parse({"-h"}).help);
    CHECK(parse({"--nonsense", "--lr", "x", "--help"}).help);  // whoever asks for help gets it
}

TEST_CASE("flags: unknown ones are named, with the nearest known one") {
    CHECK(mentions(parse_error({"--seq-len", "5"}), "2: unknown flag --seq-len: did you mean --seq_len?"));
    CHECK(mentions(parse_error({"--bacth=5"}), "--bacth: did you mean --batch?"));
    CHECK(mentions(parse_error({"--total-batch-size=5"}), "--total_batch?"));
    CHECK(mentions(parse_error({"--zzzzzz"}), "2: unknown flag --zzzzzz: see --help"));
    for (const char* word : {"--", "--=3", "stray", "-b", "-", ""}) {
        CAPTURE(word);
        CHECK(parse_error({"--train", "t", word}).substr(0, 3) == "2: ");
    }
    CHECK(mentions(parse_error({"--train", "a.bin", "b.bin"}), "'b.bin'"));  // a glob that the shell expanded
}

TEST_CASE("flags: contradictions name the flags") {
    const struct {
        const char *args, *named;  // named: what the message must contain, with | between
    } cases[] = {
        {"", "--train"},
        {"--val v", "--train"},
        {"--eval_every 5", "--eval_every|--val"},
        {"--eval_tokens 5", "--eval_tokens|--val"},
        {"--model d6 --layers 2", "--model|--layers"},
        {"--model d6 --layers 2 --heads 2 --channels 16", "--model|--layers"},
        {"--model d13", "--model|d13|d12"},
        {"--model /no/such/file.safetensors", "--model|/no/such/file.safetensors"},
        {"--layers 2", "--layers|--heads|--channels"},
        {"--layers 2 --heads 2", "--channels"},
        {"--heads 2 --channels 16", "--layers"},
        {"--layers 2 --heads 3 --channels 16", "--channels 16|--heads 3"},
        {"--layers 2 --heads 2 --channels 12", "--channels 12|8"},
        {"--layers 2 --heads 2 --channels 520", "--channels 520|--heads 2|256"},
        {"--batch 65536 --seq_len 65536", "--batch|--seq_len"},
        {"--batch 4 --seq_len 64 --total_batch 1000", "--total_batch 1000|--batch 4|--seq_len 64|1024"},
        {"--warmup 11 --steps 10", "--warmup 11|--steps 10"},
        {"--decay_frac 0.5", "--decay_frac|wsd"},
        {"--schedule constant --final_lr_frac 0.5", "--final_lr_frac|--schedule"},
        {"--schedule wsd --decay_frac 0 --final_lr_frac 0.5", "--final_lr_frac|--schedule"},
        {"--schedule wsd --warmup 60 --steps 100 --decay_frac 0.5", "--warmup|--decay_frac"},
        {"--muon_lr 0.1", "--muon_lr|--optimizer"},
        {"--muon_momentum 0.1", "--muon_momentum|--optimizer"},
        {"--nesterov", "--nesterov|--optimizer"},
        {"--muon_weight_decay 0", "--muon_weight_decay|--optimizer"},
        {"--muon_scale keller", "--muon_scale|--optimizer"},
        {"--muon_qkv split", "--muon_qkv|--optimizer"},
        {"--muon_tile 64", "--muon_tile|--optimizer"},
        {"--optimizer muon --muon_tile 1", "--muon_tile 1 is too small|64"},
        {"--optimizer muon --muon_tile 63", "--muon_tile 63 is too small|64"},
        {"--grad_clip 1e-46", "--grad_clip 1e-46 is too small|1e-6"},
        {"--grad_clip 9.9e-7", "--grad_clip 9.9e-07 is too small|1e-6"},
        {"--optimizer muon --muon_tile 100", "--muon_tile 100|multiple of 8|104"},
        {"--muon_batch one", "--muon_batch|--optimizer"},
        {"--ns gram", "--ns |--optimizer"},
        {"--ns_coefficients you", "--ns_coefficients|--optimizer"},
        {"--ns_steps 3", "--ns_steps|--optimizer"},
        {"--ns_dtype fp16", "--ns_dtype|--optimizer"},
        {"--owner lpt", "--owner|--optimizer"},
        {"--optimizer muon --owner lpt", "--owner|--optimizer dmuon"},
        {"--optimizer muon --ns_steps 6", "--ns_steps 6|polar_express"},
        {"--optimizer muon --ns_steps 6 --ns_coefficients you", "--ns_steps 6|you"},
        {"--ranks 4", "--ranks|--print_plan"},
        {"--sample_tokens 4", "--sample_tokens|--sample_every"},
        {"--temperature 1 --sample_every 0", "--temperature|--sample_every|--generate"},
        {"--top_k 5", "--top_k|--sample_every|--generate"},
        {"--generate 5", "--generate|--model CHECKPOINT"},
        {"--generate 5 --model d6", "--generate|--model CHECKPOINT"},
        {"--generate 5 --model /proc/self/exe", "--train|--generate"},
        {"--save_every 4", "--save_every|--out"},
        {"--keep 4", "--keep|--out"},
        {"--resume auto", "--resume auto|--out"},
        {"--switch_optimizer", "--switch_optimizer|--resume"},
        {"--gpus 2 --device cpu", "--gpus|--device cpu"},
        {"--head_rows 127", "--head_rows 127 is too small|128"},
    };
    for (const auto& c : cases) {
        CAPTURE(c.args);
        const bool wants_train = std::string(c.named) == "--train";
        const std::string message = parse_error(words(c.args + std::string(wants_train ? "" : " --train t")));
        CAPTURE(message);
        CHECK(message.substr(0, 3) == "2: ");
        for (const std::string& name : split_choices(c.named)) CHECK(mentions(message, name));
    }
}

TEST_CASE("flags: what is no contradiction") {
    TempDir dir;
    write_file(dir / "some.safetensors", "x");
    for (const char* args : {
             "--val v --eval_every 5",
             "--model d48",
             "--layers 2 --heads 3 --channels 24",
             "--warmup 10 --steps 10",
             "--schedule wsd --warmup 50 --steps 100 --decay_frac 0.5",
             "--optimizer muon --ns_coefficients keller --ns_steps 20",
             "--optimizer muon --muon_weight_decay -1",
             "--optimizer muon --muon_tile 64",
             "--grad_clip 1e-6",
             "--grad_clip 0",
             "--batch 3 --total_batch 3072",
             "--optimizer dmuon --owner lpt",
             "--print_plan --ranks 1000 --owner lpt --muon_qkv heads",  // of any optimizer
             "--resume some.safetensors",                               // without --out nothing is written
             "--out o --resume auto --save_every 5 --keep 9",
             "--gpus 0 --device cpu",
             "--head_rows 128 --recompute block",
         }) {
        CAPTURE(args);
        CHECK(parse_error(words(args + std::string(" --train t"))) == "");
    }
    CHECK(parse_error({"--train", "t", "--model", dir / "some.safetensors"}) == "");  // a file that is there
    CHECK(parse_error({"--train", "t", "--model", dir / "some.safetensors", "--total_batch", "96"}) ==
          "");                                                   // its seq_len decides
    CHECK(parse_error({"--print_plan", "--ranks", "8"}) == "");  // needs no data
    CHECK(parse_error(words("--generate 9 --model /proc/self/exe --temperature 0 --top_k 5 --seed 4 --device cpu "
                            "--kernels portable")) == "");  // nor does this
    CHECK(find_preset("d12")->channels == 768);
    CHECK(find_preset("d13") == nullptr);
}

// ----------------------------------------------------------------------------------------------------
// dataloader.h

static std::string shard_bytes(int32_t magic, int32_t version, uint32_t count, const std::vector<uint16_t>& tokens) {
    int32_t header[256] = {magic, version, int32_t(count)};
    std::string content(reinterpret_cast<const char*>(header), sizeof(header));
    content.append(reinterpret_cast<const char*>(tokens.data()), tokens.size() * sizeof(uint16_t));
    return content;
}

static void write_shard(const std::string& path, const std::vector<uint16_t>& tokens) {
    write_file(path, shard_bytes(20240520, 1, uint32_t(tokens.size()), tokens));
}

// n tokens first, first + 1, ...: a window's first token tells which window it is.
static std::vector<uint16_t> counting(size_t n, uint16_t first) {
    std::vector<uint16_t> tokens(n);
    std::iota(tokens.begin(), tokens.end(), first);
    return tokens;
}

static std::vector<std::unique_ptr<char[]>> allocations;  // kept to the end: a loader's thread may still be writing
static void* test_alloc(size_t bytes) {
    allocations.emplace_back(new char[bytes]());
    return allocations.back().get();
}

// Four shards of 37, 11, 0 and 1 windows of 4 + 1 tokens, no token twice.
struct SmallData {
    static constexpr int T = 4;
    TempDir dir;
    std::unique_ptr<Shards> shards;
    SmallData() {
        write_shard(dir / "x_train_000.bin", counting(37 * T + 1, 0));
        write_shard(dir / "x_train_001.bin", counting(11 * T + 4, 1000));  // lacks one token for a twelfth window
        write_shard(dir / "x_train_002.bin", counting(3, 2000));
        write_shard(dir / "x_train_003.bin", counting(T + 1, 3000));
        write_shard(dir / "x_val_000.bin", counting(5 * T, 4000));  // not in the glob
        shards.reset(new Shards(dir / "x_train_*.bin", T));
    }
};

TEST_CASE("loader: permute is one-to-one, and another shuffle under another key") {
    for (uint64_t n = 1; n < 200; n++) {
        for (uint64_t key = 0; key < 3; key++) {
            std::set<uint64_t> seen;
            for (uint64_t i = 0; i < n; i++) {
                const uint64_t p = permute(i, n, key);
                CHECK(p < n);
                seen.insert(p);
            }
            CHECK(seen.size() == n);
        }
    }
    for (uint64_t n : {uint64_t(65537), (uint64_t(1) << 40) + 1, ~uint64_t(0)}) {
        std::set<uint64_t> seen;
        for (uint64_t i = 0; i < 65537; i++) seen.insert(permute(i, n, 7));
        CHECK(seen.size() == 65537);
        CHECK(*seen.rbegin() < n);
    }
    // Every element comes first about equally often, and successive ones are not neighbours more often than by chance.
    std::vector<int> first(10, 0);
    int neighbours = 0;
    for (uint64_t key = 0; key < 10000; key++) {
        first[permute(0, 10, mix(key))]++;
        neighbours += permute(0, 10, mix(key)) + 1 == permute(1, 10, mix(key));
    }
    for (int times : first) CHECK(times == doctest::Approx(1000).epsilon(0.15));  // sigma is 3%
    CHECK(neighbours == doctest::Approx(1000).epsilon(0.15));                     // 9 of 90 pairs
}

TEST_CASE("loader: an epoch is every window once, in a new order each time") {
    SmallData data;
    const uint64_t windows = data.shards->windows();
    CHECK(windows == 49);
    CHECK(data.shards->tokens() == 149 + 48 + 3 + 5);
    CHECK(data.shards->paths().size() == 4);
    std::set<int> expected;
    for (int w = 0; w < 37; w++) expected.insert(w * 4);
    for (int w = 0; w < 11; w++) expected.insert(1000 + w * 4);
    expected.insert(3000);
    std::set<std::vector<int>> orders;
    for (uint64_t seed : {1, 2}) {
        for (uint64_t epoch = 0; epoch < 5; epoch++) {
            std::vector<int> order;
            for (uint64_t i = 0; i < windows; i++) {
                const uint16_t* tokens = data.shards->sample(epoch * windows + i, seed);
                for (int t = 1; t <= 4; t++) CHECK(tokens[t] == tokens[0] + t);  // within one shard
                order.push_back(tokens[0]);
            }
            CHECK(std::set<int>(order.begin(), order.end()) == expected);
            orders.insert(order);
        }
    }
    CHECK(orders.size() == 10);
    CHECK(data.shards->sample(~uint64_t(0), 3) != nullptr);  // no number is too large
}

// The first tokens of the windows of each step, in the order of (micro-step, rank, row).
static std::vector<std::vector<int>> windows_by_step(const Shards& shards, int ranks, int batch, int accumulation,
                                                     uint64_t first_step, int steps) {
    std::vector<std::unique_ptr<DataLoader>> loaders;
    for (int rank = 0; rank < ranks; rank++) {
        loaders.emplace_back(
            new DataLoader(shards, 65536, 42, batch, rank, ranks, accumulation, first_step, test_alloc));
    }
    std::vector<std::vector<int>> result(steps);
    for (std::vector<int>& windows : result) {
        for (int m = 0; m < accumulation; m++) {
            for (auto& loader : loaders) {
                const Batch got = loader->next();
                for (int b = 0; b < batch; b++) windows.push_back(got.inputs[b * shards.seq_len]);
            }
        }
    }
    return result;
}

TEST_CASE("loader: ranks and batch divide a step's windows, they don't choose them") {
    SmallData data;
    const auto expected = windows_by_step(*data.shards, 1, 12, 1, 0, 9);  // 108 windows: two epochs and a bit
    std::vector<int> epoch;
    for (const auto& step : expected) epoch.insert(epoch.end(), step.begin(), step.end());
    epoch.resize(49);
    CHECK(std::set<int>(epoch.begin(), epoch.end()).size() == 49);  // disjoint, whoever reads them
    const int splits[][3] = {{1, 1, 12}, {1, 4, 3}, {2, 3, 2}, {2, 6, 1}, {3, 2, 2}, {3, 4, 1}, {12, 1, 1}};
    for (const auto& split : splits) {
        CAPTURE(split[0]);
        CAPTURE(split[1]);
        CHECK(windows_by_step(*data.shards, split[0], split[1], split[2], 0, 9) == expected);
    }
    // Going on in the middle of an epoch, on any number of ranks, is as if nothing had happened.
    for (size_t at : {1, 3, 5, 8}) {
        const std::vector<std::vector<int>> rest(expected.begin() + long(at), expected.end());
        CHECK(windows_by_step(*data.shards, 1, 12, 1, at, int(rest.size())) == rest);
        CHECK(windows_by_step(*data.shards, 3, 2, 2, at, int(rest.size())) == rest);
    }
}

TEST_CASE("loader: targets, order, and how long a batch lasts") {
    TempDir dir;
    std::mt19937 random(1);
    std::vector<uint16_t> tokens(5000);
    for (uint16_t& token : tokens) token = uint16_t(random() % 2 ? random() % 50 : 65535 - random() % 3);
    write_shard(dir / "a.bin", tokens);
    const int T = 77, B = 5;
    Shards shards(dir / "a.bin", T);
    DataLoader loader(shards, 65536, 9, B, 1, 2, 3, 4, test_alloc);
    Batch before = {};
    std::vector<int> inputs_before;
    for (uint64_t number = 0; number < 40; number++) {
        const Batch batch = loader.next();
        const uint64_t step = 4 + number / 3, first = (step * 3 + number % 3) * 2 * B + B;
        for (int b = 0; b < B; b++) {
            const uint16_t* expected = shards.sample(first + uint64_t(b), 9);
            for (int t = 0; t < T; t++) {
                REQUIRE(batch.inputs[b * T + t] == expected[t]);
                REQUIRE(batch.targets[b * T + t] == expected[t + 1]);
            }
        }
        std::vector<int> order(B * T);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int i, int j) { return batch.inputs[i] < batch.inputs[j]; });
        CHECK(std::vector<int>(batch.order, batch.order + B * T) == order);

        if (number % 8 == 0) usleep(2000);  // let the thread run ahead as far as it may
        if (number > 0) CHECK(std::vector<int>(before.inputs, before.inputs + B * T) == inputs_before);
        before = batch;
        inputs_before.assign(batch.inputs, batch.inputs + B * T);
    }
}

TEST_CASE("loader: the windows in the order of the files") {
    SmallData data;
    for (int w = 0; w < 49; w++) {
        const int first = w < 37 ? w * 4 : w < 48 ? 1000 + (w - 37) * 4 : 3000;
        int inputs[4], targets[4];
        data.shards->read(data.shards->in_order(uint64_t(w)), inputs, targets, 65536);
        for (int t = 0; t < 4; t++) {
            CHECK(inputs[t] == first + t);
            CHECK(targets[t] == first + t + 1);
        }
    }
    CHECK(mentions(error_of([&] { data.shards->in_order(49); }), "internal: window 49 of 49"));
}

TEST_CASE("loader: malformed shards are refused by name") {
    TempDir dir;
    const std::vector<uint16_t> good = counting(100, 0);
    const std::string whole = shard_bytes(20240520, 1, 100, good);
    const struct {
        const char* what;
        std::string content, says;
    } cases[] = {
        {"empty", "", "is empty"},
        {"one byte", "x", "less than its header"},
        {"cut in the header", whole.substr(0, 1023), "less than its header"},
        {"cut after the header", whole.substr(0, 1024), "has 1024 bytes"},
        {"one byte short", whole.substr(0, whole.size() - 1), "has 1223 bytes"},
        {"one byte more", whole + "x", "has 1225 bytes"},
        {"two bytes more", whole + "xy", "1224"},
        {"magic", shard_bytes(20240521, 1, 100, good), "magic number 20240521"},
        {"magic of zeros", std::string(2000, '\0'), "magic number 0"},
        {"a tokenizer", shard_bytes(20240328, 2, 100, good), "is a tokenizer"},
        {"version 0", shard_bytes(20240520, 0, 100, good), "version 0"},
        {"version 2", shard_bytes(20240520, 2, 100, good), "version 2"},
        {"no tokens", shard_bytes(20240520, 1, 0, {}), "holds no tokens"},
        {"count 0 but tokens", shard_bytes(20240520, 1, 0, good), "holds no tokens"},
        {"count too low", shard_bytes(20240520, 1, 99, good), "promises 99 tokens"},
        {"count too high", shard_bytes(20240520, 1, 101, good), "promises 101 tokens"},
        {"count of 2^31", shard_bytes(20240520, 1, 0x80000000u, good), "promises 2147483648 tokens"},
        {"count of -1", shard_bytes(20240520, 1, 0xffffffffu, good), "promises 4294967295 tokens"},
    };
    write_shard(dir / "a.bin", good);  // a good one beside it doesn't help
    for (const auto& c : cases) {
        CAPTURE(c.what);
        write_file(dir / "b.bin", c.content);
        const std::string message = error_of([&] { Shards shards(dir / "*.bin", 10); });
        CAPTURE(message);
        CHECK(message.substr(0, 3) == "1: ");
        CHECK(mentions(message, dir / "b.bin"));
        CHECK(mentions(message, c.says));
        CHECK(mentions(message, "scripts/data.py"));
    }
    fs::remove(dir / "b.bin");

    CHECK(mentions(error_of([&] { Shards shards(dir / "none*.bin", 10); }), "no file matches"));
    CHECK(mentions(error_of([&] { Shards shards("", 10); }), "no file matches"));
    CHECK(mentions(error_of([&] { Shards shards(dir.path, 10); }), "is a directory"));
    CHECK(mentions(error_of([&] { Shards shards("/dev/zero", 10); }), "is not a file"));
    CHECK(error_of([&] { Shards shards(dir / "a.bin", 99); }) == "");
    const std::string few = error_of([&] { Shards shards(dir / "a.bin", 100); });
    CHECK(mentions(few, "too few tokens (100 in 1 files)"));
    CHECK(mentions(few, "--seq_len"));
}

TEST_CASE("loader: every token is looked at when it is read") {
    TempDir dir;
    write_shard(dir / "a.bin", counting(100, 0));
    for (size_t at : {0, 1, 9, 10, 11, 35, 40}) {  // inputs, targets, those that are both in one window or in two
        std::vector<uint16_t> tokens(41, 255);
        tokens[at] = 256;
        write_shard(dir / "b.bin", tokens);
        Shards shards(dir / "*.bin", 10);
        for (uint64_t w = 9; w < 13; w++) {  // those of b.bin
            CAPTURE(at);
            CAPTURE(w);
            int inputs[10], targets[10];
            auto error_under = [&](int vocab) {
                return error_of([&] { shards.read(shards.in_order(w), inputs, targets, vocab); });
            };
            CHECK(error_under(257) == "");
            CHECK(error_under(65536) == "");
            const size_t first = (w - 9) * 10;
            const std::string message = error_under(256);
            if (at < first || at > first + 10) {
                CHECK(message == "");
                continue;
            }
            CHECK(mentions(message, dir / "b.bin"));
            CHECK(mentions(message, strprintf("token 256 at position %zu,", at)));
            CHECK(mentions(message, "--vocab"));
        }
    }
}

TEST_CASE("loader: a shard overwritten under a running loader is an error, and no batch has its tokens") {
    TempDir dir;
    write_shard(dir / "a.bin", std::vector<uint16_t>(60000, 5));
    Shards shards(dir / "a.bin", 16);
    DataLoader loader(shards, 256, 1, 4, 0, 1, 1, 0, test_alloc);
    loader.next();
    write_shard(dir / "b.bin", std::vector<uint16_t>(60000, 65535));
    const std::string other = read_file(dir / "b.bin");
    std::fstream file(dir / "a.bin", std::ios::binary | std::ios::in | std::ios::out);  // the same file, in place
    file.write(other.data(), std::streamsize(other.size()));
    file.close();
    std::string message;  // a batch or two were prepared before
    for (int i = 0; i < 4 && message.empty(); i++) {
        message = error_of([&] {
            const Batch batch = loader.next();
            for (int t = 0; t < 64; t++) REQUIRE(batch.inputs[t] == 5);
        });
    }
    CHECK(mentions(message, "a.bin has token 65535 at position"));
    CHECK(error_of([&] { loader.next(); }) == message);
}

TEST_CASE("loader: a shard cut short under a running loader is an error, not a crash") {
    TempDir dir;
    write_shard(dir / "a.bin", counting(60000, 0));
    Shards shards(dir / "a.bin", 16);
    DataLoader loader(shards, 65536, 1, 4, 0, 1, 1, 0, test_alloc);
    loader.next();
    fs::resize_file(dir / "a.bin", 2048);
    std::string message;  // a batch or two were prepared before
    for (int i = 0; i < 4 && message.empty(); i++) message = error_of([&] { loader.next(); });
    CHECK(mentions(message, "cut short"));
    CHECK(error_of([&] { loader.next(); }) == message);  // and it stays one
}

TEST_CASE("loader: a shard of 5 GB") {
    TempDir dir;
    const uint64_t n = 2500000000;  // tokens, beyond 2^31; a sparse file takes no room on the disk
    const std::string path = dir / "big.bin";
    write_file(path, shard_bytes(20240520, 1, uint32_t(n), {}));
    fs::resize_file(path, 1024 + 2 * n);
    const int T = 1000;
    const uint64_t last = (n - 1) / T - 1;        // window
    const uint64_t marks[] = {0, 2147484, last};  // the middle one is the first that begins beyond token 2^31
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    for (uint64_t mark : marks) {
        const std::vector<uint16_t> tokens = counting(T, uint16_t(1 + mark % 1009));
        file.seekp((std::streamoff)(1024 + 2 * mark * T));
        file.write(reinterpret_cast<const char*>(tokens.data()), 2 * T);
    }
    file.close();
    REQUIRE(file.good());

    Shards shards(path, T);
    CHECK(shards.tokens() == n);
    CHECK(shards.windows() == 2499999);
    for (uint64_t mark : marks) {
        const uint16_t* tokens = shards.in_order(mark);
        for (int t = 0; t < T; t++) REQUIRE(tokens[t] == 1 + mark % 1009 + uint64_t(t));
    }
    int marked = 0;  // the loader finds the three marked windows among 2.5 million, and zeros elsewhere
    for (uint64_t g = 0; g < shards.windows(); g++) {
        const uint64_t w = permute(g, shards.windows(), mix(mix(mix(5)) + 1));
        for (uint64_t mark : marks) {
            if (w != mark) continue;
            DataLoader loader(shards, 65536, 5, 1, 0, 1, 1, g, test_alloc);
            const Batch batch = loader.next();
            CHECK(batch.inputs[0] == int(1 + mark % 1009));
            CHECK(batch.inputs[T - 1] == int(1 + mark % 1009) + T - 1);
            marked++;
        }
    }
    CHECK(marked == 3);
    const int highest = int(1 + last % 1009) + T - 1;
    std::vector<int> inputs(T), targets(T);
    const std::string message = error_of([&] { shards.read(shards.in_order(last), &inputs[0], &targets[0], highest); });
    CAPTURE(message);
    CHECK(mentions(message, strprintf("token %d at position %llu,", highest, (unsigned long long)(last * T + T - 1))));
}

// ----------------------------------------------------------------------------------------------------
// Tokenizer

static std::string tokenizer_bytes(int32_t magic, int32_t version, int32_t vocab, int32_t end, const Args& texts) {
    int32_t header[256] = {magic, version, vocab, end};
    std::string content(reinterpret_cast<const char*>(header), sizeof(header));
    for (const std::string& text : texts) content += char(uint8_t(text.size())) + text;
    return content;
}

TEST_CASE("tokenizer: every token comes back") {
    TempDir dir;
    Args texts;
    for (int i = 0; i < 256; i++) texts.push_back(std::string(1, char(i)));
    texts.push_back("<|endoftext|>");
    texts.push_back(std::string(255, 'x'));
    write_file(dir / "tokenizer.bin", tokenizer_bytes(20240328, 2, 258, 256, texts));
    const Tokenizer tokenizer(dir / "tokenizer.bin");
    CHECK(tokenizer.vocab == 258);
    CHECK(tokenizer.end_of_text == 256);
    for (int i = 0; i < 258; i++) CHECK(tokenizer.decode(i) == texts[size_t(i)]);
    for (int i : {-1, 258, 1 << 30}) CHECK(mentions(error_of([&] { tokenizer.decode(i); }), "outside"));
    CHECK(tokenizer.text_bytes(65) == 1);
    CHECK(tokenizer.text_bytes(257) == 255);
    CHECK(tokenizer.text_bytes(256) == 0);  // "<|endoftext|>" is no text,
    write_file(dir / "bytes.bin", tokenizer_bytes(20240328, 2, 256, 10, Args(texts.begin(), texts.begin() + 256)));
    CHECK(Tokenizer(dir / "bytes.bin").text_bytes(10) == 1);  // a newline is

    CHECK(tokenizer.identity == Tokenizer(dir / "tokenizer.bin").identity);
    texts[7] = "?";
    write_file(dir / "other.bin", tokenizer_bytes(20240328, 2, 258, 256, texts));
    CHECK(tokenizer.identity != Tokenizer(dir / "other.bin").identity);
}

TEST_CASE("tokenizer: malformed files are refused by name") {
    TempDir dir;
    const std::string path = dir / "tokenizer.bin";
    auto refused = [&](const std::string& content, const std::string& says) {
        write_file(path, content);
        const std::string message = error_of([&] { Tokenizer tokenizer(path); });
        CAPTURE(message);
        CHECK(message.substr(0, 3) == "1: ");
        CHECK(mentions(message, path));
        CHECK(mentions(message, says));
    };
    const Args texts = {"a", "bc", "def"};
    const std::string whole = tokenizer_bytes(20240328, 2, 3, 0, texts);
    for (size_t size = 0; size < whole.size(); size += size < 1000 ? 125 : 1) {
        refused(whole.substr(0, size), size < 1024 ? "header" : "ends within");
    }
    refused(whole + "x", "1 bytes after");
    refused(tokenizer_bytes(20240520, 2, 3, 0, texts), "magic number 20240520");
    refused(tokenizer_bytes(20240328, 1, 3, 0, texts), "version 1");
    for (int vocab : {0, -1, 65537}) refused(tokenizer_bytes(20240328, 2, vocab, 0, texts), "vocabulary of");
    for (int end : {-1, 3}) refused(tokenizer_bytes(20240328, 2, 3, end, texts), "ends a text");
    refused(tokenizer_bytes(20240328, 2, 4, 0, texts), "within token 3");
    refused(tokenizer_bytes(20240328, 2, 2, 0, texts), "4 bytes after");
    refused(tokenizer_bytes(20240328, 2, 3, 0, {"a", "", "b"}), "empty token 1");
    CHECK(mentions(error_of([&] { Tokenizer tokenizer(dir / "none"); }), "cannot open"));
    CHECK(mentions(error_of([&] { Tokenizer tokenizer(dir.path); }), dir.path + " is not a file"));
    // What never ends, or blocks, or is too large to be one.
    for (const char* device : {"/dev/zero", "/dev/tty", "/dev/null"})
        CHECK(mentions(error_of([&] { Tokenizer tokenizer(device); }), "is not a file"));
    REQUIRE(mkfifo((dir / "fifo").c_str(), 0600) == 0);
    CHECK(mentions(error_of([&] { Tokenizer tokenizer(dir / "fifo"); }), "is not a file"));
    write_file(dir / "huge", whole);
    fs::resize_file(dir / "huge", uint64_t(1) << 40);
    CHECK(mentions(error_of([&] { Tokenizer tokenizer(dir / "huge"); }), "1099511627776 bytes: too many"));
    fs::create_symlink(dir / "nowhere", dir / "dangling");
    CHECK(mentions(error_of([&] { Tokenizer tokenizer(dir / "dangling"); }), "cannot open"));
}

// ----------------------------------------------------------------------------------------------------
// evaluate.h

struct Question {
    int label;
    std::vector<uint16_t> context, endings[4];
};

static std::string hellaswag_bytes(const std::vector<Question>& questions, const std::vector<int32_t>& header = {}) {
    std::vector<uint16_t> all;
    size_t longest = 0;
    for (size_t i = 0; i < questions.size(); i++) {
        const Question& question = questions[i];
        std::vector<uint16_t> one = {65535, 0, uint16_t(i), uint16_t(question.label), 4};
        auto add = [&](const std::vector<uint16_t>& tokens) {
            one.push_back(uint16_t(tokens.size()));
            one.insert(one.end(), tokens.begin(), tokens.end());
        };
        add(question.context);
        for (auto& ending : question.endings) add(ending);
        one[1] = uint16_t(2 * one.size());
        longest = std::max(longest, 2 * one.size());
        all.insert(all.end(), one.begin(), one.end());
    }
    std::string content = shard_bytes(20240522, 1, uint32_t(questions.size()), all);
    const int32_t bytes = int32_t(longest);
    memcpy(&content[12], &bytes, sizeof bytes);
    if (!header.empty()) memcpy(&content[0], header.data(), header.size() * sizeof(int32_t));  // its first fields
    return content;
}

// Questions of tokens below vocab, contexts and endings of 1 to the given numbers of tokens.
static std::vector<Question> random_questions(int count, int vocab, int context, int ending, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<Question> questions(static_cast<size_t>(count));
    auto fill = [&](std::vector<uint16_t>& tokens, int most) {
        tokens.resize(1 + random() % unsigned(most));
        for (uint16_t& token : tokens) token = uint16_t(random() % unsigned(vocab));
    };
    for (Question& question : questions) {
        question.label = int(random() % 4);
        fill(question.context, context);
        for (auto& tokens : question.endings) fill(tokens, ending);
    }
    return questions;
}

TEST_CASE("hellaswag: the file comes back") {
    TempDir dir;
    const std::vector<Question> questions = random_questions(37, 500, 30, 20, 1);
    write_file(dir / "h.bin", hellaswag_bytes(questions));
    const HellaSwag file(dir / "h.bin", 500, 20);
    REQUIRE(file.examples.size() == 37);
    auto tokens = [&](const HellaSwag::Piece& piece) {
        const auto begin = file.tokens.begin() + std::ptrdiff_t(piece.begin);
        return std::vector<uint16_t>(begin, begin + piece.count);
    };
    for (size_t i = 0; i < questions.size(); i++) {
        CHECK(file.examples[i].label == questions[i].label);
        CHECK(tokens(file.examples[i].context) == questions[i].context);
        for (int e = 0; e < 4; e++) CHECK(tokens(file.examples[i].endings[e]) == questions[i].endings[e]);
    }
}

TEST_CASE("hellaswag: malformed files are refused by name") {
    TempDir dir;
    const std::string path = dir / "h.bin";
    auto refused = [&](const std::string& content, const std::string& says) {
        write_file(path, content);
        const std::string message = error_of([&] { HellaSwag file(path, 500, 20); });
        CAPTURE(message);
        CHECK(message.substr(0, 3) == "1: ");
        CHECK(mentions(message, path));
        CHECK(mentions(message, says));
    };
    const std::vector<Question> questions = random_questions(3, 500, 5, 4, 2);
    const std::string whole = hellaswag_bytes(questions);
    for (size_t size = 0; size < whole.size(); size += size < 1000 ? 125 : 1)
        refused(whole.substr(0, size), size < 1024 ? "header" : "ends ");
    refused(whole + "x", "1 bytes after");
    refused(whole + "xyz", "3 bytes after");
    refused(hellaswag_bytes(questions, {20240520}), "is a token shard");
    refused(hellaswag_bytes(questions, {7}), "magic number 7");
    refused(hellaswag_bytes(questions, {20240522, 2}), "version 2");
    for (int count : {0, -1, 65537}) refused(hellaswag_bytes(questions, {20240522, 1, count}), "examples");
    refused(hellaswag_bytes(questions, {20240522, 1, 2}), "after its last example");
    refused(hellaswag_bytes(questions, {20240522, 1, 4}), "ends before the mark of example 3 of 4");
    refused(hellaswag_bytes(questions, {20240522, 1, 3, 6}), "longest example has 6 bytes");

    auto changed = [&](const std::function<void(std::vector<Question>&)>& change) {
        std::vector<Question> others = questions;
        change(others);
        return hellaswag_bytes(others);
    };
    refused(changed([](auto& q) { q[1].label = 4; }), "ending 4 of example 1");
    refused(changed([](auto& q) { q[2].endings[3].back() = 500; }), "token 500 in example 2");
    refused(changed([](auto& q) { q[0].context[0] = 65535; }), "token 65535 in example 0");
    refused(changed([](auto& q) { q[1].context.clear(); }), "no tokens in the context of example 1");
    refused(changed([](auto& q) { q[1].endings[2].clear(); }), "no tokens in an ending of example 1");
    refused(changed([](auto& q) { q[1].endings[2].assign(21, 3); }), "ending of 21 tokens in example 1");
    auto word = [&](size_t at, uint16_t value) {  // of the first example
        std::string content = whole;
        memcpy(&content[1024 + 2 * at], &value, sizeof value);
        return content;
    };
    refused(word(0, 65534), "no mark at example 0");
    refused(word(1, 2), "says that example 0 has 2 bytes");
    refused(word(1, 60000), "says that example 0 has 60000 bytes");
    refused(word(2, 1), "number 1 at example 0");
    refused(word(4, 3), "3 endings");
    refused(word(5, 65535), "ends within the context of example 0");
    CHECK(mentions(error_of([&] { HellaSwag file(dir / "none", 500, 20); }), "cannot open HellaSwag file"));
    CHECK(mentions(error_of([&] { HellaSwag file(dir.path, 500, 20); }), "is not a file"));
    refused("", "has 0 bytes");
}

// A backend for evaluation alone. Ranks take turns: each adds to what those before it have left, so the last one has
// the sums over all.
struct TurnsBackend {
    struct Event {
        void record() {}
        bool done() const { return true; }
    };
    static inline std::vector<double> left;
    static void* alloc(size_t bytes, const char*) { return test_alloc(bytes); }
    static void* alloc_host(size_t bytes) { return test_alloc(bytes); }
    static void upload(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
    static void download(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
    static void zero(void* to, size_t bytes) { memset(to, 0, bytes); }
    static void sum_losses(double* sum, const float* losses, int n) {
        *sum = std::accumulate(losses, losses + n, *sum);
    }
    static int all_reduce(double* x, size_t n) {
        if (world.rank == 0) left.assign(n, 0);
        for (size_t i = 0; i < n; i++) x[i] = left[i] += x[i];
        return 0;
    }
    static void wait(int) {}
};

// Its losses depend on the target and on every token of the row before it; small integers, whose sums are exact in any
// order.
struct FakeModel {
    std::vector<int> input_room, target_room;
    std::vector<float> loss_room;
    const int seq_len;
    int *inputs, *targets, seen_B = 0, seen_T = 0;
    float* losses;
    FakeModel(int batch, int seq_len_)
        : input_room(size_t(batch) * size_t(seq_len_)),
          target_room(input_room),
          loss_room(input_room.size()),
          seq_len(seq_len_),
          inputs(input_room.data()),
          targets(target_room.data()),
          losses(loss_room.data()) {}
    void forward(const int* tokens, int B, int T) {
        REQUIRE((tokens == inputs && T <= seq_len && size_t(B) * size_t(T) <= input_room.size()));
        seen_B = B, seen_T = T;
    }
    static float loss_of(const std::vector<int>& before, int target) {
        uint64_t hash = 7;
        for (int token : before) hash = mix(hash * 31 + uint64_t(token));
        return float(mix(hash + uint64_t(target)) % 64);
    }
    void loss(int B, int T) {
        REQUIRE((B == seen_B && T == seen_T));
        for (int b = 0; b < B; b++)
            for (int t = 0; t < T; t++)
                losses[b * T + t] = loss_of({inputs + b * T, inputs + b * T + t + 1}, targets[b * T + t]);
    }
};

template <class Body>
static void as_each_rank(int ranks, Body body) {
    const World before = world;
    for (world.rank = 0, world.size = ranks; world.rank < ranks; world.rank++) body();
    world = before;
}

TEST_CASE("hellaswag: scores by their definition, on any number of ranks, batches and contexts") {
    TempDir dir;
    Args texts;  // of one or two parts, with spaces and characters of several bytes among them
    std::mt19937 random(3);
    const Args parts = {"a", " ", "bc", "\xc3\xa9", "\xe2\x82\xac", "\xf0\x9f\x98\x80"};
    for (int i = 0; i < 200; i++) texts.push_back(parts[random() % 6] + (random() % 2 ? parts[random() % 3] : ""));
    write_file(dir / "tokenizer.bin", tokenizer_bytes(20240328, 2, 200, 0, texts));
    const Tokenizer tokenizer(dir / "tokenizer.bin");
    const std::vector<Question> questions = random_questions(199, 200, 90, 25, 6);
    write_file(dir / "h.bin", hellaswag_bytes(questions));

    std::vector<int> counts[3];
    for (const int T : {25, 64, 100, 130}) {
        // From the definition, on the questions as they were written.
        int right[3] = {}, cut = 0;
        for (const Question& question : questions) {
            double by[3][4];  // the sum, per token, per character
            for (int e = 0; e < 4; e++) {
                std::vector<int> row(question.context.begin(), question.context.end());
                row.insert(row.end(), question.endings[e].begin(), question.endings[e].end());
                cut += int(row.size()) > T + 1;
                while (int(row.size()) > T + 1) row.erase(row.begin());
                double sum = 0;
                const size_t ending = question.endings[e].size();
                for (size_t t = row.size() - ending; t < row.size(); t++)
                    sum += FakeModel::loss_of({row.begin(), row.begin() + std::ptrdiff_t(t)}, row[t]);
                std::string text;
                for (uint16_t token : question.endings[e]) text += texts[token];
                if (text[0] == ' ') text.erase(0, 1);
                int characters = 0;
                for (size_t i = 0; i < text.size(); characters++) {
                    const int lead = uint8_t(text[i]);
                    i += lead < 0x80 ? 1 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : 4;
                }
                by[0][e] = sum, by[1][e] = sum / double(ending), by[2][e] = sum / std::max(characters, 1);
            }
            for (int way = 0; way < 3; way++)
                right[way] += std::min_element(by[way], by[way] + 4) - by[way] == question.label;
        }
        CHECK((cut > 0) == (T < 114));
        for (int way = 0; way < 3; way++) counts[way].push_back(right[way]);

        const HellaSwag file(dir / "h.bin", 200, T);
        for (int ranks : {1, 2, 3, 7})
            for (int batch : {1, 5, 64}) {
                std::optional<HellaSwagScores> scores;
                as_each_rank(ranks, [&] {
                    FakeModel model(batch, T);
                    HellaSwagEvaluator<TurnsBackend, FakeModel> evaluator(file, &tokenizer, model, batch, T);
                    CHECK(int(evaluator.rows_cut()) == cut);
                    scores = evaluator.run([](size_t, double) {});
                });
                REQUIRE(scores);
                CHECK(scores->acc == right[0] / 199.0);
                CHECK(scores->acc_norm == right[1] / 199.0);
                CHECK(scores->acc_norm_chars == right[2] / 199.0);
            }
    }
    CHECK(std::set<std::vector<int>>(counts, counts + 3).size() == 3);  // or one could stand for another
}

TEST_CASE("hellaswag: losses that are equal, or not finite; no tokenizer; a request to stop") {
    TempDir dir;
    std::vector<Question> questions(2, Question{0, {1}, {{1, 1}, {1}, {1, 1, 1, 1}, {1}}});
    questions[1].label = 3;
    write_file(dir / "h.bin", hellaswag_bytes(questions));
    const HellaSwag file(dir / "h.bin", 2, 4);
    auto scores = [&](const std::vector<double>& losses) { return hellaswag_scores(file, nullptr, losses.data()); };
    const HellaSwagScores equal = scores({4, 4, 8, 5, 4, 4, 8, 5});
    CHECK(equal.acc == 0.5);       // the first of 4 and 4
    CHECK(equal.acc_norm == 0.5);  // the first of 2, 4, 2, 5
    CHECK(std::isnan(equal.acc_norm_chars));
    const HellaSwagScores odd = scores({4, NAN, -INFINITY, NAN, NAN, INFINITY, NAN, 9});
    CHECK(odd.acc == 1);
    CHECK(odd.acc_norm == 1);
    const HellaSwagScores none = scores({NAN, NAN, NAN, NAN, INFINITY, INFINITY, INFINITY, INFINITY});
    CHECK(none.acc == 0);  // nor the first of those
    CHECK(none.acc_norm == 0);

    FakeModel model(1, 4);
    HellaSwagEvaluator<TurnsBackend, FakeModel> evaluator(file, nullptr, model, 1, 4);
    CHECK(evaluator.run([](size_t, double) {}));
    stop_signal = SIGTERM;
    CHECK(!evaluator.run([](size_t, double) {}));
    stop_signal = 0;
}

TEST_CASE("evaluation: nats per token and bits per byte of the same windows, on any number of ranks and batches") {
    TempDir dir;
    const int T = 6, vocab = 50;
    Args texts;
    for (int i = 0; i < vocab; i++) texts.push_back(std::string(size_t(1 + i % 7), 'x'));
    write_file(dir / "tokenizer.bin", tokenizer_bytes(20240328, 2, vocab, 13, texts));
    const Tokenizer tokenizer(dir / "tokenizer.bin");
    std::mt19937 random(5);
    std::vector<uint16_t> first(20 * T + 3), second(11 * T + 1);
    for (auto* tokens : {&first, &second})
        for (uint16_t& token : *tokens) token = uint16_t(random() % vocab);
    write_shard(dir / "val_0.bin", first);
    write_shard(dir / "val_1.bin", second);
    const Shards shards(dir / "val_*.bin", T);

    for (uint64_t windows : {1, 17, 31}) {
        double nats = 0, bytes = 0;
        for (uint64_t w = 0; w < windows; w++) {
            const uint16_t* window = w < 20 ? &first[w * T] : &second[(w - 20) * T];
            for (int t = 0; t < T; t++) {
                nats += double(FakeModel::loss_of({window, window + t + 1}, window[t + 1]));
                bytes += window[t + 1] == 13 ? 0 : double(texts[window[t + 1]].size());
            }
        }
        for (int ranks : {1, 2, 5, 40})
            for (int batch : {1, 4, 100})
                for (const Tokenizer* known : {&tokenizer, static_cast<const Tokenizer*>(nullptr)}) {
                    Validation found = {};
                    as_each_rank(ranks, [&] {
                        FakeModel model(batch, T);
                        found = Evaluator<TurnsBackend, FakeModel>(shards, known, model, windows, batch, vocab).run();
                    });
                    CHECK(found.loss == nats / double(windows * T));
                    if (known) CHECK(found.bits_per_byte == nats / (std::log(2.0) * bytes));
                    else CHECK(std::isnan(found.bits_per_byte));
                }
    }
}

// ----------------------------------------------------------------------------------------------------

TEST_CASE("printable: nothing that steers a terminal, nothing that is lost") {
    const auto bytes = [](std::initializer_list<int> list) {
        std::string text;
        for (int byte : list) text += char(byte);
        return text;
    };
    const std::string plain = "Tab\t, line\nß é 漢 😀 \\x41 ~";
    CHECK(printable(plain) == plain);
    CHECK(printable(bytes({'a', 0, 'b'})) == "a\\x00b");
    CHECK(printable(bytes({0x1b, '[', '2', 'J', '\r', 0x7f, 0x08})) == "\\x1b[2J\\x0d\\x7f\\x08");
    CHECK(printable(bytes({0xc2, 0x9b, 0xc2, 0xa0})) == "\\xc2\\x9b" + bytes({0xc2, 0xa0}));  // CSI; a hard space
    CHECK(printable(bytes({0xe6, 0xbc})) == "\\xe6\\xbc");                                    // cut off
    CHECK(printable(bytes({0xe6, 'x'})) == "\\xe6x");
    CHECK(printable(bytes({0xc0, 0x80, 0xe0, 0x80, 0x80})) == "\\xc0\\x80\\xe0\\x80\\x80");  // longer than need be
    CHECK(printable(bytes({0xed, 0xa0, 0x80})) == "\\xed\\xa0\\x80");                        // a surrogate
    CHECK(printable(bytes({0xf4, 0x90, 0x80, 0x80, 0xff})) == "\\xf4\\x90\\x80\\x80\\xff");  // beyond Unicode
    for (int c = 0; c < 256; c++)                                                            // one byte alone
        CHECK(printable(bytes({c})).size() == (c == '\n' || c == '\t' || (c >= 32 && c < 127) ? 1 : 4));
}

// ----------------------------------------------------------------------------------------------------
// checkpoint.h

using Tensors = std::vector<std::pair<TensorInfo, std::vector<float>>>;

static Tensors make_tensors(const std::vector<std::vector<int64_t>>& shapes, unsigned seed) {
    std::mt19937 random(seed);
    Tensors tensors;
    for (const auto& shape : shapes) {
        TensorInfo info = {strprintf("blocks.%zu.weight", tensors.size()), shape};
        std::vector<float> values(info.elements());
        for (float& value : values) {
            const uint32_t bits = uint32_t(random());  // NaNs, infinities and denormals are values like any other
            memcpy(&value, &bits, 4);
        }
        tensors.emplace_back(info, values);
    }
    return tensors;
}

static const Meta some_meta = {{"step", "100"}, {"config", "layers 2, heads 3"}, {"empty", ""}, {"text", "  {[:,]}  "}};

// chunks: 0 hands the bytes over in one piece, other numbers in random pieces.
static void save(const std::string& dir, int64_t step, const Tensors& tensors, int64_t keep = 99, unsigned chunks = 0) {
    std::vector<TensorInfo> infos;
    std::string bytes;
    for (const auto& [info, values] : tensors) {
        infos.push_back(info);
        bytes.append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
    }
    CheckpointWriter writer(dir, step, some_meta, infos);
    std::mt19937 random(chunks);
    for (size_t done = 0; done < bytes.size();) {
        const size_t some = random() % (bytes.size() / 5 + 2);
        const size_t piece = chunks ? std::min(bytes.size() - done, some) : bytes.size();
        writer.append(bytes.data() + done, piece);
        done += piece;
    }
    writer.finish(keep);
}

static void check_equal(const std::string& path, const Tensors& tensors) {
    const Checkpoint checkpoint(path);
    CHECK(checkpoint.meta == some_meta);
    REQUIRE(checkpoint.tensors.size() == tensors.size());
    for (size_t i = 0; i < tensors.size(); i++) {
        const auto& [info, values] = tensors[i];
        CHECK(checkpoint.tensors[i].name == info.name);
        CHECK(checkpoint.tensors[i].shape == info.shape);
        CHECK(memcmp(checkpoint.data(info.name, values.size()), values.data(), values.size() * 4) == 0);
    }
}

static std::set<std::string> names_in(const std::string& dir) {
    std::set<std::string> names;
    for (const auto& entry : fs::directory_iterator(dir)) names.insert(entry.path().filename().string());
    return names;
}

static std::string open_error(const std::string& path) {
    return error_of([&] { Checkpoint(path).verify(); });
}

static const std::vector<std::vector<int64_t>> small_shapes = {{3, 5}, {1}, {16}, {2, 3, 4}, {}};

static std::string header_of(const std::string& content) {
    uint64_t length;
    memcpy(&length, content.data(), 8);
    return content.substr(8, length);
}

// A file of this header, whatever it is, and data.
static void write_checkpoint(const std::string& path, const std::string& header, const std::string& data) {
    const uint64_t length = header.size();
    write_file(path, std::string(reinterpret_cast<const char*>(&length), 8) + header + data);
}

// The header filled up, with `more` spaces too many, and under the checksum that it must have.
static std::string checked_header(std::string header, size_t more = 0) {
    header.resize(round_up<size_t>(8 + header.size(), 64) - 8 + more, ' ');
    const size_t at = header.find("0000000000000000");
    return header.replace(at, 16, ckpt::hex(Checksum::of(header.data(), header.size())));
}

TEST_CASE("checksum: XXH64, any changed bit shows, and pieces don't matter") {
    // From Python: xxhash.xxh64_hexdigest(bytes(i * i % 251 for i in range(n)))
    const std::pair<size_t, uint64_t> known[] = {
        {0, 0xef46db3751d8e999u},  {1, 0xe934a84adb052768u},   {3, 0xe38ecea27964f1a0u},   {4, 0x4d0a1255b7392f55u},
        {7, 0xab23d8eaba8b0fd0u},  {8, 0x9ae9ad02529c6e94u},   {13, 0x617c923b9043222cu},  {31, 0xf802085ae7e12fa9u},
        {32, 0xabe98b5116e5ed4du}, {33, 0xd9c3a758ecff9219u},  {63, 0x9d597e61218f5977u},  {64, 0xc2b8d1eca1282124u},
        {95, 0x17ab58d0e1c261d4u}, {100, 0xa38a818449594369u}, {1000, 0x2d5f4044a731ebd7u}};
    std::string data;
    for (int i = 0; i < 1000; i++) data += char(i * i % 251);
    for (const auto& [size, sum] : known) {
        CHECK(Checksum::of(data.data(), size) == sum);
        for (size_t bit = 0; bit < size * 8; bit++) {
            std::string other = data;
            other[bit / 8] = char(other[bit / 8] ^ (1 << bit % 8));
            REQUIRE(Checksum::of(other.data(), size) != sum);
        }
        std::mt19937 random(static_cast<unsigned>(size));
        for (int round = 0; round < 50; round++) {
            Checksum pieces;
            for (size_t at = 0, piece; at < size; at += piece) {
                piece = std::min<size_t>(size - at, random() % 70);
                pieces.update(data.data() + at, piece);
            }
            REQUIRE(pieces.value() == sum);
        }
    }
}

TEST_CASE("checkpoint: round trip, and equal content makes equal files") {
    TempDir dir;
    const Tensors tensors = make_tensors({{300, 1001}, {1}, {64}, {}, {3, 5, 7}, {262144}}, 1);  // the last is 1 MiB
    save(dir / "run/a", 100, tensors);  // makes the directories
    check_equal(dir / "run/a/step_00000100.safetensors", tensors);
    for (unsigned chunks : {1, 2, 3}) {
        save(dir / "b", 100, tensors, 100, chunks);
        CHECK(read_file(dir / "b/step_00000100.safetensors") == read_file(dir / "run/a/step_00000100.safetensors"));
    }
    CHECK(names_in(dir / "b") == std::set<std::string>{"step_00000100.safetensors"});
    save(dir / "b", 7, {});  // no tensors at all
    check_equal(dir / "b/step_00000007.safetensors", {});

    const Checkpoint checkpoint(dir / "run/a/step_00000100.safetensors");
    CHECK(checkpoint.path == dir / "run/a/step_00000100.safetensors");
    CHECK(mentions(error_of([&] { checkpoint.data("blocks.9.weight", 1); }), "no tensor blocks.9.weight"));
    CHECK(mentions(error_of([&] { checkpoint.data("blocks.2.weight", 65); }), "blocks.2.weight has 64 elements"));
}

TEST_CASE("checkpoint: too many or too few bytes make no file") {
    TempDir dir;
    const std::vector<TensorInfo> infos = {{"a", {4}}, {"b", {2}}};
    const float values[7] = {};
    CHECK(error_of([&] {
              CheckpointWriter writer(dir.path, 1, {}, infos);
              writer.append(values, 28);
          }) != "");
    CHECK(error_of([&] {
              CheckpointWriter writer(dir.path, 1, {}, infos);
              writer.append(values, 23);
              writer.finish(1);
          }) != "");
    { CheckpointWriter abandoned(dir.path, 1, {}, infos); }
    for (const std::string bad : {"\"", "\\", "two\nlines", "\x7f", "na\xc3\xafve"}) {
        CHECK(error_of([&] { CheckpointWriter writer(dir.path, 1, {{bad, "x"}}, infos); }) != "");
        CHECK(error_of([&] { CheckpointWriter writer(dir.path, 1, {{"key", bad}}, infos); }) != "");
        CHECK(error_of([&] { CheckpointWriter writer(dir.path, 1, {}, {{"b" + bad, {2}}}); }) != "");
    }
    for (const auto& [first, second] : {std::pair("b", "a"), std::pair("a", "a"), std::pair("A", "a")})
        CHECK(error_of([&] { CheckpointWriter writer(dir.path, 1, {}, {{first, {2}}, {second, {2}}}); }) != "");
    CHECK(names_in(dir.path).empty());
}

TEST_CASE("checkpoint: cut anywhere, it is refused") {
    TempDir dir;
    const Tensors tensors = make_tensors(small_shapes, 2);
    save(dir.path, 1, tensors);
    const std::string path = dir / "step_00000001.safetensors", whole = read_file(path);
    std::set<size_t> cuts = {0, 1, 8, 9};  // in the length, in the header, then the tensors
    size_t at = 8 + header_of(whole).size();
    cuts.insert(at);
    for (const auto& [info, values] : tensors) cuts.insert(at += values.size() * 4);
    CHECK(at == whole.size());
    std::mt19937 random(4);
    for (int i = 0; i < 200; i++) cuts.insert(random() % whole.size());
    for (size_t cut : std::set<size_t>(cuts)) {
        if (cut > 0) cuts.insert(cut - 1);
        cuts.insert(cut + 1);
    }
    for (size_t cut : cuts) {
        if (cut == whole.size()) continue;
        std::string content = whole.substr(0, cut);
        content.resize(cut, 'x');  // one cut is beyond the end: a byte too many
        write_file(path, content);
        const std::string message = open_error(path);
        CAPTURE(cut);
        CHECK(message.substr(0, 3) == "1: ");
        CHECK(mentions(message, path));
    }
    write_file(path, whole + whole);
    CHECK(open_error(path) != "");
    write_file(path, whole);
    check_equal(path, tensors);
}

TEST_CASE("checkpoint: every single bit counts") {
    TempDir dir;
    auto flip = [](int fd, size_t bit) {
        char byte;
        REQUIRE(pread(fd, &byte, 1, (off_t)(bit / 8)) == 1);
        byte = char(byte ^ (1 << bit % 8));
        REQUIRE(pwrite(fd, &byte, 1, (off_t)(bit / 8)) == 1);
    };
    std::mt19937 random(5);
    SUBCASE("all of a small one") {
        save(dir.path, 1, make_tensors({{3}, {17}}, 3));
        const std::string path = dir / "step_00000001.safetensors";
        const int fd = open(path.c_str(), O_RDWR);
        std::set<std::string> messages;
        for (size_t bit = 0; bit < fs::file_size(path) * 8; bit++) {
            flip(fd, bit);
            const std::string message = open_error(path);
            CAPTURE(bit);
            CHECK(message != "");
            messages.insert(message.substr(message.rfind(".safetensors")));
            flip(fd, bit);
        }
        close(fd);
        CHECK(open_error(path) == "");
        auto seen = [&](const std::string& part) {
            return std::any_of(messages.begin(), messages.end(),
                               [&](auto& message) { return mentions(message, part); });
        };
        for (const char* part :
             {"is not a checkpoint of train_gpt", "is damaged: it ends within its header", "its tensors begin at byte",
              "its header has changed", "its header has no checksum of tensor blocks.0.weight", "its header has no \"",
              "tensor blocks.1.weight has changed", "is not where its shape puts it",
              "has an impossible number at byte", "has odd characters after byte",
              "tensor blocks.1.weight is out of order"})
            CHECK_MESSAGE(seen(part), std::string(part));
    }
    SUBCASE("1,000 at random of a larger one, one to four at a time") {
        save(dir.path, 1, make_tensors({{100, 100}, {77}, {33, 5}}, 3));
        const std::string path = dir / "step_00000001.safetensors";
        const size_t bits = fs::file_size(path) * 8;
        const int fd = open(path.c_str(), O_RDWR);
        for (int i = 0; i < 1000; i++) {
            std::set<size_t> flips;
            for (int k = 0; k <= i % 4; k++) flips.insert(random() % bits);
            for (size_t bit : flips) flip(fd, bit);
            CHECK(open_error(path) != "");
            for (size_t bit : flips) flip(fd, bit);
        }
        close(fd);
        CHECK(open_error(path) == "");
    }
}

TEST_CASE("checkpoint: a tensor is verified before it is handed out") {
    TempDir dir;
    const Tensors tensors = make_tensors({{3}, {1000}, {17}}, 3);
    save(dir.path, 1, tensors);
    const std::string path = dir / "step_00000001.safetensors";
    std::string content = read_file(path);
    content[content.size() / 2] ^= 1;  // in the middle one
    write_file(path, content);
    const Checkpoint checkpoint(path);
    CHECK(memcmp(checkpoint.data("blocks.0.weight", 3), tensors[0].second.data(), 12) == 0);
    CHECK(memcmp(checkpoint.data("blocks.2.weight", 17), tensors[2].second.data(), 68) == 0);
    CHECK(mentions(error_of([&] { checkpoint.data("blocks.1.weight", 1000); }), "blocks.1.weight has changed"));
    CHECK(mentions(error_of([&] { checkpoint.verify(); }), "blocks.1.weight has changed"));
}

TEST_CASE("checkpoint: a header of any other form is refused even under a right checksum") {
    TempDir dir;
    const std::string path = dir / "a.safetensors";
    auto refused = [&](const std::string& header, const std::string& data) {
        write_checkpoint(path, header, data);
        return open_error(path);
    };
    // The header of one tensor of 3 x 1 elements, then what may be in its places; filled up to 64 bytes and checked.
    const std::string sum = ckpt::hex(Checksum::of("twelve bytes", 12));
    auto with = [&](const std::string& metadata, const std::string& tensor) {
        return checked_header("{\"__metadata__\":{" + metadata + "}" + tensor + "}");
    };
    const std::string meta =
                          "\"checksum\":\"0000000000000000\",\"checksum.a\":\"" + sum + "\",\"format\":\"train_gpt\"",
                      place = ",\"a\":{\"data_offsets\":[0,12],\"dtype\":\"F32\",\"shape\":[3,1]}";
    CHECK(refused(with(meta, place), "twelve bytes") == "");
    struct {
        std::string from, to, said;  // one edit of the good header
    } const edits[] = {
        {"[3,1]", "[1,3,1]", ""},  // another shape of as many elements is as good
        {"[3,1]", "[3,99]", "tensor a has an impossible shape"},
        {"[3,1]", "[2]", "tensor a is not where its shape puts it"},
        {"[3,1]", "[]", "tensor a is not where its shape puts it"},
        {"[3,1]", "[0]", "tensor a has an impossible shape"},
        {"[3,1]", "[03,1]", "its header has changed"},
        {"[3,1]", "[3,1,]", "an impossible number"},
        {"[3,1]", "[-3,-1]", "an impossible number"},
        {"[3,1]", "[3.0,1]", "no ]}"},
        {"[3,1]", "[3e0,1]", "no ]}"},
        {"[3,1]", "[3, 1]", "an impossible number"},
        {"[3,1]", "[99999999999999999999,1]", "an impossible number"},
        {"[3,1]", "[4294967296,4294967296]", "an impossible number"},
        {"[3,1]", "[[3,1]]", "an impossible number"},
        {"[0,12]", "[0,8]", "tensor a is not where its shape puts it"},
        {"[0,12]", "[4,16]", "tensor a is not where its shape puts it"},
        {"[0,12]", "[4,12]", "tensor a is not where its shape puts it"},
        {"[0,12]", "[12,0]", "tensor a is not where its shape puts it"},
        {"[0,12]", "[0,18446744073709551615]", "an impossible number"},
        {"[0,12]", "[0,12,12]", "no ],"},
        {"F32", "F16", "no ],"},
        {"F32", "BF16", "no ],"},
        {"\"a\":{", "\"a\": {", "no :{"},
        {"\"a\":{", "\"\\u0061\":{", "odd characters"},
        {"\"a\":{", "\"Z\":{", "tensor Z is out of order"},
        {"\"a\":{", "\"__metadata__\":{", "tensor __metadata__ is out of order"},
        {"\"a\":{", "\"b\":{", "no checksum of tensor b"},
        {"\"shape\"", "\"size\"", "no ],"},
        {",\"shape\":[3,1]", "", "no ],"},
        {"]}}", "]},}", "no \""},
        {"]}}", "]}", "no }"},
        {"]}}", "]}}}", "its header has changed"},
        {"]}}", "]}} x", "its header has changed"},
        {"\"format\":", "\"format\" :", "not a checkpoint of train_gpt"},
        {"\"format\":\"train_gpt\"", "\"format\":\"pt\"", "not a checkpoint of train_gpt"},
        {"\"format\":\"train_gpt\"", "\"format\":\"train_gpt\",\"step\":7", "no \""},
        {"\"format\":\"train_gpt\"", "\"format\":\"train_gpt\",\"step\":{\"a\":{\"b\":{}}}", "no \""},
        {"\"format\":\"train_gpt\"", "\"format\":\"train_gpt\",\"a\":\"b\"", "its header has changed"},  // unsorted
        {"\"format\":\"train_gpt\"", "\"format\":\"train_gpt\",\"z\":\"b\",\"z\":\"b\"", "its header has changed"},
        {"\"format\":\"train_gpt\"", "\"format\":\"train_gpt\",", "no \""},
        {sum, sum.substr(1), "no checksum of tensor a"},
        {sum, "0x" + sum.substr(2), "no checksum of tensor a"},
        {sum, std::string(16, 'F'), "no checksum of tensor a"},
        {sum, std::string(16, 'f'), "tensor a has changed"},
    };
    for (const auto& edit : edits) {
        std::string metadata = meta, tensor = place + "}";  // with the brace that ends it all
        std::string& text = mentions(metadata, edit.from) ? metadata : tensor;
        REQUIRE(mentions(text, edit.from));
        text.replace(text.find(edit.from), edit.from.size(), edit.to);
        const std::string message =
            refused(checked_header("{\"__metadata__\":{" + metadata + "}" + tensor), "twelve bytes");
        CAPTURE(edit.to);
        CAPTURE(message);
        CHECK((message == "") == edit.said.empty());
        CHECK(mentions(message, edit.said));
    }
    const std::string second = ",\"a\":{\"data_offsets\":[12,24],\"dtype\":\"F32\",\"shape\":[3]}";
    CHECK(mentions(refused(with(meta, place + second), "twelve bytestwelve bytes"), "tensor a is out of order"));
    CHECK(mentions(refused("{}", ""), "not a checkpoint of train_gpt"));

    // Right in all but that its tensors would begin at a byte that is no multiple of 64: floats at odd addresses.
    for (size_t more : {1, 3, 4, 32, 63})
        CHECK(mentions(refused(checked_header("{\"__metadata__\":{" + meta + "}" + place + "}", more), "twelve bytes"),
                       "its tensors begin at byte"));
    CHECK(mentions(refused(checked_header("{\"__metadata__\":{" + meta + "}" + place + "}", 64), "twelve bytes"),
                   "its header has changed"));

    for (uint64_t size : {~uint64_t(0), ~uint64_t(0) - 7, uint64_t(1) << 63, uint64_t(101)}) {
        write_file(path, std::string(reinterpret_cast<const char*>(&size), 8) + "{" + std::string(99, ' '));
        CHECK(mentions(open_error(path), "ends within its header"));
    }
    const uint64_t longest = ckpt::kMaxHeaderBytes + 1;
    write_file(path, std::string(reinterpret_cast<const char*>(&longest), 8) + "{");
    fs::resize_file(path, 8 + longest);  // most of it a hole
    CHECK(mentions(open_error(path), "a header of 100000001 bytes"));
    CHECK(mentions(open_error(dir / "none.safetensors"), "cannot open"));
    CHECK(mentions(open_error(dir.path), "not a file"));
    write_shard(path, counting(100, 0));
    CHECK(mentions(open_error(path), "not a checkpoint of train_gpt"));
    write_file(path, "TRAINGPT" + std::string(100, '\0'));
    CHECK(mentions(open_error(path), "of an earlier version of train_gpt"));
}

TEST_CASE("checkpoint: the newest stay, others' files too") {
    TempDir dir;
    const Tensors tensors = make_tensors({{3}}, 1);
    const Args others = {"log.jsonl",
                         "step_1.safetensors.bak",
                         "step_x.safetensors",
                         "my_step_00000001.safetensors",
                         "step_0000000a.safetensors",
                         "step_.safetensors",
                         "step_1.safetensors"};
    for (const std::string& other : others) write_file(dir / other, "x");
    auto expect = [&](const Args& names) {
        std::set<std::string> expected(others.begin(), others.end());
        expected.insert(names.begin(), names.end());
        CHECK(names_in(dir.path) == expected);
    };
    for (int64_t step : {5, 10, 15, 20}) save(dir.path, step, tensors, 2);
    expect({"step_00000015.safetensors", "step_00000020.safetensors"});
    save(dir.path, 25, tensors, 3);
    expect({"step_00000015.safetensors", "step_00000020.safetensors", "step_00000025.safetensors"});
    save(dir.path, 17, tensors, 3);  // resumed at 15: what came later then is no longer part of this run
    expect({"step_00000015.safetensors", "step_00000017.safetensors"});
    save(dir.path, 17, tensors, 1);  // the same step again
    expect({"step_00000017.safetensors"});
    save(dir.path, 99999999, tensors, 2);
    save(dir.path, 100000000, tensors, 2);  // ordered as numbers, not as words
    save(dir.path, 123456789012, tensors, 3);
    CHECK(list_checkpoints(dir.path) == Args{dir / "step_123456789012.safetensors", dir / "step_100000000.safetensors",
                                             dir / "step_99999999.safetensors"});
    CHECK(list_checkpoints(dir / "none").empty());
}

TEST_CASE("checkpoint: auto takes the newest good one and says what it passes over") {
    TempDir dir;
    const Tensors tensors = make_tensors(small_shapes, 1);
    for (int64_t step : {1, 2, 3, 4}) save(dir.path, step, tensors);
    fs::resize_file(dir / "step_00000004.safetensors", 300);
    std::string content = read_file(dir / "step_00000003.safetensors");
    content[content.size() - 100] ^= 1;
    write_file(dir / "step_00000003.safetensors", content);
    write_file(dir / "step_00000009.safetensors.tmp", content);

    char* memory = nullptr;
    size_t size = 0;
    FILE* file = open_memstream(&memory, &size);
    CHECK(newest_good_checkpoint(dir.path, file) == dir / "step_00000002.safetensors");
    fflush(file);
    CHECK(mentions(memory, dir / "step_00000004.safetensors"));
    CHECK(mentions(memory, dir / "step_00000003.safetensors"));
    CHECK(!mentions(memory, dir / "step_00000002.safetensors"));
    fs::resize_file(dir / "step_00000001.safetensors", 0);
    fs::resize_file(dir / "step_00000002.safetensors", 0);
    CHECK(newest_good_checkpoint(dir.path, file) == "");
    CHECK(newest_good_checkpoint(dir / "none", file) == "");
    fclose(file);
    free(memory);
}

// As nobody, to whom permissions mean something.
static std::string error_as_nobody(const std::function<void()>& body) {
    const bool root = geteuid() == 0;
    if (root) REQUIRE(seteuid(65534) == 0);
    const std::string message = error_of(body);
    if (root) REQUIRE(seteuid(0) == 0);
    return message;
}

TEST_CASE("checkpoint: auto passes over damage alone; what cannot be read is an error") {
    TempDir dir;
    for (int64_t step : {1, 2}) save(dir.path, step, make_tensors({{3}}, 1));
    fs::permissions(dir.path, fs::perms(0755));
    const std::string newest = dir / "step_00000002.safetensors";
    auto choose = [&] { newest_good_checkpoint(dir.path, stderr); };
    fs::permissions(newest, fs::perms(0));
    std::string message = error_as_nobody(choose);
    CHECK(mentions(message, newest));
    CHECK(mentions(message, "Permission denied"));
    fs::permissions(newest, fs::perms(0644));
    CHECK(error_as_nobody(choose) == "");

    const int spare = open("/dev/null", O_RDONLY);  // no descriptor is left
    rlimit files, none;
    REQUIRE(getrlimit(RLIMIT_NOFILE, &files) == 0);
    none = files, none.rlim_cur = rlim_t(spare) + 1;  // one for the directory while it is listed ...
    close(spare);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
    CHECK(error_of(choose) == "");
    none.rlim_cur = rlim_t(spare);  // ... or none at all
    REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
    message = error_of(choose);
    REQUIRE(setrlimit(RLIMIT_NOFILE, &files) == 0);
    CHECK(mentions(message, "Too many open files"));

    fs::permissions(dir.path, fs::perms(0));  // a directory that cannot be listed is not an empty one
    message = error_as_nobody(choose);
    fs::permissions(dir.path, fs::perms(0755));
    CHECK(mentions(message, dir.path));
    CHECK(mentions(message, "Permission denied"));
    CHECK(mentions(error_of([&] { newest_good_checkpoint(newest, stderr); }), "Not a directory"));
}

TEST_CASE("checkpoint: a directory that can't be written is one clear line") {
    TempDir dir;
    const Tensors tensors = make_tensors({{3}}, 1);
    write_file(dir / "file", "x");
    for (const std::string out : {"file", "file/below", "/proc/no/such/place"}) {
        const std::string where = out[0] == '/' ? out : dir / out;
        const std::string message = error_of([&] { save(where, 1, tensors); });
        CAPTURE(message);
        CHECK(mentions(message, "1: cannot write checkpoint " + where));
        CHECK(mentions(message, "--out"));
    }
    save(dir / "out", 1, tensors);
    fs::permissions(dir / "out", fs::perms(0555));
    fs::permissions(dir.path, fs::perms(0755));
    const std::string message = error_as_nobody([&] { save(dir / "out", 2, tensors); });
    CHECK(mentions(message, "Permission denied"));
    fs::permissions(dir / "out", fs::perms(0755));
    check_equal(dir / "out/step_00000001.safetensors", tensors);
    CHECK(names_in(dir / "out").size() == 1);
}

// Runs body in a child process, which ends with what it returns, or with 99 if it throws.
static pid_t start_child(const std::function<int()>& body) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child > 0) return child;
    try {
        _exit(body());
    } catch (const std::exception& error) {
        fprintf(stderr, "in a child process: %s\n", error.what());
        _exit(99);
    }
}

// The exit code, or 128 + the signal that ended it.
static int wait_for(pid_t child) {
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}

// Saves step 2 into a place with no room for it. 0: refused as it should be.
static int save_without_room(const std::string& dir, const std::string& reason) {
    std::string message;
    try {
        save(dir, 2, make_tensors({{500, 1000}}, 2));
    } catch (const Error& error) {
        message = error.what();
    }
    const bool said = mentions(message, reason) && mentions(message, "step_00000002.safetensors");
    const bool clean = names_in(dir) == std::set<std::string>{"step_00000001.safetensors"};
    const bool older_good = newest_good_checkpoint(dir, stderr) == dir + "/step_00000001.safetensors";
    if (!said) fprintf(stderr, "message: %s\n", message.c_str());
    return (said ? 0 : 1) + (clean ? 0 : 2) + (older_good ? 0 : 4);
}

TEST_CASE("checkpoint: no room under a limit on the size of files, and the older one stays") {
    TempDir dir;
    save(dir.path, 1, make_tensors({{3}}, 1));
    for (rlim_t limit : {0, 100, 1000000, 2000100}) {  // in the table, in the tensor, in the checksums
        CHECK(wait_for(start_child([&] {
                  signal(SIGXFSZ, SIG_IGN);
                  const rlimit size = {limit, limit};
                  setrlimit(RLIMIT_FSIZE, &size);
                  return save_without_room(dir.path, "File too large");
              })) == 0);
    }
}

// A file system of 1 MiB at dir, in the view of this process alone: gone when it ends.
static bool mount_small(const std::string& dir) {
    return unshare(CLONE_NEWNS) == 0 && mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
           mount("tmpfs", dir.c_str(), "tmpfs", 0, "size=1m") == 0;
}
static bool may_mount() {
    const pid_t child = fork();
    if (child == 0) _exit(mount_small(fs::temp_directory_path()) ? 0 : 1);
    int status = 1;
    return child > 0 && waitpid(child, &status, 0) == child && status == 0;
}

TEST_CASE("checkpoint: no room on a full file system, and the older one stays" * doctest::skip(!may_mount())) {
    TempDir dir;
    CHECK(wait_for(start_child([&] {
              if (!mount_small(dir.path)) return 8;
              save(dir.path, 1, make_tensors({{3}}, 1));
              return save_without_room(dir.path, "No space left on device");
          })) == 0);
}

// What body, in a child process, says on stderr, with how it ends in front: "1: ...".
static std::string end_of_child(const std::function<void()>& body) {
    TempDir dir;
    const int code = wait_for(start_child([&] {
        if (!freopen((dir / "said").c_str(), "w", stderr)) return 8;
        end_on_unreadable_files();
        body();
        return 0;
    }));
    return std::to_string(code) + ": " + read_file(dir / "said");
}

TEST_CASE("a page of a mapped file that cannot be read ends the process with a line; any other SIGBUS as ever") {
    TempDir dir;
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    const std::string name = dir / "odd\n\x1b[2J", reason = ": an I/O error, or it was cut short while it was read\n";
    write_file(name, std::string(3 * page, 'x'));
    write_file(dir / "other", std::string(3 * page, 'x'));
    write_file(dir / "empty", "");
    auto read_byte = [](const char* at) { return *static_cast<const volatile char*>(at); };
    const std::string said = end_of_child([&] {
        const MappedFile empty(dir / "empty", "file"), file(name, "token shard"), other(dir / "other", "file");
        fs::resize_file(name, page);
        if (read_byte(file.data) == 'x') read_byte(file.data + 3 * page - 1);
    });
    CHECK(said == "1: train_gpt: cannot read token shard " + dir.path + "/odd\\n\\x1b[2J" + reason);
    CHECK(end_of_child([&] {
              const MappedFile other(dir / "other", "file");  // not the one that is at fault
              const int fd = open(name.c_str(), O_RDONLY);
              const void* pages = mmap(nullptr, 3 * page, PROT_READ, MAP_SHARED, fd, 0);
              read_byte(static_cast<const char*>(pages) + page);
          }) == std::to_string(128 + SIGBUS) + ": ");
    CHECK(end_of_child([] { kill(getpid(), SIGBUS); }) == std::to_string(128 + SIGBUS) + ": ");
}

TEST_CASE("checkpoint: auto does not take one that cannot be read for damaged" * doctest::skip(!may_mount())) {
    TempDir dir;
    const std::string newest = dir / "step_00000002.safetensors";
    const std::string said = end_of_child([&] {
        if (!mount_small(dir.path)) return;
        for (int64_t step : {1, 2}) save(dir.path, step, make_tensors({{100, 100}}, 1));
        const int fd = open(newest.c_str(), O_RDWR);
        if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 20000, 10000) != 0) return;
        const int rest = open((dir / "rest").c_str(), O_WRONLY | O_CREAT, 0600);
        while (write(rest, dir.path.data(), 1) == 1) {}  // until nothing is left for the pages of the hole
        newest_good_checkpoint(dir.path, stderr);
    });
    CHECK(said ==
          "1: train_gpt: cannot read checkpoint " + newest + ": an I/O error, or it was cut short while it was read\n");
}

TEST_CASE("checkpoint: killed while writing, the older one stays") {
    TempDir dir;
    const Tensors tensors = make_tensors({{1000, 1000}, {7}}, 1);
    save(dir.path, 1, tensors);
    SUBCASE("in the middle of a tensor") {
        CHECK(wait_for(start_child([&] {
                  CheckpointWriter writer(dir.path, 2, {}, {tensors[0].first});
                  writer.append(tensors[0].second.data(), 3000000);
                  return raise(SIGKILL);
              })) == 128 + SIGKILL);
        CHECK(names_in(dir.path) ==
              std::set<std::string>{"step_00000001.safetensors", "step_00000002.safetensors.tmp"});
        CHECK(newest_good_checkpoint(dir.path, stderr) == dir / "step_00000001.safetensors");
        save(dir.path, 3, tensors);  // sweeps what was left
        CHECK(names_in(dir.path) == std::set<std::string>{"step_00000001.safetensors", "step_00000003.safetensors"});
    }
    SUBCASE("at any moment") {
        std::mt19937 random(6);
        int64_t newest = 1;
        for (int round = 0; round < 30; round++) {
            const pid_t child = start_child([&]() -> int {
                for (int64_t step = newest + 1;; step++) save(dir.path, step, tensors, 2);
            });
            usleep(random() % 60000);
            kill(child, SIGKILL);
            CHECK(wait_for(child) == 128 + SIGKILL);
            const std::vector<std::string> files = list_checkpoints(dir.path);
            REQUIRE(!files.empty());
            for (const std::string& path : files) check_equal(path, tensors);
            const int64_t now = ckpt::step_in_name(fs::path(files[0]).filename().string(), ckpt::kSuffix);
            CHECK(now >= newest);
            newest = now;
        }
        MESSAGE("saved " << newest - 1 << " times in 30 lives");
        save(dir.path, newest + 1, tensors, 2);  // and one that lives on tidies up
        CHECK(names_in(dir.path).size() == 2);
    }
}
