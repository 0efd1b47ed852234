#!/usr/bin/env python3
"""Writes golden.bin: what PyTorch computes, for test_golden.cpp to compare with. Needs torch >= 2.9, for its Muon.

    python make_golden.py [golden.bin]

1. A tiny GPT-2 of odd sizes, in double precision from weights that fp32 holds exactly: logits, loss, every gradient.
2. Ten AdamW steps of it: two micro-steps each, clipping, weight decay on 2-D tensors; losses, norms, final weights.
3. Two Muon steps on a few matrices: by the formula in double precision, and by torch.optim.Muon. Then by the formula alone
   with the other polynomials, and on a matrix of Q, K and V that is orthogonalised in three, as one, or head by head.

The file is a row of records: a line "name type d0 d1 ...\n" (type f32 or i32), then the values, little-endian.
"""
import math
import sys

import torch
import torch.nn.functional as F

torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
torch.manual_seed(1337)

V, T, C, L, H, B = 61, 13, 24, 2, 3, 4  # vocabulary, positions, channels, layers, heads, batch

records = []


def record(name, tensor):
    tensor = tensor.detach()
    integer = not tensor.dtype.is_floating_point
    values = tensor.to(torch.int32 if integer else torch.float32).contiguous()
    shape = " ".join(str(d) for d in values.shape)
    records.append(f"{name} {'i32' if integer else 'f32'} {shape}\n".encode() + values.numpy().tobytes())


def random(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).float().double()


# The weights are larger than GPT-2's at the start of training, so that every gradient matters: with its N(0, 0.02)
# attention would be flat.
def make_weights():
    w = {"wte.weight": random(V, C, scale=0.3), "wpe.weight": random(T, C, scale=0.3)}

    def linear(name, outputs, inputs):
        w[name + ".weight"] = random(outputs, inputs, scale=0.2)
        w[name + ".bias"] = random(outputs, scale=0.1)

    def layernorm(name):
        w[name + ".weight"] = (1 + random(C, scale=0.2)).float().double()
        w[name + ".bias"] = random(C, scale=0.1)

    for l in range(L):
        layernorm(f"h.{l}.ln_1")
        linear(f"h.{l}.attn.c_attn", 3 * C, C)
        linear(f"h.{l}.attn.c_proj", C, C)
        layernorm(f"h.{l}.ln_2")
        linear(f"h.{l}.mlp.c_fc", 4 * C, C)
        linear(f"h.{l}.mlp.c_proj", C, 4 * C)
    layernorm("ln_f")
    return w


def gpt2(w, tokens):
    """(B,T) tokens -> (B,T,V) logits"""

    def linear(x, name):
        return F.linear(x, w[name + ".weight"], w[name + ".bias"])

    def layernorm(x, name):
        return F.layer_norm(x, (C,), w[name + ".weight"], w[name + ".bias"], eps=1e-5)

    batch, length = tokens.shape
    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    for l in range(L):
        h = f"h.{l}."
        q, k, v = linear(layernorm(x, h + "ln_1"), h + "attn.c_attn").split(C, dim=2)
        q, k, v = (t.view(batch, length, H, C // H).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(2, 3)) / math.sqrt(C // H)
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        y = (scores.softmax(dim=3) @ v).transpose(1, 2).reshape(batch, length, C)
        x = x + linear(y, h + "attn.c_proj")
        x = x + linear(F.gelu(linear(layernorm(x, h + "ln_2"), h + "mlp.c_fc"), approximate="tanh"), h + "mlp.c_proj")
    return layernorm(x, "ln_f") @ w["wte.weight"].T


def mean_loss(logits, targets):
    return F.cross_entropy(logits.reshape(-1, V), targets.reshape(-1))


record("sizes", torch.tensor([V, T, C, L, H, B]))
weights = {name: value.requires_grad_() for name, value in make_weights().items()}
for name, value in weights.items():
    record("weight/" + name, value)

# 1. One forward and backward
windows = torch.randint(0, V, (B, T + 1))
logits = gpt2(weights, windows[:, :-1])
loss = mean_loss(logits, windows[:, 1:])
loss.backward()
record("tokens", windows)
record("logits", logits)
record("loss", loss.reshape(1))
for name, value in weights.items():
    record("grad/" + name, value.grad)

# 2. AdamW. The clip norm bites in most steps but not in all; a warm-up and a fall move the learning rate.
STEPS, MICRO, CLIP, DECAY, BETAS = 10, 2, 2.1, 0.1, (0.9, 0.95)
rates = torch.tensor([1e-3 * min(1.0, (s + 1) / 4) * (1 - s / 20) for s in range(STEPS)]).float().double()
matrices = [p for p in weights.values() if p.ndim == 2]
vectors = [p for p in weights.values() if p.ndim == 1]
adamw = torch.optim.AdamW(
    [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}], betas=BETAS, eps=1e-8
)
windows = torch.randint(0, V, (STEPS, MICRO, B, T + 1))
losses, norms = [], []
for step in range(STEPS):
    adamw.zero_grad()
    total = 0.0
    for micro in range(MICRO):
        batch = windows[step, micro]
        loss = mean_loss(gpt2(weights, batch[:, :-1]), batch[:, 1:]) / MICRO
        loss.backward()
        total += loss.item()
    norm = torch.nn.utils.clip_grad_norm_(weights.values(), CLIP)
    for group in adamw.param_groups:
        group["lr"] = rates[step].item()
    adamw.step()
    losses.append(total)
    norms.append(norm.item())
assert min(norms) < CLIP < max(norms), norms
record("adamw/tokens", windows)
record("adamw/settings", torch.tensor([CLIP, DECAY, *BETAS]))
record("adamw/lr", rates)
record("adamw/loss", torch.tensor(losses))
record("adamw/norm", torch.tensor(norms))
for name, value in weights.items():
    record("adamw/weight/" + name, value)

# 3. Muon: matrices of odd sizes, gradients with a decaying spectrum, two steps, so that the momentum counts
LR, MOMENTUM, MUON_DECAY = 0.02, 0.95, 0.1
record("muon/settings", torch.tensor([LR, MOMENTUM, MUON_DECAY]))


# Keller Jordan's, the same at each step; You Jiacheng's; Polar Express (arXiv 2505.16932, table of the appendix), whose p(x)
# becomes p(x / 1.05), so that rounding cannot push a singular value out of where the polynomials are good.
POLYNOMIALS = {
    "keller": [(3.4445, -4.7750, 2.0315)] * 5,
    "you": [(4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012)],
    "polar_express": [(a / 1.05, b / 1.05**3, c / 1.05**5) for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933), (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137), (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673))],
}


def newton_schulz(x, polynomials="keller"):
    x = x / x.norm()
    for a, b, c in POLYNOMIALS[polynomials]:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


for i, (rows, cols) in enumerate([(24, 24), (13, 29), (41, 7), (33, 96)]):
    start = random(rows, cols, scale=0.1)
    short = min(rows, cols)
    spectrum = torch.diag(1e-3 / torch.arange(1, short + 1))
    grads = [(random(rows, short) @ spectrum @ random(short, cols)).float().double() for _ in range(2)]
    record(f"muon/{i}/start", start)
    for step, grad in enumerate(grads):
        record(f"muon/{i}/grad{step}", grad)
    for scale in ("keller", "moonlight"):
        factor = math.sqrt(max(1, rows / cols)) if scale == "keller" else 0.2 * math.sqrt(max(rows, cols))
        w, momentum = start.clone(), torch.zeros(rows, cols)
        for grad in grads:
            momentum = MOMENTUM * momentum + grad
            w = w * (1 - LR * MUON_DECAY) - LR * factor * newton_schulz(grad + MOMENTUM * momentum)
        record(f"muon/{i}/formula/{scale}", w)

        # PyTorch's own: bf16, and cast before the norm is taken
        parameter = torch.nn.Parameter(start.float())
        muon = torch.optim.Muon(
            [parameter],
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=MUON_DECAY,
            nesterov=True,
            adjust_lr_fn="original" if scale == "keller" else "match_rms_adamw",
        )
        for grad in grads:
            parameter.grad = grad.float()
            muon.step()
        record(f"muon/{i}/torch/{scale}", parameter)
        difference = (parameter.double() - w).norm() / (w - start).norm()
        print(f"muon {rows}x{cols} {scale}: torch.optim.Muon is {difference:.4f} of the update from the formula")

# The same matrices with the other polynomials, and (3C, C) of Q, K and V in C/8 heads of 8 rows each
CHANNELS, HEAD = 16, 8
start = random(3 * CHANNELS, CHANNELS, scale=0.1)
spectrum = torch.diag(1e-3 / torch.arange(1, CHANNELS + 1))
grads = [(random(3 * CHANNELS, CHANNELS) @ spectrum @ random(CHANNELS, CHANNELS)).float().double() for _ in range(2)]
record("muon/qkv/start", start)
for step, grad in enumerate(grads):
    record(f"muon/qkv/grad{step}", grad)


def of_record(name):  # as the test reads it, in fp32
    header, values = next(r.split(b"\n", 1) for r in records if r.startswith(name.encode() + b" "))
    shape = [int(d) for d in header.split()[2:]]
    return torch.frombuffer(bytearray(values), dtype=torch.float32).reshape(shape).double()


for matrix, parts in [(str(i), {"split": 1}) for i in range(4)] + [("qkv", {"split": 3, "fused": 1, "heads": 3 * CHANNELS // HEAD})]:
    start, grads = of_record(f"muon/{matrix}/start"), [of_record(f"muon/{matrix}/grad{step}") for step in range(2)]
    for mode, pieces in parts.items():
        for polynomials in POLYNOMIALS:
            for scale in ("keller", "moonlight"):
                w, momentum = start.clone(), torch.zeros_like(start)
                for grad in grads:
                    momentum = MOMENTUM * momentum + grad
                    updates = []
                    for x in (grad + MOMENTUM * momentum).chunk(pieces):
                        rows, cols = x.shape
                        factor = math.sqrt(max(1, rows / cols)) if scale == "keller" else 0.2 * math.sqrt(max(rows, cols))
                        updates.append(factor * newton_schulz(x, polynomials))
                    w = w * (1 - LR * MUON_DECAY) - LR * torch.cat(updates)
                record(f"muon/{matrix}/{mode}/{polynomials}/{scale}", w)

path = sys.argv[1] if len(sys.argv) > 1 else "golden.bin"
with open(path, "wb") as file:
    file.write(b"".join(records))
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, norms {min(norms):.2f}..{max(norms):.2f}")
print(f"wrote {path}: {len(records)} records, {sum(map(len, records))} bytes")
