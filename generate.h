// generate.h: text from a model, token by token, for samples during training and for --generate.
// Read: next_token() (how a token is drawn), Generator (the forward pass of one sequence with a cache), sample(), then
// what --generate is made of: load_weights(), read_prompt(), generate_tokens().
//
// The cache. Attention needs the keys and values of all earlier tokens, and nothing else of them. So the rows q|k|v
// that a layer's product writes stay where they are, (seq_len,3C) for each layer: a token adds its row, and its query
// meets the keys and values in the rows above. K and V by themselves would take two thirds of the room and a copy for
// each row.
//
// When the context is full, its older half is forgotten: the newer half is read again like a prompt, from position 0,
// and there is room for seq_len / 2 more.
//
// This is a part of train_gpt.cu, which includes it behind what it stands on: ModelConfig, Tensors, Allocation, Run and
// finish.
#pragma once
#include <algorithm>
#include <cctype>
#include <cmath>
#include <string>
#include <vector>

#include "checkpoint.h"
#include "common.h"
#include "dataloader.h"
#include "dmuon.cuh"
#include "flags.h"
#include "ranks.h"

struct Sampling {
    int vocab;           // tokens below it can be drawn
    double temperature;  // logits are divided by it; 0: always the likeliest token
    int64_t top_k;       // drawn is among so many of the likeliest; 0: among all
    uint64_t seed;
};

// The token of logits (vocab) that a coin in [0,1) falls on, or -1 if no logit is finite. Of equal logits the smaller
// token counts as the likelier.
inline int next_token(const std::vector<float>& logits, const Sampling& sampling, double coin) {
    const auto likelier = [&](int a, int b) { return logits[a] > logits[b] || (logits[a] == logits[b] && a < b); };
    std::vector<int> tokens;
    for (int v = 0; v < sampling.vocab; v++)
        if (std::isfinite(logits[v])) tokens.push_back(v);
    if (tokens.empty()) return -1;
    const int likeliest = *std::min_element(tokens.begin(), tokens.end(), likelier);
    if (sampling.temperature == 0) return likeliest;
    if (sampling.top_k > 0 && size_t(sampling.top_k) < tokens.size()) {
        std::nth_element(tokens.begin(), tokens.begin() + sampling.top_k, tokens.end(), likelier);
        tokens.resize(size_t(sampling.top_k));
        std::sort(tokens.begin(), tokens.end());  // the order of sums is ours, not the library's
    }
    std::vector<double> weights;
    double total = 0;
    for (int v : tokens) {
        weights.push_back(std::exp((double(logits[v]) - logits[likeliest]) / sampling.temperature));
        total += weights.back();
    }
    size_t i = 0;
    for (double left = coin * total; i + 1 < tokens.size() && left >= weights[i]; i++) left -= weights[i];
    return tokens[i];
}

// The weights must be there, and stay as they are while a text is written.
template <class Backend>
class Generator {
    using real = typename Backend::real;

    const ModelConfig config;
    const Tensors<real> weights;
    std::vector<int> context;  // the tokens read; those in the cache
    int* tokens;               // (T) device, T = seq_len here
    real *residual, *other;    // (T,C) the residual stream before and after attention
    real *ln, *att, *branch;   // (T,C) inputs of products; what is added to the residual stream
    real *fc, *gelu;           // (T,4C)
    std::vector<real*> cache;  // (layers) (T,3C)
    float *mean, *rstd, *lse;  // (T), (T), (H,T) are written, and not read
    real *logits, *host;       // (Vp) device; (V) pinned
    std::vector<float> row;    // (V)

  public:
    Generator(const ModelConfig& config_, const Tensors<real>& weights_)
        : config(config_), weights(weights_), cache(config_.layers), row(config_.vocab) {}

    size_t bytes() { return buffers().bytes; }  // of device memory
    void allocate() {
        Allocation memory = buffers();
        memory.place(Backend::alloc(memory.bytes, "generation"));
        host = static_cast<real*>(Backend::alloc_host(config.vocab * sizeof(real)));
    }

    // Forgets what was read before, and reads a prompt: at least one token, of which the last seq_len count. The
    // result: logits (V) of the token that follows. It stays until the next call.
    const std::vector<float>& read(const std::vector<int>& prompt) {
        context.assign(prompt.end() - long(std::min(prompt.size(), size_t(config.seq_len))), prompt.end());
        return forward(0);
    }
    // The same after one more token.
    const std::vector<float>& read(int token) {
        context.push_back(token);
        const int T = int(context.size());
        if (T <= config.seq_len) return forward(T - 1);
        context.erase(context.begin(), context.end() - std::max(1, config.seq_len / 2));
        return forward(0);
    }

    // Calls take(token) for each of `count` tokens after the prompt, as soon as it is known. Token i depends on the
    // seed, i and the logits alone. False if it had to end before: no logit was finite.
    template <class Take>
    bool generate(const std::vector<int>& prompt, int64_t count, const Sampling& sampling, Take take) {
        for (int64_t i = 0, token = 0; i < count; i++) {
            const std::vector<float>& after = i == 0 ? read(prompt) : read(int(token));
            const double coin = double(mix(mix(sampling.seed) + uint64_t(i)) >> 11) * 0x1p-53;
            token = next_token(after, sampling, coin);
            if (token < 0) return false;
            take(int(token));
        }
        return true;
    }

  private:
    Allocation buffers() {
        const size_t T = config.seq_len, C = config.channels;
        Allocation memory;
        memory.add(tokens, T);
        for (real** rows : {&residual, &other, &ln, &att, &branch}) memory.add(*rows, T * C);
        memory.add(fc, T * 4 * C), memory.add(gelu, T * 4 * C);
        for (real*& rows : cache) memory.add(rows, T * 3 * C);
        memory.add(mean, T), memory.add(rstd, T), memory.add(lse, config.heads * T);
        memory.add(logits, config.padded_vocab());
        return memory;
    }

    // The context from position `first` on, 0 or the last: Model::forward for one sequence that keeps q|k|v and nothing
    // else, and the logits of the last token.
    const std::vector<float>& forward(int first) {
        const int C = config.channels, H = config.heads, L = config.layers, Vp = config.padded_vocab();
        std::vector<int> window(context.begin() + first, context.end());
        const int last = int(window.size()) - 1;  // its row
        // Filled up, so that few shapes of products occur. What stands there does not matter: no position sees later
        // ones, and the rows in the cache are those of the next tokens.
        if (first == 0) window.resize(std::min(round_up(last + 1, 64), config.seq_len));
        const int rows = int(window.size());
        Backend::upload(tokens, window.data(), rows * sizeof(int));
        Backend::embedding_forward(residual, tokens, weights.wte, weights.wpe + size_t(first) * C, 1, rows, C);
        Backend::layernorm_forward(ln, mean, rstd, residual, weights.layers[0].ln1w, weights.layers[0].ln1b, rows, C);
        for (int l = 0; l < L; l++) {
            const auto& w = weights.layers[l];
            // One product where Q, K and V are neighbours, else three.
            const bool together = w.qkvw[1] == w.qkvw[0] + size_t(C) * C && w.qkvw[2] == w.qkvw[1] + size_t(C) * C;
            const int OC = together ? 3 * C : C;
            for (int i = 0; i * OC < 3 * C; i++)
                Backend::matmul_forward(cache[l] + size_t(first) * 3 * C + i * OC, 3 * C, ln, w.qkvw[i],
                                        w.qkvb + i * OC, rows, C, OC);
            if (first == 0) Backend::attention_forward(att, lse, cache[l], 1, rows, C, H);
            else Backend::attention_last_row(att, cache[l], first + 1, C, H);
            Backend::matmul_forward(branch, C, att, w.attprojw, w.attprojb, rows, C, C);
            Backend::residual_layernorm_forward(other, ln, mean, rstd, residual, branch, w.ln2w, w.ln2b, rows, C);
            Backend::matmul_gelu_forward(gelu, fc, ln, w.fcw, w.fcb, rows, C, 4 * C);
            Backend::matmul_forward(branch, C, gelu, w.fcprojw, w.fcprojb, rows, 4 * C, C);
            const bool more = l + 1 < L;
            Backend::residual_layernorm_forward(residual, ln, mean, rstd, other, branch,
                                                more ? weights.layers[l + 1].ln1w : weights.lnfw,
                                                more ? weights.layers[l + 1].ln1b : weights.lnfb, rows, C);
        }
        Backend::matmul_forward(logits, Vp, ln + size_t(last) * C, weights.wte, nullptr, 1, C, Vp);
        Backend::download(host, logits, config.vocab * sizeof(real));
        finish<Backend>("a token");  // also with `window`
        for (int v = 0; v < config.vocab; v++) row[v] = float(host[v]);
        return row;
    }
};

// A look at what the model writes, from the token that ends a text. All ranks write the same sample and rank 0 prints
// it: none has to wait for another.
template <class Backend>
std::string sample(const Run& run, Generator<Backend>& generator, int64_t step) {
    const Options& options = run.options;
    const Tokenizer* tokenizer = run.tokenizer.get();
    const int vocab = tokenizer ? tokenizer->vocab : run.config.vocab;  // of what can be written
    const int start = tokenizer ? tokenizer->end_of_text : std::min(50256, vocab - 1);
    std::string written;
    const Sampling sampling = {vocab, options.temperature, options.top_k, uint64_t(options.seed + step)};
    const bool whole = generator.generate({start}, options.sample_tokens, sampling, [&](int token) {
        written += tokenizer ? tokenizer->decode(token) : std::to_string(token) + " ";
    });
    return printable(written) + (whole ? "" : "(no logit is finite)");
}

// ---------------------------------------------------------------------------------------------------------------------
// --generate

// A checkpoint's weights by themselves: no gradients, no state of an optimizer.
template <class Backend>
Tensors<typename Backend::real> load_weights(const Checkpoint& checkpoint, const ModelConfig& config) {
    using real = typename Backend::real;
    constexpr size_t kStagingFloats = size_t(4) << 20;
    const Plan plan(tensor_specs(config), Options(), 1);
    real* arena = static_cast<real*>(Backend::alloc(plan.arena * sizeof(real), "weights"));
    float* staging = static_cast<float*>(Backend::alloc(kStagingFloats * sizeof(float), "weights on their way"));
    for (int t = 0; t < int(plan.tensors.size()); t++) {
        const size_t size = plan.tensors[t].stored_size();
        const float* values = checkpoint.data(plan.tensors[t].name, size);
        for (size_t at = 0; at < size; at += kStagingFloats) {
            const size_t count = std::min(kStagingFloats, size - at);
            Backend::upload(staging, values + at, count * sizeof(float));
            Backend::cast_params(arena + plan.offset_of(t) + at, staging, count);
        }
    }
    Backend::synchronize();  // the file may go
    return {arena, plan, config};
}

struct Prompt {
    std::vector<int> tokens;  // the last of them
    uint64_t length = 0;      // of them all
};

// Token numbers with white space between; the last `most` of them are kept.
inline Prompt read_prompt(FILE* file, int vocab, size_t most) {
    Prompt prompt;
    int number = -1;  // of the word so far, if there is one
    for (int c = 0; c != EOF;) {
        c = getc(file);
        if (c >= '0' && c <= '9') {
            number = std::min(std::max(number, 0) * 10 + (c - '0'), 100000000);
            continue;
        }
        if (number >= vocab)
            fail(
                "the prompt has token %d, outside the checkpoint's vocabulary of %d: was it made by another tokenizer?",
                number, vocab);
        if (number >= 0) {
            if (prompt.tokens.size() == 2 * most)
                prompt.tokens.erase(prompt.tokens.begin(), prompt.tokens.end() - most);
            prompt.tokens.push_back(number), prompt.length++;
        }
        number = -1;
        if (c != EOF && !isspace(c))
            fail("the prompt has the byte 0x%02x: --generate reads token numbers (scripts/generate.py takes text)", c);
    }
    if (ferror(file)) fail("cannot read the prompt on the standard input: %s", strerror(errno));
    if (prompt.length == 0) fail("the prompt is empty: --generate needs token numbers on the standard input");
    if (prompt.tokens.size() > most) prompt.tokens.erase(prompt.tokens.begin(), prompt.tokens.end() - most);
    return prompt;
}

// Writes a line that says what the numbers mean, "tokenizer IDENTITY vocabulary V context T"; reads a prompt; writes
// --generate tokens after it, a line each, at once. All else goes to the standard error.
template <class Backend>
int generate_tokens(const Options& options) {
    const Checkpoint checkpoint(options.model);
    const ModelConfig config = checkpoint_config(checkpoint);
    const std::string identity = Run::meta_text(checkpoint, "tokenizer");
    say("tokenizer %s vocabulary %d context %d\n", identity.empty() ? "unknown" : identity.c_str(), config.vocab,
        config.seq_len);
    Backend::start(world);
    Generator<Backend> generator(config, load_weights<Backend>(checkpoint, config));
    generator.allocate();
    const Prompt prompt = read_prompt(stdin, config.vocab, size_t(config.seq_len));
    if (prompt.length > prompt.tokens.size())
        fprintf(stderr, "note: the prompt has %" PRIu64 " tokens and the context room for %d: the last %d are read\n",
                prompt.length, config.seq_len, config.seq_len);
    const double begin = seconds_now();
    double first = begin;  // when the first token was there
    int64_t written = 0;
    const Sampling sampling = {config.vocab, options.temperature, options.top_k, uint64_t(options.seed)};
    const bool whole = generator.generate(prompt.tokens, options.generate, sampling, [&](int token) {
        say("%d\n", token);
        if (written++ == 0) first = seconds_now();
    });
    const double seconds = seconds_now() - first;
    if (!whole)
        fail("checkpoint %s has no finite logits after these tokens: it is of a run that failed",
             checkpoint.path.c_str());
    fprintf(stderr, "%zu tokens read in %.3f s, %" PRId64 " written", prompt.tokens.size(), first - begin, written);
    if (written > 1) fprintf(stderr, ", %.1f tokens/s after the first", double(written - 1) / seconds);
    fprintf(stderr, "\n");
    Backend::stop();
    return 0;
}
