#!/usr/bin/env python3
"""The tables of scripts/reproduce.sh, as Markdown, from the log.jsonl of its runs and nothing else.

    scripts/proof.py DIR                 DIR has runs OPTIMIZER_RATE_seedN: what each needs to come to tuned AdamW's final loss
    scripts/proof.py DIR --best NAME     the rate at which that optimizer's run with the first seed ends lowest
    scripts/proof.py DIR --beyond NAME   a rate to try next if that best one is at an end of those tried: 1.5 times further out;
                                         nothing if it is not, or with six rates tried
    scripts/proof.py DIR --ablations     DIR has runs VARIANT_seedN: final loss and optimizer time of each

Loss is the validation loss; between two evaluations the curve is a straight line. What needs fewer steps to a loss is read off
curves of one length: no run had its schedule shortened to end there. Seconds are those of training steps. Tuned: the rate that
was best with one seed. Spread: the highest final loss of the seeds less the lowest.
"""
import argparse
import re
import sys
from pathlib import Path

import compare
import packages

FIRST_SEED = "1337"
MOST_RATES = 6


def read_runs(directory):
    """{(name, seed): run, or None where it diverged}, in order of name. A run that is not at its end is left out."""
    runs = {}
    for path in sorted(Path(directory).iterdir()):
        if match := re.fullmatch(r"(.+)_seed(\d+)", path.name):
            if (path / "diverged").exists():
                runs[match.groups()] = None
            elif (path / "log.jsonl").exists():
                run = compare.Run(path)
                if run.log and run.val:
                    runs[match.groups()] = run
    last = max((run.steps[-1] for run in runs.values() if run), default=0)
    for key, run in list(runs.items()):
        if run and run.steps[-1] < last:
            print(f"proof: left out {'_seed'.join(key)}, which is at step {run.steps[-1]} of {last}", file=sys.stderr)
            del runs[key]
    return runs


def sweep(runs, optimizer):
    """[(rate, final loss or None)] of an optimizer's runs with the first seed, in order of rate."""
    found = [(name.rsplit("_", 1)[1], run and run.final()) for (name, seed), run in runs.items()
             if seed == FIRST_SEED and name.rsplit("_", 1)[0] == optimizer]
    return sorted(found, key=lambda point: float(point[0]))


def best_rate(runs, optimizer):
    points = [(loss, rate) for rate, loss in sweep(runs, optimizer) if loss is not None]
    return min(points)[1] if points else sys.exit(f"proof: no run of {optimizer} has come to its end")


def rate_beyond(runs, optimizer):
    rates, best = [rate for rate, _ in sweep(runs, optimizer)], best_rate(runs, optimizer)
    if best not in (rates[0], rates[-1]) or len(rates) >= MOST_RATES:
        return None
    return f"{float(best) * 1.5 if best == rates[-1] else float(best) / 1.5:.1e}".replace("e-0", "e-")


def mean(values):
    return sum(values) / len(values)


def over_seeds(runs, wanted):
    return [run for (name, _), run in runs.items() if name == wanted and run]


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def print_proof(runs):
    optimizers = [o for o in ("adamw", "dmuon", "muon", "hierarchical") if sweep(runs, o)]
    if "adamw" not in optimizers:
        sys.exit("proof: no run of adamw has come to its end")
    print(row("optimizer", "final loss at each rate (one seed)"))
    print("|---|---|")
    for optimizer in optimizers:
        points = sweep(runs, optimizer)
        best = best_rate(runs, optimizer)
        at_the_end = len(points) > 1 and best in (points[0][0], points[-1][0])
        print(row(optimizer, ", ".join(f"{rate}: " + ("diverged" if loss is None else f"{loss:.4f}") for rate, loss in points)
                  + (" (the best is at the end of the sweep: a better one may lie beyond)" if at_the_end else "")))

    tuned = over_seeds(runs, "adamw_" + best_rate(runs, "adamw"))
    target, steps = mean([run.final() for run in tuned]), tuned[0].steps[-1]
    tokens_of_step = tuned[0].log[-1]["tokens"] / steps
    seconds = mean([run.seconds[-1] for run in tuned])
    print(f"\nTuned AdamW ends at {target:.4f} after {steps} steps, {steps * tokens_of_step / 1e6:.1f} M tokens and {seconds:.1f} s.\n")
    print(row("optimizer", "rate", "seeds", "final loss", "spread", f"steps to {target:.4f}", "M tokens", "seconds",
              "of its steps", "of its seconds", "step ms", "optimizer ms"))
    print("|---" * 12 + "|")
    for optimizer in optimizers:
        rate = best_rate(runs, optimizer)
        same = over_seeds(runs, f"{optimizer}_{rate}")
        finals = [run.final() for run in same]
        cells = [optimizer, rate, str(len(same)), f"{mean(finals):.4f}", f"{max(finals) - min(finals):.4f}" if len(same) > 1 else ""]
        # AdamW itself by definition: of its seeds about one half ends above their mean.
        reached = [(steps, seconds)] if optimizer == "adamw" else [point for run in same if (point := run.reach(target))]
        if len(reached) == len(same) or optimizer == "adamw":
            to_steps, to_seconds = mean([point[0] for point in reached]), mean([point[1] for point in reached])
            cells += [f"{to_steps:.0f}", f"{to_steps * tokens_of_step / 1e6:.1f}", f"{to_seconds:.1f}",
                      f"{to_steps / steps:.3f}", f"{to_seconds / seconds:.3f}"]
        else:
            cells += [f"not reached by {len(same) - len(reached)} of {len(same)}", "", "", "", ""]
        cells += [f"{mean([run.step_ms for run in same]):.2f}", f"{mean([run.optimizer_ms for run in same]):.2f}"]
        print(row(*cells))


def print_ablations(runs):
    base = over_seeds(runs, "base")
    if not base:
        sys.exit("proof: no run of base has come to its end")
    seeds = [seed for name, seed in runs if name == "base"]
    print(row("variant", *(f"final loss, seed {seed}" for seed in seeds), "mean", "less base's", "optimizer ms"))
    print("|---" * (len(seeds) + 4) + "|")
    names = sorted({name for name, _ in runs}, key=lambda name: (name != "base", name))
    for name in names:
        same = [runs.get((name, seed)) for seed in seeds]
        finals = [f"{run.final():.4f}" if run else "diverged" if (name, seed) in runs else "" for run, seed in zip(same, seeds)]
        whole = [run for run in same if run]
        loss = mean([run.final() for run in whole]) if len(whole) == len(seeds) else None
        print(row(name, *finals, *(["", ""] if loss is None else
                                   [f"{loss:.4f}", f"{loss - mean([run.final() for run in base]):+.4f}"]),
                  f"{mean([run.optimizer_ms for run in whole]):.2f}" if whole else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path)
    parser.add_argument("--best", metavar="NAME")
    parser.add_argument("--beyond", metavar="NAME")
    parser.add_argument("--ablations", action="store_true")
    args = parser.parse_args()
    if not args.directory.is_dir():
        sys.exit(f"proof: {args.directory}: no such directory")
    runs = read_runs(args.directory)
    if args.best:
        print(best_rate(runs, args.best))
    elif args.beyond:
        print(rate_beyond(runs, args.beyond) or "")
    elif args.ablations:
        print_ablations(runs)
    else:
        print_proof(runs)


if __name__ == "__main__":
    packages.run(main)
