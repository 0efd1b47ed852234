#!/usr/bin/env python3
"""The peer: the same training in PyTorch, beside ./train_gpt on the same machine in the same run.

    python3 dev/peer_pytorch.py [--model d12] [--batch 32] [--only step|optimizer] [--repeats 20] [--compile whole|blocks]   how fast
    python3 dev/peer_pytorch.py --data DIR [--model d12] [--batch 32] [--steps 600]   what loss: on train_*.bin and val_*.bin

Prints one JSON line per measurement. How fast: tokens per second of GPT-2 with torch.compile, flash attention (SDPA) and fused
AdamW in bf16, and milliseconds of the optimizer step alone: fused AdamW, Muon one matrix after the other, and Muon with all
matrices of a shape in one batch under torch.compile (Newton-Schulz: five bf16 steps with Polar Express coefficients). --compile
blocks compiles one block, which all layers share, and the head, instead of the whole model: its time does not grow with the layers,
and the step is somewhat slower. What was compiled is kept in build/torch_cache for the next start.
What loss: the validation loss after training with AdamW and with Muon, fp32 weights under bf16 autocast, with the settings of
`scripts/gpu_check.sh train`; windows and their order are drawn anew, so it is another run of the same experiment. There PyTorch keeps
the residual stream and its gradient in fp32; --stream rounds one or both to bf16, as this program has them (precision_gap.py).
"""
import argparse
import glob
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).resolve().parent.parent / "build" / "torch_cache"))

import numpy as np
import torch
import torch.nn.functional as F

SIZES = {"d6": (6, 6, 384), "d12": (12, 12, 768), "d24": (24, 16, 1024), "d36": (36, 20, 1280), "d48": (48, 25, 1600)}
POLAR_EXPRESS = [(8.28721201814563, -23.595886519098837, 17.300387312530933),
                 (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                 (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                 (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                 (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]
POLAR_EXPRESS = [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in POLAR_EXPRESS]


STREAMS = {"fp32": (False, False), "bf16_forward": (True, False), "bf16_backward": (False, True), "bf16": (True, True)}


def to_bf16(x):
    """fp32 rounded to bf16, ties to even, as fp32. Written with the bits: a compiler may take a cast there and back for nothing."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).view(torch.float32)


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(context, x, forward, backward):
        context.backward_too = backward
        return to_bf16(x) if forward else x.clone()

    @staticmethod
    def backward(context, gradient):
        return to_bf16(gradient) if context.backward_too else gradient, None, None


class Block(torch.nn.Module):
    def __init__(self, channels, heads, stream):
        super().__init__()
        self.heads, self.stream = heads, stream
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(channels), torch.nn.LayerNorm(channels)
        self.qkv, self.proj = torch.nn.Linear(channels, 3 * channels), torch.nn.Linear(channels, channels)
        self.fc, self.fc_proj = torch.nn.Linear(channels, 4 * channels), torch.nn.Linear(4 * channels, channels)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(C, dim=2))
        attention = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.stream(x + self.proj(attention.transpose(1, 2).reshape(B, T, C)))
        return self.stream(x + self.fc_proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh")))


class GPT(torch.nn.Module):
    def __init__(self, layers, heads, channels, stream="fp32", vocab=50304, length=1024):
        super().__init__()
        forward, backward = STREAMS[stream]
        self.stream = (lambda x: Rounded.apply(x, forward, backward)) if forward or backward else lambda x: x
        self.wte, self.wpe = torch.nn.Embedding(vocab, channels), torch.nn.Embedding(length, channels)
        self.blocks = torch.nn.ModuleList(Block(channels, heads, self.stream) for _ in range(layers))
        self.ln_f = torch.nn.LayerNorm(channels)

    def forward(self, tokens, targets):
        x = self.stream(self.wte(tokens) + self.wpe.weight[: tokens.shape[1]])
        for block in self.blocks:
            x = block(x)
        return self.head(x, targets)

    def head(self, x, targets):
        logits = F.linear(self.ln_f(x), self.wte.weight)
        return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))


def compiled_model(model, args):
    if args.compile == "whole":
        return torch.compile(model)
    for block in model.blocks:
        block.compile()
    model.head = torch.compile(model.head)
    return model


def orthogonalise(x):  # (..., m, n), m <= n
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-30)
    x = x.bfloat16()
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon_update(weight, grad, momentum, lr):  # each (..., rows, cols) but lr, a tensor of one element
    momentum.mul_(0.95).add_(grad)
    x = grad + 0.95 * momentum
    tall = x.shape[-2] > x.shape[-1]
    u = orthogonalise(x.mT if tall else x)
    weight.mul_(1 - 0.1 * lr).sub_((u.mT if tall else u) * (lr * 0.2 * math.sqrt(max(x.shape[-2:]))))


def median_ms(function, repeats=20):
    for _ in range(5):
        function()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def say(args, what, value, unit):
    print(json.dumps({"peer": f"PyTorch {torch.__version__}", "model": args.model, "what": what, unit: round(value, 3)}), flush=True)


def measure_optimizers(args):
    layers, _, channels = SIZES[args.model]
    lr = torch.tensor(1e-3, device="cuda")

    # The optimizer step alone, on fp32 weights and gradients of the hidden matrices with Q, K and V apart (Muon's) or of all (AdamW's)
    squares, wide = (4 * layers, channels, channels), (2 * layers, channels, 4 * channels)
    stacks = [[torch.randn(shape, device="cuda") * 0.02 for _ in range(3)] for shape in (squares, wide)]

    def one_by_one():
        for weights, grads, momenta in stacks:
            for w, g, m in zip(weights, grads, momenta):
                muon_update(w, g, m, lr)

    compiled = torch.compile(muon_update)

    def batched():
        for stack in stacks:
            compiled(*stack, lr)

    say(args, "Muon, one matrix after the other", median_ms(one_by_one, 10), "optimizer_ms")
    say(args, "Muon, batched by shape, compiled", median_ms(batched), "optimizer_ms")


def measure_step(args):
    layers, heads, channels = SIZES[args.model]
    model = GPT(layers, heads, channels).cuda().bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(0, 50257, (args.batch, 1025), device="cuda")
    forward = compiled_model(model, args)

    def step():
        forward(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    begin = time.time()
    step()
    torch.cuda.synchronize()
    say(args, f"first step, with compilation of {args.compile}", time.time() - begin, "s")
    ms = median_ms(step, args.repeats)
    say(args, f"training step, B={args.batch} T=1024", args.batch * 1024 / ms * 1e3, "tokens_per_s")
    say(args, "AdamW, fused (bf16 weights without fp32 masters)", median_ms(optimizer.step), "optimizer_ms")


# --- What loss --------------------------------------------------------------------------------------------------------


def windows(pattern):  # (windows, 1025) of the shards: llm.c's format
    shards = [np.fromfile(path, dtype=np.uint16, offset=1024) for path in sorted(glob.glob(pattern))]
    starts = [np.arange(0, len(shard) - 1024, 1024) for shard in shards]
    return torch.from_numpy(np.concatenate([shard[start[:, None] + np.arange(1025)] for shard, start in zip(shards, starts)])
                            .astype(np.int32))


def gpt2_init(model, layers):
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            std = 0.02 / math.sqrt(2 * layers) if name.endswith("proj.weight") else 0.02
            torch.nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)


def stack_hidden(model):
    """Moves the hidden matrices and their gradients into one stack per shape: [(weights, grads, momenta)]; Q, K and V apart."""
    stacks = []
    for names, parts in ((("qkv", "proj"), (3, 1)), (("fc",), (1,)), (("fc_proj",), (1,))):
        modules = [[getattr(block, name) for name in names] for block in model.blocks]
        weights = torch.cat([m.weight.data.view(part, -1, m.in_features) for ms in modules for m, part in zip(ms, parts)])
        stack = weights, torch.zeros_like(weights), torch.zeros_like(weights)
        at = 0
        for ms in modules:
            for m, part in zip(ms, parts):
                shape = m.weight.shape
                m.weight.data = weights[at:at + part].view(shape)
                m.weight.grad = stack[1][at:at + part].view(shape)
                at += part
        stacks.append(stack)
    return stacks


def final_loss(args, muon):
    layers, heads, channels = SIZES[args.model]
    peak = 2.4e-3 if muon else 1.2e-3
    torch._dynamo.reset()  # else the ninth model in one process is no longer compiled
    torch.manual_seed(args.seed)
    model = GPT(layers, heads, channels, args.stream).to(args.device)
    gpt2_init(model, layers)
    stacks = stack_hidden(model) if muon else []
    hidden = {id(p) for block in model.blocks for p in block.parameters() if p.dim() == 2} if muon else set()
    rest = [p for p in model.parameters() if id(p) not in hidden]
    optimizer = torch.optim.AdamW([{"params": [p for p in rest if p.dim() == 2], "weight_decay": 0.1},
                                   {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0}],
                                  betas=(0.9, 0.95), fused=True)
    update = torch.compile(muon_update)
    forward = compiled_model(model, args)

    def loss_of(batch):
        batch = batch.to(args.device).long()
        with torch.autocast(args.device, torch.bfloat16):
            return forward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())

    train, val = windows(args.data + "/train_*.bin"), windows(args.data + "/val_*.bin")
    per_epoch = len(train) // args.batch
    lr = torch.zeros((), device=args.device)
    for step in range(args.steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(train))
        at = step % per_epoch * args.batch
        loss_of(train[order[at:at + args.batch]]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min((step + 1) / max(1, args.steps // 10), max(0.02, 1 - 0.98 * max(0, (step + 1) / args.steps - 0.4) / 0.6))
        lr.fill_(peak * share)
        for group in optimizer.param_groups:
            group["lr"] = peak * share
        for stack in stacks:
            update(*stack, lr)
        optimizer.step()
        model.zero_grad(set_to_none=False)  # the gradients stay in their stacks
    with torch.no_grad():
        batches = [loss_of(val[at:at + args.batch]).item() for at in range(0, len(val) - args.batch + 1, args.batch)]
    return sum(batches) / len(batches)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="d12", choices=SIZES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--data", help="directory with shards of GPT-2 tokens; without it speed is measured")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), help="what loss: of the two just this")
    parser.add_argument("--stream", choices=STREAMS, default="fp32", help="what loss: the residual stream, its gradient, or both")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", default="cuda", help="what loss: cpu for a look")
    parser.add_argument("--only", choices=("step", "optimizer"), help="how fast: of the two just this")
    parser.add_argument("--repeats", type=int, default=20, help="how fast: timed steps")
    parser.add_argument("--compile", choices=("whole", "blocks"), default="whole")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if not args.data:
        if args.only != "step":
            measure_optimizers(args)
        if args.only != "optimizer":
            measure_step(args)
        return
    for name, muon in (("AdamW", False), ("Muon, batched by shape", True)):
        if args.optimizer == ("adamw" if muon else "muon"):
            continue
        say(args, f"{name}: validation loss after {args.steps} steps", final_loss(args, muon), "val_loss")


if __name__ == "__main__":
    main()
