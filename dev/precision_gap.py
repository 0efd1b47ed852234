#!/usr/bin/env python3
"""Where PyTorch's lower loss comes from: the seed, or this program's bf16 residual stream and its gradient.

    python3 dev/precision_gap.py --data DIR [--seeds 1,2,3] [--rows ours,fp32] [--steps 600] [--minutes 40]
                                             [--out dev/results/precision_gap.md]

124M on the GPT-2 shards of DIR with AdamW and the settings of `scripts/gpu_check.sh train`, for each seed: this program, then PyTorch
with fp32 weights under bf16 autocast (peer_pytorch.py), whose residual stream and gradient of it are fp32, and again with one
or both rounded to bf16 after each addition, as this program has them. The same windows are held out; initial weights and the order of
the data are each program's own, a function of the seed. A row that differs from the fp32 row by less than about two standard
errors says nothing. --rows takes some of ours, fp32, bf16_forward, bf16_backward and bf16. The table is written after each run;
what --minutes leaves no time for stays empty.
"""
import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = "ours"
NAMES = {OURS: "this program (bf16 parameters, stream and gradient)", "fp32": "PyTorch, stream and its gradient in fp32",
         "bf16_forward": "PyTorch, the stream rounded to bf16", "bf16_backward": "PyTorch, its gradient rounded to bf16",
         "bf16": "PyTorch, both rounded"}


def final_loss(args, row, seed, limit):
    """The validation loss at the end, or None if the run fails or takes longer than `limit` seconds."""
    out = ROOT / "build" / "precision_gap" / f"{row}_{seed}"
    shutil.rmtree(out, ignore_errors=True)
    if row == OURS:
        command = [args.program, "--model", args.model, "--batch", args.batch, "--train", f"{args.data}/train_*.bin",
                   "--val", f"{args.data}/val_*.bin", "--steps", args.steps, "--warmup", args.steps // 10, "--schedule", "wsd",
                   "--decay_frac", 0.6, "--final_lr_frac", 0.02, "--optimizer", "adamw", "--lr", 1.2e-3,
                   "--eval_every", 0, "--eval_tokens", args.eval_tokens, "--seed", seed, "--device", args.device, "--out", out]
    else:
        command = [sys.executable, ROOT / "dev/peer_pytorch.py", "--data", args.data, "--model", args.model, "--batch", args.batch,
                   "--steps", args.steps, "--optimizer", "adamw", "--stream", row, "--seed", seed, "--device", args.device,
                   "--compile", args.compile]
    try:
        done = subprocess.run([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode != 0:
        print(f"{row}, seed {seed}: exit status {done.returncode}", file=sys.stderr)
        return None
    lines = (out / "log.jsonl").read_text().splitlines() if row == OURS else done.stdout.splitlines()
    for checkpoint in out.glob("*") if row == OURS else []:
        if checkpoint.name != "log.jsonl":
            shutil.rmtree(checkpoint) if checkpoint.is_dir() else checkpoint.unlink()
    return json.loads(lines[-1])["val_loss"]


def mean_and_error(values):
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def table(losses, seeds):
    lines = ["| validation loss | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | minus the fp32 row, ± standard error |",
             "|---|" + "---|" * (len(seeds) + 2)]
    base = mean_and_error(list(losses["fp32"].values())) if losses.get("fp32") else None
    for row, of in losses.items():
        cells = [f"{of[seed]:.4f}" if seed in of else "" for seed in seeds] + ["", ""]
        if of:
            mean, error = mean_and_error(list(of.values()))
            cells[-2] = f"{mean:.4f}"
            if base and row != "fp32":
                cells[-1] = f"{mean - base[0]:+.4f} ± {math.hypot(error, base[1]):.4f}"
        lines.append(f"| {NAMES[row]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--rows", default=",".join(NAMES))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--out", default="dev/results/precision_gap.md")
    parser.add_argument("--program", default="./train_gpt")
    parser.add_argument("--model", default="d12")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval_tokens", type=int, default=589824)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", choices=("whole", "blocks"), default="whole")
    args = parser.parse_args()
    args.data = str(Path(args.data).resolve())
    seeds = [int(seed) for seed in args.seeds.split(",")]
    losses = {row: {} for row in args.rows.split(",")}
    if unknown := losses.keys() - NAMES.keys():
        parser.error(f"--rows: no {', '.join(unknown)} among {', '.join(NAMES)}")
    end = time.monotonic() + 60 * args.minutes
    for seed in seeds:
        for row in losses:
            left = end - time.monotonic()
            loss = final_loss(args, row, seed, left) if left > 1 else None
            if loss is None:
                continue
            losses[row][seed] = loss
            print(f"{NAMES[row]}, seed {seed}: {loss:.4f}", flush=True)
            Path(args.out).write_text(f"# The gap to PyTorch\n\n`{' '.join(sys.argv)}`, {time.strftime('%F', time.gmtime())}\n\n"
                                      f"{table(losses, seeds)}\n")
    print(table(losses, seeds))
    if any(len(of) < len(seeds) for of in losses.values()):
        sys.exit("precision_gap: not all runs ended, or --minutes was too short")


if __name__ == "__main__":
    main()
