// evaluate.h: how good a model is, measured without changing it.
// Read: Evaluator (the loss on held-out text, in nats per token and bits per byte), HellaSwag (a file of questions with
// four endings each), HellaSwagEvaluator (how often the right ending is the likeliest), hellaswag_scores (what counts
// as likely).
//
// Model is train_gpt.cu's: forward(tokens, B, T) and loss(B, T) leave the loss of each of the B T positions
// in model.losses. Any B and T will do with B T <= batch * seq_len and T <= seq_len.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "common.h"
#include "dataloader.h"
#include "ranks.h"

// ---------------------------------------------------------------------------------------------------------------------
// Held-out text

struct Validation {
    double loss;           // nats per token
    double bits_per_byte;  // NaN without a tokenizer, which knows how many bytes a token stands for
};

// The mean loss over the first `windows` windows of the validation files, in their order. The ranks have equal shares,
// give or take a window: neither ranks nor batch change what is read.
//
// Bits per byte: the same losses in bits, over the bytes of text that their targets stand for (Tokenizer::text_bytes).
// It compares models whose tokens differ in length. The token that ends a text is predicted like the others, so its
// loss counts, but it is no text and has no bytes. (lm-eval's bits_per_byte divides by the bytes of the text alone too,
// and has no such token among its targets: a document is scored after one as context. nanochat leaves its loss out.)
template <class Backend, class Model>
class Evaluator {
    const Shards& val;
    const Tokenizer* const tokenizer;  // or null
    Model& model;
    const uint64_t windows;  // over all ranks
    const int batch, vocab;
    int* host;           // (2,B,T) pinned: inputs, targets
    double* host_bytes;  // pinned
    double* sums;        // (2) device: of the losses, of the bytes

  public:
    Evaluator(const Shards& val_, const Tokenizer* tokenizer_, Model& model_, uint64_t windows_, int batch_, int vocab_)
        : val(val_), tokenizer(tokenizer_), model(model_), windows(windows_), batch(batch_), vocab(vocab_) {
        host = static_cast<int*>(Backend::alloc_host(2 * size_t(batch) * val.seq_len * sizeof(int)));
        host_bytes = static_cast<double*>(Backend::alloc_host(sizeof(double)));
        sums = static_cast<double*>(Backend::alloc(2 * sizeof(double), "the sums of an evaluation"));
    }

    Validation run() {
        const int T = val.seq_len;
        int *inputs = host, *targets = host + size_t(batch) * T;
        uint64_t bytes = 0;
        Backend::zero(sums, 2 * sizeof(double));
        const uint64_t ranks = uint64_t(world.size), rank = uint64_t(world.rank);
        const uint64_t end = windows * (rank + 1) / ranks;
        for (uint64_t first = windows * rank / ranks; first < end; first += uint64_t(batch)) {
            const int B = int(std::min(uint64_t(batch), end - first));
            for (int b = 0; b < B; b++)
                val.read(val.in_order(first + uint64_t(b)), inputs + b * T, targets + b * T, vocab);
            for (int i = 0; tokenizer && i < B * T; i++) bytes += uint64_t(tokenizer->text_bytes(targets[i]));
            Backend::upload(model.inputs, inputs, size_t(B) * T * sizeof(int));
            Backend::upload(model.targets, targets, size_t(B) * T * sizeof(int));
            finish<Backend>("an evaluation");  // `host` may be filled again
            model.forward(model.inputs, B, T);
            model.loss(B, T);
            Backend::sum_losses(sums, model.losses, B * T);
        }
        *host_bytes = double(bytes);
        Backend::upload(&sums[1], host_bytes, sizeof(double));
        Backend::wait(Backend::all_reduce(sums, 2));
        double totals[2] = {};
        Backend::download(totals, sums, sizeof totals);
        finish<Backend>("an evaluation");
        return {totals[0] / (double(windows) * T), totals[1] > 0 ? totals[0] / (std::log(2.0) * totals[1]) : NAN};
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// HellaSwag (Zellers and others, https://arxiv.org/abs/1905.07830): 10,042 beginnings of a text with four endings, one
// of which is right. No answer is asked for: a model's choice is the ending that it finds likeliest.

// The questions as tokens, from a file in llm.c's format for multiple choice (little endian): 256 int32 of header
// {20240522, version 1, examples, bytes of the longest example, 0...}; then each example in uint16: {65535, bytes of
// the example, its number from 0, the right ending, endings (4), tokens of the context, those tokens, and for each
// ending the number of its tokens and those tokens}.
struct HellaSwag {
    static constexpr int kEndings = 4;
    struct Piece {
        size_t begin;  // in tokens
        int count;     // at least 1
    };
    struct Example {
        int label;  // the right ending
        Piece context, endings[kEndings];
    };
    std::vector<Example> examples;
    std::vector<uint16_t> tokens;  // of the whole file, all of those in a Piece below `vocab`

    // A model that reads seq_len tokens at a time cannot score an ending of more: that is refused too.
    HellaSwag(const std::string& path, int vocab, int seq_len) {
        const MappedFile file(path, "HellaSwag file");
        auto broken = [&](const std::string& fault) {
            fail("HellaSwag file %s %s: make it again with scripts/data.py hellaswag", path.c_str(), fault.c_str());
        };
        int32_t header[256];
        if (file.bytes < sizeof(header)) broken(strprintf("has %zu bytes, less than its header", file.bytes));
        memcpy(header, file.data, sizeof(header));
        if (header[0] == 20240520) broken("is a token shard");
        if (header[0] != 20240522) broken(strprintf("has magic number %d, not 20240522", header[0]));
        if (header[1] != 1) broken(strprintf("has format version %d, not 1", header[1]));
        if (header[2] < 1 || header[2] > 65536) broken(strprintf("promises %d examples, not 1 to 65536", header[2]));
        tokens.resize((file.bytes - sizeof(header)) / sizeof(uint16_t));
        if (file.was_cut_short()) broken("was cut short while it was being read");
        if (!tokens.empty()) memcpy(tokens.data(), file.data + sizeof(header), tokens.size() * sizeof(uint16_t));

        size_t at = 0, longest = 0;
        for (int i = 0; i < header[2]; i++) {
            const size_t start = at;
            auto next = [&](const char* what) {
                if (at >= tokens.size()) broken(strprintf("ends before %s of example %d of %d", what, i, header[2]));
                return int(tokens[at++]);
            };
            auto piece = [&](const char* what) {
                const Piece found = {at + 1, next(what)};
                if (found.count == 0) broken(strprintf("has no tokens in %s of example %d", what, i));
                if (size_t(found.count) > tokens.size() - at)
                    broken(strprintf("ends within %s of example %d of %d", what, i, header[2]));
                for (int k = 0; k < found.count; k++)
                    if (const int token = tokens[at++]; token >= vocab)
                        broken(strprintf("has token %d in example %d, outside the vocabulary of %d", token, i, vocab));
                return found;
            };
            Example example = {};
            if (const int mark = next("the mark"); mark != 65535) broken(strprintf("has no mark at example %d", i));
            const size_t bytes = size_t(next("the length"));
            if (const int number = next("the number"); number != i)
                broken(strprintf("has number %d at example %d", number, i));
            example.label = next("the right ending");
            const int endings = next("the endings");
            if (endings != kEndings) broken(strprintf("has %d endings in example %d, not 4", endings, i));
            if (example.label >= endings)
                broken(strprintf("says that ending %d of example %d is right: there are 0 to 3", example.label, i));
            example.context = piece("the context");
            for (Piece& ending : example.endings)
                if ((ending = piece("an ending")).count > seq_len)
                    fail("HellaSwag file %s has an ending of %d tokens in example %d: longer than --seq_len %d",
                         path.c_str(), ending.count, i, seq_len);
            const size_t real_bytes = (at - start) * sizeof(uint16_t);
            if (bytes != real_bytes)
                broken(strprintf("says that example %d has %zu bytes, and it has %zu", i, bytes, real_bytes));
            longest = std::max(longest, bytes);
            examples.push_back(example);
        }
        const size_t left = file.bytes - sizeof(header) - at * sizeof(uint16_t);
        if (left > 0) broken(strprintf("has %zu bytes after its last example", left));
        if (size_t(header[3]) != longest)
            broken(strprintf("says that its longest example has %d bytes, and it has %zu", header[3], longest));
    }
};

struct HellaSwagScores {
    double acc;             // shares of the examples whose right ending has the least loss: in sum,
    double acc_norm;        // per token of the ending,
    double acc_norm_chars;  // per character of its text (NaN without a tokenizer)
};

// Three ways to call an ending the likeliest. acc is everyone's. acc_norm is that of llm.c, which prints no other: the
// mean loss of the ending's tokens. lm-eval's acc_norm divides by the characters of the ending instead, not counting
// the space before it; so does acc_norm_chars. (lm-eval also words the questions in its own way: scripts/data.py makes
// a file of either kind.) Of endings that are equally likely the first is taken; one whose loss is not finite, never.
inline HellaSwagScores hellaswag_scores(const HellaSwag& file, const Tokenizer* tokenizer,
                                        const double* losses /*(examples,4) sums over an ending's tokens*/) {
    int64_t right[3] = {};
    for (size_t i = 0; i < file.examples.size(); i++) {
        const HellaSwag::Example& example = file.examples[i];
        int choice[3] = {-1, -1, -1};
        double least[3];
        for (int e = 0; e < HellaSwag::kEndings; e++) {
            const HellaSwag::Piece& ending = example.endings[e];
            std::string text;
            for (int k = 0; tokenizer && k < ending.count; k++)
                text += tokenizer->decode(file.tokens[ending.begin + size_t(k)]);
            int characters = text.empty() || text[0] != ' ' ? 0 : -1;
            for (char c : text) characters += (c & 0xc0) != 0x80;  // every byte but the later ones of a UTF-8 sequence
            const double loss = losses[i * HellaSwag::kEndings + size_t(e)],
                         by[3] = {loss, loss / ending.count, loss / std::max(characters, 1)};
            for (int way = 0; way < 3; way++)
                if (std::isfinite(loss) && (choice[way] < 0 || by[way] < least[way]))
                    choice[way] = e, least[way] = by[way];
        }
        for (int way = 0; way < 3; way++) right[way] += choice[way] == example.label;
    }
    const double examples = double(file.examples.size());
    return {double(right[0]) / examples, double(right[1]) / examples, tokenizer ? double(right[2]) / examples : NAN};
}

// Each ending is a row behind its context, padded to the longest row of its batch: what follows a position does not
// change it. A row of more than seq_len + 1 tokens loses its first ones. The rows are dealt out to the ranks, the
// longest first, so that those of a batch are of about one length, and all ranks have about the same work.
template <class Backend, class Model>
class HellaSwagEvaluator {
    static constexpr int kPadding = 64;        // so that few shapes of products occur
    static constexpr size_t kMostRows = 4096;  // of a batch: kernels have a grid of at most 65535
    static constexpr double kSayEvery = 10;    // seconds
    struct Row {
        size_t example, ending;
        int tokens;
    };
    const HellaSwag& file;
    const Tokenizer* const tokenizer;  // or null
    Model& model;
    const int batch, seq_len;
    std::vector<Row> rows;     // the longest first
    int* host;                 // (2,batch,seq_len) pinned: inputs, targets
    size_t n;                  // sums: one of each ending, and the number of ranks that were asked to stop
    double *sums, *host_sums;  // (n) device, pinned

  public:
    HellaSwagEvaluator(const HellaSwag& file_, const Tokenizer* tokenizer_, Model& model_, int batch_, int seq_len_)
        : file(file_), tokenizer(tokenizer_), model(model_), batch(batch_), seq_len(seq_len_) {
        for (size_t i = 0; i < file.examples.size(); i++)
            for (size_t e = 0; e < HellaSwag::kEndings; e++)
                rows.push_back({i, e, file.examples[i].context.count + file.examples[i].endings[e].count});
        std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.tokens > b.tokens; });
        n = rows.size() + 1;
        host = static_cast<int*>(Backend::alloc_host(2 * size_t(batch) * seq_len * sizeof(int)));
        host_sums = static_cast<double*>(Backend::alloc_host(n * sizeof(double)));
        sums = static_cast<double*>(Backend::alloc(n * sizeof(double), "the sums of HellaSwag"));
    }

    size_t row_count() const { return rows.size(); }
    size_t rows_cut() const {
        return size_t(
            std::count_if(rows.begin(), rows.end(), [&](const Row& row) { return row.tokens > seq_len + 1; }));
    }

    // progress(rows done, seconds left): every ten seconds. Nothing comes back if a rank was asked to stop.
    template <class Progress>
    std::optional<HellaSwagScores> run(Progress progress) {
        const size_t ranks = size_t(world.size), capacity = size_t(batch) * seq_len;
        const double began = seconds_now();
        double said = began;
        Backend::zero(sums, n * sizeof(double));
        for (size_t first = size_t(world.rank), B; first < rows.size() && stop_signal == 0; first += B * ranks) {
            const int T = std::min(round_up(rows[first].tokens - 1, kPadding), seq_len);
            B = std::min({capacity / size_t(T), kMostRows, ceil_div(rows.size() - first, ranks)});
            int *inputs = host, *targets = host + B * size_t(T);
            for (size_t b = 0; b < B; b++)
                fill(rows[first + b * ranks], T, inputs + b * size_t(T), targets + b * size_t(T));
            Backend::upload(model.inputs, inputs, B * size_t(T) * sizeof(int));
            Backend::upload(model.targets, targets, B * size_t(T) * sizeof(int));
            finish<Backend>("HellaSwag");  // `host` may be filled again
            model.forward(model.inputs, int(B), T);
            model.loss(int(B), T);
            for (size_t b = 0; b < B; b++) {
                const Row& row = rows[first + b * ranks];
                const int count = file.examples[row.example].endings[row.ending].count;
                Backend::sum_losses(&sums[row.example * HellaSwag::kEndings + row.ending],
                                    model.losses + b * size_t(T) + std::min(row.tokens - 1, T) - count, count);
            }
            const double now = seconds_now();
            const size_t done = std::min(rows.size(), first + B * ranks);
            if (now > said + kSayEvery) {
                progress(done, (now - began) * double(rows.size() - done) / double(done));
                said = now;
            }
        }
        host_sums[0] = stop_signal != 0;
        Backend::upload(&sums[n - 1], host_sums, sizeof(double));
        Backend::wait(Backend::all_reduce(sums, n));  // each ending's sum comes from one rank; the others add zeros
        Backend::download(host_sums, sums, n * sizeof(double));
        finish<Backend>("HellaSwag");
        if (host_sums[n - 1] > 0) return {};
        return hellaswag_scores(file, tokenizer, host_sums);
    }

  private:
    // Context and ending, of a long row the last T + 1 tokens, as a model reads them; zeros behind.
    void fill(const Row& row, int T, int* inputs /*(T)*/, int* targets /*(T)*/) const {
        const HellaSwag::Example& example = file.examples[row.example];
        const HellaSwag::Piece &context = example.context, &ending = example.endings[row.ending];
        const int cut = std::max(0, row.tokens - (T + 1));
        auto token = [&](int t) {
            t += cut;
            if (t >= row.tokens) return 0;
            return int(
                file.tokens[t < context.count ? context.begin + size_t(t) : ending.begin + size_t(t - context.count)]);
        };
        for (int t = 0; t < T; t++) inputs[t] = token(t), targets[t] = token(t + 1);
    }
};
