#!/usr/bin/env python3
"""What Muon does to a momentum: its singular values before and after Newton-Schulz, from a checkpoint of a muon or dmuon run.

    scripts/singular_values.py DIR/step_00000800.safetensors [--layer 2] [--coefficients polar_express] [--steps 5] [--png FILE]

A table and a picture of one layer's six matrices, each over its Frobenius norm, as the optimizer takes them. The iteration is the
one of dmuon.cuh, section 2, whose coefficients are read there, in fp32 (the GPU rounds its operands to bf16, which moves the
singular values by about a hundredth), on the momentum itself (with --nesterov 1 the optimizer takes gradient + 0.95 momentum, and
the gradient is not in a checkpoint).
"""
import argparse
import re
import sys
from pathlib import Path

import packages

MOMENTUM = "optimizer.momentum."


def fail(text):
    sys.exit(f"singular_values: {text}")


def coefficients(name):
    """[(a, b, c)] of the steps, as dmuon.cuh has them; one that is the same at every step stands once."""
    source = (packages.ROOT / "dmuon.cuh").read_text()

    def rows(pattern):
        numbers = [float(x) for x in re.findall(r"-?\d+\.\d+", re.search(pattern, source, re.S)[1])]
        return [tuple(numbers[i:i + 3]) for i in range(0, len(numbers), 3)]

    if name == "keller":
        return rows(r'"keller"\) return \{(.*?)\}')
    if name == "you":
        return rows(r"you\[5\] = \{(.*?)\};")
    s = float(re.search(r"double s = ([\d.]+);", source)[1])
    return [(a / s, b / s**3, c / s**5) for a, b, c in rows(r"polar_express\[5\] = \{(.*?)\};")]


def read_tensor(path, name):
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "np") as f:
            if name not in f.keys():
                fail(f"{path} has no {name}: not of a muon or dmuon run, or of a model with fewer layers")
            return f.get_tensor(name)
    except (OSError, SafetensorError) as e:
        fail(f"{path}: {e}")


def layer_matrices(path, layer):
    """{"Q": (C, C), ...} of a layer's momentum: those that are orthogonalised one by one."""
    def read(name):
        return read_tensor(path, f"{MOMENTUM}h.{layer}.{name}.weight")
    qkv = read("attn.c_attn")
    third = len(qkv) // 3
    return {**{name: qkv[i * third:(i + 1) * third] for i, name in enumerate("QKV")}, "O": read("attn.c_proj"),
            "F": read("mlp.c_fc"), "P": read("mlp.c_proj")}


def newton_schulz(x, polynomials, steps):
    """x (m, n), m <= n, over its Frobenius norm -> nearly its polar factor."""
    for k in range(steps):
        a, b, c = polynomials[min(k, len(polynomials) - 1)]
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def spectra(matrices, polynomials, steps):
    """{name: (before, after, along)}: the singular values of the matrix over its norm, and those after Newton-Schulz, from the
    largest down; and what Newton-Schulz has made of each of `before`, along the same two singular vectors."""
    import numpy as np
    found = {}
    for name, matrix in matrices.items():
        norm = np.linalg.norm(matrix.astype(np.float64))
        x = (matrix / norm if norm else matrix).astype(np.float32)
        x = x.T if x.shape[0] > x.shape[1] else x
        y = newton_schulz(x, polynomials, steps).astype(np.float64)
        u, before, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
        found[name] = before, np.linalg.svd(y, compute_uv=False), np.einsum("mi,mn,in->i", u, y, v)
    return found


def print_table(matrices, found):
    import numpy as np
    print(f"{'matrix':<8}{'shape':>12}   {'before: largest':>15}{'median':>10}{'smallest':>10}   "
          f"{'after: largest':>14}{'median':>8}{'smallest':>10}   {'in 0.7 to 1.3':>13}")
    for name, (before, after, _) in found.items():
        rows, columns = matrices[name].shape
        within = np.mean((after > 0.7) & (after < 1.3))
        print(f"{name:<8}{f'{rows} x {columns}':>12}   {before[0]:>15.4f}{np.median(before):>10.2g}{before[-1]:>10.2g}   "
              f"{after[0]:>14.3f}{np.median(after):>8.3f}{after[-1]:>10.2g}   {100 * within:>12.0f}%")


def draw(found, polynomials, steps, title, path):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                         "axes.titleweight": "bold", "axes.titlesize": 11, "axes.grid": True, "grid.color": "#ececec"})
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(found)))
    floor = 1e-5  # what is smaller comes out smaller than anybody sees
    for (name, (before, after, along)), color in zip(found.items(), colors):
        order = np.linspace(0, 100, len(before))
        axes[0].semilogy(order, before, color=color, label=name)
        axes[1].plot(order, after, color=color, label=name)
        axes[2].semilogx(before, along, ".", color=color, markersize=4)
    s = p = np.geomspace(floor, 1, 3000)
    for k in range(steps):
        a, b, c = polynomials[min(k, len(polynomials) - 1)]
        p = a * p + b * p**3 + c * p**5
    axes[2].semilogx(s, p, color="#c8c8c8", linewidth=1.5, zorder=0, label=f"the {steps} polynomials")
    axes[0].set_title("Momentum over its norm")
    axes[1].set_title("After Newton-Schulz")
    axes[2].set_title("Each value, before and after")
    for ax in axes[:2]:
        ax.set_xlabel("singular values, the largest first (%)")
        ax.legend(frameon=False, ncols=2)
    axes[0].set_ylim(floor, 1)
    axes[2].set_xlim(floor, 1)
    axes[2].set_xlabel("before")
    axes[2].set_ylabel("after")
    axes[2].legend(frameon=False, loc="lower right")
    axes[1].set_ylim(0, 1.3)
    axes[2].set_ylim(0, 1.3)
    try:
        figure.savefig(path, dpi=72)
    except (ValueError, OSError) as e:
        fail(f"cannot write the picture {path}: {e}")
    print(f"\npicture: {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path)
    parser.add_argument("--layer", type=int, default=0, metavar="N", help="which block, from 0 [0]")
    parser.add_argument("--coefficients", choices=("polar_express", "keller", "you"), default="polar_express")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="Newton-Schulz steps [5]")
    parser.add_argument("--png", type=Path, help="where the picture goes [singular_values.png beside the checkpoint]")
    args = parser.parse_args()
    polynomials = coefficients(args.coefficients)
    if not 0 <= args.steps <= (5 if len(polynomials) > 1 else 20):
        parser.error(f"--steps {args.steps}: {args.coefficients} has 0 to {5 if len(polynomials) > 1 else 20}")
    packages.need("numpy", "matplotlib", "safetensors")
    matrices = layer_matrices(args.checkpoint, args.layer)
    found = spectra(matrices, polynomials, args.steps)
    print_table(matrices, found)
    title = f"{args.checkpoint.name}, block {args.layer}: {args.steps} steps of {args.coefficients}"
    draw(found, polynomials, args.steps, title, args.png or args.checkpoint.with_name("singular_values.png"))


if __name__ == "__main__":
    packages.run(main)
