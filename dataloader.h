// dataloader.h: from token shards on disk to batches in memory, and back from tokens to text.
// Read: Shard (one file, mapped and checked), permute() (a shuffle that needs no memory), Shards (which window is
// sample g, and its tokens checked), DataLoader (which samples a rank's batch holds; a thread prepares the next one),
// Tokenizer.
//
// The sample order is a pure function: sample number g of a run is the same seq_len + 1 tokens whatever the ranks, the
// micro-batch or the history of interruptions. So the data position of a checkpoint is just its step.
#pragma once
#include <glob.h>

#include <algorithm>
#include <cinttypes>
#include <climits>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <exception>
#include <filesystem>
#include <fstream>
#include <future>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "common.h"

// One token file, in llm.c's format (little endian): 256 int32 of header {20240520, version 1, token count, 0...}, then
// one uint16 a token. The count is read as unsigned, so a shard may hold 2^32 - 1 tokens (8 GiB).
struct Shard {
    const MappedFile file;
    const uint16_t* tokens = nullptr;  // (count), in place
    uint64_t count = 0;

    static constexpr size_t kHeaderBytes = 256 * sizeof(int32_t);

    explicit Shard(const std::string& path) : file(path, "token shard") {
        if (file.bytes == 0) broken("is empty");
        check_header();
        tokens = reinterpret_cast<const uint16_t*>(file.data + kHeaderBytes);
    }

    void check_still_whole() const {
        if (file.was_cut_short()) broken("was cut short while it was being read");
    }

  private:
    [[noreturn]] void broken(const std::string& fault) const {
        fail("token shard %s %s: make it again with scripts/data.py", file.path.c_str(), fault.c_str());
    }

    void check_header() {
        const int32_t* header = reinterpret_cast<const int32_t*>(file.data);
        if (file.bytes < kHeaderBytes) broken(strprintf("has %zu bytes, less than its header", file.bytes));
        if (header[0] == 20240328) broken("is a tokenizer, not tokens (does the glob match too much?)");
        if (header[0] != 20240520) broken(strprintf("has magic number %d, not 20240520", header[0]));
        if (header[1] != 1) broken(strprintf("has format version %d, not 1", header[1]));
        count = uint32_t(header[2]);
        if (count == 0) broken("holds no tokens");
        const uint64_t expected = kHeaderBytes + count * sizeof(uint16_t);
        if (file.bytes != expected) {
            broken(strprintf("has %zu bytes, but its header promises %" PRIu64 " tokens, which makes %" PRIu64 " bytes",
                             file.bytes, count, expected));
        }
    }
};

// Scrambles 64 bits: every bit of x reaches every bit of the result. Each line can be undone, so no two x collide.
inline uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
    x = (x ^ (x >> 32)) * 0xd6e8feb86659fd93u;
    return x ^ (x >> 32);
}

// Where element i of 0..n-1 goes in the shuffle named by key: a bijection computed on the spot, no table. A Feistel
// network shuffles the smallest even number of bits that can hold n; a result outside 0..n-1 is shuffled again until it
// falls inside (less than 4 times on average), which keeps it one-to-one.
inline uint64_t permute(uint64_t i, uint64_t n, uint64_t key) {
    int half = 0;
    while (half < 32 && (uint64_t(1) << 2 * half) < n) half++;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    do {
        uint64_t left = i >> half, right = i & mask;
        for (uint64_t round = 1; round <= 6; round++) {
            left ^= mix(key + (right << 3) + round) & mask;  // undone by the same line, as right is still there
            std::swap(left, right);
        }
        i = left << half | right;
    } while (i >= n);
    return i;
}

// All shards of a glob, cut into windows: a shard of n tokens has (n - 1) / seq_len windows of seq_len + 1 tokens; each
// begins on the last token of the one before, which is a target there and an input here. What is left at the end of a
// shard is not used.
class Shards {
  public:
    const int seq_len;

    Shards(const std::string& pattern, int seq_len) : seq_len(seq_len) {
        std::error_code unknown;
        if (std::filesystem::is_directory(pattern, unknown))
            fail("%s is a directory: name its files, as in '%s/train_*.bin'", pattern.c_str(), pattern.c_str());
        // A directory that cannot be listed may hold some of the shards.
        const auto matters = [](const char*, int error) { return int(error != ENOENT); };
        glob_t found;
        const int result = glob(pattern.c_str(), 0, matters, &found);
        if (result == GLOB_ABORTED) fail("cannot list the files of '%s': %s", pattern.c_str(), strerror(errno));
        if (result == 0) paths_.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
        globfree(&found);
        if (paths_.empty()) fail("no file matches '%s': make token shards with scripts/data.py", pattern.c_str());
        std::sort(paths_.begin(), paths_.end());  // the same order in every locale
        for (const std::string& path : paths_) {
            shards_.emplace_back(path);
            tokens_ += shards_.back().count;
            windows_ += windows_in(shards_.back());
        }
        if (windows_ == 0) {
            fail("'%s' has too few tokens (%" PRIu64
                 " in %zu files) for one sequence of %d + 1: lower --seq_len or add text",
                 pattern.c_str(), tokens_, paths_.size(), seq_len);
        }
    }

    uint64_t tokens() const { return tokens_; }
    uint64_t windows() const { return windows_; }  // also the samples of an epoch
    const std::vector<std::string>& paths() const { return paths_; }

    // A window (seq_len + 1) as a model reads it: inputs (seq_len), and targets (seq_len), moved on by one token. A
    // token outside the vocabulary would read outside the embedding. The file may change under us at any time, so what
    // is looked at is what was copied.
    void read(const uint16_t* window, int* inputs, int* targets, int vocab) const {
        int highest = 0;
        for (int t = 0; t < seq_len; t++) inputs[t] = window[t];
        for (int t = 0; t + 1 < seq_len; t++) targets[t] = inputs[t + 1];
        targets[seq_len - 1] = window[seq_len];
        for (int t = 0; t < seq_len; t++) highest = std::max({highest, inputs[t], targets[t]});
        if (highest < vocab) return;
        for (const Shard& shard : shards_) {
            if (window < shard.tokens || window >= shard.tokens + shard.count) continue;
            uint64_t where = 0;
            while (inputs[where] < vocab && targets[where] < vocab) where++;
            const bool target = inputs[where] < vocab;
            const uint64_t position = uint64_t(window - shard.tokens) + where + target;
            fail(
                "token shard %s has token %d at position %llu, outside the vocabulary of %d: was it made with another "
                "tokenizer, or overwritten? Give --vocab, or make it again with scripts/data.py",
                shard.file.path.c_str(), target ? targets[where] : inputs[where],
                static_cast<unsigned long long>(position), vocab);
        }
        fail("internal: a window of no shard");
    }

    // Sample g: windows in an order that is new in each epoch. Shards are shuffled, and windows within a shard, so that
    // at any time one shard is being read and the others need not be in memory.
    const uint16_t* sample(uint64_t g, uint64_t seed) const {  // -> (seq_len + 1)
        const uint64_t epoch_key = mix(mix(seed) + g / windows_);
        uint64_t i = g % windows_;
        for (uint64_t k = 0;; k++) {
            const uint64_t s = permute(k, shards_.size(), epoch_key);
            const uint64_t n = windows_in(shards_[s]);
            if (i < n) return window(shards_[s], permute(i, n, mix(epoch_key + 1 + s)));
            i -= n;
        }
    }

    // Window g in the order of the files: evaluation.
    const uint16_t* in_order(uint64_t g) const {  // -> (seq_len + 1)
        uint64_t i = g;
        for (const Shard& shard : shards_) {
            if (i < windows_in(shard)) return window(shard, i);
            i -= windows_in(shard);
        }
        fail("internal: window %" PRIu64 " of %" PRIu64, g, windows_);
    }

  private:
    std::vector<std::string> paths_;
    std::deque<Shard> shards_;  // a deque, because a Shard owns its file and doesn't move
    uint64_t tokens_ = 0, windows_ = 0;

    uint64_t windows_in(const Shard& shard) const { return (shard.count - 1) / uint64_t(seq_len); }

    const uint16_t* window(const Shard& shard, uint64_t w) const {
        shard.check_still_whole();
        return shard.tokens + w * uint64_t(seq_len);
    }
};

// One micro-batch of a rank. targets are inputs moved on by one token. order lists the positions 0..B*T-1 sorted by
// input token, equal tokens in the order of their positions: embedding_backward adds up each token's rows in that
// order, without atomics and with the same bits every time.
struct Batch {
    int* inputs;   // (B, T)
    int* targets;  // (B, T)
    int* order;    // (B*T)
};

// Step s, micro-step m, rank r, row b reads sample s * samples_per_step + (m * ranks + r) * batch + b. World and batch
// only divide a step's samples: which ones it reads depends on the step alone. Steps count from 0 here.
class DataLoader {
  public:
    // accumulation: micro-steps of a step. alloc: where batches live (pinned memory for CUDA); called once, not freed
    // here. The shards must outlive the loader.
    DataLoader(const Shards& shards, int vocab, uint64_t seed, int batch, int rank, int ranks, int accumulation,
               uint64_t first_step, void* (*alloc)(size_t))
        : shards_(shards),
          vocab_(vocab),
          seed_(seed),
          batch_(batch),
          rank_(rank),
          ranks_(ranks),
          accumulation_(accumulation),
          step_(first_step),
          positions_(size_t(batch) * shards.seq_len) {
        if (positions_ > INT_MAX) fail("--batch %d x --seq_len %d: too large, lower --batch", batch, shards.seq_len);
        buffer_ = static_cast<int*>(alloc(kSlots * 3 * positions_ * sizeof(int)));
        thread_ = std::thread([this] { prefetch(); });
    }

    ~DataLoader() {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        changed_.notify_all();
        thread_.join();
    }
    DataLoader(const DataLoader&) = delete;
    DataLoader& operator=(const DataLoader&) = delete;

    // The next micro-batch, in order. It stays as it is until next() has been called two more times: a copy to the GPU
    // may still be reading it while the following one is handed out. Throws what went wrong in the thread.
    Batch next() {
        std::unique_lock<std::mutex> lock(mutex_);
        taken_++;
        changed_.notify_all();
        changed_.wait(lock, [this] { return filled_ >= taken_ || error_; });
        if (filled_ < taken_) std::rethrow_exception(error_);
        return slot(taken_ - 1);
    }

  private:
    static constexpr uint64_t kSlots = 3;  // two that the caller may still read, one being filled

    const Shards& shards_;
    const int vocab_;
    const uint64_t seed_;
    const int batch_, rank_, ranks_, accumulation_;
    uint64_t step_;  // of the batch being prepared; only the thread reads and writes step_ and micro_step_
    int micro_step_ = 0;
    const size_t positions_;  // B * T
    int* buffer_;             // (kSlots, 3, B*T): inputs, targets, order

    std::mutex mutex_;  // guards what follows
    std::condition_variable changed_;
    uint64_t filled_ = 0, taken_ = 0;  // batches so far
    bool stop_ = false;
    std::exception_ptr error_;
    std::thread thread_;  // last: it starts when all else is there

    Batch slot(uint64_t number) const {
        int* begin = buffer_ + (number % kSlots) * 3 * positions_;
        return {begin, begin + positions_, begin + 2 * positions_};
    }

    void prefetch() {
        try {
            for (uint64_t number = 0;; number++) {
                {
                    std::unique_lock<std::mutex> lock(mutex_);
                    // The caller still holds the last two that it took; this one's slot was that of number - kSlots.
                    changed_.wait(lock, [&] { return stop_ || number + 2 < taken_ + kSlots; });
                    if (stop_) return;
                }
                fill(slot(number));
                std::lock_guard<std::mutex> lock(mutex_);
                filled_ = number + 1;
                changed_.notify_all();
            }
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex_);
            error_ = std::current_exception();
            changed_.notify_all();
        }
    }

    void fill(const Batch& out) {
        const int T = shards_.seq_len;
        const uint64_t ranks = uint64_t(ranks_), batch = uint64_t(batch_);
        const uint64_t micro_batch =
            (step_ * uint64_t(accumulation_) + uint64_t(micro_step_)) * ranks + uint64_t(rank_);
        for (uint64_t b = 0; b < batch; b++)
            shards_.read(shards_.sample(micro_batch * batch + b, seed_), out.inputs + b * T, out.targets + b * T,
                         vocab_);
        std::vector<int> begins(size_t(vocab_) + 1, 0);  // where each token's positions begin in order
        for (size_t i = 0; i < positions_; i++) begins[size_t(out.inputs[i]) + 1]++;
        for (size_t token = 1; token < begins.size(); token++) begins[token] += begins[token - 1];
        for (size_t i = 0; i < positions_; i++) out.order[begins[out.inputs[i]]++] = int(i);  // a counting sort, stable

        if (++micro_step_ == accumulation_) micro_step_ = 0, step_++;
    }
};

// Tokens back to bytes, from tokenizer.bin in llm.c's format: 256 int32 of header {20240328, version 2, vocabulary,
// token that ends a text, 0...}, then for each token one byte of length and its bytes.
struct Tokenizer {
    int vocab = 0;
    int end_of_text = 0;
    std::string identity;  // a hash of the file: a checkpoint keeps it, lest a run go on with tokens of another meaning

    explicit Tokenizer(const std::string& path) {
        const char* name = path.c_str();
        auto broken = [&](const std::string& fault) {
            fail("tokenizer %s %s: make it again with scripts/data.py", name, fault.c_str());
        };
        int32_t header[256];
        constexpr size_t kLargest = sizeof(header) + 65536 * 256;  // as many tokens as there can be, as long as can be
        struct stat info;
        if (stat(name, &info) != 0) fail("cannot open tokenizer %s: %s", name, strerror(errno));
        if (!S_ISREG(info.st_mode)) broken("is not a file");
        if (size_t(info.st_size) > kLargest) broken(strprintf("has %zu bytes: too many", size_t(info.st_size)));
        std::ifstream file(path, std::ios::binary);
        if (!file) fail("cannot open tokenizer %s: %s", name, strerror(errno));
        std::string content(size_t(info.st_size), '\0');
        file.read(&content[0], std::streamsize(content.size()));
        if (size_t(file.gcount()) != content.size()) broken("ends before its end");
        if (content.size() < sizeof(header)) broken("is shorter than its header");
        memcpy(header, content.data(), sizeof(header));
        if (header[0] != 20240328) broken(strprintf("has magic number %d, not 20240328", header[0]));
        if (header[1] != 2) broken(strprintf("has format version %d, not 2", header[1]));
        vocab = header[2];
        end_of_text = header[3];
        if (vocab < 1 || vocab > 65536) broken(strprintf("has a vocabulary of %d, not 1 to 65536", vocab));
        if (end_of_text < 0 || end_of_text >= vocab) broken(strprintf("ends a text with token %d", end_of_text));
        size_t at = sizeof(header);
        for (int token = 0; token < vocab; token++) {
            const size_t length = at < content.size() ? uint8_t(content[at]) : 0;
            if (at + 1 + length > content.size()) broken(strprintf("ends within token %d of %d", token, vocab));
            if (length == 0) broken(strprintf("has an empty token %d", token));
            texts_.push_back(content.substr(at + 1, length));
            at += 1 + length;
        }
        if (at != content.size()) broken(strprintf("has %zu bytes after its last token", content.size() - at));
        uint64_t hash = 0;
        for (char c : content) hash = mix(hash + uint8_t(c) + 1);
        identity = strprintf("%016" PRIx64, hash);
    }

    const std::string& decode(int token) const {
        if (token < 0 || token >= vocab) fail("token %d is outside the tokenizer's vocabulary of %d", token, vocab);
        return texts_[size_t(token)];
    }

    // Bytes of text that a token stands for. The token that ends a text stands for none, unless it is a single byte:
    // the newline of byte shards is text like any other.
    int text_bytes(int token) const {
        const size_t bytes = decode(token).size();
        return token == end_of_text && bytes > 1 ? 0 : int(bytes);
    }

  private:
    std::vector<std::string> texts_;  // (vocab)
};
