"""The bundle entropy method: K cuts of an energy, each at the solution of the model of those before.

Problem (Amos, Xu, Kolter, *Input Convex Neural Networks*, ICML 2017, section 4 and algorithm 1)::

    y* = argmin over y in the domain of  f(y) + R(y)        for the unit box R = −H, H(y) = −Σ y log y + (1−y) log(1−y)

    repeat K times:  f_i, g_i = f(y_i), ∇f(y_i);  e_i = f_i + g_i'(c − y_i)
                     λ, y_{i+1} = solution of the model of cuts 1 .. i, from the last λ
    certificate      f(y) + R(y) at y = y_{K+1}, less the dual value of the last model

Stated for what computes at once, numpy and torch; an energy inside an ONNX loop is spliced in by the exporter.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from icnnrt.mathematics.domains import Domain
from icnnrt.mathematics.namespace import Array, Namespace


class Trajectory(NamedTuple):
    """All that the K-step bundle method leaves behind; enough to differentiate through it.

    y, lam and cut_points have the energy's dtype; everything else is float64. ½ and H are the unit box's.
    """

    y: Array  # [B, n] the answer
    lam: Array  # [B, K] multipliers of the last solve
    slopes: Array  # [B, K, n] g_i = ∇f(y_i)
    offsets: Array  # [B, K] centred: e_i = f(y_i) + g_i'(½ − y_i)
    cut_points: Array  # [B, K, n] y_i; the first is y_init, the (i+1)-th the answer of the i-th solve
    lam_history: Array  # [B, K, K] row k−1: multipliers after k cuts, zero beyond the k-th
    energy: Array  # [B] f(y) − H(y) at the y handed out
    lower_bound: Array  # [B] a number no energy can be below, if f is convex
    gap: Array  # [B] energy − lower_bound
    residual: Array  # [B, 3] of the last model: stationarity (the rounding of y), feasibility, complementarity
    complementarity_history: Array  # [B, K] complementarity of every solve; a gradient needs all of them small


def argmin(
    xp: Namespace,
    at: Domain,
    value_and_gradient: Callable[[Array], tuple[Array, Array]],
    y_init: Array,
    iterations: int,
    solve: Callable[[Array, Array, Array | None], Any],
) -> Trajectory:
    """K = iterations cuts from y_init [B, n], whose dtype is the energy's.

    `value_and_gradient(y [B, n]) -> (f [B], ∇f [B, n])`. `solve(G [B, k, n], e [B, k], λ [B, k−1] or None)` gives y,
    lam, lower_bound and residual [B, 3] of the model of k cuts, in float64, by these names.
    """
    c = at.centre(y_init.shape[1])
    y, lam, found = y_init, None, None
    points, slopes, offsets, history, complementarity = [], [], [], [], []
    for _ in range(iterations):
        f, g = value_and_gradient(y)
        points.append(y)
        slopes.append(xp.double(g))
        offsets.append(xp.double(f) + xp.sum(slopes[-1] * (c - xp.double(y)))[:, 0])
        found = solve(xp.stack(slopes), xp.stack(offsets), lam)
        y, lam = xp.like(found.y, y_init), found.lam
        history.append(lam)
        complementarity.append(found.residual[:, 2])
    assert found is not None, "iterations >= 1"
    rounding = xp.max(abs(xp.double(y) - found.y))  # NaN where y is
    energy = xp.double(value_and_gradient(y)[0]) + at.regulariser(xp, xp.double(y))[:, 0]
    return Trajectory(
        y=y,
        lam=xp.like(lam, y_init),
        slopes=xp.stack(slopes),
        offsets=xp.stack(offsets),
        cut_points=xp.stack(points),
        lam_history=xp.stack([xp.extended(row, lam) for row in history]),
        energy=energy,
        lower_bound=found.lower_bound,
        gap=energy - found.lower_bound,
        residual=xp.concat([rounding, found.residual[:, 1:]]),
        complementarity_history=xp.stack(complementarity),
    )
