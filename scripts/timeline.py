#!/usr/bin/env python3
"""Draws what the GPU did in one step of a run: the stream of the model and the optimizer, and that of the collectives.

    scripts/timeline.py RUN [--png FILE] [--title TEXT]     RUN: the --out of a run with --profile (it holds trace.json)

The picture [RUN/timeline.png] goes from the first kept step to the end of the second: the weights of the first arrive in the
forward pass of the second. With it a table: milliseconds of the second step by what they went into. trace.json is in Chrome's
format: chrome://tracing and https://ui.perfetto.dev open it too.
"""
import argparse
import json
import sys
from pathlib import Path

import packages

INK, FAINT = "#222222", "#b8b8b8"
COLORS = {"forward": "#9db7d5", "backward": "#6b8fbd", "reduce": "#dd8452", "gather": "#2a9d63",
          "clip": "#937860", "adamw": "#8172b3", "momentum": "#d7b5a6", "ns": "#c44e52", "update": "#da8bc3", "wait": "#222222"}
LANES = {0: "compute", 1: "collectives"}


class Slice:
    def __init__(self, event):
        self.name, self.lane = event["name"], event["tid"]
        self.begin, self.ms = event["ts"] / 1000, event["dur"] / 1000
        self.step, self.number = event["args"]["step"], event["args"]["number"]

    def label(self):
        return f"{self.name} {self.number}" if self.lane == 1 or self.name == "wait" else self.name


def read_trace(run):
    """(title, slices in order of their beginning)"""
    path = Path(run) / "trace.json"
    if path.exists() and not path.is_file():
        sys.exit(f"timeline: {path} is not a file")
    try:
        events = json.loads(path.read_text())["traceEvents"]
        title = [e["args"]["name"] for e in events if e.get("name") == "process_name"][0]
        slices = sorted((Slice(e) for e in events if e["ph"] == "X"), key=lambda s: (s.begin, -s.ms))
    except OSError as e:
        sys.exit(f"timeline: {e}: train with --profile and --out {run}")
    except (ValueError, KeyError, IndexError, TypeError) as e:
        sys.exit(f"timeline: {path} is not a trace of train_gpt: {e!r}")
    if not slices:
        sys.exit(f"timeline: {path} has no step in it")
    return title, slices


def table(slices):
    """Rows (what, milliseconds) of the last step on the compute stream; waits are part of the forward pass."""
    last = max(s.step for s in slices)
    sums = {}
    for s in slices:
        if s.step == last and s.lane == 0:
            sums[s.name] = sums.get(s.name, 0) + s.ms
    rows = [(name, ms) for name, ms in sums.items() if name != "wait"]
    whole = sum(ms for _, ms in rows)
    return last, rows + [("the step", whole), ("of it waited for weights", sums.get("wait", 0))]


def draw(slices, title, png):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(14, 3.2), dpi=150)
    end = max(s.begin + s.ms for s in slices)
    for s in slices:
        bottom, height = (1.0, 0.8) if s.lane == 0 else (0.0, 0.8)
        if s.name == "wait":  # inside the forward pass
            height = 0.3
        axes.broken_barh([(s.begin, s.ms)], (bottom, height), facecolors=COLORS.get(s.name, "#7f7f7f"), edgecolor="white", linewidth=0.3)
        if s.ms > 0.008 * end * len(s.label()):
            axes.text(s.begin + s.ms / 2, bottom + height / 2, s.label(), ha="center", va="center", fontsize=7,
                      color="white" if s.name in ("wait", "ns", "backward", "adamw") else INK)
    for step in sorted({s.step for s in slices}):
        begin = min(s.begin for s in slices if s.step == step and s.lane == 0)
        axes.axvline(begin, color=FAINT, linewidth=0.8)
        axes.text(begin, 2.0, f" step {step}", fontsize=8, color=INK, va="top")
    lanes = sorted({s.lane for s in slices})
    axes.set_yticks([1.4 if lane == 0 else 0.4 for lane in lanes], [LANES[lane] for lane in lanes])
    axes.set_ylim(-0.1 if 1 in lanes else 0.9, 2.05)
    axes.set_xlim(0, end)
    axes.set_xlabel("milliseconds")
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    names = [name for name in COLORS if any(s.name == name for s in slices)]
    handles = [matplotlib.patches.Patch(color=COLORS[name], label=name) for name in names]
    figure.legend(handles=handles, ncol=len(handles), loc="lower center", fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(png)
    print(f"wrote {png}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="the --out of a run with --profile")
    parser.add_argument("--png", help="the picture [RUN/timeline.png]")
    parser.add_argument("--title", help="over the picture [what the run says of itself]")
    args = parser.parse_args()
    packages.need("matplotlib")  # first: it may begin the script anew
    title, slices = read_trace(args.run)
    step, rows = table(slices)
    print(f"| step {step} | ms |\n|---|---|")
    for what, ms in rows:
        print(f"| {what} | {ms:.3f} |")
    draw(slices, args.title or title, args.png or Path(args.run) / "timeline.png")


if __name__ == "__main__":
    packages.run(main)
