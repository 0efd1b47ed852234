#!/usr/bin/env python3
"""GPU time of a training step by family of kernels.

    scripts/profile_kernels.py run [--tool cupti|nsys|ncu] -- FLAG...    runs ./train_gpt FLAG... under the tool, then the table
    scripts/profile_kernels.py FILE...                                   the table, from what a tool has written before:
        nsys stats --report cuda_gpu_trace --format csv RUN.nsys-rep
        ncu --csv --metrics gpu__time_duration.sum --cache-control none --clock-control none ./train_gpt FLAG...

cupti (dev/kernel_trace.cpp, with nothing but the CUDA Toolkit) and nsys measure the step as it runs, gaps between kernels
included; ncu each kernel by itself, which takes minutes. Summed is what
lies between the first and the last step of the run: each step has one clip_scale_kernel, and it begins with the next embedding.
So a run wants --steps 3 or more, and neither --val nor --sample_every. The program's NVTX ranges (step, forward of layer 3, head,
optimizer) are on nsys' and ncu's own pages: `nsys profile --trace=cuda,nvtx`, `ncu --nvtx`; those within a micro-step only with
--graph 0, since a graph is launched as one.
"""
import argparse
import csv
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The first pattern that a kernel's name has, without template and function arguments, decides.
FAMILIES = [
    ("attention", r"(flash|twin)_\w+_kernel|last_row_kernel|hopper_(forward|dq|dkv)\w*_kernel"),
    ("Newton-Schulz", r"muon_\w+_kernel|hopper_chain_kernel|\bhopper_kernel|\bproduct_(fp32_)?kernel"),
    ("LayerNorm, residual", r"layernorm_\w+_kernel"),
    ("classifier, loss", r"classifier_kernel|sum_losses_kernel"),
    ("GELU", r"\bgelu_\w+_kernel"),
    ("bias gradients, partial sums", r"bias_backward_kernel|add_partials_kernel"),
    ("embedding", r"embedding_\w+_kernel|(position|token)_backward_kernel"),
    ("AdamW, norm, casts", r"adamw_kernel|norm_sums_kernel|clip_scale_kernel|cast_params_kernel"),
    ("NCCL", r"nccl"),
    ("cuBLASLt", r"nvjet|cublas|cutlass|xmma|gemm|splitk"),
    ("copies, memset", r"^\[CUDA mem|^Mem(cpy|set)|memset_kernel"),
]
OTHER = "other"
MILLISECONDS = {"ns": 1e-6, "nsecond": 1e-6, "us": 1e-3, "usecond": 1e-3, "ms": 1.0, "msecond": 1.0, "s": 1e3, "second": 1e3}


def family(name):
    base = name if name.startswith("[") else re.sub(r"^void ", "", re.split(r"[<(]", name.replace("(anonymous namespace)", ""))[0])
    for title, pattern in FAMILIES:
        if re.search(pattern, base, re.IGNORECASE):
            return title
    return OTHER


def number(text):
    return float(text.replace(",", ""))


def launches(lines):
    """[(name, ms, start or None)] in the order in which the device ran them, from either tool's CSV; other lines are skipped."""
    rows = csv.reader(lines)
    columns, found = None, []
    for row in rows:
        if "Kernel Name" in row and "Metric Value" in row:
            columns = {"name": row.index("Kernel Name"), "metric": row.index("Metric Name"), "unit": row.index("Metric Unit"),
                       "value": row.index("Metric Value"), "width": len(row)}
        elif "Name" in row and any(re.match(r"Duration \(\w+\)$", cell) for cell in row):
            value = next(i for i, cell in enumerate(row) if cell.startswith("Duration ("))
            start = next(i for i, cell in enumerate(row) if cell.startswith("Start ("))
            columns = {"name": row.index("Name"), "value": value, "start": start, "width": len(row),
                       "scale": MILLISECONDS[re.search(r"\((\w+)\)", row[value])[1]]}
        elif columns and len(row) == columns["width"]:
            if "metric" not in columns:
                scale = columns["scale"]
                found.append((row[columns["name"]], number(row[columns["value"]]) * scale, number(row[columns["start"]]) * scale))
            elif row[columns["metric"]] == "gpu__time_duration.sum":
                found.append((row[columns["name"]], number(row[columns["value"]]) * MILLISECONDS[row[columns["unit"]]], None))
    if not found:
        raise ValueError("no kernel in it, in the format of a cuda_gpu_trace of nsys stats or of ncu's gpu__time_duration.sum")
    return sorted(found, key=lambda launch: launch[2]) if found[0][2] is not None else found


def steps_of(found):
    """The launches from the second step's first to the last step's first, and how many steps these are."""
    starts, after_clip = [], False
    for i, (name, _, _) in enumerate(found):
        if "clip_scale_kernel" in name:
            after_clip = True
        elif after_clip and "embedding_forward_kernel" in name:
            starts.append(i)
            after_clip = False
    if len(starts) < 2:
        raise ValueError("fewer than three whole steps in it: --steps 3 or more")
    return found[starts[0]:starts[-1]], len(starts) - 1


def table(found):
    inside, steps = steps_of(found)
    sums, counts, others = {}, {}, {}
    for name, ms, _ in inside:
        of = family(name)
        sums[of], counts[of] = sums.get(of, 0) + ms / steps, counts.get(of, 0) + 1
        if of == OTHER:
            others[name] = others.get(name, 0) + ms / steps
    total = sum(sums.values())
    lines = [f"| GPU time of a step ({steps} summed) | ms | share | launches |", "|---|---|---|---|"]
    for of in sorted(sums, key=sums.get, reverse=True):
        lines.append(f"| {of} | {sums[of]:.3f} | {100 * sums[of] / total:.1f}% | {counts[of] / steps:g} |")
    lines.append(f"| all | {total:.3f} | 100% | {len(inside) / steps:g} |")
    if inside[0][2] is not None:
        after = found[found.index(inside[-1]) + 1][2]  # the last step's first
        span = (after - inside[0][2]) / steps
        busy, until = 0.0, 0.0
        for _, ms, start in inside:  # copies and collectives may run beside kernels
            busy += max(0.0, start + ms - max(start, until)) / steps
            until = max(until, start + ms)
        lines.append(f"| from one step's begin to the next | {span:.3f} | gaps {100 * (1 - busy / span):.1f}% of it | |")
    lines += [f"other: {ms:.3f} ms {name}" for name, ms in sorted(others.items(), key=lambda item: -item[1])]
    return "\n".join(lines)


def run_tool(tool, flags):
    directory = ROOT / "build" / "profile"
    directory.mkdir(parents=True, exist_ok=True)
    program = ["./train_gpt", *flags]
    file = directory / f"{tool}.csv"
    try:
        if tool == "cupti":
            library = "build/kernel_trace.so"
            subprocess.run(["make", library], cwd=ROOT, check=True, stdout=sys.stderr)
            file.unlink(missing_ok=True)
            subprocess.run(program, cwd=ROOT, check=True, stdout=sys.stderr,
                           env={**os.environ, "CUDA_INJECTION64_PATH": str(ROOT / library), "KERNEL_TRACE": str(file)})
            return file.read_text().splitlines() if file.exists() else []
        if tool == "nsys":
            subprocess.run(["nsys", "profile", "--trace=cuda,nvtx", "--cuda-graph-trace=node", "--force-overwrite=true", f"--output={directory}/run", *program],
                           cwd=ROOT, check=True, stdout=sys.stderr)
            done = subprocess.run(["nsys", "stats", "--report=cuda_gpu_trace", "--format=csv", "--force-export=true",
                                   f"{directory}/run.nsys-rep"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        else:
            done = subprocess.run(["ncu", "--csv", "--metrics=gpu__time_duration.sum", "--cache-control=none",
                                   "--clock-control=none", *program], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        sys.exit(f"profile_kernels.py: no {tool} here: it comes with the CUDA Toolkit (Nsight)")
    except subprocess.CalledProcessError as error:
        sys.exit(f"profile_kernels.py: {' '.join(error.cmd[:2])} ended with exit status {error.returncode}")
    file.write_text(done.stdout)
    return done.stdout.splitlines()


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ["run"]:
        split = arguments.index("--") if "--" in arguments else len(arguments)
        parser = argparse.ArgumentParser(prog="profile_kernels.py run", description=__doc__,
                                         formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--tool", choices=("cupti", "nsys", "ncu"), default="cupti")
        tool = parser.parse_args(arguments[1:split]).tool
        sources = [(tool, run_tool(tool, arguments[split + 1:]))]
    else:
        parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("files", nargs="+", metavar="FILE")
        sources = []
        for path in parser.parse_args(arguments).files:
            try:
                sources.append((path, Path(path).read_text(errors="replace").splitlines()))
            except OSError as error:
                sys.exit(f"profile_kernels.py: cannot read {path}: {error.strerror}")
    for name, lines in sources:
        try:
            print(table(launches(lines)))
        except ValueError as error:
            sys.exit(f"profile_kernels.py: {name}: {error}")


if __name__ == "__main__":
    main()
