#!/usr/bin/env python3
"""Puts training runs side by side: tables on stdout and one picture.

    scripts/compare.py RUN... [--png FILE]      RUN: a directory that --out named (it holds log.jsonl)
    scripts/compare.py RUN... --watch           the same again and again while runs go, until Ctrl-C
    scripts/compare.py RUN... --csv FILE        every step of every run, a row each
    scripts/compare.py RUN... --tensorboard DIR events for TensorBoard; with --watch as they come

The baseline is the first run with AdamW (else the first run): the tables say after how many steps and seconds the others
reached its final loss. Loss is the validation loss where a run has one, else the mean training loss of the last steps. Seconds
are those of training steps; evaluation, samples and checkpoints are not in them. An optimizer has one colour in every picture.
"""
import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import packages

COLORS = {"adamw": "#4c72b0", "muon": "#dd8452", "dmuon": "#2a9d63"}
OTHER_COLORS = ["#c44e52", "#8172b3", "#7f7f7f"]  # of runs whose optimizer neither log nor name tells
LINES = ["-", (0, (6, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]  # of the runs of one colour
INK, FAINT = "#222222", "#b8b8b8"
LARGEST = 1e15  # in milliseconds 30,000 years: what is beyond it in a log is damage, and would fill a table with digits
WATCH_EVERY = 5  # seconds, and at least ten times what a redraw takes: the runs need the cores


class Run:
    def __init__(self, directory):
        self.directory = Path(directory).resolve()
        self.name = "".join(c if c.isprintable() else repr(c)[1:-1] for c in self.directory.name)
        path = Path(directory) / "log.jsonl"
        if path.exists() and not path.is_file():
            sys.exit(f"compare: {path} is not a file")
        try:
            lines = path.read_text(errors="replace").splitlines()
            self.written = path.stat().st_mtime
        except OSError as e:
            sys.exit(f"compare: {e}: not the --out of a run?")
        if (path.parent / "log.before.jsonl").exists():
            print(f"compare: {path}: its last lines are of a branch that has not saved; log.before.jsonl has those of the checkpoints",
                  file=sys.stderr)
        self.log, left_out = [], 0
        for line in lines:
            entry = step_entry(line)
            if entry and "loss" in entry:
                self.log.append(entry)
            elif entry and self.log and self.log[-1]["step"] == entry["step"]:  # scores of the model after that step
                self.log[-1].update(entry)
            else:
                left_out += 1
        if left_out:  # the last one is torn where the machine went down
            print(f"compare: {path}: left out {left_out} of {len(lines)} lines: no steps of train_gpt", file=sys.stderr)
        self.optimizer = next((entry["optimizer"] for entry in self.log[::-1] if str(entry.get("optimizer")) in COLORS), None)
        if not self.optimizer:  # a log from before that was in it
            named = re.findall("adamw|dmuon|muon", self.name.lower())
            self.optimizer = named[0] if len(set(named)) == 1 else None
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
        self.bits_per_byte = self.last("val_bpb")
        self.hellaswag = self.last("hellaswag_acc_norm")

    def last(self, key):
        return next((entry[key] for entry in self.log[::-1] if number(entry.get(key))), None)

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
    """Whether it is a number, and one that a run can have had."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def step_entry(line):
    """A line of log.jsonl as a dictionary, None if it is none of train_gpt's. A loss that is not finite is null there, and
    here one that is no number(); the line of HellaSwag's scores has a step and no loss."""
    try:
        entry = json.loads(line)
        if "loss" not in entry and number(entry["hellaswag_acc"]) and number(entry["step"]):
            return {key: value for key, value in entry.items() if key == "step" or key.startswith("hellaswag_")}
        entry["loss"] = entry["loss"] if number(entry["loss"]) else None
        good = all(number(entry[key]) and entry[key] > 1 / LARGEST for key in ("step", "step_ms", "tokens_per_s"))
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
    """Where it is wider than the terminal (80 columns where there is none), the first column gives way, in its middle."""
    widths = [max(len(row[i]) for row in [header] + rows) for i in range(len(header))]
    room = shutil.get_terminal_size().columns - sum(width + 2 for width in widths[1:])
    widths[0] = min(widths[0], max(room, 8))
    for row in [header] + rows:
        print("  ".join([shortened(row[0], widths[0]).ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:])]).rstrip())


def shortened(text, width):
    return text if len(text) <= width else text[:width // 2 - 1] + ".." + text[-(width - width // 2 - 1):]


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
        names = {run: shortened(run.name, 24) for run in runs}
        left, width = list(runs), shutil.get_terminal_size().columns
        while left:  # as many runs side by side as the terminal has room for
            count = 1
            while count < len(left) and 8 + sum(max(len(names[run]), 5) + 2 for run in left[:count + 1]) <= width:
                count += 1
            table(["step"] + [names[run] for run in left[:count]],
                  [[str(step)] + [f"{shown[step][run]:.3f}" for run in left[:count]] for step in picked])
            left = left[count:]
            if left:
                print()

    print()
    bits, hellaswag = (any(getattr(run, key) is not None for run in runs) for key in ("bits_per_byte", "hellaswag"))
    table(["run", "steps", "final loss"] + ["bits/byte"] * bits + ["hellaswag"] * hellaswag + ["time", "tokens/s"],
          [[run.name, str(run.steps[-1]), f"{run.final():.3f}"] +
           [f"{run.bits_per_byte:.4f}" if run.bits_per_byte else "-"] * bits +
           [f"{100 * run.hellaswag:.2f}%" if run.hellaswag is not None else "-"] * hellaswag +
           [duration(run.seconds[-1]), f"{run.tokens_per_s:,.0f}"] for run in runs])
    print()
    header = ["run", "step", "optimizer"]
    if len(runs) > 1:
        header += [f"steps to {baseline.final():.3f}", "time to it"]
    rows = []
    for run in runs:
        share = 100 * run.optimizer_ms / run.step_ms
        rows.append([run.name, f"{run.step_ms:.1f} ms", f"{run.optimizer_ms:.2f} ms ({share:.1f}%)" if run.optimizer_ms else "-"])
        if len(runs) > 1:
            reached = run.reach(baseline.final())
            rows[-1] += [f"{reached[0]:.0f}", duration(reached[1])] if reached else ["not reached", ""]
    table(header, rows)
    if bits and not bits_per_nat(runs):
        print("\nThe runs' tokens differ in length, or their validation text: compare bits per byte, not nats per token.")


def bits_per_nat(runs):
    """What the nats per token of all these validation losses are to be multiplied with to be bits per byte: None where they
    differ by more than rounding, or where no run knows."""
    factors = [run.bits_per_byte / run.last("val_loss") for run in runs if run.bits_per_byte and run.last("val_loss")]
    same = factors and max(factors) - min(factors) < 1e-6 * max(factors)
    return factors[0] if same else None


def styles(runs):
    """{run: (colour, line style)}: a colour for each optimizer, whatever the order; a line style for each run of a colour."""
    chosen, of_color, others = {}, {}, 0
    for run in runs:
        color = COLORS.get(run.optimizer)
        if not color:
            color, others = OTHER_COLORS[others % len(OTHER_COLORS)], others + 1
        chosen[run] = color, LINES[of_color.get(color, 0) % len(LINES)]
        of_color[color] = of_color.get(color, 0) + 1
    return chosen


def draw(runs, baseline, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({
        "font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
        "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#ececec",
        "axes.axisbelow": True, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 11})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.8), width_ratios=[1, 1, 0.62], layout="constrained")
    color, line = ({run: style[i] for run, style in styles(runs).items()} for i in (0, 1))

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
            ax.plot(x, run.loss, color=color[run], linestyle=line[run], linewidth=1, alpha=0.4 if run.val else 1,
                    label=None if run.val else run.name)
            curve = run.curve() if run.val else []
            ring = {"markersize": 8, "markerfacecolor": "white"} if coincides(run) else {"markersize": 3.5}
            ax.plot([p[column] for p in curve], [p[2] for p in curve], color=color[run], linestyle=line[run], linewidth=2,
                    label=run.name if run.val else None, marker="o" if len(curve) <= 40 else None, **ring)
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
    factor = bits_per_nat(runs)
    if factor:
        second = axes[1].secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        second.set_ylabel("validation loss in bits per byte")
        second.spines["right"].set_visible(True)
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
        replaced(path, lambda temporary: figure.savefig(temporary, dpi=150))
    except (ValueError, OSError) as e:
        sys.exit(f"compare: cannot write the picture {path}: {e}")
    finally:
        plt.close(figure)
    print(f"\npicture: {path}")


def replaced(path, write):
    """Whoever looks at path sees the old file or the new one, whole. A device must not become a file."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError("it is there, and not a file")
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(runs, path):
    """A row for each step of each run: its name, the seconds of training so far, and all numbers of the log."""
    keys = list(dict.fromkeys(key for run in runs for entry in run.log for key in entry))

    def write(temporary):
        with open(temporary, "w", newline="") as f:
            rows = csv.writer(f)
            rows.writerow(["run", "seconds"] + keys)
            for run in runs:
                for seconds, entry in zip(run.seconds, run.log):
                    rows.writerow([run.name, f"{seconds:.6g}"] + ["" if entry.get(key) is None else entry[key] for key in keys])
    try:
        replaced(path, write)
    except OSError as e:
        sys.exit(f"compare: cannot write {path}: {e}")
    print(f"\ntable of all steps: {path}")


class TensorBoard:
    """Events under directory/RUN. add() may be called again as runs go on: what is there already is not written twice."""
    TAGS = {"loss": "loss/training", "val_loss": "loss/validation", "val_bpb": "loss/validation_bits_per_byte"}

    def __init__(self, directory):
        packages.need("tensorboardX")
        self.directory, self.writers, self.last = Path(directory), {}, {}

    def add(self, runs):
        import tensorboardX
        for run in runs:
            place = self.directory / run.name
            try:
                if run.name not in self.writers:
                    if any(place.glob("events.out.tfevents.*")):
                        sys.exit(f"compare: {place} holds events already: remove it or choose another --tensorboard DIR")
                    self.writers[run.name] = tensorboardX.SummaryWriter(str(place))
                start = run.written - run.seconds[-1]  # so that TensorBoard's relative time is that of training
                for seconds, entry in zip(run.seconds, run.log):
                    for key, value in entry.items():
                        if number(value) and key != "step" and entry["step"] > self.last.get((run.name, key), 0):
                            self.last[run.name, key] = entry["step"]
                            tag = self.TAGS.get(key) or ("hellaswag/" if key.startswith("hellaswag_") else "step/") + key
                            self.writers[run.name].add_scalar(tag, value, entry["step"], walltime=start + seconds)
                self.writers[run.name].flush()
            except OSError as e:
                sys.exit(f"compare: cannot write to {place}: {e}")
        print(f"\nTensorBoard: {self.directory}")

    def close(self):
        for writer in self.writers.values():
            writer.close()


def load(directories):
    """The runs that have something to show; names that are not their own get their parent's in front."""
    runs = [run for run in map(Run, directories) if run.log]
    names = [run.name for run in runs]
    for run, name in zip(runs, names):
        if names.count(name) > 1:
            run.name = f"{run.directory.parent.name}/{name}"
    return runs


def show(runs, args, board):
    baseline = next((run for run in runs if run.optimizer == "adamw"), runs[0])
    print_tables(runs, baseline)
    if args.csv:
        write_csv(runs, args.csv)
    if board:
        board.add(runs)
    if args.drawable:
        draw(runs, baseline, args.png or Path(args.runs[0]).resolve().parent / "compare.png")
    else:
        print("\npicture: left out, for want of the Python package matplotlib")


def watch(args, board):
    """Redraws whenever a log has grown. What a log lacks while it is being written is not worth a word."""
    before = None
    while True:
        logs = [path for path in (Path(run) / "log.jsonl" for run in args.runs) if path.exists()]
        sizes = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in logs]
        began = time.monotonic()
        if sizes != before:
            before = sizes
            with contextlib.redirect_stderr(io.StringIO()):
                runs = load([path.parent for path in logs])
            if sys.stdout.isatty():
                print("\033[H\033[2J", end="")
            waiting = len(args.runs) - len(runs)
            print(f"{time.strftime('%H:%M:%S')}, Ctrl-C ends" + (f"; {waiting} of {len(args.runs)} runs have no step yet" if waiting else ""))
            if runs:
                show(runs, args, board)
            sys.stdout.flush()
        time.sleep(max(WATCH_EVERY, 10 * (time.monotonic() - began)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--png", type=Path, help="where the picture goes [compare.png beside the first RUN]")
    parser.add_argument("--watch", action="store_true", help="show it again whenever a run has got on, until Ctrl-C")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every step of every run")
    parser.add_argument("--tensorboard", type=Path, metavar="DIR", help="write events for TensorBoard")
    args = parser.parse_args()
    args.drawable = packages.need("matplotlib", required=False)
    board = TensorBoard(args.tensorboard) if args.tensorboard else None
    try:
        if args.watch:
            watch(args, board)
        runs = load(args.runs)
        if not runs:
            sys.exit("compare: no run is left to compare")
        show(runs, args, board)
    except KeyboardInterrupt:
        if not args.watch:
            sys.exit(130)
        print()
    finally:
        if board:
            board.close()


if __name__ == "__main__":
    packages.run(main)
