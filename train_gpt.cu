// train_gpt.cu: the program. It trains a GPT-2 class model end to end, on a GPU or without one. Read from top to
// bottom:
//
//   1. Model config   sizes, the table of parameter tensors
//   2. Model          activations, forward, backward; written once over the backend
//   3. Trainer        sizes, schedule; Run: data, what to go on from; checkpoints, samples, log; the loop
//   4. main
//
// Every operation of the model is a static function of the backend: struct Cuda (hand-written kernels) or struct Cpu
// (plain C++), with the same signatures; backend.h has the table. nvcc builds both, a C++17 compiler (-x c++) the CPU
// one alone. Shapes stand beside every tensor: L layers, B sequences of T tokens, N = B T rows, C channels, H heads, V
// vocabulary, Vp its size padded to a multiple of 128.

// defines: Options, parse_flags, print_help, ModelPreset
#include "flags.h"
// defines: Shards, DataLoader, Batch, Tokenizer
#include "dataloader.h"
// defines: Checkpoint, CheckpointWriter, newest_good_checkpoint
#include "checkpoint.h"
// defines: world, start_ranks, stop_ranks, fail_ranks, wait_until
#include "ranks.h"
// defines: CpuComm, CudaComm
#include "comm.h"
// defines: Evaluator, HellaSwag, HellaSwagEvaluator
#include "evaluate.h"
// defines: is_backend, the table of all operations
#include "backend.h"
// defines: Cpu
#include "cpu_backend.h"
// defines: Cuda
#ifdef __CUDACC__
#include "cuda_backend.cuh"
#endif
// defines: Timeline
#include "timeline.h"
// defines: Plan, newton_schulz, Optimizer, print_plan
#include "dmuon.cuh"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <charconv>
#include <cinttypes>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <set>
#include <system_error>

// ---------------------------------------------------------------------------------------------------------------------
// 1. Model config

struct ModelConfig {
    int layers, heads, channels, seq_len, vocab;
    int padded_vocab() const { return round_up(vocab, 128); }  // whole tiles for the matrix products; padding is masked
};

// The parameters of GPT-2 as pointers into an arena: real* into the parameters, float* into the gradients. Gradients
// are fp32 because they accumulate over micro-steps: a bf16 sum drops every addend below 2^-9 of it, so that many small
// batches would not add up to a large one. Q, K and V may have different owners and then lie apart.
template <class T>
struct Tensors {
    struct Layer {
        T *ln1w, *ln1b;          // (C)
        T *qkvw[3], *qkvb;       // 3 x (C,C), (3C)
        T *attprojw, *attprojb;  // (C,C), (C)
        T *ln2w, *ln2b;          // (C)
        T *fcw, *fcb;            // (4C,C), (4C)
        T *fcprojw, *fcprojb;    // (C,4C), (C)
    };
    T *wte, *wpe;  // (Vp,C), (maxT,C)
    std::vector<Layer> layers;
    T *lnfw, *lnfb;  // (C)

    explicit Tensors(const ModelConfig& config) : layers(config.layers) {}
    Tensors(T* arena, const Plan& plan, const ModelConfig& config) : Tensors(config) {
        int t = 0;
        for_each(config, [&](const TensorSpec& spec, T** pointers) {
            for (int i = 0; i < spec.split; i++)
                pointers[i] = arena + plan.offset_of(t, i * (spec.size() / spec.split));
            t++;
        });
    }

    // The one list of the model's tensors, by the names of GPT-2's published checkpoints; matrices are (outputs,
    // inputs). Calls f(spec, pointers): as many pointers as the tensor is split into. The order is that of the plan, of
    // the random numbers of initialisation, and of checkpoints.
    template <class F>
    void for_each(const ModelConfig& config, F f) {
        using Kind = TensorKind;
        const int C = config.channels;
        TensorSpec token_embedding("wte.weight", Kind::token_embedding, config.padded_vocab(), C);
        token_embedding.stored_rows = config.vocab;
        f(token_embedding, &wte);
        f({"wpe.weight", Kind::position_embedding, config.seq_len, C}, &wpe);
        for (int l = 0; l < config.layers; l++) {
            const std::string h = "h." + std::to_string(l) + ".";
            Layer& layer = layers[l];
            f({h + "ln_1.weight", Kind::layernorm_weight, 1, C, l}, &layer.ln1w);
            f({h + "ln_1.bias", Kind::bias, 1, C, l}, &layer.ln1b);
            TensorSpec qkv(h + "attn.c_attn.weight", Kind::matrix, 3 * C, C, l);
            qkv.split = 3, qkv.head_rows = C / config.heads;
            f(qkv, layer.qkvw);
            f({h + "attn.c_attn.bias", Kind::bias, 1, 3 * C, l}, &layer.qkvb);
            f({h + "attn.c_proj.weight", Kind::residual_projection, C, C, l}, &layer.attprojw);
            f({h + "attn.c_proj.bias", Kind::bias, 1, C, l}, &layer.attprojb);
            f({h + "ln_2.weight", Kind::layernorm_weight, 1, C, l}, &layer.ln2w);
            f({h + "ln_2.bias", Kind::bias, 1, C, l}, &layer.ln2b);
            f({h + "mlp.c_fc.weight", Kind::matrix, 4 * C, C, l}, &layer.fcw);
            f({h + "mlp.c_fc.bias", Kind::bias, 1, 4 * C, l}, &layer.fcb);
            f({h + "mlp.c_proj.weight", Kind::residual_projection, C, 4 * C, l}, &layer.fcprojw);
            f({h + "mlp.c_proj.bias", Kind::bias, 1, C, l}, &layer.fcprojb);
        }
        f({"ln_f.weight", Kind::layernorm_weight, 1, C}, &lnfw);
        f({"ln_f.bias", Kind::bias, 1, C}, &lnfb);
    }
};

inline std::vector<TensorSpec> tensor_specs(const ModelConfig& config) {
    std::vector<TensorSpec> specs;
    Tensors<float>(config).for_each(config, [&](const TensorSpec& spec, float**) { specs.push_back(spec); });
    return specs;
}

inline size_t parameter_count(const std::vector<TensorSpec>& specs) {
    size_t count = 0;
    for (const TensorSpec& spec : specs) count += spec.stored_size();
    return count;
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Model

// One allocation cut into named tensors.
class Allocation {
    struct Tensor {
        std::function<void(void*)> point;
        size_t offset;
    };
    std::vector<Tensor> tensors;

  public:
    size_t bytes = 0;
    template <class T>
    void add(T*& pointer, size_t count) {
        tensors.push_back({[&pointer](void* at) { pointer = static_cast<T*>(at); }, bytes});
        bytes += round_up<size_t>(count * sizeof(T), 256);
    }
    // `pointer` takes the place of `other`, which was added before.
    template <class T>
    void share(T*& pointer, T*& other) {
        tensors.push_back({[&pointer, &other](void*) { pointer = other; }, 0});
    }
    void place(void* memory) {
        for (Tensor& tensor : tensors) tensor.point(static_cast<char*>(memory) + tensor.offset);
    }
};

// What of a block's forward pass the backward pass computes again instead of keeping it, each level more than the one
// before: the GELU; LayerNorms as well; all but attention, which takes the longest for the bytes that it would save.
enum class Recompute { none, gelu, layernorm, block };

inline const std::vector<std::string>& recompute_levels() {
    static const std::vector<std::string> names = split_choices(find_flag("recompute").values);
    return names;
}
inline Recompute recompute_level(const Options& options) {
    const auto& names = recompute_levels();
    return Recompute(std::find(names.begin(), names.end(), options.recompute) - names.begin());
}

// For each layer whether the arenas have the weights of Q, K and V apart: not as one (3C,C) matrix.
inline std::vector<bool> qkv_apart(const Plan& plan) {
    std::vector<bool> apart;
    for (int t = 0; t < int(plan.tensors.size()); t++) {
        if (plan.tensors[t].split != 3) continue;
        const size_t third = plan.tensors[t].size() / 3, q = plan.offset_of(t);
        apart.push_back(plan.offset_of(t, third) != q + third || plan.offset_of(t, 2 * third) != q + 2 * third);
    }
    return apart;
}

// What a micro-step of B sequences leaves in device memory besides gradients, and scratch.
template <class real>
struct Activations {
    struct Layer {
        real* ln1;                   // (N,C)
        float *ln1_mean, *ln1_rstd;  // (N)
        real* qkv;                   // (N,3C)
        real* att;                   // (N,C)
        float* lse;                  // (B,H,T) log-sum-exp of each row of the attention scores
        real* residual2;             // (N,C) the residual stream after attention
        real* ln2;                   // (N,C)
        float *ln2_mean, *ln2_rstd;  // (N)
        real *fc, *gelu;             // (N,4C)
        real* residual3;             // (N,C) the residual stream after the MLP
        real* qkvw;                  // (3C,C) the weights of Q, K and V together, where the parameters have them apart
    };
    int *inputs, *targets;  // (B,T) tokens, and the tokens that follow
    int* order;             // (N) positions sorted by input token, for embedding_backward
    real* encoded;          // (N,C)
    std::vector<Layer> layers;
    real* lnf;                     // (N,C), the input of the head
    float *lnf_mean, *lnf_rstd;    // (N)
    real* logits;                  // (rows of a chunk,Vp), in the backward pass dlogits
    float* losses;                 // (N)
    real* dresidual;               // (N,C)
    real *scratch_c, *scratch_4c;  // (N,C), (N,4C)
    float* delta;                  // (B,H,T) scratch of the attention backward
    float* partials;               // partial sums of the gradients of biases and LayerNorms

    // A tensor (N, width C) of which each layer keeps its own up to this level; above it all layers share one.
    struct Kept {
        using Member = real* Layer::*;
        Member tensor;
        int width;
        Recompute up_to;
    };
    static constexpr Kept kKept[8] = {
        {&Layer::gelu, 4, Recompute::none},       {&Layer::ln1, 1, Recompute::gelu},
        {&Layer::ln2, 1, Recompute::gelu},        {&Layer::qkv, 3, Recompute::layernorm},
        {&Layer::fc, 4, Recompute::layernorm},    {&Layer::residual2, 1, Recompute::layernorm},
        {&Layer::residual3, 1, Recompute::block}, {&Layer::att, 1, Recompute::block},
    };

    // Bytes that a layer keeps of each token
    static size_t layer_bytes(const ModelConfig& config, Recompute level) {
        size_t bytes = (4 + config.heads) * sizeof(float);  // means, rstds and lse
        for (const Kept& k : kKept)
            if (level <= k.up_to) bytes += k.width * config.channels * sizeof(real);
        return bytes;
    }

    // head_rows: rows of a chunk of logits, 0: all
    Allocation allocation(const ModelConfig& config, int B, Recompute level, int head_rows,
                          const std::vector<bool>& apart, size_t partial_floats) {
        const size_t N = size_t(B) * config.seq_len, C = config.channels,
                     lse_rows = size_t(B) * config.heads * config.seq_len,
                     rows = head_rows > 0 ? std::min(N, size_t(head_rows)) : N;
        layers.resize(config.layers);
        Allocation memory;
        memory.add(inputs, N), memory.add(targets, N), memory.add(order, N);
        memory.add(encoded, N * C);
        for (int l = 0; l < config.layers; l++) {
            Layer& layer = layers[l];
            for (const Kept& k : kKept) {
                if (l == 0 || level <= k.up_to) memory.add(layer.*k.tensor, N * k.width * C);
                else memory.share(layer.*k.tensor, layers[0].*k.tensor);
            }
            for (auto vector : {&Layer::ln1_mean, &Layer::ln1_rstd, &Layer::ln2_mean, &Layer::ln2_rstd})
                memory.add(layer.*vector, N);
            memory.add(layer.lse, lse_rows);
            if (apart[l]) memory.add(layer.qkvw, 3 * C * C);
        }
        memory.add(lnf, N * C), memory.add(lnf_mean, N), memory.add(lnf_rstd, N);
        // The blocks' backward begins where dlogits are no longer needed.
        memory.add(logits, std::max(rows * config.padded_vocab(), N * 4 * C)), memory.share(scratch_4c, logits);
        memory.add(losses, N);
        memory.add(dresidual, N * C), memory.add(scratch_c, N * C), memory.add(delta, lse_rows);
        memory.add(partials, partial_floats);
        return memory;
    }
};

template <class Backend>
class Model : Activations<typename Backend::real> {
    using real = typename Backend::real;
    using Range = typename Backend::Range;
    using Acts = Activations<real>;

  public:
    const ModelConfig config;
    const Recompute recompute;
    const int head_rows;  // of a chunk of logits, 0: all
    const Tensors<float> grads;
    using Acts::inputs, Acts::targets, Acts::order, Acts::logits, Acts::lnf, Acts::losses;

    Model(const ModelConfig& config_, Recompute recompute_, int head_rows_, Optimizer<Backend>& optimizer_)
        : config(config_),
          recompute(recompute_),
          head_rows(head_rows_),
          grads(optimizer_.grads, optimizer_.plan, config_),
          optimizer(optimizer_),
          params(optimizer_.params, optimizer_.plan, config_),
          apart(qkv_apart(optimizer_.plan)) {}

    // Device memory of the activations for B sequences per micro-step.
    size_t activation_bytes(int B) const {
        return Acts().allocation(config, B, recompute, head_rows, apart, partial_floats(B)).bytes;
    }
    void allocate(int B) {
        Allocation memory = this->allocation(config, B, recompute, head_rows, apart, partial_floats(B));
        memory.place(Backend::alloc(memory.bytes, "activations"));
        packed.assign(config.layers, -1);
    }

    // tokens (B,T) -> lnf (B,T,C)
    void forward(const int* tokens, int B, int T) {
        const int C = config.channels, N = B * T, H = config.heads, L = config.layers;
        const Range range("forward");
        optimizer.need_flat();
        Backend::embedding_forward(encoded, tokens, params.wte, params.wpe, B, T, C);
        layernorm_1(0, N);
        for (int l = 0; l < L; l++) {
            const Range of_layer("forward of layer", l);
            const auto& w = params.layers[l];
            Layer& a = layers[l];
            optimizer.need_layer(l);
            pack_qkv(l);
            project_qkv(l, N);
            Backend::attention_forward(a.att, a.lse, a.qkv, B, T, C, H);
            attention_to_gelu(l, N);
            Backend::matmul_forward(scratch_c, C, a.gelu, w.fcprojw, w.fcprojb, N, 4 * C, C);
            // The block's residual and the next block's first LayerNorm (after the last block: the final one) in one
            // pass.
            if (l + 1 < L)
                Backend::residual_layernorm_forward(a.residual3, layers[l + 1].ln1, layers[l + 1].ln1_mean,
                                                    layers[l + 1].ln1_rstd, a.residual2, scratch_c,
                                                    params.layers[l + 1].ln1w, params.layers[l + 1].ln1b, N, C);
            else
                Backend::residual_layernorm_forward(a.residual3, lnf, lnf_mean, lnf_rstd, a.residual2, scratch_c,
                                                    params.lnfw, params.lnfb, N, C);
        }
    }

    // lnf -> losses (N) against targets
    void loss(int B, int T) {
        const Range range("loss");
        for_each_chunk(B * T, [&](int row, int rows) {
            head(logits, lnf + size_t(row) * config.channels, rows);
            Backend::classifier(losses + row, logits, targets + row, 0.0f, rows, config.vocab, config.padded_vocab(),
                                false);
        });
    }

    // lnf of `rows` positions -> their logits (rows,Vp); the head is the token embedding
    void head(real* out, const real* x, int rows) {
        const int Vp = config.padded_vocab();
        Backend::matmul_forward(out, Vp, x, params.wte, nullptr, rows, config.channels, Vp);
    }

    // lnf -> losses (N), and the gradients of their sum times dloss. With accumulate gradients are added to what is
    // there, else (a step's first micro-step) they take its place: the products overwrite, and only what is summed over
    // rows has to start at zero. complete: it is the last micro-step, after which the gradients may start to their
    // owners, layer by layer.
    void backward(int B, int T, float dloss, bool accumulate, bool complete) {
        const int C = config.channels, N = B * T, H = config.heads, L = config.layers, Vp = config.padded_vocab();
        const Range range("backward");
        if (!accumulate) {
            Backend::zero(grads.wpe, size_t(config.seq_len) * C * sizeof(float));
            float* vectors = grads.layers[0].ln1w;  // lie together, from the first LayerNorm's to the last
            Backend::zero(vectors, (grads.lnfb + C - vectors) * sizeof(float));
        }
        for_each_chunk(N, [&](int row, int rows) {
            const Range of_head("head");
            const real* x = lnf + size_t(row) * C;
            head(logits, x, rows);
            Backend::classifier(losses + row, logits, targets + row, dloss, rows, config.vocab, Vp, true);
            Backend::matmul_backward_input(scratch_c + size_t(row) * C, logits, params.wte, rows, C, Vp);
            Backend::matmul_backward_weight(grads.wte, logits, Vp, x, rows, C, Vp, accumulate || row > 0);
        });
        // dresidual (N,C): the gradient of the residual stream, which LayerNorm's backward adds to all the way down.
        // Its column sums are the bias gradient of the projection that was added to the stream just before.
        Backend::layernorm_backward(dresidual, grads.lnfw, grads.lnfb, grads.layers[L - 1].fcprojb, nullptr, scratch_c,
                                    layers[L - 1].residual3, params.lnfw, lnf_mean, lnf_rstd, N, C, partials);
        for (int l = L - 1; l >= 0; l--) {
            const Range of_layer("backward of layer", l);
            const auto& w = params.layers[l];
            const auto& dw = grads.layers[l];
            Layer& a = layers[l];
            real* dfc = scratch_4c;   // (N,4C)
            real* dqkv = scratch_4c;  // (N,3C)
            // MLP
            if (recompute == Recompute::block) {
                attention_to_gelu(l, N);
            } else {
                if (recompute >= Recompute::gelu) Backend::gelu_forward(a.gelu, a.fc, size_t(N) * 4 * C);
                if (recompute >= Recompute::layernorm)
                    Backend::layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln2w, w.ln2b, N, C);
            }
            Backend::matmul_backward_weight(dw.fcprojw, dresidual, C, a.gelu, N, 4 * C, C, accumulate);
            Backend::matmul_backward_input_gelu(dfc, dresidual, w.fcprojw, a.fc, N, 4 * C, C);
            Backend::matmul_backward_weight(dw.fcw, dfc, 4 * C, a.ln2, N, C, 4 * C, accumulate);
            Backend::bias_backward(dw.fcb, dfc, N, 4 * C, partials);
            Backend::matmul_backward_input(scratch_c, dfc, w.fcw, N, C, 4 * C);
            Backend::layernorm_backward(dresidual, dw.ln2w, dw.ln2b, dw.attprojb, dresidual, scratch_c, a.residual2,
                                        w.ln2w, a.ln2_mean, a.ln2_rstd, N, C, partials);
            // attention
            if (recompute >= Recompute::layernorm) layernorm_1(l, N);
            if (recompute == Recompute::block) project_qkv(l, N);
            Backend::matmul_backward_weight(dw.attprojw, dresidual, C, a.att, N, C, C, accumulate);
            Backend::matmul_backward_input(scratch_c, dresidual, w.attprojw, N, C, C);
            Backend::attention_backward(dqkv, dw.qkvb, delta, scratch_c, a.qkv, a.att, a.lse, B, T, C, H, partials);
            // dQ, dK, dV go where their owners want them. One rank has them side by side. With more, three products
            // also where they are neighbours: the same bits whoever owns what.
            if (world.size == 1)
                Backend::matmul_backward_weight(dw.qkvw[0], dqkv, 3 * C, a.ln1, N, C, 3 * C, accumulate);
            else
                for (int i = 0; i < 3; i++)
                    Backend::matmul_backward_weight(dw.qkvw[i], dqkv + i * C, 3 * C, a.ln1, N, C, C, accumulate);
            Backend::matmul_backward_input(scratch_c, dqkv, qkvw(l), N, C, 3 * C);
            Backend::layernorm_backward(dresidual, dw.ln1w, dw.ln1b, l > 0 ? grads.layers[l - 1].fcprojb : nullptr,
                                        dresidual, scratch_c, residual_in(l), w.ln1w, a.ln1_mean, a.ln1_rstd, N, C,
                                        partials);
            if (complete) optimizer.layer_is_complete(l);
        }
        Backend::embedding_backward(grads.wte, grads.wpe, dresidual, inputs, order, B, T, C);
    }

  private:
    using Layer = typename Acts::Layer;
    using Acts::encoded, Acts::layers, Acts::lnf_mean, Acts::lnf_rstd, Acts::dresidual, Acts::scratch_c,
        Acts::scratch_4c, Acts::delta, Acts::partials;
    Optimizer<Backend>& optimizer;
    const Tensors<real> params;  // after need_flat, need_layer
    const std::vector<bool> apart;
    std::vector<int64_t> packed;  // optimizer.weights_version when each layer's copy was made

    size_t partial_floats(int B) const {
        const int C = config.channels;
        return std::max({Backend::layernorm_scratch_floats(C), Backend::bias_scratch_floats(4 * C),
                         Backend::attention_scratch_floats(B, config.seq_len, C, config.heads)});
    }

    // The rows whose logits are in memory at a time: f(first, count).
    template <class F>
    void for_each_chunk(int N, F f) const {
        const int chunk = head_rows > 0 ? head_rows : N;
        for (int row = 0; row < N; row += chunk) f(row, std::min(chunk, N - row));
    }

    // The parts of a block that forward and, under --recompute, backward run through.
    void layernorm_1(int l, int N) {
        const auto& w = params.layers[l];
        Layer& a = layers[l];
        Backend::layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual_in(l), w.ln1w, w.ln1b, N, config.channels);
    }
    void project_qkv(int l, int N) {
        const int C = config.channels;
        Backend::matmul_forward(layers[l].qkv, 3 * C, layers[l].ln1, qkvw(l), params.layers[l].qkvb, N, C, 3 * C);
    }
    void attention_to_gelu(int l, int N) {
        const int C = config.channels;
        const auto& w = params.layers[l];
        Layer& a = layers[l];
        Backend::matmul_forward(scratch_c, C, a.att, w.attprojw, w.attprojb, N, C, C);
        Backend::residual_layernorm_forward(a.residual2, a.ln2, a.ln2_mean, a.ln2_rstd, residual_in(l), scratch_c,
                                            w.ln2w, w.ln2b, N, C);
        Backend::matmul_gelu_forward(a.gelu, a.fc, a.ln2, w.fcw, w.fcb, N, C, 4 * C);
    }

    const real* residual_in(int l) const { return l == 0 ? encoded : layers[l - 1].residual3; }

    // The weights of Q, K and V as one (3C,C) matrix for one product: in place where they are neighbours, else the copy
    // that the first forward pass with new weights makes for itself and for all that follow.
    const real* qkvw(int l) const { return apart[l] ? layers[l].qkvw : params.layers[l].qkvw[0]; }
    void pack_qkv(int l) {
        if (!apart[l] || std::exchange(packed[l], optimizer.weights_version) == optimizer.weights_version) return;
        const size_t square = size_t(config.channels) * config.channels;
        for (int i = 0; i < 3; i++)
            Backend::copy(layers[l].qkvw + i * square, params.layers[l].qkvw[i], square * sizeof(real));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3. Trainer. In parts: where sizes come from; what fits into memory; initial weights and the schedule; Run, what a run
// is made of and goes on from; RunState, weights and optimizer state in a checkpoint; samples; StepRecord and StepLog,
// what a step leaves behind; and the training loop.

// ---- Where sizes come from: a checkpoint, flags, or a name ----------------------------------------------------------

inline int64_t meta_number(const Checkpoint& checkpoint, const char* key) {
    const auto found = checkpoint.meta.find(key);
    int64_t value = -1;
    const char* text = found == checkpoint.meta.end() ? "" : found->second.c_str();
    if (std::from_chars(text, text + strlen(text), value).ec != std::errc() || value < 0)
        fail("checkpoint %s does not say its %s: it is not one of this program's", checkpoint.path.c_str(), key);
    return value;
}

inline ModelConfig checkpoint_config(const Checkpoint& checkpoint) {
    const char* path = checkpoint.path.c_str();
    auto size = [&](const char* key) {
        const int64_t value = meta_number(checkpoint, key);
        if (value < 1 || value > 65536) fail("checkpoint %s says %s %" PRId64 ": no such model", path, key, value);
        return int(value);
    };
    const ModelConfig config = {size("layers"), size("heads"), size("channels"), size("seq_len"), size("vocab")};
    if (config.channels % config.heads || config.channels % 8 || config.channels > kMaxChannels ||
        config.channels / config.heads > kMaxHeadSize)
        fail("checkpoint %s says %d channels and %d heads: no such model", path, config.channels, config.heads);
    return config;
}

inline bool is_checkpoint(const std::string& model) { return !model.empty() && !find_preset(model); }

// --model CHECKPOINT brings its context length, unless --seq_len asks for a shorter one.
inline Options with_checkpoint_sizes(Options options) {
    if (is_checkpoint(options.model) && !options.seq_len_given)
        options.seq_len = checkpoint_config(Checkpoint(options.model)).seq_len;
    return options;
}

inline ModelConfig model_config(const Options& options, int vocab) {
    if (options.layers) return {options.layers, options.heads, options.channels, options.seq_len, vocab};
    if (is_checkpoint(options.model)) {
        ModelConfig config = checkpoint_config(Checkpoint(options.model));
        config.seq_len = options.seq_len;
        return config;
    }
    const ModelPreset* preset = find_preset(options.model.empty() ? "d12" : options.model);
    return {preset->layers, preset->heads, preset->channels, options.seq_len, vocab};
}

// ---- What fits into memory ------------------------------------------------------------------------------------------

constexpr size_t kMemoryMargin = size_t(512) << 20;  // kept free for what libraries and the driver take

// The largest --batch whose activations fit into `free` bytes, 0 if none does. bytes_of(B) grows with B.
inline int largest_batch(size_t free, const std::function<size_t(int)>& bytes_of) {
    int fits = 0, too_many = 65537;
    while (fits + 1 < too_many) {
        const int B = (fits + too_many) / 2;
        (bytes_of(B) + kMemoryMargin <= free ? fits : too_many) = B;
    }
    return fits;
}

// What fits beside weights, gradients, state and the workspace of Newton-Schulz, by the arithmetic that allocates.
inline int batch_that_fits(size_t memory, const Plan& plan, const ModelConfig& config, Recompute level, int head_rows) {
    using Bf16 = uint16_t;
    const bool has_workspace = plan.method != Method::adamw && plan.trains;
    const size_t fixed = plan.bytes(sizeof(Bf16)) + (has_workspace ? kNsWorkspaceLimit : 0);
    const std::vector<bool> apart = qkv_apart(plan);
    return largest_batch(memory - std::min(memory, fixed), [&](int B) {
        const size_t partial_floats = attention_row_sums(B, config.seq_len, config.channels);
        return Activations<Bf16>().allocation(config, B, level, head_rows, apart, partial_floats).bytes;
    });
}

// The second half of --print_plan
inline void print_batches(const Plan& plan, const ModelConfig& config, const Options& options) {
    constexpr double kMemory = 80e9;
    printf("activations in bf16, and the largest --batch on a GPU of %.0f GB, --seq_len %d:\n%11s %30s %9s %17s\n",
           kMemory / 1e9, config.seq_len, "--recompute", "bytes of a token in a layer", "--batch", "--head_rows 4096");
    for (size_t i = 0; i < recompute_levels().size(); i++) {
        const Recompute level = Recompute(i);
        const auto batch = [&](int rows) { return batch_that_fits(size_t(kMemory), plan, config, level, rows); };
        printf("%11s %30zu %9d %17d\n", recompute_levels()[i].c_str(),
               Activations<uint16_t>::layer_bytes(config, level), batch(options.head_rows), batch(4096));
    }
}

// ---- Initial weights and the schedule -------------------------------------------------------------------------------

// A normal deviate that is a function of (seed, tensor, element) alone, by Box-Muller on hashed counters: every backend
// and every number of ranks starts from the same weights.
inline float normal(uint64_t seed, int tensor, uint64_t element) {
    const uint64_t bits = mix(mix(seed + 1) ^ mix((uint64_t(tensor) << 40) + element));
    const double u = (double(bits >> 32) + 0.5) * 0x1p-32, v = double(bits & 0xffffffff) * 0x1p-32;
    return float(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v));
}

// GPT-2: N(0, 0.02), the projections into the residual stream smaller by sqrt(2L), LayerNorm weights 1, biases 0.
// Padding of the vocabulary is 0.
inline void initial_values(float* out, const TensorSpec& spec, int tensor, size_t begin, size_t count, uint64_t seed,
                           int layers) {
    float deviation = 0.02f;
    switch (spec.kind) {
        case TensorKind::layernorm_weight:
            return std::fill(out, out + count, 1.0f);
        case TensorKind::bias:
            return std::fill(out, out + count, 0.0f);
        case TensorKind::residual_projection:
            deviation /= std::sqrt(2.0f * float(layers));
            break;
        case TensorKind::token_embedding:
        case TensorKind::position_embedding:
        case TensorKind::matrix:
            break;
    }
#pragma omp parallel for
    for (int64_t i = 0; i < int64_t(count); i++) {
        const size_t element = begin + size_t(i);
        out[i] = element < spec.stored_size() ? deviation * normal(seed, tensor, element) : 0.0f;
    }
}

// The share of the peak learning rate at a step, which counts from 1.
inline double schedule(const Options& o, int64_t step) {
    if (step <= o.warmup) return double(step) / double(o.warmup);
    const double progress = double(step - o.warmup) / double(std::max<int64_t>(1, o.steps - o.warmup));
    if (o.schedule == "cosine") return o.final_lr_frac + (1 - o.final_lr_frac) * 0.5 * (1 + std::cos(M_PI * progress));
    if (o.schedule == "linear") return 1 - (1 - o.final_lr_frac) * progress;
    if (o.schedule == "wsd" && o.decay_frac > 0) {
        const double left = double(o.steps - step) / std::max(1.0, o.decay_frac * double(o.steps));
        return left >= 1 ? 1 : o.final_lr_frac + (1 - o.final_lr_frac) * left;
    }
    return 1;
}

inline std::string join(const std::vector<std::string>& words, const char* between) {
    std::string text;
    for (const std::string& word : words) text += (text.empty() ? "" : between) + word;
    return text;
}

inline std::string directory_of(const std::string& path) {
    const size_t slash = path.rfind('/');
    return slash == std::string::npos ? "." : path.substr(0, slash);
}

// Rank 0 prints, at once: a run is watched while it goes on.
__attribute__((format(printf, 1, 2))) inline void say(const char* format, ...) {
    if (world.rank != 0) return;
    va_list args;
    va_start(args, format);
    const std::string text = printable(vstrprintf(format, args));
    va_end(args);
    if (fputs(text.c_str(), stdout) < 0 || fflush(stdout) != 0)
        fail("cannot write to the standard output: %s", strerror(errno));
}

// A file as ranks compare it: name, size, and a checksum of a sample that has its first and its last bytes (a shard's
// header, the checksum of a checkpoint's header). A file of another run, another version or cut short shows; a single
// changed byte need not.
inline std::string describe_file(const std::string& path) {
    constexpr size_t kBlock = 4096, kBlocks = 9;
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    struct stat info = {};
    if (fd < 0 || fstat(fd, &info) != 0) return strprintf("%s: %s", path.c_str(), strerror(errno));
    Checksum checksum;
    char block[kBlock];
    const size_t bytes = size_t(info.st_size), last = bytes > kBlock ? bytes - kBlock : 0;
    for (size_t i = 0; i < kBlocks; i++) {
        memset(block, 0, kBlock);
        if (pread(fd, block, kBlock, off_t(last * i / (kBlocks - 1))) < 0)
            break;  // whoever reads it later will say why
        checksum.update(block, kBlock);
    }
    close(fd);
    return strprintf("%s of %zu bytes with content %016" PRIx64, path.substr(path.rfind('/') + 1).c_str(), bytes,
                     checksum.value());
}

// ---- Run: what it is made of ----------------------------------------------------------------------------------------

// All that can be known, and refused, before the device is touched and the model is allocated.
struct Run {
    const Options options;
    const std::unique_ptr<Shards> train, val;    // null without --train (--steps 0), without --val
    const std::unique_ptr<Tokenizer> tokenizer;  // null: none lies beside the data
    const std::string train_digest;              // names, sizes, and a sample of the content of the shards
    std::unique_ptr<Checkpoint> source;          // of the first weights; null: initial_values
    const ModelConfig config;
    const std::unique_ptr<HellaSwag> hellaswag;  // null without --hellaswag
    const int64_t total_batch;                   // tokens per optimizer step, over all ranks
    const int accumulation;                      // micro-steps per optimizer step
    const uint64_t eval_windows;                 // sequences in an evaluation, over all ranks
    std::string resumed_from;  // the path of `source` if it gives the optimizer's state and the step too
    int64_t first_step = 0;    // steps done before this process started

    explicit Run(const Options& given)
        : options(with_checkpoint_sizes(given)),
          train(options.train.empty() ? nullptr : new Shards(options.train, options.seq_len)),
          val(options.val.empty() ? nullptr : new Shards(options.val, options.seq_len)),
          tokenizer(find_tokenizer()),
          train_digest(digest(describe("train", train.get()))),
          config(agreed_config()),
          hellaswag(options.hellaswag.empty()
                        ? nullptr
                        : new HellaSwag(options.hellaswag,
                                        tokenizer ? std::min(config.vocab, tokenizer->vocab) : config.vocab,
                                        config.seq_len)),
          total_batch(find_total_batch()),
          accumulation(int(total_batch / (int64_t(options.batch) * options.seq_len * world.size))),
          eval_windows(find_eval_windows()) {
        if (tokenizer && config.vocab < tokenizer->vocab)
            fail("a vocabulary of %d is smaller than the %d tokens of the tokenizer beside the shards", config.vocab,
                 tokenizer->vocab);
        if (options.vocab > 0 && options.vocab != config.vocab)
            fail("--vocab %d contradicts the %d of checkpoint %s", options.vocab, config.vocab, options.model.c_str());
        if (is_checkpoint(options.model)) {
            source.reset(new Checkpoint(options.model));
            check_model(*source);
        }
        if (!options.out.empty()) prepare_directory();
        resumed_from = find_resume();
        if (resumed_from.empty()) return;
        source.reset(new Checkpoint(resumed_from));
        check_model(*source);
        check_same_run(*source);
        first_step = meta_number(*source, "step");
    }

    static std::string meta_text(const Checkpoint& checkpoint, const std::string& key) {
        const auto found = checkpoint.meta.find(key);
        return found == checkpoint.meta.end() ? "" : found->second;
    }

    // What a checkpoint says about the run that made it.
    Meta meta(int64_t step, int64_t optimizer_steps) const {
        Meta meta = {{"step", std::to_string(step)},
                     {"layers", std::to_string(config.layers)},
                     {"heads", std::to_string(config.heads)},
                     {"channels", std::to_string(config.channels)},
                     {"seq_len", std::to_string(config.seq_len)},
                     {"vocab", std::to_string(config.vocab)},
                     {"optimizer", options.optimizer},
                     {"optimizer_steps", std::to_string(optimizer_steps)},
                     {"seed", std::to_string(options.seed)},
                     {"total_batch", std::to_string(total_batch)},
                     {"train_windows", std::to_string(train->windows())},
                     {"train_digest", train_digest},
                     {"tokenizer", tokenizer ? tokenizer->identity : ""}};
        for (const Flag& flag : flag_table())
            if (shapes_run(flag)) meta[std::string("flag.") + flag.name] = flag_value(flag, options);
        return meta;
    }

  private:
    // All that lie beside the shards must be the same.
    std::unique_ptr<Tokenizer> find_tokenizer() const {
        std::set<std::string> directories;
        for (const Shards* shards : {train.get(), val.get()})
            for (size_t i = 0; shards && i < shards->paths().size(); i++)
                directories.insert(directory_of(shards->paths()[i]));
        if (!options.hellaswag.empty()) directories.insert(directory_of(options.hellaswag));
        std::unique_ptr<Tokenizer> found;
        std::string first;
        for (const std::string& directory : directories) {
            const std::string path = directory + "/tokenizer.bin";
            struct stat info;  // lstat: a link to nothing is a tokenizer that is lost, not none
            if (lstat(path.c_str(), &info) != 0 && errno == ENOENT) continue;
            std::unique_ptr<Tokenizer> tokenizer(new Tokenizer(path));
            if (found && found->identity != tokenizer->identity)
                fail("%s and %s differ: the data of one run must be of one tokenizer", first.c_str(), path.c_str());
            if (!found) first = path, found = std::move(tokenizer);
        }
        return found;
    }

    // A line for each shard.
    static std::string describe(const char* name, const Shards* shards) {
        std::string lines;
        for (size_t i = 0; shards && i < shards->paths().size(); i++)
            lines += strprintf("%s shard %s\n", name, describe_file(shards->paths()[i]).c_str());
        return lines;
    }
    static std::string digest(const std::string& text) {
        return strprintf("%016" PRIx64, Checksum::of(text.data(), text.size()));
    }

    // All ranks have found the same data, tokenizer and model.
    ModelConfig agreed_config() const {
        std::string facts = describe("train", train.get()) + describe("val", val.get());
        facts += strprintf("tokenizer %s\n", tokenizer ? tokenizer->identity.c_str() : "none");
        if (!options.hellaswag.empty()) facts += "--hellaswag " + describe_file(options.hellaswag) + "\n";
        if (is_checkpoint(options.model)) facts += "--model " + describe_file(options.model);
        require_same(facts);
        return model_config(options, find_vocab());
    }

    int find_vocab() const { return options.vocab > 0 ? options.vocab : tokenizer ? tokenizer->vocab : 50257; }

    int64_t find_total_batch() const {
        const int64_t step = int64_t(options.batch) * options.seq_len * world.size;
        if (options.total_batch == 0) return step;
        if (options.total_batch % step)
            usage_fail("--total_batch %" PRId64 " is not a multiple of --batch %d x --seq_len %d x %d ranks = %" PRId64,
                       options.total_batch, options.batch, options.seq_len, world.size, step);
        return options.total_batch;
    }

    // Whole windows, and none of them twice.
    uint64_t find_eval_windows() const {
        if (!val) return 0;
        return std::min(uint64_t(ceil_div<int64_t>(options.eval_tokens, options.seq_len)), val->windows());
    }

    void prepare_directory() const {
        int exists = 0;
        if (world.rank == 0) {
            std::error_code error;
            std::filesystem::create_directories(options.out, error);
            if (error) fail("cannot make --out %s: %s", options.out.c_str(), error.message().c_str());
            if (access(options.out.c_str(), W_OK | X_OK) != 0)
                fail("cannot write to --out %s: %s", options.out.c_str(), strerror(errno));
            // Held until the process ends: two runs in one directory would delete each other's files.
            const int directory = open(options.out.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
            if (directory < 0) fail("cannot open --out %s: %s", options.out.c_str(), strerror(errno));
            if (flock(directory, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
                fail("another run is writing to --out %s: choose another directory", options.out.c_str());
            exists = access((options.out + "/log.jsonl").c_str(), F_OK) == 0 || !list_checkpoints(options.out).empty();
        }
        broadcast_host(&exists, sizeof exists);
        // Going on from a checkpoint of another directory would cut this one's run off.
        std::error_code error;
        const bool goes_on =
            options.resume == "auto" ||
            (!options.resume.empty() && std::filesystem::equivalent(directory_of(options.resume), options.out, error));
        if (exists && !goes_on)
            fail("--out %s holds a run already: go on with --resume auto, or choose another directory",
                 options.out.c_str());
    }

    // The checkpoint to go on from, or "". Rank 0 decides, so that all ranks go on from the same file.
    std::string find_resume() const {
        if (options.resume.empty()) return "";
        std::string path = options.resume;
        if (path == "auto") {
            char chosen[4096] = "";
            while_others_wait([&] {
                snprintf(chosen, sizeof chosen, "%s", newest_good_checkpoint(options.out, stderr).c_str());
                if (!chosen[0] && !list_checkpoints(options.out).empty())
                    fail("--resume auto: no checkpoint in %s is good; move them away to start from step 1",
                         options.out.c_str());
                if (!chosen[0] && !ckpt::files(options.out, ckpt::kOldSuffix).empty())
                    fail(
                        "--resume auto: the checkpoints in %s are of an earlier version, in a format (%s) that is no "
                        "longer read: go on from them with that version, or move them away to start from step 1",
                        options.out.c_str(), ckpt::kOldSuffix);
            });
            broadcast_host(chosen, sizeof chosen);
            path = chosen;
            if (path.empty())
                say("--resume auto: no checkpoint in %s yet, starting from step 1\n", options.out.c_str());
        }
        if (path.empty()) return path;
        require_same("checkpoint " + describe_file(path));
        say("resuming from %s\n", path.c_str());
        return path;
    }

    // A shorter context than the checkpoint's is fine for a new run: it uses the first positions. A resumed one would
    // read other windows.
    void check_model(const Checkpoint& checkpoint) const {
        const ModelConfig other = checkpoint_config(checkpoint);
        const bool shorter = resumed_from.empty() && config.seq_len < other.seq_len;
        const struct {
            const char* name;
            int here, there;
        } sizes[] = {{"layers", config.layers, other.layers},
                     {"heads", config.heads, other.heads},
                     {"channels", config.channels, other.channels},
                     {"seq_len", config.seq_len, shorter ? config.seq_len : other.seq_len},
                     {"vocab", config.vocab, other.vocab}};
        for (auto& size : sizes)
            if (size.here != size.there)
                fail("checkpoint %s is of another model: its %s is %d, this run's is %d; --%s %d would fit",
                     checkpoint.path.c_str(), size.name, size.there, size.here, size.name, size.there);
        const std::string identity = meta_text(checkpoint, "tokenizer");
        if (!identity.empty() && (!tokenizer || identity != tokenizer->identity))
            fail("checkpoint %s was trained with another tokenizer than %s", checkpoint.path.c_str(),
                 tokenizer ? "the one beside the shards" : "none: put its tokenizer.bin beside the shards");
        if (identity.empty() && tokenizer && tokenizer->vocab != config.vocab)
            say("note: the weights in %s are for %d tokens, and the tokenizer beside the shards has %d\n",
                checkpoint.path.c_str(), config.vocab, tokenizer->vocab);
    }

    // What a resumed run must share with the one that it continues, or its steps would read other data; and what it
    // had better know about.
    void check_same_run(const Checkpoint& checkpoint) const {
        const char* path = checkpoint.path.c_str();
        const std::string optimizer_there = meta_text(checkpoint, "optimizer");
        if (optimizer_there.empty())
            fail("checkpoint %s has weights and no run to go on with: --model %s starts a run from them", path, path);
        const struct {
            const char* flag;
            int64_t here, there;
        } same[] = {{"total_batch", total_batch, meta_number(checkpoint, "total_batch")},
                    {"seed", options.seed, meta_number(checkpoint, "seed")}};
        for (auto& flag : same)
            if (flag.here != flag.there)
                fail("checkpoint %s was made with --%s %" PRId64 ", this run has %" PRId64 ": pass --%s %" PRId64, path,
                     flag.flag, flag.there, flag.here, flag.flag, flag.there);
        if (optimizer_there != options.optimizer && !options.switch_optimizer)
            fail("checkpoint %s was made with --optimizer %s, this run has %s: pass --switch_optimizer to change it",
                 path, optimizer_there.c_str(), options.optimizer.c_str());

        const std::string digest_there = meta_text(checkpoint, "train_digest");
        if (meta_number(checkpoint, "train_windows") != int64_t(train->windows()) ||
            (!digest_there.empty() && digest_there != train_digest))
            say("note: the training data have changed since %s\n", path);
        for (const Flag& flag : flag_table()) {
            const auto there = checkpoint.meta.find(std::string("flag.") + flag.name);
            const std::string here = flag_value(flag, options);
            const bool idle = options.optimizer == "adamw" && !strcmp(flag.group, "muon");
            if (shapes_run(flag) && !idle && there != checkpoint.meta.end() && there->second != here)
                say("note: --%s is %s, and was %s in the run that made %s\n", flag.name, here.c_str(),
                    there->second.c_str(), path);
        }
    }
};

// ---- RunState: weights and optimizer state in a checkpoint ----------------------------------------------------------

// A checkpoint holds whole tensors by name, so it knows neither ranks nor owners: fp32 weights as
// "h.0.mlp.c_fc.weight", the optimizer's state as "optimizer.momentum.h.0.mlp.c_fc.weight".
template <class Backend>
class RunState {
    const Run& run;
    Optimizer<Backend>& optimizer;
    static constexpr size_t kStagingFloats = size_t(4) << 20;
    float *staging = nullptr, *staging_host = nullptr;  // (kStagingFloats) what save() moves at a time

    struct Kind {
        const char* prefix;
        float* array;  // of all that this rank has of it
    };
    std::vector<Kind> kinds_of(int tensor) const {
        if (optimizer.plan.is_muon(tensor)) return {{"", optimizer.master}, {"optimizer.momentum.", optimizer.moment1}};
        return {
            {"", optimizer.master}, {"optimizer.adam_m.", optimizer.moment1}, {"optimizer.adam_v.", optimizer.moment2}};
    }

    // Calls fill(begin, count, host) for every run of the tensor's fp32 state in `array` that this rank holds, and
    // uploads the result.
    template <class Fill>
    void fill_state(int tensor, float* array, Fill fill) {
        std::vector<float> host;
        for (const auto& part : optimizer.state_parts(tensor)) {
            if (!part.here) continue;
            host.assign(part.count, 0.0f);
            fill(part.begin, part.count, host.data());
            Backend::upload(array + part.state, host.data(), part.count * sizeof(float));
            Backend::synchronize();
        }
    }

    // muon and dmuon keep the same state; between adamw and these, or from weights alone, it starts afresh.
    void load(const Checkpoint& checkpoint) {
        const bool was_adamw = Run::meta_text(checkpoint, "optimizer") == "adamw",
                   is_adamw = optimizer.plan.method == Method::adamw,
                   with_state = !run.resumed_from.empty() && was_adamw == is_adamw;
        for (int t = 0; t < int(optimizer.plan.tensors.size()); t++) {
            const TensorSpec& spec = optimizer.plan.tensors[t];
            for (const Kind& kind : kinds_of(t)) {
                if (kind.prefix[0] && !with_state) continue;
                const size_t stored = spec.stored_size();
                const bool positions = spec.kind == TensorKind::position_embedding;  // there may be more in the file
                const size_t there = positions ? size_t(meta_number(checkpoint, "seq_len")) * spec.cols : stored;
                const float* values = checkpoint.data(kind.prefix + spec.name, there);
                fill_state(t, kind.array, [&](size_t begin, size_t count, float* host) {
                    if (begin < stored) memcpy(host, values + begin, std::min(count, stored - begin) * sizeof(float));
                });
            }
        }
        if (!with_state) return;
        const int64_t updates = meta_number(checkpoint, "optimizer_steps");
        Backend::upload(optimizer.updates, &updates, sizeof updates);
        Backend::synchronize();
    }

  public:
    RunState(const Run& run_, Optimizer<Backend>& optimizer_) : run(run_), optimizer(optimizer_) {
        if (run.options.out.empty()) return;
        staging = static_cast<float*>(Backend::alloc(kStagingFloats * sizeof(float), "checkpoint staging"));
        staging_host = static_cast<float*>(Backend::alloc_host(kStagingFloats * sizeof(float)));
    }

    // The weights and the state of the first step.
    void start() {
        if (run.source) {
            load(*run.source);
        } else {
            for (int t = 0; t < int(optimizer.plan.tensors.size()); t++)
                fill_state(t, optimizer.master, [&](size_t begin, size_t count, float* host) {
                    initial_values(host, optimizer.plan.tensors[t], t, begin, count, uint64_t(run.options.seed),
                                   run.config.layers);
                });
        }
        optimizer.publish();
    }

    // Keeps the newest `keep` checkpoints.
    void save(int64_t step, int64_t keep) {
        const auto& tensors = optimizer.plan.tensors;
        struct Source {
            int tensor;
            float* array;
        };
        std::map<std::string, Source> sources;  // by the name in the file: the order in which a checkpoint has them
        for (int t = 0; t < int(tensors.size()); t++)
            for (const Kind& kind : kinds_of(t)) sources[kind.prefix + tensors[t].name] = {t, kind.array};
        std::vector<TensorInfo> table;
        for (const auto& [name, source] : sources) {
            const TensorSpec& spec = tensors[source.tensor];
            TensorInfo info{name, {spec.cols}};
            if (spec.decays()) info.shape = {spec.stored_rows, spec.cols};
            table.push_back(info);
        }
        int64_t updates = 0;
        Backend::download(&updates, optimizer.updates, sizeof updates);
        finish<Backend>("a checkpoint");
        const Meta meta = run.meta(step, updates);
        const std::string& out = run.options.out;
        std::unique_ptr<CheckpointWriter> writer;  // rank 0's
        while_others_wait([&] { writer.reset(new CheckpointWriter(out, step, meta, table)); });
        // Each part goes from its owner through `staging` to rank 0 and to the file: no rank ever holds the whole.
        for (const auto& [name, source] : sources) {
            const size_t stored = tensors[source.tensor].stored_size();
            for (const auto& part : optimizer.state_parts(source.tensor))
                for (size_t at = 0; at < part.count && part.begin + at < stored; at += kStagingFloats) {
                    const size_t count = std::min({kStagingFloats, part.count - at, stored - part.begin - at});
                    if (world.rank == part.owner)
                        Backend::copy(staging, source.array + part.state + at, count * sizeof(float));
                    if (part.owner != 0) Backend::wait(Backend::broadcast(staging, count * sizeof(float), part.owner));
                    if (writer) Backend::download(staging_host, staging, count * sizeof(float));
                    finish<Backend>("a checkpoint");
                    while_others_wait([&] { writer->append(staging_host, count * sizeof(float)); });
                }
        }
        while_others_wait([&] { writer->finish(keep); });
        say("saved %s/step_%08" PRId64 "%s\n", out.c_str(), step, ckpt::kSuffix);
    }
};

// ---- Samples, and --generate ----------------------------------------------------------------------------------------

// defines: Generator, sample, generate_tokens; it stands on what is above
#include "generate.h"

// ---- StepRecord and StepLog: what a step leaves behind --------------------------------------------------------------

inline std::string number(const char* format, double x) {
    return std::isfinite(x) ? strprintf(format, x) : std::isnan(x) ? "nan" : x > 0 ? "inf" : "-inf";
}
inline std::string json_number(const char* format, double x) {
    return std::isfinite(x) ? strprintf(format, x) : "null";
}

// One list of fields makes both the line that is printed and the line of log.jsonl.
struct StepRecord {
    struct Field {
        std::string key;      // in log.jsonl; "": printed only
        std::string logged;   // a JSON value
        std::string printed;  // "": logged only
    };
    std::vector<Field> fields;

    // A number as it is logged, and as it is printed with its name or unit around it.
    void add(const std::string& key, double x, const char* json_format, const std::string& printed = "") {
        fields.push_back({key, json_number(json_format, x), printed});
    }
    void log_only(const std::string& key, const std::string& word) { fields.push_back({key, "\"" + word + "\"", ""}); }
    void print_only(const std::string& text) { fields.push_back({"", "", text}); }

    std::string printed() const {
        std::vector<std::string> words;
        for (const Field& field : fields)
            if (!field.printed.empty()) words.push_back(field.printed);
        return join(words, " | ");
    }
    std::string json() const {
        std::vector<std::string> members;
        for (const Field& field : fields)
            if (!field.key.empty()) members.push_back("\"" + field.key + "\": " + field.logged);
        return "{" + join(members, ", ") + "}";
    }
};

// DIR/log.jsonl, one line a step. A resumed run cuts off the lines after the step that it goes on from, but not before
// it has a line of its own to write. Until it has saved as well, the log as it was stays beside it: if the run dies
// before that, the checkpoints that the next one finds are those of the old lines. The first line of a log put aside
// names the checkpoints that were there; one that it does not name has been saved since.
class StepLog {
    const std::string path, before;  // "": nothing is logged
    const std::string out;
    const std::string resumed_from;  // a checkpoint, or ""
    const int64_t resumed_step;
    FILE* file = nullptr;

    [[noreturn]] void give_up() const { fail("cannot write %s: %s", path.c_str(), strerror(errno)); }

    // What the checkpoint that we go on from stands on, and in which file that is.
    std::string old_log() const {
        std::ifstream put_aside(before);
        if (!put_aside && errno != ENOENT) fail("cannot read %s: %s", before.c_str(), strerror(errno));
        if (!put_aside || resumed_from.empty()) return put_aside ? before : path;
        std::string its_checkpoints;
        std::getline(put_aside, its_checkpoints);
        const std::string identity = checkpoint_identity(resumed_from);
        return !identity.empty() && its_checkpoints.find(identity) == std::string::npos ? path : before;
    }

    struct Lines {
        std::string kept, cut;  // up to a step; after it, or not those of a step
    };
    static Lines read(const std::string& path, int64_t last_step) {
        if (std::filesystem::exists(path) && !std::filesystem::is_regular_file(path))
            fail("%s is not a file: remove it", path.c_str());
        std::ifstream file(path);
        if (!file && errno != ENOENT) fail("cannot read %s: %s", path.c_str(), strerror(errno));
        Lines lines;
        int64_t step;
        for (std::string line; std::getline(file, line);) {
            const bool stays =
                sscanf(line.c_str(), "{\"step\": %" SCNd64, &step) == 1 && step <= last_step && line.back() == '}';
            (stays ? lines.kept : lines.cut) += line + "\n";
        }
        if (file.bad()) fail("cannot read all of %s", path.c_str());
        return lines;
    }

    // Puts a file with this text in the place of another one, if there is one. It stays open.
    FILE* replace(const std::string& place, const std::string& text) const {
        const std::string temporary = place + ".tmp";
        FILE* made = fopen(temporary.c_str(), "we");
        if (!made || fwrite(text.data(), 1, text.size(), made) != text.size() || fflush(made) != 0) give_up();
        if (rename(temporary.c_str(), place.c_str()) != 0) give_up();
        return made;
    }

    void start() {
        const std::string old = old_log();
        const Lines lines = read(old, resumed_step);
        if (old == path && !lines.cut.empty()) {
            std::string its_checkpoints = "{\"checkpoints\": [";
            for (const std::string& checkpoint : list_checkpoints(out))
                its_checkpoints += "\"" + checkpoint_identity(checkpoint) + "\", ";
            fclose(replace(before, its_checkpoints + "\"\"]}\n" + lines.kept + lines.cut));
        }
        file = replace(path, lines.kept);
    }

  public:
    explicit StepLog(const Run& run)
        : path(run.options.out.empty() || world.rank != 0 ? "" : run.options.out + "/log.jsonl"),
          before(run.options.out + "/log.before.jsonl"),
          out(run.options.out),
          resumed_from(run.resumed_from),
          resumed_step(run.first_step) {}

    void write(const std::string& line) {
        if (path.empty()) return;
        if (!file) start();
        if (fprintf(file, "%s\n", line.c_str()) < 0 || fflush(file) != 0) give_up();
        struct stat ours, there;
        if (fstat(fileno(file), &ours) != 0 || stat(path.c_str(), &there) != 0 || ours.st_ino != there.st_ino)
            fail("%s was removed or replaced while this run was writing to it: ending the run", path.c_str());
    }

    // A checkpoint of these lines is on the disk.
    void saved() const {
        if (!path.empty()) unlink(before.c_str());
    }

    // Nothing will be written: a log put aside, whose checkpoints are there still, comes back.
    void restore() const {
        if (path.empty() || old_log() != before) return;
        fclose(replace(path, read(before, INT64_MAX).kept));
        unlink(before.c_str());
    }

    ~StepLog() {
        if (file) fclose(file);
    }
    StepLog(const StepLog&) = delete;
};

// ---- The training loop ----------------------------------------------------------------------------------------------

template <class Backend>
class Trainer {
    using Event = typename Backend::Event;

    Run& run;
    const Options& options;
    Optimizer<Backend> optimizer;
    Model<Backend> model;
    RunState<Backend> state;
    std::unique_ptr<Evaluator<Backend, Model<Backend>>> evaluator;           // null without --val
    std::unique_ptr<HellaSwagEvaluator<Backend, Model<Backend>>> hellaswag;  // null without --hellaswag
    std::unique_ptr<Generator<Backend>> generator;                           // null without --sample_every
    StepLog log;

    // What the device leaves for the host at the end of a step. The host reads it one step later, so it never waits
    // inside a step; two slots, used in turn.
    struct Stats {
        double loss, stopping;  // sums over all ranks: of the losses, of those that are asked to stop
        float clip[2];          // scale, norm
    };
    struct Slot {
        Event begin, optimizer_begin, end;  // of the step's work on the device
        Timeline<Backend> own_timeline;     // --profile
        Timeline<Backend>* timeline;        // that of this step: its own, or a traced one
        Event read;                         // `host` is filled
        Stats* host;
        int64_t step = 0;  // 0: empty
        double lr = 0;
    };
    Slot slots[2];
    // --profile: two steps in a row are kept for trace.json, since the weights of the first arrive in the second. By
    // then caches and libraries are warm, if the run is long enough; and one more follows, for the second's weights.
    Timeline<Backend> traced[2];
    int64_t traced_last;
    double* sums;           // [2] device: Stats' first two
    bool stopping = false;  // some rank was asked to stop, and all know
    int64_t skipped = 0;    // updates skipped in a row
    double mean_ms = 0;

  public:
    explicit Trainer(Run& run_)
        : run(run_),
          options(run_.options),
          optimizer(tensor_specs(run_.config), options),
          model(run_.config, recompute_level(options), options.head_rows, optimizer),
          state(run_, optimizer),
          log(run_) {
        if (options.sample_every > 0)
            generator.reset(new Generator<Backend>(run.config, {optimizer.params, optimizer.plan, run.config}));
        check_memory();
        model.allocate(options.batch);
        if (generator) generator->allocate();
        const ModelConfig& config = run.config;
        if (run.val)
            evaluator.reset(new Evaluator<Backend, Model<Backend>>(*run.val, run.tokenizer.get(), model,
                                                                   run.eval_windows, options.batch, config.vocab));
        if (run.hellaswag)
            hellaswag.reset(new HellaSwagEvaluator<Backend, Model<Backend>>(*run.hellaswag, run.tokenizer.get(), model,
                                                                            options.batch, config.seq_len));
        sums = static_cast<double*>(Backend::alloc(2 * sizeof(double), "sums"));
        for (Slot& slot : slots) slot.host = static_cast<Stats*>(Backend::alloc_host(sizeof(Stats)));
        traced_last = std::min(run.first_step + 11, std::max(run.first_step + 1, options.steps - 1));
        for (Timeline<Backend>& timeline : traced) timeline.traces_collectives = true;
    }

    // Returns the exit code: 0, or 128 + the signal that asked it to stop before its last step.
    int train() {
        state.start();
        run.source.reset();  // --keep may remove the file: its room on the disk must not be held
        print_table();
        if (options.steps == 0) return evaluate_only();
        if (run.first_step >= options.steps) {
            log.restore();
            say("the run is at step %" PRId64 " of %" PRId64
                ": nothing left to do (--steps is the total, also after a resume)\n",
                run.first_step, options.steps);
            return 0;
        }
        DataLoader loader(*run.train, run.config.vocab, uint64_t(options.seed), options.batch, world.rank, world.size,
                          run.accumulation, uint64_t(run.first_step), Backend::alloc_host);
        Event uploaded[3];  // as many batches as the loader keeps: a batch is refilled only after its upload
        if (options.tune) {
            Backend::tune([&] {
                model.forward(model.inputs, options.batch, options.seq_len);
                model.backward(options.batch, options.seq_len, 1.0f / float(run.total_batch), false, false);
            });
            finish<Backend>("the products to be timed");
        }
        int64_t micro_steps = 0;
        // Several ranks' collectives run beside the backward, and --profile times parts of what would be one.
        const bool as_graph = options.graph && world.size == 1 && !options.profile;
        typename Backend::Graph graphs[2];  // of a step's first micro-step, and of the others
        typename Backend::EnqueueDeadline deadline;
        note_stop_signals();
        for (int64_t step = run.first_step + 1; step <= options.steps; step++) {
            const typename Backend::Range range("step", int(step % INT_MAX));
            Slot& slot = slots[step % 2];
            const size_t tokens = size_t(options.batch) * options.seq_len;
            slot.begin.record();
            const bool is_traced = step == traced_last || step == traced_last - 1;
            Timeline<Backend>& timeline = *(slot.timeline = is_traced ? &traced[step % 2] : &slot.own_timeline);
            timeline.clear();
            if (options.profile) optimizer.timeline = &timeline;
            // From one point of a step to the next, by name.
            size_t reached = options.profile ? timeline.point() : 0;
            auto until_here = [&](const char* name, int number) {
                if (!options.profile) return;
                const size_t begin = std::exchange(reached, timeline.point());
                timeline.span(name, number, begin, reached);
            };
            Backend::zero(sums, 2 * sizeof(double));
            for (int m = 0; m < run.accumulation; m++, micro_steps++) {
                // The host stays at most two micro-steps ahead; the device never waits for it.
                if (micro_steps >= 2)
                    wait_until([&] { return uploaded[(micro_steps - 2) % 3].done(); }, "the device to take a batch");
                const Batch batch = loader.next();
                Backend::upload(model.inputs, batch.inputs, tokens * sizeof(int));
                Backend::upload(model.targets, batch.targets, tokens * sizeof(int));
                Backend::upload(model.order, batch.order, tokens * sizeof(int));
                uploaded[micro_steps % 3].record();
                const auto micro_step = [&](bool complete) {
                    model.forward(model.inputs, options.batch, options.seq_len);
                    until_here("forward", m);
                    // The loss is the mean over all tokens of the step, whoever has them, so plain sums over
                    // micro-steps and ranks give the gradient.
                    model.backward(options.batch, options.seq_len, 1.0f / float(run.total_batch), m > 0, complete);
                    Backend::sum_losses(sums, model.losses, int(tokens));
                    until_here("backward", m);
                };
                if (as_graph) {
                    optimizer.need_all();  // the host's part of forward; that of backward is left to the optimizer
                    graphs[m > 0].run([&] { micro_step(false); });
                } else {
                    micro_step(m + 1 == run.accumulation);
                }
            }
            slot.optimizer_begin.record();
            slot.host->stopping = stop_signal != 0;
            Backend::upload(&sums[1], &slot.host->stopping, sizeof(double));
            // Before the optimizer's collectives, of which the last go on after the step.
            Ticket summed = Backend::all_reduce(sums, 2);
            const double share = schedule(options, step),
                         muon_peak = options.muon_lr > 0 ? options.muon_lr : 2 * options.lr;
            slot.lr = options.lr * share;
            int phases = 0;
            optimizer.step(float(slot.lr), float(muon_peak * share),
                           [&](Phase phase) { until_here(phase_names[phase], phases++); });
            optimizer.timeline = nullptr;
            slot.end.record();
            Backend::wait(std::move(summed));
            Backend::download(&slot.host->loss, sums, 2 * sizeof(double));
            Backend::download(slot.host->clip, optimizer.clip, 2 * sizeof(float));
            slot.read.record();
            slot.step = step;

            const bool last = step == options.steps;
            auto due = [&](int64_t every) { return last || (every > 0 && step % every == 0); };
            report(slots[(step - 1) % 2]);  // the previous step, while this one runs
            if (evaluator && due(options.eval_every)) {
                const Validation validation = evaluator->run();
                report(slot, &validation);
            }
            if (generator && due(options.sample_every)) {
                report(slot);
                optimizer.need_all();
                say("--- sample at step %" PRId64 "\n%s\n---\n", step, sample(run, *generator, step).c_str());
            }
            // All ranks read in the same place that one of them is to stop, so they stop after the same step.
            if (!options.out.empty() && (stopping || due(options.save_every))) {
                report(slot);
                save(step, last || stopping);
            }
            if (last || stopping) report(slot);
            if (stopping && !last) return stopped(step);
            if (last && hellaswag && !score_hellaswag(step)) return stopped(step);
        }
        return 0;
    }

  private:
    void check_memory() {
        auto bytes_of = [&](int B) { return model.activation_bytes(B) + (generator ? generator->bytes() : 0); };
        const size_t free = Backend::memory_available(), need = bytes_of(options.batch);
        if (need + kMemoryMargin <= free) return;
        const int fits = largest_batch(free, bytes_of);
        fail("out of memory: --batch %d needs %.1f GiB of activations and %.1f GiB are free: %s", options.batch,
             need / 0x1p30, free / 0x1p30,
             fits > 0 ? strprintf("--batch %d fits, more with --recompute block or --head_rows", fits).c_str()
                      : "not even --batch 1 fits; try --recompute block, --head_rows, a shorter --seq_len or a smaller "
                        "model");
    }

    void print_table() {
        auto row = [](const char* name, const std::string& text) { say("| %-12s | %s\n", name, text.c_str()); };
        const size_t activations = model.activation_bytes(options.batch);
        const size_t fixed = Optimizer<Backend>::bytes(optimizer.plan) + optimizer.workspace_bytes();
        const ModelConfig& config = run.config;
        row("device", std::string(Backend::device_name()) + " (" + Backend::kBackendName + ")");
        row("kernels", Backend::kernels_name());
        row("ranks", std::to_string(world.size) + (world.launcher == Launcher::mpi    ? " (MPI)"
                                                   : world.launcher == Launcher::self ? " (--gpus)"
                                                                                      : ""));
        row("model", strprintf("%d layers, %d heads, %d channels, %d tokens of context, vocabulary %d (padded to %d)",
                               config.layers, config.heads, config.channels, config.seq_len, config.vocab,
                               config.padded_vocab()));
        row("parameters", strprintf("%.2f M", parameter_count(optimizer.plan.tensors) / 1e6));
        row("memory",
            strprintf("%.2f GiB: %.2f weights%s, %.2f activations", (fixed + activations) / 0x1p30, fixed / 0x1p30,
                      options.steps > 0 ? ", gradients and optimizer" : "", activations / 0x1p30));
        std::vector<std::string> levels;
        for (const std::string& level : recompute_levels())
            levels.push_back(
                strprintf("%s %zu", level.c_str(),
                          Activations<typename Backend::real>::layer_bytes(config, Recompute(levels.size()))));
        row("recompute", strprintf("%s; bytes kept of a token in a layer: %s", options.recompute.c_str(),
                                   join(levels, ", ").c_str()));
        if (run.train)
            row("train", strprintf("%s: %" PRIu64 " tokens, %" PRIu64 " windows", options.train.c_str(),
                                   run.train->tokens(), run.train->windows()));
        if (run.val)
            row("val", strprintf("%s: %" PRIu64 " tokens, %" PRIu64 " windows; an evaluation reads %" PRIu64,
                                 options.val.c_str(), run.val->tokens(), run.val->windows(), run.eval_windows));
        if (hellaswag)
            row("hellaswag",
                strprintf("%s: %zu examples", options.hellaswag.c_str(), run.hellaswag->examples.size()) +
                    (hellaswag->rows_cut() == 0
                         ? ""
                         : strprintf("; %zu of %zu endings do not fit with their context into --seq_len: its "
                                     "beginning is cut off",
                                     hellaswag->rows_cut(), hellaswag->row_count())));
        if (!run.tokenizer)
            row("tokenizer", "no tokenizer.bin beside the data: samples are token numbers, no bits per byte");
        if (options.steps > 0)
            row("step", strprintf("%" PRId64 " tokens: %d sequences x %d tokens x %d ranks x %d micro-steps",
                                  run.total_batch, options.batch, options.seq_len, world.size, run.accumulation));
        if (options.steps > 0)
            row("optimizer", strprintf("%s, steps %" PRId64 " to %" PRId64, options.optimizer.c_str(),
                                       run.first_step + 1, options.steps));
        if (!options.out.empty())
            row("out", options.out +
                           (options.save_every > 0
                                ? strprintf(": a checkpoint every %" PRId64 " steps, the newest %" PRId64 " are kept",
                                            options.save_every, options.keep)
                                : ": a checkpoint of the last step alone (--save_every saves more often)"));
        row("flags", join(non_default_flags(options), " "));
    }

    // A step that was skipped changed nothing, and must not push out what was saved before the trouble.
    void save(int64_t step, bool ends) {
        if (skipped > 0 && !ends) return say("not saved: the update was skipped\n");
        state.save(step, skipped == 0 ? options.keep : std::numeric_limits<int64_t>::max());
        log.saved();
    }

    // The line and the exit code of a run that was asked to stop. Not every rank need have received the signal.
    int stopped(int64_t step) {
        int number = 0;
        for (const std::string& received : gather_host(std::to_string(stop_signal)))
            number = std::max(number, atoi(received.c_str()));
        say("stopped after step %" PRId64 " of %" PRId64 " by signal %d (%s): %s\n", step, options.steps, number,
            strsignal(number),
            options.out.empty()     ? "nothing is saved without --out"
            : step == options.steps ? "--steps 0 --model CHECKPOINT --hellaswag FILE scores what it has saved"
                                    : "--resume auto goes on from here");
        return 128 + number;
    }

    // Prints and logs a step once the device has finished it; does nothing for a slot that is empty or already
    // reported.
    void report(Slot& slot, const Validation* validation = nullptr) {
        if (slot.step == 0) return;
        wait_until([&] { return slot.read.done(); }, "a step to finish");
        const bool skip = slot.host->clip[0] == 0;
        const StepRecord step = record(slot, validation, skip);
        say("%s\n", step.printed().c_str());
        log.write(step.json());
        if (slot.step == std::min(traced_last + 1, options.steps)) write_trace();
        slot.step = 0;
        stopping = stopping || slot.host->stopping > 0;
        skipped = skip ? skipped + 1 : 0;
        if (skipped == 10)
            fail(
                "10 steps in a row had a loss or gradient that is not finite: lower --lr, or resume from an earlier "
                "checkpoint");
    }

    void write_trace() const {
        if (!options.profile || options.out.empty() || world.rank != 0) return;
        std::vector<const Timeline<Backend>*> steps;
        const int64_t first = std::max(traced_last - 1, run.first_step + 1);
        for (int64_t step = first; step <= traced_last; step++) steps.push_back(&traced[step % 2]);
        Timeline<Backend>::write_trace(options.out + "/trace.json", steps, first,
                                       strprintf("rank 0 of %d, %s", world.size, options.optimizer.c_str()));
    }

    StepRecord record(const Slot& slot, const Validation* validation, bool skip) {
        const double loss = slot.host->loss / double(run.total_batch), norm = slot.host->clip[1];
        const double ms = Event::ms(slot.begin, slot.end), optimizer_ms = Event::ms(slot.optimizer_begin, slot.end);
        const double rate = double(run.total_batch) / ms * 1e3, peak = Backend::peak_flops() * world.size;
        const double mfu = peak > 0 ? 100 * rate * flops_per_token() / peak : NAN;  // %, NAN: unknown
        mean_ms = mean_ms > 0 ? 0.9 * mean_ms + 0.1 * ms : ms;
        const int64_t left = int64_t(mean_ms * double(options.steps - slot.step) / 1e3);  // seconds

        StepRecord line;
        line.add("step", double(slot.step), "%.0f", strprintf("step %5" PRId64 "/%" PRId64, slot.step, options.steps));
        line.add("loss", loss, "%.9g", "loss " + number("%.4f", loss));
        if (validation) add(line, *validation);
        line.add("grad_norm", norm, "%.9g", "norm " + number("%.3f", norm));
        line.add("lr", slot.lr, "%.9g", strprintf("lr %.2e", slot.lr));
        line.add("step_ms", ms, "%.4f", strprintf("%.2f ms (optimizer %.2f)", ms, optimizer_ms));
        line.add("optimizer_ms", optimizer_ms, "%.4f");
        line.add("tokens_per_s", rate, "%.1f", strprintf("%.0f tok/s", rate));
        line.add("mfu", mfu, "%.3f", std::isnan(mfu) ? "MFU n/a" : strprintf("MFU %.1f%%", mfu));
        line.add("tokens", double(slot.step) * double(run.total_batch), "%.0f");
        line.log_only("optimizer", options.optimizer);
        if (optimizer.plan.method != Method::adamw) line.add("ns_matrices", double(optimizer.plan.ns_matrices), "%.0f");
        line.print_only(strprintf("%" PRId64 "m%02" PRId64 "s left", left / 60, left % 60));
        if (options.profile) {
            auto add = [&](const char* name) {
                const double sum = slot.timeline->total_ms(name);
                line.add(name + std::string("_ms"), sum, "%.4f", strprintf("%s %.3f", name, sum));
            };
            for (const char* name : phase_names) add(name);
            add("wait");  // outside of the optimizer's time: what the forward pass waited for weights
        }
        if (skip) line.print_only("not finite: update skipped");
        return line;
    }

    void add(StepRecord& line, const Validation& validation) const {
        line.add("val_loss", validation.loss, "%.9g", "val " + number("%.4f", validation.loss));
        if (run.tokenizer)
            line.add("val_bpb", validation.bits_per_byte, "%.9g",
                     number("%.4f", validation.bits_per_byte) + " bits/byte");
    }

    // Prints the scores, and gives them a line of their own in the log: the model is saved by then, and this may take
    // long. False if the run was asked to stop.
    bool score_hellaswag(int64_t step) {
        const auto scores = hellaswag->run([&](size_t rows, double seconds) {
            say("hellaswag: %zu of %zu endings, %.0f s left\n", rows, hellaswag->row_count(), seconds);
        });
        if (!scores) return false;
        StepRecord line;
        line.add("step", double(step), "%.0f", strprintf("hellaswag of %zu examples", run.hellaswag->examples.size()));
        line.add("hellaswag_acc", scores->acc, "%.6f", strprintf("acc %.4f", scores->acc));
        line.add("hellaswag_acc_norm", scores->acc_norm, "%.6f",
                 strprintf("acc_norm %.4f (by tokens: llm.c)", scores->acc_norm));
        if (run.tokenizer)
            line.add("hellaswag_acc_norm_chars", scores->acc_norm_chars, "%.6f",
                     strprintf("%.4f (by characters: lm-eval)", scores->acc_norm_chars));
        say("%s\n", line.printed().c_str());
        log.write(line.json());
        return true;
    }

    // --steps 0
    int evaluate_only() {
        if (evaluator) {
            StepRecord line;
            add(line, evaluator->run());
            say("%s\n", line.printed().c_str());
        }
        if (hellaswag) score_hellaswag(0);
        return 0;
    }

    // Forward and backward multiply and add each parameter once and twice per token; attention adds 6 L C T (causal).
    double flops_per_token() const {
        return 6.0 * double(parameter_count(optimizer.plan.tensors)) +
               6.0 * run.config.layers * run.config.channels * run.config.seq_len;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 4. main

#ifndef TRAIN_GPT_NO_MAIN

// What this binary was built with, for `--version`, for bug reports, and to tell two programs apart.
inline std::string version() {
    std::string parts = "cpu";
#ifdef HAVE_CBLAS
    parts += " blas";
#endif
#ifdef _OPENMP
    parts += " openmp";
#endif
#ifdef __CUDACC__
    parts += sizeof(real) == 4 ? " cuda-fp32" : " cuda-bf16";
#endif
#ifdef USE_NCCL
    parts += " nccl";
#endif
#ifdef USE_MPI
    parts += " mpi";
#endif
#ifdef SOURCES  // the Makefile's digest of them
#define TEXT_OF(x) #x
#define TEXT_OF_MACRO(x) TEXT_OF(x)
    parts += " sources " TEXT_OF_MACRO(SOURCES);
#endif
    return parts;
}

// What the ranks of a run must have in common before any of them looks at data, one fact a line.
inline std::string program_and_flags(const Options& options) {
    std::string facts = "program " + version();
    for (const Flag& flag : flag_table())
        if (flag.name != std::string("rank_timeout"))  // each waits for the others as long as it likes
            facts += strprintf("\n--%s %s", flag.name, flag_value(flag, options).c_str());
    return facts;
}

template <class Backend>
int run_program(const Options& options) {
    if (options.generate > 0) return generate_tokens<Backend>(options);
    Run run(options);
    Backend::start(world);
    const int exit_code = Trainer<Backend>(run).train();
    Backend::stop();
    return exit_code;
}

// auto: the GPU if there is one. All ranks must come to the same answer as rank 0, or they would wait for each other in
// different collectives. gpus: how many this process must see.
inline bool use_cuda(const Options& options, [[maybe_unused]] int gpus = 1) {
    if (options.device == "cpu") return false;
#ifdef __CUDACC__
    const std::string why = Cuda::unavailable(gpus);
    if (why.empty()) return true;
    if (options.device == "cuda" || options.gpus > 0)
        fail("no GPU can be used: %s; --device cpu does without", why.c_str());
#else
    if (options.device == "cuda" || options.gpus > 0)
        fail("this build has no CUDA: install the CUDA Toolkit and run make again, or pass --device cpu");
#endif
    return false;
}

// --help, --version, --print_plan
inline void print_what_is_asked(const Options& given) {
    if (given.help) {
        print_help(stdout);
    } else if (given.version) {
        printf("train_gpt: %s\n", version().c_str());
    } else if (world.rank == 0) {
        const Options options = with_checkpoint_sizes(given);
        const ModelConfig config = model_config(options, options.vocab > 0 ? options.vocab : 50257);
        const int ranks = options.ranks > 0 ? options.ranks : std::max(world.size, options.gpus);
        const Plan plan(tensor_specs(config), options, ranks);
        print_plan(plan, options, sizeof(uint16_t), stdout);
        print_batches(plan, config, options);
    }
    if (fflush(stdout) != 0 || ferror(stdout)) fail("cannot write to the standard output: %s", strerror(errno));
}

// The next file to be opened would take the place of a standard stream that is closed, and what is printed would go
// there.
inline void keep_standard_streams() {
    for (int fd : {0, 1, 2})
        if (fcntl(fd, F_GETFD) == -1 && open("/dev/null", O_RDWR) != fd)
            fail("cannot open /dev/null: %s", strerror(errno));
}

int main(int argc, char** argv) {
    signal(SIGXFSZ, SIG_IGN);  // a write past the limit of file sizes (ulimit -f) then fails, and says so
    end_on_unreadable_files();
    try {
        keep_standard_streams();
        const Options options = parse_flags(argc, argv);
        if (options.help || options.version || options.print_plan) {
            print_what_is_asked(options);
            // No destructors: OpenBLAS's waits for its threads, which under a memory limit (ulimit -v) never start.
            _exit(0);
        }
        if (options.generate > 0 && world.size > 1)
            usage_fail("--generate runs as one process, and mpirun or srun has started %d: leave it out", world.size);
        start_ranks(argv, options.gpus, options.rank_timeout, [&] { use_cuda(options, options.gpus); });
        require_same(program_and_flags(options));
#ifdef __CUDACC__
        const bool cuda = use_cuda(options);
        bool first_rank = cuda;
        broadcast_host(&first_rank, sizeof first_rank);
        if (cuda != first_rank)
            fail("rank 0 uses a %s and this rank a %s: give every machine a GPU that works, or pass --device cpu",
                 first_rank ? "GPU" : "CPU", cuda ? "GPU" : "CPU");
        portable_kernels = options.kernels == "portable";
        const int exit_code = cuda ? run_program<Cuda>(options) : run_program<Cpu>(options);
#else
        use_cuda(options);
        const int exit_code = run_program<Cpu>(options);
#endif
        stop_ranks();
        return exit_code;
    } catch (const Error& error) {
        fail_ranks(error.what(), error.exit_code);
    } catch (const std::bad_alloc&) {
        fail_ranks("out of host memory: choose a smaller --batch or a smaller model", 1);
    } catch (const std::system_error& error) {
        fail_ranks(strprintf("cannot start a thread: %s: is there a limit (ulimit -u, -v)?", error.what()).c_str(), 1);
    } catch (const std::exception& error) {
        fail_ranks(strprintf("unexpected: %s", error.what()).c_str(), 1);
    }
}

#endif
