#!/usr/bin/env python3
"""Puts training runs side by side: a table on stdout and one picture.

    scripts/compare.py RUN... [--png FILE]      RUN: a directory that --out named (it holds log.jsonl)

The baseline is the first run whose name contains "adamw" (else the first run): the table says after how many steps and
seconds the others reached its final loss. Loss is the validation loss where a run has one, else the mean training loss of
the last steps. Seconds are those of training steps; evaluation, samples and checkpoints are not in them.
"""
import argparse
import json
import math
import sys
from pathlib import Path

import packages

COLORS = ["#4c72b0", "#dd8452", "#2a9d63", "#c44e52", "#8172b3", "#7f7f7f"]
INK, FAINT = "#222222", "#b8b8b8"


class Run:
    def __init__(self, directory):
        self.name = Path(directory).resolve().name
        path = Path(directory) / "log.jsonl"
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError as e:
            sys.exit(f"compare: {e}: not the --out of a run?")
        self.log = [entry for entry in map(step_entry, lines) if entry]
        if len(self.log) < len(lines):  # the last one is torn where the machine went down
            print(f"compare: {path}: left out {len(lines) - len(self.log)} of {len(lines)} lines: no steps of train_gpt", file=sys.stderr)
        self.seconds = []  # of training, up to and including each line
        for entry in self.log:
            self.seconds.append((self.seconds[-1] if self.seconds else 0) + entry["step_ms"] / 1000)
        self.steps = [entry["step"] for entry in self.log]
        self.loss = smooth([entry["loss"] for entry in self.log])
        self.val = [i for i, entry in enumerate(self.log) if number(entry.get("val_loss"))]
        if all(math.isnan(loss) for loss in self.loss) and not self.val:
            why = "no loss in it is a finite number" if self.log else "the run has no finished step yet"
            print(f"compare: left out {path}: {why}", file=sys.stderr)
            self.log = []
            return
        # A step's usual time: the median, since the first steps warm up caches and libraries.
        self.step_ms = median([entry["step_ms"] for entry in self.log])
        self.optimizer_ms = median([entry["optimizer_ms"] for entry in self.log if number(entry.get("optimizer_ms"))] or [0])
        self.tokens_per_s = median([entry["tokens_per_s"] for entry in self.log])

    def curve(self):
        """[(step, seconds, loss)]: validation loss, or smoothed training loss without one."""
        if self.val:
            return [(self.steps[i], self.seconds[i], self.log[i]["val_loss"]) for i in self.val]
        return [point for point in zip(self.steps, self.seconds, self.loss) if not math.isnan(point[2])]

    def final(self):
        return self.curve()[-1][2]

    def reach(self, loss):
        """(step, seconds) at which the curve first comes down to loss, between two points by a straight line; or None."""
        previous = None
        for step, seconds, value in self.curve():
            if value <= loss:
                if previous is None:
                    return step, seconds
                step0, seconds0, value0 = previous
                part = (value0 - loss) / (value0 - value)
                return step0 + part * (step - step0), seconds0 + part * (seconds - seconds0)
            previous = step, seconds, value
        return None


def number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def step_entry(line):
    """A line of log.jsonl as a dictionary, None if it is no step. A loss that is not finite is null there."""
    try:
        entry = json.loads(line)
        entry["loss"] = entry["loss"] if number(entry["loss"]) else None
        good = all(number(entry[key]) and entry[key] > 0 for key in ("step", "step_ms", "tokens_per_s"))
        return entry if good else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def median(values):
    return sorted(values)[len(values) // 2]


def smooth(values):
    """Running mean over about the last 2% of the run (at most what there is): the noise of single batches goes."""
    window = max(1, len(values) // 50)
    parts = ([v for v in values[max(0, i + 1 - window):i + 1] if v is not None] for i in range(len(values)))
    return [sum(part) / len(part) if part else float("nan") for part in parts]  # null: a skipped step


def table(header, rows):
    widths = [max(len(row[i]) for row in [header] + rows) for i in range(len(header))]
    for row in [header] + rows:
        print("  ".join([row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]))


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min" if seconds < 36000 else f"{seconds / 3600:.1f} h"


def print_tables(runs, baseline):
    kind = "validation" if all(run.val for run in runs) else "training"
    shown = {}  # step -> {run: loss}, for steps at which all have a point
    for run in runs:
        for step, _, loss in run.curve():
            shown.setdefault(step, {})[run] = loss
    common = [step for step in sorted(shown) if len(shown[step]) == len(runs)]
    if common:
        picked = common[::-1][::-(-len(common) // 10)][::-1]  # about ten, the last among them
        print(f"\n{kind} loss (nats per token)")
        table(["step"] + [run.name for run in runs],
              [[str(step)] + [f"{shown[step][run]:.3f}" for run in runs] for step in picked])

    print()
    header = ["run", "steps", "final loss", "time", "tokens/s", "step", "optimizer"]
    rows = []
    for run in runs:
        share = 100 * run.optimizer_ms / run.step_ms
        row = [run.name, str(run.steps[-1]), f"{run.final():.3f}", duration(run.seconds[-1]), f"{run.tokens_per_s:,.0f}",
               f"{run.step_ms:.1f} ms", f"{run.optimizer_ms:.2f} ms ({share:.1f}%)" if run.optimizer_ms else "-"]
        if len(runs) > 1:
            reached = run.reach(baseline.final())
            row += [f"{reached[0]:.0f}", duration(reached[1])] if reached else ["not reached", ""]
        rows.append(row)
    if len(runs) > 1:
        header += [f"steps to {baseline.final():.3f}", "time to it"]
    table(header, rows)


def draw(runs, baseline, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#ececec",
        "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), width_ratios=[1, 1, 0.62], layout="constrained")
    color = {run: COLORS[i % len(COLORS)] for i, run in enumerate(runs)}

    # The first tenth falls steeply and would press the rest together: the axis begins where the slowest run is after it.
    points = [loss for run in runs for loss in (*run.loss, *(p[2] for p in run.curve())) if not math.isnan(loss)]
    low = min(points)
    high = max([run.loss[len(run.loss) // 10] for run in runs if not math.isnan(run.loss[len(run.loss) // 10])] or points)
    margin = 0.05 * max(high - low, 1e-3)

    def coincides(run):
        """With a later run, which hides it (muon and dmuon take the same steps): such a run is drawn with rings."""
        later = runs[runs.index(run) + 1:]
        return any(abs(run.final() - other.final()) < margin / 10 and run.steps == other.steps for other in later)

    many = len(runs) > 1
    title = "thick: validation, thin: training" if any(run.val for run in runs) else None
    for ax, column, label in ((axes[0], 0, "step"), (axes[1], 1, "seconds of training")):
        for run in runs:
            x = run.steps if column == 0 else run.seconds
            ax.plot(x, run.loss, color=color[run], linewidth=1, alpha=0.4 if run.val else 1)
            curve = run.curve() if run.val else []
            ring = {"markersize": 8, "markerfacecolor": "white"} if coincides(run) else {"markersize": 3.5}
            ax.plot([p[column] for p in curve], [p[2] for p in curve], color=color[run], linewidth=2, label=run.name,
                    marker="o" if len(curve) <= 40 else None, **ring)
        if many:
            ax.axhline(baseline.final(), color=color[baseline], linewidth=1, linestyle=(0, (4, 3)), alpha=0.8)
            for row, run in enumerate(runs):
                reached = run.reach(baseline.final())
                if reached and run is not baseline:
                    x = reached[column]
                    ax.plot([x, x], [low - margin, baseline.final()], color=color[run], linewidth=1, linestyle=(0, (4, 3)))
                    ratio = x / baseline.reach(baseline.final())[column]
                    ax.annotate(f"{ratio:.2f}×", (x, low - margin), xytext=(3, 4 + 11 * row),
                                textcoords="offset points", color=color[run], fontweight="bold", fontsize=9)
        ax.legend(frameon=False, loc="upper right", title=title, title_fontsize=8.5)
        ax.set_ylim(low - margin, high + margin)
        ax.set_xlim(left=0)
        ax.set_xlabel(label)
    axes[0].set_ylabel("loss (nats per token)")
    axes[0].set_title("Loss by step")
    axes[1].set_title("Loss by time")

    ax = axes[2]
    for row, run in enumerate(runs):
        share = run.optimizer_ms / run.step_ms
        ax.barh(row, run.step_ms - run.optimizer_ms, color=color[run], alpha=0.35, height=0.55)
        ax.barh(row, run.optimizer_ms, left=run.step_ms - run.optimizer_ms, color=color[run], height=0.55)
        text = f"{run.step_ms:.3g} ms" + (f", optimizer {run.optimizer_ms:.3g} ms ({100 * share:.1f}%)" if share else "")
        ax.text(0, row - 0.33, text, fontsize=8.5, va="bottom")
    ax.set_yticks(range(len(runs)), [run.name for run in runs])
    ax.set_ylim(max(len(runs), 3) - 0.5, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel("milliseconds per step")
    ax.set_title("Step time (dark: optimizer)" if any(run.optimizer_ms for run in runs) else "Step time")
    try:
        figure.savefig(path, dpi=150)
    except (ValueError, OSError) as e:
        sys.exit(f"compare: cannot write the picture {path}: {e}")
    print(f"\npicture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--png", type=Path, help="where the picture goes [compare.png beside the first RUN]")
    args = parser.parse_args()
    drawable = packages.need("matplotlib", required=False)
    runs = [run for run in map(Run, args.runs) if run.log]
    if not runs:
        sys.exit("compare: no run is left to compare")
    baseline = next((run for run in runs if "adamw" in run.name), runs[0])
    print_tables(runs, baseline)
    if not drawable:
        print("\npicture: left out, for want of the Python package matplotlib")
    else:
        draw(runs, baseline, args.png or Path(args.runs[0]).resolve().parent / "compare.png")


if __name__ == "__main__":
    main()
