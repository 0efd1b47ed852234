#!/usr/bin/env python3
"""Tables from a log of runs, such as scripts/gpu_check.sh writes: what a step takes on how many GPUs.

    scripts/scaling.py LOG [--program ./train_gpt]

Of every run in it (its start-up table, then its steps): medians without the first six steps (of fewer than twelve: without the
first half), AdamW beside it, scaling against the same run on one GPU with as many sequences in a micro-step and as many
micro-steps, communication that was waited for (the phases reduce and gather, and wait; --profile), and what --print_plan
predicts for the optimizer's time. A run that was cut off counts with the steps that it has.
"""
import argparse
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

NUMBER = r"([\d.]+(?:e[+-]?\d+)?)"
STEP = re.compile(rf"^step +\d+/\d+ \| .*?\| {NUMBER} ms \(optimizer {NUMBER}\) \| {NUMBER} tok/s")


class Run:
    def __init__(self, section):
        lines = section.splitlines()
        self.title = lines[0]
        table = dict(re.findall(r"^\| (\w+) +\| (.*)$", section, re.M))
        flags = table.get("flags", "") + " "
        found = re.search(r"(\d+) tokens: (\d+) sequences x (\d+) tokens x (\d+) ranks x (\d+) micro-steps", table["step"])
        self.tokens, self.batch, self.length, self.gpus, self.micro_steps = map(int, found.groups())
        self.optimizer = table["optimizer"].split(",")[0]
        value = lambda name, default: (re.findall(rf"--{name} (\S+) ", flags) or [default])[-1]
        self.model = value("model", "d12")
        # What else tells two runs apart, and what of it the plan knows.
        self.plan_flags = [word for name in ("muon_batch", "muon_tile", "muon_qkv", "ns", "ns_dtype", "ns_steps", "ns_coefficients",
                                             "owner") if value(name, None) for word in ("--" + name, value(name, None))]
        self.kernels = value("kernels", "auto")
        self.others = " ".join(self.plan_flags + ([] if self.kernels == "auto" else ["--kernels", self.kernels]))
        steps = [line for line in lines if STEP.match(line)]
        steps = steps[min(6, len(steps) // 2):]
        timed = [list(map(float, STEP.match(line).groups())) for line in steps]
        self.step_ms, self.optimizer_ms, self.rate = (median(column) for column in zip(*timed))
        phases = [dict(re.findall(rf"\| (reduce|gather|wait) {NUMBER}", line)) for line in steps]
        waited = [sum(map(float, found.values())) for found in phases if found]
        self.waited = median(waited) if waited and self.gpus > 1 else None

    def key(self, *without):
        names = ("model", "batch", "length", "micro_steps", "optimizer", "gpus", "others")
        return tuple(getattr(self, name) for name in names if name not in without)


def read_runs(text):
    runs = []
    for section in re.split(r"^== ", text, flags=re.M)[1:]:
        if not re.search(r"^\| step +\| ", section, re.M):
            continue
        if any(STEP.match(line) for line in section.splitlines()):
            runs.append(Run(section))
        else:
            print(f"scaling: left out, no step finished: {section.splitlines()[0]}", file=sys.stderr)
    return runs


def predicted_ms(run, program):
    """What the plan says of the optimizer's time on Hopper's kernels, None if it cannot be asked."""
    if run.kernels != "auto" or not Path(program).exists():
        return None
    try:
        said = subprocess.run([program, "--print_plan", "--optimizer", run.optimizer, "--model", run.model, "--ranks", str(run.gpus),
                               *run.plan_flags], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(rf"^predicted .*?: {NUMBER} ms an optimizer step", said, re.M)
    return float(found.group(1)) if found else None


def table(runs, program):
    adamw = {run.key("optimizer", "others"): run for run in runs if run.optimizer == "adamw"}
    alone = {run.key("gpus"): run for run in runs if run.gpus == 1}
    rows = ["| model | tokens a step | GPUs | optimizer | step ms | tokens/s | over adamw | scaling | optimizer ms | waited for | "
            "predicted | off by |", "|" + "---|" * 12]
    for run in runs:
        base, one = adamw.get(run.key("optimizer", "others")), alone.get(run.key("gpus"))
        over = f"{100 * (run.step_ms / base.step_ms - 1):+.1f}%" if base and base is not run else ""
        scaling = f"{run.rate / one.rate:.2f}x" if one and one is not run else ""
        waited = "" if run.waited is None else f"{run.waited:.2f}"
        predicted = predicted_ms(run, program)
        off = "" if predicted is None else f"{100 * (predicted / run.optimizer_ms - 1):+.0f}%"
        rows.append(f"| {run.model} B={run.batch} | {run.tokens:,} | {run.gpus} | {run.optimizer}{' ' if run.others else ''}{run.others} | "
                    f"{run.step_ms:.2f} | {run.rate:,.0f} | {over} | {scaling} | {run.optimizer_ms:.2f} | {waited} | "
                    f"{'' if predicted is None else f'{predicted:.2f}'} | {off} |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log")
    parser.add_argument("--program", default="./train_gpt", help="whose --print_plan predicts [./train_gpt]")
    args = parser.parse_args()
    try:
        text = Path(args.log).read_text(errors="replace")
    except OSError as e:
        sys.exit(f"scaling: {e}")
    runs = read_runs(text)
    if not runs:
        sys.exit(f"scaling: {args.log} has no run with a finished step in it")
    print(table(runs, args.program))


if __name__ == "__main__":
    main()
