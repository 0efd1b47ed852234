// libFuzzer over the files that the program reads: whatever is in them, they are read or refused with an Error; never a
// crash, a hang, or a read outside. test/fuzz.sh builds and runs it. FUZZ=shard, tokenizer, hellaswag or checkpoint
// chooses the reader; FUZZ_SEEDS=DIR writes some good files there to start from, and exits.
#define TRAIN_GPT_NO_MAIN
#include "../train_gpt.cu"

#include <random>

static const std::string directory = strprintf("/dev/shm/fuzz_%d", int(getpid()));
static const std::string path = directory + "/file";

static void write_file(const std::string& to, const std::string& content) {
    std::ofstream(to, std::ios::binary) << content;
}

// ---------------------------------------------------------------------------------------------------------------------
// Readers

static void read_shard() {
    const int T = 5, vocab = 300;
    const Shards shards(path, T);
    int inputs[T], targets[T];
    for (uint64_t g = 0; g < std::min<uint64_t>(shards.windows() + 2, 50); g++) {
        shards.read(shards.in_order(g), inputs, targets, vocab);
        shards.read(shards.sample(g, 7), inputs, targets, vocab);
        for (int t = 0; t < T; t++)
            if (inputs[t] < 0 || inputs[t] >= vocab || targets[t] < 0 || targets[t] >= vocab) abort();
    }
}

static void read_tokenizer() {
    const Tokenizer tokenizer(path);
    for (int token = 0; token < tokenizer.vocab; token++)
        if (tokenizer.decode(token).empty()) abort();
    tokenizer.decode(tokenizer.end_of_text);
}

static void read_hellaswag() {
    const int vocab = 300, seq_len = 20;
    const HellaSwag file(path, vocab, seq_len);
    for (const HellaSwag::Example& example : file.examples) {
        if (example.label < 0 || example.label > 3) abort();
        auto look = [&](const HellaSwag::Piece& piece) {
            if (piece.count < 1) abort();
            for (int k = 0; k < piece.count; k++)
                if (file.tokens.at(piece.begin + size_t(k)) >= vocab) abort();
        };
        look(example.context);
        for (const HellaSwag::Piece& ending : example.endings) look(ending);
    }
    const std::vector<double> losses(file.examples.size() * HellaSwag::kEndings, 1.0);
    hellaswag_scores(file, nullptr, losses.data());
}

static void read_checkpoint() {
    const Checkpoint checkpoint(path);
    for (const TensorInfo& tensor : checkpoint.tensors) {
        const float* values = checkpoint.data(tensor.name, tensor.elements());
        if (tensor.elements() == 0) abort();
        volatile float last = values[tensor.elements() - 1] + values[0];
        (void)last;
    }
    const ModelConfig config = checkpoint_config(checkpoint);
    meta_number(checkpoint, "step");
    if (config.layers <= 20 && config.channels <= 100) tensor_specs(config);
}

// A mutated checkpoint fails at its first checksum, and no more of the reader is seen. So inputs that begin with an odd
// byte get checksums that are right for what else they hold: the old ones stand where "checksum does, and what they are
// of is found by searching, not by the parser under test.
static void repair_checksums(std::string& file) {
    uint64_t length;
    if (file.size() < ckpt::kLengthBytes) return;
    memcpy(&length, &file[0], ckpt::kLengthBytes);
    if (length > file.size() - ckpt::kLengthBytes) return;
    const size_t begin = ckpt::kLengthBytes + length;
    std::string header = file.substr(ckpt::kLengthBytes, length);
    auto put = [&](const std::string& key, uint64_t sum) {
        const size_t at = header.find("\"" + key + "\":\"");
        const size_t value = at + key.size() + 4;
        if (at == header.npos || value + 16 > header.size()) return false;
        header.replace(value, 16, ckpt::hex(sum));
        return true;
    };
    const std::string offsets = "\":{\"data_offsets\":[";
    for (size_t at = header.find(offsets); at != header.npos; at = header.find(offsets, at + 1)) {
        const size_t quote = at > 0 ? header.rfind('"', at - 1) : header.npos;
        unsigned long long first, last;
        if (quote == header.npos || sscanf(&header[at + offsets.size()], "%llu,%llu", &first, &last) != 2) continue;
        if (first > last || last > file.size() - begin) continue;
        put("checksum." + header.substr(quote + 1, at - quote - 1), Checksum::of(&file[begin + first], last - first));
    }
    if (!put("checksum", 0)) return;
    put("checksum", Checksum::of(header.data(), header.size()));
    file.replace(ckpt::kLengthBytes, length, header);
}

// Bytes changed at random hardly ever make a header whose numbers agree. This gives the last tensor of a checkpoint
// another shape and other offsets that fit it by the arithmetic of 64 bits, or one of the two, and ends the file where
// they say. Sizes are powers of 2 or near them, so that products wrap around to small numbers.
static bool change_last_tensor(std::string& file, std::minstd_rand& chance) {
    const std::string offsets = "\":{\"data_offsets\":[";
    uint64_t length, begin = 0;
    if (file.size() < ckpt::kLengthBytes) return false;
    memcpy(&length, &file[0], ckpt::kLengthBytes);
    if (length > file.size() - ckpt::kLengthBytes) return false;
    std::string header = file.substr(ckpt::kLengthBytes, length);
    std::string data = file.substr(ckpt::kLengthBytes + length);
    const size_t at = header.rfind(offsets);
    if (at == header.npos || sscanf(&header[at + offsets.size()], "%" SCNu64, &begin) != 1) return false;
    uint64_t elements = 1;
    std::string shape;
    for (unsigned bits = chance() % 3 ? 62 + chance() % 3 : chance() % 12; bits > 0;) {
        const unsigned some = std::min(bits, 1 + unsigned(chance() % 9));
        const uint64_t size = (uint64_t(1) << some) - (chance() % 32 == 0);
        elements *= size, bits -= some;
        shape += (shape.empty() ? "" : ",") + std::to_string(size);
    }
    const uint64_t end = begin + (chance() % 8 ? elements * sizeof(float) : chance() % 64);
    header = header.substr(0, at) + offsets +
             strprintf("%" PRIu64 ",%" PRIu64 "],\"dtype\":\"F32\",\"shape\":[%s]}}", begin, end, shape.c_str());
    header.resize(round_up(ckpt::kLengthBytes + header.size(), ckpt::kAlignment) - ckpt::kLengthBytes, ' ');
    length = header.size();
    data.resize(std::min<uint64_t>(end, 4096));
    file = std::string(reinterpret_cast<char*>(&length), ckpt::kLengthBytes) + header + data;
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Seeds

static std::string words(std::vector<int32_t> header) {
    header.resize(256);
    return std::string(reinterpret_cast<char*>(header.data()), 1024);
}

static void write_seeds(const std::string& to) {
    for (int tokens : {6, 40, 4100}) {
        std::string shard = words({20240520, 1, tokens});
        for (int i = 0; i < tokens; i++) shard += {char(i * 7), char(i % 256 < 40)};
        write_file(to + strprintf("/shard/%d", tokens), shard);
    }
    std::string tokenizer = words({20240328, 2, 20, 3});
    for (int i = 0; i < 20; i++) tokenizer += char(1 + i % 5) + std::string(size_t(1 + i % 5), char(i));
    write_file(to + "/tokenizer/20", tokenizer);
    for (int examples : {1, 3}) {
        std::string body;
        for (int i = 0; i < examples; i++)  // mark, bytes, number, right ending, endings, context, four endings
            for (int word : {65535, 42, i, i, 4, 3, 1, 2, 299, 1, 7, 2, 8, 9, 1, 7, 4, 1, 1, 1, 1})
                body += {char(word), char(word >> 8)};
        write_file(to + strprintf("/hellaswag/%d", examples), words({20240522, 1, examples, 42}) + body);
    }
    Meta meta;
    for (const char* key : {"step", "layers", "heads", "seq_len", "vocab", "optimizer_steps", "seed", "total_batch"})
        meta[key] = "2";
    meta["channels"] = "16";
    meta["optimizer"] = "adamw";
    const std::vector<float> values(100, 1.5f);
    const std::vector<TensorInfo> several = {
        {"b", {3}}, {"optimizer.momentum.h.0.w", {2, 3, 4}}, {"wte.weight", {5, 4}}};
    for (const std::vector<TensorInfo>& tensors : {several, std::vector<TensorInfo>{{"a", {1}}}}) {
        CheckpointWriter writer(directory, 7, meta, tensors);
        for (const TensorInfo& tensor : tensors) writer.append(values.data(), tensor.bytes());
        writer.finish(1);
        std::ifstream file(directory + "/step_00000007.safetensors", std::ios::binary);
        std::stringstream content;
        content << file.rdbuf();
        for (char repaired : {'0', '1'})
            write_file(to + strprintf("/checkpoint/%zu%c", tensors.size(), repaired), repaired + content.str());
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// What libFuzzer calls

static void (*reader)() = nullptr;

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    std::filesystem::create_directories(directory);
    atexit([] { std::filesystem::remove_all(directory); });
    if (const char* to = getenv("FUZZ_SEEDS")) {
        for (const char* kind : {"/shard", "/tokenizer", "/hellaswag", "/checkpoint"})
            std::filesystem::create_directories(to + std::string(kind));
        write_seeds(to);
        exit(0);
    }
    const std::string kind = getenv("FUZZ") ? getenv("FUZZ") : "";
    reader = kind == "shard"        ? read_shard
             : kind == "tokenizer"  ? read_tokenizer
             : kind == "hellaswag"  ? read_hellaswag
             : kind == "checkpoint" ? read_checkpoint
                                    : nullptr;
    if (!reader) fprintf(stderr, "FUZZ=shard, tokenizer, hellaswag or checkpoint\n"), exit(2);
    return 0;
}

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned seed) {
    std::minstd_rand chance(seed);
    if (reader != read_checkpoint || size == 0 || chance() % 4) return LLVMFuzzerMutate(data, size, max_size);
    std::string file(reinterpret_cast<char*>(data) + 1, size - 1);
    if (!change_last_tensor(file, chance) || file.size() >= max_size) return LLVMFuzzerMutate(data, size, max_size);
    data[0] = '1';
    memcpy(data + 1, file.data(), file.size());
    return file.size() + 1;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    std::string file(reinterpret_cast<const char*>(data), size);
    if (reader == read_checkpoint) {
        const bool repaired = size > 0 && data[0] % 2;
        file.erase(0, 1);
        if (repaired) repair_checksums(file);
    }
    write_file(path, file);
    try {
        reader();
    } catch (const Error&) {}
    return 0;
}
