// common.h: what every room may use. Errors that end in one clear line, a printf into std::string, text that may go to
// a terminal, a file mapped into memory, integer helpers, and the few plain types that appear in the signatures of both
// backends (cpu_backend.h, cuda_backend.cuh).
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

// Thrown by fail() and usage_fail(), printed by main() as one line. The exit code is 1 for a fault (a file, a device, a
// lost rank) and 2 for a command line that makes no sense.
struct Error : std::runtime_error {
    int exit_code;
    Error(const std::string& message, int code) : std::runtime_error(message), exit_code(code) {}
};

inline std::string vstrprintf(const char* format, va_list args) {
    va_list again;
    va_copy(again, args);
    std::string text(vsnprintf(nullptr, 0, format, args), '\0');
    vsnprintf(&text[0], text.size() + 1, format, again);
    va_end(again);
    return text;
}

__attribute__((format(printf, 1, 2))) inline std::string strprintf(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = vstrprintf(format, args);
    va_end(args);
    return text;
}

// Text from a model, or a file name, as it may go to a terminal: bytes that would steer it, and bytes that are no
// UTF-8, as \xHH.
inline std::string printable(const std::string& text) {
    std::string shown;
    for (size_t i = 0; i < text.size();) {
        const uint8_t c = uint8_t(text[i]);
        const size_t length = c < 0x80 ? 1 : c >= 0xc2 && c < 0xe0 ? 2 : c >= 0xe0 && c < 0xf0 ? 3 : c < 0xf5 ? 4 : 0;
        uint32_t point = length == 1 ? c : c & (0xff >> (length + 1));
        bool good = length == 1 ? c == '\n' || c == '\t' || (c >= 0x20 && c != 0x7f) : c >= 0xc2 && length > 0;
        for (size_t k = 1; good && k < length; k++) {
            good = i + k < text.size() && (text[i + k] & 0xc0) == 0x80;
            if (good) point = point << 6 | (text[i + k] & 0x3f);
        }
        // Control characters again, forms longer than need be, surrogates, beyond Unicode.
        const uint32_t least[] = {0, 0, 0xa0, 0x800, 0x10000};
        good = good && point >= least[length] && !(point >= 0xd800 && point < 0xe000) && point <= 0x10ffff;
        if (good) shown.append(text, i, length);
        else shown += strprintf("\\x%02x", c);
        i += good ? length : 1;
    }
    return shown;
}

// And on one line.
inline std::string one_line(const std::string& text) {
    std::string line;
    for (char c : printable(text)) line += c == '\n' ? "\\n" : std::string(1, c);
    return line;
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = vstrprintf(format, args);
    va_end(args);
    throw Error(text, 1);
}

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void usage_fail(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = vstrprintf(format, args);
    va_end(args);
    throw Error(text, 2);
}

// A whole file in memory, read only; the page cache is shared by all ranks of a machine. `what` names its kind in
// errors. A page that cannot be read is no error that a reader sees but a SIGBUS: end_on_unreadable_files() (ranks.h).
class MappedFile {
  public:
    const std::string path;
    const std::string unreadable;  // the message for that, made here: its handler must not allocate
    const char* data = nullptr;    // (bytes), null for an empty file
    size_t bytes = 0;

    MappedFile(const std::string& path_, const char* what)
        : path(path_),
          unreadable(one_line(strprintf("cannot read %s %s: an I/O error, or it was cut short while it was read", what,
                                        path.c_str()))) {
        // O_NONBLOCK: a FIFO is refused below, it must not block here
        const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd < 0) fail("cannot open %s %s: %s", what, path.c_str(), strerror(errno));
        struct stat info = {};
        const bool file = fstat(fd, &info) == 0 && S_ISREG(info.st_mode);
        if (file) bytes = size_t(info.st_size);
        void* memory = bytes > 0 ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED, fd, 0) : nullptr;
        const int error = errno;
        close(fd);  // the mapping stays
        if (!file) fail("%s %s is not a file", what, path.c_str());
        if (memory == MAP_FAILED) fail("cannot map %s %s: %s", what, path.c_str(), strerror(error));
        data = static_cast<const char*>(memory);
        inode_ = info.st_ino;
        const ListLock lock;
        list_.push_back(this);
    }
    MappedFile(const MappedFile&) = delete;
    ~MappedFile() {
        {
            const ListLock lock;
            list_.erase(std::find(list_.begin(), list_.end(), this));
        }
        if (data) munmap(const_cast<char*>(data), bytes);
    }

    // The file that is mapped at an address, null if none is. For the handler: whoever has the lock reads no file, so
    // that it is another thread, which goes on.
    static const MappedFile* at(const void* address) {
        const ListLock lock;
        for (const MappedFile* file : list_)
            if (uintptr_t(address) - uintptr_t(file->data) < file->bytes) return file;
        return nullptr;
    }

    // When a file is cut short, the pages beyond its end cannot be read, and what is missing of its last page reads as
    // zeros. A look at the size before each read costs a microsecond, sees both, and says what happened.
    bool was_cut_short() const {
        struct stat info;
        const bool same_file = stat(path.c_str(), &info) == 0 && info.st_ino == inode_;
        return same_file && uint64_t(info.st_size) < bytes;
    }

  private:
    ino_t inode_ = 0;

    // All that there are, and their lock; no mutex, as a handler may not take one.
    static inline std::vector<const MappedFile*> list_;
    struct ListLock {
        static inline std::atomic_flag taken = ATOMIC_FLAG_INIT;
        ListLock() {
            while (taken.test_and_set()) {}
        }
        ~ListLock() { taken.clear(); }
    };
};

template <class T>
constexpr T ceil_div(T a, T b) {
    return (a + b - 1) / b;
}
template <class T>
constexpr T round_up(T a, T b) {
    return ceil_div(a, b) * b;
}

// The widest model: a row of it, or of one head, stays in the registers of a CUDA warp.
constexpr int kMaxChannels = 8192, kMaxHeadSize = 256;

constexpr float kLayerNormEpsilon = 1e-5f, kAdamWEpsilon = 1e-8f;

// Rows of a tile of attention on Hopper, whose backward leaves sums over each tile's rows of dQ, dK and dV: so many
// floats of scratch. It grows with the batch, so that --print_plan counts it.
constexpr int kAttentionTile = 64;
constexpr size_t attention_row_sums(int B, int T, int C) { return size_t(B) * ceil_div(T, kAttentionTile) * 3 * C; }

// GPT-2's GELU: x/2 (1 + tanh(u)), u = kGeluScale (x + kGeluCubic x^3). With s = sigmoid(2u) it equals x s: no
// cancellation for negative x, and one exponential. Its derivative is s + x s (1 - s) 2u'.
constexpr float kGeluScale = 0.7978845608f;  // sqrt(2/pi)
constexpr float kGeluCubic = 0.044715f;

// Storage type of the Newton-Schulz iterate; products accumulate in fp32 whatever it is.
enum class NsType { bf16, fp16, fp32 };
inline size_t ns_type_bytes(NsType type) { return type == NsType::fp32 ? 4 : 2; }

// The two shapes of product that Newton-Schulz needs: A A^T (or any product known to be symmetric), and A B.
enum class NsProduct { symmetric_nt, nn };

// A chain of products (Backend::NsChain) counts which of its tiles are done, in this many ints of device memory.
constexpr int kNsChainProducts = 36;  // at most
constexpr size_t ns_chain_counters(int matrices) { return 1 + size_t(kNsChainProducts) * matrices; }

// A rectangle of the gradients: what one thread block (one thread of the CPU) sums for the norms, and of Muon's
// matrices the momentum beside it.
struct NormBlock {
    size_t offset, state;  // of its first element, in the arenas and in the owner's fp32 state
    int ld;                // row stride in both
    int rows, cols;        // no rows: another rank's
    bool muon;             // has momentum
    bool counted;          // adds to the clip norm here: of a matrix that every rank has only rank 0's does
};

// A matrix, or a tile of one, for Newton-Schulz, which takes matrices lying down: (m, n) with m <= n.
struct MatrixRef {
    size_t offset, state;             // of its first element, in the arenas and in the owner's fp32 state
    int ld;                           // row stride in both
    bool tall = false;                // there it stands up: (n, m)
    float scale = 1;                  // of its update
    int first_block = 0, blocks = 0;  // the NormBlocks that it consists of
};

// |x|^2 of Muon's x = a g + b buf comes from sums of g and buf in double, see muon_inverse_norms. Where the two cancel,
// it is taken for at least this share of a^2 g.g + b^2 buf.buf. There fp32 rounds x by up to 1.5e-7 of the root of that
// sum, which is 1.5% of the smallest norm so allowed: |X| <= 1.015, and the polynomials have room for that.
constexpr double kLeastNormSquared = 1e-10;
