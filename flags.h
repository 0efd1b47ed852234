// flags.h: the command line. Everything lives in one table: names, types, ranges, choices, help; the defaults are those
// of a default-constructed Options. The parser, --help, the start-up listing and the tests all walk the table, so they
// can't disagree. Read: Options (what a run can be told), flag_table() (the same, one row a flag), parse_flags(), then
// check_contradictions().
#pragma once
#include <sys/stat.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cinttypes>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <set>
#include <string>
#include <type_traits>
#include <variant>
#include <vector>

#include "common.h"

struct Options {
    // data
    std::string train, val, hellaswag;
    int seq_len = 1024;
    bool seq_len_given = false;  // else --model CHECKPOINT brings its own
    int vocab = 0;
    // model
    std::string model;
    int layers = 0, heads = 0, channels = 0;
    // batch
    int batch = 8;
    int64_t total_batch = 0;
    int64_t steps = 1000;
    // optimizer
    std::string optimizer = "adamw";
    double lr = 6e-4;
    int64_t warmup = 0;
    std::string schedule = "cosine";
    double decay_frac = 0.2, final_lr_frac = 0.1;
    double weight_decay = 0.1, beta1 = 0.9, beta2 = 0.95, grad_clip = 1.0;
    int64_t seed = 1337;
    // muon
    double muon_lr = 0, muon_momentum = 0.95;
    bool nesterov = true;
    double muon_weight_decay = -1;
    std::string muon_scale = "moonlight", muon_qkv = "split";
    int muon_tile = 0;
    std::string muon_batch = "shape";
    std::string ns = "standard", ns_coefficients = "polar_express";
    int ns_steps = 5;
    std::string ns_dtype = "bf16", owner = "round_robin";
    bool print_plan = false;
    int ranks = 0;
    // run
    int64_t eval_every = 100, eval_tokens = 131072;
    int64_t sample_every = 0, sample_tokens = 256;
    double temperature = 0.8;
    int64_t top_k = 0, generate = 0;
    std::string out;
    int64_t save_every = 0, keep = 2;
    std::string resume;
    bool switch_optimizer = false;
    std::string device = "auto";
    int gpus = 0;
    std::string kernels = "auto";
    std::string recompute = "none";
    int head_rows = 0;
    bool graph = true, profile = false, tune = true;
    double rank_timeout = 300;
    bool help = false, version = false;
};

// Sizes that --model knows by name (GPT-2's, and d6 for a quick look).
struct ModelPreset {
    const char* name;
    int layers, heads, channels;
};
inline const ModelPreset model_presets[] = {
    {"d6", 6, 6, 384}, {"d12", 12, 12, 768}, {"d24", 24, 16, 1024}, {"d36", 36, 20, 1280}, {"d48", 48, 25, 1600}};

inline const ModelPreset* find_preset(const std::string& name) {  // null if there is no such preset
    for (const ModelPreset& preset : model_presets) {
        if (name == preset.name) return &preset;
    }
    return nullptr;
}

struct Flag {
    const char* group;
    const char* name;  // also the name of the member
    std::variant<int Options::*, int64_t Options::*, double Options::*, bool Options::*, std::string Options::*> member;
    const char* values;  // what may follow, as --help shows it: "a|b" takes just these; a word in CAPITALS is free text
    const char* help;
    double min = 0, max = 0;  // numbers only, both ends included
};

inline const std::vector<Flag>& flag_table() {
    using O = Options;
    static const double many = 1e15;           // no limit that a run could meet, and exact as a double
    static const double below_one = 0.999999;  // a decay of 1 never forgets, and its bias correction divides by zero
    static const char* const on_off = "0|1";
    static const std::vector<Flag> table = {
        {"data", "train", &O::train, "GLOB",
         "token shards to train on, quoted: 'data/fineweb/train_*.bin'; required unless --steps is 0"},
        {"data", "val", &O::val, "GLOB", "token shards to evaluate on"},
        {"data", "hellaswag", &O::hellaswag, "FILE",
         "score HellaSwag at the end, after the last step was saved; of scripts/data.py hellaswag"},
        {"data", "seq_len", &O::seq_len, "N", "tokens per sequence; --model CHECKPOINT brings its own", 1, 65536},
        {"data", "vocab", &O::vocab, "N", "vocabulary; 0: tokenizer.bin's beside the shards, else 50257", 0, 65536},

        {"model", "model", &O::model, "d6|d12|d24|d36|d48|CHECKPOINT",
         "size by name, or a checkpoint to take size and weights from (scripts/hf.py import makes one of GPT-2's own); "
         "without a word d12 (GPT-2's 124M)"},
        {"model", "layers", &O::layers, "N", "size by hand: blocks; with --heads and --channels", 0, 1000},
        {"model", "heads", &O::heads, "N", "size by hand: attention heads", 0, 1000},
        {"model", "channels", &O::channels, "N", "size by hand: width, a multiple of 8 and of --heads", 0,
         kMaxChannels},

        {"batch", "batch", &O::batch, "N", "sequences per rank and micro-step: what fits in memory", 1, 65536},
        {"batch", "total_batch", &O::total_batch, "TOKENS",
         "tokens per optimizer step over all ranks, by gradient accumulation; 0: --batch x --seq_len x ranks", 0, 1e9},
        {"batch", "steps", &O::steps, "N",
         "optimizer steps in all, those before a resume included; 0: just evaluate --model on --val and --hellaswag", 0,
         many},

        {"optimizer", "optimizer", &O::optimizer, "adamw|muon|dmuon",
         "AdamW; Muon for the hidden matrices, all of them on every rank; DMuon: the same, each on its owner alone"},
        {"optimizer", "lr", &O::lr, "X", "peak learning rate of AdamW, also of its part under muon and dmuon", 0, 10},
        {"optimizer", "warmup", &O::warmup, "STEPS", "steps in which the learning rate rises linearly from 0", 0, many},
        {"optimizer", "schedule", &O::schedule, "cosine|linear|constant|wsd",
         "learning rate after the warmup: falls all the way (cosine, linear), stays, or stays and falls late (wsd)"},
        {"optimizer", "decay_frac", &O::decay_frac, "X", "wsd: the share of --steps in which it falls, linearly", 0, 1},
        {"optimizer", "final_lr_frac", &O::final_lr_frac, "X", "where it ends, as a share of the peak", 0, 1},
        {"optimizer", "weight_decay", &O::weight_decay, "X", "decoupled weight decay, on 2-D tensors only", 0, 10},
        {"optimizer", "beta1", &O::beta1, "X", "AdamW: decay of the mean of the gradient", 0, below_one},
        {"optimizer", "beta2", &O::beta2, "X", "AdamW: decay of the mean of its square", 0, below_one},
        {"optimizer", "grad_clip", &O::grad_clip, "X",
         "the gradient of all parameters together is scaled down to this norm, before AdamW and before Muon's "
         "momentum; at least 1e-6; 0: off",
         0, 1e9},
        {"optimizer", "seed", &O::seed, "N", "of initial weights, order of the data, sampling", 0, many},

        {"muon", "muon_lr", &O::muon_lr, "X", "peak learning rate of the hidden matrices; 0: twice --lr", 0, 10},
        {"muon", "muon_momentum", &O::muon_momentum, "X", "decay of the momentum", 0, below_one},
        {"muon", "nesterov", &O::nesterov, on_off, "orthogonalise gradient + momentum, not the momentum alone"},
        {"muon", "muon_weight_decay", &O::muon_weight_decay, "X", "of hidden matrices; -1: as --weight_decay", -1, 10},
        {"muon", "muon_scale", &O::muon_scale, "keller|moonlight",
         "size of an update: sqrt(max(1, rows/cols)), wants --muon_lr about 0.02; or 0.2 sqrt(max(rows, cols)): as "
         "large as AdamW's, so that AdamW's learning rates carry over"},
        {"muon", "muon_qkv", &O::muon_qkv, "split|fused|heads",
         "how attention's (3C, C) matrix is orthogonalised: Q, K and V apart, as one, or each head apart"},
        {"muon", "muon_tile", &O::muon_tile, "T",
         "orthogonalise T x T tiles, each by itself (Hierarchical Muon), T at least 64 and a multiple of 8; 0: whole "
         "matrices",
         0, 65536},
        {"muon", "muon_batch", &O::muon_batch, "shape|one",
         "which matrices go through Newton-Schulz together: all of a shape, or each by itself, as the paper's baseline "
         "(slow)"},
        {"muon", "ns", &O::ns, "standard|gram|auto",
         "Newton-Schulz on the matrix; on its small Gram matrix, fewer FLOPs if one side is longer, best in fp16 (in "
         "bf16 nearly low-rank matrices can blow up); auto: gram where one side is at least four times the other and "
         "--ns_dtype is fp16 or fp32, else standard"},
        {"muon", "ns_coefficients", &O::ns_coefficients, "keller|polar_express|you", "polynomials of the steps"},
        {"muon", "ns_steps", &O::ns_steps, "N", "Newton-Schulz steps; polar_express and you have 5 at most", 1, 20},
        {"muon", "ns_dtype", &O::ns_dtype, "bf16|fp16|fp32", "type of Newton-Schulz's operands (sums are fp32)"},
        {"muon", "owner", &O::owner, "round_robin|lpt",
         "dmuon: who owns a matrix: dealt out in turn shape by shape, or the largest first to the least loaded rank"},
        {"muon", "print_plan", &O::print_plan, on_off,
         "print who owns what at what cost, and which --batch fits, and exit; no GPU, no data"},
        {"muon", "ranks", &O::ranks, "N", "--print_plan: for this many ranks; 0: those started", 0, 1000000},

        {"run", "eval_every", &O::eval_every, "STEPS", "validation loss so often; 0: only at the end", 0, many},
        {"run", "eval_tokens", &O::eval_tokens, "TOKENS",
         "length of an evaluation: the first of --val, in whole sequences, divided among the ranks; at most all of it",
         1, many},
        {"run", "sample_every", &O::sample_every, "STEPS", "write a sample of text so often; 0: never", 0, many},
        {"run", "sample_tokens", &O::sample_tokens, "N", "length of a sample", 1, 1e5},
        {"run", "temperature", &O::temperature, "X", "of sampling; 0: always the likeliest token", 0, 100},
        {"run", "top_k", &O::top_k, "K", "sample among the K likeliest tokens; 0: among all", 0, 65536},
        {"run", "generate", &O::generate, "N",
         "no training: read token numbers from the standard input and write N that follow, one a line; with --model "
         "CHECKPOINT. scripts/generate.py does it with text; 0: train",
         0, 1e9},
        {"run", "out", &O::out, "DIR",
         "where log.jsonl and checkpoints (.safetensors) go; without it nothing is written"},
        {"run", "save_every", &O::save_every, "STEPS", "save a checkpoint so often; 0: only at the end", 0, many},
        {"run", "keep", &O::keep, "N", "checkpoints to keep, the newest", 1, 1e9},
        {"run", "resume", &O::resume, "auto|PATH", "go on from the newest good checkpoint in --out, or from this one"},
        {"run", "switch_optimizer", &O::switch_optimizer, on_off, "allow a resume under another --optimizer"},
        {"run", "device", &O::device, "auto|cuda|cpu", "where to compute; auto: on a GPU if there is one"},
        {"run", "gpus", &O::gpus, "N", "start N processes on this machine, one a GPU; 0: just this one", 0, 1024},
        {"run", "recompute", &O::recompute, "none|gelu|layernorm|block",
         "what the backward pass computes again, for less memory and more time: GELU; LayerNorm as well; or a block "
         "but "
         "for its attention. --print_plan says what each saves"},
        {"run", "head_rows", &O::head_rows, "N",
         "logits in memory at a time, in rows of the vocabulary, at least 128; 0: of all --batch x --seq_len tokens", 0,
         1e9},
        {"run", "kernels", &O::kernels, "auto|portable",
         "on a GPU: auto takes the kernels written for it (Hopper: wgmma and TMA) where there are such; portable those "
         "for every GPU since sm_80"},
        {"run", "tune", &O::tune, on_off,
         "on a GPU take the fastest algorithm for each product: timed at the first start and kept in "
         "~/.cache/train_gpt; "
         "0: the library's guess"},
        {"run", "graph", &O::graph, on_off,
         "on one GPU, without --profile: forward and backward as one CUDA graph; 0: kernel by kernel, as elsewhere"},
        {"run", "profile", &O::profile, on_off,
         "time the phases of each step; two steps in full go to trace.json in --out (scripts/timeline.py draws them)"},
        {"run", "rank_timeout", &O::rank_timeout, "SECONDS", "give up on a rank that is silent for so long", 1, 1e6},
        {"run", "help", &O::help, on_off, "print this and exit"},
        {"run", "version", &O::version, on_off, "print what this build has (CUDA, NCCL, MPI, a BLAS) and exit"},
    };
    return table;
}

// The value of a flag as one would type it.
inline std::string flag_value(const Flag& flag, const Options& options) {
    return std::visit(
        [&](auto member) -> std::string {
            const auto& value = options.*member;
            using T = std::decay_t<decltype(value)>;
            if constexpr (std::is_same_v<T, std::string>) return value;
            else if constexpr (std::is_same_v<T, double>) return strprintf("%.10g", value);
            else return std::to_string(value);
        },
        flag.member);
}

// Whether a flag decides what a step does to the weights: a checkpoint keeps its value, and a resume says where the
// new run differs.
inline bool shapes_run(const Flag& flag) {
    static const std::set<std::string> others = {"optimizer", "seed", "muon_batch", "owner", "print_plan", "ranks"};
    const std::string group = flag.group, name = flag.name;
    return name == "steps" || ((group == "optimizer" || group == "muon") && others.count(name) == 0);
}

// "--lr 0.001" for each flag that differs from its default: the start-up table shows these.
inline std::vector<std::string> non_default_flags(const Options& options) {
    std::vector<std::string> changed;
    for (const Flag& flag : flag_table()) {
        const std::string value = flag_value(flag, options);
        if (value != flag_value(flag, Options())) changed.push_back(std::string("--") + flag.name + " " + value);
    }
    return changed;
}

inline void print_help(FILE* file) {
    const size_t indent = 23, width = 112;  // columns
    fprintf(file,
            "usage: train_gpt --train GLOB [--name value | --name=value ...]\n"
            "       train_gpt --model CHECKPOINT --steps 0 [--val GLOB] [--hellaswag FILE]\n"
            "       train_gpt --model CHECKPOINT --generate N [--temperature X] [--top_k K] [--seed N]\n"
            "The last of a repeated flag wins. After each: (range) and [default].\n");
    const char* group = "";
    for (const Flag& flag : flag_table()) {
        if (strcmp(group, flag.group) != 0) fprintf(file, "\n%s\n", group = flag.group);
        std::string text = flag.help;
        if (flag.max > flag.min) text += strprintf(" (%.15g to %.15g)", flag.min, flag.max);
        const std::string value = flag_value(flag, Options());
        if (!value.empty()) text += " [" + value + "]";

        std::string line = strprintf("  --%s %s", flag.name, flag.values);
        if (line.size() >= indent) {
            fprintf(file, "%s\n", line.c_str());
            line.clear();
        }
        line.resize(indent, ' ');
        for (size_t begin = 0, end; begin < text.size(); begin = end + 1) {  // word by word
            end = std::min(text.find(' ', begin), text.size());
            if (line.size() + 1 + (end - begin) > width) {
                fprintf(file, "%s\n", line.c_str());
                line.assign(indent, ' ');
            }
            line += " " + text.substr(begin, end - begin);
        }
        fprintf(file, "%s\n", line.c_str());
    }
}

// The words of "a|b|FREE".
inline std::vector<std::string> split_choices(const std::string& values) {
    std::vector<std::string> words(1);
    for (char c : values) {
        if (c == '|') words.emplace_back();
        else words.back() += c;
    }
    return words;
}

// One value from its text. Numbers are read whole: no trailing garbage, no silent wrap-around, no "nan".
inline void set_flag(Options& options, const Flag& flag, const std::string& text) {
    const char* name = flag.name;
    const char* begin = text.c_str();
    const char* end = begin + text.size();
    auto check_range = [&](bool inside) {
        if (!inside) usage_fail("--%s %s is out of range: %.15g to %.15g", name, begin, flag.min, flag.max);
    };
    std::visit(
        [&](auto member) {
            auto& value = options.*member;
            using T = std::decay_t<decltype(value)>;
            if constexpr (std::is_same_v<T, bool>) {
                const bool yes = text == "1" || text == "true", no = text == "0" || text == "false";
                if (!yes && !no) usage_fail("--%s '%s': give 0, 1, true, false, or no value for 1", name, begin);
                value = yes;
            } else if constexpr (std::is_same_v<T, std::string>) {
                bool known = false;
                for (const std::string& word : split_choices(flag.values)) {
                    known = known || word == text || isupper(word[0]);
                }
                if (!known) usage_fail("--%s '%s' is not one of %s", name, begin, flag.values);
                value = text;
            } else if constexpr (std::is_same_v<T, double>) {
                char* stop = nullptr;
                const double number = strtod(begin, &stop);
                const bool plain = text.find_first_not_of("0123456789+-.eE") == std::string::npos;
                if (!plain || stop != end) usage_fail("--%s '%s' is not a number", name, begin);
                check_range(number >= flag.min && number <= flag.max);
                value = number;
            } else {
                int64_t number = 0;
                const auto [stop, error] = std::from_chars(begin, end, number);
                const bool read = error != std::errc::invalid_argument && stop == end;
                if (!read) usage_fail("--%s '%s' is not a whole number", name, begin);
                check_range(error == std::errc() && double(number) >= flag.min && double(number) <= flag.max);
                value = T(number);
            }
        },
        flag.member);
}

// How many letters to insert, delete or replace to get from a to b.
inline size_t edit_distance(const std::string& a, const std::string& b) {
    std::vector<size_t> row(b.size() + 1);
    for (size_t j = 0; j <= b.size(); j++) row[j] = j;
    for (size_t i = 0; i < a.size(); i++) {
        size_t diagonal = row[0]++;
        for (size_t j = 0; j < b.size(); j++) {
            const size_t replaced = diagonal + (a[i] != b[j]);
            diagonal = row[j + 1];
            row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
        }
    }
    return row.back();
}

inline const Flag& find_flag(const std::string& name) {
    const Flag* nearest = nullptr;
    size_t nearest_distance = name.size() / 2 + 1;  // further away it is a guess
    for (const Flag& flag : flag_table()) {
        if (name == flag.name) return flag;
        const size_t distance = edit_distance(name, flag.name);
        if (distance < nearest_distance) nearest = &flag, nearest_distance = distance;
    }
    if (nearest) usage_fail("unknown flag --%s: did you mean --%s?", name.c_str(), nearest->name);
    usage_fail("unknown flag --%s: see --help", name.c_str());
}

// Values that are fine one by one and make no sense together. A flag that would have no effect is refused as well:
// better said now than found out after comparing two runs that were the same. given: names on the command line.
inline void check_contradictions(const Options& o, const std::set<std::string>& given) {
    if (o.help || o.version) return;  // nothing else will be looked at
    auto has = [&](const char* name) { return given.count(name) > 0; };
    auto only_with = [&](const char* name, bool condition, const char* need) {
        if (has(name) && !condition) usage_fail("--%s has no effect without %s: drop it or add that", name, need);
    };

    if (o.generate > 0) {
        if (o.model.empty() || find_preset(o.model)) usage_fail("--generate needs weights: give --model CHECKPOINT");
        const std::set<std::string> used = {"generate", "model", "temperature", "top_k", "seed", "device", "kernels"};
        for (const std::string& name : given)
            if (used.count(name) == 0) usage_fail("--%s has no effect with --generate: drop one of them", name.c_str());
    }

    // data and model
    if (o.train.empty() && o.steps > 0 && !o.print_plan && o.generate == 0)
        usage_fail("--train GLOB is missing (scripts/data.py makes shards)");
    if (o.steps == 0 && o.val.empty() && o.hellaswag.empty() && !o.print_plan)
        usage_fail("--steps 0 only evaluates: add --val or --hellaswag, or more steps");
    for (const char* name : {"out", "resume", "eval_every", "sample_every", "profile"})
        only_with(name, o.steps > 0, "--steps above 0");
    for (const char* name : {"eval_every", "eval_tokens"}) only_with(name, !o.val.empty(), "--val");
    const bool by_hand = o.layers || o.heads || o.channels;
    if (by_hand && !o.model.empty()) usage_fail("--model contradicts --layers, --heads, --channels: drop it or them");
    if (by_hand && !(o.layers && o.heads && o.channels)) usage_fail("give --layers, --heads and --channels together");
    if (by_hand && (o.channels % o.heads || o.channels % 8)) {
        usage_fail("--channels %d must be a multiple of 8 and of --heads %d", o.channels, o.heads);
    }
    if (by_hand && o.channels / o.heads > kMaxHeadSize) {
        usage_fail("--channels %d in --heads %d: a head has at most %d channels, so give more heads", o.channels,
                   o.heads, kMaxHeadSize);
    }
    struct stat info;
    if (!o.model.empty() && !find_preset(o.model) && stat(o.model.c_str(), &info) != 0) {
        usage_fail("--model '%s' is none of d6, d12, d24, d36, d48, nor a file", o.model.c_str());
    }

    // batch and schedule
    const bool length_known =
        o.seq_len_given || o.model.empty() || find_preset(o.model);  // else the checkpoint says it
    const int64_t micro_batch = int64_t(o.batch) * o.seq_len;
    if (length_known && micro_batch > INT_MAX)
        usage_fail("--batch %d x --seq_len %d is too much: lower one", o.batch, o.seq_len);
    if (length_known && o.total_batch % micro_batch) {
        usage_fail("--total_batch %" PRId64 " is not a multiple of --batch %d x --seq_len %d = %" PRId64
                   ": the next one is %" PRId64,
                   o.total_batch, o.batch, o.seq_len, micro_batch, round_up(o.total_batch, micro_batch));
    }
    if (o.warmup > o.steps) {
        usage_fail("--warmup %" PRId64 " is longer than --steps %" PRId64, o.warmup, o.steps);
    }
    only_with("decay_frac", o.schedule == "wsd", "--schedule wsd");
    const bool falls = o.schedule == "wsd" ? o.decay_frac > 0 : o.schedule != "constant";
    only_with("final_lr_frac", falls, "a --schedule that falls");
    if (o.schedule == "wsd" && double(o.warmup) > double(o.steps) - o.decay_frac * double(o.steps) + 1e-6) {
        usage_fail("--warmup %" PRId64 " reaches into the last --decay_frac %g of --steps %" PRId64, o.warmup,
                   o.decay_frac, o.steps);
    }

    // The scale of the largest gradient that fp32 holds, 1e-6 / 3e38, is still no zero: zero means skipped.
    if (o.grad_clip > 0 && o.grad_clip < 1e-6) {
        usage_fail("--grad_clip %g is too small: at least 1e-6, or 0 to switch it off", o.grad_clip);
    }

    // muon
    if (!o.print_plan) {  // a plan may be printed for any of them
        for (const char* name : {"muon_lr", "muon_momentum", "nesterov", "muon_weight_decay", "muon_scale", "muon_qkv",
                                 "muon_tile", "muon_batch", "ns", "ns_coefficients", "ns_steps", "ns_dtype"}) {
            only_with(name, o.optimizer != "adamw", "--optimizer muon or dmuon");
        }
        only_with("owner", o.optimizer == "dmuon", "--optimizer dmuon");
    }
    only_with("ranks", o.print_plan, "--print_plan (mpirun -n N or --gpus N start a run on several)");
    if (o.muon_weight_decay < 0 && o.muon_weight_decay != -1) {
        usage_fail("--muon_weight_decay %g is out of range: 0 to 10, or -1", o.muon_weight_decay);
    }
    // On a GPU products are computed in blocks of 128 x 128: smaller tiles are mostly padding, and their table grows
    // with 1 / T^2.
    if (o.muon_tile > 0 && o.muon_tile < 64) {
        usage_fail("--muon_tile %d is too small: at least 64, or 0 for whole matrices", o.muon_tile);
    }
    if (o.muon_tile % 8)
        usage_fail("--muon_tile %d is not a multiple of 8: the next one is %d", o.muon_tile, round_up(o.muon_tile, 8));
    if (o.ns_coefficients != "keller" && o.ns_steps > 5) {
        usage_fail("--ns_steps %d contradicts --ns_coefficients %s: it has 5", o.ns_steps, o.ns_coefficients.c_str());
    }

    // run
    if (o.head_rows > 0 && o.head_rows < 128)
        usage_fail("--head_rows %d is too small: at least 128, or 0 for all rows", o.head_rows);
    only_with("sample_tokens", o.sample_every > 0, "--sample_every");
    for (const char* name : {"temperature", "top_k"})
        only_with(name, o.sample_every > 0 || o.generate > 0, "--sample_every or --generate");
    for (const char* name : {"save_every", "keep"}) only_with(name, !o.out.empty(), "--out DIR");
    if (o.resume == "auto" && o.out.empty()) usage_fail("--resume auto needs --out DIR, where the checkpoints are");
    only_with("switch_optimizer", !o.resume.empty(), "--resume");
    if (o.gpus > 0 && o.device == "cpu") usage_fail("--gpus contradicts --device cpu: use mpirun -n %d there", o.gpus);
}

// Throws Error with exit code 2. With --help anywhere, returns at once with help set: main() calls print_help().
inline Options parse_flags(int argc, char** argv) {
    Options options;
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) {
            options.help = true;
            return options;
        }
    }
    std::set<std::string> given;
    for (int i = 1; i < argc; i++) {
        const std::string argument = argv[i];
        if (argument.compare(0, 2, "--") != 0)
            usage_fail("'%s' is no flag: they look like --name value (and a GLOB wants quotes)", argv[i]);
        const size_t equals = argument.find('=');
        const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
        const Flag& flag = find_flag(name);
        const bool value_follows = i + 1 < argc && strncmp(argv[i + 1], "--", 2) != 0;
        std::string value;
        if (equals != std::string::npos) value = argument.substr(equals + 1);
        else if (value_follows) value = argv[++i];
        else if (std::holds_alternative<bool Options::*>(flag.member)) value = "1";
        if (value.empty()) usage_fail("--%s needs a value: %s", flag.name, flag.values);
        set_flag(options, flag, value);
        given.insert(flag.name);
    }
    options.seq_len_given = given.count("seq_len") > 0;
    check_contradictions(options, given);
    return options;
}
