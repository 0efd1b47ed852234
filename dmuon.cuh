// dmuon.cuh: the optimizer step over the ranks. AdamW, vanilla Muon and DMuon, written once for both backends.
//
// Read in this order:
//   1. Plan           who owns which matrix, and how parameters lie in memory so that every collective works in place
//   2. newton_schulz  the iteration that orthogonalises matrices
//   3. Optimizer      one step: reduce gradients -> clip -> momentum -> Newton-Schulz -> update -> gather weights
//   4. print_plan     the same plan as numbers, for any number of ranks, without a GPU
//
// The mathematics of one Muon step for a matrix W with gradient g (Keller Jordan, "Muon", 2024; Moonlight arXiv
// 2502.16982):
//
//     buf = mu buf + g                     momentum, fp32, kept by the owner alone
//     x   = g + mu buf                     Nesterov
//     U   = NS(x / |x|_F)                  about the polar factor of x: the same singular vectors, values near 1
//     W   = (1 - lr wd) W - lr scale(rows, cols) U
//
// DMuon (arXiv 2606.27153): each matrix has one owner, to which alone its gradient goes, which keeps its fp32 weights
// and momentum and runs Newton-Schulz; then everyone gathers the new weights. Against vanilla Muon, where every rank
// does it all, arithmetic and state fall by the number of ranks, and while owners balance less travels (fp32 gradients
// one way, bf16 weights back) than in an all-reduce of the gradients.
#pragma once
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "comm.h"
#include "common.h"
#include "flags.h"
#include "timeline.h"

// ---------------------------------------------------------------------------------------------------------------------
// 1. Plan: tensors, pieces, buckets
//
// Words, which mean the same in every file:
//
//     tensor   a parameter as the model declares it, and as a checkpoint names it
//     piece    a run of one tensor that has one owner: for Muon a whole matrix
//     arena    all parameters (real), or all their gradients (float), at the same offsets
//     bucket   a run of the arenas that one collective moves
//     chunk    one rank's share of a bucket; all chunks of a bucket are equal
//     block    a rectangle of a tensor whose squares are summed together
//     state    what a rank keeps in fp32 of the pieces it owns: master weights and moments, its chunk of every bucket
//              one after the other
//     tile     a rectangle of a matrix: what --muon_tile orthogonalises by itself; of a product, what one thread block
//              (one thread of the CPU) computes
//     slice    a run of rows whose sum one thread block (one thread of the CPU) takes
//     batch    the sequences of one micro-step; matrices that go through Newton-Schulz together are a ShapeGroup
//
//     arena   | flat bucket: embeddings, vectors   | bucket: layers 0..b-1  | bucket: layers b..2b-1 | ...
//     chunks  | rank 0 | rank 1 | ... | rank N-1   | 0 | 1 | ...    | N-1   | 0 | 1 | ...    | N-1   | ...
//     pieces  | tensors, cut where a chunk ends    | whole matrices: Q | K | V | ...
//
// so one in-place reduce_scatter of a bucket brings every gradient to its owner and one in-place all_gather brings the
// new weights back. The flat bucket is ZeRO-1 (arXiv 1910.02054): AdamW is elementwise and may be cut anywhere; under
// `adamw` the buckets of the layers are such too. Under `muon` (the vanilla baseline) they are replicated: their
// gradients are all-reduced and every rank updates them in full.
//
// Collectives run beside the model. A bucket of layers starts to its owners as soon as the backward has passed its
// lowest layer, and the next forward waits for its weights only where it comes to its first. The flat bucket is
// complete last: the token embedding is also the head, whose gradient is ready first, but its own part only when the
// backward ends. So its reduction is waited for; and its weights, which the next forward needs first, are updated
// first, so that they travel while the matrices go through Newton-Schulz.
//
// Equal chunks are as large as the fullest rank's. With balanced owners that costs nothing; with more ranks than
// matrices a chunk is still a whole matrix, so memory and traffic grow with the ranks (--print_plan says by how much):
// beyond that number, data parallelism wants to be split otherwise.

// What a parameter tensor is: decides its optimizer, its weight decay and its initial values.
enum class TensorKind { token_embedding, position_embedding, matrix, residual_projection, layernorm_weight, bias };

// A parameter tensor as the model declares it.
struct TensorSpec {
    std::string name;
    TensorKind kind;
    int rows, cols;     // a vector is one row
    int layer;          // -1: outside the layers
    int stored_rows;    // rows that a checkpoint keeps: all but the padding of the vocabulary
    int split = 1;      // how many equal matrices its rows stack: 3 for qkv (Q, K, V)
    int head_rows = 0;  // of qkv: the rows of one head

    TensorSpec(const std::string& name_, TensorKind kind_, int rows_, int cols_, int layer_ = -1)
        : name(name_), kind(kind_), rows(rows_), cols(cols_), layer(layer_), stored_rows(rows_) {}

    size_t size() const { return size_t(rows) * cols; }
    size_t stored_size() const { return size_t(stored_rows) * cols; }
    // A hidden 2-D matrix: Muon's. Everything else is AdamW's.
    bool hidden() const { return kind == TensorKind::matrix || kind == TensorKind::residual_projection; }
    bool decays() const {  // the 2-D tensors have weight decay
        return kind != TensorKind::layernorm_weight && kind != TensorKind::bias;
    }
};

enum class Method { adamw, muon, dmuon };

inline Method method_of(const Options& options) {
    return options.optimizer == "adamw" ? Method::adamw : options.optimizer == "muon" ? Method::muon : Method::dmuon;
}

struct Piece {
    int tensor;
    size_t begin, count;  // elements of the tensor
    int rows, cols;       // of Muon's matrix; else 1, count
    int owner;            // rank, or -1: replicated
    size_t offset;        // elements from the start of the arenas
};

struct Bucket {
    size_t begin, chunk;  // elements; a reduced bucket is `ranks` chunks, a replicated one a single chunk
    bool replicated;
    int layer;               // its lowest; -1: the flat one
    size_t state_begin = 0;  // where the state of a rank's chunk lies in that rank's state
};

// The clip norm is summed tensor by tensor, over blocks of at most this many elements, cut at positions that depend on
// the tensors and on --muon_qkv and --muon_tile alone: the same gradients give the same norm, bit for bit, whatever the
// ranks and owners. Chunks of the flat bucket are whole blocks.
constexpr size_t kNormBlock = 16384;

// Calls f(row, col, rows, cols) for every tile of a matrix that is orthogonalised by itself: the whole, its heads under
// --muon_qkv heads, and T x T tiles of these under --muon_tile T (Hierarchical Muon, arXiv 2606.27216).
template <class F>
void for_each_tile(const Piece& piece, const TensorSpec& tensor, const Options& options, F f) {
    const int height = options.muon_qkv == "heads" && tensor.head_rows > 0 ? tensor.head_rows : piece.rows;
    const int tile = options.muon_tile > 0 ? options.muon_tile : std::max(piece.rows, piece.cols);
    for (int first = 0; first < piece.rows; first += height)
        for (int r = 0; r < height; r += tile)
            for (int c = 0; c < piece.cols; c += tile)
                f(first + r, c, std::min(tile, height - r), std::min(tile, piece.cols - c));
}

double ns_flops(const Options& options, const Piece& piece, const TensorSpec& tensor);  // section 2

struct Plan {
    Method method;
    int ranks;
    std::vector<TensorSpec> tensors;
    std::vector<Piece> pieces;    // in tensor order
    std::vector<Bucket> buckets;  // buckets[0] is the flat one
    size_t decay_end = 0;         // of the flat bucket, the tensors with weight decay come first and end here
    size_t arena = 0;             // elements of each arena
    size_t state_elements = 0;    // of one rank, each moment by itself
    int layers_per_bucket = 0;
    int64_t ns_matrices = 0;  // matrices (or tiles) that a step puts through Newton-Schulz, over all ranks
    bool trains;              // --steps 0 only evaluates: weights and masters alone are allocated

    Plan(std::vector<TensorSpec> specs, const Options& options, int ranks_)
        : method(method_of(options)), ranks(ranks_), tensors(std::move(specs)), trains(options.steps > 0) {
        place_flat();
        place_layers(options);
        std::stable_sort(pieces.begin(), pieces.end(), [](const Piece& a, const Piece& b) {
            return std::make_pair(a.tensor, a.begin) < std::make_pair(b.tensor, b.begin);
        });
        const Bucket& last = buckets.back();
        arena = last.begin + last.chunk * (last.replicated ? 1 : ranks);
        for (Bucket& bucket : buckets) {
            bucket.state_begin = state_elements;
            state_elements += bucket.chunk;
        }
        for (const Piece& piece : pieces)
            if (is_muon(piece.tensor))
                for_each_tile(piece, tensors[piece.tensor], options,
                              [&](int, int, int, int) { ns_matrices += piece.owner < 0 ? ranks : 1; });
    }

    // Where rank `rank` has its chunk of a bucket, in the arenas.
    size_t chunk_begin(const Bucket& bucket, int rank) const {
        return bucket.begin + (bucket.replicated ? 0 : rank * bucket.chunk);
    }

    // Where rank `rank` keeps the state of the element at `offset` of the arenas, which it must own.
    size_t state_offset(size_t offset, int rank) const {
        for (const Bucket& bucket : buckets) {
            const size_t begin = chunk_begin(bucket, rank);
            if (offset >= begin && offset < begin + bucket.chunk) return bucket.state_begin + offset - begin;
        }
        fail("internal: element %zu is not in a chunk of rank %d", offset, rank);
    }

    // The bucket with the matrices of a layer.
    size_t bucket_of(int layer) const { return 1 + layer / layers_per_bucket; }

    // Elements of a rank's state that are AdamW's, which come first.
    size_t adamw_state() const { return method == Method::adamw ? state_elements : buckets[0].chunk; }

    // Bytes of what a rank has: weights, of `element` bytes each, and gradients; masters and moments
    size_t weight_bytes(size_t element) const { return arena * (element + (trains ? sizeof(float) : 0)); }
    size_t state_bytes() const {
        return (state_elements + (trains ? state_elements + adamw_state() : 0)) * sizeof(float);
    }
    size_t bytes(size_t element) const { return weight_bytes(element) + state_bytes(); }

    size_t adamw_elements() const {
        size_t sum = 0;
        for (int t = 0; t < int(tensors.size()); t++) sum += is_muon(t) ? 0 : tensors[t].size();
        return sum;
    }

    bool is_muon(int tensor) const { return method != Method::adamw && tensors[tensor].hidden(); }

    // The offset of the element `begin` of a tensor, where a piece starts.
    size_t offset_of(int tensor, size_t begin = 0) const {
        for (const Piece& piece : pieces)
            if (piece.tensor == tensor && begin >= piece.begin && begin < piece.begin + piece.count)
                return piece.offset + begin - piece.begin;
        fail("internal: no piece holds element %zu of %s", begin, tensors[tensor].name.c_str());
    }

  private:
    // The tensors that are no hidden matrices one after the other, those with weight decay first.
    void place_flat() {
        std::vector<Piece> members;
        size_t flat = 0;
        for (bool decay : {true, false}) {
            for (int t = 0; t < int(tensors.size()); t++)
                if (tensors[t].decays() == decay && !tensors[t].hidden()) add_whole(members, t, flat, 64);
            if (decay) decay_end = flat;
        }
        place_cut(members, 0, flat, -1);
    }

    // A tensor at `end`, which moves on; starts are multiples of `alignment` elements.
    void add_whole(std::vector<Piece>& members, int tensor, size_t& end, size_t alignment) const {
        const TensorSpec& spec = tensors[tensor];
        members.push_back({tensor, 0, spec.size(), spec.rows, spec.cols, -1, end});
        end += round_up(spec.size(), alignment);
    }

    // A bucket of tensors whose offsets in it are given, cut where chunks end. Chunks are whole ranges of the norm.
    void place_cut(const std::vector<Piece>& members, size_t bucket_begin, size_t elements, int layer) {
        const size_t chunk = round_up(ceil_div<size_t>(elements, ranks), kNormBlock);
        buckets.push_back({bucket_begin, chunk, false, layer});
        for (const Piece& whole : members)
            for (size_t begin = 0; begin < whole.count;) {
                const size_t offset = whole.offset + begin;
                const size_t count = std::min(whole.count - begin, (offset / chunk + 1) * chunk - offset);
                pieces.push_back(
                    {whole.tensor, begin, count, 1, int(count), int(offset / chunk), bucket_begin + offset});
                begin += count;
            }
    }

    // Muon's matrices in tensor order: Q, K and V by themselves unless --muon_qkv fused.
    std::vector<Piece> matrices(const Options& options) const {
        std::vector<Piece> all;
        for (int t = 0; t < int(tensors.size()); t++) {
            const TensorSpec& spec = tensors[t];
            if (!spec.hidden()) continue;
            int stacked = options.muon_qkv == "fused" ? 1 : spec.split, rows = spec.rows / stacked;
            for (int i = 0; i < stacked; i++)
                all.push_back({t, size_t(i) * rows * spec.cols, size_t(rows) * spec.cols, rows, spec.cols, -1, 0});
        }
        return all;
    }

    // Owners first, then buckets of whole layers. dmuon: the fewest layers that leave every bucket balanced, else all
    // in one bucket. Else one layer, or, where nothing is sent, all.
    void place_layers(const Options& options) {
        std::vector<Piece> all = matrices(options);
        if (method == Method::dmuon && options.owner == "lpt") assign_lpt(all, options);
        else if (method == Method::dmuon) assign_round_robin(all);
        int layers = 1;
        for (const TensorSpec& tensor : tensors) layers = std::max(layers, tensor.layer + 1);
        layers_per_bucket = layers;
        for (int b = ranks > 1 || method == Method::dmuon ? 1 : layers; b < layers; b++)
            if (layers % b == 0 && (method != Method::dmuon || balanced(all, b))) {
                layers_per_bucket = b;
                break;
            }
        size_t begin = buckets[0].chunk * ranks;
        for (int first = 0; first < layers; first += layers_per_bucket) {
            auto in_bucket = [&](int tensor) {
                const int layer = tensors[tensor].layer;
                return tensors[tensor].hidden() && layer >= first && layer < first + layers_per_bucket;
            };
            if (method == Method::adamw) {
                std::vector<Piece> members;
                size_t elements = 0;
                for (int t = 0; t < int(tensors.size()); t++)  // aligned, so that ranges lie in a tensor as ever
                    if (in_bucket(t)) add_whole(members, t, elements, kNormBlock);
                place_cut(members, begin, elements, first);
                begin += buckets.back().chunk * ranks;
                continue;
            }
            // Each owner's matrices one after the other; of replicated ones nobody is the owner, and all go one after
            // the other.
            const bool replicated = method == Method::muon;
            std::vector<Piece> members;
            std::vector<size_t> used(ranks, 0);  // of each owner's chunk
            for (Piece piece : all) {
                if (!in_bucket(piece.tensor)) continue;
                size_t& end = used[std::max(piece.owner, 0)];
                piece.offset = std::exchange(end, end + round_up<size_t>(piece.count, 64));
                members.push_back(piece);
            }
            const size_t chunk = *std::max_element(used.begin(), used.end());
            for (Piece& piece : members) {
                piece.offset += begin + std::max(piece.owner, 0) * chunk;
                pieces.push_back(piece);
            }
            buckets.push_back({begin, chunk, replicated, first});
            begin += chunk * (replicated ? 1 : ranks);
        }
    }

    // The i-th matrix of a shape goes to rank i mod ranks; fc (4C,C) and its projection (C,4C) count as one shape.
    void assign_round_robin(std::vector<Piece>& all) const {
        std::map<std::pair<int, int>, int> seen;
        for (Piece& piece : all) piece.owner = seen[std::minmax({piece.rows, piece.cols})]++ % ranks;
    }

    // Longest processing time first (Graham 1969): the most expensive matrix left goes to the least loaded rank.
    void assign_lpt(std::vector<Piece>& all, const Options& options) const {
        std::vector<int> order(all.size());
        std::iota(order.begin(), order.end(), 0);
        std::vector<double> cost;
        for (const Piece& piece : all) cost.push_back(ns_flops(options, piece, tensors[piece.tensor]));
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return cost[a] > cost[b]; });
        std::vector<double> load(ranks, 0.0);
        for (int i : order) {
            int rank = int(std::min_element(load.begin(), load.end()) - load.begin());
            all[i].owner = rank;
            load[rank] += cost[i];
        }
    }

    bool balanced(const std::vector<Piece>& all, int layers) const {
        std::map<int, std::vector<size_t>> bytes;  // by bucket, then rank
        for (const Piece& piece : all) {
            auto& of_rank = bytes[tensors[piece.tensor].layer / layers];
            of_rank.resize(ranks);
            of_rank[piece.owner] += piece.count;
        }
        for (auto& [bucket, of_rank] : bytes)
            for (size_t count : of_rank)
                if (count != of_rank[0]) return false;
        return true;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 2. Newton-Schulz
//
// Muon wants the polar factor U V^T of X = U S V^T: the same singular vectors, all singular values 1. No decomposition
// is needed. An odd polynomial
//
//     p(X) = aX + b(XX^T)X + c(XX^T)^2 X
//
// takes every singular value s to as + bs^3 + cs^5 and leaves the singular vectors alone. Scaled to |X|_F = 1 all s lie
// in [0, 1], and five polynomials one after the other, chosen well, take all but the smallest close to 1: nearly an
// orthogonal matrix, by products alone, which is what a GPU does best. For an (m, n) matrix with r = n/m >= 1 a step is
// 2(2r + 1) m^3 FLOPs. XX^T and every polynomial of it are symmetric, so half of their tiles is enough:
// 2(1.5r + 0.5) m^3.

struct Coefficients {
    double a, b, c;
};

// The polynomial of step k (0-based). keller: Keller Jordan 2024, the same at every step. polar_express: arXiv
// 2505.16932, with the safety factor 1.05 folded into all five as the reference DMuon does. you: Jiacheng You's five,
// tuned per step.
inline Coefficients ns_coefficients(const std::string& name, int k) {
    static const Coefficients polar_express[5] = {{8.28721201814563, -23.595886519098837, 17.300387312530933},
                                                  {4.107059111542203, -2.9478499167379106, 0.5448431082926601},
                                                  {3.9486908534822946, -2.908902115962949, 0.5518191394370137},
                                                  {3.3184196573706015, -2.488488024314874, 0.51004894012372},
                                                  {2.300652019954817, -1.6689039845747493, 0.4188073119525673}};
    static const Coefficients you[5] = {{4.0848, -6.8946, 2.9270},
                                        {3.9505, -6.3029, 2.6377},
                                        {3.7418, -5.5913, 2.3037},
                                        {2.8769, -3.1427, 1.2046},
                                        {2.8366, -3.0525, 1.2012}};
    if (name == "keller") return {3.4445, -4.7750, 2.0315};
    if (name == "you") return you[k];
    const double s = 1.05;
    const Coefficients& p = polar_express[k];
    return {p.a / s, p.b / (s * s * s), p.c / (s * s * s * s * s)};
}

struct NsConfig {
    bool gram;
    std::string coefficients;
    int steps;
    NsType type;
};

// `auto` is a table per shape, made from measurements (dev/results): the Gram form wins when the long side is four
// times the short one. It is never timed at run time: replicas and resumed runs must agree on every bit. In bf16 it
// stays standard: there the rounding of R leaves small negative eigenvalues, which Polar Express enlarges until some
// nearly low-rank matrices blow up, restarts or not (seen on up to 3% of random rank-deficient matrices; never in fp16,
// which has three more bits).
inline NsConfig ns_config(const Options& options, int m, int n) {
    NsType type = options.ns_dtype == "bf16" ? NsType::bf16 : options.ns_dtype == "fp16" ? NsType::fp16 : NsType::fp32;
    bool gram = options.ns == "gram" || (options.ns == "auto" && type != NsType::bf16 && n >= 4 * m);
    return {gram, options.ns_coefficients, int(options.ns_steps), type};
}

// Bytes of the matrices that go through it together, unless one alone has more.
constexpr size_t kNsWorkspaceLimit = size_t(1) << 30;

// Scratch of newton_schulz: the iterate and its successor (count, m, n), and square matrices (count, m, m), all of type
// `type`.
struct NsWorkspace {
    void *X, *Y;
    void* S[4];
    int* counters;  // of the backend's NsChain
    static size_t bytes(int count, int m, int n, NsType type) {
        return count * (2 * size_t(m) * n + 4 * size_t(m) * m) * ns_type_bytes(type) +
               ns_chain_counters(count) * sizeof(int);
    }
    NsWorkspace(void* memory, int count, int m, int n, NsType type) {
        size_t wide = count * size_t(m) * n * ns_type_bytes(type), square = count * size_t(m) * m * ns_type_bytes(type);
        char* at = static_cast<char*>(memory);
        X = at, Y = at + wide, at += 2 * wide;
        for (void*& s : S) s = at, at += square;
        counters = reinterpret_cast<int*>(at);
    }
};

// Orthogonalises the `count` (m, n) matrices in w.X, m <= n, whose Frobenius norms are at most 1. The result is in
// w.X.
//
// Standard: A = X X^T;  B = bA + cA^2;  X = aX + BX, each step on the full matrix.
// Gram (Zhang, Amsel, Chen, Dao 2026): every step is a polynomial of R = X X^T, so iterate on the small (m, m) matrix
// and multiply X once at the end: Z = bR + cR^2; Q = QZ + aQ; R = (Z + aI) R (Z + aI). Rounding errors of R grow, hence
// restarts that apply Q and form R anew, after steps 2 and 4. All of Q, Z, R are polynomials of one symmetric matrix:
// they commute and every product of them is symmetric, so only half of its tiles is computed.
template <class Backend>
void newton_schulz(NsWorkspace& w, int count, int m, int n, const NsConfig& config) {
    typename Backend::NsChain one_launch(count, config.type, w.counters);
    auto symmetric = [&](void* D, const void* A, const void* B, const void* C, double alpha, double beta, int k,
                         double diag = 0) {
        Backend::ns_product(D, A, B, C, float(alpha), float(beta), float(diag), count, m, m, k, NsProduct::symmetric_nt,
                            config.type);
    };
    auto times_X = [&](void* D, const void* A, double beta) {  // D = A X + beta X
        Backend::ns_product(D, A, w.X, w.X, 1.0f, float(beta), 0.0f, count, m, n, m, NsProduct::nn, config.type);
    };
    if (!config.gram) {
        for (int k = 0; k < config.steps; k++) {
            auto [a, b, c] = ns_coefficients(config.coefficients, k);
            symmetric(w.S[0], w.X, w.X, nullptr, 1, 0, n);
            symmetric(w.S[1], w.S[0], w.S[0], w.S[0], c, b, m);
            times_X(w.Y, w.S[1], a);
            std::swap(w.X, w.Y);
        }
        return;
    }
    auto& [R, Z, Q, T] = w.S;
    bool fresh = true;  // R belongs to the current X and Q is the identity
    for (int k = 0; k < config.steps; k++) {
        auto [a, b, c] = ns_coefficients(config.coefficients, k);
        if (fresh) symmetric(R, w.X, w.X, nullptr, 1, 0, n);
        symmetric(Z, R, R, R, c, b, m);
        if (fresh) {
            symmetric(Q, Z, Z, Z, 0, 1, 0, a);  // Q = Z + aI: an inner dimension of 0, only the ends
        } else {
            symmetric(T, Q, Z, Q, 1, a, m);
            std::swap(Q, T);
        }
        bool last = k + 1 == config.steps;
        fresh = last || k % 2 == 1;
        if (fresh) {
            times_X(w.Y, Q, 0);
            std::swap(w.X, w.Y);
        } else {
            symmetric(T, R, Z, R, 1, a, m);
            symmetric(R, Z, T, T, 1, a, m);
        }
    }
}

// The floating-point operations of Newton-Schulz on an (m, n) matrix: the iteration itself, run on a backend that only
// counts.
struct FlopCounter {
    struct NsChain {
        NsChain(int, NsType, int*) {}
    };
    static double& count() {
        static double flops;
        return flops;
    }
    static void ns_product(void*, const void*, const void*, const void*, float, float, float, int, int M, int N, int K,
                           NsProduct kind, NsType) {
        count() += (kind == NsProduct::symmetric_nt ? 1.0 : 2.0) * M * N * K;  // symmetric: half of the tiles
    }
};

template <class Counter>
double counted_ns(const Options& options, int m, int n, int matrices = 1) {
    const NsConfig config = ns_config(options, m, n);
    NsWorkspace nothing(nullptr, 0, m, n, config.type);
    Counter::count() = 0;
    newton_schulz<Counter>(nothing, matrices, m, n, config);
    return Counter::count();
}

// Of a matrix, or of its tiles together.
inline double ns_flops(const Options& options, const Piece& piece, const TensorSpec& tensor) {
    std::map<std::pair<int, int>, int> tiles;  // by shape
    for_each_tile(piece, tensor, options, [&](int, int, int rows, int cols) { tiles[std::minmax({rows, cols})]++; });
    double flops = 0;
    for (auto& [shape, count] : tiles) flops += count * counted_ns<FlopCounter>(options, shape.first, shape.second);
    return flops;
}

// Matrices (or tiles) that go through Newton-Schulz together: lying down they have one shape.
struct NsBatch {
    int count, m, n;
};

// As many as the workspace holds.
inline int ns_batch_limit(const Options& options, int m, int n) {
    const size_t each = NsWorkspace::bytes(1, round_up(m, 8), round_up(n, 8), ns_config(options, m, n).type);
    return int(std::max<size_t>(1, std::min<size_t>(kNsWorkspaceLimit / each, 65535)));
}

// In which batches a rank's matrices go: by shape, under --muon_batch one each by itself. (number, m, n) is the order
// of the batches, where number tells matrices apart that do not go together.
using NsKey = std::tuple<int, int, int>;

inline std::vector<NsBatch> ns_batches(const Plan& plan, const Options& options, int rank) {
    std::map<NsKey, int> counts;
    int number = 0;
    for (const Piece& piece : plan.pieces) {
        if (!plan.is_muon(piece.tensor)) continue;
        if (options.muon_batch == "one") number++;
        if (piece.owner >= 0 && piece.owner != rank) continue;
        for_each_tile(piece, plan.tensors[piece.tensor], options, [&](int, int, int rows, int cols) {
            counts[{number, std::min(rows, cols), std::max(rows, cols)}]++;
        });
    }
    std::vector<NsBatch> batches;
    for (auto& [key, count] : counts) {
        auto [_, m, n] = key;
        for (int most = ns_batch_limit(options, m, n), first = 0; first < count; first += most)
            batches.push_back({std::min(most, count - first), m, n});
    }
    return batches;
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Optimizer

// The factor between an orthogonal update and its step, rows = outputs, cols = inputs. keller: sqrt(max(1, rows/cols)).
// moonlight (arXiv 2502.16982): 0.2 sqrt(max(rows, cols)), which gives the update AdamW's usual RMS of about 0.2, so
// that AdamW's learning rates carry over.
inline double muon_scale(const std::string& name, int rows, int cols) {
    return name == "keller" ? std::sqrt(std::max(1.0, double(rows) / cols))
                            : 0.2 * std::sqrt(double(std::max(rows, cols)));
}

// The phases of a step, for --profile.
enum Phase { phase_reduce, phase_clip, phase_adamw, phase_momentum, phase_ns, phase_update, phase_gather, phase_count };
inline const char* phase_names[phase_count] = {"reduce", "clip", "adamw", "momentum", "ns", "update", "gather"};

template <class Backend>
class Optimizer {
    using real = typename Backend::real;

  public:
    const Options& options;
    const Plan plan;
    real* params;                        // (arena)
    float* grads;                        // (arena), the accumulator over micro-steps
    float* master;                       // (state_elements) fp32 weights
    float* moment1;                      // (state_elements) AdamW's m, Muon's momentum
    float* moment2;                      // (adamw_state) AdamW's v
    float* clip;                         // (4) scale, norm, 1 - beta1^t, 1 - beta2^t
    int64_t* updates;                    // (1) t: steps that were not skipped
    int64_t weights_version = 0;         // another number after each change of params
    int64_t orthogonalised = 0;          // matrices (or tiles) this rank has put through Newton-Schulz
    const std::vector<NsBatch> batches;  // of this rank, in the order of a step

    Optimizer(std::vector<TensorSpec> tensors, const Options& options_)
        : options(options_),
          plan(std::move(tensors), options_, world.size),
          batches(ns_batches(plan, options_, world.rank)) {
        // All at once, before filling what there is takes a minute.
        const size_t need = bytes(plan), free = Backend::memory_available();
        if (need > free)
            fail("out of memory: weights%s need %.1f GiB and %.1f GiB are free: choose a smaller model%s",
                 plan.trains ? ", gradients and optimizer state" : "", need / 0x1p30, free / 0x1p30,
                 plan.trains ? " or more ranks" : "");
        params = allocate<real>(plan.arena, "parameters");
        grads = allocate<float>(plan.trains ? plan.arena : 0, "gradients");
        master = allocate<float>(plan.state_elements, "master weights");
        moment1 = allocate<float>(plan.trains ? plan.state_elements : 0, "first moments");
        moment2 = allocate<float>(plan.trains ? plan.adamw_state() : 0, "second moments");
        clip = allocate<float>(4, "the clip scale");
        updates = allocate<int64_t>(1, "the count of updates");
        reducing.resize(plan.buckets.size());
        gathering.resize(plan.buckets.size());
        make_tables();
    }

    static size_t bytes(const Plan& plan) { return plan.bytes(sizeof(real)); }
    size_t workspace_bytes() const { return ns_bytes; }

    // One step with the gradients in `grads` (sums over this rank's micro-steps, already divided by the tokens of the
    // whole step). `phase_done(p)` is called when work of phase p has been enqueued. Nothing here waits for the
    // device.
    //
    // --grad_clip is one rule for all three optimizers: the norm is that of the whole averaged gradient, Muon's
    // matrices included, and its scale multiplies the gradient before AdamW and before Muon's momentum. Muon's update
    // does not depend on the length of x, so for it clipping only limits how much one large gradient weighs in the
    // momentum. A norm that is not finite makes the scale 0, and scale 0 skips the whole update.
    template <class PhaseDone>
    void step(float lr, float muon_lr, PhaseDone phase_done) {
        const typename Backend::Range range("optimizer");
        weights_version++;
        // Weights that nobody has needed since the step before are on their way: they are written only then.
        for (std::optional<Ticket>& ticket : gathering) wait_for(ticket);
        for (size_t b = 0; b < plan.buckets.size(); b++) start_reduce(b);
        for (std::optional<Ticket>& ticket : reducing) wait_for(ticket);
        phase_done(phase_reduce);

        const float mu = float(options.muon_momentum);
        Backend::norm_sums(squares, dots, grads, moment1, norm_blocks, norm_count);
        // Of each block all ranks but one hold zero: exact in any order.
        Backend::wait(Backend::all_reduce(squares, norm_count));
        Backend::clip_scale(clip, updates, squares, norm_count, float(options.grad_clip), options.beta1, options.beta2);
        if (matrices > 0)
            Backend::muon_inverse_norms(inverse_norms, squares, dots, refs, matrices, mu, options.nesterov, clip);
        phase_done(phase_clip);

        const size_t adamw_buckets = plan.method == Method::adamw ? plan.buckets.size() : 1;  // else the flat one
        for (size_t b = 0; b < adamw_buckets; b++) {
            const Bucket& bucket = plan.buckets[b];
            const size_t mine = my_chunk(bucket), end = mine + bucket.chunk;
            // Of the flat bucket the tensors with weight decay come first, the matrices all have it.
            const size_t border = b > 0 ? end : std::min(std::max(plan.decay_end, mine), end);
            auto adamw = [&](size_t from, size_t to, double weight_decay) {
                const size_t at = bucket.state_begin + (from - mine);
                if (from < to)
                    Backend::adamw(params + from, master + at, moment1 + at, moment2 + at, grads + from, to - from, lr,
                                   float(options.beta1), float(options.beta2), kAdamWEpsilon, float(weight_decay),
                                   clip);
            };
            adamw(mine, border, options.weight_decay);
            adamw(border, end, 0.0);
            start_gather(b);
        }
        phase_done(phase_adamw);

        const float wd = float(options.muon_weight_decay >= 0 ? options.muon_weight_decay : options.weight_decay);
        int first = 0;  // in refs
        for (const auto& [count, m, n] : batches) {
            NsConfig config = ns_config(options, m, n);
            int mp = round_up(m, 8), np = round_up(n, 8);  // zero padding stays zero under the iteration
            NsWorkspace w(ns_memory, count, mp, np, config.type);
            Backend::muon_momentum(w.X, moment1, grads, refs + first, inverse_norms + first, count, m, n, mu,
                                   options.nesterov, config.type, clip);
            phase_done(phase_momentum);
            newton_schulz<Backend>(w, count, mp, np, config);
            phase_done(phase_ns);
            Backend::muon_update(params, master, w.X, refs + first, count, m, n, 1.0f - muon_lr * wd, muon_lr,
                                 config.type, clip);
            orthogonalised += count, first += count;
            phase_done(phase_update);
        }

        for (size_t b = adamw_buckets; b < plan.buckets.size(); b++) start_gather(b);
        phase_done(phase_gather);
    }

    // The gradients of layer l are complete on this rank; layers come from the last to the first. What is not started
    // here step() starts.
    void layer_is_complete(int l) {
        const size_t b = plan.bucket_of(l);
        if (l == plan.buckets[b].layer) start_reduce(b);
    }

    // Before the weights are used: those outside of the hidden matrices; the matrices of layer l.
    void need_flat() { need(0); }
    void need_layer(int l) { need(plan.bucket_of(l)); }
    void need_all() {
        for (size_t b = 0; b < plan.buckets.size(); b++) need(b);
    }

    // --profile: where waits for weights are noted, and in a traced step each bucket's collectives. Null: nowhere.
    Timeline<Backend>* timeline = nullptr;

    ~Optimizer() {
        for (std::optional<Ticket>& ticket : gathering)
            if (ticket) ticket->take();
    }

    // The weights of the model from the masters: after initialisation and after a checkpoint was read.
    void publish() {
        weights_version++;
        for (const Bucket& bucket : plan.buckets)
            Backend::cast_params(params + my_chunk(bucket), master + bucket.state_begin, bucket.chunk);
        for (size_t b = 0; b < plan.buckets.size(); b++) start_gather(b);
        for (std::optional<Ticket>& ticket : gathering) wait_for(ticket);
    }

    // The pieces of a tensor as a checkpoint needs them, in element order.
    struct StatePart {
        size_t begin, count;
        int owner;     // the rank to ask
        bool here;     // whether this rank has the state
        size_t state;  // and where in its own
    };
    std::vector<StatePart> state_parts(int tensor) const {
        std::vector<StatePart> parts;
        for (const Piece& piece : plan.pieces) {
            if (piece.tensor != tensor) continue;
            bool here = piece.owner == world.rank || piece.owner < 0;
            parts.push_back({piece.begin, piece.count, std::max(piece.owner, 0), here,
                             here ? plan.state_offset(piece.offset, world.rank) : 0});
        }
        return parts;
    }

  private:
    // By bucket, what is under way.
    std::vector<std::optional<Ticket>> reducing, gathering;

    void start_reduce(size_t b) {
        const Bucket& bucket = plan.buckets[b];
        float* begin = grads + bucket.begin;
        if (reducing[b]) return;
        traced("reduce", b, [&] {
            reducing[b] = std::optional<Ticket>(bucket.replicated ? Backend::all_reduce(begin, bucket.chunk)
                                                                  : Backend::reduce_scatter(begin, bucket.chunk));
        });
    }
    void start_gather(size_t b) {
        const Bucket& bucket = plan.buckets[b];
        if (bucket.replicated) return;
        traced("gather", b,
               [&] { gathering[b] = std::optional<Ticket>(Backend::all_gather(params + bucket.begin, bucket.chunk)); });
    }
    void need(size_t b) {
        if (!gathering[b]) return;
        const size_t begin = timeline ? timeline->point() : 0;
        wait_for(gathering[b]);
        if (timeline) timeline->span("wait", int(b), begin, timeline->point());
    }
    // Starts a collective, and notes when it runs.
    template <class Start>
    void traced(const char* name, size_t b, Start start) {
        const bool notes = timeline && timeline->traces_collectives && world.size > 1;
        const size_t begin = notes ? timeline->point(true) : 0;
        start();
        if (notes) timeline->span(name, int(b), begin, timeline->point(true), true);
    }
    static void wait_for(std::optional<Ticket>& ticket) {
        if (!ticket) return;
        Backend::wait(std::move(*ticket));
        ticket.reset();
    }

    void* ns_memory = nullptr;
    size_t ns_bytes = 0;
    int matrices = 0;                // of this rank
    MatrixRef* refs = nullptr;       // (matrices), device, batch after batch
    float* inverse_norms = nullptr;  // (matrices), device

    int norm_count = 0;                // blocks of the whole model
    NormBlock* norm_blocks = nullptr;  // (norm_count), device; without rows where another rank has them
    double* squares = nullptr;         // (norm_count), device: of the gradient
    double* dots = nullptr;            // (norm_count,2), device: gradient times momentum, momentum times itself

    template <class T>
    static T* allocate(size_t count, const char* what) {
        return static_cast<T*>(Backend::alloc(count * sizeof(T), what));
    }

    size_t my_chunk(const Bucket& bucket) const { return plan.chunk_begin(bucket, world.rank); }

    // A copy on the device of a table made once on the host.
    template <class T>
    static T* device_table(const std::vector<T>& table, const char* what) {
        T* device = allocate<T>(table.size(), what);
        if (table.empty()) return device;  // AdamW has no matrices
        Backend::upload(device, table.data(), table.size() * sizeof(T));
        Backend::synchronize();  // before the first step: `table` may go
        return device;
    }

    // Blocks in tensor order, and this rank's matrices by shape, each of which knows its blocks.
    void make_tables() {
        std::vector<NormBlock> blocks;
        std::map<NsKey, std::vector<MatrixRef>> by_shape;
        int number = 0;
        for (const Piece& piece : plan.pieces) {
            const bool here = piece.owner < 0 || piece.owner == world.rank,
                       counted = std::max(piece.owner, 0) == world.rank;
            if (!plan.is_muon(piece.tensor)) {
                add_flat_blocks(blocks, piece, here);
                continue;
            }
            if (options.muon_batch == "one") number++;
            const size_t state_offset = here ? plan.state_offset(piece.offset, world.rank) : 0;
            for_each_tile(piece, plan.tensors[piece.tensor], options, [&](int row, int col, int rows, int cols) {
                const size_t at = size_t(row) * piece.cols + col;
                const int first_block = int(blocks.size());
                add_tile_blocks(blocks, {piece.offset + at, state_offset + at, piece.cols, rows, cols, true, counted},
                                here);
                if (!here) return;
                auto [m, n] = std::minmax({rows, cols});
                const float scale = float(muon_scale(options.muon_scale, rows, cols));
                by_shape[{number, m, n}].push_back({piece.offset + at, state_offset + at, piece.cols, rows > cols,
                                                    scale, first_block, int(blocks.size()) - first_block});
            });
        }
        norm_count = int(blocks.size());
        norm_blocks = device_table(blocks, "blocks of the norm");
        squares = allocate<double>(norm_count, "sums of squares");
        dots = allocate<double>(2 * size_t(norm_count), "sums of squares");
        std::vector<MatrixRef> all;
        for (auto& [key, members] : by_shape) all.insert(all.end(), members.begin(), members.end());
        for (const auto& [count, m, n] : batches)
            ns_bytes = std::max(
                ns_bytes, NsWorkspace::bytes(count, round_up(m, 8), round_up(n, 8), ns_config(options, m, n).type));
        matrices = int(all.size());
        refs = device_table(all, "matrix table");
        inverse_norms = allocate<float>(matrices, "norms of matrices");
        if (!plan.trains) ns_bytes = 0;
        ns_memory = Backend::alloc(ns_bytes, "the Newton-Schulz workspace");
    }

    // Of AdamW's tensors a rank has what lies between two multiples of kNormBlock in the flat bucket.
    static void add_flat_blocks(std::vector<NormBlock>& blocks, const Piece& piece, bool here) {
        for (size_t at = 0; at < piece.count;) {
            const size_t offset = piece.offset + at,
                         count = std::min(kNormBlock - offset % kNormBlock, piece.count - at);
            blocks.push_back({offset, 0, int(count), here ? 1 : 0, int(count), false, here});
            at += count;
        }
    }

    // A matrix, or tile, in blocks of whole rows, or of equal parts of a row that is too long.
    static void add_tile_blocks(std::vector<NormBlock>& blocks, const NormBlock& tile, bool here) {
        const int most = int(kNormBlock);
        const int width = tile.cols <= most ? tile.cols : round_up(ceil_div(tile.cols, ceil_div(tile.cols, most)), 8);
        const int height = ceil_div(tile.rows, ceil_div(tile.rows, most / width));
        for (int r = 0; r < tile.rows; r += height)
            for (int c = 0; c < tile.cols; c += width) {
                NormBlock block = tile;
                block.offset += size_t(r) * tile.ld + c;
                block.state += size_t(r) * tile.ld + c;
                block.rows = here ? std::min(height, tile.rows - r) : 0;
                block.cols = std::min(width, tile.cols - c);
                blocks.push_back(block);
            }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 4. The plan as numbers

// What predictions rest on: constants of an H200 with the kernels for Hopper, fitted to dev/results/bench_optimizer.log
// (124M and 350M as rank r of 1 to 64 would run them, without communication), whose rows they meet within 10% whatever
// the optimizer; fitted to one model's rows alone, within 12% of the other's. In training the optimizer steps of
// step_time.log (124M to 1558M, one GPU and two, under load and on somewhat older kernels) took from 6% less to 20%
// more. Portable kernels and other GPUs are not modelled. test_cpu.cpp holds both logs against predict().
constexpr double kPlanMemory = 4.0e12;     // bytes/s of the passes over memory
constexpr double kPlanLaunch = 4.4e-6;     // s of each such pass beyond its bytes
constexpr double kPlanNormBlock = 2e-9;    // s of a block of the norm, beyond its bytes: a rank runs through all ranks'
constexpr double kPlanTile = 4.5e-6;       // s of a (128, 256) tile of a product beyond its steps along K
constexpr double kPlanStep = 0.68e-6;      // s of a step of 64 along K
constexpr double kPlanProduct = 2.6e-6;    // s of a product beyond its tiles: it waits for the one before
constexpr int kPlanMultiprocessors = 132;  // each of which takes one tile after the other
constexpr double kPlanLink = 190e9;        // bytes/s of a reduction that is waited for: two GPUs of step_time.log

// Seconds of Newton-Schulz as the chain of kernels/ns_hopper.cuh walks it: of each product as many rounds of tiles as
// the multiprocessors need, with fractions, since they go on to the next one; but at least the one round of a matrix
// alone.
struct ChainClock {
    struct NsChain {
        NsChain(int, NsType, int*) {}
    };
    static double& count() {
        static double seconds;
        return seconds;
    }
    static void ns_product(void*, const void*, const void*, const void*, float, float, float, int batch, int M, int N,
                           int K, NsProduct kind, NsType) {
        const double down = ceil_div(M, 128), across = ceil_div(N, 128);  // in halves of tiles
        const double halves = kind == NsProduct::symmetric_nt ? down * (down + 1) / 2 : down * across;
        const double rounds = std::max(1.0, batch * halves / 2 / kPlanMultiprocessors);
        count() += rounds * (kPlanTile + ceil_div(K, 64) * kPlanStep) + kPlanProduct;
    }
};

inline double ns_seconds(const Options& options, const NsBatch& batch) {
    return counted_ns<ChainClock>(options, batch.m, batch.n, batch.count);
}

// Milliseconds of an optimizer step, of the slowest rank each.
struct Prediction {
    double ns = 0, elementwise = 0;  // Newton-Schulz; the passes over memory
    double exposed = 0;              // what communication adds
    double total() const { return ns + elementwise + exposed; }
};

// `element`: the size of a parameter on the device (bytes).
inline Prediction predict(const Plan& plan, const Options& options, size_t element) {
    const double share = double(plan.ranks - 1) / plan.ranks;
    Prediction most;
    // Bytes of an element. AdamW: norm 1 float, update 4 in and 3 out. Muon: norm 2 floats, momentum 2 in and 1 out,
    // update 1 and 1, and X written and read.
    const double adamw = 8.0 * sizeof(float) + double(element);
    const double muon = 7.0 * sizeof(float) + 2.0 * ns_type_bytes(ns_config(options, 1, 1).type) + double(element);
    std::vector<double> elements(plan.ranks, 0);  // of Muon's matrices; rank 0 stands for all where all have them
    for (const Piece& piece : plan.pieces)
        if (plan.is_muon(piece.tensor)) elements[std::max(piece.owner, 0)] += double(piece.count);
    double blocks = 0;
    for (const TensorSpec& tensor : plan.tensors) blocks += double(tensor.size()) / double(kNormBlock);
    for (int r = 0; r < plan.ranks; r++) {
        if (r > 0 && elements[r] == 0) continue;
        const std::vector<NsBatch> batches = ns_batches(plan, options, r);
        double ns = 0;
        for (const NsBatch& batch : batches) ns += ns_seconds(options, batch);
        // Norm, clip scale, and AdamW on each of its buckets; norms of matrices, and two passes for each batch.
        const size_t launches = plan.method == Method::adamw ? 2 + plan.buckets.size() : 4 + 2 * batches.size();
        const double bytes = double(plan.adamw_state()) * adamw + elements[r] * muon;
        const double passes = bytes / kPlanMemory + blocks * kPlanNormBlock + double(launches) * kPlanLaunch;
        most.ns = std::max(most.ns, ns * 1e3);
        most.elementwise = std::max(most.elementwise, passes * 1e3);
    }
    // Only the reduction of the flat bucket is waited for; and what gathers beside AdamW bring and take goes through
    // the same memory.
    double gathers = 0;
    for (const Bucket& bucket : plan.buckets)
        if (bucket.layer < 0 || plan.method == Method::adamw) gathers += share * double(bucket.chunk) * plan.ranks;
    most.exposed = (share * double(plan.buckets[0].chunk) * plan.ranks * sizeof(float) / kPlanLink +
                    2 * gathers * double(element) / kPlanMemory) *
                   1e3;
    return most;
}

// Who owns what, and what it costs each rank. `element` is the size of a parameter on the device (bytes).
inline void print_plan(const Plan& plan, const Options& options, size_t element, FILE* out) {
    struct Load {
        double flops = 0;  // of Newton-Schulz
        size_t elements = 0;
        int matrices = 0;
        std::string names;
    };
    std::vector<Load> loads(plan.ranks);
    for (const Piece& piece : plan.pieces) {
        if (!plan.is_muon(piece.tensor)) continue;
        const TensorSpec& tensor = plan.tensors[piece.tensor];
        const double flops = ns_flops(options, piece, tensor);
        std::string name = tensor.name.substr(0, tensor.name.rfind('.'));
        if (piece.count < tensor.size()) name += "." + std::string(1, "qkv"[piece.begin / piece.count % 3]);
        for (int r = 0; r < plan.ranks; r++) {
            if (piece.owner >= 0 && piece.owner != r) continue;
            loads[r].flops += flops;
            loads[r].elements += piece.count;
            loads[r].matrices++;
            if (piece.owner >= 0) loads[r].names += " " + name;
        }
    }
    const char* method = plan.method == Method::adamw ? "adamw" : plan.method == Method::muon ? "muon" : "dmuon";
    fprintf(out, "plan: %s on %d rank%s", method, plan.ranks, plan.ranks == 1 ? "" : "s");
    if (plan.method == Method::dmuon)
        fprintf(out, ", owners by %s, %d layer%s per bucket", options.owner.c_str(), plan.layers_per_bucket,
                plan.layers_per_bucket == 1 ? "" : "s");
    fprintf(out, "\nAdamW, ZeRO-1: %.1f M elements, %.1f M per rank\n", plan.adamw_elements() / 1e6,
            plan.adamw_state() / 1e6);
    double flops_max = 0, flops_sum = 0, bytes_max = 0, bytes_sum = 0;
    if (plan.method != Method::adamw) {
        fprintf(out, "%5s %9s %12s %12s %12s  %s\n", "rank", "matrices", "NS GFLOP", "weights MiB", "state MiB",
                plan.method == Method::muon ? "every rank orthogonalises every matrix" : "owns");
        for (int r = 0; r < plan.ranks; r++) {
            const Load& load = loads[r];
            double bytes = double(load.elements) * element;
            size_t state = 2 * sizeof(float) * load.elements + 3 * sizeof(float) * plan.adamw_state();
            fprintf(out, "%5d %9d %12.3f %12.2f %12.2f %s\n", r, load.matrices, load.flops / 1e9, bytes / 1048576,
                    state / 1048576.0, load.names.c_str());
            flops_max = std::max(flops_max, load.flops), bytes_max = std::max(bytes_max, bytes);
            flops_sum += load.flops, bytes_sum += bytes;
        }
        fprintf(out, "max/mean: FLOPs %.3f, bytes %.3f\n", flops_max / (flops_sum / plan.ranks),
                bytes_max / (bytes_sum / plan.ranks));
    }
    const double needed = std::accumulate(plan.tensors.begin(), plan.tensors.end(), 0.0,
                                          [](double sum, const TensorSpec& tensor) { return sum + tensor.size(); });
    fprintf(out, "allocated on every rank: weights%s %.1f MiB (%.1f%% of it padding), fp32 state %.1f MiB\n",
            plan.trains ? " and gradients" : "", plan.weight_bytes(element) / 1048576.0,
            100 * (1 - needed / plan.arena), plan.state_bytes() / 1048576.0);
    // Each rank sends and receives (N-1)/N of every bucket, once as fp32 gradients and once as weights; an all-reduce
    // of the replicated matrices moves their gradients twice and gathers nothing.
    double share = double(plan.ranks - 1) / plan.ranks, traffic = 0;
    for (const Bucket& bucket : plan.buckets)
        traffic += bucket.replicated ? 2 * share * bucket.chunk * sizeof(float)
                                     : share * bucket.chunk * plan.ranks * (sizeof(float) + element);
    fprintf(out, "traffic per rank and step: %.1f MiB\n", traffic / 1048576);
    const Prediction times = predict(plan, options, element);
    fprintf(out,
            "predicted for H200s (the optimizer alone was within 10%% of it, training on 1 and 2 took up to 20%% "
            "more): %.3f ms an optimizer step: Newton-Schulz %.3f (%.0f TFLOP/s), passes over memory %.3f, exposed "
            "communication %.3f\n",
            times.total(), times.ns, times.ns > 0 ? flops_max / times.ns / 1e9 : 0, times.elementwise, times.exposed);
}
