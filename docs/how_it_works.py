"""Draws docs/how_it_works.png: four cuts of the bundle entropy method on an energy of one variable.

python docs/how_it_works.py
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from icnnrt.mathematics import reference
from icnnrt.mathematics.reference import Array

CUTS = 4


def sigmoid(s: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-s))


def negative_entropy(y: Array) -> Array:
    """−H(y) for y [B, 1] inside of [0, 1]."""
    return np.sum(y * np.log(y) + (1.0 - y) * np.log(1.0 - y), axis=1)


def energy(y: Array) -> tuple[Array, Array]:
    """A small convex energy, f [B] and ∇f [B, 1]."""
    z = 9.0 * (y[:, 0] - 0.72)
    f = np.logaddexp(0.0, z) + 0.6 * np.logaddexp(0.0, -2.2 * z) + 0.6 * z
    slope = 9.0 * (sigmoid(z) - 1.32 * sigmoid(-2.2 * z) + 0.6)
    return f, slope[:, None]


def main() -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    grid = np.linspace(1e-4, 1 - 1e-4, 400)[:, None]
    total = energy(grid)[0] + negative_entropy(grid)
    left.plot(grid[:, 0], total, "k", lw=2, label="f(y) − H(y), the network and the entropy")
    solution = reference.bundle_entropy_argmin(energy, np.array([[0.5]]), CUTS)
    for i in range(CUTS):
        cut = solution.offsets[0, i] + solution.slopes[0, i, 0] * (grid[:, 0] - 0.5)
        left.plot(grid[:, 0], cut + negative_entropy(grid), lw=1, label=f"cut {i + 1}, less the entropy")
        at = solution.cut_points[:, i]
        left.plot(at[0], energy(at)[0] + negative_entropy(at), "o", color=left.lines[-1].get_color())
    left.plot(solution.y[0, 0], solution.energy[0], "k*", ms=14, label="y*, and the bound below it")
    left.axhline(solution.lower_bound[0], color="grey", ls=":", lw=1)
    left.set(xlabel="y", ylim=(total.min() - 1.2, total.min() + 3.5), title="argmin.onnx: cut, solve, repeat K times")
    left.legend(fontsize=7)

    gaps = [reference.bundle_entropy_argmin(energy, np.array([[0.5]]), K).gap[0] for K in range(1, 9)]
    right.semilogy(range(1, 9), np.maximum(gaps, 1e-16), "ko-")
    right.set(xlabel="cuts K", title="the certificate: energy − lower bound")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
