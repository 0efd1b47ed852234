// checkpoint.h: one file per save, DIR/step_00000100.ckpt, that is either whole and right or refused.
// Read: the layout below, Checksum, CheckpointWriter, Checkpoint (the reader), newest_good_checkpoint().
//
//   kMagic "TRAINGPT" | u64 bytes of the table | u64 checksum of the table         24 bytes
//   the table, as text (try `head -c 2000` on a checkpoint), filled up with newlines to byte 64k:
//       meta KEY VALUE                         what the run needs to go on: step, config, tokenizer, ...
//       tensor NAME f32 DIM DIM ...            what follows, in this order
//   each tensor, little endian, filled up with zeros to a multiple of 64 bytes
//   u64 checksum of each tensor (with its zeros) | u64 checksum of these checksums
//
// Every byte of the file is under a checksum or compared with what it must be. Nothing in it depends on the time, on
// paths or on the number of ranks: equal runs write equal files.
#pragma once
#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cinttypes>
#include <cstring>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "common.h"

using Meta = std::map<std::string, std::string>;  // keys without spaces, values on one line

struct TensorInfo {
    std::string name;  // without spaces
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

// A 64-bit checksum against accidents, near the speed of memory: four lanes, so that the multiplications overlap. Each
// step is one-to-one in the lane and in the word, hence damage within any one word always shows; other damage goes
// unseen with a chance of about 2^-64. Every update but the last takes a multiple of 32 bytes.
class Checksum {
  public:
    void update(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        for (size_t blocks = bytes / 32; blocks > 0; blocks--, at += 32) {
            uint64_t words[4];
            memcpy(words, at, 32);
            for (int i = 0; i < 4; i++) lanes_[i] = step(lanes_[i], words[i]);
        }
        for (size_t i = 0; i < bytes % 32; i++) lanes_[0] = step(lanes_[0], uint8_t(at[i]));
        length_ += bytes;
    }
    uint64_t value() const {
        uint64_t sum = step(0, length_);
        for (uint64_t lane : lanes_) sum = step(sum, lane);
        return sum ^ (sum >> 29);
    }
    static uint64_t of(const void* data, size_t bytes) {
        Checksum checksum;
        checksum.update(data, bytes);
        return checksum.value();
    }

  private:
    uint64_t lanes_[4] = {1, 2, 3, 4};
    uint64_t length_ = 0;

    static uint64_t step(uint64_t sum, uint64_t word) {
        sum = (sum ^ word) * 0x9fb21c651e98df25u;  // odd: can be undone
        return sum << 27 | sum >> 37;              // products carry upwards only; the turn brings high bits down
    }
};

namespace ckpt {
constexpr char kMagic[] = "TRAINGPT";  // 8 bytes, without the final zero
constexpr uint64_t kHeaderBytes = 24, kAlignment = 64;
constexpr char kSuffix[] = ".ckpt", kUnfinished[] = ".ckpt.tmp";

// The step in "step_00000100.ckpt", or -1 if the name is none of ours.
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
}  // namespace ckpt

// Writes under a temporary name, and gives the file its own name only when all of it is on the disk: a crash at any
// moment leaves the older checkpoints as they were. Use: construct, append() the tensors in table order, finish().
class CheckpointWriter {
  public:
    CheckpointWriter(const std::string& dir, int64_t step, const Meta& meta, const std::vector<TensorInfo>& tensors)
        : dir_(dir),
          step_(step),
          path_(strprintf("%s/step_%08lld%s", dir.c_str(), static_cast<long long>(step), ckpt::kSuffix)),
          tensors_(tensors) {
        std::error_code error;
        std::filesystem::create_directories(dir, error);
        if (error) give_up(error.value());
        for (const auto& left : ckpt::files(dir, ckpt::kUnfinished)) unlink(left.second.c_str());  // by a crash
        file_.path = strprintf("%s/step_%08lld%s", dir.c_str(), static_cast<long long>(step), ckpt::kUnfinished);
        file_.fd = open(file_.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        if (file_.fd < 0) give_up(errno);

        std::string table;
        for (const auto& [key, value] : meta) {
            const bool fits = key.find_first_of(" \n") == std::string::npos && value.find('\n') == std::string::npos;
            if (!fits) fail("%s: meta data '%s' does not fit on a line", path_.c_str(), key.c_str());
            table += "meta " + key + " " + value + "\n";
        }
        for (const TensorInfo& tensor : tensors_) {
            table += "tensor " + tensor.name + " f32";
            for (int64_t size : tensor.shape) table += " " + std::to_string(size);
            table += "\n";
        }
        table.resize(round_up(ckpt::kHeaderBytes + table.size(), ckpt::kAlignment) - ckpt::kHeaderBytes, '\n');
        const uint64_t header[2] = {table.size(), Checksum::of(table.data(), table.size())};
        put(ckpt::kMagic, 8);
        put(header, sizeof(header));
        put(table.data(), table.size());
        end_section();
    }

    // The next bytes of the tensors, in pieces of any size.
    void append(const void* data, size_t bytes) {
        const char* at = static_cast<const char*>(data);
        while (bytes > 0) {
            if (sums_.size() == tensors_.size()) fail("%s: more tensor bytes than its table says", path_.c_str());
            const uint64_t size = tensors_[sums_.size()].bytes();
            const size_t piece = size_t(std::min<uint64_t>(bytes, size - tensor_done_));
            put(at, piece);
            at += piece, bytes -= piece, tensor_done_ += piece;
            if (tensor_done_ == size) sums_.push_back(end_section()), tensor_done_ = 0;
        }
    }

    // Makes the checkpoint appear, then removes all but the newest `keep`. Checkpoints of later steps go as well: they
    // were written before the run was resumed at an earlier step, and are no longer of its line.
    void finish(int64_t keep) {
        if (sums_.size() != tensors_.size()) fail("%s: fewer tensor bytes than its table says", path_.c_str());
        const uint64_t sum_of_sums = Checksum::of(sums_.data(), sums_.size() * sizeof(uint64_t));
        put(sums_.data(), sums_.size() * sizeof(uint64_t));
        put(&sum_of_sums, sizeof(sum_of_sums));
        flush();
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

    static constexpr size_t kBufferBytes = 1 << 20;  // a multiple of ckpt::kAlignment, as Checksum::update asks

    const std::string dir_;
    const int64_t step_;
    const std::string path_;
    const std::vector<TensorInfo> tensors_;
    Temporary file_;
    std::string buffer_;          // what is not in the file yet
    Checksum checksum_;           // of the current section so far, without buffer_
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

    uint64_t end_section() {
        buffer_.resize(round_up<uint64_t>(buffer_.size(), ckpt::kAlignment), '\0');
        flush();
        return std::exchange(checksum_, Checksum()).value();
    }
};

// A checkpoint, whose tensors are read in place (mapped). The constructor reads and verifies the table and the size of
// the file, which takes no time; a tensor is verified before it is handed out.
class Checkpoint {
  public:
    const std::string path;
    Meta meta;
    std::vector<TensorInfo> tensors;

    explicit Checkpoint(const std::string& path_) : path(path_), file_(path_, "checkpoint") {
        if (file_.bytes == 0) damaged("it is empty");
        const char* table = file_.data + ckpt::kHeaderBytes;
        uint64_t header[2] = {};  // bytes of the table, its checksum
        if (file_.bytes < ckpt::kHeaderBytes || memcmp(file_.data, ckpt::kMagic, 8) != 0)
            throw Damaged(path + " is not a checkpoint of train_gpt", 1);
        memcpy(header, file_.data + 8, sizeof(header));
        if (header[0] > file_.bytes - ckpt::kHeaderBytes) damaged("it ends within its table");
        if (Checksum::of(table, header[0]) != header[1]) damaged("its table has changed");
        parse_table(std::string(table, header[0]));

        uint64_t end = ckpt::kHeaderBytes + header[0];  // of what is known so far
        for (size_t i = 0; i < tensors.size(); i++) {
            sections_.push_back({end, round_up(tensors[i].bytes(), ckpt::kAlignment)});
            end += sections_.back().count;
            index_[tensors[i].name] = i;
        }
        const uint64_t sums_bytes = tensors.size() * sizeof(uint64_t), expected = end + sums_bytes + sizeof(uint64_t);
        if (file_.bytes != expected) {
            damaged(strprintf("it has %zu bytes, its table asks for %" PRIu64, file_.bytes, expected));
        }
        sums_.resize(tensors.size() + 1);
        memcpy(sums_.data(), file_.data + end, sums_bytes + sizeof(uint64_t));
        if (Checksum::of(sums_.data(), sums_bytes) != sums_.back()) damaged("its list of checksums has changed");
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
        return reinterpret_cast<const float*>(file_.data + sections_[found->second].begin);
    }

  private:
    const MappedFile file_;
    std::vector<Range> sections_;          // (tensors) bytes of each, with its zeros
    std::vector<uint64_t> sums_;           // (tensors + 1) checksum of each, and of these
    std::map<std::string, size_t> index_;  // name -> number of the tensor

    [[noreturn]] void damaged(const std::string& fault) const {
        throw Damaged("checkpoint " + path + " is damaged: " + fault + ". Resume from an older one", 1);
    }

    void verify(size_t i) const {
        const Range& section = sections_[i];
        const bool same = Checksum::of(file_.data + section.begin, section.count) == sums_[i];
        if (!same) damaged("tensor " + tensors[i].name + " has changed");
    }

    // The table is what was written, by its checksum; the checks are for files of another version or make.
    void parse_table(const std::string& table) {
        std::istringstream lines(table);
        for (std::string line; std::getline(lines, line);) {
            std::istringstream words(line);
            std::string kind, name, type;
            words >> kind >> name;
            if (kind == "meta") {
                meta[name] = line.substr(std::min(line.size(), kind.size() + name.size() + 2));
            } else if (kind == "tensor") {
                TensorInfo tensor = {name, {}};
                words >> type;
                uint64_t left = file_.bytes / sizeof(float);  // no tensor has more elements than the file has room for
                for (int64_t size; words >> size;) {
                    if (size < 1 || uint64_t(size) > left) damaged("tensor " + name + " has an impossible shape");
                    left /= uint64_t(size);
                    tensor.shape.push_back(size);
                }
                if (type != "f32" || !words.eof()) damaged("its table has a line that is not understood: " + line);
                tensors.push_back(tensor);
            } else if (!line.empty()) {
                damaged("its table has a line that is not understood: " + line);
            }
        }
    }
};

inline std::vector<std::string> list_checkpoints(const std::string& dir) {  // newest first
    std::vector<std::string> paths;
    for (const auto& [step, path] : ckpt::files(dir, ckpt::kSuffix)) paths.push_back(path);
    return paths;
}

// For --resume auto: the newest checkpoint that is whole, "" if there is none. Says which ones it passes over, and why.
// A file that cannot be read may be good: that is an error, and no reason to go on from an older one.
inline std::string newest_good_checkpoint(const std::string& dir, FILE* say) {
    for (const std::string& path : list_checkpoints(dir)) {
        try {
            Checkpoint(path).verify();
            return path;
        } catch (const Damaged& error) {
            fprintf(say, "skipping a checkpoint: %s\n", error.what());
        }
    }
    return "";
}
