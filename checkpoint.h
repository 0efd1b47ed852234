// checkpoint.h: one file per save, DIR/step_00000100.safetensors, that is either whole and right or refused. Any reader
// of safetensors (github.com/huggingface/safetensors) opens it as it is. Read: the layout below, Checksum,
// header_text(), CheckpointWriter, Checkpoint (the reader), newest_good_checkpoint().
//
//   u64 bytes of the header, little endian
//   the header, as JSON (try `head -c 2000` on a checkpoint), filled up with spaces to byte 64k:
//       {"__metadata__":{"KEY":"VALUE", ...}
//       ,"NAME":{"data_offsets":[BEGIN,END],"dtype":"F32","shape":[DIM, ...]}, ... }
//   each tensor, fp32, little endian, in the order of the header, one right after the other
//
// Of all the ways to write such a file only one is ours: keys sorted, no white space but at the end, strings of
// printable ASCII without escapes. The metadata are what the run needs to go on (step, sizes, optimizer, flags,
// tokenizer, ...), "format": "train_gpt", and checksums, XXH64 in 16 hexadecimal digits: "checksum.NAME" of each
// tensor, and "checksum" of the header, taken with zeros in its own place. So every byte of the file is under a
// checksum or compared with what it must be. Nothing in it depends on the time, on paths or on the number of ranks:
// equal runs write equal files.
//
// Weights and optimizer state ("optimizer.momentum.NAME") are in the same file, because a save is then whole at the one
// moment in which it gets its name; with two, every reader would have to cope with one of them missing or older than
// the other. Whoever wants to share the weights alone takes scripts/hf.py export, which leaves the state out.
#pragma once
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cinttypes>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common.h"

using Meta = std::map<std::string, std::string>;  // of printable ASCII, no quotes or backslashes

struct TensorInfo {
    std::string name;  // likewise
    std::vector<int64_t> shape;

    uint64_t elements() const {
        uint64_t n = 1;
        for (int64_t size : shape) n *= uint64_t(size);
        return n;
    }
    uint64_t bytes() const { return elements() * sizeof(float); }
};

// A file that is not what was written: cut short, or changed. --resume auto passes over such a file, and over no other.
struct Damaged : Error {
    using Error::Error;
};

// XXH64 (github.com/Cyan4973/xxHash, doc/xxhash_spec.md) with seed 0: a checksum against accidents, near the speed of
// memory, that every language has a library for. Damage goes unseen with a chance of about 2^-64.
class Checksum {
  public:
    void update(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        length_ += bytes;
        while (bytes > 0) {
            const size_t whole = held_ == 0 ? bytes / kStripe * kStripe : 0;
            take_stripes(at, whole);
            at += whole, bytes -= whole;
            const size_t piece = std::min(bytes, kStripe - held_);
            memcpy(stripe_ + held_, at, piece);
            at += piece, bytes -= piece, held_ += piece;
            if (held_ == kStripe) take_stripes(stripe_, kStripe), held_ = 0;
        }
    }
    uint64_t value() const {
        uint64_t sum = kPrime[4];
        if (length_ >= kStripe) {
            sum = turn(lanes_[0], 1) + turn(lanes_[1], 7) + turn(lanes_[2], 12) + turn(lanes_[3], 18);
            for (uint64_t lane : lanes_) sum = (sum ^ round(0, lane)) * kPrime[0] + kPrime[3];
        }
        sum += length_;
        size_t at = 0;
        for (; at + 8 <= held_; at += 8) sum = turn(sum ^ round(0, word<uint64_t>(at)), 27) * kPrime[0] + kPrime[3];
        for (; at + 4 <= held_; at += 4) sum = turn(sum ^ word<uint32_t>(at) * kPrime[0], 23) * kPrime[1] + kPrime[2];
        for (; at < held_; at++) sum = turn(sum ^ word<uint8_t>(at) * kPrime[4], 11) * kPrime[0];
        sum = (sum ^ sum >> 33) * kPrime[1];
        sum = (sum ^ sum >> 29) * kPrime[2];
        return sum ^ sum >> 32;
    }
    static uint64_t of(const void* data, size_t bytes) {
        Checksum checksum;
        checksum.update(data, bytes);
        return checksum.value();
    }

  private:
    static constexpr uint64_t kPrime[5] = {0x9e3779b185ebca87u, 0xc2b2ae3d27d4eb4fu, 0x165667b19e3779f9u,
                                           0x85ebca77c2b2ae63u, 0x27d4eb2f165667c5u};
    static constexpr size_t kStripe = 32;  // bytes, a word for each of four lanes, whose products overlap
    std::array<uint64_t, 4> lanes_ = {kPrime[0] + kPrime[1], kPrime[1], 0, 0 - kPrime[0]};
    uint64_t length_ = 0;
    char stripe_[kStripe];  // begun, not complete
    size_t held_ = 0;       // bytes of it

    static uint64_t turn(uint64_t x, int bits) { return x << bits | x >> (64 - bits); }
    static uint64_t round(uint64_t lane, uint64_t word) { return turn(lane + word * kPrime[1], 31) * kPrime[0]; }
    template <class Word>
    uint64_t word(size_t at) const {
        Word word;
        memcpy(&word, stripe_ + at, sizeof word);
        return word;
    }
    void take_stripes(const char* at, size_t bytes) {
        // In registers: stores to lanes_ could change *at, for all the compiler knows.
        std::array<uint64_t, 4> lanes = lanes_;
        for (const char* end = at + bytes; at < end; at += kStripe) {
            uint64_t words[4];
            memcpy(words, at, kStripe);
            for (size_t i = 0; i < 4; i++) lanes[i] = round(lanes[i], words[i]);
        }
        lanes_ = lanes;
    }
};

namespace ckpt {
constexpr uint64_t kLengthBytes = 8, kAlignment = 64,
                   kMaxHeaderBytes = 100000000;  // the last is safetensors' own limit
constexpr char kSuffix[] = ".safetensors", kUnfinished[] = ".safetensors.tmp";
constexpr char kFormat[] = "train_gpt";
// Until 2026-11 checkpoints were files of another format, which is not read any more, named .ckpt.
constexpr char kOldSuffix[] = ".ckpt", kOldMagic[] = "TRAINGPT";

// The step in "step_00000100.safetensors", or -1 if the name is none of ours.
inline int64_t step_in_name(const std::string& name, const std::string& ending) {
    if (name.size() < 13 + ending.size() || name.compare(0, 5, "step_") != 0) return -1;
    int64_t step = -1;
    const auto [stop, error] = std::from_chars(name.data() + 5, name.data() + name.size(), step);
    return error == std::errc() && stop == ending ? step : -1;
}

// (step, path) of the files of DIR with that ending, newest first; none if there is no DIR.
inline std::vector<std::pair<int64_t, std::string>> files(const std::string& dir, const std::string& ending) {
    std::vector<std::pair<int64_t, std::string>> found;
    DIR* entries = opendir(dir.c_str());
    if (!entries && errno == ENOENT) return found;
    int error = entries ? 0 : errno;
    while (entries) {
        errno = 0;  // the end and an error look alike else
        const dirent* entry = readdir(entries);
        error = errno;
        if (!entry) break;
        const int64_t step = step_in_name(entry->d_name, ending);
        if (step >= 0) found.emplace_back(step, dir + "/" + entry->d_name);
    }
    if (entries) closedir(entries);
    if (error) fail("cannot list the checkpoints in %s: %s", dir.c_str(), strerror(error));
    std::sort(found.rbegin(), found.rend());
    return found;
}

// Whether a string can stand in the header as it is.
inline bool plain(const std::string& text) {
    return std::all_of(text.begin(), text.end(), [](char c) { return c >= ' ' && c <= '~' && c != '"' && c != '\\'; });
}

inline std::string hex(uint64_t sum) { return strprintf("%016" PRIx64, sum); }

// sums: (tensors) their checksums; however they are, the text has the same length.
inline std::string header_text(const Meta& meta, const std::vector<TensorInfo>& tensors,
                               const std::vector<uint64_t>& sums) {
    Meta all = meta;
    all["format"] = kFormat;
    all["checksum"] = hex(0);
    for (size_t i = 0; i < tensors.size(); i++) all["checksum." + tensors[i].name] = hex(sums[i]);
    std::string text = "{\"__metadata__\":{";
    for (const auto& [key, value] : all) text += "\"" + key + "\":\"" + value + "\",";
    text.back() = '}';
    uint64_t begin = 0;
    for (const TensorInfo& tensor : tensors) {
        const uint64_t end = begin + tensor.bytes();
        text += ",\"" + tensor.name + "\":{\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(end) +
                "],\"dtype\":\"F32\",\"shape\":[";
        for (size_t i = 0; i < tensor.shape.size(); i++) text += (i > 0 ? "," : "") + std::to_string(tensor.shape[i]);
        text += "]}";
        begin = end;
    }
    text += "}";
    text.resize(round_up(kLengthBytes + text.size(), kAlignment) - kLengthBytes, ' ');
    const std::string key = "\"checksum\":\"";
    return text.replace(text.find(key) + key.size(), hex(0).size(), hex(Checksum::of(text.data(), text.size())));
}
}  // namespace ckpt

// Writes under a temporary name, and gives the file its own name only when all of it is on the disk: a crash at any
// moment leaves the older checkpoints as they were. Use: construct, append() the tensors in the order given, which is
// that of their names, finish().
class CheckpointWriter {
  public:
    CheckpointWriter(const std::string& dir, int64_t step, const Meta& meta, const std::vector<TensorInfo>& tensors)
        : dir_(dir),
          step_(step),
          path_(strprintf("%s/step_%08lld%s", dir.c_str(), static_cast<long long>(step), ckpt::kSuffix)),
          meta_(meta),
          tensors_(tensors) {
        for (const auto& [key, value] : meta)
            if (!ckpt::plain(key + value)) fail("%s: odd characters in the meta data", path_.c_str());
        std::string before = "__metadata__";
        for (const TensorInfo& tensor : tensors) {
            if (!ckpt::plain(tensor.name)) fail("%s: odd characters in the name of a tensor", path_.c_str());
            if (tensor.name <= before) fail("%s: tensor '%s' is out of order", path_.c_str(), tensor.name.c_str());
            before = tensor.name;
        }
        std::error_code error;
        std::filesystem::create_directories(dir, error);
        if (error) give_up(error.value());
        for (const auto& left : ckpt::files(dir, ckpt::kUnfinished)) unlink(left.second.c_str());  // by a crash
        file_.path = strprintf("%s/step_%08lld%s", dir.c_str(), static_cast<long long>(step), ckpt::kUnfinished);
        file_.fd = open(file_.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (file_.fd < 0) give_up(errno);

        put_header(std::vector<uint64_t>(tensors_.size()));  // the checksums come when they are known
    }

    // The next bytes of the tensors, in pieces of any size.
    void append(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        while (bytes > 0) {
            if (sums_.size() == tensors_.size()) fail("%s: more tensor bytes than its header says", path_.c_str());
            const uint64_t size = tensors_[sums_.size()].bytes();
            const size_t piece = size_t(std::min<uint64_t>(bytes, size - tensor_done_));
            put(at, piece);
            at += piece, bytes -= piece, tensor_done_ += piece;
            if (tensor_done_ == size) sums_.push_back(end_part()), tensor_done_ = 0;
        }
    }

    // Makes the checkpoint appear, then removes all but the newest `keep`. Checkpoints of later steps go as well: they
    // were written before the run was resumed at an earlier step, and are no longer of its line.
    void finish(int64_t keep) {
        if (sums_.size() != tensors_.size()) fail("%s: fewer tensor bytes than its header says", path_.c_str());
        if (lseek(file_.fd, 0, SEEK_SET) != 0) give_up(errno);
        put_header(sums_);
        if (fsync(file_.fd) != 0) give_up(errno);
        if (rename(file_.path.c_str(), path_.c_str()) != 0) give_up(errno);
        file_.close();
        const int dir = open(dir_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);  // the new name must reach the disk too
        const bool synced = dir >= 0 && fsync(dir) == 0;
        const int error = errno;
        if (dir >= 0) close(dir);
        if (!synced) give_up(error);
        for (const auto& [step, path] : ckpt::files(dir_, ckpt::kSuffix)) {
            if (step > step_ || keep-- <= 0) unlink(path.c_str());
        }
    }

  private:
    // Closes the file and removes it, also when the constructor above throws. After the rename nothing has that name.
    struct Temporary {
        std::string path;
        int fd = -1;
        void close() {
            if (fd >= 0) ::close(fd), unlink(path.c_str());
            fd = -1;
        }
        Temporary() = default;
        Temporary(const Temporary&) = delete;
        ~Temporary() { close(); }
    };

    static constexpr size_t kBufferBytes = 1 << 20;

    const std::string dir_;
    const int64_t step_;
    const std::string path_;
    const Meta meta_;
    const std::vector<TensorInfo> tensors_;
    Temporary file_;
    std::string buffer_;          // what is not in the file yet
    Checksum checksum_;           // of the header or tensor that is being written, without buffer_
    std::vector<uint64_t> sums_;  // of the tensors written
    uint64_t tensor_done_ = 0;    // bytes of the current one

    [[noreturn]] void give_up(int error) const {
        fail("cannot write checkpoint %s: %s. Older checkpoints are untouched; make room or give another --out",
             path_.c_str(), strerror(error));
    }

    void put(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        while (bytes > 0) {
            const size_t piece = std::min(bytes, kBufferBytes - buffer_.size());
            buffer_.append(at, piece);
            at += piece, bytes -= piece;
            if (buffer_.size() == kBufferBytes) flush();
        }
    }

    void flush() {
        checksum_.update(buffer_.data(), buffer_.size());
        for (size_t done = 0; done < buffer_.size();) {
            const ssize_t wrote = write(file_.fd, buffer_.data() + done, buffer_.size() - done);
            if (wrote > 0) done += size_t(wrote);
            else if (wrote == 0 || errno != EINTR) give_up(wrote == 0 ? ENOSPC : errno);
        }
        buffer_.clear();
    }

    uint64_t end_part() {
        flush();
        return std::exchange(checksum_, Checksum()).value();
    }

    void put_header(const std::vector<uint64_t>& sums) {
        const std::string header = ckpt::header_text(meta_, tensors_, sums);
        const uint64_t length = header.size();
        put(&length, ckpt::kLengthBytes);
        put(header.data(), header.size());
        end_part();
    }
};

// A checkpoint, whose tensors are read in place (mapped). The constructor reads and verifies the header and the size of
// the file, which takes no time; a tensor is verified before it is handed out.
class Checkpoint {
  public:
    const std::string path;
    Meta meta;  // without format and checksums
    std::vector<TensorInfo> tensors;

    explicit Checkpoint(const std::string& path_) : path(path_), file_(path_, "checkpoint") {
        if (file_.bytes == 0) damaged("it is empty");
        const std::string_view content(file_.data, file_.bytes);
        if (content.substr(0, strlen(ckpt::kOldMagic)) == ckpt::kOldMagic)
            throw Damaged("checkpoint " + path +
                              " is of an earlier version of train_gpt, in a format that is no longer " +
                              "read: go on from it with the version that wrote it",
                          1);
        if (content.size() <= ckpt::kLengthBytes || content[ckpt::kLengthBytes] != '{') not_ours();
        uint64_t length;
        memcpy(&length, file_.data, ckpt::kLengthBytes);
        if (length > file_.bytes - ckpt::kLengthBytes) damaged("it ends within its header");
        if (length > ckpt::kMaxHeaderBytes) damaged(strprintf("it has a header of %" PRIu64 " bytes", length));
        const std::string_view header = content.substr(ckpt::kLengthBytes, length);
        const std::string format = strprintf("\"format\":\"%s", ckpt::kFormat);
        if (header.find(format + '"') == header.npos) {
            if (header.find(format) == header.npos) not_ours();
            fail("checkpoint %s is of a newer version of train_gpt: go on from it with that version", path.c_str());
        }
        data_begin_ = ckpt::kLengthBytes + length;  // floats are read where they lie
        if (data_begin_ % ckpt::kAlignment) damaged(strprintf("its tensors begin at byte %" PRIu64, data_begin_));
        parse(header);
        take_checksums();
        if (ckpt::header_text(meta, tensors, sums_) != header) damaged("its header has changed");
        const uint64_t expected = data_begin_ + (ends_.empty() ? 0 : ends_.back());
        if (file_.bytes != expected) {
            damaged(strprintf("it has %zu bytes, its header asks for %" PRIu64, file_.bytes, expected));
        }
    }

    // All of it, from the first byte to the last.
    void verify() const {
        for (size_t i = 0; i < tensors.size(); i++) verify(i);
    }

    // The values of a tensor that must have this many.
    const float* data(const std::string& name, uint64_t elements) const {
        const auto found = index_.find(name);
        if (found == index_.end()) {
            fail("checkpoint %s is of another model: it has no tensor %s", path.c_str(), name.c_str());
        }
        const uint64_t count = tensors[found->second].elements();
        if (count != elements) {
            fail("checkpoint %s is of another model: its tensor %s has %" PRIu64 " elements, not %" PRIu64,
                 path.c_str(), name.c_str(), count, elements);
        }
        verify(found->second);
        return reinterpret_cast<const float*>(bytes_of(found->second));
    }

  private:
    const MappedFile file_;
    uint64_t data_begin_ = 0;
    std::vector<uint64_t> ends_;           // (tensors) of each, from data_begin_; there the next one begins
    std::vector<uint64_t> sums_;           // (tensors)
    std::map<std::string, size_t> index_;  // name -> number of the tensor

    [[noreturn]] void damaged(const std::string& fault) const {
        throw Damaged("checkpoint " + path + " is damaged: " + fault + ". Resume from an older one", 1);
    }
    [[noreturn]] void not_ours() const {
        throw Damaged(
            path + " is not a checkpoint of train_gpt (scripts/hf.py import makes one of a Hugging Face model)", 1);
    }

    const char* bytes_of(size_t i) const { return file_.data + data_begin_ + (i > 0 ? ends_[i - 1] : 0); }

    void verify(size_t i) const {
        const bool same = Checksum::of(bytes_of(i), tensors[i].bytes()) == sums_[i];
        if (!same) damaged("tensor " + tensors[i].name + " has changed");
    }

    // Fills meta, tensors and ends_ from JSON in the one form that header_text() gives it: a list of pairs of strings,
    // a list of tensors, nothing that nests. No number in it is believed beyond what the file has room for.
    void parse(const std::string_view text) {
        size_t at = 0;
        auto expect = [&](const char* what) {
            if (text.substr(at, strlen(what)) != what)
                damaged(strprintf("its header has no %s at byte %zu of the file", what, ckpt::kLengthBytes + at));
            at += strlen(what);
        };
        auto string = [&] {
            expect("\"");
            const size_t end = std::min(text.find('"', at), text.size());
            const std::string value(text.substr(at, end - at));
            if (!ckpt::plain(value)) damaged(strprintf("its header has odd characters after byte %zu", at));
            at = end;
            expect("\"");
            return value;
        };
        auto integer = [&] {
            uint64_t value = 0;
            const auto [stop, error] = std::from_chars(text.data() + at, text.data() + text.size(), value);
            if (error != std::errc() || value > file_.bytes)
                damaged(strprintf("its header has an impossible number at byte %zu", ckpt::kLengthBytes + at));
            at = size_t(stop - text.data());
            return value;
        };
        auto another = [&] {
            const bool comma = text.substr(at, 1) == ",";
            at += comma;
            return comma;
        };
        expect("{\"__metadata__\":{");
        do {
            const std::string key = string();
            expect(":");
            meta[key] = string();
        } while (another());
        expect("}");
        std::string before = "__metadata__";
        uint64_t end = 0;  // of the tensors so far
        while (another()) {
            TensorInfo tensor = {string(), {}};
            const std::string what = "tensor " + tensor.name;
            if (tensor.name <= before) damaged(what + " is out of order");
            expect(":{\"data_offsets\":[");
            const uint64_t first = integer();
            expect(",");
            const uint64_t last = integer();
            expect("],\"dtype\":\"F32\",\"shape\":[");
            uint64_t left = file_.bytes / sizeof(float);  // no tensor has more elements than the file has room for
            if (text.substr(at, 1) != "]") do {
                    const uint64_t size = integer();
                    if (size < 1 || size > left) damaged(what + " has an impossible shape");
                    left /= size;
                    tensor.shape.push_back(int64_t(size));
                } while (another());
            expect("]}");
            if (first != end || last != end + tensor.bytes()) damaged(what + " is not where its shape puts it");
            ends_.push_back(end = last);
            index_[tensor.name] = tensors.size();
            before = tensor.name;
            tensors.push_back(std::move(tensor));
        }
        expect("}");
    }

    // Moves them from meta to sums_.
    void take_checksums() {
        for (const TensorInfo& tensor : tensors) {
            const std::string text = meta["checksum." + tensor.name];
            uint64_t sum = 0;
            std::from_chars(text.data(), text.data() + text.size(), sum, 16);
            if (text != ckpt::hex(sum)) damaged("its header has no checksum of tensor " + tensor.name);
            sums_.push_back(sum);
            meta.erase("checksum." + tensor.name);
        }
        meta.erase("checksum");
        meta.erase("format");
    }
};

inline std::vector<std::string> list_checkpoints(const std::string& dir) {  // newest first
    std::vector<std::string> paths;
    for (const auto& [step, path] : ckpt::files(dir, ckpt::kSuffix)) paths.push_back(path);
    return paths;
}

// Tells a checkpoint from all others by its header, which has the checksums of its tensors; "" if that can't be read.
inline std::string checkpoint_identity(const std::string& path) {
    std::error_code error;  // a FIFO would make us wait
    if (!std::filesystem::is_regular_file(path, error)) return "";
    const uint64_t bytes = std::filesystem::file_size(path, error);
    std::ifstream file(path, std::ios::binary);
    uint64_t length = 0;
    file.read(reinterpret_cast<char*>(&length), ckpt::kLengthBytes);
    if (error || !file || length > std::min<uint64_t>(bytes, ckpt::kMaxHeaderBytes)) return "";
    std::string header(length, ' ');
    file.read(header.data(), std::streamsize(length));
    return file ? ckpt::hex(Checksum::of(header.data(), header.size())) : "";
}

// For --resume auto: the newest checkpoint that is whole, "" if there is none. Says which ones it passes over, and why.
// A file that cannot be read may be good: that is an error, and no reason to go on from an older one.
inline std::string newest_good_checkpoint(const std::string& dir, FILE* say) {
    for (const std::string& path : list_checkpoints(dir)) {
        try {
            Checkpoint(path).verify();
            return path;
        } catch (const Damaged& error) {
            fprintf(say, "skipping a checkpoint: %s\n", one_line(error.what()).c_str());
        }
    }
    return "";
}
