#!/usr/bin/env python3
"""Tests of the distributed trainer with real processes: test_ranks.py TRAIN_GPT [cpu|cuda [NAME...]]

cpu (the default): 1 to 5 ranks under mpirun. cuda: as many ranks as GPUs, under mpirun and under --gpus.
NAMEs choose some of the tests.
A tiny byte-level model learns this program's own source text. Python's standard library only.
Prints `ok NAME` or `FAIL NAME: why` for each test and ends with `N passed, N failed, N skipped`.
"""
import glob
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time

PROGRAM = os.path.abspath(sys.argv[1] if len(sys.argv) > 1 else "./train_gpt")
DEVICE = sys.argv[2] if len(sys.argv) > 2 else "cpu"
HERE = os.path.dirname(os.path.abspath(__file__))
WORK = tempfile.mkdtemp(prefix="test_ranks_")
ENV = dict(os.environ, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")  # the ranks share few cores

if DEVICE == "cuda":
    listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True).stdout
    RANKS = range(1, min(5, listed.count("GPU ")) + 1)
    CHANNELS = 128
else:
    RANKS = range(1, 6)
    CHANNELS = 32
MANY = RANKS[-1]
MATRICES = 12  # of 2 layers: Q, K, V, attention projection, fc, fc projection

SEQ_LEN = 32
SEQUENCES = 120  # per optimizer step: a multiple of 1, 2, 3, 4 and 5 ranks x 2 sequences per micro-step
MODEL = ["--device", DEVICE, "--layers", 2, "--heads", 2, "--channels", CHANNELS, "--seq_len", SEQ_LEN,
         "--vocab", 256, "--train", WORK + "/source_train.bin", "--total_batch", SEQUENCES * SEQ_LEN, "--lr", 0.003]


class Failed(Exception):
    pass


class Skipped(Exception):
    pass


def expect(condition, why):
    if not condition:
        raise Failed(why)


# --- The trainer ------------------------------------------------------------------------------------------------------


def command(ranks, *flags, launcher="mpirun"):
    """One rank is started plainly: it must need no launcher."""
    flags = [str(flag) for flag in flags]
    if ranks == 1:
        return [PROGRAM] + flags
    if launcher == "gpus":
        return [PROGRAM] + flags + ["--gpus", str(ranks)]
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), PROGRAM] + flags


def execute(arguments, code=0, env=ENV):
    """Its output, stdout and stderr in one; it must end with this exit code (None: any but 0)."""
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, timeout=120)
    if (done.returncode == 0 if code is None else done.returncode != code):
        raise Failed("exit code %d from %s:\n%s" % (done.returncode, " ".join(arguments), done.stdout[-2000:]))
    return done.stdout


def delayed(microseconds):
    """The environment under which every collective comes late, by up to so much, on each rank by another time (comm.h)."""
    return dict(ENV, TRAIN_GPT_TEST_DELAY_US=str(microseconds))


class Run:
    """A finished run: its log and its last checkpoint."""

    def __init__(self, out):
        self.out = out
        with open(out + "/log.jsonl") as file:
            self.log = [json.loads(line) for line in file]
        self.losses = [line["loss"] for line in self.log if "loss" in line]
        self.checkpoint = sorted(glob.glob(out + "/step_*.safetensors"))[-1]
        self.meta, self.tensors = read_checkpoint(self.checkpoint)


finished = {}


def train(ranks, *flags, steps=20, batch=2, launcher="mpirun", delay=0):
    """Runs that several tests want are made once. delay: of each collective, at most, in microseconds."""
    key = (ranks, flags, steps, batch, launcher, delay)
    if key not in finished:
        out = "%s/run%d" % (WORK, len(finished))
        execute(command(ranks, *MODEL, "--steps", steps, "--batch", batch, "--out", out, *flags, launcher=launcher),
                env=delayed(delay) if delay else ENV)
        finished[key] = Run(out)
    return finished[key]


def read_checkpoint(path):
    """(meta, name -> bytes); the layout is that of safetensors."""
    with open(path, "rb") as file:
        data = file.read()
    begin = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:begin])
    meta = header.pop("__metadata__")
    offsets = {name: tensor["data_offsets"] for name, tensor in header.items()}
    return meta, {name: data[begin + first:begin + last] for name, (first, last) in offsets.items()}


def expect_same_state(a, b, what):
    expect(a.tensors.keys() == b.tensors.keys(), what + ": not the same tensors")
    for name in a.tensors:
        expect(a.tensors[name] == b.tensors[name], "%s: %s differs" % (what, name))


def expect_close_losses(a, b, tolerance, what):
    expect(len(a) == len(b), what + ": not the same number of steps")
    worst = max(abs(x - y) / y for x, y in zip(a, b))
    expect(worst <= tolerance, "%s: losses differ by %.1e of their value, allowed is %.0e" % (what, worst, tolerance))


# --- Same bits, same losses -------------------------------------------------------------------------------------------

# Another number of ranks adds the same gradients in another order. In fp32 that is 1e-7 of a value, which 20 steps
# grow; bf16, in Newton-Schulz or in a CUDA build's activations, makes of it 2^-9 of a value now and then.
TOLERANCE_FP32 = 1e-5 if DEVICE == "cpu" else 1e-2
TOLERANCE_BF16 = 1e-3 if DEVICE == "cpu" else 1e-2


def test_owners_do_not_matter():
    for ranks in RANKS:
        a = train(ranks, "--optimizer", "dmuon")
        b = train(ranks, "--optimizer", "dmuon", "--owner", "lpt")
        expect(a.losses[-1] < 0.9 * a.losses[0], "it does not learn: %s" % a.losses)
        expect(a.losses == b.losses, "%d ranks: losses under round_robin and lpt differ" % ranks)
        expect_same_state(a, b, "%d ranks, round_robin against lpt" % ranks)


def test_muon_and_dmuon_agree():
    for ranks in RANKS:
        a = train(ranks, "--optimizer", "dmuon")
        b = train(ranks, "--optimizer", "muon")
        expect(a.losses == b.losses, "%d ranks: losses under muon and dmuon differ" % ranks)
        expect_same_state(a, b, "%d ranks, muon against dmuon" % ranks)


def test_other_cuts_of_the_matrices():
    for flags in (["--muon_qkv", "fused"], ["--muon_qkv", "heads"], ["--muon_tile", 72],
                  ["--ns", "gram", "--ns_dtype", "fp16"]):
        a = train(MANY, "--optimizer", "dmuon", *flags)
        b = train(MANY, "--optimizer", "muon", *flags)
        one = train(1, "--optimizer", "dmuon", *flags)
        expect_same_state(a, b, "muon against dmuon with %s" % flags)
        expect_close_losses(a.losses, one.losses, TOLERANCE_BF16, "1 and %d ranks with %s" % (MANY, flags))


def test_losses_over_rank_counts():
    for flags, tolerance in ((["adamw"], TOLERANCE_FP32), (["dmuon", "--ns_dtype", "fp32"], TOLERANCE_FP32),
                             (["dmuon"], TOLERANCE_BF16)):
        for ranks in RANKS[1:]:
            a, b = train(1, "--optimizer", *flags), train(ranks, "--optimizer", *flags)
            expect_close_losses(a.losses, b.losses, tolerance, "%s on 1 and %d ranks" % (flags, ranks))


def test_validation_reads_the_same_on_any_number_of_ranks():
    """61 windows: no number of ranks but 1 divides them, and no batch but 1. A window more or less moves the loss by 1e-3."""
    if DEVICE == "cuda":
        raise Skipped("the tolerance of bf16 would hide other windows")
    flags = ("--val", WORK + "/source_train.bin", "--eval_tokens", 60 * SEQ_LEN + 1)
    losses = [train(ranks, *flags, steps=3, batch=batch).log[-1]["val_loss"]
              for ranks, batch in ((1, 2), (1, 1), (1, 8), (1, 120), (2, 2), (2, 12), (3, 2), (3, 8), (4, 3), (5, 2))]
    expect_close_losses(losses, losses[:1] * len(losses), TOLERANCE_FP32, "validation on other ranks and batches")
    few = train(3, "--val", WORK + "/source_train.bin", "--eval_tokens", 1, steps=3).log[-1]["val_loss"]  # one window
    one = train(1, "--val", WORK + "/source_train.bin", "--eval_tokens", 1, steps=3).log[-1]["val_loss"]
    expect_close_losses([few], [one], TOLERANCE_FP32, "one window on 3 ranks")
    expect(abs(one - losses[0]) > 100 * TOLERANCE_FP32 * one, "the loss of one window is that of 61: %g" % one)


def test_scores_are_the_same_on_any_number_of_ranks():
    """Bits per byte, and HellaSwag: 13 questions of 4 rows, of which no number of ranks but 1, 2 and 4 gets equal shares."""
    if DEVICE == "cuda":
        raise Skipped("the tolerance of bf16 would hide other windows")
    place = WORK + "/scores"
    os.makedirs(place, exist_ok=True)
    shutil.copy(WORK + "/source_train.bin", place + "/val.bin")
    with open(place + "/tokenizer.bin", "wb") as file:  # of as many bytes as the token's last digit says
        file.write(struct.pack("<256i", 20240328, 2, 256, 10, *[0] * 252) + b"".join(bytes([1 + i % 10]) + b"x" * (1 + i % 10) for i in range(256)))
    blocks = []
    with open(place + "/val.bin", "rb") as file:
        tokens = memoryview(file.read()[1024:60000]).cast("H")
    for number in range(13):
        block = struct.pack("<3H", number, number % 4, 4)
        for piece in range(5):
            some = tokens[1000 * number + 60 * piece:][:3 + (number * 7 + piece * 5) % 18]
            block += struct.pack("<%dH" % (len(some) + 1), len(some), *some)
        blocks.append(struct.pack("<2H", 65535, 4 + len(block)) + block)
    with open(place + "/hellaswag.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240522, 1, 13, max(map(len, blocks)), *[0] * 252) + b"".join(blocks))
    flags = ("--val", place + "/val.bin", "--eval_tokens", 60 * SEQ_LEN + 1, "--hellaswag", place + "/hellaswag.bin")
    logs = [train(ranks, *flags, steps=3, batch=batch).log for ranks, batch in ((1, 2), (1, 120), (2, 3), (3, 8), (4, 2), (5, 4))]
    bits = [log[-2]["val_bpb"] for log in logs]
    expect_close_losses(bits, bits[:1] * len(bits), TOLERANCE_FP32, "bits per byte on other ranks and batches")
    for log in logs:
        expect(log[-1] == logs[0][-1] and len(log[-1]) == 4, "HellaSwag on other ranks and batches: %s, %s" % (log[-1], logs[0][-1]))


def test_accumulation():
    for ranks in RANKS[:2]:
        a = train(ranks, "--optimizer", "dmuon", "--ns_dtype", "fp32", batch=SEQUENCES // ranks)
        b = train(ranks, "--optimizer", "dmuon", "--ns_dtype", "fp32", batch=SEQUENCES // ranks // 4)
        expect_close_losses(a.losses, b.losses, TOLERANCE_FP32, "1 and 4 micro-steps on %d ranks" % ranks)


def test_newton_schulz_is_counted():
    """Once per matrix and optimizer step, whatever the number of micro-steps; under vanilla muon on every rank."""
    for ranks in RANKS:
        for optimizer, expected in (("dmuon", MATRICES), ("muon", MATRICES * ranks)):
            counts = {line["ns_matrices"] for line in train(ranks, "--optimizer", optimizer).log}
            expect(counts == {expected}, "%s on %d ranks: %s matrices per step" % (optimizer, ranks, counts))


def test_profile():
    run = train(MANY, "--optimizer", "dmuon", "--profile")
    expect_same_state(run, train(MANY, "--optimizer", "dmuon"), "--profile")
    off = []  # by how much the phases of a step miss the whole of it
    for line in run.log:
        phases = [line[name + "_ms"] for name in ("reduce", "clip", "momentum", "ns", "update", "adamw", "gather")]
        off.append((abs(sum(phases) - line["optimizer_ms"]) - 0.1) / line["optimizer_ms"])
    off.sort()  # what else runs here may come between the two clocks now and then
    expect(off[len(off) // 2] < 0.1, "phases do not add up to optimizer_ms: they are off by %s of it" % off)


def test_trace():
    """trace.json by way of scripts/timeline.py: the spans of the model and the optimizer follow one another and fill the two
    steps that log.jsonl has; each bucket is reduced and gathered once in a step, after one another, where several ranks do."""
    sys.path.insert(0, HERE + "/../scripts")
    import timeline
    for ranks in {1, MANY}:
        run = train(ranks, "--optimizer", "dmuon", "--profile")
        title, slices = timeline.read_trace(run.out)
        expect(title == "rank 0 of %d, dmuon" % ranks, title)
        expect(sorted({s.step for s in slices}) == [10, 11], "of 20 steps are kept %s" % {s.step for s in slices})
        for step in (10, 11):
            of_step = [s for s in slices if s.step == step]
            computed = [s for s in of_step if s.lane == 0 and s.name != "wait"]
            for a, b in zip(computed, computed[1:]):
                expect(abs(a.begin + a.ms - b.begin) < 0.01, "%s does not begin where %s ends" % (b.name, a.name))
            whole, logged = sum(s.ms for s in computed), run.log[step - 1]["step_ms"]
            expect(abs(whole - logged) < 0.1 * logged + 0.2, "spans of %s ms in a step of %s ms" % (whole, logged))
            for name in ("reduce", "clip", "momentum", "ns", "update", "adamw", "gather", "wait"):  # of the log: without the collectives
                summed, said = sum(s.ms for s in of_step if s.lane == 0 and s.name == name), run.log[step - 1][name + "_ms"]
                expect(abs(summed - said) < 2e-4, "%s: spans of %s ms, logged are %s" % (name, summed, said))  # log: four digits
            moved = [s for s in of_step if s.lane == 1]
            for a, b in zip(moved, moved[1:]):
                expect(a.begin + a.ms < b.begin + 0.01, "%s and %s overlap" % (a.label(), b.label()))
            for name in ("reduce", "gather"):
                buckets = sorted(s.number for s in moved if s.name == name)
                expect(buckets == list(range(len(buckets))) and (len(buckets) > 1) == (ranks > 1),
                       "%d ranks, step %d: %s of buckets %s" % (ranks, step, name, buckets))
        step, rows = timeline.table(slices)
        expect(step == 11 and dict(rows)["the step"] > 0 and dict(rows)["ns"] > 0, "table: %s" % rows)


def test_delays_change_no_bit():
    """A collective that comes late shows what looks at its data before it has waited for them."""
    for flags in (["adamw"], ["muon"], ["dmuon"], ["dmuon", "--owner", "lpt"]):
        late = train(MANY, "--optimizer", *flags, delay=2000)
        expect_same_state(late, train(MANY, "--optimizer", *flags), "%s with delays" % flags)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def resume(checkpoint, ranks, steps, *flags):
    out = tempfile.mkdtemp(dir=WORK)
    execute(command(ranks, *MODEL, "--batch", 2, "--steps", steps, "--out", out, "--resume", checkpoint, *flags))
    return Run(out)


def test_resume_goes_on_with_the_same_bits():
    for optimizer in ("adamw", "muon", "dmuon"):
        flags = ("--optimizer", optimizer, "--schedule", "constant")
        whole = train(MANY, *flags, steps=14)
        half = train(MANY, *flags, steps=9)
        rest = resume(half.checkpoint, MANY, 14, *flags)
        expect(rest.losses == whole.losses[9:], optimizer + ": other losses after a resume")
        expect_same_state(rest, whole, optimizer + " resumed against uninterrupted")
        for ranks in {1, max(1, MANY - 2)}:
            other = resume(half.checkpoint, ranks, 14, *flags)
            what = "%s resumed on %d ranks" % (optimizer, ranks)
            expect_close_losses(other.losses, whole.losses[9:], TOLERANCE_BF16, what)


def test_state_is_the_same_on_other_rank_counts():
    """A step whose gradient is not finite leaves all state as it is: such a step saves what it has loaded. The first
    run gets there by a weight decay that multiplies the weights by -99 in each step."""
    flags = ["--optimizer", "dmuon", "--schedule", "constant", "--grad_clip", 0, "--lr", 10, "--weight_decay", 10]
    four = min(4, MANY)
    blown_up = train(four, *flags, "--save_every", 1, "--keep", 100, steps=16 if DEVICE == "cpu" else 8)  # bf16 overflows earlier
    norms = [line["grad_norm"] for line in blown_up.log]
    expect(None in norms, "no gradient overflowed: %s" % norms)
    step = norms.index(None) + 1
    expect(step > 1, "the gradient overflowed at once, in step %d" % step)
    saved = os.path.dirname(blown_up.checkpoint) + "/step_%08d.safetensors" % (step - 1)
    _, state = read_checkpoint(saved)
    for name, data in state.items():
        expect(any(data), name + " is all zeros: nothing is tested")
    for ranks in (four, 3, 1):
        if ranks in RANKS:
            again = resume(saved, ranks, step, *flags)
            expect(again.tensors.keys() == state.keys(), "other tensors on %d ranks" % ranks)
            for name in state:
                expect(again.tensors[name] == state[name], "%s: saved on %d ranks, differs on %d" % (name, four, ranks))


def test_switching_the_optimizer():
    half = train(MANY, "--optimizer", "dmuon", "--schedule", "constant", steps=9)
    for optimizer in ("adamw", "muon"):
        flags = [*MODEL, "--batch", 2, "--steps", 10, "--resume", half.checkpoint, "--optimizer", optimizer]
        said = execute(command(MANY, *flags), code=None)
        expect("--switch_optimizer" in said, "the error does not name the flag: " + said)
        expect(said.count("train_gpt: ") == 1, "the error is not said once: " + said)
        execute(command(MANY, *flags, "--switch_optimizer"))


# --- The plan ---------------------------------------------------------------------------------------------------------


def plan(model, ranks, owner):
    said = execute([PROGRAM, "--print_plan", "--optimizer", "dmuon", "--model", model, "--owner", owner,
                    "--ranks", str(ranks)])
    owned = [line.split()[5:] for line in said.splitlines() if re.match(r" *\d+ +\d+ ", line)]
    ratios = [float(ratio) for ratio in re.search(r"max/mean: FLOPs ([\d.]+), bytes ([\d.]+)", said).groups()]
    return owned, ratios


def test_plan_is_balanced():
    for model in ("d12", "d24", "d36", "d48"):
        for ranks in (1, 2, 4, 8):
            _, ratios = plan(model, ranks, "round_robin")
            expect(ratios == [1.0, 1.0], "%s on %d ranks: max/mean of FLOPs and bytes are %s" % (model, ranks, ratios))


def test_plan_by_lpt():
    """The ratio that longest processing time first gives, worked out here: a step of Newton-Schulz on (m, rm) costs 3r + 1."""
    worse = 0
    for ranks in (5, 7, 9, 11, 13, 20, 30):
        def ratio(order):
            loads = [0] * ranks
            for cost in order:
                loads[loads.index(min(loads))] += cost
            return max(loads) * ranks / sum(loads)
        costs = [13] * 24 + [4] * 48  # d12: fc and its projection; Q, K, V, the attention's projection
        _, (flops, _) = plan("d12", ranks, "lpt")
        expect(abs(flops - ratio(costs)) < 6e-4, "%d ranks: max/mean of FLOPs is %.3f, and %.3f by hand" % (ranks, flops, ratio(costs)))
        worse += ratio(costs[::-1]) > ratio(costs) + 0.01
    expect(worse > 2, "the shortest first would do as well: nothing is tested")


def test_plan_owns_every_matrix_once():
    for ranks in (1, 3, 5, 7, 8, 13, 72, 73, 1000, 4096):
        for owner in ("round_robin", "lpt"):
            owned, ratios = plan("d12", ranks, owner)
            names = [name for rank in owned for name in rank]
            expect(len(owned) == ranks, "%s on %d ranks: %d are listed" % (owner, ranks, len(owned)))
            expect(len(names) == len(set(names)) == 72, "%s on %d ranks: of 72 matrices are owned %d, different %d"
                   % (owner, ranks, len(names), len(set(names))))
            expect(min(ratios) >= 1, "max/mean %s" % ratios)


# --- dev/bench_optimizer ----------------------------------------------------------------------------------------------

BENCH = os.path.dirname(PROGRAM) + "/build/bench_optimizer_cpu"
SHAPES = """# evenly divided by three
layers 3
matrix q 64 64   # a square
matrix fc 256 64
matrix proj 64 256
vector bias 64
layers 0
table embedding 500 64
"""


def test_bench_optimizer():
    """Emulated ranks have the matrices and the state that real ones have; what makes no sense is refused with its line."""
    if DEVICE == "cuda" or not os.path.exists(BENCH):
        raise Skipped("needs build/bench_optimizer_cpu, a program of the CPU (make tests)")
    with open(WORK + "/shapes.txt", "w") as file:
        file.write(SHAPES)
    flags = ["--device", "cpu", "--models", WORK + "/shapes.txt", "--seconds", "0.01", "--json", WORK + "/bench.jsonl"]

    def bench(*command):
        """{(ranks, optimizer): its line of JSON}, {(optimizer, ranks): {matrices}}"""
        said = execute([*command, BENCH, *flags])
        with open(WORK + "/bench.jsonl") as file:
            lines = [json.loads(line) for line in file]
        matrices = {}
        for row in re.findall(r"^\| (\w+) \| (\d+) \| (\d+ of \d+ x \d+) \|", said, re.M):
            matrices.setdefault(row[:2], set()).add(row[2])
        return {(line["ranks"], line["optimizer"]): line for line in lines}, matrices

    flags += ["--emulate", "1,3"]
    alone, alone_matrices = bench()
    real, real_matrices = bench("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3")
    expect(len(alone) == 14 and len(real) == 7, "7 optimizers on 1 and 3 ranks: %s, %s" % (alone.keys(), real.keys()))
    expect(alone_matrices[("dmuon", "1")] == {"3 of 64 x 64", "6 of 64 x 256"}, "1 rank: %s" % alone_matrices)
    expect(alone_matrices[("dmuon", "3")] == {"1 of 64 x 64", "2 of 64 x 256"}, "3 ranks: %s" % alone_matrices)
    for optimizer in ("adamw", "muon", "dmuon"):
        expect(alone_matrices.get((optimizer, "3")) == real_matrices.get((optimizer, "3")), "%s, %s" % (alone_matrices, real_matrices))
        expect(alone[(3, optimizer)]["state_bytes"] == real[(3, optimizer)]["state_bytes"], "state of " + optimizer)
        expect(alone[(3, optimizer)]["emulated"] and not real[(3, optimizer)]["emulated"], "which is emulated")
        expect(0 < alone[(3, optimizer)]["ns_ms"] <= alone[(3, optimizer)]["ms"] or optimizer == "adamw", str(alone))
    chunk = -(-(500 * 64 + 3 * 64) // 16384) * 16384  # of the flat bucket, in whole blocks of the norm
    expect(alone[(1, "dmuon")]["state_bytes"] == 12 * chunk + 8 * 3 * (64 * 64 + 2 * 64 * 256), str(alone[(1, "dmuon")]))
    for line, why in (("matrix q 64", "shapes.txt, line 10"), ("matrix q 64 0", "line 10: '0' is not")):
        with open(WORK + "/shapes.txt", "w") as file:
            file.write(SHAPES + "layers 1\n" + line + "\n")
        said = execute([BENCH, *flags], code=2)
        expect(why in said and said.count("train_gpt: ") == 1, said)
    # The shapes that come with it are read, and what does not fit is left out in words.
    known = ["%s/../dev/shapes/%s.txt" % (HERE, name) for name in ("qwen2.5-7b", "pi0")]
    said = execute(["bash", "-c", "ulimit -v 8000000; exec \"$@\"", "-", BENCH, "--device", "cpu", "--emulate", "1", "--models", ",".join(known)])
    for parameters in ("qwen2.5-7b: 7615.6 M parameters, 6525.3 M of them", "pi0: 3238.0 M parameters, 2704.3 M of them"):
        expect(parameters in said, "not %s: %s" % (parameters, said))
    expect(len(re.findall(r"left out: [\d.]+ GiB are needed, [\d.]+ free", said)) == 14, said)


# --- Ranks that fail --------------------------------------------------------------------------------------------------


def processes_below(pid):
    """Rank -> pid of the trainers that were started below this process, and the pids of all processes below it."""
    parents, ranks = {}, {}
    for path in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(path) as file:
                parents[int(path.split("/")[2])] = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            pass  # it has ended
    below = {pid}
    while True:
        more = {child for child, parent in parents.items() if parent in below} - below
        if not more:
            break
        below |= more
    for child in below - {pid}:
        try:
            with open("/proc/%d/environ" % child, "rb") as file:
                found = re.search(rb"(?:^|\0)(?:OMPI_COMM_WORLD_RANK|PMI_RANK|TRAIN_GPT_SELF)=(\d+)", file.read())
            if found and os.path.samefile("/proc/%d/exe" % child, PROGRAM):
                ranks[int(found.group(1))] = child
        except OSError:
            pass
    return ranks, below


def running(pid):
    try:
        with open("/proc/%d/stat" % pid) as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


WAITS_EVERYWHERE = [*MODEL, "--batch", 2, "--optimizer", "dmuon", "--val", WORK + "/source_train.bin", "--eval_every", 2,
                    "--eval_tokens", 64, "--save_every", 3]


def fault(number, rank, launcher, flags=WAITS_EVERYWHERE, env=ENV, later=0, again=True):
    """Sends a signal to one rank of a run that is under way, None: to its launcher, `later` seconds after its first steps:
    (output, exit code, seconds until the run was over)."""
    ranks = min(3, MANY)
    out = tempfile.mkdtemp(dir=WORK)
    given, flags = flags, [*flags, "--steps", 1000000, "--rank_timeout", 5, "--out", out]
    with open(out + "/said", "w+") as said:
        run = subprocess.Popen(command(ranks, *flags, launcher=launcher), stdout=said, stderr=said, env=env)
        try:
            log = out + "/log.jsonl"
            for _ in range(600):
                if os.path.exists(log) and os.path.getsize(log) > 1000:
                    break
                time.sleep(0.1)
            pids, everyone = processes_below(run.pid)
            expect(sorted(pids) == list(range(ranks)), "%d ranks expected, found %s" % (ranks, pids))
            time.sleep(later)
            begin = time.time()
            os.kill(run.pid if rank is None else pids[min(rank, ranks - 1)], number)
            try:
                code = run.wait(timeout=5 + 60)
            except subprocess.TimeoutExpired:
                if again and launcher == "mpirun" and not processes_below(run.pid)[0]:
                    print("mpirun stays without a rank, as it does once in some hundred times (soak.py): again", flush=True)
                    return fault(number, rank, launcher, given, env, later, again=False)
                raise Failed("the run goes on 60 s after the deadline")
            seconds = time.time() - begin
            left = everyone
            while left and time.time() < begin + 60:
                time.sleep(0.1)
                left = [pid for pid in everyone if running(pid)]
            expect(not left, "processes are left: %s" % left)
        finally:
            if run.poll() is None:
                for pid in processes_below(run.pid)[1]:
                    os.kill(pid, signal.SIGKILL)
        said.seek(0)
        text = "".join(line for line in said if not line.startswith("step "))
    expect(code != 0, "the exit code is 0")
    return text, code, seconds


LAUNCHERS = ["mpirun"] if DEVICE == "cpu" else ["mpirun", "gpus"]


def test_killed_rank():
    for launcher in LAUNCHERS:
        for rank in (0, 1):
            said, code, seconds = fault(signal.SIGKILL, rank, launcher)
            expect(seconds < 30, "%s: rank %d was killed, the run ended %.0f s later" % (launcher, rank, seconds))
            expect("killed" in said.lower(), "%s: no word about the killed rank: %s" % (launcher, said))


def test_killed_while_a_collective_is_in_flight():
    """Collectives that come 30 ms late leave little of a step in which none is under way; the moment is random."""
    for launcher in LAUNCHERS:
        for rank in (0, 1):
            later = random.random() / 2
            flags = [*MODEL, "--batch", 2, "--optimizer", "dmuon"]
            said, code, seconds = fault(signal.SIGKILL, rank, launcher, flags, delayed(30000), later)
            what = "%s: rank %d was killed %.3f s later: " % (launcher, rank, later)
            expect(seconds < 30, what + "the run ended %.0f s after that" % seconds)
            expect(len(re.findall("killed", said, re.I)) == 1, what + "not one word about it: " + said)


def test_stopped_rank():
    for launcher in LAUNCHERS:
        for rank in (0, 1):
            said, code, seconds = fault(signal.SIGSTOP, rank, launcher)
            lines = re.findall(r"^train_gpt: rank (\d): waited 5 s for .*--rank_timeout", said, re.M)
            expect(len(lines) == 1, "%s: not one line about the deadline: %s" % (launcher, said))
            expect(int(lines[0]) != rank, "%s: the stopped rank spoke" % launcher)
            expect(2 < seconds < 60, "%s: the run ended after %.0f s" % (launcher, seconds))


def test_asked_to_stop():
    """A request to one rank or to the launcher: all finish the same step, save it, say so once."""
    for launcher in LAUNCHERS:
        requests = [(signal.SIGTERM, 0), (signal.SIGHUP, 1), (signal.SIGUSR1, None)]
        if launcher == "gpus":  # mpirun makes of these a SIGTERM, and gives the ranks a second
            requests += [(signal.SIGTERM, None), (signal.SIGINT, None), (signal.SIGHUP, None)]
        for number, rank in requests:
            said, code, seconds = fault(number, rank, launcher, [*MODEL, "--batch", 2])
            what = "%s: %s to %s: " % (launcher, number.name, "the launcher" if rank is None else "rank %d" % rank)
            expect(code == 128 + number, what + "exit code %d: %s" % (code, said))
            expect(said.count("stopped after step") == 1, what + said)
            step = int(re.search(r"^stopped after step (\d+) of 1000000 by signal %d " % number, said, re.M).group(1))
            expect("step_%08d.safetensors\n" % step in said, what + "not saved: " + said)


def test_stopped_rank_behind_many_launches():
    """A GPU takes about a thousand launches behind a collective that hangs; then launching blocks as well."""
    if DEVICE == "cpu" or MANY == 1:
        raise Skipped("needs two GPUs")
    shared = ["--train", WORK + "/source_train.bin", "--vocab", 256, "--seq_len", 128, "--batch", 1]
    for model, optimizer in (("d12", "muon"), ("d36", "adamw")):
        said, code, seconds = fault(signal.SIGSTOP, 1, "gpus", [*shared, "--model", model, "--optimizer", optimizer])
        expect(re.search(r"^train_gpt: rank 0: waited 5 s for .*--rank_timeout", said, re.M), "%s: %s" % (model, said))
        expect(seconds < 40, "%s, %s: the run ended after %.0f s" % (model, optimizer, seconds))


def test_both_launchers_agree():
    if DEVICE == "cpu" or MANY == 1:
        raise Skipped("needs two GPUs")
    a = train(MANY, "--optimizer", "dmuon")
    b = train(MANY, "--optimizer", "dmuon", launcher="gpus")
    expect_same_state(a, b, "mpirun against --gpus")


def test_ranks_must_be_given_the_same():
    """A rank with another flag, or that finds other files, is refused with what it has and who it is."""
    here, there = WORK + "/rank_0", WORK + "/rank_1"
    data = ["--train", "train_*.bin", "--val", "val.bin"]
    flags = [*MODEL, *data, "--batch", 2, "--steps", 2, "--total_batch", 4 * SEQ_LEN, "--eval_every", 1]

    def refused(words, *changed, in_there=lambda: None, program=PROGRAM):
        for directory in (here, there):
            shutil.rmtree(directory, ignore_errors=True)
            os.mkdir(directory)
            for name in ("train_000.bin", "train_001.bin", "val.bin"):
                shutil.copyfile(WORK + "/source_train.bin", directory + "/" + name)
        in_there()
        one = lambda what, where, *more: ["-n", "1", "-wdir", where, what, *[str(flag) for flag in (*flags, *more)]]
        arguments = ["mpirun", "--allow-run-as-root", "--oversubscribe", *one(PROGRAM, here), ":", *one(program, there, *changed)]
        if not words:
            return execute(arguments)
        said = execute(arguments, code=2)
        expect(said.count("train_gpt: ") == 1, "not said once: " + said)
        expect(re.search(words, said), "%s: %s" % (words, said))

    def change_a_token():
        with open(there + "/train_000.bin", "r+b") as file:
            file.seek(1024)
            file.write(b"\1")

    refused(None)
    refused(None, "--rank_timeout", 100)
    refused("rank 0 has --batch 2, rank 1 has --batch 1:", "--batch", 1)
    refused("rank 0 has --seed 1337, rank 1 has --seed 2:", "--seed", 2)
    refused("rank 0 has --lr 0.003, rank 1 has --lr 0.004:", "--lr", 0.004)
    refused("rank 0 has --eval_every 1, rank 1 has --eval_every 2:", "--eval_every", 2)
    refused("rank 0 has --channels %d, rank 1 has --channels 64:" % CHANNELS, "--channels", 64)
    refused("rank 0 has --train train_..bin, rank 1 has --train train_000.bin:", "--train", "train_000.bin")
    refused("rank 0 has train shard train_001.bin of [0-9]+ bytes.*, rank 1 has val shard val.bin",
            in_there=lambda: os.remove(there + "/train_001.bin"))
    refused("rank 0 has train shard train_000.bin of .* rank 1 has train shard train_000.bin of",
            in_there=change_a_token)
    sources = re.search("sources ([0-9a-f]{16})", execute([PROGRAM, "--version"]))[1]
    with open(PROGRAM, "rb") as file, open(WORK + "/other_program", "wb") as other:  # as if it had been built from others
        other.write(file.read().replace(sources.encode(), b"0123456789abcdef"))
    os.chmod(WORK + "/other_program", 0o755)
    refused("rank 0 has program cpu.* sources %s, rank 1 has program cpu.* sources 0123456789abcdef:" % sources,
            program=WORK + "/other_program")
    refused("rank 0 has tokenizer none, rank 1 has tokenizer [0-9a-f]{16}:", in_there=lambda: write_tokenizer(there))


def test_errors_are_said_once():
    said = execute(command(max(2, MANY), *MODEL, "--train", WORK + "/nothing_here*.bin"), code=1)
    expect(said.count("train_gpt: ") == 1, said)
    said = execute(command(max(2, MANY), *MODEL, "--layer", 2), code=2)
    expect(said.count("did you mean --layers") == 1, said)


# --- All of them ------------------------------------------------------------------------------------------------------


def write_shard():
    text = b""
    for path in sorted(glob.glob(HERE + "/../*.h") + glob.glob(HERE + "/../*.cu*")):
        with open(path, "rb") as file:
            text += file.read()
    text = text[:200000]
    with open(WORK + "/source_train.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, len(text), *[0] * 253))
        file.write(struct.pack("<%dH" % len(text), *text))


def write_tokenizer(directory):
    with open(directory + "/tokenizer.bin", "wb") as file:
        file.write(struct.pack("<256i", 20240328, 2, 256, 10, *[0] * 252))
        file.write(b"".join(bytes([1, byte]) for byte in range(256)))


def main():
    write_shard()
    version = execute([PROGRAM, "--version"])
    passed = failed = skipped = 0
    for name, test in list(globals().items()):
        if not name.startswith("test_"):
            continue
        name, begin = name[5:], time.time()
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        if DEVICE == "cuda" and "plan" in name:  # the same without a GPU
            continue
        try:
            if "plan" not in name and (" mpi" not in version or not shutil.which("mpirun")):
                raise Skipped("no MPI")
            test()
        except Failed as why:
            print("FAIL %s: %s" % (name, why), flush=True)
            failed += 1
        except Skipped as why:
            print("skip %s: %s" % (name, why), flush=True)
            skipped += 1
        else:
            print("ok %s (%.1f s)" % (name, time.time() - begin), flush=True)
            passed += 1
    shutil.rmtree(WORK)
    print("%d passed, %d failed, %d skipped" % (passed, failed, skipped))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
