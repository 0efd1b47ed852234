// backend.h: the seam. Every operation that the program (train_gpt.cu, dmuon.cuh) asks of a backend stands here once,
// with types, shapes and what it computes. Two structs have them all: Cuda (cuda_backend.cuh) and Cpu (cpu_backend.h),
// each ends with static_assert(is_backend<...>()). A backend that lacks an operation, or has it with other types, does
// not compile, and the error quotes the line below.
//
// Letters: B sequences of T positions, N = B T rows, C channels, H heads of hd = C/H, V vocabulary, Vp the same padded,
// OC output channels, L layers; n elements. Tensors are row-major and contiguous unless a row stride (ld) is given.
// `+=` adds to what is there, everything else is overwritten. Pointers are device memory (host memory for Cpu) unless
// named host. Parameters and activations are `real`: bf16 or float for Cuda, float for Cpu. Every sum is taken in fp32
// or better, rounded once at the store, in an order that depends on the shapes alone.
//
// Cuda's operations are enqueued on one stream and return at once; Cpu's have finished when they return.
#pragma once
#include <functional>
#include <string>
#include <type_traits>

#include "common.h"

struct World;  // ranks.h
class Ticket;  // comm.h

template <class Function>
using FunctionPointer = Function*;
template <class Class, class Function>
using MethodPointer = Function Class::*;

#define OPERATION(name, ...)                                          \
    {                                                                 \
        constexpr FunctionPointer<__VA_ARGS__> name = &Backend::name; \
        (void)name;                                                   \
    }
#define METHOD(type, name, ...)                                        \
    {                                                                  \
        constexpr MethodPointer<type, __VA_ARGS__> name = &type::name; \
        (void)name;                                                    \
    }

// clang-format off
template <class Backend>
constexpr bool is_backend() {
    using real = typename Backend::real;

    // The rank's device: from start to stop, which enclose all else. Failures end in fail(), see common.h.
    OPERATION(start, void(const World& world));
    OPERATION(stop, void());
    static_assert(std::is_same<decltype(Backend::kBackendName), const char* const>::value, "kBackendName");
    OPERATION(device_name, std::string());
    OPERATION(kernels_name, std::string());  // which kernels attention and Newton-Schulz run on
    OPERATION(peak_flops, double());        // FLOP/s of dense products in `real`, 0 if unknown
    OPERATION(memory_available, size_t());  // bytes that this rank can still allocate
    OPERATION(synchronize, void());         // waits until the device has done all that was enqueued

    // Memory: 256-byte aligned, filled with zeros, never freed. alloc_host's is the host's, pinned.
    OPERATION(alloc, void*(size_t bytes, const char* what));
    OPERATION(alloc_host, void*(size_t bytes));
    OPERATION(upload, void(void* dst, const void* host, size_t bytes));    // `host` stays as it is until that is done
    OPERATION(download, void(void* host, const void* src, size_t bytes));  // there when that is done
    OPERATION(copy, void(void* dst, const void* src, size_t bytes));
    OPERATION(zero, void(void* dst, size_t bytes));

    // A point in the order of the work.
    using Event = typename Backend::Event;
    static_assert(std::is_default_constructible<Event>::value, "Event()");
    METHOD(Event, record, void());
    METHOD(Event, record_beside, void());  // in the order of the collectives, after all that is enqueued so far
    METHOD(Event, done, bool() const);  // whether the device has passed it; asking does not wait
    // milliseconds of the device from a to b
    constexpr FunctionPointer<float(const Event& a, const Event& b)> ms = &Event::ms;
    (void)ms;
    // run(work): work is enqueued, always the same and with the same pointers; from the second time on as one graph. What
    // `work` does to the host's memory happens in the first two calls alone. Not for collectives.
    using Graph = typename Backend::Graph;
    static_assert(std::is_default_constructible<Graph>::value, "Graph()");
    METHOD(Graph, run, void(const std::function<void()>& work));
    // What is enqueued while it lives bears its name in NVIDIA's profilers, with a number unless that is -1.
    static_assert(std::is_constructible<typename Backend::Range, const char* /*name*/, int /*number*/>::value,
                  "Range(name, number)");

    // Collectives, over all ranks; every rank calls the same ones in the same order. They run beside what is enqueued
    // after them, until wait(ticket). While an EnqueueDeadline lives, enqueueing that blocks because a rank is lost ends
    // the run.
    OPERATION(reduce_scatter, Ticket(float* chunks /*(ranks,chunk)*/, size_t chunk));  // row r of rank r = sum of rows r
    OPERATION(all_gather, Ticket(real* chunks /*(ranks,chunk)*/, size_t chunk));       // row r = row r of rank r
    OPERATION(all_reduce, Ticket(float* x /*(n)*/, size_t n));                         // x = sum, on all the same bits
    OPERATION(all_reduce, Ticket(double* x /*(n)*/, size_t n));
    OPERATION(broadcast, Ticket(void* x, size_t bytes, int root));
    OPERATION(wait, void(Ticket ticket));
    static_assert(std::is_default_constructible<typename Backend::EnqueueDeadline>::value, "EnqueueDeadline()");

    // ---- The model, in the order of a forward pass

    // out = wte[token] + wpe[position]
    OPERATION(embedding_forward, void(real* out /*(B,T,C)*/, const int* tokens /*(B,T)*/, const real* wte /*(Vp,C)*/,
                                      const real* wpe /*(maxT,C)*/, int B, int T, int C));
    // order: the positions 0..N-1 sorted by their token, earlier first
    OPERATION(embedding_backward, void(float* dwte /*(Vp,C) +=*/, float* dwpe /*(maxT,C) +=*/,
                                       const real* dout /*(B,T,C)*/, const int* tokens /*(B,T)*/,
                                       const int* order /*(N)*/, int B, int T, int C));

    // out = (x - mean) * rstd * weight + bias in each row, rstd = 1 / sqrt(variance + kLayerNormEpsilon)
    OPERATION(layernorm_forward, void(real* out /*(N,C)*/, float* mean /*(N)*/, float* rstd /*(N)*/,
                                      const real* x /*(N,C)*/, const real* weight /*(C)*/, const real* bias /*(C)*/,
                                      int N, int C));
    // residual = a + b, rounded to real; out = LayerNorm(residual)
    OPERATION(residual_layernorm_forward, void(real* residual /*(N,C)*/, real* out /*(N,C)*/, float* mean /*(N)*/,
                                               float* rstd /*(N)*/, const real* a /*(N,C)*/, const real* b /*(N,C)*/,
                                               const real* weight /*(C)*/, const real* bias /*(C)*/, int N, int C));
    OPERATION(layernorm_scratch_floats, size_t(int C));
    // dx = before + the gradient of x; dsum += the sum of dx's rows: the bias gradient of the product whose output was
    // added to the residual stream there
    OPERATION(layernorm_backward, void(real* dx /*(N,C)*/, float* dweight /*(C) +=*/, float* dbias /*(C) +=*/,
                                       float* dsum /*(C) +=, or null*/,
                                       const real* before /*(N,C), may be dx; null: zeros*/, const real* dout /*(N,C)*/, const real* x /*(N,C)*/, const real* weight /*(C)*/,
                                       const float* mean /*(N)*/, const float* rstd /*(N)*/, int N, int C,
                                       float* scratch /*(layernorm_scratch_floats(C))*/));

    // out = inp weight^T + bias; weight as in PyTorch's Linear
    OPERATION(matmul_forward, void(real* out /*(N,OC), row stride ldo*/, int ldo, const real* inp /*(N,C)*/,
                                   const real* weight /*(OC,C)*/, const real* bias /*(OC) or null*/, int N, int C,
                                   int OC));
    // dinp = dout weight
    OPERATION(matmul_backward_input, void(real* dinp /*(N,C)*/, const real* dout /*(N,OC)*/,
                                          const real* weight /*(OC,C)*/, int N, int C, int OC));
    // dweight = dout^T inp, or += with accumulate
    OPERATION(matmul_backward_weight, void(float* dweight /*(OC,C)*/, const real* dout /*(N,OC), row stride ldo*/,
                                           int ldo, const real* inp /*(N,C)*/, int N, int C, int OC, bool accumulate));
    // The products beside a GELU. pre = inp weight^T + bias, out = gelu(pre); dpre = (dout weight) * gelu'(pre)
    OPERATION(matmul_gelu_forward, void(real* out /*(N,OC)*/, real* pre /*(N,OC)*/, const real* inp /*(N,C)*/,
                                        const real* weight /*(OC,C)*/, const real* bias /*(OC)*/, int N, int C, int OC));
    OPERATION(matmul_backward_input_gelu, void(real* dpre /*(N,C)*/, const real* dout /*(N,OC)*/,
                                               const real* weight /*(OC,C)*/, const real* pre /*(N,C)*/, int N, int C,
                                               int OC));
    // Runs micro_step (forward, loss, backward, on whatever the batch's memory holds) and takes for each product in it
    // the algorithm that is fastest here, the same on all ranks
    OPERATION(tune, void(const std::function<void()>& micro_step));
    // dbias += the sum of dout's rows
    OPERATION(bias_scratch_floats, size_t(int OC));
    OPERATION(bias_backward, void(float* dbias /*(OC) +=*/, const real* dout /*(N,OC)*/, int N, int OC,
                                  float* scratch /*(bias_scratch_floats(OC))*/));

    // Causal, per head: P = softmax(Q K^T / sqrt(hd)), out = P V; lse: the logarithm of each row's sum of exponentials
    OPERATION(attention_forward, void(real* out /*(B,T,C)*/, float* lse /*(B,H,T)*/,
                                      const real* qkv /*(B,T,3C): q|k|v, head h at columns h hd*/, int B, int T, int C,
                                      int H));
    OPERATION(attention_scratch_floats, size_t(int B, int T, int C, int H));
    // dbias += the sum of dqkv's rows, as in bias_backward
    OPERATION(attention_backward, void(real* dqkv /*(B,T,3C)*/, float* dbias /*(3C) +=*/,
                                       float* delta /*(B,H,T) scratch*/, const real* dout /*(B,T,C)*/,
                                       const real* qkv /*(B,T,3C)*/, const real* out /*(B,T,C)*/,
                                       const float* lse /*(B,H,T)*/, int B, int T, int C, int H,
                                       float* scratch /*(attention_scratch_floats(B,T,C,H))*/));
    // The last row of that for one sequence: one query against T keys, what generation asks for token by token
    OPERATION(attention_last_row, void(real* out /*(C)*/, const real* qkv /*(T,3C)*/, int T, int C, int H));

    // The formulas: common.h
    OPERATION(gelu_forward, void(real* out /*(n)*/, const real* x /*(n)*/, size_t n));
    OPERATION(gelu_backward, void(real* dx /*(n), may be dout*/, const real* dout /*(n)*/, const real* x /*(n)*/,
                                  size_t n));

    // losses = -log softmax(logits[:, :V])[target]; with write_dlogits the logits become (softmax - onehot) dloss, and 0
    // in the padding
    OPERATION(classifier, void(float* losses /*(N)*/, real* logits /*(N,Vp)*/, const int* targets /*(N)*/, float dloss,
                               int N, int V, int Vp, bool write_dlogits));
    OPERATION(sum_losses, void(double* sum /*(1) +=*/, const float* losses /*(n)*/, int n));

    // ---- The optimizer. clip (4) is the scale of every gradient, where it is 0 the updates change nothing; the norm; and
    // AdamW's bias corrections 1 - beta1^t and 1 - beta2^t. Its t is the number of updates that were not skipped, which
    // only the device knows.

    // of each block squares = g.g, or 0 where it does not count, and of Muon's dots = g.momentum, momentum.momentum
    OPERATION(norm_sums, void(double* squares /*(n)*/, double* dots /*(n,2)*/, const float* grads,
                              const float* momentum, const NormBlock* blocks /*(n)*/, int n));
    // norm = sqrt(sum of squares); scale = 0 if that is not finite, else min(1, max_norm / norm), or 1 without a max_norm;
    // t += 1 and the corrections follow unless the scale is 0
    OPERATION(clip_scale, void(float* clip /*(4)*/, int64_t* t /*(1)*/, const double* squares /*(n)*/, int n,
                               float max_norm, double beta1, double beta2));
    // g = scale grads; m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2;
    // master = (1 - lr weight_decay) master - lr (m / clip[2]) / (sqrt(v / clip[3]) + eps); params = master
    OPERATION(adamw, void(real* params /*(n)*/, float* master /*(n)*/, float* m /*(n)*/, float* v /*(n)*/,
                          const float* grads /*(n)*/, size_t n, float lr, float beta1, float beta2, float eps,
                          float weight_decay, const float* clip /*(4)*/));
    OPERATION(cast_params, void(real* params /*(n)*/, const float* master /*(n)*/, size_t n));

    // Newton-Schulz (dmuon.cuh) on `count` matrices that refs describes: lying down all are (m, n), m <= n. Iterates
    // are of type `type` and padded with zeros to multiples of 8: (mp, np). The bits of a matrix do not depend on the
    // matrices beside it. With g = scale grads and mu: momentum' = mu momentum + g, and what is orthogonalised is
    // x = momentum', or under Nesterov g + mu momentum'.

    // 1 / |x|, from the sums of its blocks; |x|^2 at least kLeastNormSquared of its positive terms; 0 where x is 0
    OPERATION(muon_inverse_norms, void(float* inverse_norms /*(count)*/, const double* squares /*(n)*/,
                                       const double* dots /*(n,2)*/, const MatrixRef* refs /*(count)*/, int count,
                                       float mu, bool nesterov, const float* clip /*(4)*/));
    // momentum = momentum', X = x inverse_norm, rounded once
    OPERATION(muon_momentum, void(void* X /*(count,mp,np)*/, float* momentum, const float* grads,
                                  const MatrixRef* refs /*(count)*/, const float* inverse_norms /*(count)*/, int count,
                                  int m, int n, float mu, bool nesterov, NsType type, const float* clip /*(4)*/));
    // The products that are called while an NsChain lives, all of the same `count` matrices, may run as one launch when
    // it ends. counters: ns_chain_counters(count).
    static_assert(std::is_constructible<typename Backend::NsChain, int /*count*/, NsType, int* /*counters*/>::value,
                  "NsChain(count, type, counters)");
    // D = alpha A op(B) + beta C + diag I, one rounding at the store; M, N, K multiples of 8, K = 0 is no product.
    // symmetric_nt: op(B) = B^T, B (count,N,K), M = N, and D and C are symmetric. nn: op(B) = B (count,K,N), diag = 0.
    OPERATION(ns_product, void(void* D /*(count,M,N)*/, const void* A /*(count,M,K)*/, const void* B,
                               const void* C /*(count,M,N) or null*/, float alpha, float beta, float diag, int count,
                               int M, int N, int K, NsProduct kind, NsType type));
    // master = decay master - lr ref.scale U, U standing up again where ref.tall; params = master
    OPERATION(muon_update, void(real* params, float* master, const void* U /*(count,mp,np)*/,
                                const MatrixRef* refs /*(count)*/, int count, int m, int n, float decay /*1 - lr wd*/,
                                float lr, NsType type, const float* clip /*(4)*/));
    return true;
}
// clang-format on

#undef OPERATION
#undef METHOD
